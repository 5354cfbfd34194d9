"""What an import refuses: damaged or foreign folders, models that training cannot express, targets it would destroy."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_dynmoe.checkpoint import CheckpointError
from megatron_dynmoe.hf.export import export
from megatron_dynmoe.hf.importing import import_model
from megatron_dynmoe.programs import import_hf
from tests.hf_checkpoints import make

ROOT = Path(__file__).resolve().parents[2]
FIRST = "model.layers.0.self_attn.q_proj.weight"
ROUTER = "model.layers.1.mlp.router.weight"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export in one file, and one in many."""
    folder = tmp_path_factory.mktemp("whole")
    save, _ = make(folder / "save")
    export(save, folder / "one", progress=False)
    export(save, folder / "many", progress=False, max_shard_bytes=1000)
    return folder


def refused(model: Path, sentence: str, out: Path | None = None, **kwargs) -> None:
    """The import fails with one sentence that matches, and leaves nothing."""
    out = out or model.parent / "out"
    before = sorted(out.parent.iterdir())
    with pytest.raises(CheckpointError, match=sentence) as error:
        import_model(model, out, progress=False, **kwargs)
    assert "\n" not in str(error.value)
    assert sorted(out.parent.iterdir()) == before


def copied(whole: Path, folder: Path, which: str = "one") -> Path:
    return Path(shutil.copytree(whole / which, folder / "model"))


def test_folders_that_are_no_exported_model_are_refused(tmp_path: Path, whole: Path) -> None:
    refused(tmp_path / "nothing", "is not a folder; give one that tools/export_hf.py wrote")
    model = copied(whole, tmp_path)
    config = json.loads((model / "config.json").read_text())
    for text, sentence in [
        (json.dumps(config | {"model_type": "mixtral"}), "says model_type 'mixtral'; accepted: 'dynmoe'"),
        ("[1]", "holds a list; accepted: a JSON object"),
        ('{"model_type": "dyn', "is no JSON"),
        ("\N{LATIN SMALL LETTER E WITH ACUTE}", "is no JSON"),
    ]:
        (model / "config.json").write_text(text, encoding="latin-1")
        refused(model, sentence)
    (model / "config.json").unlink()
    refused(model, "has no config.json")


def test_weights_that_are_pickles_are_not_read(tmp_path: Path, whole: Path) -> None:
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    model = copied(whole, tmp_path)
    (model / "model.safetensors").unlink()
    refused(model, "has neither model.safetensors nor .*index.json: it has no weights")
    torch.save(Bomb(), model / "pytorch_model.bin")
    refused(model, r"its weights are pickles \(pytorch_model.bin\), which are not read; accepted: safetensors")
    assert not (tmp_path / "ran").exists()


def test_missing_and_truncated_shards_are_refused(tmp_path: Path, whole: Path) -> None:
    model = copied(whole, tmp_path, "many")
    shard = sorted(model.glob("*.safetensors"))[2]
    good = shard.read_bytes()
    for length in (len(good) - 1, len(good) // 2, 20, 0):
        shard.write_bytes(good[:length])
        refused(model, f"{shard.name} is damaged or was cut off")
    shard.unlink()
    refused(model, f"{shard.name} is missing; .*index.json names it")
    shard.write_bytes(good)
    import_model(model, tmp_path / "out", progress=False)


def test_an_index_that_disagrees_with_its_shards_is_refused(tmp_path: Path, whole: Path) -> None:
    model = copied(whole, tmp_path, "many")
    index = model / "model.safetensors.index.json"
    good = json.loads(index.read_text())["weight_map"]
    other = next(file for file in good.values() if file != good[FIRST])
    for weight_map, sentence in [
        ({name: file for name, file in good.items() if name != FIRST}, f"has a tensor {FIRST} that .* does not place"),
        (good | {FIRST: other}, f"has a tensor {FIRST} that .* does not place there"),
        (good | {"model.new.weight": other}, "lacks model.new.weight, which"),
        (good | {FIRST: "../model/" + good[FIRST]}, f"places {FIRST} in '../model/.*'; accepted"),
        (good | {FIRST: 3}, f"places {FIRST} in 3; accepted"),
        ({}, "has no weight_map"),
    ]:
        index.write_text(json.dumps({"weight_map": weight_map}))
        refused(model, sentence)


def test_tensors_that_disagree_with_the_configuration_are_refused(tmp_path: Path, whole: Path) -> None:
    model = copied(whole, tmp_path)
    good = load_file(model / "model.safetensors")
    for changed, sentence in [
        ({name: t for name, t in good.items() if name != ROUTER}, f"has no tensor {ROUTER}, which its config.json"),
        (good | {"model.layers.2.new": torch.ones(1)}, "has a tensor model.layers.2.new that its config.json has no"),
        (good | {FIRST: good[FIRST].T.contiguous()}, f"{FIRST} in .* is 8x16, its config.json says 16x8"),
        (good | {FIRST: good[FIRST].flatten()}, f"{FIRST} in .* is 128, its config.json says 16x8"),
        (good | {FIRST: good[FIRST].to(torch.int8)}, f"{FIRST} in .* is stored as I8; the import reads float32"),
        (good | {FIRST: good[FIRST].half()}, "are float16 and float32; give one with --dtype"),
        (
            good | {"model.layers.1.input_layernorm.weight": torch.ones(8).half()},
            "comes from float16 and float32; give",
        ),
    ]:
        save_file(changed, model / "model.safetensors")
        refused(model, sentence)


CONFIGS = [
    ({"hidden_size": 12}, "its config.json says"),
    ({"num_hidden_layers": 3}, "moe_layers is"),
    ({"tie_word_embeddings": True}, "has a tensor lm_head.weight that its config.json has no place for"),
    ({"hidden_act": "gelu"}, "says hidden_act = 'gelu', which the training cannot express; accepted: 'silu'"),
    ({"attention_bias": True}, "says attention_bias = True"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 500.5}}, "says rope_parameters = "),
    ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}}, "says rope_parameters = "),
    ({"quantization_config": {"quant_method": "bitsandbytes"}}, "says quantization_config = "),
    ({"wonder": 3}, "says wonder = 3, which the training cannot express"),
    ({"num_experts": 0}, "num_experts is 0"),
    ({"head_dim": 0}, "says head_dim = 0"),
    ({"hidden_size": "8"}, "makes no model"),
    ({"num_hidden_layers": 0, "moe_layers": []}, "makes no model"),
    ({"experts_by_layer": [3, 3]}, "says experts_by_layer .* accepted: for each mixture as many slots"),
    ({"experts_by_layer": [2, 1], "expert_slots": [[1, 0], [2]]}, "says experts_by_layer"),
    ({"experts_by_layer": [2, 1], "expert_slots": [[0, 3], [2]]}, "says experts_by_layer"),
    ({"experts_by_layer": [2, 1], "expert_slots": [[0, 1], [2]]}, "has no place for"),
    ({"router_rule": "top-any"}, "router_rule is"),
]


