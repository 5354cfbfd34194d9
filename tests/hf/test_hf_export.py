"""Export of hand-written distributed checkpoints: names, layouts, precision, and what bad input is answered with."""

import importlib.util
import json
import re
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from megatron_dynmoe.checkpoint import CheckpointError
from megatron_dynmoe.checkpoint.reader import DistCheckpoint
from megatron_dynmoe.hf.export import export
from tests.hf_checkpoints import ARGS, ROWS, make, megatron_weights, write_checkpoint
from tests.written_before import unpacked

ROOT = Path(__file__).resolve().parents[2]


def exported(save: Path, out: Path, **kwargs) -> dict[str, torch.Tensor]:
    """All tensors of an export."""
    export(save, out, progress=False, **kwargs)
    return {name: t for file in sorted(out.glob("*.safetensors")) for name, t in load_file(file).items()}


def layer_weight(weights: dict[str, torch.Tensor], layer: int, name: str) -> torch.Tensor:
    """A layer's weight, whichever form its key has."""
    own = f"decoder.layers.{layer}.{name}"
    return weights[own] if own in weights else weights[f"decoder.layers.{name}"][layer]


@pytest.mark.parametrize(
    ("freq", "fused_norms"), [(1, False), (1, True), (2, False), (2, True), ([0, 1], True)], ids=str
)
def test_names_and_values(tmp_path: Path, freq, fused_norms: bool) -> None:
    save, weights = make(tmp_path / "save", fused_norms=fused_norms, moe_layer_freq=freq)
    found = exported(save, tmp_path / "out", vocab_size=17)
    sparse = [1, 1] if freq == 1 else [1, 0] if freq == 2 else freq
    assert json.loads((tmp_path / "out/config.json").read_text())["moe_layers"] == sparse
    want = {
        "model.embed_tokens.weight": weights["embedding.word_embeddings.weight"][:17],
        "lm_head.weight": weights["output_layer.weight"][:17],
        "model.norm.weight": weights["decoder.final_layernorm.weight"],
    }
    for i in range(2):
        want |= expected_layer(weights, i, bool(sparse[i]), fused_norms)
    assert found.keys() == want.keys()
    for name, tensor in want.items():
        assert torch.equal(found[name], tensor), name


def expected_layer(weights, i: int, sparse: bool, fused_norms: bool) -> dict[str, torch.Tensor]:
    hf = f"model.layers.{i}"
    norm = "mlp.linear_fc1.layer_norm_weight" if fused_norms and not sparse else "pre_mlp_layernorm.weight"
    input_norm = "self_attention.linear_qkv.layer_norm_weight" if fused_norms else "input_layernorm.weight"
    want = {
        f"{hf}.input_layernorm.weight": layer_weight(weights, i, input_norm),
        f"{hf}.post_attention_layernorm.weight": layer_weight(weights, i, norm),
        f"{hf}.self_attn.o_proj.weight": layer_weight(weights, i, "self_attention.linear_proj.weight"),
    }
    # Row by row: group g of 2 holds query heads 2g and 2g + 1, then key head g, then value head g, 4 rows a head.
    qkv = layer_weight(weights, i, "self_attention.linear_qkv.weight").split(4)
    want[f"{hf}.self_attn.q_proj.weight"] = torch.cat([qkv[0], qkv[1], qkv[4], qkv[5]])
    want[f"{hf}.self_attn.k_proj.weight"] = torch.cat([qkv[2], qkv[6]])
    want[f"{hf}.self_attn.v_proj.weight"] = torch.cat([qkv[3], qkv[7]])
    if not sparse:
        fc1 = layer_weight(weights, i, "mlp.linear_fc1.weight")
        down = layer_weight(weights, i, "mlp.linear_fc2.weight")
        parts = {"gate_proj": fc1[:12], "up_proj": fc1[12:], "down_proj": down}
        return want | {f"{hf}.mlp.{name}.weight": part for name, part in parts.items()}
    want[f"{hf}.mlp.router.weight"] = layer_weight(weights, i, "mlp.router.weight")
    for e in range(3):
        fc1 = layer_weight(weights, i, "mlp.experts.experts.linear_fc1.weight")[e]
        down = layer_weight(weights, i, "mlp.experts.experts.linear_fc2.weight")[e]
        parts = {"gate_proj": fc1[:6], "up_proj": fc1[6:], "down_proj": down}
        want |= {f"{hf}.mlp.experts.{e}.{name}.weight": part for name, part in parts.items()}
    return want


