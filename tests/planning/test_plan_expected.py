"""The planner: its expected loads and visits are those of a simulation."""

import math
import random

import pytest

from megatron_dynmoe.planning import Histogram
from megatron_dynmoe.planning.draws import spread, zipf_loads
from megatron_dynmoe.planning.histogram import LayerRouting


def simulate(layer: LayerRouting, group: int, tokens: int) -> tuple[list[int], list[int]]:
    """Draw each token's experts by the definition: independent draws, thrown away unless k of them succeed."""
    dice = random.Random(0)
    experts = range(len(layer.load_E))
    local = len(experts) // group
    loads, visits = [0] * len(experts), [0] * group
    numbers = dice.choices(list(layer.k_mix), list(layer.k_mix.values()), k=tokens)
    for k in numbers:
        chosen: list[int] = []
        while len(chosen) != k:
            chosen = [expert for expert in experts if dice.random() < layer.drawn_E[expert]]
        for expert in chosen:
            loads[expert] += 1
        for rank in {expert // local for expert in chosen}:
            visits[rank] += 1
    return loads, visits


@pytest.mark.parametrize(
    ("mean_k", "exponent", "most"), [(2.0, 0.0, 0), (1.3, 0.8, 0), (2.6, 0.5, 6), (3.0, 2.0, 0), (0.4, 1.0, 0)]
)
def test_expectations_equal_a_simulation(mean_k, exponent, most):
    experts, group, tokens = 8, 4, 20_000
    mix = spread(mean_k, most) if most else Histogram.zipf(experts=experts, mean_k=mean_k).layers[0].k_mix
    layer = LayerRouting(zipf_loads(experts, mean_k, exponent), mix)
    loads, visits = simulate(layer, group, tokens)
    for seen, expected in [*zip(loads, layer.load_E, strict=True), *zip(visits, layer.visits(group), strict=True)]:
        # A count of independent tokens: binomial. Sixty such comparisons at 5 standard deviations fail by chance once
        # in 30 000 runs; 1e-6 is for loads of exactly 1, whose fit is that close.
        deviation = math.sqrt(max(expected * (1 - expected), 0) / tokens)
        assert abs(seen / tokens - expected) <= 5 * deviation + 1e-6


@pytest.mark.parametrize(("experts", "group", "k"), [(16, 4, 2), (16, 4, 13), (64, 8, 6), (8, 8, 3), (6, 1, 2)])
def test_equal_loads_are_hypergeometric(experts, group, k):
    layer = Histogram.zipf(experts=experts, mean_k=k).layers[0]
    others = experts - experts // group
    expected = 1 - math.comb(others, k) / math.comb(experts, k)
    # a few hundred operations on numbers of one sign, in double precision
    assert layer.visits(group) == pytest.approx([expected] * group, rel=1e-10)


def test_fewer_pairs_than_rows_and_never_more_than_ranks():
    for layer in Histogram.zipf(experts=16, mean_k=3.5, exponent=1.0).layers:
        assert sum(layer.load_E) == pytest.approx(3.5)
        pairs = [sum(layer.visits(group)) for group in (1, 2, 4, 8, 16)]
        assert pairs == sorted(pairs)  # more ranks, more pairs
        assert pairs[0] == pytest.approx(1) and pairs[-1] == pytest.approx(3.5)
