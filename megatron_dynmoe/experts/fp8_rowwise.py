"""A linear layer of ragged experts in FP8 with a scale a row, by torch's grouped kernel for Hopper.

The kernel (aten/src/ATen/native/cuda/ScaledGroupMM.cu) multiplies a row-major by a column-major matrix, both e4m3, and
scales the rows of the one and the columns of the other behind the sum; it writes bfloat16.  For the gradient of the
weights the contracted dimension is the ragged one.  There each group must be a multiple of 16 rows, and at least 16
(GroupMMCommon.cuh), so groups are filled up with rows of zeros for that GEMM alone.  Nothing here waits for the device.

Torch has a public name for the kernel too, ``torch.nn.functional.scaled_grouped_mm``.  The older operator is called
because every torch that is supported has it, with a meta kernel that checks its arguments.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_dynmoe.experts.fp8 import E4M3, scale_of, to_float8

MULTIPLE = 16
_kernel = torch._scaled_grouped_mm


def linear(rows_NI: Tensor, weight_LOI: Tensor, ends_L: Tensor, *, wgrad: bool = True) -> Tensor:
    """y = x W^T for each expert.

    Args:
        rows_NI: bfloat16, ordered by expert; I and O are multiples of 16.
        weight_LOI: bfloat16.
        ends_L: int32, where each expert's rows end.
        wgrad: whether the gradient of the weights is computed in FP8, too.
    """
    return _Rowwise.apply(rows_NI, weight_LOI, ends_L, wgrad)


class _Rowwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_NI: Tensor, weight_LOI: Tensor, ends_L: Tensor, wgrad: bool) -> Tensor:
        ctx.save_for_backward(rows_NI, weight_LOI, ends_L)
        ctx.wgrad = wgrad
        if rows_NI.shape[0] == 0:
            return rows_NI.new_zeros(0, weight_LOI.shape[1])
        return _multiply(*_rows(rows_NI), *_rows(weight_LOI), ends_L)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor | None, ...]:
        rows_NI, weight_LOI, ends_L = ctx.saved_tensors
        if rows_NI.shape[0] == 0:
            return torch.zeros_like(rows_NI), torch.zeros_like(weight_LOI), None, None
        to_rows = to_weight = None
        if ctx.needs_input_grad[0]:
            transposed_LIO = weight_LOI.transpose(1, 2).contiguous()
            to_rows = _multiply(*_rows(grad_NO.contiguous()), *_rows(transposed_LIO), ends_L)
        if ctx.needs_input_grad[1]:
            if ctx.wgrad:
                to_weight = _weight_gradient(grad_NO, rows_NI, ends_L)
            else:
                to_weight = F.grouped_mm(grad_NO.contiguous().t(), rows_NI, offs=ends_L)
        return to_rows, to_weight, None, None


def _rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """float8 of ``x`` [..., K], contiguous, and what each row is multiplied by to have it back, float32."""
    x = x.float()
    scale = scale_of(x.abs().amax(dim=-1, keepdim=True), E4M3)
    return to_float8(x, scale, E4M3), scale.reciprocal().squeeze(-1)


def _multiply(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, ends_L: Tensor) -> Tensor:
    """a [N, K] by b [L, M, K], contracted over K, to [N, M] bfloat16."""
    return _kernel(a, b.transpose(-2, -1), a_scale, b_scale, offs=ends_L, out_dtype=torch.bfloat16)


def _weight_gradient(grad_NO: Tensor, rows_NI: Tensor, ends_L: Tensor) -> Tensor:
    """[L, O, I]: the sum over each group's rows, whose columns have a scale in each group."""
    groups = _Filled(ends_L, rows_NI.shape[0])
    grad_OM, grad_scale = groups.columns(grad_NO)
    rows_IM, rows_scale = groups.columns(rows_NI)
    return _kernel(grad_OM, rows_IM.t(), grad_scale, rows_scale, offs=groups.ends_L, out_dtype=torch.bfloat16)


class _Filled:
    """Groups filled up to multiples of 16 rows, at least 16; the length of all does not depend on their sizes."""

    def __init__(self, ends_L: Tensor, rows: int) -> None:
        experts, row_N = ends_L.shape[0], torch.arange(rows, device=ends_L.device, dtype=ends_L.dtype)
        starts_L = F.pad(ends_L[:-1], (1, 0))
        filled_L = ((ends_L - starts_L + MULTIPLE - 1) // MULTIPLE).clamp_min(1) * MULTIPLE
        self.ends_L = filled_L.cumsum(0, dtype=torch.int32)
        self.length = -(-rows // MULTIPLE) * MULTIPLE + experts * MULTIPLE
        moved_L = self.ends_L - filled_L - starts_L
        self.place_N = (row_N + moved_L[torch.searchsorted(ends_L, row_N, right=True)]).long()
        block_B = torch.arange(0, self.length, MULTIPLE, device=ends_L.device, dtype=ends_L.dtype)
        # Blocks behind the last group are zeros and read by nobody; they count as its.
        self.expert_B = torch.searchsorted(self.ends_L, block_B, right=True).clamp_max(experts - 1)

    def columns(self, x_NK: Tensor) -> tuple[Tensor, Tensor]:
        """float8 [K, M], contiguous, the filled groups side by side, and the scales of each group's columns [L * K]."""
        x_MK = x_NK.new_zeros(self.length, x_NK.shape[1]).index_copy_(0, self.place_N, x_NK).float()
        blocks_BSK = x_MK.view(-1, MULTIPLE, x_MK.shape[1])
        amax_BK, experts = blocks_BSK.abs().amax(dim=1), self.ends_L.shape[0]
        index_BK = self.expert_B.unsqueeze(-1).expand_as(amax_BK)
        amax_LK = amax_BK.new_zeros(experts, x_MK.shape[1]).scatter_reduce(0, index_BK, amax_BK, "amax")
        scale_LK = scale_of(amax_LK, E4M3)
        filled = to_float8(blocks_BSK, scale_LK[self.expert_B].unsqueeze(1), E4M3).view_as(x_MK)
        return filled.t().contiguous(), scale_LK.reciprocal().view(-1)
