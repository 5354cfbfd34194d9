"""What a transport does, whatever its unit on the wire."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor

from megatron_dynmoe.dispatch.moves import Exchange
from megatron_dynmoe.routing import RoutePlan

SortChunks = Callable[[Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Any]]


@dataclass(frozen=True)
class Flight:
    """Tensors on their way to other ranks."""

    exchanges: tuple[Exchange, ...]

    def wait(self) -> tuple[Tensor, ...]:
        """The tensors that arrived."""
        return tuple(exchange.wait() for exchange in self.exchanges)


class Transport(ABC):
    """The moves of one dispatch and its combine along one plan; what one gives, the next takes, nothing is kept.

    Args:
        plan: the counts.
        group: the expert-parallel group; ``None`` or one rank: nothing crosses.
        tensor_group: the expert-tensor-parallel group, whose ranks gather each other's rows and sum their outputs.
        sort_chunks: puts chunks of per-expert rows into another order, with their weights, in place of torch's own
            operations: (rows, sizes of the chunks, the chunks in their new order, weights or ``None``), as
            megatron-core's ``sort_chunks_by_idxs`` (moe_utils.py:572). It is not called without rows.
    """

    unit: str

    def __init__(
        self,
        plan: RoutePlan,
        *,
        group: dist.ProcessGroup | None = None,
        tensor_group: dist.ProcessGroup | None = None,
        sort_chunks: SortChunks | None = None,
    ) -> None:
        self.plan, self.group, self.tensor_group, self.sort_chunks = plan, group, tensor_group, sort_chunks

    @property
    def splits(self) -> tuple[list[int], list[int]]:
        """Rows on the wire: (received from, sent to) each expert-parallel rank."""
        return self.plan.wire_splits(self.unit)

    @abstractmethod
    def pack(self, x_TD: Tensor, weights_TE: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states to rows [M, D] in the order of their destinations, and the weights that go with them."""

    def start(self, rows: Tensor, weights: Tensor) -> Flight:
        """Send rows and weights on their way."""
        received, sent = self.splits
        return Flight(tuple(Exchange(tensor, received, sent, self.group) for tensor in (rows, weights)))

    @abstractmethod
    def unpack(self, rows: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """What arrived to rows by local expert, and what :meth:`repack` needs of them.

        Returns:
            rows [N, D] ordered by local expert; their weights [N]; int64 [N], the arrived row that each is a copy of,
            or ``None`` where the plan says it.
        """

    @abstractmethod
    def repack(self, rows_ND: Tensor, origin_N: Tensor | None) -> Tensor:
        """The experts' outputs to rows [M, D] in the order of arrival; ``origin_N`` as :meth:`unpack` gave it."""

    def start_back(self, rows: Tensor) -> Flight:
        """Send outputs back to where their tokens live."""
        received, sent = self.splits
        return Flight((Exchange(rows, sent, received, self.group),))

    @abstractmethod
    def unpack_back(self, rows: Tensor, num_tokens: int, onto_TD: Tensor | None = None) -> Tensor:
        """Sum the rows of each token: [M, D] to [T, D]; a token without rows gets 0.

        Args:
            onto_TD: what the sums are added to, in the dtype of the rows; it may be overwritten.
        """
