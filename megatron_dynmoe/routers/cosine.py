"""The cosine gate of DynMoE: similarity of a token and each expert's embedding, through a sigmoid."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_dynmoe.ranges import COEFFICIENT, SMALL, Range
from megatron_dynmoe.routers.linear import linear32
from megatron_dynmoe.routers.registry import Loss, Routed, register_gate
from megatron_dynmoe.routers.settings import Settings, setting

if TYPE_CHECKING:
    from megatron_dynmoe.routers.router_config import RouterConfig

MAX_SCALE = 100.0  # of a trainable scale, as is usual since CLIP (arXiv 2103.00020, section 2.5)
_TINY = 1e-12  # a zero vector has cosine 0 with everything

# Below this Frobenius norm the diversity loss turns from a norm into a parabola.  Cosines of orthogonal float32 vectors
# are off by about 1e-7 each, a matrix of 64 of them by 1e-5: a hundredth of it.
DIVERSITY_SMOOTHING = 1e-3


@dataclass(frozen=True, kw_only=True)
class Cosine(Settings):
    """Settings of gate 'cosine'."""

    cosine_scale: float = setting(1.0, Range(SMALL, 100))
    """Scale of cosines and thresholds before the sigmoid, under gate 'cosine'; the initial one if it is trained."""

    train_cosine_scale: bool = setting(False, exported="trained_cosine_scale")
    """Train that scale."""

    diversity_coeff: float = setting(0.0, COEFFICIENT, training=True)
    """Weight of the diversity loss, which keeps the embeddings of active experts apart (gate 'cosine')."""

    simplicity_coeff: float = setting(0.0, COEFFICIENT, training=True)
    """Weight of the simplicity loss, which keeps the embeddings of active experts short (gate 'cosine')."""


def diversity_loss(weight_ED: Tensor, active_E: Tensor | None = None) -> Tensor:
    """|| C - I ||_F with C the cosines between active experts' embeddings (Guo et al. 2024, arXiv 2405.14297, eq. 7).

    The gradient of a norm has length one however small the norm is, and at the orthogonal start the norm is rounding
    noise: its direction would be amplified to full size.  Hence sqrt(|| C - I ||^2 + a^2) - a with a = 1e-3, which is 0
    at the start, with a gradient as small as the noise, and the norm (less a) everywhere else.

    Args:
        weight_ED: embeddings, one a row.
        active_E: bool; unset: all.

    Returns:
        float32 scalar.
    """
    wide = torch.promote_types(weight_ED.dtype, torch.float32)
    direction_ED = torch.nn.functional.normalize(weight_ED.to(wide), dim=-1)
    different_EE = ~torch.eye(weight_ED.shape[0], dtype=torch.bool, device=weight_ED.device)
    if active_E is not None:
        different_EE = different_EE & active_E & active_E.unsqueeze(1)
    cosine_EE = torch.where(different_EE, direction_ED @ direction_ED.t(), 0.0)
    a = DIVERSITY_SMOOTHING
    return torch.sqrt(cosine_EE.square().sum() + a * a) - a


def simplicity_loss(weight_ED: Tensor, active_E: Tensor | None = None) -> Tensor:
    """Mean over active experts of |w_e| (Guo et al. 2024, arXiv 2405.14297, eq. 8; its code counts inactive ones too).

    Args:
        weight_ED: embeddings, one a row.
        active_E: bool; unset: all.

    Returns:
        float32 scalar.
    """
    wide = torch.promote_types(weight_ED.dtype, torch.float32)
    norm_E = torch.linalg.vector_norm(weight_ED, dim=-1, dtype=wide)
    if active_E is None:
        return norm_E.mean()
    return torch.where(active_E, norm_E, 0.0).sum() / active_E.sum().clamp_min(1)


# Of the router, not of tokens: each rank that shares the tokens adds an equal share.
def _diversity(routed: Routed) -> Tensor:
    return diversity_loss(routed.weight_CD, routed.active_E) / routed.totals.ranks


def _simplicity(routed: Routed) -> Tensor:
    return simplicity_loss(routed.weight_CD, routed.active_E) / routed.totals.ranks


def cosine_parameters(config: RouterConfig, experts: int, width: int) -> dict[str, Tensor]:
    """``logit_scale`` [1], the logarithm of the scale, if it is trained."""
    return {"logit_scale": torch.full((1,), math.log(config.cosine_scale))} if config.train_cosine_scale else {}


def cosine_scale(config: RouterConfig, parameters: Mapping[str, Tensor]) -> Tensor | float:
    """The scale of cosines and thresholds: the configured number, or what became of it."""
    if "logit_scale" in parameters:
        return parameters["logit_scale"].clamp(max=math.log(MAX_SCALE)).exp()
    return config.cosine_scale


@register_gate(
    "cosine",
    settings=Cosine,
    losses=(
        Loss("diversity_loss", "diversity_coeff", _diversity),
        Loss("simplicity_loss", "simplicity_coeff", _simplicity),
    ),
    scores=torch.sigmoid,
    probabilities=False,
    parameters=cosine_parameters,
    init_weight=torch.nn.init.orthogonal_,
    keep_float32=True,
)
def cosine_gate(x_TD: Tensor, weight_ED: Tensor, config: RouterConfig, parameters: Mapping[str, Tensor]) -> Tensor:
    """The sigmoid of the scaled cosine with each expert's embedding (DynMoE).

    The logits of s_e = sigmoid(scale * cos(x, w_e)): Guo et al. 2024, arXiv 2405.14297, eq. 3; the scale is the public
    code's.

    Args:
        x_TD: hidden states, any float dtype.
        weight_ED: the experts' embeddings, one a row.
        config: ``cosine_scale``.
        parameters: ``logit_scale``, if it is trained.

    Returns:
        scale * cosine, [T, E] in float32 (float64 for float64 input); scores are its sigmoid.
    """
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    direction_ED = torch.nn.functional.normalize(weight_ED.to(wide), dim=-1, eps=_TINY)
    # Dividing the product, and not x before it, spares a float32 copy of x.
    norm_T1 = torch.linalg.vector_norm(x_TD, dim=-1, keepdim=True, dtype=wide).clamp_min(_TINY)
    return cosine_scale(config, parameters) * linear32(x_TD, direction_ED) / norm_T1
