"""The dynamic MoE layer: megatron-core's layer with our router, one straight forward, and an exact dispatcher."""

from __future__ import annotations

from functools import cache
from typing import Any

from megatron.core import tensor_parallel
from megatron.core.transformer.enums import CudaGraphModule
from megatron.core.transformer.moe import moe_layer
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_dynmoe.config import DynMoEConfig
from megatron_dynmoe.mcore.checks import check_config
from megatron_dynmoe.mcore.dispatcher import VariableKAllToAllDispatcher
from megatron_dynmoe.mcore.experts import TorchGroupedMLP
from megatron_dynmoe.mcore.flex import FlexDispatcher
from megatron_dynmoe.mcore.fp8_experts import Fp8GroupedMLP
from megatron_dynmoe.mcore.hooks import LayerHooks
from megatron_dynmoe.mcore.mixer import Mixer
from megatron_dynmoe.mcore.way import AllGatherDispatcher
from megatron_dynmoe.mcore.zero_computation import ZeroComputationExperts


class DynMoELayer(LayerHooks):
    """Drop-in for :class:`megatron.core.transformer.moe.moe_layer.MoELayer`; tokens visit different numbers of experts.

    A pass is :meth:`tokens`, from top to bottom; what one step makes, the next takes, and nothing of it is kept on the
    layer.  Callers of megatron-core's six hooks find them in :mod:`megatron_dynmoe.mcore.hooks`.

    Args:
        dynmoe: what ``submodules.router`` was built with; checked against ``config``.

    Raises:
        ConfigError: a combination that cannot work; see :func:`megatron_dynmoe.mcore.checks.check_config`.
    """

    token_dispatcher: Any  # each has begin() and send(); see :mod:`megatron_dynmoe.mcore.way`

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
        # The router's part is then replayed from a CUDA graph, and the rest resumes behind it.
        modules = config.cuda_graph_modules or []
        self.captured = config.cuda_graph_impl != "none" and CudaGraphModule.moe_router in modules
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
        """Ours in the place of megatron-core's."""
        arguments = self.num_local_experts, self.local_expert_indices, config, pg_collection
        if config.moe_token_dispatcher_type == "alltoall":
            self.token_dispatcher = VariableKAllToAllDispatcher(*arguments, unit=self.dynmoe.dispatch_unit)
            self.token_dispatcher.counts_on_device = isinstance(self.experts, TorchGroupedMLP)
        elif config.moe_token_dispatcher_type == "flex":
            self.token_dispatcher = FlexDispatcher(*arguments, dynmoe=self.dynmoe)
        else:
            self.token_dispatcher = AllGatherDispatcher(*arguments)
        if self.use_shared_expert and self.shared_expert_overlap:
            self.token_dispatcher.set_shared_experts(self.shared_experts)

    def forward(
        self,
        hidden_states: Tensor,
        intermediate_tensors: Any = None,
        padding_mask: Tensor | None = None,
        *,
        previous: Tensor | None = None,
    ) -> Any:
        """One pass, recomputed in the backward pass if the configuration says so.

        Args:
            hidden_states: [S, B, D], this rank's share of the sequence.
            intermediate_tensors: of megatron-core, which runs parts of the layer with them.
            padding_mask: bool [B, S], True for padding, which is routed but counts in no loss or statistic.
            previous: with a gating residual, the previous MoE layer's logits, float32 [S, B, C].

        Returns:
            [S, B, D] and ``None``, a bias; and where ``previous`` was given, this layer's logits, float32 [S, B, C].

        Raises:
            ValueError: tensor without sequence parallelism in training; as megatron-core's layer.
        """
        if self.captured or intermediate_tensors is not None:
            return super().forward(hidden_states, intermediate_tensors, padding_mask)
        if self.training and self.attn_tp_group.size() > 1 and not self.config.sequence_parallel:
            raise ValueError("training with tensor parallelism and experts needs sequence parallelism as well.")
        mask_SB = None if padding_mask is None else padding_mask.transpose(0, 1).bool()
        if self.moe_layer_recompute and self.training:
            output, logits = self._recomputed(hidden_states, previous, mask_SB)
        else:
            output, logits = self.tokens(hidden_states, previous, mask_SB)
        return (output, None) if previous is None else (output, None, logits)

    def tokens(self, hidden: Tensor, previous: Tensor | None, mask_SB: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The whole pass as a function of tensors: hidden states [S, B, D] to the output, and this layer's logits."""
        # 1. Route. The counts of rows leave as soon as the map exists, before losses and statistics are computed.
        counts = cache(lambda map_TC: self.token_dispatcher.begin(map_TC[:, : self.config.num_moe_experts]))
        routing = self.router(hidden, previous, mask_SB, counts)
        # 2. Send each token's rows to the ranks of its experts.
        x = self.expert_input(hidden)
        sent = self.token_dispatcher.send(self._delay_weights(x), routing, counts(routing.map_TC), shared_input=hidden)
        # 3. Meanwhile compute what needs no other rank.
        shared, onto = self.local_compute(hidden, x, routing.weights_TZ)
        # 4. The experts, on the rows that have arrived.
        rows, sizes, weights, arrived = sent.arrive()
        rows, _ = self.experts(self._mark_experts(rows), sizes, weights)
        # 5. Send their outputs back.
        back = arrived.send_back(rows)
        # 6. Add: a token's rows onto its zero-computation experts, and the shared experts.
        output = self.with_shared(back.add(onto), shared, hidden)
        return output, routing.logits_TC.view(*hidden.shape[:-1], -1) if self.dynmoe.gating_residual else None

    def expert_input(self, hidden: Tensor) -> Tensor:
        """What routed and zero-computation experts see: the hidden states, scaled if the configuration says so."""
        scale = self.dynmoe.expert_input_scale
        return hidden if scale == 1 else hidden * scale

    def local_compute(self, hidden: Tensor, x: Tensor, weights_TZ: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """What needs no other rank; it runs while the rows travel.  Override to add to it.

        Args:
            hidden, x: the layer's and the experts' input [S, B, D].
            weights_TZ: float32, of zero-computation experts.

        Returns:
            outputs [S, B, D] or ``None``: of the shared experts, and of the zero-computation experts, which the routed
            rows are added onto.
        """
        onto = None if self.free_experts is None else self.free_experts(x, weights_TZ)
        return self.shared_experts_compute(hidden), onto

    def with_shared(self, routed: Tensor, shared: Tensor | None, hidden: Tensor | None = None) -> Tensor:
        """The layer's output [S, B, D]; a residual MoE mixes by coefficients computed from ``hidden``."""
        if self.mixer is not None:
            return self.mixer(hidden, routed, shared)
        return routed if shared is None else routed + shared

    def _recomputed(self, *tensors: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if not (self.config.fp8 or self.config.fp4):
            return tensor_parallel.checkpoint(self.tokens, False, *tensors)
        tracker = tensor_parallel.random.get_cuda_rng_tracker
        return moe_layer.te_checkpoint(self.tokens, False, tracker, self.tp_group, *tensors)

    def _delay_weights(self, x: Tensor) -> Tensor:
        """In the backward pass of ``--overlap-dispatch-backward-with-experts-wgrad`` the place to wait for them."""
        late = self.config.overlap_dispatch_backward_with_experts_wgrad
        return moe_layer._RegisterDelayedWgradForExperts.apply(self, x) if late else x

    def _mark_experts(self, rows: Tensor) -> Tensor:
        """And the place from where the experts' weight gradients can be computed."""
        event = self._delayed_wgrad_event
        return rows if event is None else moe_layer._RecordExpertDgradCompletion.apply(event, rows)
