"""Rows of ``bench_moe_layer.py`` on the screen, as JSON, Markdown and a picture; no file is ever half written."""

from __future__ import annotations

import json
import os
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.competitors import FLOOR, PRODUCTS

Row = dict[str, Any]
OURS = "dynmoe-expert"


@dataclass
class Output:
    """Prints and writes rows as they come.

    Attributes:
        head: one sentence over the table. json, markdown, plot: files, or ``None``.
        printed: rows that are on the screen.
    """

    head: str
    json: Path | None = None
    markdown: Path | None = None
    plot: Path | None = None
    printed: int = 0

    def update(self, rows: list[Row]) -> None:
        """Show what is new and write everything so far."""
        lines = table(rows) if self.printed else [self.head, "", *table(rows)]
        tqdm.write("\n".join(lines[self.printed + 2 :] if self.printed else lines), file=sys.stdout)
        sys.stdout.flush()
        self.printed = len(rows)
        if self.json:
            write_json(self.json, rows)
        if self.markdown:
            write_markdown(self.markdown, self.head, rows)

    def finish(self, rows: list[Row]) -> None:
        """What only the whole shows."""
        print("\n" + "\n".join(findings(rows)), flush=True)
        if self.plot:
            try:
                write_plot(self.plot, self.head, rows)
            except ImportError:
                print(f"{self.plot} is not written: the plot needs matplotlib, the extra 'plots'.", file=sys.stderr)


def write_json(path: Path, rows: list[Row]) -> None:
    """The list of rows as it is."""
    _replace(path, lambda beside: beside.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8"))


def write_markdown(path: Path, head: str, rows: list[Row]) -> None:
    """``head``, the table and what it says about the expectations."""
    text = "\n".join([head, "", *table(rows), "", *findings(rows), ""])
    _replace(path, lambda beside: beside.write_text(text, encoding="utf-8"))


def table(rows: list[Row]) -> list[str]:
    """Lines of a Markdown table."""
    lines = [
        "| EP | histogram | mean k | method | ms | / floor | rows sent | MB sent | peak MB |",
        "|---:|---|---:|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        ratio = row["seconds"] / row["floor_seconds"]
        lines.append(
            f"| {row['ep']} | {row['histogram']} | {row['mean_k']:g} | {row['method']} | {row['seconds'] * 1e3:.1f} "
            f"| {ratio:.3f} | {row['rows_sent']} | {row['bytes_sent'] / 1e6:.1f} | {row['peak_bytes'] / 1e6:.1f} |"
        )
    return lines


def findings(rows: list[Row]) -> Iterator[str]:
    """What is expected of the library's per-expert path, and what was measured: one line a claim and rank count."""
    for ep in sorted({row["ep"] for row in rows}):
        some = {(row["histogram"], row["mean_k"], row["method"]): row for row in rows if row["ep"] == ep}
        claims = [
            ("time / floor, mean k >= 2, largest", FLOOR, "seconds", lambda k: k >= 2, max, "at most 1.10"),
            ("time / megatron, largest", "megatron", "seconds", None, max, "at most 1.03"),
            ("time / megatron-sequential, largest", "megatron-sequential", "seconds", None, max, "at most 1.03"),
            ("time / loop, largest", "loop", "seconds", None, max, "at most 1"),
            ("time / its own products, largest", PRODUCTS, "seconds", None, max, "no bound"),
            ("memory / loop, mean k >= 2, largest", "loop", "peak_bytes", lambda k: k >= 2, max, "at most 1"),
            ("time / dense, largest", "dense", "seconds", None, max, "at most 1/3"),
            ("memory / dense, largest", "dense", "peak_bytes", None, max, "at most 1/5"),
        ]
        for claim, other, field, wanted, worst, target in claims:
            ratios = list(_ratios(some, other, field, wanted))
            if ratios:
                ratio, k, histogram = worst(ratios)
                yield f"- EP {ep}: {OURS}, {claim}: {ratio:.3f} (mean k {k:g}, {histogram}); wanted {target}"
        yield from (f"- EP {ep}: {line}" for line in _linearity(some))


def _ratios(some: dict[tuple, Row], other: str, field: str, wanted: Callable | None) -> Iterator[tuple]:
    for (histogram, k, method), row in some.items():
        against = some.get((histogram, k, other))
        if method == OURS and against and against[field] and (wanted is None or wanted(k)):
            yield row[field] / against[field], k, histogram


def _linearity(some: dict[tuple, Row]) -> Iterator[str]:
    """Largest distance of the times from the least-squares line through them."""
    for histogram in sorted({key[0] for key in some}):
        points = [(k, row["seconds"]) for (name, k, method), row in some.items() if (name, method) == (histogram, OURS)]
        if len(points) < 3:
            continue
        mean_k, mean_s = (sum(column) / len(points) for column in zip(*points, strict=True))
        spread = sum((k - mean_k) ** 2 for k, _ in points)
        slope = sum((k - mean_k) * (s - mean_s) for k, s in points) / spread
        far = max(abs((mean_s + slope * (k - mean_k)) / s - 1) for k, s in points)
        yield f"{OURS}, {histogram}: time is a straight line in mean k within {far:.1%}"


def write_plot(path: Path, title: str, rows: list[Row]) -> None:
    """Time against mean k, a panel for each EP and histogram, the floor as a line.

    Raises:
        ImportError: no matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = sorted({(row["ep"], row["histogram"]) for row in rows})
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(4.5 * len(panels), 4), squeeze=False, sharey=True, layout="constrained"
    )
    for (ep, histogram), axis in zip(panels, axes[0], strict=True):
        here = [row for row in rows if (row["ep"], row["histogram"]) == (ep, histogram)]
        for method in dict.fromkeys(row["method"] for row in here):
            points = sorted((row["mean_k"], row["seconds"] * 1e3) for row in here if row["method"] == method)
            style = {"color": "black", "marker": ""} if method == FLOOR else {"marker": "o", "markersize": 4}
            axis.plot(*zip(*points, strict=True), label=method, linewidth=1.2, **style)
        axis.set(title=f"EP {ep}, {histogram}", xlabel="mean experts per token", xscale="log", yscale="log")
        axis.set_xticks(ticks := sorted({row["mean_k"] for row in here}), [f"{k:g}" for k in ticks])
        axis.minorticks_off()
    axes[0][0].set_ylabel("ms, forward and backward")
    axes[0][0].legend(fontsize="small")
    figure.suptitle(textwrap.fill(title, width=62 * len(panels)), fontsize="medium")
    kind = path.suffix.removeprefix(".")
    _replace(path, lambda beside: figure.savefig(beside, format=kind, dpi=130))
    pyplot.close(figure)


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".new")
    write(beside)
    os.replace(beside, path)
