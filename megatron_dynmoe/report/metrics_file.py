"""Reads what ``--moe-metrics-file`` wrote: the records of training that still count, and the changes of experts.

A resumed run appends to the file, from the iteration of its checkpoint on.  What the run before it had logged from
there on belongs to weights that were thrown away: a record that goes back in iterations replaces everything from its
iteration on.  An update may lie in an old record and, with another log interval, in a new one; the later one counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_dynmoe.errors import UserError
from megatron_dynmoe.records import WANTED, training_records


class ReportError(UserError):
    """A run cannot be shown; the message is one sentence for the user."""


@dataclass(frozen=True)
class ExpertChange:
    """One update of one layer.

    Attributes:
        iteration: after which it happened. layer: index, from 0.
        removed, added: slots. A slot in both was emptied and filled again.
        active: experts after it.
        unrouted: tokens of the recorded window that visited nobody.
    """

    iteration: int
    layer: int
    removed: tuple[int, ...]
    added: tuple[int, ...]
    active: int
    unrouted: int


@dataclass(frozen=True)
class TrainingRecord:
    """One log interval; what a run does not log is empty, or ``None``.

    Attributes:
        iteration: the last one of the interval.
        experts_per_token: mean over tokens and layers. experts_by_layer: over tokens, by layer index.
        unrouted: share of tokens that visit nobody, mean over layers. unrouted_by_layer: the same by layer index.
        kinds_by_layer: by layer index and kind of zero-computation expert, the share of tokens that chose one.
        active_by_layer: experts after the interval, by layer index; ``None`` without adaptive experts.
        changes: updates in the interval.
    """

    iteration: int
    experts_per_token: float
    experts_by_layer: dict[int, float]
    unrouted: float | None = None
    unrouted_by_layer: dict[int, float] = field(default_factory=dict)
    kinds_by_layer: dict[int, dict[str, float]] = field(default_factory=dict)
    active_by_layer: dict[int, int] | None = None
    changes: tuple[ExpertChange, ...] = ()


@dataclass(frozen=True)
class Run:
    """The training of one model.

    Attributes:
        records: with rising iterations; at least one.
        adaptive: whether the number of experts adapts.
        changes: of all records, by iteration and layer.
        kinds: of zero-computation experts, in the order of their columns.
    """

    records: tuple[TrainingRecord, ...]

    @property
    def adaptive(self) -> bool:
        return any(record.active_by_layer is not None for record in self.records)

    @property
    def kinds(self) -> list[str]:
        return list(
            dict.fromkeys(kind for r in self.records for shares in r.kinds_by_layer.values() for kind in shares)
        )

    @property
    def changes(self) -> list[ExpertChange]:
        found = {(change.iteration, change.layer): change for record in self.records for change in record.changes}
        return [found[key] for key in sorted(found)]


def read_run(paths: Sequence[Path]) -> Run:
    """One run from its files, in the order in which they were written.

    Raises:
        ReportError: a file is missing or is not such a file, no record is of training, or a file is replaced as a whole
            by those after it.
    """
    kept: list[tuple[TrainingRecord, int]] = []
    begun: dict[int, int] = {}  # the first iteration of each file that has one
    for index, path in enumerate(paths):
        for where, fields in training_records(path, ReportError):
            record = _record(fields, where)
            begun.setdefault(index, record.iteration)
            while kept and kept[-1][0].iteration >= record.iteration:
                kept.pop()
            kept.append((record, index))
    if not kept:
        names = ", ".join(map(str, paths))
        raise ReportError(f"{names}: no record of training; give a file that --moe-metrics-file wrote in a run.")
    for index in begun.keys() - {index for _, index in kept}:
        raise ReportError(
            f"{paths[index]} begins at iteration {begun[index]} and nothing of it is left, since a file after it "
            "begins no later; give the files of one run, each once, in the order in which they were written."
        )
    return Run(tuple(record for record, _ in kept))


def _record(fields: dict[str, Any], where: str) -> TrainingRecord:
    def get(name: str, convert: Callable[[Any], Any], missing: Any = None) -> Any:
        if name not in fields and missing is not None:
            return missing
        try:
            return convert(fields[name])
        except KeyError as error:
            lacking = name if error.args == (name,) else f"{error} in {name}"
            raise ReportError(f"{where}, has no {lacking}; {WANTED}.") from None
        except (TypeError, ValueError, AttributeError):
            raise ReportError(f"{where}: {name} is {fields[name]!r}, not what --moe-metrics-file writes.") from None

    return TrainingRecord(
        iteration=get("iteration", int),
        experts_per_token=get("experts_per_token", float),
        experts_by_layer=get("experts_per_token_by_layer", _by_layer(float)),
        unrouted=get("unrouted_tokens", float) if "unrouted_tokens" in fields else None,
        unrouted_by_layer=get("unrouted_tokens_by_layer", _by_layer(float), {}),
        kinds_by_layer=get("free_tokens_by_layer", _by_layer(_shares), {}),
        active_by_layer=get("active_experts_by_layer", _by_layer(int)) if "active_experts_by_layer" in fields else None,
        changes=get("expert_changes", _changes, ()),
    )


def _by_layer(convert: Callable[[Any], Any]) -> Callable[[dict[str, Any]], dict[int, Any]]:
    return lambda values: {int(layer): convert(value) for layer, value in values.items()}


def _shares(values: dict[str, Any]) -> dict[str, float]:
    return {kind: float(share) for kind, share in values.items()}


def _changes(events: list[dict[str, Any]]) -> tuple[ExpertChange, ...]:
    return tuple(
        ExpertChange(
            iteration=int(event["iteration"]),
            layer=int(event["layer"]),
            removed=tuple(map(int, event["removed"])),
            added=tuple(map(int, event["added"])),
            active=int(event["active"]),
            unrouted=int(event["unrouted"]),
        )
        for event in events
    )
