"""megatron-core's all-to-all dispatcher, exact for maps whose rows differ in length.

The stock dispatcher sizes its buffers as T * moe_router_topk and truncates or pads to that.  This one builds a
:class:`~megatron_dynmoe.routing.RoutePlan` from the map and moves the rows it names.  Everything else stays: sequence
parallelism, shared-expert overlap, the fused permutation of Transformer Engine, expert tensor parallelism.
That permutation stores a zero row where a chosen expert's weight is exactly 0 (an underflowed softmax): the output is
the same, 0 * f(x), but the gradient of that weight is 0 and not <f(x), grad> (common/triton/permutation.py:296).
The allgather dispatcher takes ragged maps as they are and is used unchanged; flex: :mod:`megatron_dynmoe.mcore.flex`.
"""

from __future__ import annotations

from functools import partial

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.moe.moe_utils import (
    get_align_size_for_quantization,
    permute,
    sort_chunks_by_idxs,
    unpermute,
)
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_dynmoe.dispatch import TRANSPORTS, Transport, choose_unit, leaves_node
from megatron_dynmoe.dispatch.align import align_rows, aligned_sizes, unalign_rows
from megatron_dynmoe.dispatch.transport import Flight
from megatron_dynmoe.mcore.tracker import RoutingTracker
from megatron_dynmoe.metrics import Traffic
from megatron_dynmoe.routing import PendingPlan
from megatron_dynmoe.units import saving_wanted, weight_bytes, wire_bytes


