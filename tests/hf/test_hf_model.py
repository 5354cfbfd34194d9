"""The Hugging Face model alone: its routing rule, its mixture, its cache, and saving and loading with remote code."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_dynmoe.hf.configuration_dynmoe import DynMoEHFConfig
from megatron_dynmoe.hf.modeling_dynmoe import DynMoEForCausalLM, DynMoESparseMLP
from megatron_dynmoe.hf.router_dynmoe import DynMoERouter
from megatron_dynmoe.routers import GATES, RULES

SMALL = {
    **{"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4},
    **{
        "num_key_value_heads": 2,
        "head_dim": 16,
        "moe_layers": [1, 0, 1],
        "num_experts": 6,
        "moe_intermediate_size": 24,
    },
    **{"shared_expert_intermediate_size": 16, "shared_expert_gate": True, "max_position_embeddings": 64},
    # Wide enough that logits differ by far more than rounding, and that tokens get different numbers of experts.
    **{"initializer_range": 0.3, "eos_token_id": None, "bos_token_id": None},
}


def rule(**changes) -> DynMoEHFConfig:
    """A configuration whose routing rule is what counts."""
    return DynMoEHFConfig(**(SMALL | changes))


def select_experts(probs_TE: torch.Tensor, config: DynMoEHFConfig, thresholds_E: torch.Tensor | None = None):
    """Weights and map of the model's router for scores that are given."""
    router = DynMoERouter(config, probs_TE.shape[1])
    gate = RULES[config.router_rule].gates or ("softmax",)
    given = replace(GATES[gate[0]], function=lambda x_TD, *_: x_TD, scores=lambda logits_TC: logits_TC)
    router.weight.data = torch.zeros(probs_TE.shape[1], 1)
    if thresholds_E is not None:
        router.thresholds.data = thresholds_E
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(GATES, gate[0], given)
        _, weights_TE, map_TE, *_ = router(probs_TE)
    return weights_TE.detach(), map_TE


def small_model(**changes) -> DynMoEForCausalLM:
    torch.manual_seed(0)
    return DynMoEForCausalLM(DynMoEHFConfig(**(SMALL | changes))).eval()


def tokens(rows: int = 2, length: int = 20) -> torch.Tensor:
    return torch.randint(0, 97, (rows, length), generator=torch.Generator().manual_seed(1))


def select_by_loop(probs: list[float], config: DynMoEHFConfig) -> list[float]:
    """The rule for one token as a loop: take the most probable expert while what was taken before is at most p."""
    order = sorted(range(len(probs)), key=lambda e: -probs[e])
    kept, taken = [], torch.tensor(0.0)
    for e in order:
        if config.router_rule == "top-k" and len(kept) == config.num_experts_per_tok:
            break
        if config.router_rule == "top-p" and taken > config.top_p_threshold:
            break
        kept.append(e)
        taken = taken + probs[e]
    kept = kept[: config.max_experts_per_token]
    total = sum(probs[e] for e in kept) if config.normalize_router_weights else 1.0
    return [probs[e] / total if e in kept else 0.0 for e in range(len(probs))]


@pytest.mark.parametrize("cap", [None, 1, 3])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("name", "p"), [("top-p", 0.0), ("top-p", 0.4), ("top-p", 0.9), ("top-k", 0.0)])
def test_rule_against_a_loop(name: str, p: float, normalize: bool, cap: int | None) -> None:
    own = {"top_p_threshold": p} if name == "top-p" else {"num_experts_per_tok": 2}
    config = rule(router_rule=name, normalize_router_weights=normalize, max_experts_per_token=cap, **own)
    probs_TE = (2 * torch.randn(50, 8, generator=torch.Generator().manual_seed(2))).softmax(-1)
    weights_TE, map_TE = select_experts(probs_TE, config)
    want_TE = torch.tensor([select_by_loop(row.tolist(), config) for row in probs_TE])
    assert torch.equal(map_TE, want_TE > 0)
    torch.testing.assert_close(weights_TE, want_TE, rtol=1e-6, atol=0)  # one division in float32 against float64


