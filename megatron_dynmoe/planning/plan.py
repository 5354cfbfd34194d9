"""Every layout as a record, fastest first, and the records as Markdown."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from megatron_dynmoe.planning.histogram import Histogram
from megatron_dynmoe.planning.memory import LayerRows, Memory, memory
from megatron_dynmoe.planning.shapes import Cluster, Layout, Model, PlanError, layouts
from megatron_dynmoe.planning.timing import UNITS, LayerTraffic, StepTime, layer_traffic, step_time
from megatron_dynmoe.planning.wire import Wire


def plan_all(
    model: Model,
    cluster: Cluster,
    histogram: Histogram,
    *,
    unit: str = "auto",
    distributed_optimizer: bool = True,
) -> list[dict[str, Any]]:
    """A record of each layout: those that fit in memory first, then by step time.

    Raises:
        PlanError: there is no layout.
    """
    known: _Known = {}
    records = []
    for layout in layouts(model, cluster):
        traffic = _traffic(model, cluster, layout, histogram, known)
        records.append(_record(model, cluster, layout, traffic, unit=unit, distributed_optimizer=distributed_optimizer))
    if not records:
        raise PlanError(
            f"no layout of {model.layers} layers and a global batch of {model.global_batch} divides over "
            f"{cluster.world} GPUs; change the global batch, the micro batch or the number of GPUs."
        )
    return sorted(records, key=lambda record: (not record["fits"], record["seconds"]["total"]))


def plan_layout(
    model: Model,
    cluster: Cluster,
    layout: Layout,
    histogram: Histogram,
    *,
    unit: str = "auto",
    distributed_optimizer: bool = True,
    excess: float = 1.0,
) -> dict[str, Any]:
    """The record of one layout.

    Args:
        excess: the busiest rank's memory is taken for so many times the expected rows.
    """
    traffic = _traffic(model, cluster, layout, histogram, {})
    return _record(
        model, cluster, layout, traffic, unit=unit, distributed_optimizer=distributed_optimizer, excess=excess
    )


# Traffic of a layer depends on the layout through TP and EP only, and layers with the same routing are alike.
_Known = dict[tuple[int, int, int], LayerTraffic]


def _traffic(model: Model, cluster: Cluster, layout: Layout, histogram: Histogram, known: _Known) -> list[LayerTraffic]:
    result = []
    for index in range(sum(model.moe)):
        key = layout.tensor, layout.expert, index % len(histogram.layers)
        if key not in known:
            known[key] = layer_traffic(model, cluster, layout, histogram.layer(index))
        result.append(known[key])
    return result


def _record(
    model: Model,
    cluster: Cluster,
    layout: Layout,
    traffic: list[LayerTraffic],
    *,
    unit: str,
    distributed_optimizer: bool,
    excess: float = 1.0,
) -> dict[str, Any]:
    chosen = [layer.unit if unit == "auto" else unit for layer in traffic]
    stages = _stages(model, layout, traffic, chosen, excess)
    fullest = max(stages, key=lambda held: held.total(distributed_optimizer=distributed_optimizer))
    time = step_time(model, cluster, layout, traffic, unit=unit, distributed_optimizer=distributed_optimizer)
    total = fullest.total(distributed_optimizer=distributed_optimizer)
    return {
        "tensor": layout.tensor,
        "pipeline": layout.pipeline,
        "expert": layout.expert,
        "data": layout.data,
        "micro_batches": layout.micro_batches,
        "fits": total <= cluster.memory,
        "memory_bytes": vars(fullest) | {"total": total},
        "imbalance": sum(max(layer.computed) / sum(layer.computed) * layout.expert for layer in traffic) / len(traffic),
        "wire": {name: _per_step(traffic, layout, name) for name in UNITS},
        "unit": max(UNITS, key=chosen.count),
        "seconds": vars(time) | {"total": time.total},
        "tokens_per_second_per_gpu": model.global_batch * model.sequence / time.total / cluster.world,
    }


def _stages(
    model: Model, layout: Layout, traffic: list[LayerTraffic], units: list[str], excess: float
) -> Iterator[Memory]:
    of_layer = iter(zip(traffic, units, strict=True))
    for stage in range(layout.pipeline):
        layers = layout.stage(model, stage)
        rows = [_busiest(*next(of_layer), excess) if model.moe[layer] else LayerRows() for layer in layers]
        yield memory(model, layout, stage, rows)


def _busiest(layer: LayerTraffic, unit: str, excess: float) -> LayerRows:
    return LayerRows(excess * max(layer.computed), layer.sent["expert"].rows, layer.sent["rank"].rows, unit)


def _per_step(traffic: list[LayerTraffic], layout: Layout, unit: str) -> dict[str, float]:
    """Mean over all GPUs: what one sends in the forward passes of a step, counted as the run's log counts it."""
    share = layout.micro_batches / layout.pipeline
    sent = sum((layer.sent[unit] for layer in traffic), Wire()) * share
    seconds = sum(layer.seconds[unit] for layer in traffic) * share
    return vars(sent) | {"crossing_rows": sent.crossing_rows, "crossing_bytes": sent.crossing_bytes, "seconds": seconds}


