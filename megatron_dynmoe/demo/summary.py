"""What came of the demo: a dictionary for ``summary.json`` and a short table."""

import statistics
from pathlib import Path
from typing import Any

from megatron_dynmoe.demo.runner import read_metrics
from megatron_dynmoe.demo.steps import PROMPTS, SAVED_AT, DemoError, metrics_file, shown


def summarize(folder: Path, sample: str) -> dict[str, Any]:
    """Read the metrics of all parts.

    Returns:
        losses in nats per token on held-out text; experts per token as the mean over tokens and MoE layers of the first
        and the last interval, and by layer of the last; the median of tokens per second over the intervals.

    Raises:
        DemoError: a file lacks what is summarised, or the second half did not resume where the first one saved.
    """
    parts = [read_metrics(metrics_file(folder, part)) for part in range(3)]
    first, second = ([row for row in part if "lm_loss" in row] for part in parts[1:])
    losses = [[row["validation_loss"] for row in part if "validation_loss" in row] for part in parts]
    if not (first and second and losses[0] and losses[2]):
        names = ", ".join(shown(metrics_file(folder, part)) for part in range(3))
        raise DemoError(f"{names} hold no full training; see {shown(folder / 'logs')}.")
    if first[-1]["iteration"] != SAVED_AT or second[0]["iteration"] <= SAVED_AT:
        raise DemoError(
            f"the second half began at iteration {second[0]['iteration']} instead of after {SAVED_AT}, so it did not "
            f"resume; see {shown(folder)}/logs/pretrain-2.log."
        )
    return {
        "loss_start": losses[0][0],
        "loss_end": losses[2][-1],
        "experts_per_token_start": first[0]["experts_per_token"],
        "experts_per_token_end": second[-1]["experts_per_token"],
        "experts_per_token_by_layer": second[-1]["experts_per_token_by_layer"],
        "tokens_per_second": statistics.median(row["tokens_per_second"] for row in first + second),
        "resumed_at": SAVED_AT,
        "checkpoint": shown(folder / "checkpoint"),
        "export": shown(folder / "model"),
        "sample": sample,
    }


def sample_of(output: str) -> str:
    """What the model said: the output of the last step from the first prompt on, without the progress of loading.

    Raises:
        DemoError: a prompt is not in it.
    """
    for prompt in PROMPTS:
        if prompt not in output:
            raise DemoError(
                f"the output of the last step does not repeat the prompt {prompt!r}, so there is no sample in it."
            )
    return output[output.index(PROMPTS[0]) :].rstrip()


def table(summary: dict[str, Any]) -> str:
    """The summary for people, a line a fact."""
    layers = summary["experts_per_token_by_layer"]
    rows = [
        ("held-out loss", f"{summary['loss_start']:.3f} -> {summary['loss_end']:.3f}"),
        (
            "experts per token",
            f"{summary['experts_per_token_start']:.2f} -> {summary['experts_per_token_end']:.2f}",
        ),
        ("  by layer, at the end", "  ".join(f"{layer}: {mean:.2f}" for layer, mean in layers.items())),
        ("tokens per second", f"{summary['tokens_per_second']:.0f}"),
        ("resumed at iteration", str(summary["resumed_at"])),
        ("checkpoint", summary["checkpoint"]),
        ("Hugging Face model", summary["export"]),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in rows)
