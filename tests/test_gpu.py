"""What a GPU must show: the layer on CUDA kernels, Transformer Engine's experts, host synchronisations, NCCL.

The bodies are ``tests/gpu_cases.py``. On a GPU they run in this process and not in forked ranks (tests/ranks.py):
a fork cannot use CUDA once its parent has asked for it.  The same bodies run on the CPU, in a rank without Transformer
Engine; and, where ``tests/te`` and its packages are, over what stands in for its kernels: so they cannot fall behind
the library.  One rank, so nothing is sent; what is sent where is tested on CPU ranks.
"""

import importlib.util
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path

import pytest

from tests import ranks
from tests.gpu_cases import CASES

ROOT = Path(__file__).resolve().parent.parent
TE = [name for name, case in CASES.items() if case.te]
PLAIN = [name for name in CASES if name not in TE]


def run_all(names: list[str], result: str) -> None:
    """In a process of its own: start Megatron, run each case, write what it raised (or ``None``) as JSON."""
    from benchmarks.gpu.layers import start_megatron

    start_megatron()
    outcome = {}
    for name in names:
        try:
            CASES[name].check()
            outcome[name] = None
        except Exception:
            outcome[name] = traceback.format_exc()
        Path(result).write_text(json.dumps(outcome))


def succeeded(outcome: dict[str, str | None], name: str) -> None:
    assert name in outcome, f"the process ended before; it had run {list(outcome)}"
    assert outcome[name] is None, outcome[name]


# ---- on the CPU -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cpu")
    ranks.call(run_all, PLAIN, str(folder / "result.json"), ranks=1, folder=folder)
    return json.loads((folder / "result.json").read_text())


@pytest.mark.parametrize("name", PLAIN)
def test_cpu(on_cpu, name):
    succeeded(on_cpu, name)


def stand_ins() -> bool:
    """Whether Transformer Engine's Python can be run here over what stands in for its kernels."""
    try:
        if importlib.util.find_spec("tests.te.start") is None:
            return False
    except ModuleNotFoundError:
        return False
    from tests.te import start

    return (Path(start.PACKAGES) / "transformer_engine").is_dir()


@pytest.fixture(scope="module")
def on_stand_ins(tmp_path_factory):
    result = tmp_path_factory.mktemp("te") / "result.json"
    code = f"import tests.te.preload; from tests import test_gpu; test_gpu.run_all(test_gpu.TE, {str(result)!r})"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert result.exists(), done.stderr[-3000:]
    return json.loads(result.read_text())


@pytest.mark.skipif(not stand_ins(), reason="no stand-ins for Transformer Engine's kernels here")
@pytest.mark.parametrize("name", TE)
def test_cpu_over_stand_ins(on_stand_ins, name):
    succeeded(on_stand_ins, name)


# ---- on a GPU -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def megatron():
    """Megatron on one NCCL rank; taken down afterwards."""
    import torch
    from megatron.core import parallel_state

    from benchmarks.gpu.layers import start_megatron

    start_megatron()
    yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_gpu(megatron, name):
    reason = CASES[name].why_not()
    if reason:
        pytest.skip(reason)
    CASES[name].check()


PRESETS = ["dynamic-moe", "dynmoe", "moe-plus-plus"]


@pytest.mark.gpu
@pytest.mark.parametrize("preset", PRESETS)
def test_bfloat16_training_through_the_entry(tmp_path, preset):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]
    command += [str(ROOT / "examples" / "pretrain_dynmoe.py"), *training_flags(tmp_path, preset)]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "0"}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    check_training(tmp_path, preset, done.stdout, backend="nccl")


@pytest.mark.parametrize("preset", PRESETS)
def test_cpu_training_through_the_entry(tmp_path, preset):
    small = "--num-layers 1 --seq-length 32 --max-position-embeddings 32 --num-experts 8".split()
    run = ranks.call(ranks.pretrain, training_flags(tmp_path, preset) + small, ranks=1, folder=tmp_path)
    check_training(tmp_path, preset, run.output(), backend="gloo")


def routing_of(preset: str) -> dict:
    """The demo's; DynMoE's updates at iteration 5, so that weights and optimizer state are written to."""
    from megatron_dynmoe.demo.steps import ROUTING

    if preset == "dynmoe":
        return ROUTING[preset] | {"moe-record-from": 1, "moe-update-at": 5, "moe-added-expert-init": "copy"}
    return ROUTING[preset]


def training_flags(folder: Path, preset: str) -> list[str]:
    """Ten iterations of the demo's model in bfloat16, and a checkpoint."""
    from megatron_dynmoe.demo.steps import MODEL, TRAINING, flags

    words = [*flags(MODEL | routing_of(preset)), *flags(TRAINING)]
    words += ["--bf16", "--mock-data", "--split", "100,0,0", "--tokenizer-type", "NullTokenizer"]
    words += ["--vocab-size", "4095", "--train-iters", "10", "--lr-warmup-iters", "2", "--log-interval", "1"]
    words += ["--eval-iters", "0", "--use-distributed-optimizer", "--moe-token-dispatcher-type", "alltoall"]
    return [*words, "--save", str(folder / "save"), "--moe-metrics-file", str(folder / "metrics.jsonl")]


def check_training(folder: Path, preset: str, output: str, *, backend: str) -> None:
    """What those iterations left."""
    assert backend in next(line for line in output.splitlines() if "distributed_backend" in line)
    rows = [row for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if "lm_loss" in row]
    assert len(rows) >= 9 and rows[-1]["iteration"] == 10
    assert rows[-1]["lm_loss"] < rows[0]["lm_loss"]
    assert 0.1 < rows[-1]["experts_per_token"] < routing_of(preset)["num-experts"]
    assert ("zero_tokens" in rows[-1]) == (preset == "moe-plus-plus")
    assert ("active_experts" in rows[-1]) == (preset == "dynmoe")
    assert (folder / "save" / "latest_checkpointed_iteration.txt").read_text() == "10"
