"""The linear sigmoid gate: s = sigmoid(W x), each expert by itself, in float32 whatever the model's dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_dynmoe.routers.linear import linear32
from megatron_dynmoe.routers.registry import register_gate


@register_gate("sigmoid", scores=torch.sigmoid, probabilities=False)
def sigmoid_gate(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """W x, then the sigmoid of each expert's logit by itself (DeepSeek-V3).

    DeepSeek-AI 2024, arXiv 2412.19437, eq. 15; also Wang et al. 2024, arXiv 2408.15664, section 4.1.  There the weights
    of the chosen experts are divided by their sum: --moe-normalize-weights.

    Args:
        x_TD: hidden states, any float dtype.
        weight_ED: the router's weight, any float dtype.

    Returns:
        logits [T, E] in float32 (float64 for float64 input); scores are their sigmoid, whose sum is anything.
    """
    return linear32(x_TD, weight_ED)
