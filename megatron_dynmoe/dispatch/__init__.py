"""Move exactly the routed rows: from token order to expert order, across ranks, and back.

    pack        token order -> rows in the order of their destinations     (gather; its backward is a scatter-add)
    start/wait  the uneven all-to-all; what needs no communication runs between the two
    unpack      rows as they arrived -> rows by local expert
    repack, start_back/wait, unpack_back: the same plan, backwards

What one row on the wire is, is the transport's choice: a (token, expert) pair (:mod:`per_expert`) or a (token, rank)
pair (:mod:`per_rank`).  Nothing is padded and nothing dropped: every size comes from the
:class:`~megatron_dynmoe.routing.RoutePlan`.  Sums over a token's rows, forward and backward, are float32.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from megatron_dynmoe.dispatch.choose import choose_unit, leaves_node
from megatron_dynmoe.dispatch.per_expert import PerExpertTransport
from megatron_dynmoe.dispatch.per_rank import PerRankTransport
from megatron_dynmoe.dispatch.transport import Transport
from megatron_dynmoe.routing import RoutePlan

TRANSPORTS: dict[str, type[Transport]] = {"expert": PerExpertTransport, "rank": PerRankTransport}

__all__ = ["TRANSPORTS", "Transport", "choose_unit", "combine", "dispatch", "leaves_node"]


def dispatch(
    x_TD: Tensor,
    weights_TE: Tensor,
    plan: RoutePlan,
    group: dist.ProcessGroup | None = None,
    *,
    unit: str = "expert",
) -> tuple[Tensor, Tensor, Transport]:
    """Hidden states to the rows that this rank's experts compute.

    Args:
        x_TD: hidden states.
        weights_TE: float32 weights.
        plan: of the map that goes with the weights.
        group: the expert-parallel group, or ``None`` for one rank.
        unit: "expert" or "rank".

    Returns:
        rows [N, D] ordered by local expert, their weights [N], and the transport that :func:`combine` takes.
    """
    transport = TRANSPORTS[unit](plan, group=group)
    rows, weights = transport.start(*transport.pack(x_TD, weights_TE)).wait()
    return *transport.unpack(rows, weights), transport


def combine(rows_ND: Tensor, transport: Transport, num_tokens: int, onto_TD: Tensor | None = None) -> Tensor:
    """The experts' weighted outputs back to [T, D], summed over each token's experts.

    Args:
        onto_TD: the output of experts that needed no row, which the sums are added to; it may be overwritten.
    """
    (rows,) = transport.start_back(transport.repack(rows_ND)).wait()
    return transport.unpack_back(rows, num_tokens, onto_TD)
