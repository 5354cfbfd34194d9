"""Zero-computation experts of MoE++: zero, copy and constant, on every rank, without a row in the plan.

Jin et al. 2024, arXiv 2410.07348, eq. 3-6.  Columns beside those of the FFN experts, in this order: constant, copy,
zero (that of the public code).

Beside few FFN rows what counts is how often all T x D numbers are read and written.  So the expression has a backward
pass of its own, which shares what it reads, and on a CPU both take the tokens in blocks: measured on two cores against
the same operations over whole tensors, in benchmarks/README.md.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from megatron_dynmoe.experts.blocks import blocks

# Tokens of a block: fewer make the GEMMs too small, more fall out of the cache.
_TOKENS = 1024


def zero_computation(x_TD: Tensor, weights_TZ: Tensor, select_C2D: Tensor, values_CD: Tensor, *, copies: int) -> Tensor:
    """sum_z weight_z E_z(x) as one expression over T x D: no gather, no scatter, no loop over experts.

    Zero: E(x) = 0.  Copy: E(x) = x.  Constant: E(x) = a_1 x + a_2 v with [a_1, a_2] = softmax(W x).  Over two numbers
    the softmax is a sigmoid of their difference, so

        out = (sum_copies g + sum_constants g a_1) x + (g a_2) V.

    Args:
        x_TD: the experts' input.
        weights_TZ: float32 routing weights, 0 where not chosen.
        select_C2D: W of each constant expert.
        values_CD: v of each constant expert.
        copies: copy experts; what is left of the columns are zero experts.

    Returns:
        [T, D] in the dtype of ``x_TD``, a tensor of its own that the caller may add to in place.
    """
    difference_CD = (select_C2D[:, 0] - select_C2D[:, 1]).to(x_TD.dtype)
    return _ZeroComputation.apply(x_TD, weights_TZ, difference_CD, values_CD.to(x_TD.dtype), copies)


class _ZeroComputation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weights_TZ: Tensor, difference_CD: Tensor, values_CD: Tensor, copies: int
    ) -> Tensor:
        constants = values_CD.shape[0]
        weights_TC = weights_TZ[:, :constants]
        share_T1 = weights_TZ[:, constants : constants + copies].sum(dim=-1, keepdim=True)
        first_TC = torch.empty_like(weights_TC)
        out_TD = torch.empty_like(x_TD)
        for x, weights, first, share, out in blocks(_TOKENS, x_TD, weights_TC, first_TC, share_T1, out_TD):
            torch.sigmoid(linear(x, difference_CD).to(first.dtype), out=first)
            taken = weights * first
            share += taken.sum(dim=-1, keepdim=True)
            torch.mul(share.to(x.dtype), x, out=out)
            out.addmm_((weights - taken).to(x.dtype), values_CD)
        ctx.save_for_backward(x_TD, weights_TC, first_TC, share_T1, difference_CD, values_CD)
        ctx.copies, ctx.columns = copies, weights_TZ.shape[1]
        return out_TD

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weights_TC, first_TC, share_T1, difference_CD, values_CD = ctx.saved_tensors
        constants = values_CD.shape[0]
        to_x_TD = torch.empty_like(x_TD)
        to_weights_TZ = weights_TC.new_zeros(x_TD.shape[0], ctx.columns)  # a zero expert's stay 0
        # Sums over blocks are as wide as the routing weights.
        to_difference_CD = torch.zeros_like(difference_CD, dtype=weights_TC.dtype)
        to_values_CD = torch.zeros_like(to_difference_CD)
        for x, weights, first, share, grad, to_x, to_weights in blocks(
            _TOKENS, x_TD, weights_TC, first_TC, share_T1, grad_TD, to_x_TD, to_weights_TZ
        ):
            along_v = linear(grad, values_CD).to(first.dtype)
            torch.mul(grad, x, out=to_x)  # for its sum only: one buffer less in the cache
            along_x = to_x.sum(dim=-1, keepdim=True, dtype=first.dtype)
            torch.lerp(along_v, along_x.expand_as(along_v), first, out=to_weights[:, :constants])
            to_weights[:, constants : constants + ctx.copies] = along_x
            to_logit = (weights * (along_x - along_v) * first * (1 - first)).to(x.dtype)
            torch.mul(grad, share.to(x.dtype), out=to_x)
            to_x.addmm_(to_logit, difference_CD)
            to_difference_CD += to_logit.t() @ x
            to_values_CD += (weights * (1 - first)).to(x.dtype).t() @ grad
        return (
            to_x_TD,
            to_weights_TZ,
            to_difference_CD.to(difference_CD.dtype),
            to_values_CD.to(values_CD.dtype),
            None,
        )
