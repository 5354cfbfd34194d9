"""The import of exported folders: round trips in bits, what comes back in place of what was left out, memory."""

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_dynmoe.checkpoint.reader import DistCheckpoint
from megatron_dynmoe.hf.export import export
from megatron_dynmoe.hf.importing import import_model
from megatron_dynmoe.programs import import_hf
from tests.hf.test_hf_code import a_method, checkpoint  # noqa: F401  (a fixture of this module, too)
from tests.hf.test_hf_moe_plus_plus import released_checkpoint
from tests.hf_checkpoints import ARGS, make, megatron_weights, write_checkpoint
from tests.written_before import NAMES, unpacked

ROOT = Path(__file__).resolve().parents[2]
SMALL = {
    **{"vocab_size": 21, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4},
    **{"num_key_value_heads": 4, "head_dim": 6, "moe_intermediate_size": 10, "num_experts": 5},
    **{"max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None},
    **{"initializer_range": 0.03, "rms_norm_eps": 1e-4},
}
TOP_ANY = {"router_gate": "cosine", "router_rule": "top-any", "cosine_scale": 4.0}
SLOTS = TOP_ANY | {"adaptive_experts": True}
ZERO_COMPUTATION = {"router_rule": "top-k", "constant_experts": 2, "copy_experts": 1, "zero_experts": 1}
SHARED = {"shared_expert_intermediate_size": 12}
# The presets, and what a model of any of them may have.
CASES = {
    "dynamic-moe": {"router_rule": "top-p", "top_p_threshold": 0.4},
    "capped": {"router_rule": "top-p", "top_p_threshold": 0.0, "max_experts_per_token": 3},
    "gshard": {"router_rule": "top-k", "num_experts_per_tok": 2, "normalize_router_weights": True},
    "switch": {"router_rule": "top-k", "num_experts_per_tok": 1},
    "fixed slots": TOP_ANY,
    "dynmoe": SLOTS
    | {"expert_slots": [[0, 2, 3], [1], [0, 1, 2, 3, 4]], "experts_by_layer": [3, 1, 5], "trained_cosine_scale": True},
    "dynmoe with dense layers": SLOTS
    | SHARED
    | {"expert_slots": [[4], [], [0, 3]], "experts_by_layer": [1, 0, 2], "moe_layers": [1, 0, 1]}
    | {"residual_mixture": True},
    "moe-plus-plus": ZERO_COMPUTATION | {"gating_residual": True},
    "moe-plus-plus with dense layers": ZERO_COMPUTATION | {"gating_residual": True, "moe_layers": [0, 1, 1]},
    "moe-plus-plus-released": ZERO_COMPUTATION
    | {"router_gate": "tanh", "gating_residual": True, "drop_zero_weight": True, "expert_input_scale": 2.0}
    | {"logits_norm_std": 1.5},
    "grouped queries, tied": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "threshold": {"router_rule": "threshold", "threshold": 0.2, "learned_thresholds": True},
    "one key head": {"num_key_value_heads": 1, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "shared expert": SHARED | {"moe_layers": [0, 1, 0]},
    "shared expert with gate": SHARED | {"shared_expert_gate": True},
    "dense": {"moe_layers": [0, 0, 0], "num_experts": 1, "moe_intermediate_size": 24},
}


def model_folder(folder: Path, dtype: torch.dtype = torch.float32, **changes) -> dict[str, torch.Tensor]:
    """A model with random weights as transformers saves it; its tensors."""
    from megatron_dynmoe.hf.configuration_dynmoe import DynMoEHFConfig
    from megatron_dynmoe.hf.modeling_dynmoe import DynMoEForCausalLM

    torch.manual_seed(0)
    model = DynMoEForCausalLM(DynMoEHFConfig(**(SMALL | changes)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_()
            if ".router." not in name:
                parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    model.save_pretrained(folder)
    return tensors(folder)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of an exported folder."""
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    """The same names, dtypes and bits."""
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("case", CASES)
def test_export_of_an_import_is_equal_in_bits(tmp_path: Path, case: str) -> None:
    dtype = torch.bfloat16 if list(CASES).index(case) % 2 else torch.float32
    wanted = model_folder(tmp_path / "model", dtype, **CASES[case])
    done = import_model(tmp_path / "model", tmp_path / "imported", progress=False)
    export(done.path, tmp_path / "again", progress=False)
    equal(tensors(tmp_path / "again"), wanted)
    # A model saved by transformers names itself less; an export of an export's import names itself the same.
    saved, again = config(tmp_path / "model"), config(tmp_path / "again")
    assert {name: again.get(name) for name in saved if name != "auto_map"} == saved
    import_model(tmp_path / "again", tmp_path / "twice", progress=False)
    export(tmp_path / "twice", tmp_path / "and again", progress=False, max_shard_bytes=10_000)
    equal(tensors(tmp_path / "and again"), wanted)
    assert config(tmp_path / "and again") == again


@pytest.mark.parametrize("freq", [1, 2])
@pytest.mark.parametrize("fused", [False, True])
def test_checkpoints_of_another_writer_come_back(tmp_path: Path, freq: int, fused: bool) -> None:
    """Values against a checkpoint that this table did not write, in many shards and many files."""
    save, weights = make(tmp_path / "save", fused_norms=fused, moe_layer_freq=freq)
    export(save, tmp_path / "exported", progress=False, vocab_size=17, max_shard_bytes=1000)
    done = import_model(
        tmp_path / "exported", tmp_path / "imported", divisible_by=8, max_file_bytes=2000, progress=False
    )
    assert done.shards == len(list((tmp_path / "exported").glob("*.safetensors"))) > 3
    assert len(list((tmp_path / "imported/release").glob("*.distcp"))) > 3
    checkpoint = DistCheckpoint(tmp_path / "imported")
    for key, weight in weights.items():
        names = [key, key.replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_")]
        names.append(key.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_"))
        found = checkpoint.read(next(name for name in reversed(names) if name in checkpoint.shapes))
        if key in ("embedding.word_embeddings.weight", "output_layer.weight"):
            assert found.shape == (24, 8) and torch.equal(found[17:], torch.zeros(7, 8))
            found, weight = found[:17], weight[:17]
        assert torch.equal(found, weight), key
    assert done.new == ("7 rows of padding in the vocabulary of 24: zeros",)


def test_released_moe_plus_plus_in_bfloat16_and_its_first_map(tmp_path: Path) -> None:
    args, weights = released_checkpoint(True)
    export(write_checkpoint(tmp_path / "save", args, weights), tmp_path / "exported", progress=False)
    done = import_model(tmp_path / "exported", tmp_path / "imported", progress=False)
    export(done.path, tmp_path / "again", progress=False)
    equal(tensors(tmp_path / "again"), tensors(tmp_path / "exported"))
    assert config(tmp_path / "again") == config(tmp_path / "exported")
    maps = DistCheckpoint(done.path).read("decoder.layers.mlp.router.gate_map")
    assert not maps[0].any() and torch.equal(maps[1].bfloat16(), weights["decoder.layers.1.mlp.router.gate_map"])
    assert any("layer 0, the first mixture" in sentence for sentence in done.new)


def test_slots_come_back_at_their_places_and_the_others_can_learn(tmp_path: Path) -> None:
    wanted = model_folder(tmp_path / "model", **CASES["dynmoe"])
    done = import_model(tmp_path / "model", tmp_path / "imported", max_added_experts=2, progress=False)
    checkpoint = DistCheckpoint(done.path)
    router = "decoder.layers.mlp.router."
    masks = checkpoint.read(router + "experts_mask")
    assert [mask.nonzero().flatten().tolist() for mask in masks] == CASES["dynmoe"]["expert_slots"]
    first = checkpoint.read("decoder.layers.mlp.experts.experts.linear_fc1.weight", (0,))
    second = checkpoint.read("decoder.layers.mlp.experts.experts.linear_fc2.weight", (0,))
    gate = wanted["model.layers.0.mlp.experts.1.gate_proj.weight"]  # slot 2
    assert torch.equal(first[2, :10], gate)
    for slot in (1, 4):
        # Megatron's distributions: 320 and 160 draws lie within a tenth of them.
        assert first[slot].std() == pytest.approx(0.03, rel=0.15)
        assert second[slot].std() == pytest.approx(0.03 / 6**0.5, rel=0.15)
    assert not torch.equal(first[1], first[4])
    directions = checkpoint.read(router + "weight", (0,))[[1, 4]]
    torch.testing.assert_close(directions.norm(dim=-1), torch.ones(2))
    assert not checkpoint.read(router + "thresholds", (0,))[[1, 4]].any()
    # One bucket for each slot, as an update that may add two needs.
    assert checkpoint.shapes[router + "recorded_sums_BD"] == (3, 5, 16)
    assert not checkpoint.read(router + "schedule").any()
    assert any(sentence.startswith("6 inactive expert slots in 2 layers: newly drawn") for sentence in done.new)


@pytest.mark.parametrize("moved", [True, False])
def test_what_controllers_moved_comes_back(tmp_path: Path, moved: bool) -> None:
    """A method of another package: its setting as it stood in each layer, its parameter, its controller's state."""
    save = checkpoint(tmp_path / "save", "biased", "floor")
    export(save, tmp_path / "exported", progress=False)
    if not moved:  # an export without them: they begin anew
        said = config(tmp_path / "exported") | {"moved_settings": None}
        (tmp_path / "exported/config.json").write_text(json.dumps(said, indent=2, sort_keys=True) + "\n")
    done = import_model(tmp_path / "exported", tmp_path / "imported", progress=False)
    export(done.path, tmp_path / "again", progress=False)
    equal(tensors(tmp_path / "again"), tensors(tmp_path / "exported"))
    start = {} if moved else {"moved_settings": {"floor": pytest.approx([0.3, 0.3])}}
    assert config(tmp_path / "again") == config(tmp_path / "exported") | start
    imported, router = DistCheckpoint(done.path), "decoder.layers.mlp.router."
    assert {key.removeprefix(router) for key in imported.shapes if key.startswith(router)} == {
        *("weight", "bias", "floor", "floor_error"),
    }
    assert not moved or torch.equal(imported.read(router + "floor"), torch.tensor([0.05, 0.6]))
    at = done.flags.index("--moe-floor")
    assert done.flags[at + 1] == "0.3"


@pytest.mark.parametrize("name", NAMES)
def test_an_export_that_was_written_before_comes_back(tmp_path: Path, name: str) -> None:
    folder = unpacked(name, tmp_path / "before") / "export"
    done = import_model(folder, tmp_path / "imported", progress=False)
    export(done.path, tmp_path / "again", progress=False)
    equal(tensors(tmp_path / "again"), tensors(folder))


def test_dtype_by_flag_leaves_routers_in_float32(tmp_path: Path) -> None:
    wanted = model_folder(tmp_path / "model", **CASES["moe-plus-plus"])
    done = import_model(tmp_path / "model", tmp_path / "imported", dtype="bfloat16", progress=False)
    export(done.path, tmp_path / "again", progress=False)
    equal(
        tensors(tmp_path / "again"),
        {name: tensor if ".router." in name else tensor.bfloat16() for name, tensor in wanted.items()},
    )
    assert "--bf16" in done.flags


def test_the_program_says_what_is_new_and_how_training_begins(tmp_path: Path, capsys) -> None:
    args = Namespace(**(ARGS | {"moe_layer_freq": [0, 1], "moe_rule": "top-k", "moe_normalize_weights": True}))
    export(write_checkpoint(tmp_path / "save", args, megatron_weights(args)), tmp_path / "exported", progress=False)
    argv = ["--model", str(tmp_path / "exported"), "--output", str(tmp_path / "out"), "--dtype", "float16"]
    assert import_hf.main([*argv, "--make-vocab-size-divisible-by", "16"]) == 0
    said = capsys.readouterr().out
    assert f"--pretrained-checkpoint {tmp_path / 'out'} --load RUN --save RUN" in said
    assert "new: 12 rows of padding in the vocabulary of 32: zeros" in said and "new: optimizer" in said
    for flags in ("--moe-layer-freq '[0,1]'", "--num-query-groups 2", "--fp16", "--moe-rule top-k"):
        assert flags in said
    assert (tmp_path / "out/latest_checkpointed_iteration.txt").read_text() == "release"
    assert import_hf.main(argv) == 2
    assert f"import_hf: output {tmp_path / 'out'} exists; give" in capsys.readouterr().err


def test_memory_is_bounded_by_a_shard_and_a_file(tmp_path: Path) -> None:
    """160 MB in shards of 8 MB to files of 8 MB; a shard, a file and an expert fit into 24 MB."""
    command = [sys.executable, str(ROOT / "tests/hf_import_memory.py"), str(tmp_path), "160", "8"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["folder_mb"] > 150 and found["shards"] > 15
    assert found["peak_mb"] < 24
