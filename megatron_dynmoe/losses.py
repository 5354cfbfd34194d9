"""Auxiliary losses of the routers, as pure functions; each with its formula and source.

Those of tokens are means.  With sequence or context parallelism a rank holds a share of a micro-batch's
tokens: pass the micro-batch's totals (``rows_E``, ``num_tokens``, summed over those ranks) and the results of the
ranks add up to the loss of the whole micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def load_balance_loss(
    scores_TE: Tensor, *, rows_E: Tensor, num_tokens: Tensor | float, experts: Tensor | int | None = None
) -> Tensor:
    """L_b = E * sum_i f_i Q_i (Huang et al. 2024, eq. 6; at one expert a token Switch, arXiv 2101.03961, eq. 4).

    f_i is the fraction of tokens whose set contains expert i, Q_i the mean score of expert i.  There is no division by
    the number of experts a token visits.  DynMoE's public code has the same with each token's shares g / sum g of the
    0/1 gates g as scores
    (:func:`megatron_dynmoe.routers.top_any.gate_shares`), over the tokens that visit anybody: E^2 mean_i(f_i Q_i).

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


def heterogeneous_balance_loss(
    scores_TC: Tensor, *, rows_C: Tensor, num_tokens: Tensor | float, zero_computation: int, tau: float
) -> Tensor:
    """L_b = sum_i eta_i f_i P_i, eta = 1 for FFN experts and tau for zero-computation ones.

    Jin et al. 2024, arXiv 2410.07348, eq. 7; f_i is the fraction of tokens that choose i, P_i its mean probability.
    Unlike Switch's loss there is no factor for the number of experts.

    Args:
        scores_TC: float32 probabilities of this rank's tokens.
        rows_C: tokens that chose each expert, over the whole micro-batch; no gradient.
        num_tokens: tokens of the whole micro-batch.
        zero_computation: zero-computation experts, the last columns.
        tau: their weight.

    Returns:
        float32 scalar: this rank's share.
    """
    eta_C = torch.ones_like(rows_C, dtype=scores_TC.dtype)
    eta_C[len(eta_C) - zero_computation :] = tau
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
