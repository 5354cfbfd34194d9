"""The linear softmax gate: P = softmax(W x), in float32 whatever the model's dtype."""

from __future__ import annotations

from torch import Tensor

from megatron_dynmoe.routers.linear import linear32
from megatron_dynmoe.routers.registry import register_gate


@register_gate("softmax")
def softmax_gate(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """W x; its scores are softmax probabilities (Huang et al. 2024, arXiv 2403.07652, eq. 2).

    Args:
        x_TD: hidden states, any float dtype.
        weight_ED: the router's weight, any float dtype.

    Returns:
        logits [T, E] in float32 (float64 for float64 input).
    """
    return linear32(x_TD, weight_ED)
