"""megatron-core's router interface over a router of ours: hidden states to (weights, map), losses attached."""

from __future__ import annotations

from collections.abc import Callable

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import Router
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_dynmoe.config import DynMoEConfig
from megatron_dynmoe.losses import entropy_loss, load_balance_loss, z_loss
from megatron_dynmoe.mcore.tracker import RoutingTracker
from megatron_dynmoe.routers import route
from megatron_dynmoe.routing import Routing


class DynamicRouter(Router):
    """Routes with ``dynmoe``'s gate, rule and bounds; the weight is named and shaped as megatron-core's router's.

    Losses are computed over a micro-batch of one data-parallel rank, as megatron-core does: under sequence and context
    parallelism their token counts are summed over those ranks.
    """

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        is_mtp_layer: bool = False,
        *,
        dynmoe: DynMoEConfig,
    ) -> None:
        super().__init__(config=config, pg_collection=pg_collection, is_mtp_layer=is_mtp_layer)
        self.dynmoe = dynmoe
        self.on_map: Callable[[Tensor], None] | None = None  # told of the map before losses and statistics are computed

    def forward(self, input: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Route [S, B, D] hidden states.

        Args:
            input: hidden states, this rank's share of the sequence.
            padding_mask: bool [S, B], True for padding; padded tokens are routed but count in no loss or statistic.

        Returns:
            weights [T, E] float32 with the losses attached to their backward pass, and the map [T, E] bool.
        """
        x_TD = self._jitter(input).reshape(-1, input.shape[-1])
        routing = self.routing(x_TD)
        if self.on_map is not None:
            self.on_map(routing.map_TE)
        valid_T = None if padding_mask is None else ~padding_mask.reshape(-1)
        if self.training and not torch.is_grad_enabled():
            # The forward of a recompute: it runs again with gradients, and then losses and statistics count.
            return routing.weights_TE, routing.map_TE
        self._observe(routing.map_TE if valid_T is None else routing.map_TE[valid_T], routing.cut)
        weights_TE = self._attach_losses(routing, valid_T) if self.training else routing.weights_TE
        return weights_TE, routing.map_TE

    def routing(self, x_TD: Tensor) -> Routing:
        """The routing decision; override to route another way."""
        return route(x_TD, self.weight, self.dynmoe, guard=self.training)

    @property
    def _log_layer(self) -> int:
        return self.layer_number + (self.config.num_layers if self.is_mtp_layer else 0)

    def _observe(self, map_TE: Tensor, cut: Tensor) -> None:
        tracker = get_moe_metrics_tracker()
        if isinstance(tracker, RoutingTracker) and self.layer_number is not None:
            tracker.observe(self._log_layer - 1, map_TE, cut, training=self.training)

    def _jitter(self, input: Tensor) -> Tensor:
        eps = self.dynmoe.input_jitter_eps
        if eps is None or not self.training:
            return input
        return input * torch.empty_like(input).uniform_(1.0 - eps, 1.0 + eps)

    def _attach_losses(self, routing: Routing, valid_T: Tensor | None) -> Tensor:
        """Weighted losses, logged per layer, attached to the weights so that backward reaches them."""
        scores_TE, logits_TE, map_TE = routing.scores_TE, routing.logits_TE, routing.map_TE
        if valid_T is not None:
            scores_TE, logits_TE, map_TE = scores_TE[valid_T], logits_TE[valid_T], map_TE[valid_T]
        local_tokens = scores_TE.shape[0]
        totals = torch.cat([map_TE.sum(dim=0), map_TE.new_full((1,), 1).long() * local_tokens]).float()
        if self.tp_cp_group.size() > 1:
            torch.distributed.all_reduce(totals, group=self.tp_cp_group)
        rows_E, num_tokens = totals[:-1], totals[-1].clamp_min(1)

        losses = {}
        if self.dynmoe.load_balance_coeff > 0:
            loss = load_balance_loss(scores_TE, rows_E=rows_E, num_tokens=num_tokens)
            losses["load_balancing_loss"] = (self.dynmoe.load_balance_coeff, loss)
        if self.dynmoe.entropy_coeff > 0:
            losses["entropy_loss"] = (self.dynmoe.entropy_coeff, entropy_loss(scores_TE, num_tokens=num_tokens))
        if self.dynmoe.z_loss_coeff:
            losses["z_loss"] = (self.dynmoe.z_loss_coeff, z_loss(logits_TE, num_tokens=num_tokens))
        if not losses:
            return routing.weights_TE
        for name, (_, loss) in losses.items():
            self._log(name, loss)
        total = sum(coeff * loss for coeff, loss in losses.values())
        if self.calculate_per_token_loss:
            # Gradients are divided by the global token count later; see attach_and_log_load_balancing_loss in
            # megatron-core's router.py for the derivation.
            total = total * num_tokens
        return MoEAuxLossAutoScaler.apply(routing.weights_TE, total)

    def _log(self, name: str, loss: Tensor) -> None:
        num_layers = self.config.num_layers + (self.config.mtp_num_layers or 0)
        layer = None if self.layer_number is None else self._log_layer
        get_moe_metrics_tracker().record(name, loss, layer, num_layers, reduce_group=self.tp_cp_group)
