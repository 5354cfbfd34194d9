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


@register_gate("cosine", parameters=cosine_parameters, init_weight=torch.nn.init.orthogonal_, keep_float32=True)
def cosine_gate(
    x_TD: Tensor, weight_ED: Tensor, config: DynMoEConfig, parameters: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """s_e = sigmoid(scale * cos(x, w_e)) (Guo et al. 2024, arXiv 2405.14297, eq. 3; the scale from the public code).

    Args:
        x_TD: hidden states, any float dtype.
        weight_ED: the experts' embeddings, one a row.
        config: ``cosine_scale``.
        parameters: ``logit_scale``, if it is trained.

    Returns:
        scale * cosine and scores in (0, 1), both [T, E] in float32 (float64 for float64 input).
    """
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    direction_ED = torch.nn.functional.normalize(weight_ED.to(wide), dim=-1, eps=_TINY)
    # Dividing the product, and not x before it, spares a float32 copy of x.
    norm_T1 = torch.linalg.vector_norm(x_TD, dim=-1, keepdim=True, dtype=wide).clamp_min(_TINY)
    logits_TE = cosine_scale(config, parameters) * linear32(x_TD, direction_ED) / norm_T1
    return logits_TE, torch.sigmoid(logits_TE)
