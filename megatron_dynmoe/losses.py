"""Auxiliary losses of the routers, as pure functions; each with its formula and source.

Those of tokens are means.  With sequence or context parallelism a rank holds a share of a micro-batch's
tokens: pass the micro-batch's totals (``rows_E``, ``num_tokens``, summed over those ranks) and the results of the
ranks add up to the loss of the whole micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_dynmoe.config import COEFFICIENTS

if TYPE_CHECKING:
    from megatron_dynmoe.config import DynMoEConfig
    from megatron_dynmoe.routing import Routing


def load_balance_loss(
    scores_TE: Tensor, *, rows_E: Tensor, num_tokens: Tensor | float, experts: Tensor | int | None = None
) -> Tensor:
    """L_b = E * sum_i f_i Q_i (Huang et al. 2024, eq. 6; at one expert a token Switch, arXiv 2101.03961, eq. 4).

    f_i is the fraction of tokens whose set contains expert i, Q_i the mean score of expert i.  There is no division by
    the number of experts a token visits.  DynMoE's public code has the same with each token's shares g / sum g of the
    0/1 gates g as scores (:func:`gate_shares`), over the tokens that visit anybody: E^2 mean_i(f_i Q_i).

    Args:
        scores_TE: float32 scores of this rank's tokens; gradients flow through Q.
        rows_E: tokens that chose each expert, over the whole micro-batch; no gradient.
        num_tokens: tokens of the whole micro-batch.
        experts: E in the formula, where not all columns are active.

    Returns:
        float32 scalar: this rank's share.
    """
    fraction_E = rows_E.to(scores_TE.dtype) / num_tokens
    mean_score_E = scores_TE.sum(dim=0) / num_tokens
    return (scores_TE.shape[-1] if experts is None else experts) * (fraction_E * mean_score_E).sum()


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


def entropy_loss(scores_TE: Tensor, *, num_tokens: Tensor | float) -> Tensor:
    """L_d = - mean over tokens of sum_i P_i log P_i, in nats (Huang et al. 2024, eq. 7: the dynamic loss).

    Args:
        scores_TE: float32 probabilities; 0 log 0 is 0, with a finite gradient.
        num_tokens: tokens of the whole micro-batch.

    Returns:
        float32 scalar: this rank's share.
    """
    return -torch.xlogy(scores_TE, scores_TE.clamp_min(torch.finfo(scores_TE.dtype).tiny)).sum() / num_tokens


def z_loss(logits_TE: Tensor, *, num_tokens: Tensor | float) -> Tensor:
    """Mean over tokens of (log sum_i exp logit_i)^2 (Zoph et al. 2022, ST-MoE, arXiv 2202.08906, eq. 5).

    Args:
        logits_TE: float32.
        num_tokens: tokens of the whole micro-batch.

    Returns:
        float32 scalar: this rank's share.
    """
    return torch.logsumexp(logits_TE, dim=-1).square().sum() / num_tokens


# Below this Frobenius norm the diversity loss turns from a norm into a parabola.  Cosines of orthogonal float32 vectors
# are off by about 1e-7 each, a matrix of 64 of them by 1e-5: a hundredth of it.
DIVERSITY_SMOOTHING = 1e-3


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


def heterogeneous_balance_loss(
    scores_TC: Tensor, *, rows_C: Tensor, num_tokens: Tensor | float, free: int, tau: float
) -> Tensor:
    """L_b = sum_i eta_i f_i P_i, eta = 1 for FFN experts and tau for zero-computation ones.

    Jin et al. 2024, arXiv 2410.07348, eq. 7; f_i is the fraction of tokens that choose i, P_i its mean probability.
    Unlike Switch's loss there is no factor for the number of experts.

    Args:
        scores_TC: float32 probabilities of this rank's tokens.
        rows_C: tokens that chose each expert, over the whole micro-batch; no gradient.
        num_tokens: tokens of the whole micro-batch.
        free: zero-computation experts, the last columns.
        tau: their weight.

    Returns:
        float32 scalar: this rank's share.
    """
    eta_C = torch.ones_like(rows_C, dtype=scores_TC.dtype)
    eta_C[len(eta_C) - free :] = tau
    return (eta_C * rows_C / num_tokens * scores_TC.sum(dim=0) / num_tokens).sum()


@dataclass(frozen=True)
class Totals:
    """Counts of a whole micro-batch, over the ranks that share its tokens.

    Attributes:
        rows_C: float32, tokens that chose each expert.
        tokens: float32 scalar. routed_tokens: those that chose anybody.
        ranks: how many ranks share the tokens.
    """

    rows_C: Tensor
    tokens: Tensor
    routed_tokens: Tensor
    ranks: int


def has_losses(config: DynMoEConfig) -> bool:
    """Whether :func:`router_losses` gives any, so that nobody counts for none."""
    return any(getattr(config, name) for name in (*COEFFICIENTS, "z_loss_coeff"))


def router_losses(
    routing: Routing, config: DynMoEConfig, totals: Totals, weight_ED: Tensor, active_E: Tensor | None = None
) -> dict[str, tuple[float, Tensor]]:
    """The losses that ``config`` asks for, by the name they are logged under: (coefficient, this rank's share).

    Args:
        routing: of this rank's tokens.
        totals: of the micro-batch.
        weight_ED: the router's weight.
        active_E: bool; unset: all experts are active.
    """
    losses: dict[str, tuple[float, Tensor]] = {}
    if config.load_balance_coeff > 0:
        losses["load_balancing_loss"] = (config.load_balance_coeff, _balance(routing, config, totals, active_E))
    if config.entropy_coeff > 0:
        loss = entropy_loss(routing.scores_TC, num_tokens=totals.tokens)
        losses["entropy_loss"] = (config.entropy_coeff, loss)
    if config.z_loss_coeff:
        losses["z_loss"] = (config.z_loss_coeff, z_loss(routing.logits_TC, num_tokens=totals.tokens))
    if config.efficiency_coeff > 0:
        weights_TC = torch.cat([routing.weights_TE, routing.free_weights_TZ], dim=-1)
        loss = efficiency_loss(weights_TC, routing.map_TC, num_tokens=totals.tokens)
        losses["efficiency_loss"] = (config.efficiency_coeff, loss)
    # The last two are of the router, not of tokens: each rank adds an equal share of them.
    if config.diversity_coeff > 0:
        losses["diversity_loss"] = (config.diversity_coeff, diversity_loss(weight_ED, active_E) / totals.ranks)
    if config.simplicity_coeff > 0:
        losses["simplicity_loss"] = (config.simplicity_coeff, simplicity_loss(weight_ED, active_E) / totals.ranks)
    return losses


def _balance(routing: Routing, config: DynMoEConfig, totals: Totals, active_E: Tensor | None) -> Tensor:
    """The load-balance loss of the rule: over gates' shares and routed tokens for top-any, else over scores."""
    top_any, free = config.rule == "top-any", config.zero_computation_experts
    scores_TC, tokens = routing.scores_TC, totals.tokens
    if top_any:
        scores_TC = gate_shares(torch.cat([routing.weights_TE, routing.free_weights_TZ], dim=-1))
        tokens = totals.routed_tokens
    if free:
        return heterogeneous_balance_loss(scores_TC, rows_C=totals.rows_C, num_tokens=tokens, free=free, tau=config.tau)
    experts = None if active_E is None else active_E.sum()
    return load_balance_loss(scores_TC, rows_E=totals.rows_C, num_tokens=tokens, experts=experts)
