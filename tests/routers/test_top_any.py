"""DynMoE's gate and rule: by hand, against reference.py, gradients by a derivation, what is not chosen, losses."""

import math

import pytest
import torch

from megatron_dynmoe import reference
from megatron_dynmoe.config import DynMoEConfig
from megatron_dynmoe.losses import Totals, load_balance_loss
from megatron_dynmoe.routers import route
from megatron_dynmoe.routers.auxiliary import losses_of, router_losses
from megatron_dynmoe.routers.cosine import DIVERSITY_SMOOTHING, diversity_loss, simplicity_loss
from megatron_dynmoe.routers.registry import Routed
from megatron_dynmoe.routers.router_config import all_fields
from megatron_dynmoe.routers.top_any import efficiency_loss

CONFIG = DynMoEConfig(gate="cosine", rule="top-any", cosine_scale=2.0)


def problem(tokens=50, width=12, experts=6, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, generator=generator, dtype=dtype)
    weight = torch.randn(experts, width, generator=generator, dtype=dtype)
    thresholds = torch.randn(experts, generator=generator, dtype=dtype) * 0.2
    return x, weight, {"thresholds": thresholds}


def test_by_hand():
    """Two dimensions, axes as experts: cosines of 1, 0, -1 and 1/sqrt(2) against thresholds of 0 and 1/2."""
    x = torch.tensor([[3.0, 0.0], [0.0, -2.0], [5.0, 5.0], [0.1, 1.0]])
    routing = route(x, torch.eye(2), CONFIG, parameters={"thresholds": torch.tensor([0.0, 0.5])})
    # a cosine of exactly 0 does not pass a threshold of 0; 0.0995 passes it
    assert routing.map_TE.tolist() == [[True, False], [False, False], [True, True], [True, True]]
    assert routing.weights_TE.tolist() == [[1, 0], [0, 0], [0.5, 0.5], [0.5, 0.5]]
    assert routing.scores_TC[0].tolist() == pytest.approx([1 / (1 + math.exp(-2)), 0.5], rel=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_against_the_reference(training):
    x, weight, parameters = problem()
    active = torch.tensor([True, False, True, True, True, False])
    parameters["thresholds"] += 0.3  # so that some tokens activate nobody
    routing = route(x, weight, CONFIG, parameters=parameters, active_E=active, training=training)
    scores = reference.cosine_scores(x, weight, 2.0)
    thresholds = torch.sigmoid(2.0 * parameters["thresholds"]).tolist()
    chosen = [reference.top_any_set(row, thresholds, active.tolist(), training=training) for row in scores.tolist()]
    assert [set(row.nonzero().flatten().tolist()) for row in routing.map_TE] == chosen
    assert any(not c for c in chosen) == training
    # both are the same float64 formula, summed in another order over 12 terms
    assert (routing.scores_TC - scores).abs().max() < 12 * torch.finfo(torch.float64).eps
    expected = torch.tensor([[1 / len(c) if e in c else 0.0 for e in range(6)] for c in chosen], dtype=torch.float64)
    assert torch.equal(routing.weights_TE, expected)


def test_gradients_are_those_derived_by_hand():
    """d weight_e / d s_e = 1/k and d weight_e / d G_e = - scale sigmoid'(scale G_e) / k where chosen, else nothing.

    With s = sigmoid(scale c), c = x.w / (|x||w|): dc/dx = (w/|w| - c x/|x|) / |x|, and the same with x and w exchanged.
    """
    x, weight, parameters = problem(tokens=9)
    thresholds, scale = parameters["thresholds"], 2.0
    for tensor in (x, weight, thresholds):
        tensor.requires_grad_()
    routing = route(x, weight, CONFIG, parameters=parameters)
    upstream = torch.randn(routing.weights_TE.shape, dtype=torch.float64)
    got = torch.autograd.grad((routing.weights_TE * upstream).sum(), (x, weight, thresholds))
    expected = [torch.zeros_like(tensor) for tensor in (x, weight, thresholds)]
    with torch.no_grad():
        for t, e in routing.map_TE.nonzero().tolist():
            k = int(routing.map_TE[t].sum())
            x_hat, w_hat = x[t] / x[t].norm(), weight[e] / weight[e].norm()
            c = x_hat @ w_hat
            s, b = torch.sigmoid(scale * c), torch.sigmoid(scale * thresholds[e])
            ds_dc = scale * s * (1 - s)
            expected[0][t] += upstream[t, e] / k * ds_dc * (w_hat - c * x_hat) / x[t].norm()
            expected[1][e] += upstream[t, e] / k * ds_dc * (x_hat - c * w_hat) / weight[e].norm()
            expected[2][e] -= upstream[t, e] / k * scale * b * (1 - b)
    assert 0 < routing.map_TE.sum() < routing.map_TE.numel()
    for mine, derived in zip(got, expected, strict=True):
        # sums of at most 54 products of a dozen rounded factors
        assert torch.allclose(mine, derived, rtol=1e-12, atol=1e-13)


def test_a_trained_scale_gets_the_gradient_of_both_sides():
    config = DynMoEConfig(gate="cosine", rule="top-any", cosine_scale=10.0, train_cosine_scale=True)
    x, weight, parameters = problem(tokens=9)
    log_scale = torch.tensor([math.log(10.0)], dtype=torch.float64, requires_grad=True)
    routing = route(x, weight, config, parameters=parameters | {"logit_scale": log_scale})
    (got,) = torch.autograd.grad(routing.weights_TE.sum(), log_scale)
    cosine = torch.nn.functional.normalize(x, dim=-1) @ torch.nn.functional.normalize(weight, dim=-1).t()

    def margins(a):
        margin = torch.sigmoid(a.exp() * cosine) - torch.sigmoid(a.exp() * parameters["thresholds"])
        return (margin * routing.map_TE / routing.map_TE.sum(dim=-1, keepdim=True).clamp_min(1)).sum()

    (expected,) = torch.autograd.grad(margins(log_scale), log_scale)
    assert torch.allclose(got, expected, rtol=1e-11, atol=0)  # the same sum of 54 terms in another order
    at_most = route(x, weight, config, parameters=parameters | {"logit_scale": torch.tensor([9.0])})
    assert at_most.logits_TC.abs().max() <= 100 * (1 + 1e-6)  # the scale is held at 100, also from exp(9) = 8103


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_odd_tokens_harm_no_other(value):
    x, weight, parameters = problem()
    clean = route(x, weight, CONFIG, parameters=parameters)
    x[7] = value
    odd = route(x.requires_grad_(), weight, CONFIG, parameters=parameters)
    others = torch.arange(50) != 7
    assert torch.equal(odd.weights_TE[others], clean.weights_TE[others])
    # a zero vector has cosine 0 with every expert and passes the negative thresholds only; the others pass nothing
    expected = parameters["thresholds"] < 0 if value == 0.0 else torch.zeros(6, dtype=torch.bool)
    assert torch.equal(odd.map_TE[7], expected)
    assert torch.isfinite(odd.weights_TE).all()


def test_one_token_no_token_and_caps():
    x, weight, parameters = problem(tokens=1)
    assert route(x[:0], weight, CONFIG, parameters=parameters).weights_TE.shape == (0, 6)
    everybody = {"thresholds": torch.full((6,), -2.0, dtype=torch.float64)}
    capped = DynMoEConfig(gate="cosine", rule="top-any", max_experts_per_token=2)
    routing = route(x, weight, capped, parameters=everybody)
    assert set(routing.map_TE[0].nonzero().flatten().tolist()) == set(routing.scores_TC[0].topk(2).indices.tolist())
    assert routing.weights_TE.sum() == 1 and int(routing.cut) == 4
    nobody = {"thresholds": torch.full((6,), 2.0, dtype=torch.float64)}
    guarded = DynMoEConfig(gate="cosine", rule="top-any", max_rows=1)
    assert route(x, weight, guarded, parameters=nobody).map_TE.sum() == 0


def test_bfloat16_tokens_are_scored_in_float32():
    x, weight, parameters = problem(dtype=torch.float32)
    low = x.bfloat16().requires_grad_()
    routing = route(low, weight, CONFIG, parameters=parameters)
    wide = route(low.detach().float(), weight, CONFIG, parameters=parameters)
    assert routing.scores_TC.dtype == routing.weights_TE.dtype == torch.float32
    assert torch.equal(routing.scores_TC, wide.scores_TC)
    routing.weights_TE.square().sum().backward()
    assert low.grad.dtype == torch.bfloat16


def test_the_orthogonal_start_has_no_diversity_gradient_to_speak_of():
    weight = torch.nn.init.orthogonal_(torch.empty(16, 64)).requires_grad_()
    loss = diversity_loss(weight)
    (gradient,) = torch.autograd.grad(loss, weight)
    direction = torch.nn.functional.normalize(weight.detach(), dim=-1)
    cosines = (direction @ direction.t()).fill_diagonal_(0)
    unit = torch.nn.functional.normalize(weight, dim=-1)
    (plain,) = torch.autograd.grad((unit @ unit.t() - torch.diag(torch.diag(unit @ unit.t()))).norm(), weight)
    # Noise: 240 cosines off by a few 2^-24 each. Gradient: noise / a, twice, as each cosine is there twice.
    noise = cosines.norm().item()
    assert noise < 240**0.5 * 4 * 2**-24
    assert gradient.norm().item() <= 2 * noise / DIVERSITY_SMOOTHING * 1.01 < 0.01
    assert plain.norm() > 1  # what the norm itself would give, whatever the noise
    assert loss.item() < 1e-8


def test_diversity_is_the_norm_away_from_the_start():
    weight = torch.randn(5, 8, dtype=torch.float64)
    active = torch.tensor([True, True, False, True, False])
    kept = torch.nn.functional.normalize(weight[active], dim=-1)
    norm = (kept @ kept.t() - torch.eye(3)).norm().item()
    # sqrt(n^2 + a^2) - a lies below n by less than a
    assert norm - DIVERSITY_SMOOTHING < diversity_loss(weight, active).item() < norm
    assert simplicity_loss(weight, active).item() == pytest.approx(weight[active].norm(dim=1).mean().item(), rel=1e-12)
    assert simplicity_loss(weight).item() == pytest.approx(weight.norm(dim=1).mean().item(), rel=1e-12)
    gradient = torch.autograd.grad(
        diversity_loss(weight.requires_grad_(), active) + simplicity_loss(weight, active), weight
    )[0]
    assert (gradient[~active] == 0).all()
    assert torch.autograd.gradcheck(lambda w: diversity_loss(w, active) + simplicity_loss(w, active), weight)


def test_efficiency_and_balance_by_hand():
    """Three tokens, two experts; one token goes to both, one to the first, one to nobody."""
    map_TE = torch.tensor([[True, True], [True, False], [False, False]])
    weights = torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.0, 0.0]])
    assert efficiency_loss(weights, map_TE, num_tokens=3).item() == pytest.approx(3 / 6)
    # over the two routed tokens: f = [1, 1/2], Q = [3/4, 1/4]
    loss = load_balance_loss(weights, rows_E=torch.tensor([2, 1]), num_tokens=2)
    assert loss.item() == pytest.approx(2 * (1 * 0.75 + 0.5 * 0.25))


