"""Recordings of a layer's GEMMs, and the last step of ``make gpu-check``, which makes them on a GPU.

    python -m benchmarks.gpu.contracts tests/contracts     # record anew on this machine

``tests/benchmarks/test_contracts.py`` replays them: the CPU must call the same functions with the same contracts.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.gpu import layers
from benchmarks.gpu.recorder import Call, differences, recorded
from benchmarks.gpu.step import Context, StepError

SIZES = {"width": 128, "inner": 256, "experts": 4}
TOKENS = 48
KEPT = layers.ROOT / "tests" / "contracts"
# Every rounding to bfloat16 is half of eps at most, on both machines, in each of the four GEMMs that follow each other
# forward and backward: 4 eps of a sum of magnitudes.
TOLERANCE = 4 * torch.finfo(torch.bfloat16).eps

MAPS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "uneven": lambda token_T1: torch.arange(4) >= 4 - token_T1 % 4,
    "one expert": lambda token_T1: (torch.arange(4) == 3).expand(len(token_T1), 4),
    "no rows": lambda token_T1: torch.zeros(len(token_T1), 4, dtype=torch.bool),
}
RECIPES = ("delayed", "tensorwise", "blockwise")


def recordings(backend: str) -> dict[str, dict[str, Any]]:
    """The settings of each recording of a backend, "torch" or "te", by name."""
    cases: dict[str, dict[str, Any]] = {name: {"map": name} for name in MAPS}
    if backend == "te":
        for recipe in RECIPES:
            fp8 = {"fp8": "hybrid", "fp8_recipe": recipe, "moe_router_padding_for_quantization": True}
            cases[f"uneven, FP8 {recipe}"] = {"map": "uneven", **fp8}
    return cases


def record(backend: str, map: str, **extra: Any) -> list[Call]:
    """The GEMMs of one forward and backward pass. Numbers are drawn on the CPU: the same everywhere."""
    from megatron_dynmoe.config import DynMoEConfig
    from megatron_dynmoe.experts.grouped import grouped_linear

    te, where = backend == "te", layers.device()
    fused = {"moe_permute_fusion": True} if te else {}
    dynmoe = DynMoEConfig(expert_backend=backend, dispatch_unit="expert")
    layer = layers.build(dynmoe, te=te, dtype=torch.bfloat16, **SIZES, **fused, **extra).to(where)
    draw = torch.Generator().manual_seed(layers.SEED)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw).bfloat16().to(where)

    with torch.no_grad():
        for parameter in layer.experts.parameters():
            parameter.copy_(drawn(*parameter.shape) * parameter.shape[-1] ** -0.5)
    chosen = MAPS[map](torch.arange(TOKENS).unsqueeze(1)).contiguous().to(where)
    weights = torch.where(chosen, 0.5, 0.0).requires_grad_()
    layers.answers(layer, weights, chosen)
    x = drawn(TOKENS, 1, SIZES["width"]).requires_grad_()
    grad = drawn(TOKENS, 1, SIZES["width"])
    # On a CPU the torch experts take no grouped GEMM by themselves; what a GPU calls is what counts here.
    grouped = mock.patch.object(type(layer.experts), "linears", (grouped_linear, grouped_linear))
    with recorded() as calls, nullcontext() if te else grouped:
        with _precision(layer.config):
            out, _ = layer(x)
        out.backward(grad)
    return calls


def _precision(config: Any) -> Any:
    if not config.fp8:
        return nullcontext()
    from megatron.core.fp8_utils import get_fp8_context

    return get_fp8_context(config)


def made() -> dict[str, Any]:
    """Where and with what a recording was made."""
    from benchmarks.gpu_check import versions

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu ({platform.machine()})"
    return {"device": name, "versions": versions(), "stand_ins": os.environ.get("GPU_CHECK_PRELOAD")}


def record_all(backend: str) -> dict[str, Any]:
    """What a file of :data:`KEPT` holds. A recording that fails holds ``error`` in the place of calls."""
    cases: dict[str, Any] = {}
    for name, settings in recordings(backend).items():
        try:
            cases[name] = record(backend, **settings)
        except Exception as error:
            cases[name] = {"error": f"{type(error).__name__}: {error}"[:300]}
    return {"made": made(), "cases": cases}


def write(path: Path, found: dict[str, Any]) -> None:
    """A recording as JSON with one call a line."""
    cases = [
        f"{json.dumps(name)}: " + (json.dumps(calls) if isinstance(calls, dict) else _lines(calls))
        for name, calls in found["cases"].items()
    ]
    text = f'{{"made": {json.dumps(found["made"])},\n"cases": {{\n' + ",\n".join(cases) + "\n}}\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".new")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def _lines(calls: list[Call]) -> str:
    return "[" + ",\n".join(json.dumps(call, separators=(",", ":")) for call in calls) + "]"


def against_kept(backend: str, cases: dict[str, Any]) -> list[str]:
    """Where these recordings differ from the ones kept with the tests."""
    path = KEPT / f"{backend}.json"
    if not path.exists():
        return [f"there is no {path.name} to compare with"]
    return differences(json.loads(path.read_text())["cases"], cases, TOLERANCE)


def contracts(context: Context) -> None:
    """A file for each backend, to be kept in tests/contracts; and where they differ from those that are.

    Raises:
        StepError: a recording failed. A difference is no failure here: it is what the step is for.
    """
    layers.start_megatron()
    failed, differ = [], {}
    for backend in ["torch", "te"] if layers.has_te() else ["torch"]:
        found = record_all(backend)
        write(context.out / "contracts" / f"{backend}.json", found)
        failed += [f"{backend}, {name}: {c['error']}" for name, c in found["cases"].items() if isinstance(c, dict)]
        differ[backend] = against_kept(backend, found["cases"])
        context.note(differences=differ)
    count = sum(len(lines) for lines in differ.values())
    context.note(says=f"recorded {', '.join(differ)}; {count} differences from tests/contracts")
    if failed:
        raise StepError("; ".join(failed)[:900])


def main(folder: str) -> int:
    """Record into ``folder`` on this machine."""
    layers.start_megatron()
    for backend in ["torch", "te"] if layers.has_te() else ["torch"]:
        found = record_all(backend)
        write(Path(folder) / f"{backend}.json", found)
        print(f"{backend}.json: " + ", ".join(f"{name} {len(calls)}" for name, calls in found["cases"].items()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
