"""MoE++ in the Hugging Face model: zero-computation experts, gating residual, and their export."""

import math
from argparse import Namespace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megatron_dynmoe.checkpoint import CheckpointError
from megatron_dynmoe.hf.configuration_dynmoe import DynMoEHFConfig
from megatron_dynmoe.hf.export import export
from megatron_dynmoe.hf.modeling_dynmoe import DynMoEForCausalLM, DynMoESparseMLP
from megatron_dynmoe.hf.router_dynmoe import CarriedLogits
from megatron_dynmoe.routers.route import weights_without_zero
from tests.hf_checkpoints import ARGS, megatron_weights, write_checkpoint

E, CONSTANT, COPY, ZERO = 4, 2, 1, 2
Z, C, D, T = CONSTANT + COPY + ZERO, E + CONSTANT + COPY + ZERO, 16, 60
SMALL = {
    **{"vocab_size": 97, "hidden_size": D, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2},
    **{"num_key_value_heads": 2, "head_dim": 8, "moe_layers": [1, 0, 1, 1], "moe_intermediate_size": 12},
    **{"num_experts": E, "constant_experts": CONSTANT, "copy_experts": COPY, "zero_experts": ZERO},
    **{"router_rule": "top-k", "gating_residual": True, "max_position_embeddings": 64},
    # Wide enough that tokens choose every kind of expert.
    **{"initializer_range": 0.4, "eos_token_id": None, "bos_token_id": None},
}
RELEASED = {"router_gate": "tanh", "drop_zero_weight": True, "expert_input_scale": 2.0}


def small_model(**changes) -> DynMoEForCausalLM:
    torch.manual_seed(0)
    return DynMoEForCausalLM(DynMoEHFConfig(**(SMALL | changes))).eval()


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tokens(rows: int = 2, length: int = 20) -> torch.Tensor:
    return torch.randint(0, 97, (rows, length), generator=torch.Generator().manual_seed(1))


def logits_by_hand(router, x: torch.Tensor, previous: torch.Tensor) -> list[float]:
    """One token's logits, [D] and [C] to C numbers, in float64."""
    x = x.double()
    if router.config.router_gate == "tanh":
        x = (router.hidden_weight.double() @ x).tanh()
    return (router.weight.double() @ x + router.gate_map.double() @ previous.double()).tolist()


def choice_by_loop(logits: list[float], config: DynMoEHFConfig) -> dict[int, float]:
    """Chosen columns and their weights, for one token."""
    if config.logits_norm_std is not None:
        mean = sum(logits) / C
        std = math.sqrt(sum((logit - mean) ** 2 for logit in logits) / (C - 1))
        logits = [logit / (std / config.logits_norm_std) for logit in logits]
    total = sum(map(math.exp, logits))
    probs = [math.exp(logit) / total for logit in logits]
    order = sorted(range(C), key=lambda c: -probs[c])
    chosen, mass = [], 0.0
    for c in order:
        full = len(chosen) == config.num_experts_per_tok if config.router_rule == "top-k" else mass > 0.6
        if full or len(chosen) == config.max_experts_per_token:
            break
        chosen.append(c)
        mass += probs[c]
    weights = {c: probs[c] for c in chosen}
    if config.drop_zero_weight:
        weights = {c: 0.0 if c >= C - ZERO else w for c, w in weights.items()}
    if config.drop_zero_weight or config.normalize_router_weights:
        whole = sum(weights.values()) or 1.0
        weights = {c: w / whole for c, w in weights.items()}
    return weights


