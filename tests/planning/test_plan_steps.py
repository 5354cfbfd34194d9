"""The planner: memory and time of a step, by hand."""

from dataclasses import astuple

import pytest

from megatron_dynmoe.planning import Cluster, Histogram, Layout, Model, Wire, layouts, rows_by_rank, wire
from megatron_dynmoe.planning.histogram import LayerRouting
from megatron_dynmoe.planning.memory import LayerRows, memory, parameters, row_bytes
from megatron_dynmoe.planning.timing import layer_traffic, reduction_seconds, step_time


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
    model = small(moe=(False, True, True, True), shared_width=16, tied=tied, router_extra=70)
    one = Layout(tensor=1, pipeline=1, expert=1, data=1, micro_batches=1)
    held = parameters(model, one, 0)
    assert held.dense + held.experts == model.total
    assert held.experts == model.total - model.without_experts
    # two stages, experts over two ranks, everything else over two: what is on every rank is counted once too often
    two = Layout(tensor=2, pipeline=2, expert=2, data=1, micro_batches=1)
    stages = [parameters(model, two, stage) for stage in range(2)]
    replicated = 3 * (8 * 64 + 70) + 9 * 64
    copy = 256 * 64 if tied else 0
    assert sum(2 * stage.dense for stage in stages) == held.dense + replicated + copy
    assert sum(2 * stage.experts for stage in stages) == held.experts


def test_optimizer_state_is_split_over_those_who_share_parameters():
    model = small()
    layout = Layout(tensor=2, pipeline=1, expert=4, data=4, micro_batches=8)
    held = parameters(model, layout, 0)
    rows = LayerRows(computed=100.0)
    got = memory(model, layout, 0, [rows] * 4)
    assert got.weights == 2 * (held.dense + held.experts)
    assert got.gradients == 2 * got.weights
    assert got.optimizer == 12 * (held.dense + held.experts)
    assert got.optimizer_sharded == 12 * (held.dense / 4 + held.experts / 2)
    saved = memory(small(recompute=True), layout, 0, [rows] * 4)
    assert saved.activations < got.activations
    assert saved.routed * 4 == got.routed == 4 * 100 * row_bytes(model)


def test_fp8_experts_keep_their_gemms_inputs_in_one_byte():
    model, layout = small(fp8=True), Layout(tensor=1, pipeline=1, expert=1, data=1, micro_batches=64)
    assert row_bytes(small()) == (64 + 3 * 32) * 2 + 4
    assert row_bytes(model, fp8=True) == (64 + 32) + 2 * 32 * 2 + 4
    ends = small(fp8=True, wide_ends=(1, 1))
    kept = [memory(one, layout, 0, [LayerRows(computed=1)] * 4).routed for one in (small(), ends, model)]
    assert kept[0] - kept[1] == kept[1] - kept[2] == 2 * (64 + 32)  # two of four layers each
    weights = [
        memory(one, layout, 0, [LayerRows()] * 4).weights for one in (small(), model, small(fp8=True, fp8_weights=True))
    ]
    assert weights[1] - weights[0] == 2 * parameters(model, layout, 0).experts  # cast once a step and cached
    assert weights[2] == weights[0]


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
