"""megatron-core's flex dispatcher for maps whose rows differ in length: DeepEP or HybridEP moves the rows.

megatron-core's code stays: one group of all tensor- and expert-parallel ranks, to each of which a token crosses once.
What is added is what ragged rows need.

DeepEP takes choices, not a map: [T, K] indices and weights.  The stock manager asks for the K largest weights, with a
fixed K.  Here K is the most experts that a token can visit, and a place that a token does not fill is -1, which the
kernels pass over (DeepEP, buffers/legacy.py: "-1 means no selections").

HybridEP takes the map as it is.  Its kernels read tensors by their address, so what reaches them is made contiguous:
the gradient of a layer with a gating residual is a slice of a wider tensor.  And they need the same number of tokens on
every rank, which the first layer of a model looks at in each pass.

Counts of rows stay on the device: beside that look nothing here waits for it but the libraries themselves.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe import fused_a2a
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.moe.moe_utils import get_align_size_for_quantization
from megatron.core.transformer.moe.token_dispatcher import MoEFlexTokenDispatcher, _DeepepManager, _HybridEPManager
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_dynmoe.checks import refuse
from megatron_dynmoe.config import DynMoEConfig
from megatron_dynmoe.dispatch.align import align_rows, aligned_sizes, unalign_rows
from megatron_dynmoe.mcore.flex_checks import NEITHER, check_layout, check_tokens, most_experts, ranks_per_node
from megatron_dynmoe.mcore.tracker import RoutingTracker
from megatron_dynmoe.metrics import Traffic
from megatron_dynmoe.units import weight_bytes, wire_bytes


class FlexDispatcher(MoEFlexTokenDispatcher):
    """megatron-core's flex dispatcher over the managers of this file.

    Raises:
        ConfigError: ranks or experts that the library cannot serve; see :mod:`megatron_dynmoe.mcore.flex_checks`.
    """

    def __init__(
        self,
        num_local_experts: int,
        local_expert_indices: list[int],
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        *,
        dynmoe: DynMoEConfig,
    ) -> None:
        super().__init__(num_local_experts, local_expert_indices, config=config, pg_collection=pg_collection)
        self.shared_input: Tensor | None = None  # [S, B, D]: what overlapped shared experts see; the layer sets it
        self._watches = False  # whether this dispatcher compares the ranks' numbers of tokens
        layout: dict[str, Any] = {
            "group": self.tp_ep_group,
            "num_local_experts": num_local_experts,
            "num_experts": self.tp_size * config.num_moe_experts,
            "config": config,
        }
        self._comm_manager: DeepEPManager | HybridEPManager
        if config.moe_flex_dispatcher_backend == "deepep":
            self.most = most_experts(dynmoe, config.num_moe_experts)
            self._comm_manager = DeepEPManager(router_topk=self.tp_size * self.most, **layout)
            self._beside = 12 * self._comm_manager.router_topk  # an index and a weight for each choice
        else:
            check_layout(self.tp_ep_group, config)
            self._watches = _is_first(self)
            self.most = config.num_moe_experts
            self._comm_manager = HybridEPManager(**layout)
            self._beside = weight_bytes("rank", num_local_experts) * ranks_per_node(self.tp_ep_group)

    def dispatch_preprocess(self, hidden_states: Tensor, routing_map: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Look at the number of tokens, count the rows, and hand map and weights to the library's manager."""
        if self._watches:
            check_tokens(routing_map.shape[0], self.tp_ep_group, self.config, routing_map.device)
        if self.most < routing_map.shape[1]:  # a router of the user's own need not hold the bound
            fits = (routing_map.sum(dim=1) <= self.most).all()
            torch._assert_async(fits, f"a token visits more than the {self.most} experts that DeepEP was prepared for")
        self._count(hidden_states, routing_map)
        return super().dispatch_preprocess(hidden_states, routing_map, probs)

    def _count(self, hidden_states: Tensor, map_TE: Tensor) -> None:
        """Count (token, rank) pairs, which is what crosses; the libraries may forward them between nodes as one."""
        tracker = get_moe_metrics_tracker()
        if isinstance(tracker, RoutingTracker) and torch.is_grad_enabled():
            pairs_R = map_TE.view(len(map_TE), self.ep_size, -1).any(dim=-1).sum(dim=0)
            rows = pairs_R.sum() * self.tp_size
            away = rows - pairs_R[self.ep_rank]
            width, itemsize = hidden_states.shape[-1], hidden_states.element_size()
            size = wire_bytes(width=width, itemsize=itemsize, beside=self._beside)
            tracker.observe_traffic(Traffic(rows, away, away * size))

    def token_dispatch(
        self,
        hidden_states: Tensor,
        probs: Tensor | None = None,
        async_finish: bool = True,
        allocate_on_comm_stream: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """megatron-core's; overlapped shared experts see ``shared_input``, which lives until they are done."""
        if self.shared_experts is None:
            return super().token_dispatch(hidden_states, probs, async_finish, allocate_on_comm_stream)
        self.shared_experts.wait_current_stream()
        rows = self._comm_manager.dispatch(hidden_states, async_finish, allocate_on_comm_stream)
        self.shared_input = (hidden_states if self.shared_input is None else self.shared_input).view_as(hidden_states)
        self.shared_experts.pre_forward_comm(self.shared_input, wait_current_stream=False)
        self.shared_experts.linear_fc1_forward_and_act(rows)
        return rows, self._comm_manager.dispatched_probs

    def combine_postprocess(self, hidden_states: Tensor) -> Tensor:
        """megatron-core's: [T, D] to [S, B, D], plus the overlapped shared experts."""
        out = super().combine_postprocess(hidden_states)
        self.shared_input = None
        return out


# Of each model and group, the dispatcher that was built first: layers of one model see the same number of tokens.
_FIRST: dict[tuple[int, int], weakref.ref[FlexDispatcher]] = {}


def _is_first(dispatcher: FlexDispatcher) -> bool:
    key = id(dispatcher.config), id(dispatcher.tp_ep_group)
    known = _FIRST.get(key)
    if known is not None and known() is not None:
        return False
    _FIRST[key] = weakref.ref(dispatcher)
    return True


class DeepEPManager(_DeepepManager):
    """megatron-core's manager of DeepEP with up to ``router_topk`` choices a token, and none too.

    Raises:
        ConfigError: DeepEP has no configuration for the number of ranks.
    """

    tokens_per_expert: Tensor  # [L] int64, on the host

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        ranks = self.group.size()
        try:
            fused_a2a.Buffer.get_dispatch_config(ranks)
        except AssertionError as error:
            reason = f"DeepEP is tuned for some numbers of ranks and {ranks}, tensor times expert, is none ({error})"
            refuse("expert_model_parallel_size", self.config.expert_model_parallel_size, reason, NEITHER)
        self._unaligned: list[int] | None = None

    def setup_metadata(self, routing_map: Tensor, probs: Tensor) -> None:
        """Choices [T, K] of the map: the chosen experts by falling weight, then -1, which weighs 0.

        Args:
            routing_map: bool [T, ranks, L]; probs: float32, the same shape, 0 where not chosen.
        """
        tokens = routing_map.shape[0]
        map_TE = routing_map.reshape(tokens, self.num_experts)
        weights_TE = probs.reshape(tokens, self.num_experts).masked_fill(~map_TE, -torch.inf)
        weights_TK, indices_TK = weights_TE.topk(self.router_topk, dim=-1)
        none_TK = weights_TK == -torch.inf
        self.token_probs = weights_TK.masked_fill(none_TK, 0.0)
        self.token_indices = indices_TK.masked_fill(none_TK, -1)

    def _pad_routing_map(self, routing_map: Tensor, tokens_per_expert: Tensor) -> tuple[Tensor, Tensor]:
        """Left as it is: rows are aligned after they are permuted, for which few tokens are enough."""
        return routing_map, tokens_per_expert

    def get_permuted_hidden_states_by_experts(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """What arrived to rows by local expert and their weights; aligned for FP8 where the configuration says so."""
        # Transformer Engine's fused permutation asserts at least one row.
        self.permute_fusion = self.config.moe_permute_fusion and hidden_states.shape[0] > 0
        rows, weights = super().get_permuted_hidden_states_by_experts(hidden_states)
        self._unaligned = None
        if self.config.moe_router_padding_for_quantization:
            sizes, multiple = self.tokens_per_expert.tolist(), get_align_size_for_quantization(self.config)
            self._unaligned = sizes
            rows, weights = align_rows(rows, sizes, multiple), align_rows(weights, sizes, multiple)
            self.tokens_per_expert = torch.tensor(aligned_sizes(sizes, multiple), dtype=torch.int64)
        return rows, weights

    def get_restored_hidden_states_by_experts(self, hidden_states: Tensor) -> Tensor:
        """The experts' outputs to the order of arrival, summed over the experts that a token visits here."""
        if self._unaligned is not None:
            multiple = get_align_size_for_quantization(self.config)
            hidden_states = unalign_rows(hidden_states, self._unaligned, multiple)
        return super().get_restored_hidden_states_by_experts(hidden_states)


class HybridEPManager(_HybridEPManager):
    """megatron-core's manager of HybridEP; tensors and gradients reach the kernels contiguous."""

    def dispatch(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Hidden states [T, D] to rows by local expert."""
        rows = super().dispatch(hidden_states.contiguous(), *args, **kwargs)
        _contiguous_gradient(rows)
        _contiguous_gradient(self.dispatched_probs)
        return rows

    def combine(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The experts' outputs back to [T, D]."""
        out = super().combine(hidden_states.contiguous(), *args, **kwargs)
        _contiguous_gradient(out)
        return out


def _contiguous_gradient(tensor: Tensor) -> None:
    if tensor.requires_grad:
        tensor.register_hook(Tensor.contiguous)
