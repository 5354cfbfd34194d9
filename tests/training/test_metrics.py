"""Statistics from routing maps, by hand; parameter counts of the paper's models."""

from types import SimpleNamespace

import pytest
import torch

from megatron_dynmoe.metrics import RoutingStats
from megatron_dynmoe.model_shape import ModelShape

# Dynamic MoE, arXiv 2403.07652: 24 layers of width 1024, 16 heads of 64, LLaMA-2 vocabulary, experts of width 2816.
PAPER = {
    "width": 1024,
    "heads": 16,
    "head_width": 64,
    "query_groups": 16,
    "dense_width": 2816,
    "expert_width": 2816,
    "vocabulary": 32000,
}


def routing(map_TE, map_TZ=None, cut=0, dropped=0):
    """A routing as far as statistics read it."""
    map_TZ = torch.zeros(len(map_TE), 0, dtype=torch.bool) if map_TZ is None else torch.tensor(map_TZ)
    counts = {"cut": torch.tensor(cut), "dropped": torch.tensor(dropped)}
    return SimpleNamespace(map_TE=torch.as_tensor(map_TE), map_TZ=map_TZ, **counts)


def test_statistics_by_hand():
    stats = RoutingStats(num_layers=3, num_experts=2)
    # layer 0: tokens visit 1, 2 and 0 experts; layer 2: both tokens visit both experts; layer 1 is dense
    stats.add(0, routing([[True, False], [True, True], [False, False]]))
    stats.add(2, routing(torch.ones(2, 2, dtype=torch.bool)))
    stats.add(2, routing(torch.ones(1, 2, dtype=torch.bool)))
    summary = stats.reduce()
    assert summary.experts_per_token_by_layer == {0: 1.0, 2: 2.0}
    assert summary.experts_per_token == 1.5
    assert summary.routed_rows == 9
    assert summary.tokens == 3
    assert summary.experts_per_token_p99 == 2
    # layer 0: 2 and 1 rows, so the busiest has 4/3 of the mean; layer 2 is even
    assert summary.load_imbalance == pytest.approx((4 / 3 + 1) / 2)
    assert stats.reduce().tokens == 0  # it started again


def test_zero_computation_experts_by_hand():
    """Two constants and a zero expert: a token counts once for a kind, however many of it it chose."""
    stats = RoutingStats(num_layers=2, num_experts=1, kinds={"constant": 2, "copy": 0, "zero": 1})
    free = [[True, True, False], [False, True, True], [False, False, False], [False, False, True]]
    stats.add(1, routing([[True], [False], [True], [False]], free, cut=3, dropped=5))
    valid = torch.tensor([True, False, False, True])
    stats.add(1, routing([[True], [False], [True], [False]], free), valid)
    summary = stats.reduce()
    assert summary.kinds_by_layer == {1: {"constant": pytest.approx(3 / 6), "zero": pytest.approx(3 / 6)}}
    assert summary.unrouted_by_layer == {1: pytest.approx(3 / 6)}
    assert (summary.cut_rows, summary.dropped, summary.routed_rows, summary.tokens) == (3, 5, 3, 6)
    assert summary.scalars()["constant_tokens"] == pytest.approx(3 / 6)


def test_percentile_counts_from_the_bottom():
    stats = RoutingStats(num_layers=1, num_experts=4)
    stats.add(0, routing([[True] * 1 + [False] * 3] * 98 + [[True] * 3 + [False]] * 2))
    assert stats.reduce().experts_per_token_p99 == 3  # the 99th of 100 values in order
    stats.add(0, routing([[True] * 1 + [False] * 3] * 99 + [[True] * 3 + [False]]))
    assert stats.reduce().experts_per_token_p99 == 1


def test_parameter_counts_of_the_paper():
    dense = ModelShape(moe=(False,) * 24, experts=0, **PAPER)
    moe = ModelShape(moe=(True,) * 24, experts=16, **PAPER)
    assert round(dense.total / 1e6) == 374
    assert round(moe.total / 1e9, 1) == 3.5
    assert round(moe.activated(1) / 1e6) == 374
    assert round(moe.activated(2) / 1e6) == 581 or round(moe.activated(2) / 1e6) == 582
