"""The product that every linear gate starts from, in float32 whatever the model's dtype."""

from __future__ import annotations

import torch
from torch import Tensor


class _Linear32(torch.autograd.Function):
    """x W^T in float32 that keeps x in its own dtype for the backward pass: half the memory for a bfloat16 model."""

    @staticmethod
    def forward(ctx, x_TD: Tensor, weight_ED: Tensor) -> Tensor:
        ctx.save_for_backward(x_TD, weight_ED)
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        return x_TD.to(wide) @ weight_ED.to(wide).t()

    @staticmethod
    def backward(ctx, grad_TE: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x_TD, weight_ED = ctx.saved_tensors
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad_TE @ weight_ED.to(grad_TE.dtype)).to(x_TD.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = (grad_TE.t() @ x_TD.to(grad_TE.dtype)).to(weight_ED.dtype)
        return grad_x, grad_weight


def linear32(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """x W^T.

    Args:
        x_TD: any float dtype.
        weight_ED: any float dtype.

    Returns:
        [T, E] in float32 (float64 for float64 input); gradients in the dtypes of the arguments.
    """
    return _Linear32.apply(x_TD, weight_ED)