def to_markdown(records: list[dict[str, Any]], *, title: str, most: int | None = None) -> str:
    """Three tables, one line a layout: step time, memory, links."""
    shown = records[:most]
    parts = [f"# {title}", _count_line(records, shown), _time_table(shown), _memory_table(shown), _wire_table(shown)]
    return "\n\n".join(parts) + "\n"


def _count_line(records: list[dict[str, Any]], shown: list[dict[str, Any]]) -> str:
    fitting = sum(record["fits"] for record in records)
    return (
        f"{len(records)} layouts, {fitting} of which fit in memory; the first {len(shown)}, those that fit first, "
        "by step time."
    )


def _name(record: dict[str, Any]) -> list[str]:
    return [str(record[key]) for key in ("tensor", "pipeline", "expert", "data")]


def _table(heading: str, columns: list[str], rows: list[list[str]]) -> str:
    lines = [["TP", "PP", "EP", "DP", *columns], ["---:"] * (4 + len(columns)), *rows]
    return f"## {heading}\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _time_table(records: list[dict[str, Any]]) -> str:
    parts = ["total", *(field.name for field in fields(StepTime))]
    columns = ["fits", "micro-batches", *(name.replace("_", " ") for name in parts), "unit", "tokens/s/GPU"]
    rows = [
        [
            *_name(record),
            "yes" if record["fits"] else "no",
            str(record["micro_batches"]),
            *(f"{record['seconds'][part] * 1e3:.1f}" for part in parts),
            record["unit"],
            f"{record['tokens_per_second_per_gpu']:.0f}",
        ]
        for record in records
    ]
    return _table("Step time, ms", columns, rows)


def _memory_table(records: list[dict[str, Any]]) -> str:
    parts = ("total", "weights", "gradients", "optimizer_sharded", "optimizer", "activations", "routed")
    columns = [*parts[:3], "optimizer, distributed", "optimizer, not", "activations", "routed rows"]
    rows = [[*_name(record), *(f"{record['memory_bytes'][part] / 1e9:.2f}" for part in parts)] for record in records]
    return _table("Memory of the fullest GPU, GB", columns, rows)


def _wire_table(records: list[dict[str, Any]]) -> str:
    columns = [f"{unit}: {what}" for unit in UNITS for what in ("rows", "NVLink MB", "network MB", "all-to-all ms")]
    rows = []
    for record in records:
        cells = [f"{record['imbalance']:.2f}"]
        for unit in UNITS:
            sent = record["wire"][unit]
            cells.append(f"{sent['rows']:.0f}")
            cells += [f"{sent[link] / 1e6:.1f}" for link in ("nvlink_bytes", "network_bytes")]
            cells.append(f"{sent['seconds'] * 1e3:.1f}")
        rows.append(_name(record) + cells)
    return _table("Forward passes of one step, a GPU: rows and bytes by link", ["imbalance", *columns], rows)
