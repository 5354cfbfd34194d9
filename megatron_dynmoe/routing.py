"""A routing decision, and the plan that moves exactly the rows it names.

Shape legend, used as name suffixes everywhere:
    T tokens on this rank      D model width          F expert width        E FFN experts (all ranks)
    L experts on this rank     R ranks of the expert-parallel group         P ranks of the expert-tensor-parallel group
    N routed rows: one row is one (token, expert) pair

Two small records.  :class:`Routing` says which experts each token visits, and with what weight.  :class:`RoutePlan`
says what that means for memory and the network: how many rows go to whom, how many come back.  The plan holds plain
Python integers, because the sizes of buffers and messages are needed on the host; building it is the one place where
a layer waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Routing:
    """Which experts each token visits.

    Attributes:
        weights_TE: float32; the weight of each chosen expert's output, 0 where not chosen.
        map_TE: bool; True where the token visits the expert. Rows may have any number of True entries.
        scores_TE: float32; the gate's scores over all experts, which the losses read.
        logits_TE: float32; the gate's output before its nonlinearity.
    """

    weights_TE: Tensor
    map_TE: Tensor
    scores_TE: Tensor
    logits_TE: Tensor


@dataclass(frozen=True)
class RoutePlan:
    """Exact row counts of one dispatch, on the host.

    Attributes:
        sent_E: rows of this rank for each expert of the model.
        received_PRL: rows that this rank computes, by the rank of the expert-tensor-parallel group that gathered them
            (P), the rank of the expert-parallel group that sent them (R), and the local expert (L).
        tensor_rank: this rank's index in the expert-tensor-parallel group.
        row_index_N2: int64 [N, 2] on the device: (expert, token) of each row sent, ordered by expert, then token.
    """

    sent_E: tuple[int, ...]
    received_PRL: tuple[tuple[tuple[int, ...], ...], ...]
    tensor_rank: int
    row_index_N2: Tensor

    @classmethod
    def build(
        cls,
        map_TE: Tensor,
        *,
        group: dist.ProcessGroup | None = None,
        expert_rank: int = 0,
        expert_ranks: int = 1,
        tensor_rank: int = 0,
        tensor_ranks: int = 1,
    ) -> RoutePlan:
        """Count the rows of ``map_TE`` and exchange the counts.

        One collective (an all-gather of E integers) and one device-to-host synchronisation.

        Args:
            map_TE: bool [T, E].
            group: all R * P ranks, expert-parallel rank major; ``None`` when there is one.
            expert_rank, expert_ranks: this rank's place in the expert-parallel group, and R.
            tensor_rank, tensor_ranks: its place in the expert-tensor-parallel group, and P.

        Raises:
            ValueError: the map is not a boolean matrix, or E does not divide by R.
        """
        if map_TE.dtype != torch.bool or map_TE.dim() != 2:
            raise ValueError(f"routing map is {map_TE.dtype} of {map_TE.dim()} dimensions; accepted: bool [T, E].")
        experts = map_TE.shape[1]
        if experts % expert_ranks:
            raise ValueError(
                f"{experts} experts do not divide by the {expert_ranks} ranks of the expert-parallel group."
            )
        local = experts // expert_ranks
        sent = map_TE.sum(dim=0, dtype=torch.int64)
        if expert_ranks * tensor_ranks > 1:
            counts = sent.new_empty(expert_ranks * tensor_ranks * experts)
            dist.all_gather_into_tensor(counts, sent, group=group)
        else:
            counts = sent
        first = expert_rank * local
        received = counts.view(expert_ranks, tensor_ranks, experts)[:, :, first : first + local].transpose(0, 1)
        # The one synchronisation: everything the host needs, in one copy.
        host = torch.cat([sent, received.reshape(-1)]).tolist()
        sent_E, flat = tuple(host[:experts]), iter(host[experts:])
        received_PRL = tuple(
            tuple(tuple(next(flat) for _ in range(local)) for _ in range(expert_ranks)) for _ in range(tensor_ranks)
        )
        # nonzero_static takes the count that is now known, so unlike nonzero it does not wait for the device again.
        row_index_N2 = torch.nonzero_static(map_TE.t(), size=sum(sent_E))
        return cls(sent_E=sent_E, received_PRL=received_PRL, tensor_rank=tensor_rank, row_index_N2=row_index_N2)

    @property
    def expert_of_row_N(self) -> Tensor:
        """int64 [N]: the expert of each row sent."""
        return self.row_index_N2[:, 0]

    @property
    def token_of_row_N(self) -> Tensor:
        """int64 [N]: the token of each row sent."""
        return self.row_index_N2[:, 1]

    @property
    def rows_sent(self) -> int:
        """N: rows of this rank's tokens, whoever computes them."""
        return sum(self.sent_E)

    @property
    def input_splits_R(self) -> list[int]:
        """Rows that this rank sends to each expert-parallel rank."""
        ranks = len(self.received_PRL[0])
        local = len(self.sent_E) // ranks
        return [sum(self.sent_E[r * local : (r + 1) * local]) for r in range(ranks)]

    @property
    def output_splits_R(self) -> list[int]:
        """Rows that this rank receives from each expert-parallel rank (before any tensor-parallel gather)."""
        return [sum(row) for row in self.received_PRL[self.tensor_rank]]

    @property
    def gathered_splits_P(self) -> list[int]:
        """Rows that each rank of the expert-tensor-parallel group received, which the group then gathers."""
        return [sum(sum(row) for row in ranks) for ranks in self.received_PRL]

    @property
    def rows_per_expert_L(self) -> list[int]:
        """Rows that each local expert computes."""
        chunks = [row for ranks in self.received_PRL for row in ranks]
        return [sum(column) for column in zip(*chunks, strict=True)]

    @property
    def chunks_PRL(self) -> list[int]:
        """Rows of each arriving chunk, in order of arrival: sender major, local expert minor."""
        return [rows for ranks in self.received_PRL for row in ranks for rows in row]
