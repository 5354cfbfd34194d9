"""The planner: its byte counts are those of real runs, its expectations those of a simulation, its refusals clear."""

import json
import math
import random
import re
from dataclasses import astuple
from pathlib import Path

import pytest

from megatron_dynmoe.planning import Cluster, Histogram, Layout, Model, PlanError, Wire, layouts, rows_by_rank, wire
from megatron_dynmoe.planning.flags import model_of, moe_layers, read_flags
from megatron_dynmoe.planning.histogram import LayerRouting, spread, zipf_loads
from megatron_dynmoe.planning.memory import memory, parameters, row_bytes
from megatron_dynmoe.planning.timing import SAVING, layer_traffic, reduction_seconds, step_time
from tests import ranks
from tests.layouts import flags, read_metrics
from tools import plan_cluster

ITERATIONS = 2
# name -> (ranks, EP, TP, experts, flags)
RUNS = {
    "2 ranks": (2, 2, 1, 4, []),
    "4 ranks": (4, 4, 1, 8, "--expert-model-parallel-size 4 --num-experts 8".split()),
    "4 ranks, TP 2": (
        4,
        2,
        2,
        4,
        "--tensor-model-parallel-size 2 --sequence-parallel --expert-tensor-parallel-size 1".split(),
    ),
}


# ---- exact: planned and counted bytes of real training steps --------------------------------------------------------


def record(argv: list[str], result: str) -> int:
    """In a rank: train, and keep the maps that were dispatched and what the runtime counted."""
    import os

    import torch

    from megatron_dynmoe.mcore.dispatcher import VariableKAllToAllDispatcher
    from megatron_dynmoe.metrics import RoutingStats

    begin, reduce = VariableKAllToAllDispatcher.begin, RoutingStats.reduce
    maps, counted = [], []

    def begin_and_keep(self, routing_map):
        maps.append(routing_map.clone())
        return begin(self, routing_map)

    def reduce_and_keep(self, **kwargs):
        mine, summary = astuple(self.traffic), reduce(self, **kwargs)
        counted.append((mine, astuple(summary.traffic)))
        return summary

    VariableKAllToAllDispatcher.begin, RoutingStats.reduce = begin_and_keep, reduce_and_keep
    try:
        return ranks.pretrain(argv)
    finally:
        torch.save((torch.stack(maps), counted), Path(result) / f"rank{os.environ['RANK']}.pt")


# Both units and both numbers of ranks.
CASES = [("2 ranks", "expert"), ("2 ranks", "rank"), ("4 ranks", "rank"), ("4 ranks, TP 2", "expert")]


@pytest.fixture(scope="module", params=CASES, ids=", ".join)
def trained(request, tmp_path_factory):
    """(name, unit, folder) of a run."""
    name, unit = request.param
    folder = tmp_path_factory.mktemp("run")
    extra = ["--moe-dispatch-unit", unit, "--moe-top-p", "0.6", "--exit-interval", str(ITERATIONS)]
    metrics = ["--moe-metrics-file", str(folder / "metrics.jsonl")]
    argv = flags("ep2", *RUNS[name][-1], *extra, *metrics)
    ranks.call(record, argv, str(folder), ranks=RUNS[name][0], folder=folder)
    return name, unit, folder


def planned(maps, *, unit, rank, ranks_of_group, node_of_rank=None):
    """What the planner's function says of these maps, [M, T, E], on ``rank``."""
    local = maps.shape[2] // ranks_of_group
    total = wire([0] * ranks_of_group, rank=0, unit=unit, width=32, itemsize=4, local_experts=local)
    for map_TE in maps:
        if unit == "expert":
            rows_R = rows_by_rank(map_TE.sum(dim=0).tolist(), ranks_of_group)
        else:
            rows_R = map_TE.view(-1, ranks_of_group, local).any(dim=2).sum(dim=0).tolist()
        nodes = node_of_rank or [0] * ranks_of_group
        total += wire(rows_R, rank=rank, unit=unit, width=32, itemsize=4, local_experts=local, node_of_rank=nodes)
    return total


