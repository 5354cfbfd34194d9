"""The planner: its byte and parameter counts are those of real runs."""

import json
import math
import re
from dataclasses import astuple
from pathlib import Path

import pytest

from megatron_dynmoe.planning import Histogram, Layout, rows_by_rank, wire
from megatron_dynmoe.planning.flags import model_of, read_flags
from megatron_dynmoe.planning.memory import parameters
from tests import ranks
from tests.layouts import flags, read_metrics

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
