"""The threshold rule: every expert whose score passes a threshold, fixed or learned for each expert."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_dynmoe.ranges import Range
from megatron_dynmoe.routers.registry import register_rule
from megatron_dynmoe.routers.route import best_of_none, finish_weights
from megatron_dynmoe.routers.settings import Settings, setting

if TYPE_CHECKING:
    from megatron_dynmoe.routers.router_config import RouterConfig


@dataclass(frozen=True, kw_only=True)
class Threshold(Settings):
    """Settings of rule 'threshold'."""

    threshold: float = setting(0.1, Range(0, 1), symbol="t")
    """Score in [0, 1] that an expert's must exceed under rule 'threshold'; where thresholds are learned, the one that
    all experts start from."""

    learned_thresholds: bool = setting(False)
    """Learn a threshold for each expert."""

    threshold_keep_best: bool = setting(True)
    """A token whose scores all fail visits its best expert all the same; without, it visits none while training, and
    its output is 0 there."""

    def check(self) -> None:
        """A learned threshold is the sigmoid of what is learned."""
        inside = 0 < self.threshold < 1 or not self.learned_thresholds
        self.require("threshold", inside, "above 0 and below 1 with --moe-learned-thresholds")

    def check_router(self, config: RouterConfig) -> None:
        """Weights made of logits alone would leave learned thresholds without a gradient."""
        fits = not (self.learned_thresholds and config.drop_zero_weight)
        self.require("learned_thresholds", fits, "off with --moe-drop-zero-weight")


def threshold_parameters(config: RouterConfig, experts: int, width: int) -> dict[str, Tensor]:
    """``thresholds`` [E], logits of the thresholds, if they are learned."""
    if not config.learned_thresholds:
        return {}
    return {"thresholds": torch.full((experts,), math.log(config.threshold / (1 - config.threshold)))}


def _level(config: RouterConfig, parameters: Mapping[str, Tensor]) -> Tensor | float:
    return parameters["thresholds"].sigmoid() if config.learned_thresholds else config.threshold


def threshold_weights(
    scores_TE: Tensor, map_TE: Tensor, config: RouterConfig, parameters: Mapping[str, Tensor]
) -> Tensor:
    """The chosen experts' scores, with the gradient of the gate g = [s > sigmoid(G)] where thresholds are learned.

    A weight is then s g, and the backward pass takes the step as the identity where it is 1, and as nothing elsewhere:
    the straight-through estimator (Bengio et al. 2013, arXiv 1308.3432, section 4) as DynMoE has it for its thresholds
    (Guo et al. 2024, arXiv 2405.14297, section 3.1).  So dw/ds = 1 + s and dw/dG = -s sigmoid'(G).  An expert that is
    kept as the best one without passing has g = 1 for good: dw/ds = 1 and dw/dG = 0.

    Args:
        scores_TE: float32.
        map_TE: bool, the experts that a token visits.
        config: ``learned_thresholds``, ``normalize_weights``.
        parameters: ``thresholds`` [E], if they are learned.

    Returns:
        [T, E] in the dtype of the scores; 0 where not chosen.
    """
    if config.learned_thresholds:
        margin_TE = scores_TE - _level(config, parameters)
        step_TE = 1 + (margin_TE - margin_TE.detach())
        # where: what does not pass, NaN among it, gives its threshold no gradient.
        scores_TE = scores_TE * torch.where(map_TE & (margin_TE > 0), step_TE, 1.0)
    return finish_weights(scores_TE, map_TE, normalize=config.normalize_weights)


def threshold_log(
    config: RouterConfig, parameters: Mapping[str, Tensor], active_E: Tensor | None = None
) -> dict[str, Tensor]:
    """The mean of the learned thresholds, as scores, and their least, mean and greatest."""
    if not config.learned_thresholds:
        return {}
    level_E = parameters["thresholds"].float().sigmoid()
    return {
        "threshold": level_E.mean(),
        "thresholds": torch.stack([level_E.amin(), level_E.mean(), level_E.amax()]),
    }


@register_rule(
    "threshold",
    settings=Threshold,
    parameters=threshold_parameters,
    weights=threshold_weights,
    log=threshold_log,
    may_be_empty=True,
)
def threshold_map(scores_TE: Tensor, config: RouterConfig, parameters: Mapping[str, Tensor]) -> Tensor:
    """All experts whose score passes --moe-threshold, or one learned for each of them.

    Args:
        scores_TE: float32, -inf for experts that there are not to choose from.
        config: ``threshold``, ``learned_thresholds``, ``threshold_keep_best``.
        parameters: ``thresholds`` [E], if they are learned.

    Returns:
        bool [T, E].  A score that equals the threshold does not pass; nor does NaN, which counts as the best one where
        that is kept, so that it reaches the loss and is reported there.
    """
    map_TE = scores_TE > _level(config, parameters)
    return map_TE | best_of_none(map_TE, scores_TE) if config.threshold_keep_best else map_TE
