"""Routing of MoE++: residual, two-layer gate, norm, the zero expert's weight, capacities, balance, carried logits."""

import pytest
import torch

from megatron_dynmoe import reference
from megatron_dynmoe.config import DynMoEConfig
from megatron_dynmoe.losses import heterogeneous_balance_loss
from megatron_dynmoe.mcore.channels import channels_of, pack, unpack
from megatron_dynmoe.routers import route
from megatron_dynmoe.routers.route import cap_columns, capacities, weights_without_zero

PAPER = DynMoEConfig.from_preset("moe-plus-plus")
RELEASED = DynMoEConfig.from_preset("moe-plus-plus-released")
E, Z, D, T = 8, 4, 6, 50
C = E + Z


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_columns_are_split_and_the_residual_is_added():
    x, weight, gate_map, previous = draw(T, D), draw(C, D, seed=1), draw(C, C, seed=2), draw(T, C, seed=3)
    routing = route(x, weight, PAPER, parameters={"gate_map": gate_map}, previous_TC=previous)
    logits = x @ weight.t() + previous @ gate_map.t()
    torch.testing.assert_close(routing.logits_TC, logits, rtol=1e-12, atol=1e-12)  # float64, another order
    probs = torch.softmax(logits, dim=-1)
    chosen = [reference.top_k_set(row, 2) for row in probs.tolist()]
    assert [set(row.nonzero().flatten().tolist()) for row in routing.map_TC] == chosen
    assert routing.map_TE.shape == (T, E) and routing.map_TZ.shape == (T, Z)
    weights = torch.cat([routing.weights_TE, routing.weights_TZ], dim=1)
    torch.testing.assert_close(weights, probs * routing.map_TC, rtol=1e-12, atol=1e-14)
    assert routing.map_TZ.any() and not routing.map_TZ.all()


def test_gradients_flow_back_along_the_chain():
    x, gate_map, previous = draw(9, D), draw(C, C, seed=2), draw(9, C, seed=3)
    weight = draw(C, D, seed=1)

    def weights(x, weight, gate_map, previous):
        routing = route(x, weight, PAPER, parameters={"gate_map": gate_map}, previous_TC=previous)
        return routing.weights_TE, routing.weights_TZ, routing.logits_TC

    inputs = [tensor.requires_grad_() for tensor in (x, weight, gate_map, previous)]
    # a step of 1e-6 does not move the map: the nearest decision is further away with these seeds
    assert torch.autograd.gradcheck(weights, inputs)


def test_the_released_gate():
    x, hidden, weight = draw(T, D), draw(8 * C, D, seed=1), draw(C, 8 * C, seed=2)
    routing = route(x, weight, RELEASED, parameters={"hidden_weight": hidden})
    logits = reference.tanh_logits(x, hidden, weight)
    torch.testing.assert_close(routing.logits_TC, logits, rtol=1e-11, atol=1e-11)  # float64, sums of 96 terms
    for t, row in enumerate(torch.softmax(logits, dim=-1)):
        chosen = reference.top_k_set(row.tolist(), 2)
        kept = chosen - {C - 1}
        total = sum(row[e] for e in kept)
        weights = torch.cat([routing.weights_TE[t], routing.weights_TZ[t]])
        expected = torch.tensor([row[e] / total if e in kept else 0.0 for e in range(C)], dtype=torch.float64)
        torch.testing.assert_close(weights, expected, rtol=1e-10, atol=1e-14)
        assert {*routing.map_TC[t].nonzero().flatten().tolist()} == chosen


def test_weights_without_zero_are_finite_where_probabilities_underflow():
    logits = torch.tensor([[0.0, -200.0, 0.0, 300.0], [1.0, 2.0, 3.0, 4.0]], requires_grad=True)
    chosen = torch.tensor([[False, True, False, True], [False, False, False, True]])
    weights = weights_without_zero(logits, chosen, 1)
    assert torch.softmax(logits, dim=-1)[0, 1] == 0  # the public code divides 0 by 0 here
    assert weights.tolist() == [[0, 1, 0, 0], [0, 0, 0, 0]]
    weights.square().sum().backward()
    assert torch.isfinite(logits.grad).all()


def test_mixtral_gating_is_normalised_weights():
    """Softmax over the chosen logits equals chosen probabilities over their sum."""
    config = DynMoEConfig.from_preset("moe-plus-plus", normalize_weights=True)
    x, weight = draw(T, D), draw(C, D, seed=1)
    routing = route(x, weight, config)
    masked = routing.logits_TC.masked_fill(~routing.map_TC, -torch.inf).softmax(dim=-1)
    weights = torch.cat([routing.weights_TE, routing.weights_TZ], dim=1)
    torch.testing.assert_close(weights, masked, rtol=1e-12, atol=0)


