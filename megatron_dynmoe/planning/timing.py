"""What one step takes, part by part.

A model of bandwidths and rates: no latencies, no overlap of computation and communication but where said, kernels at
the rate that the cluster states.  It ranks layouts and shows what a step is made of; it does not replace a run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_dynmoe.planning.histogram import LayerRouting
from megatron_dynmoe.planning.memory import parameters
from megatron_dynmoe.planning.shapes import Cluster, Layout, Model
from megatron_dynmoe.planning.wire import Wire, priced, rows_by_rank
from megatron_dynmoe.units import cheaper_unit, saving_wanted, weight_bytes, wire_bytes

UNITS = ("expert", "rank")


@dataclass(frozen=True)
class LayerTraffic:
    """One MoE layer, one micro-batch, one expert-parallel group.

    Attributes:
        computed: rows that each rank computes.
        sent: by unit, what a rank sends in a forward pass: the mean over ranks, and over the ways the group can lie.
        seconds: by unit, the all-to-alls of a forward pass on the busiest rank.
        dispatched: by unit, bytes of a rank's dispatch with the rows that stay, which "auto" compares.
        saving: what "auto" asks of (token, rank) rows on this group's link.
    """

    computed: tuple[float, ...]
    sent: dict[str, Wire]
    seconds: dict[str, float]
    dispatched: dict[str, float]
    saving: float

    @property
    def unit(self) -> str:
        """What "auto" chooses, as ``dispatch.choose_unit`` does: bytes of all rows are compared."""
        sizes = self.dispatched
        return cheaper_unit(sizes["rank"], sizes["expert"], self.saving, ranks=len(self.computed))


def layer_traffic(model: Model, cluster: Cluster, layout: Layout, routing: LayerRouting) -> LayerTraffic:
    """Expected rows, bytes and seconds of a layer; every rank's tokens are routed alike.

    Rank s sends T * load(r) rows to rank r: the loads of its experts for unit "expert", the probability of a visit for
    unit "rank".  Rank r computes EP * T * (loads of its experts) rows, whichever the unit.
    """
    tokens, ranks = layout.tokens(model), layout.expert
    local = model.experts // ranks
    loads = {"expert": rows_by_rank(routing.load_E, ranks), "rank": routing.visits(ranks)}
    sent, seconds, dispatched = {}, {}, {}
    for unit in UNITS:
        rows_R = [tokens * load for load in loads[unit]]
        sent[unit], seconds[unit] = _exchange(model, cluster, layout, unit, rows_R)
        beside = weight_bytes(unit, local)
        dispatched[unit] = sum(rows_R) * wire_bytes(width=model.width, itemsize=model.itemsize, beside=beside, ways=1)
    computed = tuple(ranks * tokens * load for load in loads["expert"])
    away = any(len(set(nodes)) > 1 for nodes in layout.nodes_of_expert_groups(cluster))
    saving = saving_wanted("network" if away else "node", fused=model.fused)
    return LayerTraffic(computed, sent, seconds, dispatched, saving)


def _exchange(model: Model, cluster: Cluster, layout: Layout, unit: str, rows_R: Sequence[float]) -> tuple[Wire, float]:
    """Mean of what ranks send, and seconds of the dispatch and its combine.

    A rank works on both links, and in both directions of each, at the same time; an all-to-all ends with its busiest
    rank and direction.  What is sent in the dispatch is received in the combine, without the weights.
    """
    ranks = len(rows_R)
    beside = weight_bytes(unit, model.experts // ranks)
    size = wire_bytes(width=model.width, itemsize=model.itemsize, beside=beside)
    total, slowest = Wire(), 0.0
    ways = layout.nodes_of_expert_groups(cluster)
    for nodes in ways:
        ranks_on, rows_to = Counter(nodes), dict.fromkeys(nodes, 0.0)
        for node, rows in zip(nodes, rows_R, strict=True):
            rows_to[node] += rows
        elsewhere = {node: sum(rows_to[other] for other in rows_to if other != node) for node in rows_to}
        for node, rows in zip(nodes, rows_R, strict=True):
            # Senders are alike, so a rank gets from each peer what it keeps of its own.
            sent = priced(rows_to[node] + elsewhere[node], rows_to[node] - rows, elsewhere[node], size)
            received = priced(ranks * rows, (ranks_on[node] - 1) * rows, (ranks - ranks_on[node]) * rows, size)
            total += sent
            slowest = max(slowest, _link_seconds(sent, cluster), _link_seconds(received, cluster))
    return total * (1 / (ranks * len(ways))), slowest


def _link_seconds(part: Wire, cluster: Cluster) -> float:
    # The bytes are those out and back, so this is the dispatch and the combine together.
    return max(part.nvlink_bytes / cluster.nvlink, part.network_bytes / cluster.network)


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step on the slowest pipeline stage.

    Attributes:
        dense: attention, dense and shared feed-forward parts, routers, output layer.
        experts: the experts if every rank computed the mean; imbalance: what the busiest rank takes longer.
        all_to_all: of the unit that is used. tensor_parallel: gathers and scatters of sequence parallelism.
        pipeline: sends between stages. bubble: while the pipeline fills and drains. reduction: of gradients.
    """

    dense: float
    experts: float
    imbalance: float
    all_to_all: float
    tensor_parallel: float
    pipeline: float
    bubble: float
    reduction: float

    @property
    def total(self) -> float:
        """The step."""
        return sum(vars(self).values())