class VariableKAllToAllDispatcher(MoETokenDispatcher):
    """The moves of an MoE layer along one plan. Between dispatch and combine it holds the transport of this pass.

    Args:
        unit: what a row on the wire is: "expert", "rank", or "auto" to decide from each step's counts.
    """

    def __init__(
        self,
        num_local_experts: int,
        local_expert_indices: list[int],
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        *,
        unit: str = "auto",
    ) -> None:
        super().__init__(config=config, pg_collection=pg_collection)
        self.unit = unit
        # Transformer Engine's kernel; megatron-core refuses the flag where it is missing (transformer_config.py:2667).
        self._sort_chunks = partial(sort_chunks_by_idxs, fused=True) if config.moe_permute_fusion else None
        self.counts_on_device = False  # set where the experts take them from there, which spares a copy
        self.pending: PendingPlan | None = None
        self.transport: Transport | None = None
        self.row_id_map: Tensor | None = None
        self.shared_input: Tensor | None = None  # [S, B, D]: what overlapped shared experts see; the layer sets it
        self._link: str | None = None  # what joins the ranks, for "auto"; asked for in the first pass
        self.onto: Tensor | None = None  # [S, B, D]: what the next combine adds its sums to; it may be overwritten

    def begin(self, routing_map: Tensor) -> None:
        """Send the counts on their way as soon as the map exists; what follows in the router runs meanwhile."""
        self.pending = PendingPlan(
            routing_map,
            group=self.tp_ep_group,
            expert_rank=self.ep_rank,
            expert_ranks=self.ep_size,
            tensor_rank=self.tp_rank,
            tensor_ranks=self.tp_size,
        )

    def dispatch_preprocess(self, tokens: Tensor, routing_map: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Finish the plan, choose the unit, and lay the rows out for their destinations."""
        self.hidden_shape = tokens.shape
        x_TD = tokens.reshape(-1, tokens.shape[-1])
        if self.pending is None:
            self.begin(routing_map)
        plan, self.pending = self.pending.finish(), None
        unit = self.unit
        if unit == "auto":
            saving = self._saving(x_TD.device)
            unit = choose_unit(plan, width=x_TD.shape[1], itemsize=x_TD.element_size(), saving=saving)
        self.transport = TRANSPORTS[unit](
            plan, group=self.ep_group, tensor_group=self.tp_group, sort_chunks=self._sort_chunks
        )
        self._count(x_TD)
        # Transformer Engine's fused permutation knows (token, expert) rows only, and asserts at least one.
        self._fused = self.config.moe_permute_fusion and unit == "expert" and plan.rows_sent > 0
        if self.shared_experts is not None:
            # They read it on a stream of their own until get_output(), so it lives until then: when it is freed by
            # the host before, the allocator may give its memory to this stream (megatron-core leaves that to autograd).
            if self.shared_input is None:
                self.shared_input = tokens
            self.shared_experts.pre_forward_comm(self.shared_input)
        if not self._fused:
            return self.transport.pack(x_TD, probs)
        rows, weights, self.row_id_map, _, _ = permute(
            x_TD, plan.map_TE, probs=probs, num_out_tokens=plan.rows_sent, fused=True
        )
        return rows, weights

    def _saving(self, device: torch.device) -> float:
        """What (token, rank) rows must save here; ranks that gather each other's rows decide together."""
        if self._link is None:
            away = device.type == "cuda" and leaves_node(self.tp_ep_group, device)
            self._link = "host" if device.type != "cuda" else "network" if away else "node"
        return saving_wanted(self._link, fused=self.config.moe_permute_fusion)

    def _count(self, x_TD: Tensor) -> None:
        tracker = get_moe_metrics_tracker()
        if isinstance(tracker, RoutingTracker) and torch.is_grad_enabled():
            _, sent = self.transport.splits
            away = sum(sent) - sent[self.ep_rank]
            beside = weight_bytes(self.transport.unit, self.transport.plan.map_TE.shape[1] // self.ep_size)
            size = wire_bytes(width=x_TD.shape[1], itemsize=x_TD.element_size(), beside=beside)
            tracker.observe_traffic(Traffic(sum(sent), away, away * size))

    def start(self, hidden_states: Tensor, probs: Tensor) -> Flight:
        """Start the all-to-all of rows and weights; :meth:`arrive` waits for it."""
        return self.transport.start(hidden_states, probs)

    def arrive(self, flight: Flight) -> tuple[Tensor, Tensor]:
        """The rows and weights that this rank received."""
        rows, weights = flight.wait()
        return rows, weights

    def token_dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """All-to-all of rows and weights; overlapped shared experts start behind it."""
        if self.shared_experts is not None:
            self.shared_experts.wait_current_stream()
        rows, weights = self.arrive(self.start(hidden_states, probs))
        if self.shared_experts is not None:
            self.shared_experts.linear_fc1_forward_and_act(rows)
        return rows, weights

    @property
    def _multiple(self) -> int:
        """Rows of each expert's group come in multiples of this: more than 1 with FP8 and router padding on."""
        return get_align_size_for_quantization(self.config) if self.config.moe_router_padding_for_quantization else 1

    def dispatch_postprocess(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows ordered by local expert, rows per expert [L] (on the host unless ``counts_on_device``), weights."""
        rows, weights = self.transport.unpack(hidden_states, probs)
        plan = self.transport.plan
        if self.counts_on_device:
            return rows, plan.rows_L, weights
        sizes = plan.rows_per_expert_L
        if self._multiple > 1:
            rows, weights = align_rows(rows, sizes, self._multiple), align_rows(weights, sizes, self._multiple)
            sizes = aligned_sizes(sizes, self._multiple)
        return rows, torch.tensor(sizes, dtype=torch.int64), weights

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        """The experts' outputs in the order of arrival."""
        if self._multiple > 1 and not self.counts_on_device:
            hidden_states = unalign_rows(hidden_states, self.transport.plan.rows_per_expert_L, self._multiple)
        return self.transport.repack(hidden_states)

    def token_combine(self, hidden_states: Tensor) -> Tensor:
        """The reverse all-to-all; the overlapped shared experts' second GEMM is launched behind it."""
        if self.shared_experts is not None:
            self.shared_experts.wait_current_stream()
        (rows,) = self.transport.start_back(hidden_states).wait()
        if self.shared_experts is not None:
            self.shared_experts.linear_fc2_forward(rows)
            self.shared_experts.post_forward_comm()
        return rows

    def combine_postprocess(self, hidden_states: Tensor) -> Tensor:
        """Sum each token's rows to [S, B, D]; plus ``onto`` and the overlapped shared experts."""
        map_TE, width = self.transport.plan.map_TE, self.hidden_shape[-1]
        onto, self.onto = self.onto, None
        onto_TD = None if onto is None else onto.view(-1, width)
        if self._fused:
            shape = torch.Size((map_TE.shape[0], width))
            out = unpermute(hidden_states, self.row_id_map, shape, routing_map=map_TE, fused=True)
            out = out if onto_TD is None else onto_TD.add_(out)
        else:
            out = self.transport.unpack_back(hidden_states, map_TE.shape[0], onto_TD)
        self.transport = self.row_id_map = None  # their indices are as long as the rows; the graph keeps what it needs
        out = out.view(self.hidden_shape)
        if self.shared_experts is not None:
            out = out + self.shared_experts.get_output()
            self.shared_input = None
        return out
