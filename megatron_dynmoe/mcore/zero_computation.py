"""Zero-computation experts as a module: replicated parameters, local computation."""

from __future__ import annotations

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_dynmoe.config import DynMoEConfig
from megatron_dynmoe.experts import zero_computation


class ZeroComputationExperts(MegatronModule):
    """Constant, copy and zero experts of MoE++ on every rank.

    Parameters, of the constant experts: ``select`` [constants, 2, D] and ``values`` [constants, D], drawn from N(0, 1)
    as in the public code.  They are ordinary replicated ones: their gradients are averaged over all data-parallel
    ranks, not over the expert-data-parallel ones.
    """

    select: Tensor
    values: Tensor

    def __init__(self, config: TransformerConfig, dynmoe: DynMoEConfig) -> None:
        super().__init__(config=config)
        self.copies, constants = dynmoe.copy_experts, dynmoe.constant_experts
        select, values = torch.empty(constants, 2, config.hidden_size), torch.empty(constants, config.hidden_size)
        if config.perform_initialization:
            for one in select:
                config.init_method(one)
            torch.nn.init.normal_(values)
        for name, value in (("select", select), ("values", values)):
            if constants == 0:  # neither optimizers nor checkpoints want a parameter of no element
                self.register_buffer(name, value.to(config.params_dtype), persistent=False)
                continue
            parameter = torch.nn.Parameter(value.to(config.params_dtype))
            parameter.sequence_parallel = config.sequence_parallel
            self.register_parameter(name, parameter)

    def forward(self, hidden_states: Tensor, weights_TZ: Tensor) -> Tensor:
        """Their weighted sum.

        Args:
            hidden_states: [S, B, D].
            weights_TZ: float32 routing weights.

        Returns:
            [S, B, D] in the dtype of ``hidden_states``.
        """
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        out_TD = zero_computation(x_TD, weights_TZ, self.select, self.values, copies=self.copies)
        return out_TD.view_as(hidden_states)