@pytest.mark.parametrize(
    ("probs", "p", "kept"),
    [
        ([0.5, 0.3, 0.15, 0.05], 0.5, [0, 1]),  # 0.5 is not more than 0.5, so the second expert still comes
        ([0.5, 0.3, 0.15, 0.05], 0.6, [0, 1]),
        ([0.05, 0.15, 0.3, 0.5], 0.0, [3]),
        ([0.25] * 4, 1.0, [0, 1, 2, 3]),
        ([0.25] * 4, 0.0, [0]),  # ties go to the first
        ([1.0, 0.0, 0.0, 0.0], 1.0, [0, 1, 2, 3]),
    ],
)
def test_rule_by_hand(probs: list[float], p: float, kept: list[int]) -> None:
    _, map_TE = select_experts(torch.tensor([probs]), rule(top_p_threshold=p))
    assert map_TE[0].nonzero().flatten().tolist() == kept


@pytest.mark.parametrize("cap", [None, 1, 2])
def test_top_any_against_a_loop(cap: int | None) -> None:
    scores_TE = torch.rand(60, 5, generator=torch.Generator().manual_seed(4))
    learned_E = torch.tensor([-0.8, 2.2, 0.4, 30.0, 0.8])
    thresholds_E = learned_E.sigmoid()  # one of them is 1, which no score passes
    config = rule(router_rule="top-any", router_gate="cosine", max_experts_per_token=cap)
    weights_TE, map_TE = select_experts(scores_TE, config, learned_E)
    fell_back = 0
    for scores, weights, chosen in zip(scores_TE.tolist(), weights_TE, map_TE.tolist(), strict=True):
        wanted = [e for e in range(5) if scores[e] > thresholds_E[e]]
        fell_back += not wanted
        wanted = wanted or [max(range(5), key=lambda e: scores[e])]
        wanted = sorted(wanted, key=lambda e: -scores[e])[:cap]
        assert sorted(wanted) == [e for e in range(5) if chosen[e]]
        want = torch.tensor([1 / len(wanted) if e in wanted else 0.0 for e in range(5)])
        assert torch.equal(weights, want)
    assert fell_back > 0


def test_p_of_one_keeps_all_experts_whatever_rounding_does() -> None:
    probs_TE = torch.randn(2000, 64, generator=torch.Generator().manual_seed(3)).softmax(-1)
    assert (probs_TE.cumsum(-1) > 1).any()  # the case that could go wrong is there
    _, map_TE = select_experts(probs_TE, rule(top_p_threshold=1.0))
    assert map_TE.all()


def test_mixture_is_the_dense_sum() -> None:
    torch.manual_seed(0)
    config = DynMoEHFConfig(**SMALL)
    layer = DynMoESparseMLP(config).eval()
    torch.nn.init.normal_(layer.router.weight, std=0.2)
    layer.router.weight.data[5] = layer.router.weight.data[4]  # two experts that tie for every token
    x = torch.randn(3, 7, 32)
    _, weights_TE, map_TE, *_ = layer.router(x.reshape(-1, 32))
    dense = torch.stack([expert(x) for expert in layer.experts], dim=-1) @ weights_TE.view(3, 7, 6, 1)
    want = dense.squeeze(-1) + layer.shared_expert(x) * layer.shared_expert_gate(x).sigmoid()
    assert len(map_TE.sum(-1).unique()) > 1, "the case needs tokens with different numbers of experts"
    # Two float32 sums of at most seven terms in another order: a few units in the last place of values near one.
    torch.testing.assert_close(layer(x), want, rtol=1e-5, atol=1e-5)


