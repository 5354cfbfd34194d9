"""The plan that moves exactly the rows that a routing map names.

It says what the map means for memory and the network: how many rows go to whom, how many come back.  It holds plain
Python integers, because the sizes of buffers and messages are needed on the host; building it is the one place where a
layer waits for the device.  Shapes: :mod:`megatron_dynmoe.routers.routing`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dynmoe.checks import check_division


@dataclass(frozen=True)
class RoutePlan:
    """Exact row counts of one dispatch, on the host.

    A row is a (token, expert) pair, a *pair* a (token, expert-parallel rank) pair: a token that visits three experts of
    one rank is three rows and one pair.

    Attributes:
        sent_E: rows of this rank for each expert of the model.
        received_PRL: rows that this rank computes, by the rank of the expert-tensor-parallel group that gathered them
            (P), the rank of the expert-parallel group that sent them (R), and the local expert (L).
        pairs_sent_R, pairs_received_PR: the same for pairs.
        total_rows, total_pairs: over all ranks of the group.
        tensor_rank: this rank's index in the expert-tensor-parallel group.
        map_TE: bool, the map that the plan was made of.
        visited_TR: bool, the ranks that each token visits, by that map.
        rows_PRL: int64, the same as received_PRL on the device.

    What is summed from these is computed once; nobody may change a list that is handed out.
    """

    sent_E: tuple[int, ...]
    received_PRL: tuple[tuple[tuple[int, ...], ...], ...]
    pairs_sent_R: tuple[int, ...]
    pairs_received_PR: tuple[tuple[int, ...], ...]
    total_rows: int
    total_pairs: int
    tensor_rank: int
    map_TE: Tensor
    visited_TR: Tensor
    rows_PRL: Tensor

    @classmethod
    def build(cls, map_TE: Tensor, **layout: Any) -> RoutePlan:
        """Begin and finish at once; arguments as :class:`PendingPlan`."""
        return PendingPlan(map_TE, **layout).finish()

    @cached_property
    def row_index_N2(self) -> Tensor:
        """int64 [N, 2]: (expert, token) of each row sent, ordered by expert, then token."""
        # nonzero_static takes the count that is known, so unlike nonzero it does not wait for the device.
        return torch.nonzero_static(self.map_TE.t(), size=self.rows_sent)

    @cached_property
    def pair_index_M2(self) -> Tensor:
        """int64 [M, 2]: (rank, token) of each pair sent, ordered by rank, then token."""
        return torch.nonzero_static(self.visited_TR.t(), size=sum(self.pairs_sent_R))

    @property
    def expert_of_row_N(self) -> Tensor:
        """int64 [N]: the expert of each row sent."""
        return self.row_index_N2[:, 0]

    @property
    def token_of_row_N(self) -> Tensor:
        """int64 [N]: the token of each row sent."""
        return self.row_index_N2[:, 1]

    @cached_property
    def arrival_index_N(self) -> Tensor:
        """int64 [N]: the place, in the order of arrival, of each row by local expert, then sender.

        Made on the device in a number of kernels that the number of chunks does not change.
        """
        sizes_SL = self.rows_PRL.flatten(0, 1)
        sizes_K, by_expert_K = sizes_SL.flatten(), sizes_SL.t().flatten()
        starts_K = (sizes_K.cumsum(0) - sizes_K).view_as(sizes_SL).t().flatten()
        shift_K = starts_K - (by_expert_K.cumsum(0) - by_expert_K)
        rows = sum(self.rows_per_expert_L)
        shift_N = torch.repeat_interleave(shift_K, by_expert_K, output_size=rows)
        return shift_N.add_(torch.arange(rows, device=shift_N.device))

    @cached_property
    def rows_L(self) -> Tensor:
        """int64 [L]: rows that each local expert computes, on the device: grouped GEMMs take it from there."""
        return self.rows_PRL.sum(dim=(0, 1))

    @cached_property
    def rows_sent(self) -> int:
        """N: rows of this rank's tokens, whoever computes them."""
        return sum(self.sent_E)

    def wire_splits(self, unit: str) -> tuple[list[int], list[int]]:
        """Rows on the wire, (received from, sent to) each expert-parallel rank, when ``unit`` is "expert" or "rank"."""
        if unit == "rank":
            return list(self.pairs_received_PR[self.tensor_rank]), list(self.pairs_sent_R)
        return self._row_splits

    @cached_property
    def _row_splits(self) -> tuple[list[int], list[int]]:
        ranks = len(self.pairs_sent_R)
        local = len(self.sent_E) // ranks
        sent = [sum(self.sent_E[r * local : (r + 1) * local]) for r in range(ranks)]
        return [sum(row) for row in self.received_PRL[self.tensor_rank]], sent

    def gathered_splits(self, unit: str) -> list[int]:
        """Rows that each rank of the expert-tensor-parallel group received, which the group then gathers."""
        if unit == "rank":
            return [sum(pairs) for pairs in self.pairs_received_PR]
        return self._gathered_rows_P

    @cached_property
    def _gathered_rows_P(self) -> list[int]:
        return [sum(map(sum, ranks)) for ranks in self.received_PRL]

    @cached_property
    def chunks_PRL(self) -> list[int]:
        """Rows of each arriving chunk, in order of arrival: sender major, local expert minor."""
        return [rows for ranks in self.received_PRL for row in ranks for rows in row]

    @cached_property
    def rows_per_expert_L(self) -> list[int]:
        """Rows that each local expert computes."""
        chunks = [row for ranks in self.received_PRL for row in ranks]
        return [sum(column) for column in zip(*chunks, strict=True)]