def test_logits_norm():
    config = DynMoEConfig(logits_norm_std=2.0)
    x, weight = draw(T, D), draw(E, D, seed=1)
    routing = route(x, weight, config)
    logits = x @ weight.t()
    expected = torch.softmax(logits / (logits.std(dim=-1, keepdim=True) / 2), dim=-1)
    torch.testing.assert_close(routing.scores_TC, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(routing.logits_TC, logits, rtol=1e-12, atol=1e-12)  # what is carried on is not normed


def test_capacities_by_hand():
    """T = 100, tau 0.5, 8 FFN and 4 others: a unit of 1.1 * 100 / 8; as printed there is no factor k."""
    config = DynMoEConfig.from_preset("moe-plus-plus", tau=0.5, capacity_gamma=1.1)
    assert capacities(100, 8, config) == (6, 13)
    scores = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.7, 0.3]])
    chosen = torch.tensor([[True, True], [True, True], [True, True], [True, False]])
    assert cap_columns(chosen, scores, 2).tolist() == [[True, False], [True, True], [False, True], [False, False]]
    # ties keep the earlier token; what was not chosen takes no place
    tied = cap_columns(chosen, torch.full((4, 2), 0.5), 3)
    assert tied.tolist() == [[True, True], [True, True], [True, True], [False, False]]


def test_drops_are_counted_and_only_in_training():
    config = DynMoEConfig.from_preset("moe-plus-plus", capacity_gamma=1.0)
    x, weight = draw(T, D), draw(C, D, seed=1)
    free, bounded = route(x, weight, PAPER), route(x, weight, config)
    assert int(bounded.dropped) == int(free.map_TC.sum() - bounded.map_TC.sum()) > 0
    ffn, other = capacities(T, E, config)
    assert int(bounded.map_TE.sum(dim=0).max()) <= ffn and int(bounded.map_TZ.sum(dim=0).max()) <= other
    assert int(bounded.cut) == 0
    assert torch.equal(route(x, weight, config, training=False).map_TC, free.map_TC)


def test_the_memory_guard_counts_ffn_rows_alone():
    config = DynMoEConfig.from_preset("moe-plus-plus", topk=6, max_rows=80)
    x, weight = draw(T, D), draw(C, D, seed=1)
    free = route(x, weight, DynMoEConfig.from_preset("moe-plus-plus", topk=6))
    routing = route(x, weight, config)
    assert int(routing.map_TE.sum()) == 80 < int(free.map_TE.sum())
    assert torch.equal(routing.map_TZ, free.map_TZ)
    assert int(routing.cut) == int(free.map_TE.sum()) - 80


@pytest.mark.parametrize("fields", [{"rule": "top-p", "top_p": 0.6}, {"gate": "cosine", "rule": "top-any"}])
def test_other_rules_choose_among_all_columns(fields):
    config = DynMoEConfig(zero_experts=1, copy_experts=1, constant_experts=2, **fields)
    parameters = {"thresholds": torch.full((C,), 0.1, dtype=torch.float64)} if "gate" in fields else {}
    routing = route(draw(T, D), draw(C, D, seed=1), config, parameters=parameters)
    assert routing.map_TC.shape == (T, C) and routing.map_TZ.any() and routing.map_TE.any()


def test_balance_against_the_reference():
    scores = torch.softmax(draw(64, C), dim=-1)
    chosen = [reference.top_k_set(row, 2) for row in scores.tolist()]
    rows = torch.tensor([sum(e in choice for choice in chosen) for e in range(C)])
    loss = heterogeneous_balance_loss(scores, rows_C=rows, num_tokens=64, zero_computation=Z, tau=0.25)
    expected = reference.heterogeneous_balance(scores.tolist(), chosen, Z, 0.25)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_carried_logits_and_their_gradients_arrive(dtype):
    logits = (draw(7, C).float() * 3).requires_grad_()
    channels = pack(logits, dtype)
    assert channels.dtype == dtype and channels.shape == (7, channels_of(C, dtype))
    arrived = unpack(channels)
    upstream = draw(7, C, seed=5).float()
    (gradient,) = torch.autograd.grad((arrived * upstream).sum(), logits)
    # two numbers of m bits hold at least 2m + 1 of the 24; float32 itself arrives whole
    error = {torch.float32: 0.0, torch.bfloat16: 2.0**-16, torch.float16: 2.0**-21}[dtype]
    assert ((arrived - logits).abs() <= error * logits.abs() + (2**-24 if dtype == torch.float16 else 0)).all()
    assert ((gradient - upstream).abs() <= error * upstream.abs() + (2**-24 if dtype == torch.float16 else 0)).all()
