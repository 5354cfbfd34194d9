"""A training run on paper: memory, rows and bytes on each link, and step time of every sensible layout.

    shapes     the model, the cluster, and the layouts that fit both
    histogram  which experts tokens visit: uniform, Zipf, or measured in a run
    draws      the loads and the draws behind it
    wire       rows and bytes between ranks; exact for exact counts, expected for expected ones
    memory     what one GPU holds
    timing     what one step takes, part by part
    plan       all of it for every layout, as records and as Markdown

Pure Python: it neither computes with tensors nor asks what this machine has.
"""

from megatron_dynmoe.planning.histogram import Histogram
from megatron_dynmoe.planning.plan import plan_all, to_markdown
from megatron_dynmoe.planning.shapes import Cluster, Layout, Model, PlanError, layouts
from megatron_dynmoe.planning.wire import Wire, rows_by_rank, wire

__all__ = [
    "Cluster",
    "Histogram",
    "Layout",
    "Model",
    "PlanError",
    "Wire",
    "layouts",
    "plan_all",
    "rows_by_rank",
    "to_markdown",
    "wire",
]
