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


def sigmoid_scores(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """1 / (1 + exp(-w_e x)), one pair at a time."""
    return torch.stack([torch.stack([1 / (1 + torch.exp(-torch.dot(x, w))) for w in weight_ED]) for x in x_TD])


def threshold_weights(
    scores_TE: Tensor, logits_E: Tensor | None, t: float, *, keep_best: bool, normalize: bool
) -> list[dict[int, Tensor]]:
    """For each token its experts and their weights: those above t, or above 1 / (1 + exp(-G_e)) if G is learned.

    A weight is score times step, and the step's derivative is taken to be 1 where the step is.
    """
    tokens = []
    for row in scores_TE:
        chosen = {}
        for e, score in enumerate(row):
            bound = t if logits_E is None else 1 / (1 + torch.exp(-logits_E[e]))
            if score > bound:
                margin = score - bound
                chosen[e] = score if logits_E is None else score * (1 + margin - margin.detach())
        if not chosen and keep_best:
            best = max(range(len(row)), key=lambda e: row[e])
            chosen[best] = row[best]
        total = sum(chosen.values()) if normalize else 1
        tokens.append({e: weight / total for e, weight in chosen.items()})
    return tokens


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


def heterogeneous_balance(
    scores: list[list[float]], chosen: list[set[int]], zero_computation: int, tau: float
) -> float:
    """sum_i eta_i (fraction of tokens that chose i) (mean score of i); eta = tau for the last ``zero_computation``."""
    tokens, experts = len(scores), len(scores[0])
    total = 0.0
    for i in range(experts):
        eta = tau if i >= experts - zero_computation else 1.0
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


def grouped_experts(
    rows_ND: Tensor,
    weights_N: Tensor,
    fc1_LGD: Tensor,
    fc2_LDF: Tensor,
    rows_per_expert: list[int],
    offset: float = 0.0,
) -> Tensor:
    """weight * expert(row), one row at a time; rows are ordered by expert."""
    owners = [index for index, rows in enumerate(rows_per_expert) for _ in range(rows)]
    outputs = [
        weight * expert(row_D.unsqueeze(0), fc1_LGD[owner], fc2_LDF[owner], offset)
        for owner, row_D, weight in zip(owners, rows_ND, weights_N, strict=True)
    ]
    return torch.cat([*outputs, rows_ND[:0] + (weights_N.sum() + fc1_LGD.sum() + fc2_LDF.sum()) * 0])


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


def float8(value: float, kind: str) -> float:
    """The nearest number of the format, ties to even; the largest one where that is too small, NaN of infinities."""
    mantissa, least, largest = {"e4m3": (3, -6, 448.0), "e5m2": (2, -14, 57344.0)}[kind]
    if not math.isfinite(value):
        return math.nan
    exponent = max(math.frexp(value)[1] - 1, least)
    step = 2.0 ** (exponent - mantissa)
    return max(-largest, min(largest, round(value / step) * step))


def fp8_scale(amax: Tensor, kind: str, power_of_two: bool = False) -> Tensor:
    """The largest number of the format over amax, float32; 1 where amax says nothing."""
    if not (amax > 0 and amax.isfinite()):
        return torch.tensor(1.0)
    scale = torch.tensor({"e4m3": 448.0, "e5m2": 57344.0}[kind]) / amax.float()
    if scale.isinf():
        scale = torch.tensor(torch.finfo(torch.float32).max)
    return torch.tensor(2.0 ** (math.frexp(scale.item())[1] - 1)) if power_of_two else scale


def fp8_cast(x: Tensor, rows: int, columns: int, kind: str, scale: Tensor | None = None, two: bool = False) -> Tensor:
    """Through float8 and back, block after block of at most ``rows`` x ``columns``, number after number."""
    out = torch.empty_like(x, dtype=torch.float32)
    for i in range(0, x.shape[0], rows):
        for j in range(0, x.shape[1], columns):
            block = x[i : i + rows, j : j + columns].float()
            factor = fp8_scale(block.abs().max(), kind, two) if scale is None else scale
            back = 1 / factor
            values = [[float8(value, kind) for value in row] for row in (block * factor).tolist()]
            out[i : i + rows, j : j + columns] = torch.tensor(values) * back
    return out


def fp8_linear(
    x: Tensor, weight: Tensor, grad: Tensor, scaling: str, format: str, scales: list[Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """x W^T of one expert and both gradients, all operands cast for each of the three products; sums in float64.

    Args:
        scales: of input, weight and gradient with "delayed" scaling.
    """
    back = "e5m2" if format == "hybrid" else "e4m3"
    (n, i), o = x.shape, weight.shape[0]
    along, across = {"blockwise": (128, 128), "rowwise": (max(n, i, o),) * 2}.get(scaling, (None, None))
    of_x, of_w, of_g = scales or [None] * 3
    if along is None:  # a scale for each tensor
        x_1 = x_2 = fp8_cast(x, n, i, "e4m3", of_x)
        w_1 = w_2 = fp8_cast(weight, o, i, "e4m3", of_w)
        g_1 = g_2 = fp8_cast(grad, n, o, back, of_g)
    else:
        two = scaling == "blockwise"
        x_1, x_2 = fp8_cast(x, 1, along, "e4m3", two=two), fp8_cast(x, along, 1, "e4m3", two=two)
        g_1, g_2 = fp8_cast(grad, 1, along, back, two=two), fp8_cast(grad, along, 1, back, two=two)
        w_1 = fp8_cast(weight, across if two else 1, across, "e4m3", two=two)
        w_2 = fp8_cast(weight, across, across if two else 1, "e4m3", two=two)
    x_1, x_2, w_1, w_2, g_1, g_2 = (t.double() for t in (x_1, x_2, w_1, w_2, g_1, g_2))
    return x_1 @ w_1.t(), g_1 @ w_2, g_2.t() @ x_2


def delayed_scales(amaxes: list[float], length: int, algorithm: str, margin: int, largest: float) -> list[float]:
    """The scale after each step, from the amax of the steps so far."""
    scale, scales = 1.0, []
    for step in range(len(amaxes)):
        seen = amaxes[max(0, step - length + 1) : step + 1]
        seen = seen[-1:] if algorithm == "most_recent" else seen
        if all(math.isfinite(amax) for amax in seen) and max(seen) > 0:
            scale = largest / max(seen) / 2**margin
        scales.append(scale)
    return scales
