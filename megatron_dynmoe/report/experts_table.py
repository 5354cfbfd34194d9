"""The changes of experts as a Markdown table."""

from __future__ import annotations

from megatron_dynmoe.report.metrics_file import ReportError, Run


def experts_table(run: Run) -> str:
    """A row an update and layer, by iteration; an update that changed nothing is a row too, for its count of tokens.

    Raises:
        ReportError: the number of experts of this run does not adapt.
    """
    if not run.adaptive:
        raise ReportError(
            "the run has no active_experts_by_layer, so no changes for a table; give the file of a run with "
            "--moe-adaptive-experts, or leave the table out."
        )
    lines = [
        "| iteration | layer | removed | added | active after | tokens of the window that visited nobody |",
        "|---:|---:|---|---|---:|---:|",
    ]
    for change in run.changes:
        removed, added = (", ".join(map(str, slots)) or "-" for slots in (change.removed, change.added))
        lines.append(
            f"| {change.iteration} | {change.layer} | {removed} | {added} | {change.active} | {change.unrouted} |"
        )
    return "\n".join(lines) + "\n"
