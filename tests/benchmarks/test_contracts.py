"""The layer's GEMMs are called as in the recordings that are kept: same functions, shapes, dtypes, strides, alignment.

``tests/contracts`` says where each was made.  After a change that is meant, record anew and read the difference:
``python -m benchmarks.gpu.contracts tests/contracts``.
"""

import copy
import json
import math
import os
import subprocess
import sys

import pytest
import torch

from benchmarks.gpu import contracts
from benchmarks.gpu.recorder import differences, recorded
from tests import ranks
from tests.test_gpu import ROOT, stand_ins

KEPT = {path.stem: json.loads(path.read_text()) for path in sorted(contracts.KEPT.glob("*.json"))}


def test_recordings_say_where_they_were_made():
    assert set(KEPT) == {"torch", "te"}
    for recording in KEPT.values():
        assert recording["made"]["device"] and recording["made"]["versions"]["torch"]


@pytest.mark.parametrize("backend", KEPT)
def test_recordings_hold_what_the_kernels_ask_for(backend):
    """torch/aten GroupedBlas: ends in int32, 16-byte strides and addresses; every case of today is in the file."""
    cases = KEPT[backend]["cases"]
    assert set(cases) == set(contracts.recordings(backend))
    for name, calls in cases.items():
        assert isinstance(calls, list) and (calls or name == "no rows"), (name, calls)
        for tensor in tensors_of(calls):
            assert tensor["aligned"] and not math.isnan(tensor.get("magnitudes", 0.0)), (name, tensor)
        for call in calls:
            if call["call"] == "aten._grouped_mm":
                assert call["args"][2]["dtype"] == "torch.int32"


def tensors_of(value):
    """Every described tensor in a recording."""
    if isinstance(value, dict) and "stride" in value:
        yield value
    elif isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from tensors_of(one)


def replay_torch() -> None:
    from benchmarks.gpu import layers

    layers.start_megatron()
    found = contracts.record_all("torch")["cases"]
    assert not (lines := contracts.against_kept("torch", found)), "\n".join(lines[:20])

    # What the recording is for: another layout of the weights, or another type of the groups' ends, is seen.
    grouped_mm = torch.nn.functional.grouped_mm
    for change in (
        lambda a, b, offs: grouped_mm(a, b.contiguous(), offs=offs),
        lambda a, b, offs: grouped_mm(a.float(), b.float(), offs=offs).bfloat16(),
    ):
        torch.nn.functional.grouped_mm = change
        lines = contracts.against_kept("torch", contracts.record_all("torch")["cases"])
        assert any(".stride" in line or ".dtype" in line for line in lines), lines
    torch.nn.functional.grouped_mm = grouped_mm

    # Backward is recorded too: one product makes three calls, forward and for the gradient of each operand.
    a, b = torch.randn(8, 16, requires_grad=True), torch.randn(2, 16, 4, requires_grad=True)
    with recorded() as calls:
        grouped_mm(a, b, offs=torch.tensor([3, 8], dtype=torch.int32)).backward(torch.ones(8, 4))
    assert [call["call"] for call in calls] == ["aten._grouped_mm"] * 3
    assert calls[0]["args"][2]["values"] == [3, 8] and calls[0]["args"][0]["shape"] == [8, 16]
    grouped_mm(a, b, offs=torch.tensor([3, 8], dtype=torch.int32))
    assert len(calls) == 3


def test_torch_experts_call_as_recorded(tmp_path):
    ranks.call(replay_torch, ranks=1, folder=tmp_path)


@pytest.mark.skipif(not stand_ins(), reason="no stand-ins for Transformer Engine's kernels here")
def test_transformer_engine_is_called_as_recorded(tmp_path):
    code = (
        "import json, sys, tests.te.preload; from benchmarks.gpu import contracts, layers; layers.start_megatron(); "
        "open(sys.argv[1], 'w').write(json.dumps(contracts.against_kept('te', contracts.record_all('te')['cases'])))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    result = tmp_path / "lines.json"
    command = [sys.executable, "-c", code, str(result)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert result.exists(), done.stderr[-3000:]
    assert not (lines := json.loads(result.read_text())), "\n".join(lines[:20])


def test_differences_name_the_place():
    wanted = KEPT["torch"]["cases"]["uneven"]
    assert differences(wanted, copy.deepcopy(wanted), 0) == []
    other = copy.deepcopy(wanted)
    other[0]["args"][0]["stride"] = [1, 1]
    other[1]["out"]["magnitudes"] *= 1.01
    assert [line.partition(":")[0] for line in differences(wanted, other, 0.001)] == [
        "[0].args[0].stride[0]",
        "[1].out.magnitudes",
    ]
    assert len(differences(wanted, wanted[1:], 0)) == 1
    other[1]["out"]["magnitudes"] = math.nan
    assert "[1].out.magnitudes" in differences(wanted, other, 1)[-1]
