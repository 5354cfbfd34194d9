"""The slow, obvious MoE that every fast path is tested against.  Only tests import it.

Dense: every expert computes every token, and what the routing did not choose is multiplied by zero.  Loops, no index
tricks, no parallelism.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def softmax_scores(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """Probabilities over the experts, one token at a time."""
    return torch.stack([torch.softmax((weight_ED @ x_D).float(), dim=0) for x_D in x_TD])


def top_p_set(probabilities: list[float], p: float) -> set[int]:
    """Take experts from the most probable on until their sum exceeds p; the one that crosses is in."""
    chosen: set[int] = set()
    total = 0.0
    for expert in sorted(range(len(probabilities)), key=lambda e: -probabilities[e]):
        chosen.add(expert)
        total += probabilities[expert]
        if total > p:
            break
    return chosen


def top_k_set(probabilities: list[float], k: int) -> set[int]:
    """The k most probable experts."""
    return set(sorted(range(len(probabilities)), key=lambda e: -probabilities[e])[:k])


def cosine_scores(x_TD: Tensor, weight_ED: Tensor, scale: float) -> Tensor:
    """sigmoid(scale * cos(x, w_e)), one pair at a time."""
    cosines = [[torch.dot(x, w) / (torch.dot(x, x) * torch.dot(w, w)).sqrt() for w in weight_ED] for x in x_TD]
    return torch.stack([torch.sigmoid(scale * torch.stack(row)) for row in cosines])


def top_any_set(scores: list[float], thresholds: list[float], active: list[bool], *, training: bool) -> set[int]:
    """Active experts whose score exceeds their threshold; in evaluation the best active one if there are none."""
    chosen = {e for e, score in enumerate(scores) if active[e] and score > thresholds[e]}
    if chosen or training:
        return chosen
    return {max((e for e in range(len(scores)) if active[e]), key=lambda e: scores[e])}


def top_any_balance(x_TD: Tensor, weight_ED: Tensor, thresholds_E: Tensor, scale: float) -> Tensor:
    """E^2 mean_i(f_i Q_i) over the tokens that visit anybody; f_i: share of tokens at i, Q_i: mean of g_i / sum_j g_j.

    As in DynMoE's public code: the gates g are 0 or 1 with the gradient of score minus threshold where that is
    positive, the quotient is differentiated whole, f is not.
    """
    experts, scores_TE = len(weight_ED), cosine_scores(x_TD, weight_ED, scale)
    shares, visits = [], []
    for row in scores_TE:
        margins = [score - torch.sigmoid(scale * bound) for score, bound in zip(row, thresholds_E, strict=True)]
        gates = [1 + m - m.detach() if m > 0 else torch.zeros_like(m) for m in margins]
        if any(m > 0 for m in margins):
            shares.append([gate / sum(gates) for gate in gates])
            visits.append([float(m > 0) for m in margins])
    total = torch.zeros_like(thresholds_E[0])
    for i in range(experts):
        f = sum(visit[i] for visit in visits) / len(visits)
        total = total + f * sum(share[i] for share in shares) / len(shares)
    return experts**2 * total / experts


def tanh_logits(x_TD: Tensor, hidden_HD: Tensor, weight_CH: Tensor) -> Tensor:
    """W_2 tanh(W_1 x), one token at a time."""
    return torch.stack([weight_CH @ torch.tanh(hidden_HD @ x_D) for x_D in x_TD])


def free_experts(x_TD: Tensor, weights_TZ: Tensor, select_C2D: Tensor, values_CD: Tensor, copies: int) -> Tensor:
    """Zero-computation experts in a loop over tokens and experts: constants, copies, and zeros that add nothing."""
    rows = []
    for x_D, weights in zip(x_TD, weights_TZ, strict=True):
        out_D = torch.zeros_like(x_D)
        for c, v_D in enumerate(values_CD):
            a = torch.softmax(select_C2D[c] @ x_D, dim=0)
            out_D = out_D + weights[c] * (a[0] * x_D + a[1] * v_D)
        for c in range(len(values_CD), len(values_CD) + copies):
            out_D = out_D + weights[c] * x_D
        rows.append(out_D)
    return torch.stack(rows)


def heterogeneous_balance(scores: list[list[float]], chosen: list[set[int]], free: int, tau: float) -> float:
    """sum_i eta_i (fraction of tokens that chose i) (mean score of i); eta = tau for the last ``free`` experts."""
    tokens, experts = len(scores), len(scores[0])
    total = 0.0
    for i in range(experts):
        eta = tau if i >= experts - free else 1.0
        total += eta * sum(i in choice for choice in chosen) / tokens * sum(row[i] for row in scores) / tokens
    return total


def adapt(active: list[bool], routed_to: list[set[int]], x_TD: Tensor) -> tuple[list[bool], Tensor | None]:
    """DynMoE's update after tokens ``x`` went to ``routed_to``: how many experts stay, and a new one's embedding."""
    kept = [is_active and any(e in chosen for chosen in routed_to) for e, is_active in enumerate(active)]
    lonely = [x_D for x_D, chosen in zip(x_TD, routed_to, strict=True) if not chosen]
    if not lonely or all(kept):
        return kept, None
    total_D = torch.stack(lonely).sum(dim=0)
    return kept, total_D / total_D.norm()


def expert(x: Tensor, fc1_GD: Tensor, fc2_DF: Tensor, offset: float = 0.0) -> Tensor:
    """One SwiGLU expert: fc2 (silu(gate x) * (up x + offset))."""
    gate, up = (x @ fc1_GD.t()).chunk(2, dim=-1)
    return (F.silu(gate) * (up + offset)) @ fc2_DF.t()


def dense_moe(x_TD: Tensor, weights_TE: Tensor, fc1_EGD: Tensor, fc2_EDF: Tensor, *, offset: float = 0.0) -> Tensor:
    """sum_e weight[t, e] * expert_e(x[t]) with every expert computed for every token."""
    out_TD = torch.zeros_like(x_TD)
    for e in range(weights_TE.shape[1]):
        out_TD = out_TD + weights_TE[:, e : e + 1] * expert(x_TD, fc1_EGD[e], fc2_EDF[e], offset)
    return out_TD


def load_balance(scores: list[list[float]], chosen: list[set[int]]) -> float:
    """E * sum_i (fraction of tokens that chose i) * (mean score of i)."""
    tokens, experts = len(scores), len(scores[0])
    total = 0.0
    for i in range(experts):
        fraction = sum(i in choice for choice in chosen) / tokens
        total += fraction * sum(row[i] for row in scores) / tokens
    return experts * total


def entropy(scores: list[list[float]]) -> float:
    """Mean over tokens of - sum_i P_i log P_i, in nats."""
    return sum(-p * math.log(p) for row in scores for p in row if p > 0) / len(scores)
