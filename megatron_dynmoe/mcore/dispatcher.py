"""megatron-core's all-to-all dispatcher, exact for maps whose rows differ in length.

The stock dispatcher sizes its buffers as T * moe_router_topk and truncates or pads to that.  This one builds a
:class:`~megatron_dynmoe.routing.RoutePlan` from the map and moves the rows it names.  Everything else stays: sequence
parallelism, shared-expert overlap, the fused permutation of Transformer Engine, expert tensor parallelism.
That permutation stores a zero row where a chosen expert's weight is exactly 0 (an underflowed softmax): the output is
the same, 0 * f(x), but the gradient of that weight is 0 and not <f(x), grad> (common/triton/permutation.py:296).
"""

from __future__ import annotations

from functools import partial
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.moe.moe_utils import get_align_size_for_quantization, sort_chunks_by_idxs
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_dynmoe.dispatch import TRANSPORTS, Transport, choose_unit, leaves_node
from megatron_dynmoe.mcore.hooks import DispatcherHooks
from megatron_dynmoe.mcore.tracker import RoutingTracker
from megatron_dynmoe.mcore.way import Sent, Way
from megatron_dynmoe.metrics import Traffic
from megatron_dynmoe.routers.routing import Routing
from megatron_dynmoe.routing import PendingPlan
from megatron_dynmoe.units import saving_wanted, weight_bytes, wire_bytes

# What joins the ranks of a group, for "auto"; asked for in the first pass, because all ranks have to.
_LINKS: WeakKeyDictionary[dist.ProcessGroup, str] = WeakKeyDictionary()


class VariableKAllToAllDispatcher(DispatcherHooks):
    """Begins the plan of a pass and sends its rows along it; nothing of a pass is kept here.

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

    def begin(self, routing_map: Tensor) -> PendingPlan:
        """Send the counts on their way, which is possible as soon as the map exists: bool [T, E]."""
        return PendingPlan(
            routing_map,
            group=self.tp_ep_group,
            expert_rank=self.ep_rank,
            expert_ranks=self.ep_size,
            tensor_rank=self.tp_rank,
            tensor_ranks=self.tp_size,
        )

    def send(self, hidden: Tensor, routing: Routing, counts: PendingPlan, *, shared_input: Tensor) -> Sent:
        """Rows of the experts' input to the ranks of the experts.

        Args:
            hidden: [S, B, D].
            routing: its weights go with the rows.
            counts: of the routing's map, as :meth:`begin` gives them.
            shared_input: [S, B, D], what overlapped shared experts see; the caller keeps it until the way's end.
        """
        way = self.way(hidden, counts)
        rows, weights, row_id_map = way.pack(hidden, routing.weights_TE, shared_input)
        return Sent(way, way.start(rows, weights), row_id_map)

    def way(self, hidden: Tensor, counts: PendingPlan) -> Way:
        """Wait for the counts, and choose the unit on the wire."""
        plan, width, itemsize = counts.finish(), hidden.shape[-1], hidden.element_size()
        unit = self.unit
        if unit == "auto":
            unit = choose_unit(plan, width=width, itemsize=itemsize, saving=self._saving(hidden.device))
        transport = TRANSPORTS[unit](
            plan, group=self.ep_group, tensor_group=self.tp_group, sort_chunks=self._sort_chunks
        )
        self._count(transport, width, itemsize)
        padded = self.config.moe_router_padding_for_quantization
        return Way(
            transport=transport,
            shape=hidden.shape,
            # Transformer Engine's fused permutation knows (token, expert) rows only, and asserts at least one.
            fused=self.config.moe_permute_fusion and unit == "expert" and plan.rows_sent > 0,
            multiple=get_align_size_for_quantization(self.config) if padded else 1,
            counts_on_device=self.counts_on_device,
            shared=self.shared_experts,
        )

    def _saving(self, device: torch.device) -> float:
        """What (token, rank) rows must save here; ranks that gather each other's rows decide together."""
        fused = self.config.moe_permute_fusion
        if device.type != "cuda":
            return saving_wanted("host", fused=fused)
        if self.tp_ep_group not in _LINKS:
            _LINKS[self.tp_ep_group] = "network" if leaves_node(self.tp_ep_group, device) else "node"
        return saving_wanted(_LINKS[self.tp_ep_group], fused=fused)

    def _count(self, transport: Transport, width: int, itemsize: int) -> None:
        tracker = get_moe_metrics_tracker()
        if isinstance(tracker, RoutingTracker) and torch.is_grad_enabled():
            _, sent = transport.splits
            away = sum(sent) - sent[self.ep_rank]
            beside = weight_bytes(transport.unit, transport.plan.map_TE.shape[1] // self.ep_size)
            size = wire_bytes(width=width, itemsize=itemsize, beside=beside)
            tracker.observe_traffic(Traffic(sum(sent), away, away * size))
