"""The top-any rule of DynMoE: every expert whose score passes that expert's own learned threshold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_dynmoe.routers.cosine import cosine_scale
from megatron_dynmoe.routers.registry import register_rule

if TYPE_CHECKING:
    from megatron_dynmoe.config import DynMoEConfig


def top_any_parameters(config: DynMoEConfig, experts: int, width: int) -> dict[str, Tensor]:
    """``thresholds`` [E], G in the paper, 0 at the start: about half of the experts are chosen."""
    return {"thresholds": torch.zeros(experts)}


def _margin_TE(scores_TE: Tensor, config: DynMoEConfig, parameters: Mapping[str, Tensor]) -> Tensor:
    return scores_TE - torch.sigmoid(cosine_scale(config, parameters) * parameters["thresholds"])


def top_any_weights(
    scores_TE: Tensor, map_TE: Tensor, config: DynMoEConfig, parameters: Mapping[str, Tensor]
) -> Tensor:
    """1/k for each of a token's k experts, with the gradient of the gate g = sign(relu(s - sigmoid(scale G))).

    The backward pass takes sign as the identity, so dg/ds = 1 and dg/dG = -scale sigmoid'(scale G) where the expert's
    score passes its threshold, and 0 elsewhere: also where it is chosen without passing, as in evaluation the best
    expert of a token that would visit nobody.  No gradient flows through k (Guo et al. 2024, arXiv 2405.14297, section
    3.1; public code: ``GAMoEGateT``), but through the same division in the load-balance loss one does
    (:func:`megatron_dynmoe.losses.gate_shares`).

    Args:
        scores_TE: float32 scores of the cosine gate.
        map_TE: bool, the experts that a token visits.
        config: ``cosine_scale``.
        parameters: ``thresholds`` [E], and ``logit_scale`` [1] if it is trained.

    Returns:
        [T, E] in the dtype of the scores; a row of an empty map is 0.
    """
    margin_TE = _margin_TE(scores_TE, config, parameters).relu()
    # where: what is not chosen gets neither weight nor gradient, also if its margin is NaN.
    gate_TE = torch.where(map_TE, 1 + (margin_TE - margin_TE.detach()), margin_TE.new_zeros(()))
    return gate_TE / map_TE.sum(dim=-1, keepdim=True).clamp_min(1)


@register_rule("top-any", parameters=top_any_parameters, weights=top_any_weights, may_be_empty=True)
def top_any_map(scores_TE: Tensor, config: DynMoEConfig, parameters: Mapping[str, Tensor]) -> Tensor:
    """Experts whose score exceeds sigmoid(scale * threshold), strictly (Guo et al. 2024, arXiv 2405.14297, eq. 4).

    Args:
        scores_TE: float32 scores of the cosine gate.
        config: ``cosine_scale``.
        parameters: ``thresholds`` [E], and ``logit_scale`` [1] if it is trained.

    Returns:
        bool [T, E]; a row may be empty, also one with NaN.
    """
    return _margin_TE(scores_TE, config, parameters) > 0
