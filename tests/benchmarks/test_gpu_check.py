"""The GPU check on a machine without a GPU: order and bounds, how steps end, and each step's own code at toy sizes."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_check
from benchmarks.gpu import fp8, process, train
from benchmarks.gpu.step import STEPS, TOTAL, Context, NotRun, Step, StepError, run_step
from tests import ranks


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path, capsys):
    assert gpu_check.main(["--out", str(tmp_path / "results")]) == 1
    out, err = capsys.readouterr()
    assert err.startswith("gpu-check: torch") and "no CUDA device" in err and err.count("\n") == 1
    assert out == "" and list(tmp_path.iterdir()) == []


def test_unknown_steps_are_one_sentence(capsys):
    with pytest.raises(SystemExit):
        gpu_check.main(["--cpu", "--steps", "smoke,speed"])
    assert "--steps is 'smoke,speed'; accepted: names of setup, smoke, tests" in capsys.readouterr().err


def test_all_steps_together_take_nine_minutes_and_exist():
    assert sum(step.seconds for step in STEPS.values()) <= TOTAL == 540
    for step in STEPS.values():
        assert callable(step.load()) and step.load().__doc__


# ---- the driver, with steps that are one line of Python -------------------------------------------------------------


@pytest.fixture
def scripted(monkeypatch, tmp_path):
    """``scripted(name=source)``: steps whose process runs ``source``; ``out`` is the results' folder there."""

    def make(**sources):
        def command(words, environment, log, seconds, cwd=None):
            out, name = words[words.index("--out") + 1], words[words.index("--out") - 1]
            setting = f"out = {out!r}; import json, os, subprocess, sys, time\n"
            note = f"def note(**facts): open({out!r} + '/{name}.json', 'w').write(json.dumps(facts))\n"
            return process.run([sys.executable, "-c", setting + note + sources[name]], environment, log, seconds)

        monkeypatch.setattr(gpu_check, "run", command)
        steps = [Step(name, 3, "none:none", "a test's") for name in sources]
        return gpu_check.check(steps, tmp_path, cpu=True)

    monkeypatch.setattr(gpu_check, "PATIENCE", 2)
    return make


def test_a_failed_step_stops_no_other(scripted, tmp_path):
    report = scripted(
        first="note(state='ok', says='all is well')",
        second="note(state='running', half=1); raise ValueError('of the second')",
        third="note(state='not run', error='no Transformer Engine')",
        fourth="pass",
    )
    assert {name: step["state"] for name, step in report["steps"].items()} == {
        "first": "ok",
        "second": "failed",
        "third": "not run",
        "fourth": "failed",
    }
    assert report["steps"]["second"]["half"] == 1 and "of the second" in report["steps"]["second"]["error"]
    assert not report["ok"] and json.loads((tmp_path / "report.json").read_text()) == report
    table = gpu_check.table(report)
    assert "all is well" in table and "not run" in table and torch.__version__ in table


def test_a_step_ends_at_its_bound_and_keeps_what_it_had(scripted):
    report = scripted(slow="note(state='running', found=7); time.sleep(99)", last="note(state='ok')")
    slow = report["steps"]["slow"]
    assert slow["state"] == "failed" and "ended after 6 seconds" in slow["error"] and slow["found"] == 7
    assert report["steps"]["last"]["state"] == "ok"


FAMILY = """
import os, subprocess, sys, time
from pathlib import Path
sys.path.insert(0, ROOT)
from benchmarks.gpu import process
sleep = [sys.executable, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(99)"]
pids = open("pids", "a")
subprocess.Popen(sleep, stdout=pids, start_new_session=True)
orphan = f"import subprocess; subprocess.Popen({sleep!r}, start_new_session=True)"
subprocess.run([sys.executable, "-c", orphan], stdout=pids)
process.run(sleep, dict(os.environ), Path("inner"), 90)
"""


def test_whatever_a_command_started_is_ended_with_it(tmp_path):
    """In a session of its own, of a parent that is gone, and what a step runs under a bound of its own."""
    mark = "a1b2c3"
    code = FAMILY.replace("ROOT", repr(str(gpu_check.ROOT)))
    child = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env={process.MARK: mark})
    try:
        deadline = time.monotonic() + 60
        pids: list[str] = []
        while len(pids) < 3 and time.monotonic() < deadline:
            time.sleep(0.1)
            pids = [word for file in tmp_path.glob("*") for word in file.read_text().split()]
        assert len(pids) == 3, pids
    finally:
        process.kill_marked(mark)
    assert child.wait(timeout=10) == -signal.SIGKILL
    for pid in pids:
        stat = Path("/proc", pid, "stat")
        assert not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"


def test_a_step_says_how_it_ended(tmp_path, monkeypatch):
    def step(error):
        def raise_it(context):
            context.note(before=1)
            if error:
                raise error

        monkeypatch.setattr(Step, "load", lambda self: raise_it)
        result = run_step(Step("any", 1, "", ""), Context(name="any", out=tmp_path, cpu=True, seconds=1))
        assert json.loads((tmp_path / "any.json").read_text()) == result and result["before"] == 1
        return result["state"], result.get("error")

    assert step(None) == ("ok", None)
    assert step(NotRun("no GPU")) == ("not run", "no GPU")
    assert step(StepError("it fell.")) == ("failed", "it fell.")
    assert step(ValueError("x")) == ("failed", "ValueError: x")