def test_ranks_shares_of_all_losses_add_up():
    config = DynMoEConfig(
        gate="cosine",
        rule="top-any",
        load_balance_coeff=1.0,
        efficiency_coeff=1.0,
        diversity_coeff=1.0,
        simplicity_coeff=1.0,
    )
    x, weight, parameters = problem()
    parts = [route(part, weight, config, parameters=parameters) for part in (x, x[:20], x[20:])]
    whole = parts[0].map_TE
    results = []
    for part, ranks in zip(parts, (1, 2, 2), strict=True):
        totals = Totals(whole.sum(dim=0).double(), torch.tensor(50.0), whole.any(dim=1).sum().double(), ranks)
        results.append(router_losses(Routed(part, config, totals, weight)))
    assert len(results[0]) == 4
    for name, (_, loss) in results[0].items():
        # one float64 sum against the sum of two
        assert loss.item() == pytest.approx((results[1][name][1] + results[2][name][1]).item(), rel=1e-12), name


LOSSES = [field.name for field in all_fields(DynMoEConfig) if field.name.endswith("_coeff")]


@pytest.mark.parametrize("coeff", [None, *LOSSES])
def test_nobody_counts_where_no_loss_is_on(coeff):
    kind = {"rule": "top-p"} if coeff == "entropy_coeff" else {"gate": "cosine", "rule": "top-any"}
    config = DynMoEConfig(**kind, **dict.fromkeys(LOSSES, 0.0) | ({} if coeff is None else {coeff: 0.5}))
    x, weight, parameters = problem()
    routing = route(x, weight, config, parameters=parameters)
    totals = Totals(routing.map_TE.sum(dim=0), torch.tensor(50.0), torch.tensor(50.0), 1)
    losses = router_losses(Routed(routing, config, totals, weight))
    assert len(losses) == len(losses_of(config)) == int(coeff is not None)
