"""The way of one pass's tokens to their experts and back, as values: what one step gives, the next takes.

    sent = dispatcher.send(...)                        rows and weights leave
    rows, sizes, weights, arrived = sent.arrive()      rows by local expert
    returned = arrived.send_back(outputs)              the experts' outputs are where their tokens live
    out = returned.add(onto)                           summed over each token's rows

:class:`Way` is our dispatcher's; :class:`CopiedPass` goes through one of megatron-core's.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.transformer.moe.moe_utils import permute, unpermute
from megatron.core.transformer.moe.token_dispatcher import MoEAllGatherTokenDispatcher
from torch import Tensor

from megatron_dynmoe.dispatch import Transport
from megatron_dynmoe.dispatch.align import align_rows, aligned_sizes, unalign_rows
from megatron_dynmoe.dispatch.transport import Flight
from megatron_dynmoe.routers.routing import Routing


@dataclass(frozen=True)
class Way:
    """The moves of one pass along one plan.

    Attributes:
        transport: which moves the rows.
        shape: of the hidden states, [S, B, D].
        fused: Transformer Engine's kernel permutes the tokens.
        multiple: rows of each expert's group come in multiples of this: more than 1 with FP8 and router padding on.
        counts_on_device: the experts take their rows' counts from there, which spares a copy.
        shared: overlapped shared experts, which run on a stream of their own behind the moves, or ``None``.
    """

    transport: Transport
    shape: torch.Size
    fused: bool
    multiple: int
    counts_on_device: bool
    shared: Any

    def pack(self, hidden: Tensor, weights_TE: Tensor, shared_input: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Rows and weights in the order of their destinations, and the map of the fused permutation.

        The caller keeps ``shared_input`` until the way's end: shared experts read it on a stream of their own, and
        when the host frees it before, the allocator may give its memory to this stream.
        """
        if self.shared is not None:
            self.shared.pre_forward_comm(shared_input)
        x_TD = hidden.reshape(-1, hidden.shape[-1])
        if not self.fused:
            return *self.transport.pack(x_TD, weights_TE), None
        plan = self.transport.plan
        rows, weights, row_id_map, _, _ = permute(
            x_TD, plan.map_TE, probs=weights_TE, num_out_tokens=plan.rows_sent, fused=True
        )
        return rows, weights, row_id_map

    def start(self, rows: Tensor, weights: Tensor) -> Flight:
        """Start the all-to-all of rows and weights."""
        if self.shared is not None:
            self.shared.wait_current_stream()
        return self.transport.start(rows, weights)

    def wait(self, flight: Flight) -> tuple[Tensor, Tensor]:
        """The rows and weights that this rank received; overlapped shared experts' first GEMM is launched behind."""
        rows, weights = flight.wait()
        if self.shared is not None:
            self.shared.linear_fc1_forward_and_act(rows)
        return rows, weights

    def unpack(self, rows: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Rows by local expert, rows per expert [L] (on the host unless ``counts_on_device``), weights, origins."""
        rows, weights, origin_N = self.transport.unpack(rows, weights)
        plan = self.transport.plan
        if self.counts_on_device:
            return rows, plan.rows_L, weights, origin_N
        sizes = plan.rows_per_expert_L
        if self.multiple > 1:
            rows, weights = align_rows(rows, sizes, self.multiple), align_rows(weights, sizes, self.multiple)
            sizes = aligned_sizes(sizes, self.multiple)
        return rows, torch.tensor(sizes, dtype=torch.int64), weights, origin_N

    def repack(self, rows_ND: Tensor, origin_N: Tensor | None) -> Tensor:
        """The experts' outputs in the order of arrival."""
        if self.multiple > 1 and not self.counts_on_device:
            rows_ND = unalign_rows(rows_ND, self.transport.plan.rows_per_expert_L, self.multiple)
        return self.transport.repack(rows_ND, origin_N)

    def cross_back(self, rows: Tensor) -> Tensor:
        """The reverse all-to-all; overlapped shared experts' second GEMM is launched behind."""
        if self.shared is not None:
            self.shared.wait_current_stream()
        (rows,) = self.transport.start_back(rows).wait()
        if self.shared is not None:
            self.shared.linear_fc2_forward(rows)
            self.shared.post_forward_comm()
        return rows

    def unpack_back(self, rows: Tensor, row_id_map: Tensor | None, onto: Tensor | None = None) -> Tensor:
        """Sum each token's rows to [S, B, D], onto ``onto``, which it may overwrite; plus overlapped shared experts."""
        map_TE, width = self.transport.plan.map_TE, self.shape[-1]
        onto_TD = None if onto is None else onto.view(-1, width)
        if self.fused:
            shape = torch.Size((map_TE.shape[0], width))
            out = unpermute(rows, row_id_map, shape, routing_map=map_TE, fused=True)
            out = out if onto_TD is None else onto_TD.add_(out)
        else:
            out = self.transport.unpack_back(rows, map_TE.shape[0], onto_TD)
        out = out.view(self.shape)
        return out if self.shared is None else out + self.shared.get_output()


@dataclass(frozen=True)
class Sent:
    """Rows on their way to their experts."""

    way: Way
    flight: Flight
    row_id_map: Tensor | None

    def arrive(self) -> tuple[Tensor, Tensor, Tensor, Arrived]:
        """Rows [N, D] by local expert, rows per expert [L], weights [N], and their way back."""
        rows, sizes, weights, origin_N = self.way.unpack(*self.way.wait(self.flight))
        return rows, sizes, weights, Arrived(self.way, origin_N, self.row_id_map)


@dataclass(frozen=True)
class Arrived:
    """What the way back of rows needs that have arrived."""

    way: Way
    origin_N: Tensor | None
    row_id_map: Tensor | None

    def send_back(self, outputs_ND: Tensor) -> Returned:
        """The experts' outputs to the ranks of their tokens."""
        return Returned(self.way, self.way.cross_back(self.way.repack(outputs_ND, self.origin_N)), self.row_id_map)


@dataclass(frozen=True)
class Returned:
    """Outputs that are back where their tokens live, not yet summed."""

    way: Way
    rows: Tensor
    row_id_map: Tensor | None

    def add(self, onto: Tensor | None) -> Tensor:
        """[S, B, D]: each token's rows summed onto ``onto`` [S, B, D], which may be overwritten, or onto nothing."""
        return self.way.unpack_back(self.rows, self.row_id_map, onto)


@dataclass(frozen=True)
class CopiedPass:
    """One pass through a dispatcher of megatron-core's, which keeps what its way back needs on itself: on a copy."""

    dispatcher: Any
    rows: tuple[Tensor, ...]

    def arrive(self) -> tuple[Tensor, Tensor, Tensor, CopiedPass]:
        """As :meth:`Sent.arrive`."""
        return *self.dispatcher.dispatch_postprocess(*self.rows), replace(self, rows=())

    def send_back(self, outputs_ND: Tensor) -> CopiedPass:
        """As :meth:`Arrived.send_back`."""
        rows = self.dispatcher.token_combine(self.dispatcher.combine_preprocess(outputs_ND))
        return replace(self, rows=(rows,))

    def add(self, onto: Tensor | None) -> Tensor:
        """As :meth:`Returned.add`."""
        out = self.dispatcher.combine_postprocess(*self.rows)
        return out if onto is None else onto.add_(out)


class OneCopyAPass:
    """Mixed into dispatchers of megatron-core's: passes of one layer share nothing and leave nothing behind."""

    def begin(self, routing_map: Tensor) -> None:
        """Nothing: they count rows while they move them."""

    def copied(self) -> Any:
        """A dispatcher for one pass."""
        return copy.copy(self)

    def send(self, hidden: Tensor, routing: Routing, counts: None, *, shared_input: Tensor) -> CopiedPass:
        """Move rows and weights; arguments as those of our own dispatcher."""
        dispatcher = self.copied()
        # Overlapped shared experts are served by flex alone (megatron-core refuses them with allgather).
        overlapped = {} if dispatcher.shared_experts is None else {"shared_input": shared_input}
        rows, weights = dispatcher.dispatch_preprocess(hidden, routing.map_TE, routing.weights_TE, **overlapped)
        return CopiedPass(dispatcher, dispatcher.token_dispatch(rows, weights))


class AllGatherDispatcher(OneCopyAPass, MoEAllGatherTokenDispatcher):
    """megatron-core's, which takes ragged maps as they are."""