def test_config_says_what_was_trained(tmp_path: Path) -> None:
    changes = {"moe_max_experts_per_token": 2, "rotary_base": 500, "untie_embeddings_and_output_weights": False}
    save, _ = make(tmp_path / "save", **changes)
    found = exported(save, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert "lm_head.weight" not in found
    wanted = {
        **{"tie_word_embeddings": True, "vocab_size": ROWS, "router_rule": "top-p", "top_p_threshold": 0.5},
        **{"max_experts_per_token": 2, "num_key_value_heads": 2, "head_dim": 4, "rms_norm_eps": 1e-5},
        **{"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "model_type": "dynmoe"},
    }
    assert {name: config[name] for name in wanted} == wanted


def test_a_stock_top_k_checkpoint_has_normalised_weights_unless_pre_softmax(tmp_path: Path) -> None:
    for pre_softmax in (False, True):
        args = {name: value for name, value in ARGS.items() if name not in ("moe_rule", "moe_gate", "moe_top_p")}
        args = Namespace(**args, moe_router_pre_softmax=pre_softmax)
        save = write_checkpoint(tmp_path / f"save-{pre_softmax}", args, megatron_weights(args))
        export(save, tmp_path / f"out-{pre_softmax}", progress=False)
        config = json.loads((tmp_path / f"out-{pre_softmax}/config.json").read_text())
        assert (config["router_rule"], config["normalize_router_weights"]) == ("top-k", not pre_softmax)


def test_bfloat16_keeps_the_router_in_float32(tmp_path: Path) -> None:
    save, _ = make(tmp_path / "save", dtype=torch.bfloat16)
    for dtype, wanted in [(None, torch.bfloat16), ("float32", torch.float32)]:
        found = exported(save, tmp_path / f"out-{dtype}", dtype=dtype)
        routers = {t.dtype for name, t in found.items() if name.endswith("router.weight")}
        assert routers == {torch.float32}
        assert {t.dtype for name, t in found.items() if not name.endswith("router.weight")} == {wanted}


def test_shards_and_their_index(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    save, _ = make(tmp_path / "save")
    whole = exported(save, tmp_path / "whole")
    done = export(save, tmp_path / "parts", max_shard_bytes=4000, progress=False)
    files = sorted((tmp_path / "parts").glob("*.safetensors"))
    assert len(files) == done.shards > 1
    index = json.loads((tmp_path / "parts/model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == whole.keys()
    assert index["metadata"]["total_size"] == done.bytes == sum(t.nbytes for t in whole.values())
    for file in files:
        with safe_open(file, "pt") as shard:
            assert all(index["weight_map"][name] == file.name for name in shard.keys())  # noqa: SIM118
            assert sum(shard.get_tensor(name).nbytes for name in shard.keys()) <= 4000  # noqa: SIM118
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "parts", trust_remote_code=True)
    assert all(torch.equal(tensor, whole[name]) for name, tensor in model.state_dict().items())


def test_chunks_of_many_ranks_join_and_a_missing_rank_is_noticed(tmp_path: Path) -> None:
    save, weights = make(tmp_path / "save")
    checkpoint = DistCheckpoint(save)
    key = "decoder.layers.mlp.experts.experts.linear_fc1.weight"
    assert torch.equal(checkpoint.read(key, (1, 2)), weights[key][1, 2])
    # Megatron writes several chunks of each layer: as if the rank that held layer 1 had not written.
    checkpoint = DistCheckpoint(unpacked("dynmoe", tmp_path / "before") / "save")
    chunks = checkpoint._chunks[key]
    assert torch.equal(checkpoint.read(key), torch.stack([checkpoint.read(key, (layer,)) for layer in range(2)]))
    chunks[:] = [place for place in chunks if place.offsets[0] == 0]
    assert checkpoint.read(key, (0,)).isfinite().all()
    with pytest.raises(CheckpointError, match="only a part"):
        checkpoint.read(key, (1,))


def test_the_program_needs_no_megatron(tmp_path: Path) -> None:
    save, _ = make(tmp_path / "save")
    code = (
        "import sys; sys.path.insert(0, 'tools'); import export_hf; code = export_hf.main(sys.argv[1:]); "
        "sys.exit(code or any(name.split('.')[0] == 'megatron' for name in sys.modules))"
    )
    command = [sys.executable, "-c", code, "--checkpoint", str(save), "--output", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"iter_0000003 -> .*out: 0\.0M parameters", done.stdout)


def program(name: str):
    """The module of tools/NAME.py."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"tools/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def keep_signals():
    """The export's program takes over SIGTERM."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def test_the_program_answers_bad_input_with_one_sentence(tmp_path: Path, capsys, keep_signals) -> None:
    save, _ = make(tmp_path / "save")
    (tmp_path / "broken.model").write_bytes(b"not a model")
    cases = [
        (["--output", str(save)], "output .* is not empty; "),
        (
            ["--output", str(tmp_path / "out"), "--tokenizer-model", str(tmp_path / "no.model")],
            "no.model is not a file; ",
        ),
        (["--output", str(tmp_path / "out"), "--tokenizer-model", str(tmp_path / "broken.model")], "broken.model"),
    ]
    for arguments, sentence in cases:
        assert program("export_hf").main(["--checkpoint", str(save), *arguments]) == 1
        assert re.fullmatch(rf"export_hf: .*{sentence}.*\n", capsys.readouterr().err)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.model", "save"]


def test_with_its_tokenizer_the_model_speaks(tmp_path: Path, capsys, keep_signals) -> None:
    model = train_tokenizer(tmp_path)
    args = Namespace(**ARGS)
    save = write_checkpoint(tmp_path / "save", args, megatron_weights(args, rows=384))
    out = str(tmp_path / "out")
    command = ["--checkpoint", str(save), "--output", out, "--tokenizer-model", str(model)]
    assert program("export_hf").main(command) == 0
    assert "vocabulary of 300" in capsys.readouterr().out
    config, generation = (
        json.loads((tmp_path / "out" / f).read_text()) for f in ("config.json", "generation_config.json")
    )
    assert (config["vocab_size"], config["eos_token_id"], generation["eos_token_id"]) == (300, 2, 2)
    generate = ["--model", out, "--max-new-tokens", "32"]
    assert program("generate").main([*generate, "--prompt", "the state of"]) == 0
    assert (greedy := capsys.readouterr().out).startswith("the state of")
    texts = []
    for seed, prompts in ((1, ["the state of"]), (1, ["a", "the state of"]), (2, ["the state of"])):
        sampled = ["--temperature", "1", "--seed", str(seed), "--prompt", *prompts]
        assert program("generate").main([*generate, *sampled]) == 0
        texts.append(capsys.readouterr().out)
    # the seed decides, and not the prompts beside it
    assert texts[1].startswith("a") and texts[1].endswith(f"\n---\n{texts[0]}")
    assert len({greedy, texts[0], texts[2]}) == 3


@pytest.mark.parametrize(
    "flag, value",
    [("--temperature", "-1"), ("--temperature", "nan"), ("--max-new-tokens", "0"), ("--seed", "-1")],
)
def test_generate_refuses_nonsense(flag, value, capsys) -> None:
    with pytest.raises(SystemExit) as refused:
        program("generate").main(["--model", "out", "--prompt", "a", flag, value])
    assert refused.value.code == 2 and f"{flag} is {value}" in capsys.readouterr().err.replace("-1.0", "-1")


def train_tokenizer(folder: Path) -> Path:
    """A SentencePiece BPE model of 300 pieces, with LLaMA's settings and no normalisation."""
    import sentencepiece

    text = folder / "text.txt"
    text.write_text("\n".join(f"the state of line {i} is {i * i} and the rest" for i in range(200)))
    settings = {
        **{"input": str(text), "model_prefix": str(folder / "tokenizer"), "vocab_size": 300, "model_type": "bpe"},
        **{"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False},
        **{"add_dummy_prefix": False, "minloglevel": 2},
    }
    sentencepiece.SentencePieceTrainer.train(**settings)
    text.unlink()
    return folder / "tokenizer.model"


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_interrupted_export_leaves_nothing(tmp_path: Path) -> None:
    save, _ = make(tmp_path / "save")
    # Slow reads, so that the signal arrives in the middle.
    code = (
        "import sys, time; sys.path.insert(0, 'tools'); import export_hf; "
        "from megatron_dynmoe.checkpoint.reader import DistCheckpoint as C; "
        "read = C.read; C.read = lambda *a: (print('reading', flush=True), time.sleep(0.2), read(*a))[2]; "
        "sys.exit(export_hf.main(['--checkpoint', sys.argv[1], '--output', sys.argv[2]]))"
    )
    command = [sys.executable, "-c", code, str(save), str(tmp_path / "out")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout.readline().strip() == "reading"
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert [path.name for path in tmp_path.iterdir()] == ["save"]