class PendingPlan:
    """A plan whose counts are on their way: begun as soon as the map exists, finished when the sizes are needed.

    One collective (an all-gather of E + R integers), started at construction; one device-to-host synchronisation, in
    :meth:`finish`.

    Args:
        map_TE: bool [T, E].
        group: all R * P ranks, expert-parallel rank major; ``None`` when there is one.
        expert_rank, expert_ranks: this rank's place in the expert-parallel group, and R.
        tensor_rank, tensor_ranks: its place in the expert-tensor-parallel group, and P.

    Raises:
        ValueError: the map is not a boolean matrix.
        ConfigError: E does not divide by R.
    """

    def __init__(
        self,
        map_TE: Tensor,
        *,
        group: dist.ProcessGroup | None = None,
        expert_rank: int = 0,
        expert_ranks: int = 1,
        tensor_rank: int = 0,
        tensor_ranks: int = 1,
    ) -> None:
        if map_TE.dtype != torch.bool or map_TE.dim() != 2:
            raise ValueError(f"routing map is {map_TE.dtype} of {map_TE.dim()} dimensions; accepted: bool [T, E].")
        check_division(map_TE.shape[1], expert_ranks)
        self.map_TE = map_TE.contiguous()
        self.expert_rank, self.tensor_rank = expert_rank, tensor_rank
        self.shape = expert_ranks, tensor_ranks
        rows_E = map_TE.sum(dim=0, dtype=torch.int64)
        self.visited_TR = self.map_TE.unflatten(1, (expert_ranks, -1)).any(dim=-1)
        pairs_R = self.visited_TR.sum(dim=0, dtype=torch.int64)
        self._mine = torch.cat([rows_E, pairs_R])
        self._work = None
        self._all = self._mine.unsqueeze(0)
        if expert_ranks * tensor_ranks > 1:
            self._all = self._mine.new_empty(expert_ranks * tensor_ranks, self._mine.numel())
            self._work = dist.all_gather_into_tensor(self._all.view(-1), self._mine, group=group, async_op=True)

    def finish(self) -> RoutePlan:
        """Wait for the counts and bring what the host needs over in one copy."""
        if self._work is not None:
            self._work.wait()
        (ranks, tensor_ranks), experts = self.shape, self.map_TE.shape[1]
        local, first = experts // ranks, self.expert_rank * (experts // ranks)
        counts = self._all.view(ranks, tensor_ranks, experts + ranks).transpose(0, 1)
        rows_PRL = counts[:, :, first : first + local]
        pairs_PR = counts[:, :, experts + self.expert_rank]
        totals = torch.stack([counts[:, :, :experts].sum(), counts[:, :, experts:].sum()])
        # The one synchronisation: everything the host needs, in one copy.
        host = iter(torch.cat([self._mine, rows_PRL.reshape(-1), pairs_PR.reshape(-1), totals]).tolist())

        def take(count: int) -> tuple[int, ...]:
            return tuple(islice(host, count))

        return RoutePlan(
            sent_E=take(experts),
            pairs_sent_R=take(ranks),
            received_PRL=tuple(tuple(take(local) for _ in range(ranks)) for _ in range(tensor_ranks)),
            pairs_received_PR=tuple(take(ranks) for _ in range(tensor_ranks)),
            total_rows=next(host),
            total_pairs=next(host),
            tensor_rank=self.tensor_rank,
            map_TE=self.map_TE,
            visited_TR=self.visited_TR,
            rows_PRL=rows_PRL,
        )
