"""The GPU check's own script and the quick layer benchmark, on a machine without a GPU."""

import json

import pytest
import torch

from benchmarks import gpu_check
from tests import ranks

TESTS = {"tests": 3, "failures": 0, "errors": 0, "skipped": 1, "passed": 2}
TRAINING = {"loss_start": 8.0, "loss_end": 0.5, "tokens_per_second": 1000.0}
LAYER = {"rows": [{"layer": "ours", "milliseconds": 1.5, "experts_per_token": 2.0, "tflops": 3.25}]}


@pytest.fixture
def steps(monkeypatch):
    """Results of the steps; an exception is raised instead of returned."""
    results = {"tests": TESTS, "training": TRAINING, "layer": LAYER}

    def stand_in(name):
        def step(folder, environment, *, cpu):
            """Nothing."""
            if isinstance(results[name], Exception):
                raise results[name]
            return dict(results[name])

        return step

    for name in results:
        monkeypatch.setattr(gpu_check, name, stand_in(name))
    return results


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path, capsys):
    assert gpu_check.main(["--json", str(tmp_path / "result.json")]) == 1
    out, err = capsys.readouterr()
    assert err.startswith("gpu-check: torch") and "no CUDA device" in err and err.count("\n") == 1
    assert out == "" and list(tmp_path.iterdir()) == []


def test_report_and_table(tmp_path, capsys, steps):
    result = tmp_path / "new" / "result.json"
    assert gpu_check.main(["--cpu", "--json", str(result)]) == 0
    report = json.loads(result.read_text())
    assert report["ok"] and report["versions"]["torch"] == torch.__version__
    assert report["training"]["loss_end"] == 0.5 and report["layer"]["rows"] == LAYER["rows"]
    table = capsys.readouterr().out
    assert "2 passed, 1 skipped" in table and "8.000 -> 0.500" in table and "3.25 TFLOP/s" in table


def test_a_failed_step_stops_no_other(tmp_path, capsys, steps):
    steps["training"] = gpu_check.StepError("the loss went up.")
    result = tmp_path / "result.json"
    assert gpu_check.main(["--cpu", "--json", str(result)]) == 1
    report = json.loads(result.read_text())
    assert not report["ok"] and report["training"]["error"] == "the loss went up."
    assert report["layer"]["rows"] == LAYER["rows"]
    assert "training FAILED" in capsys.readouterr().out


def test_a_step_that_hangs_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "STEP_SECONDS", 1)
    with pytest.raises(gpu_check.StepError, match="ended after 1 seconds"):
        gpu_check.run(["sleep", "60"], {}, tmp_path / "log")


def quick_layers(result: str) -> int:
    """In a rank, where Megatron is imported already: the benchmark on few tokens."""
    from benchmarks import layer_quick

    return layer_quick.main(["--cpu", "--tokens", "256", "--repeats", "2", "--json", result])


def test_layers_are_timed_at_the_same_mean_k(tmp_path):
    result = tmp_path / "rows.json"
    ranks.call(quick_layers, str(result), ranks=1, folder=tmp_path)
    rows = json.loads(result.read_text())
    assert [row["experts_class"] for row in rows] == ["SequentialMLP", "TorchGroupedMLP", "TorchGroupedMLP"]
    for row in rows:
        assert row["milliseconds_min"] <= row["milliseconds"] <= row["milliseconds_max"]
        # p is bisected to 2^-20; the mean moves in steps of 1 / 256 tokens as p passes one token's sum
        assert row["experts_per_token"] == pytest.approx(2, abs=0.02)
