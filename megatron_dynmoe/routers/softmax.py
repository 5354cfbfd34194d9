"""The linear softmax gate: P = softmax(W x), in float32 whatever the model's dtype."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from megatron_dynmoe.losses import entropy_loss
from megatron_dynmoe.ranges import COEFFICIENT
from megatron_dynmoe.routers.linear import linear32
from megatron_dynmoe.routers.registry import Loss, Routed, register_gate
from megatron_dynmoe.routers.settings import Settings, setting


@dataclass(frozen=True, kw_only=True)
class Probabilities(Settings):
    """Settings of gates whose scores are probabilities."""

    entropy_coeff: float = setting(0.0, COEFFICIENT, training=True)
    """Weight beta of the entropy ('dynamic') loss, which keeps a top-p router from flat distributions."""


def _entropy(routed: Routed) -> Tensor:
    return entropy_loss(routed.routing.scores_TC, num_tokens=routed.totals.tokens)


ENTROPY = Loss("entropy_loss", "entropy_coeff", _entropy)


@register_gate("softmax", settings=Probabilities, losses=(ENTROPY,))
def softmax_gate(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """W x, then softmax over the experts (Huang et al. 2024, arXiv 2403.07652, eq. 2).

    Args:
        x_TD: hidden states, any float dtype.
        weight_ED: the router's weight, any float dtype.

    Returns:
        logits [T, E] in float32 (float64 for float64 input).
    """
    return linear32(x_TD, weight_ED)
