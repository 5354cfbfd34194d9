"""RoutePlan and the moves along it: hand-worked integers on one rank."""

import pytest
import torch

from megatron_dynmoe.dispatch import (
    combine,
    dispatch,
    group_by_expert,
    permute,
    ungroup_by_expert,
    unpermute,
)
from megatron_dynmoe.routing import RoutePlan

#          expert  0  1  2  3
MAP = torch.tensor(
    [
        [1, 0, 1, 0],
        [0, 0, 0, 0],  # a token that visits nobody
        [1, 0, 1, 1],
    ],
    dtype=torch.bool,
)


def test_plan_by_hand():
    plan = RoutePlan.build(MAP)
    assert plan.sent_E == (2, 0, 2, 1)
    assert plan.rows_sent == 5
    assert plan.rows_per_expert_L == [2, 0, 2, 1]
    assert plan.input_splits_R == plan.output_splits_R == [5]
    assert plan.expert_of_row_N.tolist() == [0, 0, 2, 2, 3]
    assert plan.token_of_row_N.tolist() == [0, 2, 0, 2, 2]


def test_permute_by_hand():
    x = torch.tensor([[10.0], [20.0], [30.0]])
    weights = torch.arange(12.0).view(3, 4)
    rows, row_weights = permute(x, weights, RoutePlan.build(MAP))
    assert rows.flatten().tolist() == [10, 30, 10, 30, 30]
    assert row_weights.tolist() == [0, 8, 2, 10, 11]


def test_unpermute_sums_a_tokens_rows_and_leaves_zero_for_none():
    rows = torch.tensor([[1.0], [2.0], [4.0], [8.0], [16.0]])
    assert unpermute(rows, RoutePlan.build(MAP), 3).flatten().tolist() == [5, 0, 26]


def test_chunks_change_places_and_return():
    # three senders, two local experts; rows named sender * 10 + expert
    plan = RoutePlan(
        sent_E=(0,) * 6, received_PRL=(((1, 2), (0, 1), (2, 0)),), tensor_rank=0, row_index_N2=torch.empty(0, 2)
    )
    rows = torch.tensor([0, 1, 1, 11, 20, 20])
    assert plan.rows_per_expert_L == [3, 3]
    assert plan.output_splits_R == [3, 1, 2]
    grouped = group_by_expert(rows, plan)
    assert grouped.tolist() == [0, 20, 20, 1, 1, 11]
    assert torch.equal(ungroup_by_expert(grouped, plan), rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_over_a_tokens_rows_are_float32(dtype):
    # 256 + 1 is lost in bfloat16; 256 + 1 + 1 in float32 is 258, which bfloat16 holds
    routing_map = torch.ones(1, 3, dtype=torch.bool)
    rows = torch.tensor([[256.0], [1.0], [1.0]], dtype=dtype)
    assert unpermute(rows, RoutePlan.build(routing_map), 1).item() == 258


@pytest.mark.parametrize(
    "routing_map",
    [
        torch.zeros(4, 3, dtype=torch.bool),
        torch.ones(4, 3, dtype=torch.bool),
        torch.zeros(0, 3, dtype=torch.bool),
        torch.tensor([[True, False, False]]),
        torch.tensor([[False, True, False]] * 5),
    ],
    ids=["no row", "all to all", "no token", "one token", "all to one expert"],
)
def test_nothing_lost_nothing_padded(routing_map):
    tokens, experts = routing_map.shape
    x = torch.randn(tokens, 2, requires_grad=True)
    weights = torch.where(routing_map, torch.rand(tokens, experts), 0.0).requires_grad_()
    plan = RoutePlan.build(routing_map)
    rows, row_weights = dispatch(x, weights, plan)
    assert rows.shape[0] == row_weights.shape[0] == plan.rows_sent == int(routing_map.sum())
    out = combine(rows * row_weights.unsqueeze(1), plan, tokens)
    expected = x * weights.sum(dim=1, keepdim=True)
    # each is a sum of at most three float32 products
    assert torch.allclose(out, expected, rtol=1e-6, atol=1e-6)
    grad = torch.randn_like(out)
    got = torch.autograd.grad(out, (x, weights), grad)
    wanted = torch.autograd.grad(torch.where(routing_map, weights, 0).sum(1, keepdim=True) * x, (x, weights), grad)
    for a, b in zip(got, wanted, strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-6)


def test_plan_refuses_what_is_no_map():
    with pytest.raises(ValueError, match="bool"):
        RoutePlan.build(torch.ones(2, 2))
    with pytest.raises(ValueError, match="3 experts"):
        RoutePlan.build(torch.ones(2, 3, dtype=torch.bool), expert_ranks=2)
