"""Which experts tokens visit, in expectation: rows for each expert, and how often a token visits a rank at all.

Rows follow from each expert's load alone.  Distinct (token, rank) pairs also depend on which experts a token visits
*together*, which no log says.  The distribution assumed is the one of maximum entropy among those with the given loads
and the given numbers of experts per token: experts are drawn independently with probabilities p_e, given that k of
them are drawn (conditional Poisson sampling; Chen, Dempster and Liu 1994, Biometrika 81(3)).  With equal loads it is
the choice of k different experts at random, whose pairs are hypergeometric.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_dynmoe.planning.shapes import PlanError, require

# A Zipf law says how popular experts are, not which rank holds them. So many random assignments are averaged.
PLACEMENTS = 8
SEED = 0


@dataclass(frozen=True)
class LayerRouting:
    """The routing of one layer.

    Attributes:
        load_E: probability that a token visits each expert; sums to the mean number of experts per token.
        k_mix: how many experts tokens visit: probability by number.
    """

    load_E: tuple[float, ...]
    k_mix: Mapping[int, float]
    _visits: dict[int, list[float]] = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def drawn_E(self) -> list[float]:
        """p_e: the probabilities of the independent draws whose conditioned loads are :attr:`load_E`."""
        return fit_draws(self.load_E, self.k_mix)

    def visits(self, ranks: int) -> list[float]:
        """Probability that a token visits each of ``ranks`` ranks: expected pairs a token."""
        if ranks not in self._visits:
            self._visits[ranks] = self._count_visits(len(self.load_E) // ranks)
        return self._visits[ranks]

    def _count_visits(self, local: int) -> list[float]:
        """1 - P(none of a rank's experts): all k are drawn from those before and those behind."""
        drawn, most = self.drawn_E, max(self.k_mix)
        starts = range(0, len(drawn), local)
        before, behind = [[1.0] + [0.0] * most], [[1.0] + [0.0] * most]
        for first in starts:
            before.append(_count_drawn(drawn[first : first + local], before[-1]))
        for first in reversed(starts):
            behind.append(_count_drawn(drawn[first : first + local], behind[-1]))
        visits = []
        for rank, first in enumerate(starts):
            left, right = before[rank], behind[len(starts) - 1 - rank]
            none_here = math.prod(1 - p for p in drawn[first : first + local])
            others = {k: sum(left[j] * right[k - j] for j in range(k + 1)) for k in self.k_mix}
            visits.append(1 - none_here * sum(share * others[k] / before[-1][k] for k, share in self.k_mix.items()))
        return visits

    def placed(self, order: Sequence[int]) -> LayerRouting:
        """The same routing with expert ``order[i]`` in place i."""
        same = LayerRouting(tuple(self.load_E[expert] for expert in order), self.k_mix)
        vars(same)["drawn_E"] = [self.drawn_E[expert] for expert in order]  # the fit does not depend on the order
        return same


def _count_drawn(drawn: Sequence[float], count: Sequence[float]) -> list[float]:
    """P(k have been drawn) after more draws, from what it was before them; k up to the same bound."""
    count = list(count)
    for p in drawn:
        for k in range(len(count) - 1, 0, -1):
            count[k] += p * (count[k - 1] - count[k])
        count[0] *= 1 - p
    return count


def _conditioned_loads(drawn: Sequence[float], k_mix: Mapping[int, float]) -> list[float]:
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
        loads = _conditioned_loads(drawn, k_mix)
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


@dataclass(frozen=True)
class Histogram:
    """The routing of all MoE layers; if there are more layers than entries, entries repeat in turn."""

    layers: tuple[LayerRouting, ...]
    source: str

    def layer(self, index: int) -> LayerRouting:
        """Of MoE layer ``index``, counted without dense layers."""
        return self.layers[index % len(self.layers)]

    @classmethod
    def zipf(cls, *, experts: int, mean_k: float, exponent: float = 0.0) -> Histogram:
        """Loads of a Zipf law (uniform with exponent 0), averaged over random placements of experts on ranks.

        Raises:
            PlanError: a mean above the number of experts, a negative exponent.
        """
        _require_mean(mean_k, experts)
        require(math.isfinite(exponent) and exponent >= 0, "zipf exponent", exponent, "a number of at least 0")
        layer = LayerRouting(zipf_loads(experts, mean_k, exponent), neighbours(mean_k))
        if exponent == 0:
            return cls((layer,), f"uniform, mean k {mean_k:g}")
        return cls(_placements(layer, PLACEMENTS), f"Zipf with exponent {exponent:g}, mean k {mean_k:g}")

    @classmethod
    def measured(cls, path: Path, *, experts: int, moe_layers: int) -> Histogram:
        """The last training record of the file that ``--moe-metrics-file`` wrote.

        It says the mean number of experts per token of each layer, its 99th percentile, and the busiest expert's share
        over the mean share.  From these: experts per token are spread up to the percentile (:func:`spread`), and loads
        follow the Zipf law whose busiest expert has that share.  Where the run had as many MoE layers as the model,
        each layer keeps its own mean; else all have the overall mean.

        Raises:
            PlanError: the file is missing, is not such a file, or does not suit the model.
        """
        record = _last_record(path)
        try:
            means = [float(value) for value in record["experts_per_token_by_layer"].values()]
            p99, imbalance = int(record["experts_per_token_p99"]), float(record["load_imbalance"])
            overall = float(record["experts_per_token"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PlanError(
                f"{path} has no routing in its last record ({error!r}); give a --moe-metrics-file."
            ) from None
        require(1 <= imbalance <= experts, f"load_imbalance in {path}", imbalance, f"1 to the {experts} experts")
        if len(means) != moe_layers:
            means = [overall] * min(PLACEMENTS, moe_layers)
        layers: list[LayerRouting] = []
        for index, mean in enumerate(means):
            _require_mean(mean, experts, f" in {path}")
            loads = zipf_loads(experts, mean, _exponent_of(imbalance, experts, mean))
            layer = LayerRouting(loads, spread(mean, min(max(p99, math.ceil(mean)), experts)))
            layers += _placements(layer, 1, seed=index)
        return cls(tuple(layers), f"{path}, iteration {record.get('iteration')}, mean k {overall:.3g}")


def _require_mean(mean_k: float, experts: int, where: str = "") -> None:
    accepted = math.isfinite(mean_k) and 0 < mean_k <= experts
    require(accepted, f"mean experts per token{where}", mean_k, f"a number above 0 and at most {experts}, the experts")


def _placements(layer: LayerRouting, count: int, *, seed: int = SEED) -> tuple[LayerRouting, ...]:
    dice = random.Random(seed)
    experts = range(len(layer.load_E))
    return tuple(layer.placed(dice.sample(experts, len(experts))) for _ in range(count))


def _exponent_of(imbalance: float, experts: int, mean_k: float) -> float:
    """The Zipf exponent whose largest load is ``imbalance`` times the mean load, or the largest that loads can be."""
    low, high = 0.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        if zipf_loads(experts, mean_k, middle)[0] * experts / mean_k < imbalance:
            low = middle
        else:
            high = middle
    return low


def _last_record(path: Path) -> dict[str, Any]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"{path} cannot be read ({error}); give a file that --moe-metrics-file wrote.") from None
    found: dict[str, Any] | None = None
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError:
            raise PlanError(f"{path}, line {number}, is not JSON; give a file that --moe-metrics-file wrote.") from None
        if isinstance(record, dict) and "seconds_per_iteration" in record:  # a record of training, not of evaluation
            found = record
    if found is None:
        raise PlanError(f"{path} has no record of training; give a file that --moe-metrics-file wrote in a run.")
    return found
