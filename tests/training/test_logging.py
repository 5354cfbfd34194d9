"""What a run says: console, TensorBoard, metrics file; and that the numbers are those of the routing."""

import json
import re

import pytest

from megatron_dynmoe.training.interval import IntervalSums
from tests import ranks
from tests.layouts import flags


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("logged")
    places = ["--tensorboard-dir", str(folder / "tb"), "--moe-metrics-file", str(folder / "metrics.jsonl")]
    extra = ["--exit-interval", "4", "--log-interval", "2", "--moe-per-layer-logging", "--log-throughput"]
    run = ranks.call(ranks.pretrain, flags("serial", *places, *extra), ranks=1, folder=folder)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return run.output(), records, folder / "tb"


def accumulated(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def test_console(logged):
    output, _, _ = logged
    line = next(line for line in output.splitlines() if "iteration        4/" in line)
    for name in ("experts per token", "experts per token p99", "load imbalance", "activated parameters", "rows sent"):
        assert re.search(rf"{name}: [0-9.e+]+ \|", line), name
    for name in ("routed TFLOP/s/GPU", "load_balancing_loss", "entropy_loss", "z_loss"):
        assert name in line, name


def test_tensorboard_has_each_layer(logged):
    events = accumulated(logged[2])
    tags = set(events.Tags()["scalars"])
    assert {"experts_per_token", "load_imbalance", "rows_sent", "activated_parameters"} <= tags
    for layer in (0, 2, 3):  # layer 1 is dense
        for name in ("load_balancing_loss", "entropy_loss", "z_loss", "experts_per_token"):
            assert f"moe/{name}_layer_{layer}" in tags, name
    assert events.Scalars("moe/entropy_loss_layer_2")[0].value > 0
    assert events.Scalars("moe/entropy_loss_layer_1")[0].value == 0


def test_metrics_file_agrees_with_itself(logged):
    _, records, _ = logged
    assert [record["iteration"] for record in records] == [2, 4]
    for record in records:
        by_layer = record["experts_per_token_by_layer"]
        assert sorted(by_layer) == ["0", "2", "3"]
        assert record["experts_per_token"] == pytest.approx(sum(by_layer.values()) / 3)
        # 8 sequences of 32 tokens, three MoE layers
        assert record["routed_rows"] == pytest.approx(sum(by_layer.values()) * 8 * 32)
        assert record["rows_sent"] == record["routed_rows"]  # one rank: per-expert rows, none of them crosses
        assert record["rows_crossing"] == record["rows_cut"] == 0
        # one SwiGLU expert has 3 * 32 * 48 parameters
        without = record["activated_parameters"] - 3 * record["experts_per_token"] * 3 * 32 * 48
        assert without == pytest.approx(round(without))
        # forward and backward: 6 operations a parameter of the routed experts, a token
        seconds = record["seconds_per_iteration"]
        experts = 6 * 3 * 32 * 48 * record["routed_rows"]
        assert record["routed_TFLOP/s/GPU"] * 1e12 * seconds > experts


def test_rates_are_of_the_iterations_counted(tmp_path):
    """Megatron logs the first iteration without resetting its sums; ours must not be divided by those."""
    file = tmp_path / "metrics.jsonl"
    places = ["--tensorboard-dir", str(tmp_path / "tb"), "--moe-metrics-file", str(file)]
    ranks.call(ranks.pretrain, flags("serial", "--exit-interval", "3", *places), ranks=1, folder=tmp_path)
    losses = {event.step: event.value for event in accumulated(tmp_path / "tb").Scalars("lm loss")}
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert [record["iteration"] for record in records] == [1, 2, 3]
    for record in records:
        assert record["routed_rows"] == pytest.approx(3 * record["experts_per_token"] * 8 * 32)
        # TensorBoard has each iteration's own, in float32
        assert record["lm_loss"] == pytest.approx(losses[record["iteration"]], rel=1e-6)


def test_evaluations_say_which_set_they_were_on(tmp_path):
    file = tmp_path / "metrics.jsonl"
    own = "--split 80,10,10 --eval-iters 1 --eval-interval 1 --train-iters 1".split()
    run = ranks.call(ranks.pretrain, flags("serial", *own, "--moe-metrics-file", str(file)), ranks=1, folder=tmp_path)
    printed = re.findall(r"on test set \| lm loss value: ([0-9.E+-]+)", run.output())
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert [name for record in records for name in record if name in ("validation_loss", "test_loss")][
        -1
    ] == "test_loss"
    assert records[-1]["test_loss"] == pytest.approx(float(printed[0]), rel=1e-5) and len(printed) == 1
    assert all("validation_loss" in record for record in records[1:-1])


def test_sums_of_the_first_iteration_are_not_taken_twice():
    sums = IntervalSums()
    assert sums.of({"lm loss": 5.0, "advanced iterations": 1}, 1) == {"lm loss": 5.0, "advanced iterations": 1}
    assert sums.of({"lm loss": 8.0, "advanced iterations": 2}, 1) == {"lm loss": 3.0, "advanced iterations": 1}
    assert sums.of({"lm loss": 2.0, "advanced iterations": 1}, 1) == {"lm loss": 2.0, "advanced iterations": 1}
    # the first of ten is not the end of an interval
    assert IntervalSums().of({"lm loss": 50.0}, 10) == {"lm loss": 50.0}
    later = IntervalSums()
    later.of({"lm loss": 50.0}, 10)
    assert later.of({"lm loss": 40.0}, 10) == {"lm loss": 40.0}


def test_memory_guard_in_a_run(tmp_path):
    file = tmp_path / "metrics.jsonl"
    extra = ["--exit-interval", "2", "--moe-top-p", "0.9", "--moe-max-rows-per-token", "1.5"]
    argv = flags("serial", *extra, "--moe-metrics-file", str(file))
    ranks.call(ranks.pretrain, argv, ranks=1, folder=tmp_path)
    for record in map(json.loads, file.read_text().splitlines()):
        assert record["rows_cut"] > 0
        # four micro-batches of 64 tokens, three MoE layers, a bound of 96 rows each
        assert record["routed_rows"] <= 4 * 3 * 96
        assert record["experts_per_token"] <= 1.5
