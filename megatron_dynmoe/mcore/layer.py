"""The dynamic MoE layer: megatron-core's layer with our router and an exact dispatcher."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_dynmoe.config import DynMoEConfig
from megatron_dynmoe.mcore.checks import check_config
from megatron_dynmoe.mcore.dispatcher import VariableKAllToAllDispatcher
from megatron_dynmoe.mcore.experts import TorchGroupedMLP
from megatron_dynmoe.mcore.flex import FlexDispatcher
from megatron_dynmoe.mcore.fp8_experts import Fp8GroupedMLP
from megatron_dynmoe.mcore.free_experts import ZeroComputationExperts
from megatron_dynmoe.mcore.mixer import Mixer
from megatron_dynmoe.routers.channels import pack, unpack


class DynMoELayer(MoELayer):
    """Drop-in for :class:`megatron.core.transformer.moe.moe_layer.MoELayer`; tokens visit different numbers of experts.

    The forward pass is megatron-core's: route, dispatch, experts, combine, plus shared experts.  With our dispatcher
    two things move: the counts leave as soon as the map exists, and what needs no communication
    (:meth:`local_compute`) runs while the rows travel.

    With a gating residual the previous MoE layer's logits are channels of the hidden tensor inside this layer, so that
    recompute of the layer sees them as an input and hands its own on as an output (:mod:`megatron_dynmoe.mcore.carry`).

    Args:
        dynmoe: what ``submodules.router`` was built with; checked against ``config``.

    Raises:
        ConfigError: a combination that cannot work; see :func:`megatron_dynmoe.mcore.checks.check_config`.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MoESubmodules | None = None,
        *args: Any,
        dynmoe: DynMoEConfig,
        pg_collection: Any = None,
        **kwargs: Any,
    ) -> None:
        check_config(config, dynmoe)
        pg_collection = pg_collection or get_default_pg_collection()
        super().__init__(config, submodules, *args, pg_collection=pg_collection, **kwargs)
        self.dynmoe = dynmoe
        self._hidden: Tensor | None = None
        self._local: Tensor | None = None
        self._free: Tensor | None = None
        # With a gating residual: the previous MoE layer's logits and this one's, as channels.
        self.previous: Tensor | None = None
        self.carried: Tensor | None = None
        if dynmoe.gating_residual:  # in the first MoE layer too: layers that are alike are stacked in a checkpoint
            self.router.add_learned("gate_map", (self.router.columns, self.router.columns))
        self.mixer = Mixer(config) if dynmoe.residual else None
        self.free_experts = ZeroComputationExperts(config, dynmoe) if dynmoe.zero_computation_experts else None
        self._place()
        for parameter in self.experts.parameters():
            # Experts form their own optimizer and gradient buffer also without expert parallelism (megatron-core: only
            # with it), so that the optimizer's state in a checkpoint moves between expert-parallel sizes.
            parameter.allreduce = False
        self._set_dispatcher(config, pg_collection)

    def set_layer_number(self, layer_number: int) -> None:
        """Tell router and experts which layer this is."""
        super().set_layer_number(layer_number)
        if isinstance(self.experts, Fp8GroupedMLP):
            self.experts.set_layer(layer_number, mtp=self.is_mtp_layer)

    def _place(self) -> None:
        """Put what is small, and made on the CPU, where the experts are made; megatron-core's router does so later.

        It moves its weight in ``gating()`` (router.py:96), which ours has not; a model is moved whole by training.
        """
        if self.config.use_cpu_initialization:
            return
        for module in filter(None, (self.router, self.mixer, self.free_experts)):
            if all(tensor.device.type == "cpu" for tensor in (*module.parameters(), *module.buffers())):
                module.cuda()

    def _set_dispatcher(self, config: TransformerConfig, pg_collection: Any) -> None:
        """Ours in the place of megatron-core's; but allgather's, which takes ragged maps as it is."""
        arguments = self.num_local_experts, self.local_expert_indices, config, pg_collection
        if config.moe_token_dispatcher_type == "alltoall":
            self.token_dispatcher = VariableKAllToAllDispatcher(*arguments, unit=self.dynmoe.dispatch_unit)
            if config.cuda_graph_impl == "none":  # a captured router could not leave a collective unfinished
                self.router.on_map = self.token_dispatcher.begin
            self.token_dispatcher.counts_on_device = isinstance(self.experts, TorchGroupedMLP)
        elif config.moe_token_dispatcher_type == "flex":
            self.token_dispatcher = FlexDispatcher(*arguments, dynmoe=self.dynmoe)
        if self.use_shared_expert and self.shared_expert_overlap:
            self.token_dispatcher.set_shared_experts(self.shared_experts)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """megatron-core's forward pass; with a gating residual on the hidden states and logits side by side."""
        if not self.dynmoe.gating_residual:
            return super().forward(hidden_states, *args, **kwargs)
        previous, self.previous = self.previous, None
        if previous is not None:
            hidden_states = torch.cat([hidden_states, previous], dim=-1)
        output, bias = super().forward(hidden_states, *args, **kwargs)
        width = self.config.hidden_size
        self.carried = output[..., width:]
        return output[..., :width].contiguous(), bias

    def _narrow(self, hidden_states: Tensor) -> Tensor:
        width = self.config.hidden_size
        return hidden_states if hidden_states.shape[-1] == width else hidden_states[..., :width].contiguous()

    def route(self, hidden_states: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Weights [T, E] float32 and map [T, E] bool; a gating residual gets the logits beside the hidden states."""
        if self.dynmoe.gating_residual:
            self.router.previous_TC = self._previous(hidden_states[..., self.config.hidden_size :])
        weights, routing_map = super().route(self._narrow(hidden_states), padding_mask)
        self.router.previous_TC = None
        return weights, routing_map

    def _previous(self, channels: Tensor) -> Tensor:
        if channels.shape[-1] > 0:
            return unpack(channels.reshape(-1, channels.shape[-1]))
        # The first MoE layer: zeros, so that its map is part of the graph, which overlapped gradient reduction wants.
        tokens = channels.shape[0] * channels.shape[1]
        return torch.zeros(tokens, self.router.columns, device=channels.device)

    def preprocess(self, hidden_states: Tensor, probs: Tensor, routing_map: Tensor) -> tuple[Tensor, Tensor]:
        """What the experts see: the hidden states alone, scaled if the configuration says so; shared ones unscaled."""
        hidden_states = self._narrow(hidden_states)
        if self.shared_expert_overlap:
            self.token_dispatcher.shared_input = hidden_states
        return super().preprocess(self._expert_input(hidden_states), probs, routing_map)

    def _expert_input(self, hidden_states: Tensor) -> Tensor:
        scale = self.dynmoe.expert_input_scale
        return hidden_states if scale == 1 else hidden_states * scale

    @property
    def _defers(self) -> bool:
        # CUDA graphs of the router's part, and the schedule that interleaves two micro-batches, take the shared
        # experts' output as a result of the router's part: not deferred then.
        ours = isinstance(self.token_dispatcher, VariableKAllToAllDispatcher)
        plain = self.config.cuda_graph_impl == "none" and not self.config.overlap_moe_expert_parallel_comm
        return ours and plain

    def local_compute(self, hidden_states: Tensor) -> Tensor | None:
        """What needs no other rank, [S, B, D] to [S, B, D] or ``None``: shared and zero-computation experts.

        It runs between the start and the end of the dispatch. Override to add to it.
        """
        if self.free_experts is not None:
            self._free = self.free_experts(self._expert_input(hidden_states), self.router.weights_TZ)
        return super().shared_experts_compute(hidden_states)

    def shared_experts_compute(self, hidden_states: Tensor) -> Tensor | None:
        """Deferred to :meth:`dispatch` where the dispatch has two halves."""
        self._hidden = self._narrow(hidden_states)
        return None if self._defers else super().shared_experts_compute(self._hidden)

    def dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Start the dispatch, compute what is local, wait."""
        overlapped = self.token_dispatcher.shared_experts is not None
        whole = overlapped or self.config.overlap_dispatch_backward_with_experts_wgrad
        if not self._defers or whole:
            if self._defers:
                self._local = self.local_compute(self._hidden)
            return super().dispatch(hidden_states, probs)
        flight = self.token_dispatcher.start(hidden_states, probs)
        self._local = self.local_compute(self._hidden)
        return self.token_dispatcher.arrive(flight)

    def postprocess(self, output: Tensor, shared_expert_output: Tensor | None) -> Tensor:
        """Sum the routed, the zero-computation and the shared experts' outputs; carried logits stand beside."""
        hidden, self._hidden = self._hidden, None
        if self._defers:
            shared_expert_output, self._local = self._local, None
        elif self.free_experts is not None:
            self._free = self.free_experts(self._expert_input(hidden), self.router.weights_TZ)
        free, self._free = self._free, None
        if isinstance(self.token_dispatcher, VariableKAllToAllDispatcher):
            self.token_dispatcher.onto, free = free, None
        output = super().postprocess(output, None if self.mixer is not None else shared_expert_output)
        if free is not None:
            output = free.add_(output)
        if self.mixer is not None:
            output = self.mixer(hidden, output, shared_expert_output)
        if self.dynmoe.gating_residual:
            logits = self.router.logits_TC.view(*output.shape[:-1], -1)
            output = torch.cat([output, pack(logits, output.dtype)], dim=-1)
        self.router.forget()
        return output
