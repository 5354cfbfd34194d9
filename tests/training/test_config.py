"""DynMoEConfig: what is accepted, what is refused, presets."""

import math

import pytest
import torch

from megatron_dynmoe.config import PRESETS, ConfigError, DynMoEConfig, dest_of, flag_of
from megatron_dynmoe.losses import Totals
from megatron_dynmoe.ranges import Range
from megatron_dynmoe.routers import GATES, RULES, route
from megatron_dynmoe.routers.auxiliary import router_losses
from megatron_dynmoe.routers.registry import Routed
from megatron_dynmoe.routers.router_config import all_fields

TOP_ANY = {"gate": "cosine", "rule": "top-any"}


@pytest.mark.parametrize(
    ("fields", "named", "accepted"),
    [
        ({"top_p": 1.5}, "--moe-top-p", "[0, 1]"),
        ({"top_p": -0.1}, "--moe-top-p", "[0, 1]"),
        ({"top_p": float("nan")}, "--moe-top-p", "[0, 1]"),
        ({"topk": 0, "rule": "top-k"}, "--moe-router-topk", "a whole number in [1, 1e+09]"),
        ({"max_experts_per_token": 0}, "--moe-max-experts-per-token", "[1, 1e+09], or unset"),
        ({"max_experts_per_token": 2.0}, "--moe-max-experts-per-token", "whole number"),
        ({"rule": "top-q"}, "--moe-rule", "top-p"),
        ({"gate": "cosmic"}, "--moe-gate", "softmax"),
        ({"expert_backend": "magic"}, "--moe-expert-backend", "sequential"),
        ({"entropy_coeff": -1.0}, "--moe-entropy-coeff", "[0, 1e+06]"),
        ({"load_balance_coeff": float("inf")}, "--moe-aux-loss-coeff", "[0, 1e+06]"),
        ({"input_jitter_eps": 1.0}, "--moe-input-jitter-eps", "[0, 1)"),
        ({"zero_experts": -1}, "--moe-zero-experts", "[0, 65536]"),
        ({"tau": 0}, "--moe-tau", "[1e-06, 1]"),
        ({"capacity_gamma": 0.0}, "--moe-capacity-gamma", "[1e-06, 1e+06], or unset"),
        ({"logits_norm_std": -1.0}, "--moe-logits-norm-std", "[1e-06, 1e+06], or unset"),
        ({"expert_input_scale": 0}, "--moe-expert-input-scale", "[1e-06, 1e+06]"),
        ({"drop_zero_weight": True}, "--moe-drop-zero-weight", "--moe-zero-experts"),
        ({"rule": "top-any"}, "--moe-rule", "--moe-gate cosine"),
        ({"cosine_scale": 0, "gate": "cosine"}, "--moe-cosine-scale", "[1e-06, 100]"),
        ({"diversity_coeff": 0.01}, "--moe-diversity-coeff", "--moe-gate cosine"),
        ({"efficiency_coeff": 0.01}, "--moe-efficiency-coeff", "top-any"),
        ({"adaptive_experts": True}, "--moe-adaptive-experts", "--moe-rule top-any"),
        ({"initial_experts": 4}, "--moe-initial-experts", "--moe-rule top-any"),
        ({"initial_experts": 4} | TOP_ANY, "--moe-initial-experts", "--moe-adaptive-experts"),
        ({"update_at": 300} | TOP_ANY, "--moe-update-at", "after --moe-record-from 300"),
        ({"update_at": 901} | TOP_ANY, "--moe-update-at", "at most --moe-update-period 900"),
        ({"update_period": -1} | TOP_ANY, "--moe-update-period", "[0, 1e+09]"),
        ({"max_added_experts": 0} | TOP_ANY, "--moe-max-added-experts", "[1, 1e+09]"),
        ({"added_expert_init": "random"} | TOP_ANY, "--moe-added-expert-init", "fresh"),
        ({"adaptive_experts": True, "zero_experts": 1} | TOP_ANY, "--moe-adaptive-experts", "zero-computation"),
        ({"fp8_emulate": True}, "--moe-fp8-emulate", "False without --moe-fp8-recipe"),
        ({"residual": 1}, "--moe-residual", "True or False"),
        ({"top_p": 0.3, "rule": "top-k"}, "--moe-top-p", "0.4, or --moe-rule top-p, which reads it"),
        ({"entropy_coeff": 0.1, "gate": "cosine"}, "--moe-entropy-coeff", "--moe-gate softmax or --moe-gate tanh"),
        ({"gate": ["softmax"]}, "--moe-gate", "softmax"),
    ],
)
def test_refusal_names_flag_value_and_what_is_accepted(fields, named, accepted):
    with pytest.raises(ConfigError) as refusal:
        DynMoEConfig(**fields)
    message = str(refusal.value)
    name, value = next(iter(fields.items()))
    assert message.startswith(f"{named} (DynMoEConfig.{name}) is {value!r}; accepted: ")
    assert accepted in message
    assert message.count(".") >= 1
    assert "\n" not in message


