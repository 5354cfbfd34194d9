"""The two routers by hand; ``python -m pytest`` in this folder, with the package installed."""

import pytest
import torch
from dynmoe_example.pi_top_p import PIController
from dynmoe_example.relu import AdaptiveL1, weighted_l1

from megatron_dynmoe import ConfigError, DynMoEConfig, route
from megatron_dynmoe.losses import Totals
from megatron_dynmoe.routers.controller import Seen
from megatron_dynmoe.routers.registry import Routed

X = torch.eye(3)
NO_EXPERTS = None


def after_steps(controller, routings):
    """The controller's state after a step for each routing."""
    state = {name: torch.tensor(value) for name, value in controller.state().items()}
    for routing in routings:
        counts = controller.counts()
        valid_T = torch.ones(len(routing.map_TC), dtype=torch.bool)
        controller.observe(counts, Seen(X, routing, valid_T, state, {}))
        controller.after_step(state, counts, step=NO_EXPERTS)
    return state


def test_pi_moves_p_against_the_error():
    config = DynMoEConfig(rule="pi-top-p", top_p=0.5, target_experts=2, pi_proportional=0.5, pi_integral=0.1)
    one = route(X, torch.zeros(4, 3), config.moved({"top_p": 0.0}))  # each token visits one expert of four
    assert one.map_TE.sum(dim=1).tolist() == [1, 1, 1]
    # error (2 - 1) / 4; the first step adds both parts of it, the second, with the same error, the integral alone
    state = after_steps(PIController(config, columns=4, width=3), [one, one])
    assert state["top_p"].item() == pytest.approx(0.5 + 0.5 * 0.25 + 0.1 * 0.25 + 0.1 * 0.25)
    assert state["last_error"].item() == 0.25


def test_p_stays_a_probability():
    config = DynMoEConfig(rule="pi-top-p", top_p=1.0, target_experts=4, pi_integral=100.0)
    one = route(X, torch.zeros(4, 3), config.moved({"top_p": 0.0}))
    assert after_steps(PIController(config, columns=4, width=3), [one])["top_p"].item() == 1


def test_relu_visits_positive_logits_weighted_by_them():
    config = DynMoEConfig(gate="relu", rule="relu")
    weight = torch.tensor([[2.0, -1, 0], [3, -1, -1]])  # two experts; x is the identity, so logits are its columns
    routing = route(X, weight, config, training=True)
    assert routing.map_TE.tolist() == [[True, True], [False, False], [False, False]]
    assert routing.weights_TE.tolist() == [[2, 3], [0, 0], [0, 0]]


def test_the_l1_loss_and_its_coefficient():
    config = DynMoEConfig(gate="relu", rule="relu", relu_experts=1, relu_l1_coeff=0.5, relu_l1_factor=2)
    routing = route(X, torch.tensor([[2.0, 1, 0], [3, -1, -1]]), config)
    # counts 2 and 1 of three tokens, sums of scores 3 and 3: f = 2 * count / (1 * 3); (4/3 * 3 + 2/3 * 3) / 3
    totals = Totals(torch.tensor([2.0, 1.0]), torch.tensor(3.0), torch.tensor(2.0), 1)
    assert weighted_l1(Routed(routing, config, totals, torch.empty(0))).item() == pytest.approx(2.0)
    # three pairs for three tokens is what is wanted: it stays; four are too many: it doubles
    more = route(X, torch.tensor([[2.0, 1, 0], [3, 1, -1]]), config)
    assert after_steps(AdaptiveL1(config, columns=2, width=3), [routing])["relu_l1_coeff"].item() == 0.5
    assert after_steps(AdaptiveL1(config, columns=2, width=3), [routing, more])["relu_l1_coeff"].item() == 1.0


def test_settings_are_checked():
    with pytest.raises(ConfigError, match=r"--moe-target-experts .* is 0; accepted: a number in \[1"):
        DynMoEConfig(rule="pi-top-p", target_experts=0)
    with pytest.raises(ConfigError, match="relu"):
        DynMoEConfig(rule="relu")  # needs its gate
