"""Gated experts on a CPU, a chunk of an expert's rows at a time, so that what lies between its products stays in cache.

Forward a chunk goes through both GEMMs and the activation between them, backward through all six products and the
activation's gradient.  Of what is computed only the first GEMM's output is worth keeping for backward, 2F numbers a
row.  It is kept while the pass needs no more memory than a plain loop over experts; beyond, it is computed again.  So a
pass with few rows an expert, where the weights' gradients are most of the memory, computes up to two ninths more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_dynmoe.experts.activation import Activation, activate, activate_back
from megatron_dynmoe.experts.products import Product, padded, product_for, row_step

# Rows of a chunk: about half the model's width, between these. With fewer the gradients of the weights are added up too
# often, with more a chunk leaves the cache; wide models have enough to do in a chunk not to mind. Many threads want
# more rows: twice as many at twice _THREADS.
_LEAST_ROWS, _MOST_ROWS, _THREADS = 128, 512, 4


class Chunk(NamedTuple):
    """Rows ``begin`` to ``end``, all of one expert, taken as ``length`` rows, the last of them zeros.

    ``first``, ``last``: whether it is the expert's first chunk, and its last.
    """

    expert: int
    begin: int
    end: int
    length: int
    first: bool
    last: bool

    def of(self, rows: Tensor) -> Tensor:
        """This chunk of [N, ...]."""
        return padded(rows[self.begin : self.end], self.length)

    def put(self, rows: Tensor, chunk: Tensor) -> None:
        """Write this chunk into [N, ...]."""
        rows[self.begin : self.end].copy_(chunk[: self.end - self.begin])


def chunks(rows_per_expert_L: Sequence[int], limit: int, *, pad: bool) -> Iterator[Chunk]:
    """Each expert's rows in about equal parts of about ``limit``, expert by expert; an expert without rows has none."""
    begin = 0
    for expert, rows in enumerate(rows_per_expert_L):
        end = begin + rows
        parts = max(1, round(rows / limit))
        step = row_step(-(-rows // parts)) if pad else 1
        size = max(1, -(-rows // (parts * step)) * step)
        for start in range(begin, end, size):
            stop = min(start + size, end)
            yield Chunk(expert, start, stop, -(-(stop - start) // step) * step, start == begin, stop == end)
        begin = end


def limit_of(fc2_LDF: Tensor) -> int:
    """About how many rows a chunk has at most."""
    return min(max(_LEAST_ROWS, fc2_LDF.shape[1] // 2), _MOST_ROWS) * max(1, torch.get_num_threads() // _THREADS)


def mlp_by_chunk(
    rows_ND: Tensor,
    weights_N: Tensor,
    fc1_LGD: Tensor,
    fc2_LDF: Tensor,
    rows_per_expert_L: Sequence[int],
    activation: Activation,
    offset: float,
) -> Tensor:
    """:func:`~megatron_dynmoe.experts.grouped.grouped_mlp` of gated experts on a CPU; arguments and result as there."""
    linear, pad = product_for(rows_ND, fc2_LDF[0])
    plan = list(chunks(rows_per_expert_L, limit_of(fc2_LDF), pad=pad))
    room = _room(rows_ND, fc2_LDF, max((chunk.length for chunk in plan), default=0)) if torch.is_grad_enabled() else 0
    return _ByChunk.apply(rows_ND.contiguous(), weights_N, fc1_LGD, fc2_LDF, plan, linear, activation, offset, room)


def _room(rows_ND: Tensor, fc2_LDF: Tensor, chunk: int) -> int:
    """How many numbers may be kept beside the rows.

    A loop keeps 4F + 2D a row (its input, both halves, the active half, the product, the output that is to be
    weighted) and has not one gradient of a weight when it starts back.  Here three tensors [N, D] and the gradients of
    all weights are there at once, and what a chunk needs.
    """
    rows, (experts, width, inner) = rows_ND.shape[0], fc2_LDF.shape
    scratch = chunk * (6 * inner + 2 * width) + 2 * inner * width
    return rows * (4 * inner - width) - experts * 3 * inner * width - scratch


class _ByChunk(torch.autograd.Function):
    @staticmethod
    @torch.autocast("cpu", enabled=False)  # tensors are multiplied as they come
    def forward(
        ctx: Any,
        rows_ND: Tensor,
        weights_N: Tensor,
        fc1_LGD: Tensor,
        fc2_LDF: Tensor,
        plan: list[Chunk],
        linear: Product,
        activation: Activation,
        offset: float,
        room: int,
    ) -> Tensor:
        out_ND, kept = rows_ND.new_empty(rows_ND.shape[0], fc2_LDF.shape[1]), []
        fc1_L, fc2_L = fc1_LGD.unbind(), fc2_LDF.unbind()  # cheaper than to index once a chunk
        for chunk in plan:
            hidden = linear(chunk.of(rows_ND), fc1_L[chunk.expert])
            active = activate(hidden, chunk.of(weights_N), activation, offset)
            chunk.put(out_ND, linear(active, fc2_L[chunk.expert]))
            room -= hidden.numel()
            if room >= 0:
                kept.append(hidden)
        ctx.save_for_backward(rows_ND, weights_N, fc1_LGD, fc2_LDF, *kept)
        ctx.plan, ctx.linear, ctx.activation, ctx.offset = plan, linear, activation, offset
        return out_ND

    @staticmethod
    @torch.autograd.function.once_differentiable
    @torch.autocast("cpu", enabled=False)
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        rows_ND, weights_N, fc1_LGD, fc2_LDF, *kept = ctx.saved_tensors
        rows_wanted, _, fc1_wanted, fc2_wanted, *_ = ctx.needs_input_grad
        linear: Product = ctx.linear
        grad_ND, to_weights = grad_ND.contiguous(), torch.empty_like(weights_N)
        fc1_L, fc2_L = fc1_LGD.unbind(), fc2_LDF.unbind()
        to_rows = torch.empty_like(rows_ND) if rows_wanted else None
        to_fc1 = _WeightGrad(fc1_LGD, ctx.plan) if fc1_wanted else None
        to_fc2 = _WeightGrad(fc2_LDF, ctx.plan) if fc2_wanted else None
        for index, chunk in enumerate(ctx.plan):
            rows, weights, grad = chunk.of(rows_ND), chunk.of(weights_N), chunk.of(grad_ND)
            fc1, fc2 = fc1_L[chunk.expert], fc2_L[chunk.expert]
            hidden = kept[index] if index < len(kept) else linear(rows, fc1)
            to_hidden = torch.empty_like(hidden) if index < len(kept) else hidden  # what is kept may be asked for again
            product, to_weight = activate_back(
                hidden, weights, linear(grad, fc2.t()), ctx.activation, ctx.offset, to_hidden
            )
            chunk.put(to_weights, to_weight)
            if to_fc2:
                to_fc2.add(chunk, linear(grad.t(), product.mul_(weights.unsqueeze(-1)).t()))
            del product
            if to_rows is not None:
                chunk.put(to_rows, linear(to_hidden, fc1.t()))
            if to_fc1:
                to_fc1.add(chunk, linear(to_hidden.t(), rows.t()))
        grads = to_rows, to_weights, to_fc1 and to_fc1.grad, to_fc2 and to_fc2.grad
        return *grads, None, None, None, None, None


class _WeightGrad:
    """The gradient of stacked weights, summed over an expert's chunks; in float32 where there are several."""

    def __init__(self, weight_LOI: Tensor, plan: list[Chunk]) -> None:
        self.grad = torch.empty_like(weight_LOI)
        self._grad_L = self.grad.unbind()
        self._sum: Tensor | None = None
        for idle in set(range(len(weight_LOI))) - {chunk.expert for chunk in plan}:
            self.grad[idle] = 0

    def add(self, chunk: Chunk, part: Tensor) -> None:
        """Add a chunk's; chunks come in order."""
        here = self._grad_L[chunk.expert]
        if (chunk.first and chunk.last) or part.dtype.itemsize >= 4:
            (here.copy_ if chunk.first else here.add_)(part)
            return
        self._sum = part.float() if self._sum is None else self._sum.add_(part)
        if chunk.last:
            here.copy_(self._sum)
            self._sum = None
