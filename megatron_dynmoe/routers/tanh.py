"""The two-layer gate of the released MoE++: W_2 tanh(W_1 x), then softmax."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from megatron_dynmoe.routers.linear import linear32
from megatron_dynmoe.routers.registry import register_gate, register_preset
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
    """W_2 tanh(W_1 x), then softmax over the experts (the released MoE++).

    Without biases, in float32; public code of Jin et al. 2024, arXiv 2410.07348: moe_2layer_gate.

    Args:
        x_TD: hidden states, any float dtype.
        weight_EH: W_2; H = 8E.
        config: not read.
        parameters: ``hidden_weight`` [H, D], W_1.

    Returns:
        logits [T, E] in float32.
    """
    return linear32(linear32(x_TD, parameters["hidden_weight"]).tanh(), weight_EH)


# Jin et al. 2024, arXiv 2410.07348: top-2 over FFN and zero-computation experts, beta = 1e-2, tau = 0.75; the number of
# constant experts goes with that of FFN experts: 2 beside 8 and 16, 6 beside 32.
register_preset(
    "moe-plus-plus",
    {
        "rule": "top-k",
        "topk": 2,
        "zero_experts": 1,
        "copy_experts": 1,
        "constant_experts": 2,
        "gating_residual": True,
        "tau": 0.75,
        "load_balance_coeff": 1e-2,
    },
)
# What the published 7B weights were made with, where the code differs from the paper: two-layer gate, the zero expert's
# weight given to its partner, experts that see twice their input; no balance loss is in that code.
register_preset(
    "moe-plus-plus-released",
    {
        "gate": "tanh",
        "rule": "top-k",
        "topk": 2,
        "zero_experts": 1,
        "copy_experts": 1,
        "constant_experts": 2,
        "gating_residual": True,
        "drop_zero_weight": True,
        "expert_input_scale": 2.0,
    },
)
