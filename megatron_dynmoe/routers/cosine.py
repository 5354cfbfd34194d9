"""The cosine gate of DynMoE: similarity of a token and each expert's embedding, through a sigmoid."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_dynmoe.routers.linear import linear32
from megatron_dynmoe.routers.registry import register_gate

if TYPE_CHECKING:
    from megatron_dynmoe.config import DynMoEConfig

MAX_SCALE = 100.0  # of a trainable scale, as is usual since CLIP (arXiv 2103.00020, section 2.5)
_TINY = 1e-12  # a zero vector has cosine 0 with everything


def cosine_parameters(config: DynMoEConfig, experts: int, width: int) -> dict[str, Tensor]:
    """``logit_scale`` [1], the logarithm of the scale, if it is trained."""
    return {"logit_scale": torch.full((1,), math.log(config.cosine_scale))} if config.train_cosine_scale else {}


def cosine_scale(config: DynMoEConfig, parameters: Mapping[str, Tensor]) -> Tensor | float:
    """The scale of cosines and thresholds: the configured number, or what became of it."""
    if "logit_scale" in parameters:
        return parameters["logit_scale"].clamp(max=math.log(MAX_SCALE)).exp()
    return config.cosine_scale


@register_gate(
    "cosine",
    scores=torch.sigmoid,
    parameters=cosine_parameters,
    init_weight=torch.nn.init.orthogonal_,
    keep_float32=True,
)
def cosine_gate(x_TD: Tensor, weight_ED: Tensor, config: DynMoEConfig, parameters: Mapping[str, Tensor]) -> Tensor:
    """The logits of s_e = sigmoid(scale * cos(x, w_e)).

    Guo et al. 2024, arXiv 2405.14297, eq. 3; the scale is the public code's.

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