def test_planned_bytes_equal_counted_bytes(trained):
    import torch

    name, unit, folder = trained
    world, group, *_ = RUNS[name]
    logged = read_metrics(folder / "metrics.jsonl")
    totals = [(0, 0, 0)] * ITERATIONS
    for rank in range(world):
        maps, counted = torch.load(folder / f"rank{rank}.pt", weights_only=True)
        counted = [pair for pair in counted if pair[1] != (0, 0, 0)]
        assert len(counted) == ITERATIONS
        for iteration, part in enumerate(maps.chunk(ITERATIONS)):
            # expert-parallel ranks are neighbours in all three layouts
            ours = planned(part, unit=unit, rank=rank % group, ranks_of_group=group)
            mine, _ = counted[iteration]
            assert (ours.rows, ours.crossing_rows, ours.crossing_bytes) == mine
            assert mine[1] > 0
            totals[iteration] = tuple(a + b for a, b in zip(totals[iteration], mine, strict=True))
            two_nodes = [peer // (group // 2) for peer in range(group)]
            split = planned(part, unit=unit, rank=rank % group, ranks_of_group=group, node_of_rank=two_nodes)
            assert split.nvlink_rows + split.network_rows == mine[1]
            assert split.nvlink_bytes + split.network_bytes == mine[2]
            assert (split.nvlink_rows > 0) == (group > 2)
    assert totals == [everyone for _, everyone in counted]
    assert totals[0][2] == logged[0]["bytes_crossing"]


def test_parameters_equal_those_of_the_run(trained, tmp_path):
    name, _, folder = trained
    world, group, tensor, _, extra = RUNS[name]
    file = tmp_path / "model.args"
    file.write_text(" ".join(flags("serial", *extra)))
    model = model_of(read_flags(file))
    layout = Layout(tensor=tensor, pipeline=1, expert=group, data=world // tensor, micro_batches=1)
    held = parameters(model, layout, 0)
    text = (folder / "rank0.log").read_text(errors="replace")
    printed = re.search(r"number of parameters on .*: (\d+)", text)
    assert held.dense + held.experts == int(printed[1])


def test_a_metrics_file_of_a_run_is_a_histogram(trained):
    name, _, folder = trained
    experts = RUNS[name][3]
    histogram = Histogram.measured(folder / "metrics.jsonl", experts=experts, moe_layers=3)
    last = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()][-1]
    by_layer = list(last["experts_per_token_by_layer"].values())
    for layer, mean in zip(histogram.layers, by_layer, strict=True):
        # sums of a few numbers in double precision
        assert math.isclose(sum(layer.load_E), mean, rel_tol=1e-9)
        assert math.isclose(sum(k * share for k, share in layer.k_mix.items()), mean, rel_tol=1e-9)
        assert max(layer.k_mix) <= max(last["experts_per_token_p99"], math.ceil(mean))
        busiest = max(layer.load_E) * experts / mean
        assert math.isclose(busiest, min(last["load_imbalance"], experts / mean), rel_tol=1e-6)


def test_wire_by_hand():
    # rank 1 of four, two to a node: 3 rows to its neighbour, 7 + 11 to the other node, 5 stay
    shape = {"width": 10, "itemsize": 2, "local_experts": 3, "node_of_rank": [0, 0, 1, 1]}
    expert = wire([3, 5, 7, 11], rank=1, unit="expert", **shape)
    assert astuple(expert) == (26, 3, 18, 3 * 44, 18 * 44)  # 10 out and 10 back at 2 bytes, 4 of weight
    assert astuple(wire([3, 5, 7, 11], rank=1, unit="rank", **shape)) == (26, 3, 18, 3 * 52, 18 * 52)
    assert rows_by_rank([1, 0, 4, 2, 5, 9], 3) == [1, 6, 14]


def test_auto_is_the_rule_of_the_dispatch():
    from megatron_dynmoe.dispatch import choose

    assert SAVING == choose.SAVING


# ---- expected: loads and visits against a simulation ----------------------------------------------------------------


def simulate(layer: LayerRouting, group: int, tokens: int) -> tuple[list[int], list[int]]:
    """Draw each token's experts by the definition: independent draws, thrown away unless k of them succeed."""
    dice = random.Random(0)
    experts = range(len(layer.load_E))
    local = len(experts) // group
    loads, visits = [0] * len(experts), [0] * group
    numbers = dice.choices(list(layer.k_mix), list(layer.k_mix.values()), k=tokens)
    for k in numbers:
        chosen: list[int] = []
        while len(chosen) != k:
            chosen = [expert for expert in experts if dice.random() < layer.drawn_E[expert]]
        for expert in chosen:
            loads[expert] += 1
        for rank in {expert // local for expert in chosen}:
            visits[rank] += 1
    return loads, visits


@pytest.mark.parametrize(
    ("mean_k", "exponent", "most"), [(2.0, 0.0, 0), (1.3, 0.8, 0), (2.6, 0.5, 6), (3.0, 2.0, 0), (0.4, 1.0, 0)]
)
def test_expectations_equal_a_simulation(mean_k, exponent, most):
    experts, group, tokens = 8, 4, 20_000
    mix = spread(mean_k, most) if most else Histogram.zipf(experts=experts, mean_k=mean_k).layers[0].k_mix
    layer = LayerRouting(zipf_loads(experts, mean_k, exponent), mix)
    loads, visits = simulate(layer, group, tokens)
    for seen, expected in [*zip(loads, layer.load_E, strict=True), *zip(visits, layer.visits(group), strict=True)]:
        # A count of independent tokens: binomial. Sixty such comparisons at 5 standard deviations fail by chance once
        # in 30 000 runs; 1e-6 is for loads of exactly 1, whose fit is that close.
        deviation = math.sqrt(max(expected * (1 - expected), 0) / tokens)
        assert abs(seen / tokens - expected) <= 5 * deviation + 1e-6


@pytest.mark.parametrize(("experts", "group", "k"), [(16, 4, 2), (16, 4, 13), (64, 8, 6), (8, 8, 3), (6, 1, 2)])
def test_equal_loads_are_hypergeometric(experts, group, k):
    layer = Histogram.zipf(experts=experts, mean_k=k).layers[0]
    others = experts - experts // group
    expected = 1 - math.comb(others, k) / math.comb(experts, k)
    # a few hundred operations on numbers of one sign, in double precision
    assert layer.visits(group) == pytest.approx([expected] * group, rel=1e-10)


def test_fewer_pairs_than_rows_and_never_more_than_ranks():
    for layer in Histogram.zipf(experts=16, mean_k=3.5, exponent=1.0).layers:
        assert sum(layer.load_E) == pytest.approx(3.5)
        pairs = [sum(layer.visits(group)) for group in (1, 2, 4, 8, 16)]
        assert pairs == sorted(pairs)  # more ranks, more pairs
        assert pairs[0] == pytest.approx(1) and pairs[-1] == pytest.approx(3.5)


# ---- memory and time, by hand ---------------------------------------------------------------------------------------


def small(**changes) -> Model:
    shape = {
        "moe": (True,) * 4, "width": 64, "heads": 4, "head_width": 16, "query_groups": 2, "dense_width": 96,
        "expert_width": 32, "experts": 8, "vocabulary": 256, "sequence": 32, "micro_batch": 2, "global_batch": 64,
    }  # fmt: skip
    return Model(**shape | changes)


def machine(**changes) -> Cluster:
    shape = {"nodes": 2, "gpus": 4, "nvlink": 4e9, "network": 1e9, "flops": 1e12, "memory": 8e10}
    return Cluster(**shape | changes)


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_of_all_ranks_are_the_models(tied):
    from megatron_dynmoe.metrics import ModelShape

    model = small(moe=(False, True, True, True), shared_width=16, tied=tied)
    shape = ModelShape(
        layers=4, moe_layers=3, width=64, heads=4, head_width=16, query_groups=2, dense_width=96, expert_width=32,
        experts=8, vocabulary=256, shared_width=16, tied=tied,
    )  # fmt: skip
    one = Layout(tensor=1, pipeline=1, expert=1, data=1, micro_batches=1)
    held = parameters(model, one, 0)
    assert held.dense + held.experts == shape.total
    assert held.experts == shape.total - shape.without_experts
    # two stages, experts over two ranks, everything else over two: what is on every rank is counted once too often
    two = Layout(tensor=2, pipeline=2, expert=2, data=1, micro_batches=1)
    stages = [parameters(model, two, stage) for stage in range(2)]
    replicated = 3 * 8 * 64 + 9 * 64
    copy = 256 * 64 if tied else 0
    assert sum(2 * stage.dense for stage in stages) == held.dense + replicated + copy
    assert sum(2 * stage.experts for stage in stages) == held.experts


@pytest.mark.gpu
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_row_bytes_are_what_autograd_keeps(gated, itemsize):
    import torch

    from megatron_dynmoe.experts import grouped_mlp

    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device: on the CPU the experts keep less")
    dtype = torch.bfloat16 if itemsize == 2 else torch.float32
    rows, width, expert_width = 48, 32, 16
    x = torch.randn(rows, width, dtype=dtype, device="cuda", requires_grad=True)
    weights = torch.rand(rows, device="cuda", requires_grad=True)
    fc1 = torch.randn(2, (2 if gated else 1) * expert_width, width, dtype=dtype, device="cuda", requires_grad=True)
    fc2 = torch.randn(2, width, expert_width, dtype=dtype, device="cuda", requires_grad=True)
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes(), tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = grouped_mlp(x, weights, fc1, fc2, [20, 28], gated=gated)
    parameters_and_group_ends = {fc1.untyped_storage().nbytes(), fc2.untyped_storage().nbytes(), 2 * 4}
    total = sum(size for size, _ in kept.values() if size not in parameters_and_group_ends)
    assert out.shape == (rows, width)
    model = small(width=width, expert_width=expert_width, gated=gated, itemsize=itemsize)
    assert total == rows * row_bytes(model)


def test_optimizer_state_is_split_over_those_who_share_parameters():
    model = small()
    layout = Layout(tensor=2, pipeline=1, expert=4, data=4, micro_batches=8)
    held = parameters(model, layout, 0)
    got = memory(model, layout, 0, [100.0] * 4)
    assert got.weights == 2 * (held.dense + held.experts)
    assert got.gradients == 2 * got.weights
    assert got.optimizer == 12 * (held.dense + held.experts)
    assert got.optimizer_sharded == 12 * (held.dense / 4 + held.experts / 2)
    saved = memory(small(recompute=True), layout, 0, [100.0] * 4)
    assert saved.activations < got.activations
    assert saved.routed * 4 == got.routed == 4 * 100 * row_bytes(model)


def test_all_to_all_by_hand():
    # uniform, k = 1, two ranks on one node: half of 32 * 2 tokens cross, at 2 * 64 * 2 + 4 bytes, out and back
    model, cluster = small(moe=(True,), experts=2), machine(nodes=1, gpus=2)
    layout = Layout(tensor=1, pipeline=1, expert=2, data=2, micro_batches=16)
    traffic = layer_traffic(model, cluster, layout, Histogram.zipf(experts=2, mean_k=1).layers[0])
    assert traffic.sent["expert"].nvlink_bytes == 32 * 260
    assert traffic.sent["expert"].network_bytes == 0
    assert traffic.computed == (64, 64)
    time = step_time(model, cluster, layout, [traffic], unit="expert")
    assert time.all_to_all == pytest.approx(16 * 2 * 32 * 260 / 4e9)  # micro-batches, forward and backward
    assert time.experts == pytest.approx(16 * 64 * 6 * 3 * 64 * 32 / 1e12)
    assert time.imbalance == time.bubble == time.tensor_parallel == time.pipeline == 0
    again = step_time(small(moe=(True,), experts=2, recompute=True), cluster, layout, [traffic], unit="expert")
    assert again.all_to_all == pytest.approx(1.5 * time.all_to_all)
    assert again.experts == pytest.approx(4 / 3 * time.experts)


def test_the_busiest_rank_and_the_slower_link_decide():
    # all of it to one expert of the last rank: 3 peers send, two of them from the other node
    model, cluster = small(moe=(True,), experts=4), machine(nodes=2, gpus=2)
    layout = Layout(tensor=1, pipeline=1, expert=4, data=4, micro_batches=8)
    traffic = layer_traffic(model, cluster, layout, LayerRouting((0.0, 0.0, 0.0, 1.0), {1: 1.0}))
    assert traffic.computed == (0, 0, 0, 256)
    assert traffic.seconds["expert"] == pytest.approx(2 * 64 * 260 / 1e9)
    assert traffic.sent["expert"].crossing_rows == pytest.approx(3 * 64 / 4)
    time = step_time(model, cluster, layout, [traffic])
    assert time.imbalance == pytest.approx(3 * time.experts)


def test_expected_links_are_those_of_the_exact_count():
    # groups of four on nodes of three: each lies across two nodes, in three ways
    model, cluster = small(), machine(nodes=4, gpus=3)
    layout = Layout(tensor=1, pipeline=1, expert=4, data=12, micro_batches=1)
    routing = Histogram.zipf(experts=8, mean_k=2.2, exponent=0.7).layers[0]
    shape = {"width": 64, "itemsize": 2, "local_experts": 2}
    ways = layout.nodes_of_expert_groups(cluster)
    assert ways == [(0, 0, 0, 1), (0, 0, 1, 1), (0, 1, 1, 1)]
    for unit, loads in {"expert": rows_by_rank(routing.load_E, 4), "rank": routing.visits(4)}.items():
        rows = [64 * load for load in loads]
        sent = [wire(rows, rank=r, unit=unit, node_of_rank=way, **shape) for way in ways for r in range(4)]
        received = [wire([rows[r]] * 4, rank=r, unit=unit, node_of_rank=way, **shape) for way in ways for r in range(4)]
        traffic = layer_traffic(model, cluster, layout, routing)
        assert astuple(traffic.sent[unit]) == pytest.approx([value / 12 for value in astuple(sum(sent, Wire()))])
        seconds = [max(part.nvlink_bytes / 4e9, part.network_bytes / 1e9) for part in sent + received]
        assert traffic.seconds[unit] == pytest.approx(max(seconds))


def test_bubble_and_reduction_by_hand():
    model, cluster = small(), machine()
    layout = Layout(tensor=1, pipeline=2, expert=1, data=4, micro_batches=8)
    traffic = [layer_traffic(model, cluster, layout, Histogram.zipf(experts=8, mean_k=2).layers[0])] * 4
    time = step_time(model, cluster, layout, traffic, distributed_optimizer=False)
    assert time.bubble == pytest.approx((time.total - time.bubble - time.reduction) / 8)
    held = parameters(model, layout, 1)
    expected = 2 * 3 / 4 * 4 * (held.dense + held.experts) / 4e9  # a stage is one node: NVLink
    assert reduction_seconds(model, cluster, layout, 1, distributed_optimizer=False) == pytest.approx(expected)
    # one stage over two nodes: half of the ring's bytes pass the four network links of a node
    flat = Layout(tensor=1, pipeline=1, expert=1, data=8, micro_batches=4)
    held = parameters(model, flat, 0)
    expected = (held.dense + held.experts) * 6 * max(1 / 2 / 4e9, 7 / 8 / 4e9)
    assert reduction_seconds(model, cluster, flat, 0, distributed_optimizer=True) == pytest.approx(expected)


def test_layouts_cover_the_cluster_and_divide_everything():
    model, cluster = small(), machine()
    found = list(layouts(model, cluster))
    assert len({layout.name for layout in found}) == len(found)
    for layout in found:
        assert layout.tensor * layout.pipeline * layout.data == 8
        assert layout.micro_batches * layout.data * model.micro_batch == model.global_batch
        assert layout.expert * layout.expert_data == layout.stage_ranks
        assert model.experts % layout.expert == 0 and model.query_groups % layout.tensor == 0
    assert any(layout.tensor == 2 and layout.pipeline == 2 and layout.expert == 4 for layout in found)


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
        ('{"iteration": 1, "seconds_per_iteration": 2.0}', "experts_per_token_by_layer"),
    ]:
        metrics.write_text(text)
        err = refused("--model", str(model_file), "--metrics-file", str(metrics))
        assert str(metrics) in err and part in err
    with pytest.raises(PlanError, match="load_imbalance"):
        record = {"seconds_per_iteration": 1, "experts_per_token_by_layer": {"0": 2}, "experts_per_token": 2}
        metrics.write_text(json.dumps(record | {"experts_per_token_p99": 3, "load_imbalance": 9}))
        Histogram.measured(metrics, experts=4, moe_layers=1)
