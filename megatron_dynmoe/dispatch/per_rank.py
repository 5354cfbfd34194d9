"""Per-rank rows: a token crosses to a rank once, however many of that rank's experts it visits.

With the row go its weights for all of that rank's experts; the receiver copies it to each of them, computes, sums the
outputs in float32 and sends one row back.  The fewer ranks and the more experts a token visits, the more is saved.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_dynmoe.dispatch.moves import gather_over, gather_rows, reduce_scatter_over, scatter_rows
from megatron_dynmoe.dispatch.transport import Transport


class PerRankTransport(Transport):
    """The unit on the wire is a (token, rank) pair: M rows leave, M the number of distinct pairs, and M come back."""

    unit = "rank"

    def pack(self, x_TD: Tensor, weights_TE: Tensor) -> tuple[Tensor, Tensor]:
        """Rows [M, D] ordered by rank, then token, and the weights [M, L] for the rank's experts.

        A weight of -inf says that the expert was not chosen: no rule gives a chosen expert that weight, and a NaN,
        which must reach the loss, stays a NaN.
        """
        rank_M, token_M = self.plan.pair_index_M2.unbind(dim=1)
        weights_TE = weights_TE.masked_fill(~self.plan.map_TE, -torch.inf)
        tokens, experts = weights_TE.shape
        ranks = len(self.plan.pairs_sent_R)
        weights_ML = gather_rows(weights_TE.view(tokens * ranks, experts // ranks), token_M * ranks + rank_M)
        return gather_rows(x_TD, token_M), weights_ML

    def unpack(self, rows: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Copy each row to the local experts it visits: rows [N, D] by expert, then sender and token."""
        sizes = self.plan.gathered_splits("rank")
        if len(sizes) > 1:
            rows, weights = gather_over(rows, sizes, self.tensor_group), gather_over(weights, sizes, self.tensor_group)
        chosen_ML = weights.detach() != -torch.inf
        index_N2 = torch.nonzero_static(chosen_ML.t(), size=sum(self.plan.rows_per_expert_L))
        expert_N, origin_N = index_N2.unbind(dim=1)
        weights_N = gather_rows(weights.reshape(-1), origin_N * weights.shape[1] + expert_N)
        return gather_rows(rows, origin_N), weights_N, origin_N

    def repack(self, rows_ND: Tensor, origin_N: Tensor | None) -> Tensor:
        """Sum the outputs of the local experts for each row that arrived, in float32."""
        assert origin_N is not None, "rows that were copied go back to where unpack() took them from"
        sizes = self.plan.gathered_splits("rank")
        rows = scatter_rows(rows_ND, origin_N, sum(sizes))
        return reduce_scatter_over(rows, sizes, self.tensor_group) if len(sizes) > 1 else rows

    def unpack_back(self, rows: Tensor, num_tokens: int, onto_TD: Tensor | None = None) -> Tensor:
        """Sum the rows of each token, one from each rank it visited."""
        return scatter_rows(rows, self.plan.pair_index_M2[:, 1], num_tokens, onto_TD)
