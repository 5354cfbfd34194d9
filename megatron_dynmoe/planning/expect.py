"""What one script's run is expected to need and to do: its own layout, at the start and when routers are trained."""

from __future__ import annotations

from argparse import ArgumentError, ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_dynmoe.checks import check_division
from megatron_dynmoe.planning.flags import add_model_flags, model_of
from megatron_dynmoe.planning.fresh import fresh_k, fullest_k
from megatron_dynmoe.planning.histogram import Histogram
from megatron_dynmoe.planning.plan import plan_layout
from megatron_dynmoe.planning.shapes import Cluster, Layout, Model, PlanError, require

# A new router favours some experts a little. A text whose tokens follow Zipf's law, through six routers of each model
# here, gave a layer's busiest rank 1.06 to 1.37 times the mean; which rank that is differs from layer to layer.
START_IMBALANCE = 1.25


@dataclass(frozen=True)
class Expectation:
    """One script's run on paper.

    Attributes:
        model, layout: as the flags say.
        start_k, fullest_k, trained_k: mean experts a token when training starts, at most later, and when trained.
        fullest, trained: records of :func:`plan_layout` at ``fullest_k``, with :data:`START_IMBALANCE`, and trained.
    """

    model: Model
    layout: Layout
    start_k: float
    fullest_k: float
    trained_k: float
    fullest: dict[str, Any]
    trained: dict[str, Any]


def expect(words: Sequence[str], cluster: Cluster) -> Expectation:
    """What a run with the flags ``words`` is expected to need on ``cluster``; flags of no account are passed over.

    Raises:
        PlanError: the flags describe no model, or do not fit the cluster.
    """
    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False, add_help=False)
    add_model_flags(parser)
    try:
        args = parser.parse_known_args(list(words))[0]
    except ArgumentError as error:
        raise PlanError(f"{error}.") from None
    model = model_of(args)
    layout = layout_of(args, model, cluster)
    start, fullest = fresh_k(model), fullest_k(model)
    trained = fullest if args.mean_k is None else args.mean_k
    sharded = args.use_distributed_optimizer

    def record(mean_k: float, excess: float) -> dict[str, Any]:
        uniform = Histogram.zipf(experts=model.experts, mean_k=mean_k)
        return plan_layout(model, cluster, layout, uniform, distributed_optimizer=sharded, excess=excess)

    return Expectation(model, layout, start, fullest, trained, record(fullest, START_IMBALANCE), record(trained, 1.0))


def layout_of(args: Namespace, model: Model, cluster: Cluster) -> Layout:
    """The layout that the flags ask for.

    Raises:
        PlanError: it does not divide the cluster, the experts or the batch.
    """
    tensor, pipeline = args.tensor_model_parallel_size or 1, args.pipeline_model_parallel_size or 1
    expert, world = args.expert_model_parallel_size or 1, cluster.world
    require(world % (tensor * pipeline) == 0, "TP x PP", tensor * pipeline, f"a divisor of the {world} GPUs")
    stage = world // pipeline
    name = "--expert-model-parallel-size"
    require(stage % expert == 0, name, expert, f"a divisor of the {stage} GPUs of a stage")
    check_division(model.experts, expert, name, PlanError)
    require(model.layers % pipeline == 0, "--pipeline-model-parallel-size", pipeline, f"a divisor of {model.layers}")
    data = stage // tensor
    per_round = model.micro_batch * data
    wanted = f"a multiple of the {per_round} sequences of {data} micro-batches"
    require(model.global_batch % per_round == 0, "--global-batch-size", model.global_batch, wanted)
    return Layout(
        tensor=tensor, pipeline=pipeline, expert=expert, data=data, micro_batches=model.global_batch // per_round
    )


COLUMNS = (
    *("model", "GPUs", "micro-batch", "k: start", "at most", "trained", "GB at most", "GB trained", "fits"),
    *("unit", "NVLink MB", "network MB", "tokens/s/GPU", "tokens/s"),
)


def row_of(name: str, cluster: Cluster, found: Expectation | PlanError) -> list[str]:
    """One line of the table with :data:`COLUMNS`."""
    if isinstance(found, PlanError):
        return [name, str(cluster.world), f"not accepted: {found}", *[""] * (len(COLUMNS) - 3)]
    model, fullest, trained = found.model, found.fullest, found.trained
    sent = trained["wire"][trained["unit"]]
    speed = trained["tokens_per_second_per_gpu"]
    return [
        name,
        str(cluster.world),
        str(model.micro_batch),
        *(f"{k:.2f}" for k in (found.start_k, found.fullest_k, found.trained_k)),
        *(f"{record['memory_bytes']['total'] / 1e9:.0f}" for record in (fullest, trained)),
        "yes" if fullest["fits"] else "no",
        trained["unit"],
        *(f"{sent[link] / 1e6:.0f}" for link in ("nvlink_bytes", "network_bytes")),
        f"{speed:.0f}",
        f"{speed * cluster.world:.3g}",
    ]


def table_of(rows: list[list[str]]) -> str:
    """Markdown."""
    lines = [list(COLUMNS), ["---", *["---:"] * (len(COLUMNS) - 1)], *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)
