"""megatron-core's all-to-all dispatcher, exact for maps whose rows differ in length.

The stock dispatcher sizes its buffers as T * moe_router_topk and truncates or pads to that.  This one builds a
:class:`~megatron_dynmoe.routing.RoutePlan` from the map and moves the rows it names.  Everything else stays: sequence
parallelism, shared-expert overlap, the fused permutation of Transformer Engine, expert tensor parallelism.
The allgather and flex/HybridEP dispatchers take ragged maps as they are and are used unchanged.
"""

from __future__ import annotations

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_utils import (
    get_align_size_for_quantization,
    pad_routing_map,
    permute,
    unpermute,
)
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_dynmoe import dispatch as moves
from megatron_dynmoe.routing import RoutePlan


class VariableKAllToAllDispatcher(MoETokenDispatcher):
    """The moves of an MoE layer along one plan. Between dispatch and combine it holds the plan of this pass."""

    def __init__(
        self,
        num_local_experts: int,
        local_expert_indices: list[int],
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        super().__init__(config=config, pg_collection=pg_collection)
        self.plan: RoutePlan | None = None
        self.map_TE: Tensor | None = None

    def dispatch_preprocess(self, tokens: Tensor, routing_map: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Plan, then copy each token once per expert: [S, B, D] to rows [N, D] and their weights [N]."""
        self.hidden_shape = tokens.shape
        x_TD = tokens.reshape(-1, tokens.shape[-1])
        if self.config.moe_router_padding_for_quantization:
            # pad_routing_map writes into its argument; the caller's map stays what the router decided.
            routing_map = pad_routing_map(routing_map.clone(), get_align_size_for_quantization(self.config))
        self.map_TE = routing_map
        self.plan = RoutePlan.build(
            routing_map,
            group=self.tp_ep_group,
            expert_rank=self.ep_rank,
            expert_ranks=self.ep_size,
            tensor_rank=self.tp_rank,
            tensor_ranks=self.tp_size,
        )
        if self.shared_experts is not None:
            self.shared_experts.pre_forward_comm(tokens)
        if not self._fused:
            return moves.permute(x_TD, probs, self.plan)
        rows, weights, self.row_id_map, _, _ = permute(
            x_TD, routing_map, probs=probs, num_out_tokens=self.plan.rows_sent, fused=True
        )
        return rows, weights

    @property
    def _fused(self) -> bool:
        # Transformer Engine's fused permutation asserts at least one row.
        return self.config.moe_permute_fusion and self.plan.rows_sent > 0

    def token_dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """All-to-all of rows and weights; the shared experts' first GEMM is launched behind the rows."""
        if self.shared_experts is not None:
            self.shared_experts.wait_current_stream()
        rows = moves.exchange(hidden_states, self.plan, self.ep_group)
        if self.shared_experts is not None:
            self.shared_experts.linear_fc1_forward_and_act(rows)
        return rows, moves.exchange(probs, self.plan, self.ep_group)

    def dispatch_postprocess(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gather over the expert-tensor-parallel group, then order by local expert."""
        rows, weights = hidden_states, probs
        if self.tp_size > 1:
            sizes = self.plan.gathered_splits_P
            rows = moves.gather_over(rows, sizes, self.tp_group)
            weights = moves.gather_over(weights, sizes, self.tp_group)
        rows, weights = moves.group_by_expert(rows, self.plan), moves.group_by_expert(weights, self.plan)
        return rows, torch.tensor(self.plan.rows_per_expert_L, dtype=torch.int64), weights

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        """Back to the order of arrival; sum over the expert-tensor-parallel group in float32."""
        rows = moves.ungroup_by_expert(hidden_states, self.plan)
        if self.tp_size > 1:
            rows = moves.reduce_scatter_over(rows, self.plan.gathered_splits_P, self.tp_group)
        return rows

    def token_combine(self, hidden_states: Tensor) -> Tensor:
        """The reverse all-to-all; the shared experts' second GEMM is launched behind it."""
        if self.shared_experts is not None:
            self.shared_experts.wait_current_stream()
        rows = moves.exchange_back(hidden_states, self.plan, self.ep_group)
        if self.shared_experts is not None:
            self.shared_experts.linear_fc2_forward(rows)
            self.shared_experts.post_forward_comm()
        return rows

    def combine_postprocess(self, hidden_states: Tensor) -> Tensor:
        """Sum each token's rows: [N, D] to [S, B, D], plus the overlapped shared experts."""
        num_tokens, width = self.map_TE.shape[0], self.hidden_shape[-1]
        if self._fused:
            shape = torch.Size((num_tokens, width))
            out = unpermute(hidden_states, self.row_id_map, shape, routing_map=self.map_TE, fused=True)
        else:
            out = moves.unpermute(hidden_states, self.plan, num_tokens)
        out = out.view(self.hidden_shape)
        if self.shared_experts is not None:
            out = out + self.shared_experts.get_output()
        return out