def expert_by_hand(layer: DynMoESparseMLP, column: int, x: torch.Tensor) -> torch.Tensor:
    """One expert's output for one token [D]."""
    if column < E:
        return layer.experts[column](x)
    if column < E + CONSTANT:
        a1, a2 = (layer.free_experts.select[column - E] @ x).softmax(0)
        return a1 * x + a2 * layer.free_experts.values[column - E]
    return x if column < E + CONSTANT + COPY else torch.zeros_like(x)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"normalize_router_weights": True, "logits_norm_std": 1.5, "num_experts_per_tok": 3},
        {"router_rule": "top-p", "top_p_threshold": 0.6, "max_experts_per_token": 3},
        RELEASED,
        RELEASED | {"logits_norm_std": 2.0, "router_rule": "top-p", "top_p_threshold": 0.6},
    ],
    ids=["paper", "normalised", "top-p", "released", "released-top-p"],
)
def test_mixture_against_a_loop(changes) -> None:
    layer = small_model(**changes).model.layers[2].mlp
    x_TD, previous_TC = draw(T, D), draw(T, C, seed=1)
    carried = CarriedLogits()
    carried.by_layer = {0: previous_TC, 3: None}  # what a later layer left is not read
    with torch.no_grad():
        found_TD = layer(x_TD, carried)
        *_, map_TE, _, map_TZ = layer.router(x_TD, previous_TC)
        chosen = set()
        for t in range(T):
            logits = logits_by_hand(layer.router, x_TD[t], previous_TC[t])
            weights = choice_by_loop(logits, layer.router.config)
            assert torch.cat([map_TE[t], map_TZ[t]]).nonzero().flatten().tolist() == sorted(weights)
            scaled = x_TD[t] * layer.router.config.expert_input_scale
            want = sum(weight * expert_by_hand(layer, column, scaled) for column, weight in weights.items())
            # Float32 sums of up to 96 terms in another order, on values of magnitude ten.
            torch.testing.assert_close(found_TD[t], want, rtol=1e-4, atol=1e-4)
            # un-normed, with the residual; the same rounding
            torch.testing.assert_close(carried.by_layer[2][t], torch.tensor(logits), rtol=1e-4, atol=1e-4)
            chosen |= set(weights)
    assert chosen == set(range(C)), "the case needs tokens that choose each expert"


def test_a_partner_whose_probability_underflows_gets_the_whole_weight() -> None:
    logits_TC = torch.tensor([[-200.0, 0.0, 300.0], [1.0, 2.0, 3.0]])
    map_TC = torch.tensor([[True, False, True], [False, False, True]])
    assert logits_TC.softmax(-1)[0, 0] == 0
    assert weights_without_zero(logits_TC, map_TC, 1).tolist() == [[1, 0, 0], [0, 0, 0]]


def test_only_zero_experts_still_make_a_layer() -> None:
    model = small_model(constant_experts=0, copy_experts=0, gating_residual=False)
    assert not any("free_experts" in name or "gate_map" in name for name, _ in model.named_parameters())
    outputs = model(tokens(), output_free_routing_map=True)
    assert [map_TZ.shape for map_TZ in outputs.free_routing_map] == [(40, ZERO)] * 3
    assert torch.isfinite(outputs.logits).all()


def test_logits_are_carried_over_dense_layers_and_hidden_states_stay_as_they_are() -> None:
    model, seen = small_model(), []
    routers = [model.model.layers[i].mlp.router for i in (0, 2, 3)]
    for router in routers:
        router.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    names = ("router_logits", "routing_map", "free_routing_map", "hidden_states")
    outputs = model(tokens(), **{f"output_{name}": True for name in names})
    assert [h.shape for h in outputs.hidden_states] == [(2, 20, D)] * 5
    assert not hasattr(routers[0], "gate_map")
    assert torch.equal(outputs.router_logits[0], seen[0] @ routers[0].weight.T)
    for router, x_TD, (before_TC, logits_TC) in zip(
        routers[1:], seen[1:], pairwise(outputs.router_logits), strict=True
    ):
        torch.testing.assert_close(logits_TC, x_TD @ router.weight.T + before_TC @ router.gate_map.T)
    for map_TE, map_TZ, logits_TC in zip(
        outputs.routing_map, outputs.free_routing_map, outputs.router_logits, strict=True
    ):
        assert (map_TE.shape, map_TZ.shape, map_TZ.dtype) == ((40, E), (40, Z), torch.bool)
        best_TC = torch.zeros(40, C, dtype=torch.bool).scatter(1, logits_TC.topk(2).indices, True)
        assert torch.equal(torch.cat([map_TE, map_TZ], dim=1), best_TC)
    assert all(torch.stack(outputs.free_routing_map).any(dim=0).any(dim=0))
    assert model(tokens()).free_routing_map is None


def test_cache_changes_nothing() -> None:
    model, ids = small_model(**RELEASED), tokens()
    run = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **run), model.generate(ids, use_cache=False, **run))