@pytest.mark.parametrize(("changes", "sentence"), CONFIGS, ids=[next(iter(changes)) for changes, _ in CONFIGS])
def test_configurations_that_make_no_trainable_model_are_refused(
    tmp_path: Path, whole: Path, changes, sentence
) -> None:
    model = copied(whole, tmp_path)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | changes))
    refused(model, sentence)


def test_requests_that_cannot_be_met_are_refused(tmp_path: Path, whole: Path) -> None:
    model = copied(whole, tmp_path)
    refused(model, "dtype is 'int8'; accepted: float32", dtype="int8")
    refused(model, "divisible_by is 0; accepted: a whole number of at least 1", divisible_by=0)
    refused(model, "max_added_experts is 2, but the experts of .* are fixed", max_added_experts=2)


def test_an_output_that_exists_stays(tmp_path: Path, whole: Path, capsys) -> None:
    model = copied(whole, tmp_path)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/note").write_text("mine")
    for name in ("file", "full", "model"):
        refused(model, f"output .*{name} exists; give a folder", out=tmp_path / name)
    assert (tmp_path / "file").read_text() == (tmp_path / "full/note").read_text() == "mine"
    assert import_hf.main(["--model", str(model), "--output", str(tmp_path / "full")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    (tmp_path / "empty").mkdir()
    import_model(model, tmp_path / "empty", progress=False)


def test_a_full_disk_leaves_nothing(tmp_path: Path, whole: Path) -> None:
    """A limit on the size of a file stands for a full disk: writes fail in the same places, with another number."""
    model = copied(whole, tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for room in (10, 4 << 10, 16 << 10, 40 << 10):
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
        try:
            with pytest.raises(CheckpointError) as error:
                import_model(model, tmp_path / "out", progress=False)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert f"{tmp_path / 'out'} cannot be written (" in str(error.value) and "\n" not in str(error.value)
        assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_an_interrupted_import_leaves_nothing(tmp_path: Path, whole: Path) -> None:
    model = copied(whole, tmp_path)
    # Slow reads, so that the signal arrives in the middle.
    code = (
        "import sys, time; from megatron_dynmoe.programs import import_hf; "
        "from megatron_dynmoe.hf.folder import ModelFolder as M; "
        "read = M.read; M.read = lambda *a: (print('reading', flush=True), time.sleep(0.2), read(*a))[2]; "
        "sys.exit(import_hf.main(['--model', sys.argv[1], '--output', sys.argv[2]]))"
    )
    command = [sys.executable, "-c", code, str(model), str(tmp_path / "out")]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as process:
        assert process.stdout.readline().strip() == "reading"
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted" in said
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_shard_that_vanishes_while_it_is_read_leaves_nothing(tmp_path: Path, whole: Path, monkeypatch) -> None:
    from megatron_dynmoe.hf import importing

    model = copied(whole, tmp_path, "many")

    def then_remove(check: Callable) -> Callable:
        def checked(*args) -> None:
            check(*args)
            sorted(model.glob("*.safetensors"))[-1].unlink()

        return checked

    monkeypatch.setattr(importing, "_check_tensors", then_remove(importing._check_tensors))
    refused(model, "safetensors cannot be read")
