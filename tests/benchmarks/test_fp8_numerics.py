"""benchmarks/fp8_numerics.py: errors that order as formats do, a page of what was measured, and no run twice."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import fp8_errors, fp8_numerics


@pytest.fixture(scope="module")
def errors():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fp8_errors, "WIDTH", 64)
        patch.setattr(fp8_errors, "EXPERT_WIDTH", 32)
        patch.setattr(fp8_errors, "SIZES", [40, 0, 1, 23])
        yield fp8_errors.rows(2, "cpu")


def test_errors_are_those_of_the_formats(errors):
    assert len(errors) == 3 * (1 + 4 * 2)
    even = {row["recipe"]: row for row in errors if row["input"] == "even"}
    for name, row in even.items():
        for tensor in fp8_errors.TENSORS:
            error = row[tensor]["mean"]
            assert row[tensor]["least"] <= error <= row[tensor]["most"]
            # Rounding to 8 bits is off by at most 2^-9, to e4m3's 4 by 2^-5 and to e5m2's 3 by 2^-4, on average a bit
            # more than half of it; products of two operands, and two layers in a row, add up to a few times that.
            assert error < 2.0**-7 if name == "bf16" else 0.02 < error < 0.15, (name, tensor)
        if name.endswith("hybrid"):
            sharper = even[name.replace("hybrid", "e4m3")]
            assert row["output"] == sharper["output"]
            assert all(row[t]["mean"] > sharper[t]["mean"] for t in fp8_errors.TENSORS[1:])
    assert len(fp8_errors.table(errors)) == 2 + len(errors)


def test_page_and_picture(errors, tmp_path):
    steps = range(10, fp8_numerics.STEPS + 1, 10)
    curves = {
        f"{name}/{seed}": {"loss": {str(step): 5 - step / 100 + 0.01 * number * (seed + 1) for step in steps}}
        for number, name in enumerate(fp8_numerics.RUNS)
        for seed in range(2)
    }
    report = {"errors": errors, "curves": curves, "versions": {"torch": torch.__version__}, "device": "cpu"}
    page = "\n".join(fp8_numerics.page(report | {"date": "2026-01-01"}))
    # the mean of the last five records, 160 to 200: 5 - 1.8; bfloat16 is the second run
    assert "| float32 | 3.2000 | 3.2000, 3.2000 | -0.0150 | -0.0100, -0.0200 |" in page
    assert page.count("\n| ") >= len(errors) + len(fp8_numerics.RUNS)
    fp8_numerics.draw(report, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_what_was_run_is_not_run_again(tmp_path, monkeypatch):
    """And a run counts only with the flags that it would have today."""
    report = {
        "curves": {
            f"{name}/{seed}": {"flags": [*fp8_numerics.model_flags(seed), *words]}
            for name, words in fp8_numerics.RUNS.items()
            for seed in range(2)
        }
    }
    started = []

    class Process:
        exitcode = 1

        def __init__(self, target, args):
            started.append(args[0])

        def start(self):
            pass

        join = start

    class Context:
        def set_forkserver_preload(self, modules):
            pass

    Context.Process = Process
    monkeypatch.setattr(fp8_numerics.multiprocessing, "get_context", lambda kind: Context())
    options = fp8_numerics.argparse.Namespace(work=tmp_path, seeds=2, jobs=1)
    fp8_numerics.train_all(report, tmp_path / "report.json", options, cpu=True)
    assert started == []
    report["curves"]["rowwise/1"]["flags"].append("--lr=1")
    with pytest.raises(SystemExit, match="rowwise/1 ended with 1"):
        fp8_numerics.train_all(report, tmp_path / "report.json", options, cpu=True)
    assert len(started) == 1 and started[0][-2] == "--moe-metrics-file"