NUMERIC = {f.name: f.metadata["accepts"] for f in all_fields(DynMoEConfig) if f.type not in (bool, str)}
NONSENSE = [
    math.nan,
    math.inf,
    -math.inf,
    1e308,
    -1e308,
    1e-308,
    10**400,
    10**10,
    -1,
    -(10**10),
    0,
    0.5,
    True,
    "1",
    [1],
    None,
]
# What makes a field count, beside it.
ADAPTIVE = {"adaptive_experts": True, "update_period": 0}
BESIDE = dict.fromkeys(("cosine_scale", "diversity_coeff", "simplicity_coeff", "efficiency_coeff"), TOP_ANY)
BESIDE |= dict.fromkeys(("initial_experts", "record_from", "update_at", "max_added_experts"), TOP_ANY | ADAPTIVE)
BESIDE |= {"topk": {"rule": "top-k"}, "update_period": TOP_ANY | {"record_from": 0, "update_at": 1}}
BESIDE |= {name: {"capacity_gamma": 1e6} for name in ("tau", "copy_experts")}


def works(config):
    """Route eight tokens with it, forward and backward: all is finite."""
    columns, width = 4 + config.zero_computation_experts, 8
    generator = torch.Generator().manual_seed(0)
    gate, rule = GATES[config.gate], RULES[config.rule]
    weight = torch.randn(columns, width, generator=generator, requires_grad=True)
    declared = [kind.parameters(config, columns, width) for kind in (gate, rule) if kind.parameters]
    parameters = {name: value for part in declared for name, value in part.items()}
    x = torch.randn(8, width, generator=generator)
    routing = route(x * config.expert_input_scale, weight, config, parameters=parameters)
    rows = routing.map_TC.sum(dim=0).float()
    totals = Totals(rows, torch.tensor(8.0), torch.tensor(8.0), 1)
    losses = router_losses(Routed(routing, config, totals, weight, parameters))
    total = sum((coeff * loss for coeff, loss in losses.values()), routing.weights_TE.square().sum())
    (gradient,) = torch.autograd.grad(total, weight)
    return bool(total.isfinite() and gradient.isfinite().all())


@pytest.mark.parametrize("name", NUMERIC)
def test_no_number_is_nonsense_and_accepted(name):
    """Each nonsense value is one sentence or works; and so do both ends of what is accepted."""
    range_, beside = NUMERIC[name], BESIDE.get(name, {})
    refused = 0
    for value in [*NONSENSE, range_.least, range_.most]:
        try:
            config = DynMoEConfig(**beside | {name: value})
        except ConfigError as refusal:
            refused += 1
            message = str(refusal)
            assert message.startswith(f"{flag_of(name)} (DynMoEConfig.{name}) is {value!r}; accepted: "), message
            assert message.endswith(".") and "\n" not in message
            assert not range_.accepts(value) or value == getattr(range_, range_.open, None)
        else:
            assert range_.accepts(value) and works(config), value
    assert refused >= 10


def test_every_numeric_field_has_a_range():
    assert [name for name, accepts in NUMERIC.items() if not isinstance(accepts, Range)] == []


def test_presets_build_and_yield_to_the_user():
    for name in PRESETS:
        DynMoEConfig.from_preset(name)
    assert DynMoEConfig.from_preset("dynamic-moe").top_p == 0.4
    assert DynMoEConfig.from_preset("dynamic-moe", top_p=0.7).top_p == 0.7
    assert DynMoEConfig.from_preset("switch").topk == 1
    assert DynMoEConfig.from_preset("gshard").normalize_weights


def test_unknown_preset_lists_those_there_are():
    with pytest.raises(ConfigError, match=r"'dynamic'.*dynamic-moe.*switch.*gshard"):
        DynMoEConfig.from_preset("dynamic")


def test_fields_that_megatron_has_a_flag_for_use_it():
    assert flag_of("topk") == "--moe-router-topk"
    assert dest_of("load_balance_coeff") == "moe_aux_loss_coeff"
    assert flag_of("top_p") == "--moe-top-p"
