"""Move exactly the routed rows: from token order to expert order, across ranks, and back.

    permute    token order          -> rows by expert             (gather; its backward is a scatter-add)
    exchange   rows by expert       -> rows by sender             (uneven all-to-all; its backward is the reverse one)
    group      rows by sender       -> rows by local expert       (chunks change places)
    ungroup, exchange back, unpermute: the same plan, backwards.

Nothing is padded and nothing dropped: every size comes from the :class:`~megatron_dynmoe.routing.RoutePlan`.
Sums over a token's rows, forward and backward, are taken in float32 whatever the rows' dtype.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dynmoe.routing import RoutePlan


def _scatter_add(rows_ND: Tensor, index_N: Tensor, size: int) -> Tensor:
    wide = torch.promote_types(rows_ND.dtype, torch.float32)
    out = torch.zeros(size, *rows_ND.shape[1:], dtype=wide, device=rows_ND.device)
    return out.index_add_(0, index_N, rows_ND.to(wide)).to(rows_ND.dtype)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD: Tensor, index_N: Tensor) -> Tensor:
        ctx.save_for_backward(index_N)
        ctx.size = x_TD.shape[0]
        return x_TD.index_select(0, index_N)

    @staticmethod
    def backward(ctx, grad_ND: Tensor) -> tuple[Tensor, None]:
        return _scatter_add(grad_ND, ctx.saved_tensors[0], ctx.size), None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_ND: Tensor, index_N: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(index_N)
        return _scatter_add(rows_ND, index_N, size)

    @staticmethod
    def backward(ctx, grad_TD: Tensor) -> tuple[Tensor, None, None]:
        return grad_TD.index_select(0, ctx.saved_tensors[0]), None, None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, output_splits: list[int], input_splits: list[int], group) -> Tensor:
        ctx.splits, ctx.group = (output_splits, input_splits), group
        out = rows.new_empty(sum(output_splits), *rows.shape[1:])
        dist.all_to_all_single(out, rows.contiguous(), output_splits, input_splits, group=group)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        output_splits, input_splits = ctx.splits
        return _AllToAll.apply(grad, input_splits, output_splits, ctx.group), None, None, None


def permute(x_TD: Tensor, weights_TE: Tensor, plan: RoutePlan) -> tuple[Tensor, Tensor]:
    """Copy each token once for each expert it visits, ordered by expert, then token.

    Args:
        x_TD: hidden states.
        weights_TE: float32 weights.

    Returns:
        rows [N, D] in the dtype of ``x_TD``, and the weight of each row [N] in that of ``weights_TE``.
    """
    rows_ND = _Gather.apply(x_TD, plan.token_of_row_N)
    return rows_ND, weights_TE[plan.token_of_row_N, plan.expert_of_row_N]


def unpermute(rows_ND: Tensor, plan: RoutePlan, num_tokens: int) -> Tensor:
    """Sum the rows of each token: [N, D] to [T, D]; a token without rows gets 0."""
    return _Scatter.apply(rows_ND, plan.token_of_row_N, num_tokens)


def exchange(rows: Tensor, plan: RoutePlan, group: dist.ProcessGroup | None) -> Tensor:
    """Send each row to the rank that holds its expert; returns the rows received, ordered by sender, then expert."""
    if group is None or group.size() == 1:
        return rows
    return _AllToAll.apply(rows, plan.output_splits_R, plan.input_splits_R, group)


def exchange_back(rows: Tensor, plan: RoutePlan, group: dist.ProcessGroup | None) -> Tensor:
    """The reverse of :func:`exchange`: each row returns to the rank of its token."""
    if group is None or group.size() == 1:
        return rows
    return _AllToAll.apply(rows, plan.input_splits_R, plan.output_splits_R, group)


def gather_over(rows: Tensor, sizes_P: list[int], group: dist.ProcessGroup) -> Tensor:
    """The rows of all ranks of ``group``, in rank order; rank p holds ``sizes_P[p]`` of them.

    An all-gather of unequal parts, said as an all-to-all: the same bytes on the wire, nothing padded, and gloo, which
    has no uneven all-gather, can do it.  Its backward sums the gradients of all ranks.
    """
    copies = rows.repeat(len(sizes_P), *([1] * (rows.dim() - 1)))
    return _AllToAll.apply(copies, sizes_P, [rows.shape[0]] * len(sizes_P), group)


def reduce_scatter_over(rows: Tensor, sizes_P: list[int], group: dist.ProcessGroup) -> Tensor:
    """The reverse of :func:`gather_over`: sum over ranks, in float32; each keeps the part that is its own."""
    mine = sizes_P[dist.get_rank(group)]
    parts = _AllToAll.apply(rows, [mine] * len(sizes_P), sizes_P, group)
    wide = torch.promote_types(rows.dtype, torch.float32)
    return parts.view(len(sizes_P), mine, *rows.shape[1:]).sum(dim=0, dtype=wide).to(rows.dtype)


def group_by_expert(rows: Tensor, plan: RoutePlan) -> Tensor:
    """Rows by sender, then local expert, to rows by local expert, then sender."""
    senders, local = len(plan.received_PRL) * len(plan.received_PRL[0]), len(plan.received_PRL[0][0])
    return _reorder(rows, plan.chunks_PRL, senders, local)


def ungroup_by_expert(rows: Tensor, plan: RoutePlan) -> Tensor:
    """The reverse of :func:`group_by_expert`."""
    senders, local = len(plan.received_PRL) * len(plan.received_PRL[0]), len(plan.received_PRL[0][0])
    by_expert = [plan.chunks_PRL[s * local + e] for e in range(local) for s in range(senders)]
    return _reorder(rows, by_expert, local, senders)


def _reorder(rows: Tensor, sizes: list[int], major: int, minor: int) -> Tensor:
    if major == 1 or minor == 1:
        return rows
    chunks = rows.split(sizes)
    return torch.cat([chunks[a * minor + b] for b in range(minor) for a in range(major)])


def dispatch(
    x_TD: Tensor, weights_TE: Tensor, plan: RoutePlan, group: dist.ProcessGroup | None = None
) -> tuple[Tensor, Tensor]:
    """Hidden states to the rows that this rank's experts compute, ordered by expert, with their weights."""
    rows, weights = permute(x_TD, weights_TE, plan)
    rows, weights = exchange(rows, plan, group), exchange(weights, plan, group)
    return group_by_expert(rows, plan), group_by_expert(weights, plan)


def combine(rows: Tensor, plan: RoutePlan, num_tokens: int, group: dist.ProcessGroup | None = None) -> Tensor:
    """The experts' weighted outputs back to [T, D], summed over each token's experts."""
    return unpermute(exchange_back(ungroup_by_expert(rows, plan), plan, group), plan, num_tokens)
