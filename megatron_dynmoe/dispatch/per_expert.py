"""Per-expert rows: a token crosses once for each expert it visits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_dynmoe.dispatch.moves import (
    gather_over,
    gather_rows,
    put_rows,
    reduce_scatter_over,
    scatter_rows,
    take_rows,
)
from megatron_dynmoe.dispatch.transport import SortChunks, Transport
from megatron_dynmoe.routing import RoutePlan

# A chunk is a sender's rows for a local expert. Up to so many are split and concatenated, a view each; from there on an
# index costs less, a dozen small kernels for any number of them (benchmarks/host_costs.py).
FEW_CHUNKS = 64


class PerExpertTransport(Transport):
    """The unit on the wire is a (token, expert) pair: N rows leave, ready for the experts when they arrive."""

    unit = "expert"

    def pack(self, x_TD: Tensor, weights_TE: Tensor) -> tuple[Tensor, Tensor]:
        """Rows [N, D] and weights [N], ordered by expert, then token."""
        token_N, expert_N = self.plan.token_of_row_N, self.plan.expert_of_row_N
        # One flat index: the backward of two would have to sort them, in case a weight were taken twice.
        weights_N = gather_rows(weights_TE.reshape(-1), token_N * weights_TE.shape[1] + expert_N)
        return gather_rows(x_TD, token_N), weights_N

    def unpack(self, rows: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, None]:
        """Gather over the expert-tensor-parallel group, then chunks by sender become chunks by expert."""
        sizes = self.plan.gathered_splits("expert")
        if len(sizes) > 1:
            rows, weights = gather_over(rows, sizes, self.tensor_group), gather_over(weights, sizes, self.tensor_group)
        if self.sort_chunks is not None and rows.shape[0] and _mixed(self.plan):
            return *_sort(self.sort_chunks, rows, self.plan.rows_PRL.flatten(0, 1), weights), None
        return group_by_expert(rows, self.plan), group_by_expert(weights, self.plan), None

    def repack(self, rows_ND: Tensor, origin_N: Tensor | None = None) -> Tensor:
        """Back to the order of arrival; summed over the expert-tensor-parallel group."""
        if self.sort_chunks is not None and rows_ND.shape[0] and _mixed(self.plan):
            rows, _ = _sort(self.sort_chunks, rows_ND, self.plan.rows_PRL.flatten(0, 1).t(), None)
        else:
            rows = ungroup_by_expert(rows_ND, self.plan)
        sizes = self.plan.gathered_splits("expert")
        return reduce_scatter_over(rows, sizes, self.tensor_group) if len(sizes) > 1 else rows

    def unpack_back(self, rows: Tensor, num_tokens: int, onto_TD: Tensor | None = None) -> Tensor:
        """Sum the rows of each token."""
        return scatter_rows(rows, self.plan.token_of_row_N, num_tokens, onto_TD)


def _sort(sort: SortChunks, rows: Tensor, sizes_AB: Tensor, weights: Tensor | None) -> tuple[Tensor, Any]:
    """Chunks that stand A major, B minor, to B major, A minor."""
    order_AB = torch.arange(sizes_AB.numel(), device=rows.device).view(sizes_AB.shape)
    return sort(rows, sizes_AB.flatten(), order_AB.t().flatten(), weights)


def group_by_expert(rows: Tensor, plan: RoutePlan) -> Tensor:
    """Rows by sender, then local expert, to rows by local expert, then sender."""
    if not _mixed(plan):
        return rows
    if len(plan.chunks_PRL) > FEW_CHUNKS:
        return take_rows(rows, plan.arrival_index_N)
    local = len(plan.rows_per_expert_L)
    return _reorder(rows, plan.chunks_PRL, len(plan.chunks_PRL) // local, local)


def ungroup_by_expert(rows: Tensor, plan: RoutePlan) -> Tensor:
    """The reverse of :func:`group_by_expert`."""
    if not _mixed(plan):
        return rows
    if len(plan.chunks_PRL) > FEW_CHUNKS:
        return put_rows(rows, plan.arrival_index_N, rows.shape[0])
    local = len(plan.rows_per_expert_L)
    senders = len(plan.chunks_PRL) // local
    by_expert = [plan.chunks_PRL[s * local + e] for e in range(local) for s in range(senders)]
    return _reorder(rows, by_expert, local, senders)


def _reorder(rows: Tensor, sizes: list[int], major: int, minor: int) -> Tensor:
    chunks = rows.split(sizes)
    return torch.cat([chunks[a * minor + b] for b in range(minor) for a in range(major)])


def _mixed(plan: RoutePlan) -> bool:
    """Whether the two orders differ: several senders and several local experts."""
    tensor_ranks, ranks, local = plan.rows_PRL.shape
    return tensor_ranks * ranks > 1 and local > 1
