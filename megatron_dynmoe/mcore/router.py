"""megatron-core's router interface over a router of ours: hidden states to (weights, map), losses attached."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_dynmoe.config import DynMoEConfig
from megatron_dynmoe.losses import Totals
from megatron_dynmoe.mcore.checks import balances
from megatron_dynmoe.mcore.controlled import ControlledRouter
from megatron_dynmoe.mcore.tracker import RoutingTracker
from megatron_dynmoe.routers import GATES, RULES, route
from megatron_dynmoe.routers.auxiliary import losses_of, router_losses
from megatron_dynmoe.routers.registry import Routed
from megatron_dynmoe.routers.routing import Routing


class DynamicRouter(ControlledRouter):
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
        self.dynmoe = dynmoe if balances(config) else replace(dynmoe, load_balance_coeff=0.0)
        self.weight: torch.nn.Parameter
        # No gate has a bias. megatron-core's router has one unless --disable-bias-linear; here it would never be used.
        self.bias = None
        self._add_learned()
        self.add_controllers()
        # The previous MoE layer's logits, set by the layer for each pass; and what the layer reads of this pass.
        self.previous_TC: Tensor | None = None
        self.weights_TZ: Tensor | None = None
        self.logits_TC: Tensor | None = None
        self.on_map: Callable[[Tensor], None] | None = None  # told of the map before losses and statistics are computed

    def _add_learned(self) -> None:
        """The weight as the gate wants it, with a row for each column, and what gate and rule learn beside it."""
        gate, rule = GATES[self.dynmoe.gate], RULES[self.dynmoe.rule]
        self.keep_float32 = gate.keep_float32
        self.columns, width = self.num_experts + self.dynmoe.zero_computation_experts, self.config.hidden_size
        shape = (self.columns, width) if gate.weight_shape is None else gate.weight_shape(self.columns, width)
        self.learned: list[str] = []
        if tuple(self.weight.shape) != shape:
            self.weight = self._parameter(shape)
        elif self.keep_float32:
            self.weight.data = self.weight.data.float()
        if gate.init_weight is not None and self.config.perform_initialization:
            gate.init_weight(self.weight.data)
        for declared in (gate.parameters, rule.parameters):
            for name, value in ({} if declared is None else declared(self.dynmoe, self.columns, width)).items():
                self.add_learned(name, value)

    def add_learned(self, name: str, value: Tensor | tuple[int, ...]) -> None:
        """Add a parameter that :func:`megatron_dynmoe.routers.route` gets by name: its initial value, or its shape."""
        self.register_parameter(name, self._parameter(value))
        self.learned.append(name)

    def _parameter(self, value: Tensor | tuple[int, ...]) -> torch.nn.Parameter:
        if not isinstance(value, Tensor):
            value = torch.empty(value)
            if self.config.perform_initialization:
                self.config.init_method(value)
        dtype = torch.float32 if self.keep_float32 else self.config.params_dtype
        parameter = torch.nn.Parameter(value.to(self.weight.device, dtype))
        parameter.sequence_parallel = self.config.sequence_parallel
        return parameter

    def _apply(self, fn: Callable, recurse: bool = True) -> DynamicRouter:
        """Moves to another device move the router; changes of dtype pass it by where the gate asks for float32."""

        def keep(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if tensor.is_floating_point() and moved.dtype != tensor.dtype else moved

        return super()._apply(keep if self.keep_float32 else fn, recurse)

    def forward(self, input: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Route [S, B, D] hidden states.

        Args:
            input: hidden states, this rank's share of the sequence.
            padding_mask: bool [S, B], True for padding; padded tokens are routed but count in no loss or statistic.

        Returns:
            weights [T, E] float32 with the losses attached to their backward pass, and the map [T, E] bool.
        """
        self._follow(input)
        x_TD = self._jitter(input).reshape(-1, input.shape[-1])
        routing = self.routing(x_TD)
        self.weights_TZ, self.logits_TC = routing.weights_TZ, routing.logits_TC
        if self.on_map is not None:
            self.on_map(routing.map_TE)
        valid_T = None if padding_mask is None else ~padding_mask.reshape(-1)
        if self.training and not torch.is_grad_enabled():
            # The forward of a recompute: it runs again with gradients, and then losses and statistics count.
            return routing.weights_TE, routing.map_TE
        self._observe(routing, valid_T)
        if self.training:
            self.record(x_TD, routing, valid_T)
        weights_TE = self._attach_losses(routing, valid_T) if self.training else routing.weights_TE
        return weights_TE, routing.map_TE

    def _follow(self, input: Tensor) -> None:
        """From the CPU, where megatron-core makes routers, to the input's GPU.

        megatron-core's moves its weight in ``gating()`` (router.py:96), which ours has not. In training models are
        moved whole, and a layer moves its router when it is built; this is for a router that neither has happened to.
        """
        if input.device.type == "cuda" and self.weight.device.type == "cpu":
            self.to(input.device)

    def forget(self) -> None:
        """Let go of what the layer has read of this pass: it would keep the pass's whole graph alive."""
        self.weights_TZ = self.logits_TC = None

    def routing(self, x_TD: Tensor) -> Routing:
        """The routing decision; override to route another way."""
        return route(
            x_TD,
            self.weight,
            self.dynmoe,
            parameters={name: getattr(self, name) for name in self.learned},
            active_E=self.active_E,
            previous_TC=self.previous_TC,
            training=self.training,
        )

    @property
    def layer_index(self) -> int:
        """Of this router's layer, from 0; layers of multi-token prediction follow those of the decoder."""
        return self._log_layer - 1

    @property
    def _log_layer(self) -> int:
        return self.layer_number + (self.config.num_layers if self.is_mtp_layer else 0)

    @property
    def _applications(self) -> int:
        """How often the layer runs in a forward pass; its losses' gradients are divided by it, as megatron-core's are.

        The log takes each run as a layer: megatron-core's mean counts them so.
        """
        repeated = self.is_mtp_layer and self.config.mtp_use_repeated_layer
        return (self.config.mtp_num_layers or 1) if repeated else 1

    def _observe(self, routing: Routing, valid_T: Tensor | None) -> None:
        tracker = get_moe_metrics_tracker()
        if isinstance(tracker, RoutingTracker) and self.layer_number is not None:
            tracker.observe(self.layer_index, routing, valid_T, training=self.training)

    def _jitter(self, input: Tensor) -> Tensor:
        eps = self.dynmoe.input_jitter_eps
        if eps is None or not self.training:
            return input
        return input * torch.empty_like(input).uniform_(1.0 - eps, 1.0 + eps)

    def _attach_losses(self, routing: Routing, valid_T: Tensor | None) -> Tensor:
        """Weighted losses, logged per layer, attached to the weights so that backward reaches them."""
        if not losses_of(self.dynmoe):
            return routing.weights_TE
        counted = routing if valid_T is None else routing.select(valid_T)
        totals = self._totals(counted.map_TC, valid_T)
        parameters = {name: getattr(self, name) for name in self.learned}
        losses = router_losses(Routed(counted, self.dynmoe, totals, self.weight, parameters, self.active_E))
        for name, (_, loss) in losses.items():
            self._log(name, loss)
        total = sum(coeff * loss for coeff, loss in losses.values()) / self._applications
        if self.calculate_per_token_loss:
            # Gradients are divided by the global token count later; see attach_and_log_load_balancing_loss in
            # megatron-core's router.py for the derivation.
            total = total * totals.tokens
        return MoEAuxLossAutoScaler.apply(routing.weights_TE, total)

    def _totals(self, map_TC: Tensor, valid_T: Tensor | None) -> Totals:
        valid_T = map_TC.new_ones(len(map_TC)) if valid_T is None else valid_T
        counts = torch.cat([map_TC.sum(dim=0), torch.stack([valid_T.sum(), map_TC.any(dim=-1).sum()])]).float()
        if self.tp_cp_group.size() > 1:
            torch.distributed.all_reduce(counts, group=self.tp_cp_group)
        tokens, routed = counts[-2].clamp_min(1), counts[-1].clamp_min(1)
        return Totals(rows_C=counts[:-2], tokens=tokens, routed_tokens=routed, ranks=self.tp_cp_group.size())

    def _log(self, name: str, loss: Tensor) -> None:
        num_layers = self.config.num_layers + (self.config.mtp_num_layers or 0)
        layer = None if self.layer_number is None else self._log_layer
        get_moe_metrics_tracker().record(name, loss, layer, num_layers, reduce_group=self.tp_cp_group)
