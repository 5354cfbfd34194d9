"""Which experts tokens visit, in expectation: rows for each expert, and how often a token visits a rank at all.

Rows follow from each expert's load alone.  Distinct (token, rank) pairs also depend on which experts a token visits
*together*, which no log says; draws.py says what is assumed.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from megatron_dynmoe.planning.draws import count_drawn, exponent_of, fit_draws, neighbours, spread, zipf_loads
from megatron_dynmoe.planning.shapes import PlanError, require
from megatron_dynmoe.records import WANTED, training_records

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
            before.append(count_drawn(drawn[first : first + local], before[-1]))
        for first in reversed(starts):
            behind.append(count_drawn(drawn[first : first + local], behind[-1]))
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
        records = list(training_records(path, PlanError))
        if not records:
            raise PlanError(f"{path} has no record of training; {WANTED} in a run.")
        where, record = records[-1]
        try:
            means = [float(value) for value in record["experts_per_token_by_layer"].values()]
            p99, imbalance = int(record["experts_per_token_p99"]), float(record["load_imbalance"])
            overall = float(record["experts_per_token"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PlanError(f"{where}, has no routing ({error!r}); {WANTED}.") from None
        require(1 <= imbalance <= experts, f"load_imbalance in {path}", imbalance, f"1 to the {experts} experts")
        if len(means) != moe_layers:
            means = [overall] * min(PLACEMENTS, moe_layers)
        layers: list[LayerRouting] = []
        for index, mean in enumerate(means):
            _require_mean(mean, experts, f" in {path}")
            loads = zipf_loads(experts, mean, exponent_of(imbalance, experts, mean))
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
