"""Rows and bytes between the ranks of an expert-parallel group.

One function counts for the planner and for the proof: given the rows that a rank really sent, it returns what the
runtime counted (``metrics.Traffic``), integer for integer; given expected rows, it returns expectations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_dynmoe.units import weight_bytes, wire_bytes


@dataclass(frozen=True)
class Wire:
    """What one rank exchanges with the ranks of its group in one dispatch and its combine.

    Attributes:
        rows: rows handed to the all-to-all, those that stay on the rank included.
        nvlink_rows, network_rows: rows whose other end is another rank of this node, or of another node.
        nvlink_bytes, network_bytes: their bytes: rows out and back, and the weights that go out with them.
    """

    rows: float = 0
    nvlink_rows: float = 0
    network_rows: float = 0
    nvlink_bytes: float = 0
    network_bytes: float = 0

    @property
    def crossing_rows(self) -> float:
        """Rows that leave the rank."""
        return self.nvlink_rows + self.network_rows

    @property
    def crossing_bytes(self) -> float:
        """Bytes that leave the rank or come back to it for these rows."""
        return self.nvlink_bytes + self.network_bytes

    def __add__(self, other: Wire) -> Wire:
        return Wire(
            self.rows + other.rows,
            self.nvlink_rows + other.nvlink_rows,
            self.network_rows + other.network_rows,
            self.nvlink_bytes + other.nvlink_bytes,
            self.network_bytes + other.network_bytes,
        )

    def __mul__(self, times: float) -> Wire:
        return Wire(
            self.rows * times,
            self.nvlink_rows * times,
            self.network_rows * times,
            self.nvlink_bytes * times,
            self.network_bytes * times,
        )


def rows_by_rank(rows_E: Sequence[float], ranks: int) -> list[float]:
    """Rows for each expert to rows for each rank; experts are dealt to ranks in equal blocks, in order."""
    local = len(rows_E) // ranks
    return [sum(rows_E[rank * local : (rank + 1) * local]) for rank in range(ranks)]


def wire(
    rows_R: Sequence[float],
    *,
    rank: int,
    unit: str,
    width: int,
    itemsize: int,
    local_experts: int,
    node_of_rank: Sequence[int] | None = None,
) -> Wire:
    """What ``rank`` exchanges for the rows it has to do with.

    Args:
        rows_R: rows between ``rank`` and each rank of its group, itself included: a row is a (token, expert) pair for
            unit "expert" and a (token, rank) pair for unit "rank". Whether ``rank`` is the sender or the receiver makes
            no difference to the count.
        rank: in the group.
        unit: "expert" or "rank".
        width, itemsize: D, and bytes of one element of the hidden states.
        local_experts: experts of one rank.
        node_of_rank: node of each rank of the group; default: one node.
    """
    nodes = node_of_rank or [0] * len(rows_R)
    same_node = sum(rows for peer, rows in enumerate(rows_R) if peer != rank and nodes[peer] == nodes[rank])
    elsewhere = sum(rows for peer, rows in enumerate(rows_R) if nodes[peer] != nodes[rank])
    size = wire_bytes(width=width, itemsize=itemsize, beside=weight_bytes(unit, local_experts))
    return priced(sum(rows_R), same_node, elsewhere, size)


def priced(rows: float, nvlink_rows: float, network_rows: float, size: int) -> Wire:
    """Rows by link with their bytes; ``size`` is that of one row, both ways."""
    return Wire(rows, nvlink_rows, network_rows, nvlink_rows * size, network_rows * size)