def test_cache_changes_nothing() -> None:
    model, ids = small_model(), tokens()
    mask = torch.ones_like(ids)
    mask[0, :5] = 0  # left padding, as in a batch of prompts
    run = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **run), model.generate(ids, use_cache=False, **run))
    with torch.no_grad():
        whole = model(ids).logits
        first = model(ids[:, :12], use_cache=True)
        rest = model(ids[:, 12:], past_key_values=first.past_key_values).logits
    # Float32 sums in another order, on logits of magnitude five.
    torch.testing.assert_close(torch.cat([first.logits, rest], dim=1), whole, rtol=0, atol=1e-4)


def test_padding_does_not_reach_the_text() -> None:
    model, ids = small_model(), tokens(1, 12)
    padded = torch.cat([torch.full((1, 4), 7), ids], dim=1)
    mask = (torch.arange(16) >= 4).long().unsqueeze(0)
    with torch.no_grad():
        alone = model(ids).logits
        beside = model(padded, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits[:, 4:]
    torch.testing.assert_close(beside, alone, rtol=0, atol=1e-4)  # as above


def test_routing_can_be_watched() -> None:
    model, ids = small_model(), tokens()
    outputs = model(ids, output_router_logits=True, output_routing_map=True)
    assert [t.shape for t in outputs.router_logits] == [t.shape for t in outputs.routing_map] == [(40, 6)] * 2
    _, want_TE = select_experts(outputs.router_logits[1].softmax(-1), model.config)
    assert torch.equal(outputs.routing_map[1], want_TE)
    assert model(ids).routing_map is None


def test_loss_reaches_router_and_experts() -> None:
    model, ids = small_model().train(), tokens()
    outputs = model(ids, labels=ids, output_routing_map=True)
    want = torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(outputs.loss, want)
    outputs.loss.backward()
    used_E = outputs.routing_map[0].any(0)
    for expert, used in zip(model.model.layers[0].mlp.experts, used_E, strict=True):
        assert (expert.down_proj.weight.grad is not None) == bool(used)
    assert model.model.layers[0].mlp.router.weight.grad.abs().sum() > 0


def test_saved_and_loaded_in_another_process(tmp_path: Path) -> None:
    models = {name: small_model(tie_word_embeddings=name == "tied") for name in ("tied", "untied")}
    ids = tokens()
    DynMoEHFConfig.register_for_auto_class()
    DynMoEForCausalLM.register_for_auto_class("AutoModelForCausalLM")
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    torch.save(ids, tmp_path / "ids.pt")
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM as A; ids = torch.load('ids.pt'); "
        "load = lambda name: A.from_pretrained(name, trust_remote_code=True); "
        "torch.save({name: load(name)(ids).logits.detach() for name in sys.argv[1:]}, 'logits.pt'); "
        "assert 'megatron_dynmoe' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code, *models], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name, found in torch.load(tmp_path / "logits.pt").items():
        assert torch.equal(found, models[name](ids).logits), name


def test_bfloat16_keeps_router_and_rotary_frequencies_in_float32(tmp_path: Path) -> None:
    model, ids = small_model(), tokens()
    DynMoEHFConfig.register_for_auto_class()
    DynMoEForCausalLM.register_for_auto_class("AutoModelForCausalLM")
    model.save_pretrained(tmp_path)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True, dtype=torch.bfloat16)
    wide = {name for name, p in half.named_parameters() if p.dtype == torch.float32}
    assert wide == {"model.layers.0.mlp.router.weight", "model.layers.2.mlp.router.weight"}
    assert torch.equal(half.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    assert half(ids, output_router_logits=True).router_logits[0].dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(ids, output_router_logits=True).router_logits[0].dtype == torch.float32


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("top_p_threshold", 1.5),
        ("router_rule", "top-any"),
        ("moe_layers", [1, 0]),
        ("max_experts_per_token", 0),
        ("num_key_value_heads", 3),
        ("head_dim", 5),
    ],
)
def test_impossible_configurations_are_refused(field: str, value) -> None:
    with pytest.raises(ValueError, match=f"{field} is .*must be"):
        DynMoEHFConfig(**(SMALL | {field: value}))
