"""Trainings with the flags of ``examples/pretrain.sh`` at toy sizes: save, end, resume."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.gpu.process import last_line, run
from benchmarks.gpu.step import ROOT, Context, StepError, environment

# FP8's blocks are of 128, so no width is below that.
TOY = """
    --num-layers 2 --hidden-size 128 --num-attention-heads 2 --ffn-hidden-size 256 --moe-ffn-hidden-size 256
    --num-experts 8 --seq-length 64 --max-position-embeddings 64 --micro-batch-size 2 --global-batch-size 4
    --expert-model-parallel-size 1 --mock-data --tokenizer-type NullTokenizer --vocab-size 511
    --train-iters 10 --lr 1e-3 --min-lr 1e-4 --lr-warmup-iters 2 --init-method-std 0.02 --log-interval 1 --eval-iters 0
    --save-interval 5 --num-workers 0
""".split()
# What names files of the cluster's, with its values.
DROPPED = ("--data-path", "--data-cache-path", "--tokenizer-model", "--tensorboard-dir")
TORCHRUN = '#!/bin/sh\nfor word; do printf "%s\\n" "$word"; done > "$FLAGS_FILE"\n'


def script_flags(model: str, folder: Path, *, te: bool) -> list[str]:
    """What ``examples/pretrain.sh MODEL`` hands to the training entry on one GPU, without names of files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "torchrun").write_text(TORCHRUN)
    (folder / "torchrun").chmod(0o755)
    (folder / "text.idx").touch()
    flags = folder / "flags"
    given = {
        "TORCHRUN": str(folder / "torchrun"),
        "FLAGS_FILE": str(flags),
        "RESTARTS": "0",
        "GPUS": "1",
        "DATA": str(folder / "text"),
        "TOKENIZER": str(folder),
        "SAVE": str(folder / "save"),
        "TRANSFORMER_IMPL": "transformer_engine" if te else "local",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    script = ["bash", str(ROOT / "examples" / "pretrain.sh"), model]
    done = subprocess.run(script, env=os.environ | given, capture_output=True, text=True, timeout=30)
    if done.returncode or not flags.exists():
        raise StepError(f"pretrain.sh ended with {done.returncode}: {done.stderr.strip()[-300:]}")
    words = flags.read_text().splitlines()
    entry = next(place for place, word in enumerate(words) if word.endswith("pretrain_dynmoe.py"))
    return without(words[entry + 1 :], DROPPED)


def without(words: list[str], dropped: tuple[str, ...]) -> list[str]:
    """The flags but ``dropped``, each with all its values."""
    kept, dropping = [], False
    for word in words:
        if word.startswith("--"):
            dropping = word.partition("=")[0] in dropped
        if not dropping:
            kept.append(word)
    return kept


def pretrain(flags: list[str], context: Context, name: str, *, seconds: float | None = None) -> list[dict[str, Any]]:
    """Train in a process of its own: one rank, without torchrun.

    Returns:
        the intervals of its metrics file, all that it has.

    Raises:
        StepError: it did not end with 0.
    """
    metrics, log = context.out / f"{name}.metrics.jsonl", context.out / f"{name}.log"
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    ranks |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-m", "benchmarks.gpu", "pretrain", *flags, "--moe-metrics-file", str(metrics)]
    given = environment(cpu=context.cpu) | ranks
    code = run(command, given, log, context.left if seconds is None else seconds, cwd=ROOT)
    if code:
        raise StepError(f"{name} ended with exit code {code}{last_line(log)}.")
    return read_rows(metrics)


def free_port() -> int:
    """A port that nothing listens on."""
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def read_rows(metrics: Path) -> list[dict[str, Any]]:
    """The intervals of a training, whole lines only."""
    lines = metrics.read_text(encoding="utf-8").split("\n")[:-1] if metrics.exists() else []
    return [row for row in map(json.loads, lines) if "lm_loss" in row]


def save_and_resume(context: Context, model: str, extra: list[str]) -> list[dict[str, Any]]:
    """Train to iteration 5, save, end; a new process resumes to 10.

    Raises:
        StepError: an iteration is missing or came twice, a loss is no number, or the resumed process did not start
            where the first had ended.
    """
    from benchmarks.gpu.layers import has_te

    folder = context.out / f"{context.name}.files"
    save = ["--save", str(folder / "save"), "--load", str(folder / "save")]
    flags = [*script_flags(model, folder, te=has_te()), *TOY, *save, *extra]
    context.note(transformer_engine=has_te(), flags=flags)
    first = pretrain([*flags, "--exit-interval", "5"], context, f"{context.name}.first")
    context.note(losses=[row["lm_loss"] for row in first])
    second = pretrain(flags, context, f"{context.name}.second")
    context.note(losses=[row["lm_loss"] for row in first + second])
    counted = [[row["iteration"] for row in rows] for rows in (first, second)]
    if counted != [list(range(1, 6)), list(range(6, 11))]:
        raise StepError(f"the iterations before and after the save are {counted}; they should be 1 to 5 and 6 to 10.")
    losses = context.facts["losses"]
    if not all(0 < loss < 20 for loss in losses) or losses[-1] >= losses[0]:
        raise StepError(f"the losses are {losses}; on this data they should fall.")
    context.note(says=f"loss {losses[0]:.3f}, {losses[4]:.3f} | {losses[5]:.3f}, {losses[-1]:.3f}")
    return first + second


def moe_plus_plus(context: Context) -> None:
    """MoE++ with zero-computation experts and a gating residual."""
    rows = save_and_resume(context, "moe_plus_plus_0.6b", [])
    if "zero_tokens" not in rows[-1]:
        raise StepError("the metrics know of no zero-computation experts.")


def dynmoe(context: Context) -> None:
    """DynMoE: float32 router beside bfloat16 weights; experts are added at 4 and at 8, in weights and optimizer."""
    words = "--moe-initial-experts 2 --moe-record-from 1 --moe-update-at 4 --moe-update-period 4"
    rows = save_and_resume(context, "dynmoe_24l", [*words.split(), "--moe-added-expert-init", "copy"])
    active = [row["active_experts"] for row in rows]
    context.note(active_experts=active)
    if active[0] == active[-1]:
        raise StepError(f"the number of active experts stayed {active[0]}: no update wrote to weights and optimizer.")
