"""The tool of the planner: what it reads and writes, and its refusals."""

import json

import pytest

from megatron_dynmoe.planning import Histogram, PlanError
from megatron_dynmoe.planning.flags import model_of, moe_layers, read_flags
from megatron_dynmoe.programs import plan_cluster

# ---- the tool -------------------------------------------------------------------------------------------------------

MODEL_FLAGS = """
# a comment
--num-layers 4 --hidden-size 64 --num-attention-heads 4 --swiglu --num-experts 8 --moe-ffn-hidden-size 96
--moe-layer-freq [0]+[1]*3 --vocab-size 1000 --seq-length 128 --micro-batch-size 1 --global-batch-size 64 --bf16
--lr 3e-4 --use-distributed-optimizer
"""
CLUSTER = "--nodes 2 --gpus-per-node 4 --nvlink-gb-s 200 --network-gb-s 25 --tflops 300 --gpu-memory-gb 80".split()
UNIFORM = ["--mean-k", "2.5"]


@pytest.fixture
def model_file(tmp_path):
    path = tmp_path / "model.args"
    path.write_text(MODEL_FLAGS)
    return path


def test_json_and_markdown(model_file, tmp_path, capsys):
    result = tmp_path / "out" / "plan.json"
    argv = ["--model", str(model_file), *CLUSTER, *UNIFORM, "--zipf-exponent", "0.5"]
    assert plan_cluster.main([*argv, "--format", "json", "--output", str(result)]) == 0
    records = json.loads(result.read_text())["layouts"]
    assert [path.name for path in result.parent.iterdir()] == ["plan.json"]
    totals = [record["seconds"]["total"] for record in records]
    assert totals == sorted(totals) and all(record["fits"] for record in records)
    for record in records:
        parts = [value for name, value in record["seconds"].items() if name != "total"]
        assert sum(parts) == pytest.approx(record["seconds"]["total"])
        # rows of a step: 3 MoE layers, 64 sequences of 128 tokens, 2.5 experts; a mean over 8 GPUs
        assert record["wire"]["expert"]["rows"] == pytest.approx(3 * 64 * 128 * 2.5 / 8)
        assert record["wire"]["rank"]["rows"] <= record["wire"]["expert"]["rows"] + 1e-6
        assert (record["wire"]["expert"]["network_bytes"] > 0) == (record["expert"] > 4)
        assert record["imbalance"] >= 1 - 1e-9
    assert plan_cluster.main([*argv, "--top", "3"]) == 0
    text = capsys.readouterr().out
    assert text.count("\n| ") == 3 * (2 + 3)
    # what does not fit comes last
    middle = sorted(record["memory_bytes"]["total"] for record in records)[len(records) // 2]
    assert plan_cluster.main([*argv, "--gpu-memory-gb", str(middle / 1e9), "--format", "json"]) == 0
    fits = [record["fits"] for record in json.loads(capsys.readouterr().out)["layouts"]]
    assert set(fits) == {True, False} and fits == sorted(fits, reverse=True)


def test_a_json_object_of_flags_is_the_same_model(model_file, tmp_path):
    saved = vars(read_flags(model_file)) | {"lr": 3e-4, "moe_layer_freq": [0, 1, 1, 1]}
    path = tmp_path / "args.json"
    path.write_text(json.dumps(saved))
    assert model_of(read_flags(path)) == model_of(read_flags(model_file))


def test_a_file_may_say_what_training_takes_from_elsewhere(model_file, tmp_path, capsys):
    """Vocabulary and k in a comment; a measured routing and what is on the command line win."""
    model_file.write_text(
        MODEL_FLAGS.replace("--vocab-size 1000", "") + "# For the plan: --vocab-size 1000 --mean-k 2.5\n"
    )
    argv = ["--model", str(model_file), *CLUSTER, "--format", "json"]
    metrics = tmp_path / "metrics.jsonl"
    record = {"seconds_per_iteration": 1, "experts_per_token_by_layer": {"1": 2}, "experts_per_token": 2}
    metrics.write_text(json.dumps(record | {"experts_per_token_p99": 3, "load_imbalance": 1.5}))
    for extra, says in (
        ([], "mean k 2.5"),
        (["--mean-k", "3"], "mean k 3"),
        (["--metrics-file", str(metrics)], "mean k 2"),
    ):
        assert plan_cluster.main([*argv, *extra]) == 0
        assert json.loads(capsys.readouterr().out)["routing"].endswith(says)


def test_what_is_given_wins_over_the_file(model_file, capsys):
    argv = ["--model", str(model_file), *CLUSTER, *UNIFORM, "--format", "json"]
    assert plan_cluster.main([*argv, "--num-experts", "3"]) == 0
    found = json.loads(capsys.readouterr().out)["layouts"]
    assert {record["expert"] for record in found} == {1}  # 3 divides no 2, 4 or 8 ranks


@pytest.mark.parametrize(
    ("frequency", "layers", "expected"),
    [("2", 4, [1, 0, 1, 0]), ("[0]*2+[1]", 3, [0, 0, 1]), ("([1,0])*2", 4, [1, 0, 1, 0])],
)
def test_moe_layer_patterns(frequency, layers, expected):
    assert moe_layers(frequency, layers) == tuple(map(bool, expected))


@pytest.mark.parametrize(
    ("extra", "parts"),
    [
        (["--num-layers", "0"], ["--num-layers", "0", "at least 1"]),
        (["--moe-layer-freq", "[1,0]"], ["--moe-layer-freq", "[1,0]", "4"]),
        (["--moe-layer-freq", "print(1)"], ["--moe-layer-freq", "print(1)"]),
        (["--num-attention-heads", "5"], ["--hidden-size", "64", "multiple of the 5"]),
        (
            ["--global-batch-size", "3", "--micro-batch-size", "2"],
            ["global_batch", "3", "multiple of the micro batch, 2"],
        ),
        (["--num-layers", "1", "--moe-layer-freq", "1", "--global-batch-size", "1"], ["no layout", "8 GPUs"]),
        (["--nodes", "0"], ["nodes", "0", "at least 1"]),
        (["--network-gb-s", "-1"], ["network", "above 0"]),
        (["--network-gb-s", "nan"], ["network", "above 0"]),
        (["--mean-k", "9"], ["9.0", "at most 8"]),
        (["--zipf-exponent", "-1"], ["zipf exponent", "-1", "at least 0"]),
        (["--metrics-file", "nowhere.jsonl"], ["--metrics-file", "--mean-k", "one of"]),
        (["--top", "0"], ["--top", "0", "at least 1"]),
        (["--mtp-num-layers", "1"], ["--mtp-num-layers", "1", "no place"]),
    ],
)
def test_refusals(model_file, capsys, extra, parts):
    assert plan_cluster.main(["--model", str(model_file), *CLUSTER, *UNIFORM, *extra]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert all(part in err for part in parts), err


def test_refusals_of_files(tmp_path, model_file, capsys):
    def refused(*argv):
        assert plan_cluster.main([*argv, *CLUSTER]) == 1
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1
        return err

    missing = tmp_path / "nowhere"
    assert str(missing) in refused("--model", str(missing), *UNIFORM)
    assert "--num-layers" in refused(*UNIFORM)
    wrong = tmp_path / "wrong.args"
    wrong.write_text("--num-layers four")
    assert str(wrong) in (err := refused("--model", str(wrong), *UNIFORM)) and "four" in err
    metrics = tmp_path / "metrics.jsonl"
    for text, part in [
        ("", "no record of training"),
        ("{not json", "line 1"),
        ("\n[1]", "line 2, is not a JSON object"),  # a line that is empty is none
        ('{"iteration": 1, "seconds_per_iteration": 2.0}', "experts_per_token_by_layer"),
    ]:
        metrics.write_text(text)
        err = refused("--model", str(model_file), "--metrics-file", str(metrics))
        assert str(metrics) in err and part in err
    with pytest.raises(PlanError, match="load_imbalance"):
        record = {"seconds_per_iteration": 1, "experts_per_token_by_layer": {"0": 2}, "experts_per_token": 2}
        metrics.write_text(json.dumps(record | {"experts_per_token_p99": 3, "load_imbalance": 9}))
        Histogram.measured(metrics, experts=4, moe_layers=1)
