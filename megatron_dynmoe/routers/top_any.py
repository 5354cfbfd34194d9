"""The top-any rule of DynMoE: every expert whose score passes that expert's own learned threshold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_dynmoe.ranges import COEFFICIENT, COUNT, MOST, Range
from megatron_dynmoe.routers.adaptation import Adaptation
from megatron_dynmoe.routers.auxiliary import balance
from megatron_dynmoe.routers.cosine import cosine_scale
from megatron_dynmoe.routers.registry import Loss, Routed, register_preset, register_rule
from megatron_dynmoe.routers.settings import Settings, setting

if TYPE_CHECKING:
    from megatron_dynmoe.routers.router_config import RouterConfig


@dataclass(frozen=True, kw_only=True)
class TopAny(Settings):
    """Settings of rule 'top-any'."""

    efficiency_coeff: float = setting(0.0, COEFFICIENT, training=True)
    """Weight of the efficiency loss, the share of all (token, expert) pairs that is routed (rule 'top-any')."""

    adaptive_experts: bool = setting(False)
    """Let the number of experts adapt: --num-experts are slots, those that no token visits are removed, and slots are
    added where tokens visit nobody (DynMoE; needs rule 'top-any')."""

    initial_experts: int | None = setting(None, COUNT._replace(optional=True), training=True)
    """Slots that are active at the start of training, with --moe-adaptive-experts; unset: all."""

    record_from: int = setting(300, Range(0, MOST, whole=True), training=True)
    """Iteration of a period from which routing is recorded; 0 is the first."""

    update_at: int = setting(600, COUNT, training=True)
    """Iteration of a period at whose start experts are removed and added, and the recording ends."""

    update_period: int = setting(900, Range(0, MOST, whole=True), training=True)
    """Iterations from one update to the next; 0: only by hand."""

    max_added_experts: int = setting(1, COUNT, training=True)
    """Experts added in one update at most; DynMoE adds one."""

    added_expert_init: str = setting("keep", ["keep", "fresh", "copy"], training=True)
    """Weights of an added expert: 'keep', what its slot holds (DynMoE); 'fresh', newly initialised; 'copy', those of
    the most similar active expert. With the last two its optimizer state starts again."""

    def check(self) -> None:
        """A start needs adaptation, and a window must end within its period."""
        fits = self.initial_experts is None or self.adaptive_experts
        self.require("initial_experts", fits, "unset, or --moe-adaptive-experts")
        start, end, period = self.record_from, self.update_at, self.update_period
        wanted = f"after --moe-record-from {start}, at most --moe-update-period {period}: else the window never ends"
        self.require("update_at", period == 0 or start < end <= period, wanted)

    def check_router(self, config: RouterConfig) -> None:
        """Slots are FFN experts alone."""
        combined = bool(config.zero_computation_experts or config.gating_residual)
        wanted = "off: slots are not combined with zero-computation experts or gating residuals yet"
        self.require("adaptive_experts", not (self.adaptive_experts and combined), wanted)

    def check_columns(self, config: RouterConfig, experts: int) -> None:
        """As many slots as are to be active."""
        fits = self.initial_experts is None or self.initial_experts <= experts
        self.require("initial_experts", fits, f"at most {experts}, the slots of --num-experts")


def gate_shares(weights_TE: Tensor) -> Tensor:
    """g / sum g of each token's 0/1 gates g, differentiated through both, as in DynMoE's public code (sharded_moe.py).

    The values are those of ``weights_TE``.  With respect to g_j the gradient of share i is [i = j] / k - g_i / k^2:
    it shifts shares between a token's experts.  With k held constant, as where the experts' outputs are weighted, the
    second term is missing; then the load-balance loss pushes every chosen score down and every threshold up.

    Args:
        weights_TE: 1/k for each chosen expert, with the gates' gradient; k is constant there.

    Returns:
        [T, E]; 0 for a token without experts.
    """
    # w = g / k, so w / sum w = g / sum g, also differentiated
    return weights_TE / weights_TE.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(weights_TE.dtype).tiny)


def efficiency_loss(weights_TE: Tensor, map_TE: Tensor, *, num_tokens: Tensor | float) -> Tensor:
    """Mean over tokens and experts of the 0/1 gates (DynMoE's public code): the routed share of all pairs.

    Args:
        weights_TE: 1/k for each chosen expert, with the gates' gradient.
        map_TE: bool.
        num_tokens: tokens of the whole micro-batch.

    Returns:
        float32 scalar: this rank's share.
    """
    return (weights_TE * map_TE.sum(dim=-1, keepdim=True)).sum() / (num_tokens * map_TE.shape[-1])


def _efficiency(routed: Routed) -> Tensor:
    routing = routed.routing
    return efficiency_loss(routing.weights_TC, routing.map_TC, num_tokens=routed.totals.tokens)


def _balance(routed: Routed) -> Tensor:
    """Over the tokens that visit anybody, with shares of the gates as scores."""
    return balance(routed, gate_shares(routed.routing.weights_TC), routed.totals.routed_tokens)


def top_any_parameters(config: RouterConfig, experts: int, width: int) -> dict[str, Tensor]:
    """``thresholds`` [E], G in the paper, 0 at the start: about half of the experts are chosen."""
    return {"thresholds": torch.zeros(experts)}


def _margin_TE(scores_TE: Tensor, config: RouterConfig, parameters: Mapping[str, Tensor]) -> Tensor:
    return scores_TE - torch.sigmoid(cosine_scale(config, parameters) * parameters["thresholds"])


def top_any_weights(
    scores_TE: Tensor, map_TE: Tensor, config: RouterConfig, parameters: Mapping[str, Tensor]
) -> Tensor:
    """1/k for each of a token's k experts, with the gradient of the gate g = sign(relu(s - sigmoid(scale G))).

    The backward pass takes sign as the identity, so dg/ds = 1 and dg/dG = -scale sigmoid'(scale G) where the expert's
    score passes its threshold, and 0 elsewhere: also where it is chosen without passing, as in evaluation the best
    expert of a token that would visit nobody.  No gradient flows through k (Guo et al. 2024, arXiv 2405.14297, section
    3.1; public code: ``GAMoEGateT``), but through the same division in the load-balance loss one does
    (:func:`gate_shares`).

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


def threshold_log(config: RouterConfig, parameters: Mapping[str, Tensor], active_E: Tensor | None) -> dict[str, Tensor]:
    """The mean threshold of the active experts, and their least, mean and greatest; 0 where nobody is active."""
    thresholds_E = parameters["thresholds"].float()
    out_E = torch.zeros_like(thresholds_E, dtype=torch.bool) if active_E is None else ~active_E
    count = (~out_E).sum()
    mean = thresholds_E.masked_fill(out_E, 0).sum() / count.clamp_min(1)
    ends = thresholds_E.masked_fill(out_E, torch.inf).amin(), thresholds_E.masked_fill(out_E, -torch.inf).amax()
    least, most = (torch.where(count > 0, end, 0.0) for end in ends)
    return {"threshold": mean, "thresholds": torch.stack([least, mean, most])}


@register_rule(
    "top-any",
    settings=TopAny,
    gates=("cosine",),
    parameters=top_any_parameters,
    weights=top_any_weights,
    losses=(
        Loss("load_balancing_loss", "load_balance_coeff", _balance),
        Loss("efficiency_loss", "efficiency_coeff", _efficiency),
    ),
    may_be_empty=True,
    controller=Adaptation,
    log=threshold_log,
)
def top_any_map(scores_TE: Tensor, config: RouterConfig, parameters: Mapping[str, Tensor]) -> Tensor:
    """All experts whose score passes their own learned threshold, perhaps none (DynMoE; needs gate 'cosine').

    The score exceeds sigmoid(scale * threshold), strictly (Guo et al. 2024, arXiv 2405.14297, eq. 4).

    Args:
        scores_TE: float32 scores of the cosine gate.
        config: ``cosine_scale``.
        parameters: ``thresholds`` [E], and ``logit_scale`` [1] if it is trained.

    Returns:
        bool [T, E]; a row may be empty, also one with NaN.
    """
    return _margin_TE(scores_TE, config, parameters) > 0


# Guo et al. 2024, arXiv 2405.14297: top-any gating, both losses at 1e-2; scale and schedule are those of the public
# code's DeepSpeed layer (scale 1, not trained; record from 300, update at 600, period 900).
register_preset(
    "dynmoe",
    {
        "gate": "cosine",
        "rule": "top-any",
        "diversity_coeff": 1e-2,
        "simplicity_coeff": 1e-2,
        "adaptive_experts": True,
    },
)
