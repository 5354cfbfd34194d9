"""DynMoEConfig: what is accepted, what is refused, presets."""

import pytest

from megatron_dynmoe.config import PRESETS, ConfigError, DynMoEConfig, dest_of, flag_of


@pytest.mark.parametrize(
    ("fields", "named", "accepted"),
    [
        ({"top_p": 1.5}, "--moe-top-p", "[0, 1]"),
        ({"top_p": -0.1}, "--moe-top-p", "[0, 1]"),
        ({"top_p": float("nan")}, "--moe-top-p", "[0, 1]"),
        ({"topk": 0}, "--moe-router-topk", "at least 1"),
        ({"max_experts_per_token": 0}, "--moe-max-experts-per-token", "at least 1"),
        ({"max_experts_per_token": 2.0}, "--moe-max-experts-per-token", "whole number"),
        ({"rule": "top-q"}, "--moe-rule", "top-p"),
        ({"gate": "cosmic"}, "--moe-gate", "softmax"),
        ({"expert_backend": "magic"}, "--moe-expert-backend", "sequential"),
        ({"entropy_coeff": -1.0}, "--moe-entropy-coeff", "at least 0"),
        ({"load_balance_coeff": float("inf")}, "--moe-aux-loss-coeff", "at least 0"),
        ({"input_jitter_eps": 1.0}, "--moe-input-jitter-eps", "[0, 1)"),
        ({"zero_experts": -1}, "--moe-zero-experts", "at least 0"),
        ({"tau": 0}, "--moe-tau", "above 0"),
        ({"capacity_gamma": 0.0}, "--moe-capacity-gamma", "above 0"),
        ({"logits_norm_std": -1.0}, "--moe-logits-norm-std", "above 0"),
        ({"expert_input_scale": 0}, "--moe-expert-input-scale", "above 0"),
        ({"drop_zero_weight": True}, "--moe-drop-zero-weight", "--moe-zero-experts"),
        ({"rule": "top-any"}, "--moe-rule", "--moe-gate cosine"),
        ({"cosine_scale": 0}, "--moe-cosine-scale", "above 0"),
        ({"diversity_coeff": 0.01}, "--moe-diversity-coeff", "--moe-gate cosine"),
        ({"efficiency_coeff": 0.01}, "--moe-efficiency-coeff", "top-any"),
        ({"adaptive_experts": True}, "--moe-adaptive-experts", "--moe-rule top-any"),
        ({"initial_experts": 4}, "--moe-initial-experts", "--moe-adaptive-experts"),
        ({"update_at": 300}, "--moe-update-at", "after --moe-record-from 300"),
        ({"update_at": 901}, "--moe-update-at", "at most --moe-update-period 900"),
        ({"update_period": -1}, "--moe-update-period", "at least 0"),
        ({"max_added_experts": 0}, "--moe-max-added-experts", "at least 1"),
        ({"added_expert_init": "random"}, "--moe-added-expert-init", "fresh"),
    ],
)
def test_refusal_names_flag_value_and_what_is_accepted(fields, named, accepted):
    with pytest.raises(ConfigError) as refusal:
        DynMoEConfig(**fields)
    message = str(refusal.value)
    assert named in message
    assert repr(next(iter(fields.values()))) in message
    assert accepted in message
    assert message.count(".") >= 1
    assert "\n" not in message


def test_edges_are_accepted():
    for p in (0, 0.0, 1, 1.0):
        assert DynMoEConfig(top_p=p).top_p == p


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
