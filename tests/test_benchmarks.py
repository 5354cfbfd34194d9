"""The benchmark scripts run and say what they promise to; their figures are taken elsewhere."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FIELDS = {
    "method",
    "mean_k",
    "histogram",
    "ep",
    "tokens",
    "seconds",
    "floor_seconds",
    "rows_sent",
    "bytes_sent",
    "peak_bytes",
}


def script(name, *argv):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-W", "ignore", str(ROOT / "benchmarks" / name), *map(str, argv)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_memory_guard_keeps_its_promise(tmp_path):
    file = tmp_path / "guard.json"
    script("memory_guard.py", "--tokens", 128, "--width", 64, "--expert-width", 96, "--bounds", 2, 1, "--json", file)
    free, two, one = json.loads(file.read_text())
    assert free["cut"] == 0 and two["rows"] == 256 and one["rows"] == 128
    assert one["peak_bytes"] < two["peak_bytes"] < free["peak_bytes"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    file = tmp_path_factory.mktemp("bench") / "rows.json"
    sizes = "--tokens 64 --width 32 --expert-width 48 --experts 4 --mean-k 1,2 --ep 1,2 --repeats 1".split()
    script("bench_moe_layer.py", *sizes, "--json", file)
    return json.loads(file.read_text())


def test_rows_have_the_promised_fields(rows):
    assert all(set(row) == FIELDS for row in rows)
    assert {row["ep"] for row in rows} == {1, 2}
    assert {row["histogram"] for row in rows} == {"balanced", "skewed"}


def test_rows_sent_are_those_of_the_unit(rows):
    for row in rows:
        if row["method"] == "dynmoe-expert":
            assert row["rows_sent"] == row["mean_k"] * row["tokens"] * row["ep"]
        if row["method"] == "dynmoe-rank":
            assert row["tokens"] * row["ep"] <= row["rows_sent"] <= row["mean_k"] * row["tokens"] * row["ep"]


def compare_methods() -> None:
    """Every method's output and gradients on one ragged case, against the dense reference."""
    import torch
    import torch.distributed as dist

    from benchmarks.competitors import FLOOR, METHODS, build
    from benchmarks.competitors.case import Case, Setting
    from benchmarks.competitors.method import NotPossible
    from megatron_dynmoe import reference

    dist.init_process_group("gloo")
    alone = dist.new_group([0])
    for mean_k, histogram in ((2.0, "balanced"), (2.5, "skewed")):
        setting = Setting(
            tokens=48,
            width=16,
            expert_width=24,
            experts=4,
            mean_k=mean_k,
            histogram=histogram,
            ep=1,
            dtype=torch.float32,
        )
        case = Case.make(setting, 0, "cpu", dist.group.WORLD, alone)
        leaves = [t.clone().requires_grad_() for t in (case.x_TD, case.weights_TE, case.fc1_LGD, case.fc2_LDF)]
        x, weights, fc1, fc2 = leaves
        masked = torch.where(case.map_TE, weights, 0.0)
        wanted_out = reference.dense_moe(x, masked, fc1, fc2)
        wanted_out.backward(case.grad_TD)
        ran = 0
        for name in METHODS:
            if name == FLOOR or name.startswith("megatron"):  # the floor is no layer; megatron's map has a fixed k
                continue
            try:
                method = build(name, case)
            except NotPossible:
                continue
            out = method.step()
            got = (out, method.x_TD.grad, torch.where(case.map_TE, method.weights_TE.grad, 0.0), *method.expert_grads())
            for a, b in zip(got, (wanted_out, *(leaf.grad for leaf in leaves)), strict=True):
                # float32 sums of at most 48 products, three in a row, in another order
                assert torch.allclose(a, b, rtol=1e-4, atol=1e-5), (name, histogram)
            ran += 1
        assert ran >= 4


def test_all_methods_compute_the_same(tmp_path):
    from tests import ranks

    ranks.call(compare_methods, ranks=1, folder=tmp_path)
