"""Rules and gate: by hand, against reference.py, and by finite differences."""

import pytest
import torch

from megatron_dynmoe import reference
from megatron_dynmoe.config import ConfigError, DynMoEConfig
from megatron_dynmoe.routers import RULES, register_rule, route
from megatron_dynmoe.routers.route import cap_experts, finish_weights

HAND = torch.tensor([[0.5, 0.3, 0.15, 0.05]])


def top_p(scores, p, **fields):
    return RULES["top-p"](scores, DynMoEConfig(rule="top-p", top_p=p, **fields))


@pytest.mark.parametrize(
    ("p", "kept"),
    # exclusive sums before each expert: 0, .5, .8, .95; an expert stays iff that sum is at most p
    [(0.0, 1), (0.4, 1), (0.5, 2), (0.6, 2), (0.79, 2), (0.81, 3), (0.94, 3), (0.96, 4), (1.0, 4)],
)
def test_top_p_by_hand(p, kept):
    assert top_p(HAND, p).tolist() == [[True] * kept + [False] * (4 - kept)]


@pytest.mark.parametrize("experts", [1, 3, 7, 16, 64])
def test_top_p_one_keeps_all_however_sums_round(experts):
    assert top_p(torch.full((5, experts), 1 / experts), 1.0).all()
    assert top_p(torch.softmax(torch.randn(500, experts), dim=-1), 1.0).all()


def test_top_p_zero_is_top_1():
    scores = torch.softmax(torch.randn(200, 8), dim=-1)
    assert torch.equal(top_p(scores, 0.0), RULES["top-k"](scores, DynMoEConfig(rule="top-k", topk=1)))


def test_ties_keep_the_lower_index():
    assert top_p(torch.tensor([[0.25, 0.25, 0.25, 0.25]]), 0.3).tolist() == [[True, True, False, False]]


def test_rules_agree_with_the_reference():
    scores = torch.softmax(2 * torch.randn(300, 8), dim=-1)
    for p in (0.1, 0.4, 0.77):
        expected = [reference.top_p_set(row, p) for row in scores.tolist()]
        assert [set(row.nonzero().flatten().tolist()) for row in top_p(scores, p)] == expected
    for k in (1, 2, 8, 9):
        chosen = RULES["top-k"](scores, DynMoEConfig(rule="top-k", topk=k))
        expected = [reference.top_k_set(row, k) for row in scores.tolist()]
        assert [set(row.nonzero().flatten().tolist()) for row in chosen] == expected


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_scores_that_are_not_finite_still_route_each_token(bad):
    x, weight = torch.randn(6, 4), torch.randn(5, 4)
    x[2, 1] = bad
    for config in (DynMoEConfig(rule="top-p", top_p=0.3), DynMoEConfig(rule="top-k", topk=2)):
        routing = route(x, weight, config)
        assert (routing.map_TE.sum(dim=1) >= 1).all()
        fine = [0, 1, 3, 4, 5]
        assert routing.weights_TE[fine].isfinite().all()
        assert not routing.weights_TE[2][routing.map_TE[2]].isfinite().all()  # it reaches the loss, and is reported
        assert (routing.weights_TE[2][~routing.map_TE[2]] == 0).all()


def test_cap_keeps_the_most_probable():
    scores = torch.tensor([[0.1, 0.4, 0.2, 0.3]])
    everything = torch.ones(1, 4, dtype=torch.bool)
    assert cap_experts(everything, scores, 2).tolist() == [[False, True, False, True]]
    assert cap_experts(everything, scores, 9).all()
    some = torch.tensor([[True, False, True, False]])
    assert cap_experts(some, scores, 1).tolist() == [[False, False, True, False]]


def test_cap_never_takes_the_best_expert():
    x, weight = torch.randn(100, 8), torch.randn(6, 8)
    free = route(x, weight, DynMoEConfig(top_p=0.9))
    capped = route(x, weight, DynMoEConfig(top_p=0.9, max_experts_per_token=1))
    assert (capped.map_TE.sum(dim=1) == 1).all()
    assert torch.equal(capped.map_TE.int().argmax(dim=1), free.scores_TC.argmax(dim=1))


def test_weights_are_raw_probabilities_or_normalised():
    routing = route(torch.randn(50, 8), torch.randn(6, 8), DynMoEConfig(top_p=0.5))
    assert torch.equal(routing.weights_TE[routing.map_TE], routing.scores_TC[routing.map_TE])
    assert (routing.weights_TE[~routing.map_TE] == 0).all()
    normalised = finish_weights(routing.scores_TC, routing.map_TE, normalize=True)
    # a sum of at most 6 float32 quotients is off by at most 6 units in the last place
    assert (normalised.sum(dim=1) - 1).abs().max() < 6 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_are_float32_whatever_the_model(dtype):
    x, weight = torch.randn(40, 16).to(dtype), torch.randn(6, 16).to(dtype)
    routing = route(x, weight, DynMoEConfig())
    assert routing.scores_TC.dtype == routing.weights_TE.dtype == routing.logits_TC.dtype == torch.float32
    expected = reference.softmax_scores(x.float(), weight.float())
    # both are float32 dot products of 16 terms followed by softmax, in different order
    assert (routing.scores_TC - expected).abs().max() < 16 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize(
    "config",
    [DynMoEConfig(top_p=0.5), DynMoEConfig(rule="top-k", topk=2, normalize_weights=True)],
    ids=["top-p", "gshard"],
)
def test_gradients_by_finite_differences(config):
    torch.manual_seed(0)
    x = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    # A step of 1e-6 does not move the map: the nearest decision is further away than that with this seed.
    assert torch.autograd.gradcheck(lambda x, weight: route(x, weight, config).weights_TE, (x, weight))


def test_gate_keeps_the_gradient_dtype_of_its_inputs():
    x = torch.randn(9, 16, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(4, 16, dtype=torch.bfloat16, requires_grad=True)
    route(x, weight, DynMoEConfig(top_p=1.0)).weights_TE.square().sum().backward()
    wide_x, wide_weight = x.detach().float().requires_grad_(), weight.detach().float().requires_grad_()
    torch.softmax(wide_x @ wide_weight.t(), dim=-1).square().sum().backward()
    assert x.grad.dtype == weight.grad.dtype == torch.bfloat16
    # the same float32 computation, rounded to bfloat16 once
    assert torch.allclose(x.grad.float(), wide_x.grad, rtol=2**-8, atol=2**-10)
    assert torch.allclose(weight.grad.float(), wide_weight.grad, rtol=2**-8, atol=2**-10)


def test_registry_refuses_duplicates_and_extends_what_the_config_accepts():
    with pytest.raises(ValueError, match="top-p"):
        register_rule("top-p")(lambda scores, config: scores > 0)
    try:
        register_rule("above")(lambda scores_TE, config: scores_TE > 0.2)
        routing = route(torch.randn(30, 8), torch.randn(4, 8), DynMoEConfig(rule="above"))
        assert torch.equal(routing.map_TE, routing.scores_TC > 0.2)
    finally:
        RULES.pop("above")
    with pytest.raises(ConfigError, match="'above'; accepted: one of "):
        DynMoEConfig(rule="above")
