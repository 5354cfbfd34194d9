"""How far one layer of FP8 experts is from float32: output and gradients, by recipe and format.

All of them get the same bfloat16 rows, weights and gradients, so what is measured is the casts and sums within; "bf16"
is the grouped GEMM of the same layer without FP8.  The error is the norm of the difference over the norm of float32's.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from megatron_dynmoe.experts import grouped_mlp
from megatron_dynmoe.experts.fp8 import RECIPES, Fp8Recipe
from megatron_dynmoe.experts.fp8_linear import Fp8Linear

WARM_UP = 3
EXPERTS, WIDTH, EXPERT_WIDTH = 4, 512, 384
SIZES = [700, 0, 1, 323]  # an expert without rows and one with one
TENSORS = ("output", "gradient of rows", "gradient of weight 1", "gradient of weight 2")
# Of the rows: all of a size; one column in 64 thirty times as large; rows of sizes from about 0.02 to 50.
INPUTS = ("even", "large columns", "uneven rows")


def rows(seeds: int, device: str) -> list[dict[str, Any]]:
    """One row for each recipe, format and kind of input: mean and range over seeds of each tensor's error."""
    found = []
    for kind in INPUTS:
        for name, recipe in variants():
            errors = [_errors(kind, recipe, seed, device) for seed in range(seeds)]
            row: dict[str, Any] = {"input": kind, "recipe": name}
            for index, tensor in enumerate(TENSORS):
                values = [error[index] for error in errors]
                row[tensor] = {"mean": statistics.mean(values), "least": min(values), "most": max(values)}
            found.append(row)
    return found


def variants() -> Iterator[tuple[str, Fp8Recipe | None]]:
    """Names and recipes, first no recipe at all."""
    yield "bf16", None
    for scaling in RECIPES:
        for format in ("hybrid", "e4m3"):
            yield f"{scaling}, {format}", Fp8Recipe(scaling=scaling, format=format)


def table(found: list[dict[str, Any]]) -> list[str]:
    """Markdown: per cent, the mean over seeds and, behind it, half their range."""
    lines = [f"| rows | recipe | {' | '.join(TENSORS)} |", "|---|---|" + "---:|" * len(TENSORS)]
    for row in found:
        cells = [
            f"{100 * row[name]['mean']:.2f} ± {50 * (row[name]['most'] - row[name]['least']):.2f}" for name in TENSORS
        ]
        lines.append(f"| {row['input']} | {row['recipe']} | {' | '.join(cells)} |")
    return lines


def _errors(kind: str, recipe: Fp8Recipe | None, seed: int, device: str) -> list[float]:
    case = _case(kind, seed, device)
    exact = _run([tensor.float() for tensor in case], None)
    if recipe is None:
        got = _run(case, None)
    else:
        linears = tuple(Fp8Linear(EXPERTS, recipe).to(device) for _ in range(2))
        # Delayed scales come from steps before, of other rows.  They start at 1, which casts a small gradient to 0, so
        # the second layer's must be found before the first one's can be.
        for step in range(WARM_UP if recipe.scaling == "delayed" else 0):
            _run(_case(kind, seed + 1000 * (step + 1), device), linears)
            for linear in linears:
                linear.scales.update(linear.scales.amax_history[0].clone())
        got = _run(case, linears)
    return [float((a.float() - b).norm() / b.norm()) for a, b in zip(got, exact, strict=True)]


def _case(kind: str, seed: int, device: str) -> list[Tensor]:
    """Rows [N, D], weights of the experts as a model starts with them, and the gradient of the output [N, D]."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator) * std

    x = normal(sum(SIZES), WIDTH)
    if kind == "large columns":
        x[:, ::64] *= 30
    elif kind == "uneven rows":
        x *= normal(sum(SIZES), 1, std=1.3).exp()
    tensors = (
        x,
        normal(EXPERTS, 2 * EXPERT_WIDTH, WIDTH, std=0.02),
        normal(EXPERTS, WIDTH, EXPERT_WIDTH, std=0.02),
        normal(sum(SIZES), WIDTH, std=1e-4),
    )
    return [tensor.bfloat16().to(device) for tensor in tensors]


def _run(case: list[Tensor], linears: Any) -> list[Tensor]:
    *inputs, grad = case
    x, fc1, fc2 = (tensor.clone().requires_grad_() for tensor in inputs)
    weights = torch.linspace(0.1, 1, x.shape[0], device=x.device)
    out = grouped_mlp(x, weights, fc1, fc2, SIZES, linears=linears)
    return [out.detach(), *torch.autograd.grad(out, (x, fc1, fc2), grad)]
