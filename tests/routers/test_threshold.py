"""The threshold rule and the sigmoid gate: against loops, by hand, and where nothing, everything or NaN passes."""

import math

import pytest
import torch

from megatron_dynmoe import reference
from megatron_dynmoe.config import ConfigError, DynMoEConfig
from megatron_dynmoe.losses import Totals
from megatron_dynmoe.routers import route
from megatron_dynmoe.routers.auxiliary import router_losses
from megatron_dynmoe.routers.fresh import learned, router_parameters
from megatron_dynmoe.routers.registry import RULES, Routed

SCORES = {"softmax": reference.softmax_scores, "sigmoid": reference.sigmoid_scores}
LEVELS = {"softmax": 0.3, "sigmoid": 0.6}


def config(gate="softmax", **fields):
    return DynMoEConfig(**{"gate": gate, "rule": "threshold", "threshold": LEVELS[gate]} | fields)


def problem(dynmoe, tokens=40, width=12, experts=6):
    """Inputs, weight and, if they are learned, thresholds that differ, in float64."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, width, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(experts, width, generator=generator, dtype=torch.float64) / 4
    leaves = [x, weight.requires_grad_()]
    parameters = {}
    for name, value in learned(dynmoe, experts, width).items():
        noise = torch.randn(experts, generator=generator, dtype=torch.float64) / 4
        parameters[name] = (value.double() + noise).requires_grad_()
        leaves.append(parameters[name])
    return leaves, parameters


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("keep_best", [True, False])
@pytest.mark.parametrize("learn", [False, True])
@pytest.mark.parametrize("gate", SCORES)
def test_outputs_gradients_and_losses_are_the_oracles(gate, learn, keep_best, normalize):
    dynmoe = config(
        gate, learned_thresholds=learn, threshold_keep_best=keep_best, normalize_weights=normalize,
        load_balance_coeff=1.0,
    )  # fmt: skip
    leaves, parameters = problem(dynmoe)
    x, weight = leaves[:2]
    routing = route(x, weight, dynmoe, parameters=parameters)
    # the float64 softmax of the oracle is float32; this is the same formula in full
    scores = torch.softmax(x @ weight.t(), dim=-1) if gate == "softmax" else reference.sigmoid_scores(x, weight)
    assert (SCORES[gate](x, weight) - scores).abs().max() < 1e-6
    oracle = reference.threshold_weights(
        scores, parameters.get("thresholds"), LEVELS[gate], keep_best=keep_best, normalize=normalize
    )
    chosen = [set(row) for row in oracle]
    assert [set(row.nonzero().flatten().tolist()) for row in routing.map_TE] == chosen
    sizes = {len(row) for row in chosen}
    assert {1, 2} <= sizes and (0 in sizes) == (not keep_best)
    dense = torch.stack([torch.stack([row.get(e, x.new_zeros(())) for e in range(6)]) for row in oracle])
    # float64 sums of a dozen terms in another order
    torch.testing.assert_close(routing.weights_TE, dense, rtol=1e-12, atol=1e-14)
    upstream = torch.randn(dense.shape, dtype=torch.float64)
    got = torch.autograd.grad((routing.weights_TE * upstream).sum(), leaves, retain_graph=True)
    wanted = torch.autograd.grad((dense * upstream).sum(), leaves)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-13)
    totals = Totals(routing.map_TC.sum(dim=0).double(), torch.tensor(40.0), torch.tensor(40.0), 1)
    (_, loss) = router_losses(Routed(routing, dynmoe, totals, weight, parameters))["load_balancing_loss"]
    assert loss.item() == pytest.approx(reference.load_balance(scores.tolist(), chosen), rel=1e-6)


def test_the_thresholds_gradient_by_hand():
    """One token, two experts with scores 1/2 and 3/4 against 0.6 each: the second passes, with weight 3/4.

    dw/ds = 1 + s = 7/4 and ds/dlogit = 3/16, so 21/64 for the logit; dw/dG = -s t (1 - t) = -3/4 * 0.24.
    """
    dynmoe = config("sigmoid", learned_thresholds=True)
    weight = torch.tensor([[0.0], [math.log(3)]], dtype=torch.float64, requires_grad=True)
    thresholds = learned(dynmoe, 2, 1)["thresholds"].double().requires_grad_()
    routing = route(torch.ones(1, 1, dtype=torch.float64), weight, dynmoe, parameters={"thresholds": thresholds})
    assert routing.map_TE.tolist() == [[False, True]] and routing.weights_TE.tolist() == [[0, pytest.approx(0.75)]]
    for_weight, for_thresholds = torch.autograd.grad(routing.weights_TE.sum(), (weight, thresholds))
    assert for_weight.flatten().tolist() == pytest.approx([0, 21 / 64])
    assert for_thresholds.tolist() == pytest.approx([0, -0.75 * 0.24], rel=1e-6)  # 0.6 in float32 at first


@pytest.mark.parametrize("gate", SCORES)
def test_both_ends_of_the_threshold(gate):
    x, weight = torch.randn(30, 8), torch.randn(5, 8)
    everybody = route(x, weight, config(gate, threshold=0.0))
    assert everybody.map_TE.all()
    best = route(x, weight, config(gate, threshold=1.0))
    assert torch.equal(best.map_TE, torch.nn.functional.one_hot(best.scores_TC.argmax(dim=-1), 5).bool())
    nobody = config(gate, threshold=1.0, threshold_keep_best=False)
    assert not route(x, weight, nobody).map_TE.any() and (route(x, weight, nobody).weights_TE == 0).all()
    assert torch.equal(route(x, weight, nobody, training=False).map_TE, best.map_TE)  # in evaluation


def test_ties_one_expert_one_token_and_none():
    equal = RULES["threshold"](torch.full((3, 4), 0.25), config(threshold=0.25), {})
    assert equal.tolist() == [[True, False, False, False]] * 3  # equal does not pass; the first of the best is kept
    one = route(torch.randn(1, 8), torch.randn(1, 8), config())
    assert one.map_TE.tolist() == [[True]] and one.weights_TE.tolist() == [[1.0]]
    assert route(torch.randn(0, 8), torch.randn(4, 8), config()).map_TE.shape == (0, 4)
    weight = torch.eye(4, 8) * 20
    crowd = route(torch.ones(9, 8) * torch.eye(8)[0], weight, config("sigmoid"))
    assert crowd.map_TE.tolist() == [[True, False, False, False]] * 9


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("keep_best", [True, False])
@pytest.mark.parametrize("learn", [False, True])
def test_what_is_not_finite_harms_no_other(bad, keep_best, learn):
    dynmoe = config(learned_thresholds=learn, threshold_keep_best=keep_best, max_experts_per_token=2)
    leaves, parameters = problem(dynmoe)
    x, weight = (leaf.detach().float() for leaf in leaves[:2])
    clean = route(x, weight, dynmoe, parameters=parameters)
    x[7, 3] = bad
    odd = route(x, weight, dynmoe, parameters=parameters)
    others = torch.arange(len(x)) != 7
    assert torch.equal(odd.weights_TE[others], clean.weights_TE[others])
    kept = odd.weights_TE[7][odd.map_TE[7]]
    assert len(kept) == int(keep_best) and not kept.isfinite().any()  # it reaches the loss, and is reported
    (gradient,) = torch.autograd.grad(odd.weights_TE[others].sum(), parameters.values()) if learn else (torch.ones(1),)
    assert gradient.isfinite().all() and gradient.any()


def test_inactive_experts_are_never_the_best():
    active = torch.tensor([False, True, True])
    routing = route(torch.randn(50, 8), torch.randn(3, 8), config(threshold=0.9), active_E=active)
    assert not routing.map_TE[:, 0].any() and (routing.map_TE.sum(dim=-1) == 1).all()


def test_what_is_learned_is_counted_and_logged():
    plain, learnt = config("sigmoid"), config("sigmoid", learned_thresholds=True)
    assert router_parameters(learnt, 6, 12) == router_parameters(plain, 6, 12) + 6 == 78
    log = RULES["threshold"].log
    assert log(plain, {}) == {}
    said = log(learnt, {"thresholds": torch.tensor([-1.0, 0.0, 1.0])})
    assert said["threshold"].item() == pytest.approx(0.5)
    assert said["thresholds"].tolist() == pytest.approx([1 / (1 + math.e), 0.5, math.e / (1 + math.e)])


def test_thresholds_without_a_gradient_are_refused():
    with pytest.raises(ConfigError, match=r"--moe-learned-thresholds .* off with --moe-drop-zero-weight"):
        config(learned_thresholds=True, zero_experts=1, drop_zero_weight=True)
