"""One step of ``make gpu-check``: what it is given, and how it says what it found."""

from __future__ import annotations

import importlib
import os
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu.process import write_json

ROOT = Path(__file__).resolve().parent.parent.parent
TOTAL = 540  # seconds: nine minutes
PATIENCE = 6  # on a CPU all bounds are so many times as long: there nothing is measured


class StepError(RuntimeError):
    """A step did not find what it should; one sentence."""


class NotRun(RuntimeError):
    """A step, or a part of it, cannot run here; the reason in a few words."""


@dataclass(frozen=True)
class Step:
    """Name, bound in seconds, "module:function" under ``benchmarks.gpu``, and what it does."""

    name: str
    seconds: int
    function: str
    says: str

    def load(self) -> Callable[[Context], None]:
        """The function."""
        module, _, function = self.function.partition(":")
        return getattr(importlib.import_module(f"benchmarks.gpu.{module}"), function)


STEPS = {
    step.name: step
    for step in (
        Step("setup", 45, "setup:setup", "doctor, nvidia-smi"),
        Step("smoke", 45, "smoke:smoke", "one layer: torch and TE experts, fused permutation, uneven maps"),
        Step("tests", 75, "smoke:tests", "the tests that need a GPU, without training"),
        Step("leak", 25, "memory:leak", "twenty passes with exchanges forced: memory before and after"),
        Step("moe-plus-plus", 60, "train:moe_plus_plus", "pretrain.sh's flags, toy sizes: save at 5, resume to 10"),
        Step("dynmoe", 55, "train:dynmoe", "the same with updates of the number of experts"),
        Step("fp8", 90, "fp8:fp8", "10 iterations of each recipe: loss within 2 % of bfloat16"),
        Step("memory", 30, "memory:layer", "bytes a row and a token of dynamic_moe_24l, beside the planner's"),
        Step("timing", 65, "timing:layers", "layer_quick, a profiler's trace, the activation's share"),
        Step("units", 25, "timing:units", "rows by expert and by rank: the costs that are not the network's"),
        Step("contracts", 25, "contracts:contracts", "what the GEMMs are called with, recorded"),
    )
}


@dataclass
class Context:
    """What a step gets, and where it notes results, which are in its file at once.

    Attributes:
        out: the folder for results.
        cpu: toy sizes on the CPU.
        seconds: until the step is ended.
    """

    name: str
    out: Path
    cpu: bool
    seconds: float
    facts: dict[str, Any] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    @property
    def device(self) -> str:
        """Where to compute."""
        return "cpu" if self.cpu else "cuda"

    @property
    def left(self) -> float:
        """Seconds until the step is ended, but for three in which it can say how far it came."""
        return self.seconds - 3 - (time.monotonic() - self.started)

    def note(self, **facts: Any) -> None:
        """Add results and write them."""
        self.facts |= facts
        write_json(self.out / f"{self.name}.json", {"state": "running"} | self.facts)


def run_step(step: Step, context: Context) -> dict[str, Any]:
    """Run a step in this process.

    Returns:
        its facts with ``state``: "ok", "failed" or "not run"; and ``error``, one sentence, unless it is "ok". They are
        in ``<name>.json`` as well.
    """
    context.note()
    outcome: dict[str, Any] = {"state": "ok"}
    try:
        step.load()(context)
    except NotRun as reason:
        outcome = {"state": "not run", "error": str(reason)}
    except StepError as error:
        outcome = {"state": "failed", "error": str(error)}
    except Exception as error:
        traceback.print_exc()
        outcome = {"state": "failed", "error": f"{type(error).__name__}: {error}"[:500]}
    result = context.facts | outcome
    write_json(context.out / f"{context.name}.json", result)
    return result


def environment(*, cpu: bool, preload: str | None = None) -> dict[str, str]:
    """Of the steps' processes: this checkout can be imported; one GPU, or none."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    visible = "" if cpu else os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    added = {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": visible, "PYTHONUNBUFFERED": "1"}
    if cpu:
        added["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")
    return os.environ | added | ({"GPU_CHECK_PRELOAD": preload} if preload else {})
