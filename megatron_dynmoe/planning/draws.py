"""Loads of experts and draws of them, as plain numbers.

The distribution of the experts that a token visits together is the one of maximum entropy among those with given loads
and given numbers of experts per token: experts are drawn independently with probabilities p_e, given that k of them are
drawn (conditional Poisson sampling; Chen, Dempster and Liu 1994, Biometrika 81(3)).  With equal loads it is the choice
of k different experts at random, whose pairs are hypergeometric.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence


def count_drawn(drawn: Sequence[float], count: Sequence[float]) -> list[float]:
    """P(k have been drawn) after more draws, from what it was before them; k up to the same bound."""
    count = list(count)
    for p in drawn:
        for k in range(len(count) - 1, 0, -1):
            count[k] += p * (count[k - 1] - count[k])
        count[0] *= 1 - p
    return count


def conditioned_loads(drawn: Sequence[float], k_mix: Mapping[int, float]) -> list[float]:
    """P(expert e is among those drawn), given that k are, k being distributed as ``k_mix``: forward and backward."""
    most = max(k_mix)
    forward = [[1.0] + [0.0] * most]
    for p in drawn:
        last = forward[-1]
        forward.append([last[0] * (1 - p)] + [last[k] * (1 - p) + last[k - 1] * p for k in range(1, most + 1)])
    # backward[k]: weight of everything that can follow when k have been drawn so far
    backward = [k_mix.get(k, 0.0) / forward[-1][k] if k_mix.get(k, 0.0) else 0.0 for k in range(most + 1)]
    loads = []
    for index in range(len(drawn) - 1, -1, -1):
        p, before = drawn[index], forward[index]
        loads.append(p * sum(before[k] * backward[k + 1] for k in range(most)))
        backward = [(1 - p) * backward[k] + p * backward[k + 1] for k in range(most)] + [(1 - p) * backward[most]]
    return loads[::-1]


def fit_draws(load_E: Sequence[float], k_mix: Mapping[int, float], *, tolerance: float = 1e-7) -> list[float]:
    """The draws whose conditioned loads are ``load_E``.

    A fixed point in the odds: each step multiplies an expert's odds by (wanted odds / odds now). Loads of 0 and 1 stay.
    """
    drawn = list(load_E)
    for _ in range(300):
        loads = conditioned_loads(drawn, k_mix)
        if all(abs(now - wanted) < tolerance for now, wanted in zip(loads, load_E, strict=True)):
            break
        for expert, (now, wanted) in enumerate(zip(loads, load_E, strict=True)):
            if 0 < wanted < 1 and 0 < now < 1:
                odds = drawn[expert] / (1 - drawn[expert]) * (wanted / now) * ((1 - now) / (1 - wanted))
                drawn[expert] = odds / (1 + odds)
    return drawn


def neighbours(mean_k: float) -> dict[int, float]:
    """The two whole numbers next to ``mean_k``, with that mean."""
    low = math.floor(mean_k)
    return {k: share for k, share in ((low, 1 - (mean_k - low)), (low + 1, mean_k - low)) if share > 0}


def spread(mean_k: float, most: int) -> dict[int, float]:
    """1 to ``most`` experts with the given mean, otherwise of maximum entropy: P(k) proportional to x^k."""
    if not 1 < mean_k < most or most <= 2:
        return neighbours(mean_k)

    def mix(log_x: float) -> dict[int, float]:
        top = max(log_x, most * log_x)  # keeps the exponentials in range
        weights = {k: math.exp(k * log_x - top) for k in range(1, most + 1)}
        return {k: weight / sum(weights.values()) for k, weight in weights.items()}

    low, high = -30.0, 30.0
    for _ in range(100):
        middle = (low + high) / 2
        if sum(k * share for k, share in mix(middle).items()) < mean_k:
            low = middle
        else:
            high = middle
    return {k: share for k, share in mix(low).items() if share > 1e-12}


def zipf_loads(experts: int, mean_k: float, exponent: float) -> tuple[float, ...]:
    """Loads proportional to rank^-exponent that sum to ``mean_k``.

    A token visits an expert once at most, so what a share exceeds 1 by (below one expert per token: ``mean_k``) goes to
    the others in proportion.
    """
    most = min(1.0, mean_k)
    shares = [(place + 1) ** -exponent for place in range(experts)]
    for full in range(experts):
        scale = (mean_k - full * most) / sum(shares[full:])
        if scale * shares[full] <= most:
            return tuple([most] * full + [scale * share for share in shares[full:]])
    return (most,) * experts


def exponent_of(imbalance: float, experts: int, mean_k: float) -> float:
    """The Zipf exponent whose largest load is ``imbalance`` times the mean load, or the largest that loads can be."""
    low, high = 0.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        if zipf_loads(experts, mean_k, middle)[0] * experts / mean_k < imbalance:
            low = middle
        else:
            high = middle
    return low
