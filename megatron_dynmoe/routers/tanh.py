"""The two-layer gate of the released MoE++: W_2 tanh(W_1 x), then softmax."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from megatron_dynmoe.routers.linear import linear32
from megatron_dynmoe.routers.registry import register_gate
from megatron_dynmoe.routers.softmax import ENTROPY, Probabilities

if TYPE_CHECKING:
    from megatron_dynmoe.routers.router_config import RouterConfig

HIDDEN_PER_EXPERT = 8  # width of the hidden layer (public code, moe_plus_plus_layer.py)


def tanh_parameters(config: RouterConfig, experts: int, width: int) -> dict[str, Any]:
    """``hidden_weight`` [8E, D], the first layer; the router's weight is the second, [E, 8E]."""
    return {"hidden_weight": (HIDDEN_PER_EXPERT * experts, width)}


@register_gate(
    "tanh",
    settings=Probabilities,
    losses=(ENTROPY,),
    parameters=tanh_parameters,
    weight_shape=lambda experts, width: (experts, HIDDEN_PER_EXPERT * experts),
)
def tanh_gate(x_TD: Tensor, weight_EH: Tensor, config: RouterConfig, parameters: Mapping[str, Tensor]) -> Tensor:
    """W_2 tanh(W_1 x), without biases, in float32 (public code of Jin et al. 2024, arXiv 2410.07348: moe_2layer_gate).

    Args:
        x_TD: hidden states, any float dtype.
        weight_EH: W_2; H = 8E.
        config: not read.
        parameters: ``hidden_weight`` [H, D], W_1.

    Returns:
        logits [T, E] in float32.
    """
    return linear32(linear32(x_TD, parameters["hidden_weight"]).tanh(), weight_EH)
