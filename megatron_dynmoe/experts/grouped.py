"""Feed-forward experts over ragged groups of rows, one call for all devices: two grouped GEMMs, or chunks on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_dynmoe.experts.activation import FusedActivation, gated_activation
from megatron_dynmoe.experts.by_chunk import mlp_by_chunk

# (rows [N, I] ordered by expert, weight [L, O, I], ends of the experts' rows [L] int32) -> [N, O]
GroupedLinear = Callable[[Tensor, Tensor, Tensor], Tensor]


def grouped_mlp(
    rows_ND: Tensor,
    weights_N: Tensor,
    fc1_LGD: Tensor,
    fc2_LDF: Tensor,
    rows_per_expert_L: Sequence[int] | Tensor,
    *,
    activation: Callable[[Tensor], Tensor] = F.silu,
    gated: bool = True,
    offset: float = 0.0,
    fused: FusedActivation | None = None,
    linears: tuple[GroupedLinear, GroupedLinear] | None = None,
) -> Tensor:
    """Apply each expert to its rows and multiply by the row's weight.

    y = fc2 (act(fc1 x) * w): the weight is applied between the two GEMMs, on the narrower tensor and in float32, as
    megatron-core does (experts.py, ``permuted_probs``).

    Args:
        rows_ND: rows ordered by expert.
        weights_N: the weight of each row, float32.
        fc1_LGD: first weight of each expert; G is 2F (gate rows, then up rows) if ``gated``, else F.
        fc2_LDF: second weight of each expert.
        offset: added to the up rows' output, if ``gated``.
        rows_per_expert_L: how many rows each expert has; they sum to N; any may be 0.
        fused: computes :func:`gated_activation` of ``activation`` and ``offset`` in one kernel, and keeps no more for
            backward; taken on a GPU, if ``gated`` and if there are rows.
        linears: what multiplies; default: torch's grouped GEMMs in the dtype of ``rows_ND``, and for gated experts on a
            CPU the same products chunk by chunk (:mod:`megatron_dynmoe.experts.by_chunk`).

    Returns:
        [N, D] in the dtype of ``rows_ND``.
    """
    if gated and linears is None and rows_ND.device.type == "cpu":
        sizes = torch.as_tensor(rows_per_expert_L).tolist()
        return mlp_by_chunk(rows_ND, weights_N, fc1_LGD, fc2_LDF, sizes, activation, offset)
    ends_L = (
        torch.as_tensor(rows_per_expert_L).cumsum(0).to(device=rows_ND.device, dtype=torch.int32, non_blocking=True)
    )
    first, second = linears or (grouped_linear, grouped_linear)
    hidden = first(rows_ND, fc1_LGD, ends_L)
    if gated and fused is not None and hidden.device.type != "cpu" and hidden.shape[0] > 0:
        hidden = fused(hidden, weights_N)
    elif gated:
        hidden = gated_activation(hidden, weights_N, activation, offset=offset)
    else:
        hidden = (activation(hidden) * weights_N.unsqueeze(-1)).to(rows_ND.dtype)
    return second(hidden, fc2_LDF, ends_L)


def grouped_linear(rows_NI: Tensor, weight_LOI: Tensor, ends_L: Tensor) -> Tensor:
    """y = x W^T for each expert by torch's grouped GEMM, in the dtype of the rows."""
    if rows_NI.shape[0] == 0:
        # No GEMM to launch, but the weights stay in the graph: they get a zero gradient, which the reduction of
        # gradients across ranks waits for.
        return rows_NI.new_zeros(0, weight_LOI.shape[1]) + weight_LOI.sum() * 0 + rows_NI.sum() * 0
    out = F.grouped_mm(rows_NI, weight_LOI.transpose(1, 2), offs=ends_L)
    return _ContiguousGrad.apply(out)


class _ContiguousGrad(torch.autograd.Function):
    """Identity whose gradient is contiguous: the backward of grouped_mm refuses expanded gradients (a sum's)."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad.contiguous()
