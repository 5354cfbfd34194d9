"""Residual MoE: a dense expert beside the routed ones, mixed by a learned softmax over the two."""

from __future__ import annotations

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class Mixer(MegatronModule):
    """y = c_0 * routed + c_1 * dense with c = softmax(W x + b) for each token.

    From DeepSpeed-MoE (Rajbhandari et al. 2022, arXiv 2201.05596, section 4.1); the coefficients are those of
    DeepSpeed's ``MoE`` layer with ``use_residual``.  Parameters: ``weight`` [2, D], ``bias`` [2].
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config=config)
        dtype = config.params_dtype
        self.weight = torch.nn.Parameter(torch.empty(2, config.hidden_size, dtype=dtype))
        self.bias = torch.nn.Parameter(torch.zeros(2, dtype=dtype))
        if config.perform_initialization:
            config.init_method(self.weight)
        for parameter in (self.weight, self.bias):
            parameter.sequence_parallel = config.sequence_parallel

    def forward(self, hidden: Tensor, routed: Tensor, dense: Tensor) -> Tensor:
        """Mix.

        Args:
            hidden: the layer's input [S, B, D], which the coefficients are computed from, in float32.
            routed, dense: outputs [S, B, D].

        Returns:
            [S, B, D] in the dtype of ``routed``.
        """
        coefficients = torch.softmax(hidden.float() @ self.weight.float().t() + self.bias.float(), dim=-1)
        return coefficients[..., :1].to(routed.dtype) * routed + coefficients[..., 1:].to(dense.dtype) * dense
