"""The primitive moves with their backward passes: gather and scatter-add, rows to other places, uneven all-to-all in
two halves, gather and reduce-scatter of unequal parts.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def _wide(rows: Tensor) -> torch.dtype:
    return torch.promote_types(rows.dtype, torch.float32)


def scatter_add(rows_ND: Tensor, index_N: Tensor, size: int, onto_TD: Tensor | None = None) -> Tensor:
    """out[index[n]] += rows[n] from ``onto`` or zeros, summed in float32, in the dtype of ``rows``; no autograd."""
    wide = _wide(rows_ND)
    if onto_TD is None:
        out = torch.zeros(size, *rows_ND.shape[1:], dtype=wide, device=rows_ND.device)
    else:
        out = onto_TD.to(wide)
    return out.index_add_(0, index_N, rows_ND.to(wide)).to(rows_ND.dtype)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD: Tensor, index_N: Tensor) -> Tensor:
        ctx.save_for_backward(index_N)
        ctx.size = x_TD.shape[0]
        return x_TD.index_select(0, index_N)

    @staticmethod
    def backward(ctx, grad_ND: Tensor) -> tuple[Tensor, None]:
        return scatter_add(grad_ND, ctx.saved_tensors[0], ctx.size), None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_ND: Tensor, index_N: Tensor, size: int, onto_TD: Tensor | None) -> Tensor:
        ctx.save_for_backward(index_N)
        return scatter_add(rows_ND, index_N, size, onto_TD)

    @staticmethod
    def backward(ctx, grad_TD: Tensor) -> tuple[Tensor, None, None, Tensor | None]:
        to_onto_TD = grad_TD if ctx.needs_input_grad[3] else None
        return grad_TD.index_select(0, ctx.saved_tensors[0]), None, None, to_onto_TD


def gather_rows(x_TD: Tensor, index_N: Tensor) -> Tensor:
    """x[index]: [T, D] to [N, D]."""
    return _Gather.apply(x_TD, index_N)


def scatter_rows(rows_ND: Tensor, index_N: Tensor, size: int, onto_TD: Tensor | None = None) -> Tensor:
    """Sum rows by index: [N, D] to [size, D]; an index that no row has gets 0.

    Args:
        onto_TD: [size, D] in the dtype of the rows, to start from instead of zeros; it may be overwritten.
    """
    if onto_TD is not None and onto_TD.dtype == _wide(rows_ND):
        return onto_TD.index_add_(0, index_N, rows_ND)  # autograd's own, which knows what to do where it is a view
    return _Scatter.apply(rows_ND, index_N, size, onto_TD)


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, index_N: Tensor) -> Tensor:
        ctx.save_for_backward(index_N)
        ctx.size = rows.shape[0]
        return rows.index_select(0, index_N)

    @staticmethod
    def backward(ctx, grad_ND: Tensor) -> tuple[Tensor, None]:
        return put_rows(grad_ND, ctx.saved_tensors[0], ctx.size), None


class _Put(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_ND: Tensor, index_N: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(index_N)
        make = rows_ND.new_empty if size == rows_ND.shape[0] else rows_ND.new_zeros
        return make(size, *rows_ND.shape[1:]).index_copy_(0, index_N, rows_ND)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return take_rows(grad, ctx.saved_tensors[0]), None, None


def take_rows(rows: Tensor, index_N: Tensor) -> Tensor:
    """rows[index] for an index that names no row twice: its backward copies where that of a gather has to sum."""
    return _Take.apply(rows, index_N)


def put_rows(rows_ND: Tensor, index_N: Tensor, size: int) -> Tensor:
    """The reverse of :func:`take_rows`: [size, D] with row n at index[n], places all different, and zeros elsewhere."""
    return _Put.apply(rows_ND, index_N, size)


class _Start(torch.autograd.Function):
    """Launch the all-to-all; its result must not be read before :class:`_Wait`."""

    @staticmethod
    def forward(ctx, rows: Tensor, output_splits: list[int], input_splits: list[int], flight: Exchange) -> Tensor:
        ctx.flight = flight
        flight.splits = output_splits, input_splits
        out = rows.new_empty(sum(output_splits), *rows.shape[1:])
        flight.launch(out, rows, output_splits, input_splits)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.flight.land(), None, None, None  # launched by _Wait.backward; ``grad`` has served there


class _Wait(torch.autograd.Function):
    """Wait for the all-to-all; backward launches the reverse one and does not wait."""

    @staticmethod
    def forward(ctx, out: Tensor, flight: Exchange) -> Tensor:
        ctx.flight = flight
        flight.land()
        return out.view_as(out)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        output_splits, input_splits = ctx.flight.splits
        back = grad.new_empty(sum(input_splits), *grad.shape[1:])
        ctx.flight.launch(back, grad, input_splits, output_splits)
        return grad, None


class Exchange:
    """One uneven all-to-all in flight, forward or backward.

    Between the construction and :meth:`wait` other work may run; autograd runs that work's backward between the two
    halves of the reverse exchange as well, because it takes nodes in the opposite order of their making.

    The graph holds the exchange, so after :meth:`wait` the exchange holds nothing of the graph: such a cycle passes
    through autograd's nodes, where Python's collector does not see it, and what was received would never be freed.

    Args:
        rows: [sum of input_splits, ...].
        output_splits, input_splits: rows from and to each rank of ``group``.
        group: one rank or ``None``: nothing moves.
    """

    def __init__(
        self, rows: Tensor, output_splits: list[int], input_splits: list[int], group: dist.ProcessGroup | None
    ) -> None:
        self.group = group
        self.splits: tuple[list[int], list[int]] = (output_splits, input_splits)
        self._work: Any = None
        self._buffers: tuple[Tensor, Tensor] | None = None
        alone = group is None or dist.get_world_size(group) == 1
        self._out: Tensor | None = rows if alone else _Start.apply(rows, output_splits, input_splits, self)
        self._alone = alone

    def launch(self, out: Tensor, rows: Tensor, output_splits: list[int], input_splits: list[int]) -> None:
        """Start the collective; both buffers stay alive until :meth:`land`."""
        rows = rows.contiguous()
        self._buffers = out, rows
        self._work = dist.all_to_all_single(out, rows, output_splits, input_splits, group=self.group, async_op=True)

    def land(self) -> Tensor:
        """Wait for what was launched last and hand out its result."""
        assert self._work is not None and self._buffers is not None, "nothing was launched"
        self._work.wait()
        out, _ = self._buffers
        self._work = self._buffers = None
        return out

    def wait(self) -> Tensor:
        """The rows received, ordered by sender; they are handed out once."""
        out, self._out = self._out, None
        assert out is not None, "the rows were handed out already"
        return out if self._alone else _Wait.apply(out, self)


def all_to_all(
    rows: Tensor, output_splits: list[int], input_splits: list[int], group: dist.ProcessGroup | None
) -> Tensor:
    """Start and wait at once."""
    return Exchange(rows, output_splits, input_splits, group).wait()


class _GatherOver(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, sizes_P: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.sizes_P, ctx.group = sizes_P, group
        return _gather(rows, sizes_P, group)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return _reduce(grad, ctx.sizes_P, ctx.group), None, None


class _ReduceOver(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, sizes_P: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.sizes_P, ctx.group = sizes_P, group
        return _reduce(rows, sizes_P, group)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return _gather(grad, ctx.sizes_P, ctx.group), None, None


def _gather(rows: Tensor, sizes_P: list[int], group: dist.ProcessGroup) -> Tensor:
    rows, me, peers = rows.contiguous(), dist.get_rank(group), range(len(sizes_P))
    out = rows.new_empty(sum(sizes_P), *rows.shape[1:])
    parts = out.split(sizes_P)
    parts[me].copy_(rows)
    # Messages, not an all-to-all of copies. All ranks know the sizes: an empty part is neither sent nor awaited.
    moves = [dist.P2POp(dist.isend, rows, group=group, group_peer=p) for p in peers if p != me and sizes_P[me]]
    moves += [dist.P2POp(dist.irecv, parts[p], group=group, group_peer=p) for p in peers if p != me and sizes_P[p]]
    for work in dist.batch_isend_irecv(moves) if moves else ():
        work.wait()
    return out


def _reduce(rows: Tensor, sizes_P: list[int], group: dist.ProcessGroup) -> Tensor:
    mine = sizes_P[dist.get_rank(group)]
    parts = all_to_all(rows, [mine] * len(sizes_P), sizes_P, group)
    return parts.view(len(sizes_P), mine, *rows.shape[1:]).sum(dim=0, dtype=_wide(rows)).to(rows.dtype)


def gather_over(rows: Tensor, sizes_P: list[int], group: dist.ProcessGroup) -> Tensor:
    """The rows of all ranks of ``group``, in rank order; rank p holds ``sizes_P[p]`` of them.

    An all-gather of unequal parts, which gloo has not and NCCL emulates, said as a message to each rank: nothing is
    padded, nothing copied before it is sent.  Its backward sums the gradients of all ranks, in float32.
    """
    return _GatherOver.apply(rows, sizes_P, group)


def reduce_scatter_over(rows: Tensor, sizes_P: list[int], group: dist.ProcessGroup) -> Tensor:
    """The reverse of :func:`gather_over`: sum over ranks, in float32; each keeps the part that is its own."""
    return _ReduceOver.apply(rows, sizes_P, group)
