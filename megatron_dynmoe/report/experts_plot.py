"""A picture of a run: active experts of each layer and their changes, experts per token, tokens that visited nobody.

matplotlib is imported in the functions that draw: the table needs none.  Figures are made without pyplot, so neither a
display nor matplotlib's global state is touched.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from megatron_dynmoe.report.metrics_file import ReportError, Run, TrainingRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = ("png", "svg", "pdf")
MOST_LINES = 8  # layers that are told apart by colour; more become a heat map
PER_LAYER_WIDTH = 0.8


def picture(run: Run, *, title: str, kind: str) -> bytes:
    """The bytes of a picture file; ``kind`` is one of :data:`FORMATS`.

    Raises:
        ReportError: no matplotlib.
    """
    file = io.BytesIO()
    experts_figure(run, title=title).savefig(file, format=kind, dpi=130)
    return file.getvalue()


def experts_figure(run: Run, *, title: str = "") -> Figure:
    """The figure: panels of active experts, experts per token, free experts and tokens without an expert.

    The first is left out without adaptive experts, the third without zero-computation experts, the last where the run
    does not log it.

    Raises:
        ReportError: no matplotlib.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator, PercentFormatter
    except ImportError:
        raise ReportError(
            "the picture needs matplotlib; install the extra 'plots': pip install 'megatron_dynmoe[plots]'."
        ) from None

    has_unrouted = any(record.unrouted is not None for record in run.records)
    heights = [1.6] * run.adaptive + [1.0] * (1 + bool(run.kinds) + has_unrouted)
    figure = Figure(figsize=(9, 0.6 + 2.2 * sum(heights)), layout="constrained")
    axes = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    panels = iter(axes)
    if run.adaptive:
        _draw_active(next(panels), run)
    axis = next(panels)
    _draw_shares(axis, run, mean=lambda record: record.experts_per_token, layers=lambda record: record.experts_by_layer)
    axis.set_ylabel("FFN experts per token" if run.kinds else "experts per token")
    if run.kinds:
        axis = next(panels)
        _draw_free(axis, run)
        axis.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    if has_unrouted:
        axis = next(panels)
        _draw_shares(axis, run, mean=lambda record: record.unrouted, layers=lambda record: record.unrouted_by_layer)
        axis.set_ylabel("tokens without FFN expert" if run.kinds else "tokens that visited nobody")
        axis.yaxis.set_major_formatter(PercentFormatter(xmax=1))
        axis.set_ylim(bottom=0)
    axes[-1].set_xlabel("iteration")
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.suptitle(title, fontsize="medium")
    return figure


def active_steps(run: Run) -> dict[int, dict[int, int]]:
    """Layer index -> iteration -> experts that are active after it, both rising.

    Updates are points of their own: with a log interval above 1 the records alone would put them too late.
    """
    found: dict[int, dict[int, int]] = {}
    for change in run.changes:
        found.setdefault(change.layer, {})[change.iteration] = change.active
    for record in run.records:
        for layer, active in (record.active_by_layer or {}).items():
            found.setdefault(layer, {})[record.iteration] = active
    return {layer: dict(sorted(found[layer].items())) for layer in sorted(found)}


def _draw_active(axis: Axes, run: Run) -> None:
    from matplotlib.ticker import MaxNLocator

    steps = active_steps(run)
    if len(steps) > MOST_LINES:
        _draw_heat_map(axis, steps)
        rows = {layer: row for row, layer in enumerate(steps)}
        _mark_changes(axis, run, height=lambda change: rows[change.layer])
        axis.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, fontsize="small")
        return
    colors = _colors(steps)
    for place, (layer, points) in enumerate(steps.items()):
        # Layers often have equal counts: the earlier lines are wider, so that each stays visible under the next.
        width = 1.2 + 0.9 * (len(steps) - 1 - place)
        axis.plot(
            list(points), list(points.values()), drawstyle="steps-post", linewidth=width, color=colors[layer],
            label=f"layer {layer}",
        )  # fmt: skip
    _mark_changes(axis, run, height=lambda change: change.active)
    axis.set_ylabel("active experts")
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    axis.margins(y=0.15)  # room for the marks
    _legend_beside(axis)


