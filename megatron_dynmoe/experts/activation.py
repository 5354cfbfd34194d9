"""The gated activation between the two GEMMs, with its routing weight, keeping nothing for backward but its input.

Written as separate operations, act(gate) * up * weight reads and writes ten tensors of [N, F], forward and backward,
and keeps three of them.  Here the backward pass computes them again.  On a CPU the rows are taken in blocks, so that
what lies between stays in the cache: that halves its time there (benchmarks/layer_parts.py).  Experts on a CPU take the
GEMMs into the block as well (:mod:`megatron_dynmoe.experts.by_chunk`), with the functions below.  On a GPU these are
still four kernels forward and more backward, with float32 between them; a fused one is handed to ``grouped_mlp``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_dynmoe.experts.blocks import blocks

# Elements of [block, F] that a CPU thread works on at once: half a megabyte in float32, a few of which fit its cache.
_ELEMENTS_PER_THREAD = 1 << 17

Activation = Callable[[Tensor], Tensor]
FusedActivation = Callable[[Tensor, Tensor], Tensor]  # [N, 2F], [N] float32 -> [N, F]


def gated_activation(
    hidden_NG: Tensor, weights_N: Tensor, activation: Activation = F.silu, *, offset: float = 0.0
) -> Tensor:
    """activation(gate) * (up + offset) * weight, the last product in the wider dtype of the two.

    Args:
        hidden_NG: [N, 2F], gate and up side by side.
        weights_N: the weight of each row, float32.
        activation: elementwise.
        offset: added to up (megatron-core's ``glu_linear_offset``, mlp.py:330).

    Returns:
        [N, F] in the dtype of ``hidden_NG``.
    """
    return _GatedActivation.apply(hidden_NG, weights_N, activation, offset)


class _GatedActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_NG: Tensor, weights_N: Tensor, activation: Activation, offset: float) -> Tensor:
        ctx.save_for_backward(hidden_NG, weights_N)
        ctx.activation, ctx.offset = activation, offset
        out_NF = hidden_NG.new_empty(hidden_NG.shape[0], hidden_NG.shape[1] // 2)
        for hidden, weights, out in blocks(_rows(hidden_NG), hidden_NG, weights_N, out_NF):
            out.copy_(activate(hidden, weights, activation, offset))
        return out_NF

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_NF: Tensor) -> tuple[Tensor, Tensor, None, None]:
        hidden_NG, weights_N = ctx.saved_tensors
        hidden_grad, weights_grad = torch.empty_like(hidden_NG), torch.empty_like(weights_N)
        for hidden, weights, grad, to_hidden, to_weights in blocks(
            _rows(hidden_NG), hidden_NG, weights_N, grad_NF, hidden_grad, weights_grad
        ):
            _, found = activate_back(hidden, weights, grad, ctx.activation, ctx.offset, to_hidden)
            to_weights.copy_(found)
        return hidden_grad, weights_grad, None, None


def activate(hidden: Tensor, weights: Tensor, activation: Activation, offset: float) -> Tensor:
    """:func:`gated_activation` of a few rows, without autograd."""
    gate, up = _halves(hidden, offset)
    return (activation(gate) * up).mul_(weights.unsqueeze(-1))


def activate_back(
    hidden: Tensor, weights: Tensor, grad: Tensor, activation: Activation, offset: float, to_hidden: Tensor
) -> tuple[Tensor, Tensor]:
    """The backward of :func:`activate`.

    Args:
        grad: [M, F], of the weighted output.
        to_hidden: [M, 2F], where the gradient of ``hidden`` is written; it may be ``hidden`` itself.

    Returns:
        activation(gate) * (up + offset) without the weights, [M, F]; the gradient of the weights, [M].
    """
    gate, up = _halves(hidden, offset)
    to_gate, to_up = to_hidden.chunk(2, dim=-1)
    active = activation(gate)
    product = active * up
    to_weights = (grad.to(weights.dtype) * product).sum(dim=-1)
    weighted = (grad * weights.unsqueeze(-1)).to(hidden.dtype)
    torch.mul(weighted, up, out=to_up)
    if activation is F.silu:  # what autograd would call, without building a graph for every block
        torch.ops.aten.silu_backward.grad_input(to_up, gate, grad_input=to_gate)
    else:
        active = active.clone()  # it may be the gate itself, which may be written over
        to_gate.copy_(_pull_back(activation, gate, to_up))
    torch.mul(weighted, active, out=to_up)
    return product, to_weights


def _halves(hidden: Tensor, offset: float) -> tuple[Tensor, Tensor]:
    gate, up = hidden.chunk(2, dim=-1)
    return gate, up + offset if offset else up


def _pull_back(activation: Activation, gate: Tensor, grad: Tensor) -> Tensor:
    """From the gradient of activation(gate) to that of the gate."""
    with torch.enable_grad():
        gate = gate.detach().requires_grad_()
        active = activation(gate)
    return torch.autograd.grad(active, gate, grad)[0]


def _rows(hidden_NG: Tensor) -> int:
    return max(1, _ELEMENTS_PER_THREAD * torch.get_num_threads() * 2 // hidden_NG.shape[1])