def test_gradient_checkpointing_changes_nothing() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = small_model().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(tokens(), labels=tokens()).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.equal(gradients[1][name], gradient), name
    for name in ("router.gate_map", "free_experts.select", "free_experts.values"):
        assert gradients[0][f"model.layers.2.mlp.{name}"].abs().sum() > 0


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("zero_experts", {"zero_experts": -1}),
        ("drop_zero_weight", {"drop_zero_weight": True, "zero_experts": 0}),
        ("drop_zero_weight", {"drop_zero_weight": True, "router_gate": "cosine"}),
        ("logits_norm_std", {"logits_norm_std": 0.0}),
        ("expert_input_scale", {"expert_input_scale": -2.0}),
        ("gating_residual", {"experts_by_layer": [4, 0, 3, 4]}),
    ],
)
def test_impossible_configurations_are_refused(field: str, changes) -> None:
    with pytest.raises(ValueError, match=f"{field} is .*must be"):
        DynMoEHFConfig(**(SMALL | changes))


def released_checkpoint(first_map: bool) -> tuple[Namespace, dict[str, torch.Tensor]]:
    """A checkpoint in bfloat16 with one key per layer; megatron may or may not give the first mixture a map."""
    changes = {"moe_gate": "tanh", "moe_rule": "top-k", "moe_gating_residual": True, "moe_drop_zero_weight": True}
    counts = {"moe_constant_experts": CONSTANT, "moe_copy_experts": COPY, "moe_zero_experts": ZERO}
    args = Namespace(**(ARGS | changes | counts), moe_expert_input_scale=2.0, moe_logits_norm_std=1.5, moe_tau=0.5)
    args.moe_layer_freq = [1, 1]
    columns, width = args.num_experts + Z, args.hidden_size
    weights = megatron_weights(args)
    for i in range(2):
        layer = f"decoder.layers.{i}.mlp"
        weights |= {
            f"{layer}.router.weight": draw(columns, 8 * columns),
            f"{layer}.router.hidden_weight": draw(8 * columns, width),
            f"{layer}.free_experts.select": draw(CONSTANT, 2, width),
            f"{layer}.free_experts.values": draw(CONSTANT, width),
        }
        if first_map or i:
            weights[f"{layer}.router.gate_map"] = draw(columns, columns)
    return args, {key: weight.bfloat16() for key, weight in weights.items()}


@pytest.mark.parametrize("first_map", [False, True])
def test_export_keeps_routers_in_float32_and_free_experts_in_the_models_dtype(tmp_path: Path, first_map: bool) -> None:
    args, weights = released_checkpoint(first_map)
    export(write_checkpoint(tmp_path / "save", args, weights), tmp_path / "out", progress=False)
    found = load_file(tmp_path / "out/model.safetensors")
    for i in range(2):
        for name in ("router.weight", "router.hidden_weight", "router.gate_map"):
            key = f"model.layers.{i}.mlp.{name}"
            assert (key in found) == (name != "router.gate_map" or i == 1)
            if key in found:
                assert torch.equal(found[key], weights[f"decoder.layers.{i}.mlp.{name}"].float())
                assert found[key].dtype == torch.float32
        for name in ("free_experts.select", "free_experts.values"):
            exported = found[f"model.layers.{i}.mlp.{name}"]
            assert exported.dtype == torch.bfloat16
            assert torch.equal(exported, weights[f"decoder.layers.{i}.mlp.{name}"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert {name for name, p in model.named_parameters() if p.dtype == torch.float32} == {
        name for name in found if ".router." in name
    }
    config = model.config
    assert (config.router_gate, config.gating_residual, config.drop_zero_weight) == ("tanh", True, True)
    assert (config.expert_input_scale, config.logits_norm_std) == (2.0, 1.5)
    assert (config.constant_experts, config.copy_experts, config.zero_experts) == (CONSTANT, COPY, ZERO)
    assert torch.isfinite(model(torch.arange(10).unsqueeze(0)).logits).all()


@pytest.mark.parametrize(
    ("name", "what"),
    [("1.mlp.router.gate_map", "must have"), ("1.mlp.free_experts.values", "must have"), (None, "the arguments say")],
)
def test_export_refuses_missing_and_misshapen_weights(tmp_path: Path, name: str | None, what: str) -> None:
    args, weights = released_checkpoint(False)
    if name:
        del weights[f"decoder.layers.{name}"]
    else:
        args.moe_zero_experts += 1
    save = write_checkpoint(tmp_path / "save", args, weights)
    with pytest.raises(CheckpointError, match=what):
        export(save, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
