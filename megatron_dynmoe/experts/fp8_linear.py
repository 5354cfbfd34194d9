"""A linear layer of ragged experts in FP8, computed by casting to float8 and back: what a laptop has.

Operands are those that a kernel would get, bit by bit; products are summed in float32.  Experts are taken one after the
other, which needs their numbers of rows on the host.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_dynmoe.experts import fp8_rowwise
from megatron_dynmoe.experts.fp8 import Fp8Recipe, Group, cast
from megatron_dynmoe.experts.fp8_delayed import GRADIENT, INPUT, WEIGHT, DelayedScales


class Fp8Linear(torch.nn.Module):
    """y = x W^T for each expert, forward and backward in FP8; no parameters of its own.

    Args:
        experts: L.
        recipe: of the casts.
        emulate: cast and multiply in float32; else torch's kernel, which serves ``recipe`` "rowwise" in "e4m3".
    """

    def __init__(self, experts: int, recipe: Fp8Recipe, *, emulate: bool = True) -> None:
        super().__init__()
        self.recipe, self.emulate = recipe, emulate
        self.scales = DelayedScales(experts, recipe) if recipe.scaling == "delayed" else None

    def forward(self, rows_NI: Tensor, weight_LOI: Tensor, ends_L: Tensor) -> Tensor:
        """Rows ordered by expert to [N, O] in their dtype; ``ends_L`` int32, where each expert's rows end."""
        if not self.emulate:
            return fp8_rowwise.linear(rows_NI, weight_LOI, ends_L, wgrad=self.recipe.wgrad)
        ends = ends_L.tolist()
        sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
        scales = self.scales
        observed = scales if scales is not None and self.training else None
        scale_L3 = None if scales is None else scales.scale.clone()
        return _Emulated.apply(rows_NI, weight_LOI, sizes, self.recipe, scale_L3, observed)


class _Emulated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows_NI: Tensor,
        weight_LOI: Tensor,
        sizes: list[int],
        recipe: Fp8Recipe,
        scale_L3: Tensor | None,
        observed: DelayedScales | None,
    ) -> Tensor:
        ctx.save_for_backward(rows_NI, weight_LOI)
        ctx.sizes, ctx.casts, ctx.observed = sizes, _Casts(recipe, scale_L3), observed
        if observed is not None:
            observed.observe(INPUT, _amax(rows_NI.split(sizes)))
            observed.observe(WEIGHT, weight_LOI.abs().amax(dim=(1, 2)).float())
        out_NO = rows_NI.new_empty(rows_NI.shape[0], weight_LOI.shape[1])
        groups, casts = recipe.groups, ctx.casts
        for e, (x, out) in enumerate(zip(rows_NI.split(sizes), out_NO.split(sizes), strict=True)):
            if sizes[e]:
                weight = casts(weight_LOI[e], groups.weight, WEIGHT, e)
                out.copy_(casts(x, groups.columns, INPUT, e) @ weight.t())
        return out_NO

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor | None, ...]:
        rows_NI, weight_LOI = ctx.saved_tensors
        sizes, casts, groups = ctx.sizes, ctx.casts, ctx.casts.recipe.groups
        if ctx.observed is not None:
            ctx.observed.observe(GRADIENT, _amax(grad_NO.split(sizes)))
        to_rows, to_weight = torch.empty_like(rows_NI), torch.zeros_like(weight_LOI)
        parts = (rows_NI.split(sizes), grad_NO.split(sizes), to_rows.split(sizes))
        for e, (x, grad, to_x) in enumerate(zip(*parts, strict=True)):
            if not sizes[e]:
                continue
            if ctx.needs_input_grad[0]:
                weight = casts(weight_LOI[e], groups.weight_back, WEIGHT, e)
                to_x.copy_(casts(grad, groups.columns, GRADIENT, e) @ weight)
            if ctx.needs_input_grad[1]:
                if casts.recipe.wgrad:
                    grad, x = casts(grad, groups.rows, GRADIENT, e), casts(x, groups.rows, INPUT, e)
                to_weight[e].copy_(grad.float().t() @ x.float())
        return to_rows, to_weight, None, None, None, None


class _Casts:
    """Casts an expert's operand as the recipe says."""

    def __init__(self, recipe: Fp8Recipe, scale_L3: Tensor | None) -> None:
        self.recipe, self.scale_L3 = recipe, scale_L3

    def __call__(self, x: Tensor, group: Group, which: int, expert: int) -> Tensor:
        recipe = self.recipe
        dtype = recipe.gradient_dtype if which == GRADIENT else recipe.forward_dtype
        scale = None if self.scale_L3 is None else self.scale_L3[expert, which]
        return cast(x, group, dtype, scale=scale, power_of_two=recipe.power_of_two)


def _amax(parts: tuple[Tensor, ...]) -> Tensor:
    zero = parts[0].new_zeros((), dtype=torch.float32)
    return torch.stack([part.abs().amax().float() if part.numel() else zero for part in parts])
