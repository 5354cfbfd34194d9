"""The dynamic MoE layer: megatron-core's layer with our router and an exact dispatcher."""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_dynmoe.config import DynMoEConfig
from megatron_dynmoe.mcore.config import check_config
from megatron_dynmoe.mcore.dispatcher import VariableKAllToAllDispatcher


class DynMoELayer(MoELayer):
    """Drop-in for :class:`megatron.core.transformer.moe.moe_layer.MoELayer`; tokens visit different numbers of experts.

    The forward pass is megatron-core's: route, dispatch, experts, combine, plus shared experts.

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
        for parameter in self.experts.parameters():
            # Experts form their own optimizer and gradient buffer also without expert parallelism (megatron-core: only
            # with it), so that the optimizer's state in a checkpoint moves between expert-parallel sizes.
            parameter.allreduce = False
        if config.moe_token_dispatcher_type == "alltoall":
            self.token_dispatcher = VariableKAllToAllDispatcher(
                self.num_local_experts, self.local_expert_indices, config=config, pg_collection=pg_collection
            )
            if self.use_shared_expert and self.shared_expert_overlap:
                self.token_dispatcher.set_shared_experts(self.shared_experts)