def dense_flops(model: Model, layout: Layout, layers: Sequence[int], *, last: bool) -> float:
    """Floating-point operations of a forward pass of one rank and micro-batch, without routed experts.

    Two a parameter of a matrix and token; causal attention adds 2 * sequence * heads * head_width a token: half of the
    two products of full attention (Narayanan et al. 2021, arXiv 2104.04473, appendix; Dao 2023, arXiv 2307.08691,
    section 4.1, for the half).
    """
    per_token = 0.0
    for layer in layers:
        per_token += 2 * model.attention + 2 * model.sequence * model.heads * model.head_width
        moe = model.router + model.feed_forward(model.shared_width)
        per_token += 2 * (moe if model.moe[layer] else model.feed_forward(model.dense_width))
    if last:
        per_token += 2 * model.padded_vocabulary(layout.tensor) * model.width
    return layout.tokens(model) * per_token


def step_time(
    model: Model,
    cluster: Cluster,
    layout: Layout,
    traffic: Sequence[LayerTraffic],
    *,
    unit: str = "auto",
    distributed_optimizer: bool = True,
) -> StepTime:
    """The step of the slowest stage.

    The 1F1B schedule takes (micro-batches + PP - 1) times the slowest stage's micro-batch (Narayanan et al. 2021,
    section 2.2), then gradients are reduced.  The optimizer's own step is left out.

    Args:
        traffic: of each MoE layer of the model.
        unit: "expert", "rank" or "auto".
    """
    moe_index = [sum(model.moe[:layer]) for layer in range(model.layers)]
    times = []
    for stage in range(layout.pipeline):
        layers = layout.stage(model, stage)
        own = [traffic[moe_index[layer]] for layer in layers if model.moe[layer]]
        part = _micro_batch(model, cluster, layout, layers, own, unit, last=stage == layout.pipeline - 1)
        busy = sum(part.values())
        times.append(
            StepTime(
                **{name: seconds * layout.micro_batches for name, seconds in part.items()},
                bubble=busy * (layout.pipeline - 1),
                reduction=reduction_seconds(model, cluster, layout, stage, distributed_optimizer=distributed_optimizer),
            )
        )
    return max(times, key=lambda time: time.total)


def _micro_batch(
    model: Model,
    cluster: Cluster,
    layout: Layout,
    layers: Sequence[int],
    traffic: Sequence[LayerTraffic],
    unit: str,
    *,
    last: bool,
) -> dict[str, float]:
    """Seconds of a micro-batch's forward and backward pass on one stage.

    Backward computes twice what forward does and sends the same rows again, as gradients; full recompute adds a forward
    pass.  Sequence parallelism moves (TP - 1) / TP of the hidden states five times for each part of a layer that is
    split: gather and scatter forward; gather twice and scatter backward (Korthikanti et al. 2022, section 4.2.2).  A
    part is the attention, a dense feed-forward part or a shared expert.
    """
    forward = 2 if model.recompute else 1  # how often a forward pass runs
    computed = [layer.computed for layer in traffic]
    expert_flops = 2 * model.per_expert * (forward + 2) / cluster.flops
    mean = sum(sum(rows) / len(rows) for rows in computed) * expert_flops
    busiest = sum(max(rows) for rows in computed) * expert_flops
    hidden = model.sequence * model.micro_batch * model.width * model.itemsize
    parts = sum(1 if model.moe[layer] and not model.shared_width else 2 for layer in layers)
    gathered = hidden * (layout.tensor - 1) / layout.tensor * parts * (3 + 2 * forward)
    neighbour = cluster.nvlink if cluster.nodes == 1 else cluster.network
    sends = 2 if layout.pipeline > 1 else 0
    return {
        "dense": dense_flops(model, layout, layers, last=last) * (forward + 2) / cluster.flops,
        "experts": mean,
        "imbalance": busiest - mean,
        "all_to_all": sum(layer.seconds[layer.unit if unit == "auto" else unit] for layer in traffic) * (forward + 1),
        "tensor_parallel": gathered / cluster.nvlink,
        "pipeline": sends * hidden / layout.tensor / neighbour,
    }


def reduction_seconds(
    model: Model, cluster: Cluster, layout: Layout, stage: int, *, distributed_optimizer: bool
) -> float:
    """Gradients in float32 summed over the ranks that share parameters, once a step.

    A ring sends 2 (n - 1) / n of the bytes (all-reduce; nccl-tests, doc/PERFORMANCE.md), or (n - 1) / n of the
    gradients and of the parameters in the model's dtype (distributed optimizer: reduce-scatter and all-gather).
    """
    held = parameters(model, layout, stage)
    sent = 4 + model.itemsize if distributed_optimizer else 2 * 4  # bytes a parameter
    return _ring_seconds(cluster, held.dense * sent, layout.data, layout.tensor, layout.stage_ranks) + _ring_seconds(
        cluster, held.experts * sent, layout.expert_data, layout.expert, layout.stage_ranks
    )


def _ring_seconds(cluster: Cluster, size: float, ranks: int, stride: int, stage_ranks: int) -> float:
    """A ring over every ``stride``-th rank; between nodes it uses the network links of all its ranks on a node."""
    if ranks == 1:
        return 0.0
    inside = size * (ranks - 1) / ranks / cluster.nvlink
    if stage_ranks <= cluster.gpus and cluster.gpus % stage_ranks == 0:
        return inside
    on_node = min(ranks, max(1, cluster.gpus // stride))
    nodes = -(-ranks // on_node)
    return max(inside if on_node > 1 else 0.0, size * (nodes - 1) / nodes / (on_node * cluster.network))
