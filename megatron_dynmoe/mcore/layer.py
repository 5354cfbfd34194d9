"""The dynamic MoE layer: megatron-core's layer with our router and an exact dispatcher."""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_dynmoe.config import DynMoEConfig
from megatron_dynmoe.mcore.config import check_config
from megatron_dynmoe.mcore.dispatcher import VariableKAllToAllDispatcher
from megatron_dynmoe.mcore.experts import TorchGroupedMLP
from megatron_dynmoe.mcore.mixer import Mixer


class DynMoELayer(MoELayer):
    """Drop-in for :class:`megatron.core.transformer.moe.moe_layer.MoELayer`; tokens visit different numbers of experts.

    The forward pass is megatron-core's: route, dispatch, experts, combine, plus shared experts.  With our dispatcher
    two things move: the counts leave as soon as the map exists, and what needs no communication
    (:meth:`local_compute`) runs while the rows travel.

    Args:
        dynmoe: what ``submodules.router`` was built with; checked against ``config``.

    Raises:
        ConfigError: a combination that cannot work; see :func:`megatron_dynmoe.mcore.config.check_config`.
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
        self._local: Any = None
        self.mixer = Mixer(config) if dynmoe.residual else None
        for parameter in self.experts.parameters():
            # Experts form their own optimizer and gradient buffer also without expert parallelism (megatron-core: only
            # with it), so that the optimizer's state in a checkpoint moves between expert-parallel sizes.
            parameter.allreduce = False
        if config.moe_token_dispatcher_type == "alltoall":
            self.token_dispatcher = VariableKAllToAllDispatcher(
                self.num_local_experts,
                self.local_expert_indices,
                config=config,
                pg_collection=pg_collection,
                unit=dynmoe.dispatch_unit,
            )
            if config.cuda_graph_impl == "none":  # a captured router could not leave a collective unfinished
                self.router.on_map = self.token_dispatcher.begin
            self.token_dispatcher.counts_on_device = isinstance(self.experts, TorchGroupedMLP)
            if self.use_shared_expert and self.shared_expert_overlap:
                self.token_dispatcher.set_shared_experts(self.shared_experts)

    @property
    def _defers(self) -> bool:
        # CUDA graphs of the router's part, and the schedule that interleaves two micro-batches, take the shared
        # experts' output as a result of the router's part: not deferred then.
        ours = isinstance(self.token_dispatcher, VariableKAllToAllDispatcher)
        plain = self.config.cuda_graph_impl == "none" and not self.config.overlap_moe_expert_parallel_comm
        return ours and plain

    def local_compute(self, hidden_states: Tensor) -> Tensor | None:
        """What needs no other rank, [S, B, D] to [S, B, D] or ``None``: here the shared experts.

        It runs between the start and the end of the dispatch. Override to add to it.
        """
        return self._with_hidden(super().shared_experts_compute(hidden_states), hidden_states)

    def _with_hidden(self, shared: Tensor | None, hidden_states: Tensor) -> Any:
        """The mixer reads the layer's input, which megatron-core does not carry to the end of the layer."""
        return shared if self.mixer is None else (shared, hidden_states)

    def shared_experts_compute(self, hidden_states: Tensor) -> Tensor | None:
        """Deferred to :meth:`dispatch` where the dispatch has two halves."""
        if not self._defers:
            return self._with_hidden(super().shared_experts_compute(hidden_states), hidden_states)
        self._hidden = hidden_states
        return None

    def dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Start the dispatch, compute what is local, wait."""
        overlapped = self.token_dispatcher.shared_experts is not None
        if self._hidden is None or overlapped or self.config.overlap_dispatch_backward_with_experts_wgrad:
            if self._hidden is not None:
                self._local, self._hidden = self.local_compute(self._hidden), None
            return super().dispatch(hidden_states, probs)
        flight = self.token_dispatcher.start(hidden_states, probs)
        self._local, self._hidden = self.local_compute(self._hidden), None
        return self.token_dispatcher.arrive(flight)

    def postprocess(self, output: Tensor, shared_expert_output: Tensor | None) -> Tensor:
        """Sum the routed, the local and the shared experts' outputs."""
        if self._local is not None:
            shared_expert_output, self._local = self._local, None
        if self.mixer is None:
            return super().postprocess(output, shared_expert_output)
        assert shared_expert_output is not None  # refused at construction
        shared, hidden = shared_expert_output
        return self.mixer(hidden, super().postprocess(output, None), shared)