def _draw_heat_map(axis: Axes, steps: dict[int, dict[int, int]]) -> None:
    """Rows are layers, from below; a column reaches from one iteration with a new count to the next."""
    from matplotlib.ticker import MaxNLocator

    iterations = sorted({iteration for points in steps.values() for iteration in points})
    columns: list[list[float]] = []
    edges: list[int] = []
    now = dict.fromkeys(steps, float("nan"))
    for iteration in iterations:
        after = {layer: points.get(iteration, now[layer]) for layer, points in steps.items()}
        if not columns or after != now:
            columns.append(list(after.values()))
            edges.append(iteration)
        now = after
    # the last count was reached by the last iteration at the latest, and a column has to have a width
    edges.append(max(iterations[-1], edges[-1] + 1))
    rows = list(zip(*columns, strict=True))
    image = axis.pcolormesh(edges, [row - 0.5 for row in range(len(steps) + 1)], rows, cmap="viridis")
    every = -(-len(steps) // 16)
    axis.set_yticks(range(0, len(steps), every), [str(layer) for layer in list(steps)[::every]])
    axis.set_ylabel("layer")
    counts = [count for points in steps.values() for count in points.values()]
    image.set_clim(min(counts), max(max(counts), min(counts) + 1))
    axis.figure.colorbar(
        image, cax=axis.inset_axes((1.02, 0, 0.02, 1)), label="active experts", ticks=MaxNLocator(integer=True)
    )


def _mark_changes(axis: Axes, run: Run, *, height: Callable[[Any], int]) -> None:
    """Triangles that stand on the point where slots were added and hang from it where some were removed."""
    from matplotlib.markers import CARETDOWNBASE, CARETUPBASE

    for name, marker, color in (("added", CARETUPBASE, "white"), ("removed", CARETDOWNBASE, "black")):
        changes = [change for change in run.changes if getattr(change, name)]
        if changes:
            axis.plot(
                [change.iteration for change in changes], [height(change) for change in changes], linestyle="",
                marker=marker, markersize=6, markerfacecolor=color, markeredgecolor="black", markeredgewidth=0.7,
                label=name, zorder=3,
            )  # fmt: skip


def _draw_shares(
    axis: Axes,
    run: Run,
    *,
    mean: Callable[[TrainingRecord], float | None],
    layers: Callable[[TrainingRecord], dict[int, float]],
) -> None:
    """The mean over layers as a thick line, each layer as a thin one in the colour that it has in all panels."""
    all_layers = sorted({layer for record in run.records for layer in record.experts_by_layer})
    for layer, color in _colors(all_layers).items():
        points = [(record.iteration, layers(record)[layer]) for record in run.records if layer in layers(record)]
        if points:
            name = f"layer {layer}" if len(all_layers) <= MOST_LINES else None
            axis.plot(*zip(*points, strict=True), linewidth=PER_LAYER_WIDTH, color=color, label=name)
    points = [(record.iteration, value) for record in run.records if (value := mean(record)) is not None]
    axis.plot(*zip(*points, strict=True), linewidth=2, color="black", label="mean")
    if len(all_layers) > MOST_LINES:
        name = f"layers {all_layers[0]} (dark) to {all_layers[-1]}"
        axis.plot([], [], linewidth=PER_LAYER_WIDTH, color="tab:gray", label=name)
    _legend_beside(axis)


def _draw_free(axis: Axes, run: Run) -> None:
    """The share of tokens that chose a kind of zero-computation expert: the mean over layers thick, each layer thin."""
    for place, kind in enumerate(run.kinds):
        color = f"C{place}"
        for layer in sorted({layer for record in run.records for layer in record.kinds_by_layer}):
            points = [(r.iteration, r.kinds_by_layer[layer][kind]) for r in run.records if layer in r.kinds_by_layer]
            axis.plot(*zip(*points, strict=True), linewidth=PER_LAYER_WIDTH, color=color, alpha=0.5)
        shares = [
            (r.iteration, [by[kind] for by in r.kinds_by_layer.values()]) for r in run.records if r.kinds_by_layer
        ]
        means = [(iteration, sum(values) / len(values)) for iteration, values in shares]
        axis.plot(*zip(*means, strict=True), linewidth=2, color=color, label=kind)
    axis.set_ylabel("tokens that chose one")
    axis.set_ylim(bottom=0)
    _legend_beside(axis)


def _colors(layers: Iterable[int]) -> dict[int, Any]:
    """A colour for each layer: few get ones that are easily told apart, many a ramp from the first to the last."""
    from matplotlib import colormaps

    names = list(layers)
    if len(names) <= MOST_LINES:
        return {layer: colormaps["tab10"](place) for place, layer in enumerate(names)}
    return {layer: colormaps["viridis"](place / (len(names) - 1)) for place, layer in enumerate(names)}


def _legend_beside(axis: Axes) -> None:
    axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0, frameon=False, fontsize="small")