# ---- the steps themselves -------------------------------------------------------------------------------------------


def check_steps(folder: str) -> None:
    """In one rank, where Megatron is imported already: all steps that compute in their own process."""
    from benchmarks.gpu import layers, memory
    from megatron_dynmoe.dispatch import moves

    def result(name):
        return run_step(STEPS[name], Context(name=name, out=Path(folder), cpu=True, seconds=200))

    for name in ("smoke", "leak", "timing", "units", "contracts"):
        found = result(name)
        assert found["state"] == "ok" and found["says"], (name, found)
    assert not any("TE" in name for name in json.loads(Path(folder, "units.json").read_text())["milliseconds"])
    assert result("fp8") == {"state": "not run", "error": "no Transformer Engine"}
    assert json.loads(Path(folder, "layer.trace.json").read_text())["traceEvents"]

    # Counted by hand: what torch experts keep of a row are the row, the first GEMM's output and the second's input in
    # bfloat16, a float32 weight, and the row's places among tokens and experts.
    found, sizes = result("memory"), memory.model(cpu=True)
    row = 2 * (sizes.width + 3 * sizes.expert_width)
    assert row + 4 <= found["measured"]["torch"]["row"] <= row + 4 + 3 * 8

    # A layer that holds on to what it received is seen.
    wait = moves.Exchange.wait
    kept = []
    moves.Exchange.wait = lambda exchange: kept.append(wait(exchange)) or kept[-1]
    found = result("leak")
    assert found["state"] == "failed" and min(found["bytes_grown"].values()) > 0
    moves.Exchange.wait = wait

    rows = json.loads(Path(folder, "layer_quick.json").read_text())
    assert [row["experts_class"] for row in rows] == ["SequentialMLP", "TorchGroupedMLP", "TorchGroupedMLP"]
    for row in rows:
        assert row["milliseconds_min"] <= row["milliseconds"] <= row["milliseconds_max"]
        # p is bisected to 2^-20; the mean moves in steps of 1 / 512 tokens as p passes one token's sum
        assert row["experts_per_token"] == pytest.approx(2, abs=0.02)
    assert layers.device() == "cpu"


def test_steps_that_compute(tmp_path):
    ranks.call(check_steps, str(tmp_path), ranks=1, folder=tmp_path)


@pytest.mark.parametrize("name", ["moe-plus-plus", "dynmoe"])
def test_training_saves_and_resumes_with_the_scripts_flags(tmp_path, monkeypatch, name):
    seen = []

    def pretrain(flags, context, label):
        seen.append(flags)
        metrics = tmp_path / f"{label}.jsonl"
        ranks.call(ranks.pretrain, [*flags, "--moe-metrics-file", str(metrics)], ranks=1, folder=tmp_path / label)
        return train.read_rows(metrics)

    monkeypatch.setattr(train, "pretrain", pretrain)
    result = run_step(STEPS[name], Context(name=name, out=tmp_path, cpu=True, seconds=200))
    assert result["state"] == "ok", result
    for flag in (
        "--bf16",
        "--use-distributed-optimizer",
        "--overlap-param-gather",
        "--dist-ckpt-optim-fully-reshardable",
    ):
        assert flag in seen[0]
    assert len(result["losses"]) == 10 and "--exit-interval" in seen[0] and "--exit-interval" not in seen[1]
    assert not [word for word in seen[0] if word in train.DROPPED]


def test_fp8_is_held_against_bfloat16(tmp_path):
    context = Context(name="fp8", out=tmp_path, cpu=True, seconds=1)
    losses = [6.0 - 0.1 * i for i in range(10)]
    fp8.judge(context, {"bfloat16": losses, "delayed": [loss * 1.019 for loss in losses]})
    assert context.facts["away"]["delayed"] == pytest.approx(0.019)
    for wrong, says in (
        ([loss * 1.03 for loss in losses], "3.0% away"),
        ([*losses[:9], float("nan")], "away from bfloat16, of .*nan"),
        (losses[:4], "4 iterations of 10"),
        ("it ended with 1.", "it ended with 1."),
    ):
        with pytest.raises(StepError, match=says):
            fp8.judge(context, {"bfloat16": losses, "blockwise": wrong})
    with pytest.raises(StepError, match="bfloat16, which"):
        fp8.judge(context, {"bfloat16": "it ended with 1."})
    words = {name: " ".join(flags) for name, flags in fp8.runs().items()}
    assert next(iter(words)) == "bfloat16" and len(words) == 2 + 2 * len(fp8.RECIPES)
    assert words["delayed"] == "--fp8-format hybrid --fp8-recipe delayed"
    assert sum("--moe-router-padding-for-quantization" in text for text in words.values()) == len(fp8.RECIPES) + 1


def test_flags_are_dropped_with_all_their_values():
    words = "--a 1 --data-path 0.7 x 0.3 y --b --data-cache-path=z --c 2".split()
    assert train.without(words, ("--data-path", "--data-cache-path")) == "--a 1 --b --c 2".split()
