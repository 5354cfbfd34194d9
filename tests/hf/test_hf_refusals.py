"""What an export refuses: damaged or foreign checkpoints, models it cannot express, targets it would destroy."""

import resource
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from megatron_dynmoe.checkpoint import CheckpointError
from megatron_dynmoe.hf.export import export
from tests.hf_checkpoints import ARGS, ROWS, make, megatron_weights, write_checkpoint


def refused(save: Path, out: Path, sentence: str, **kwargs) -> None:
    """The export fails with one sentence that matches, and leaves nothing."""
    before = sorted(out.parent.iterdir())
    with pytest.raises(CheckpointError, match=sentence) as error:
        export(save, out, progress=False, **kwargs)
    assert "\n" not in str(error.value)
    assert sorted(out.parent.iterdir()) == before


def test_what_the_model_cannot_express_is_refused(tmp_path: Path) -> None:
    for number, (name, value) in enumerate(
        [("add_bias_linear", True), ("rotary_percent", 0.5), ("moe_gate", "sinkhorn")]
    ):
        save, _ = make(tmp_path / f"save{number}", **{name: value})
        refused(save, tmp_path / "out", f"{name} = {value!r}")


def test_missing_leftover_and_misshapen_weights_are_refused(tmp_path: Path) -> None:
    args = Namespace(**ARGS)
    weights = megatron_weights(args)
    router = "decoder.layers.mlp.router.weight"
    missing = {key: w for key, w in weights.items() if key != router}
    refused(write_checkpoint(tmp_path / "a", args, missing), tmp_path / "out", "mlp.router.weight, which")
    extra = weights | {"decoder.layers.self_attention.q_layernorm.weight": torch.ones(2, 4)}
    refused(write_checkpoint(tmp_path / "b", args, extra), tmp_path / "out", "no place for .*q_layernorm")
    wide = weights | {router: torch.ones(2, 4, 8)}
    refused(write_checkpoint(tmp_path / "c", args, wide), tmp_path / "out", "is 4x8, the arguments say 3x8")


def test_a_vocabulary_larger_than_the_embedding_is_refused(tmp_path: Path) -> None:
    save, _ = make(tmp_path / "save")
    refused(save, tmp_path / "out", f"has 21 tokens, but the embedding .* has {ROWS} rows", vocab_size=21)


def test_folders_that_are_no_checkpoint_are_refused(tmp_path: Path) -> None:
    save, _ = make(tmp_path / "save")
    refused(tmp_path / "nothing", tmp_path / "out", "is not a folder")
    refused(tmp_path, tmp_path / "out", "has no metadata.json")
    refused(save, tmp_path / "out", "iter_0000004 does not exist; iterations in .*: iter_0000003", iteration=4)
    refused(save, tmp_path / "out", "dtype is 'int8'; accepted: float32", dtype="int8")
    (save / "iter_0000003/metadata.json").unlink()
    refused(save, tmp_path / "out", "interrupted")


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    save, weights = make(tmp_path / "save")
    shard = next((save / "iter_0000003").glob("*.distcp"))
    good, meta = shard.read_bytes(), save / "iter_0000003/.metadata"
    shard.write_bytes(good[:-100])
    refused(save, tmp_path / "out", "is truncated")
    # One bit in the middle of a weight: torch.load alone would take it.
    place = good.index(weights["output_layer.weight"].numpy().tobytes()) + 50
    shard.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
    refused(save, tmp_path / "out", "'output_layer.weight' cannot be read from .*distcp")
    shard.unlink()
    refused(save, tmp_path / "out", "distcp is missing")
    shard.write_bytes(good)
    metadata = meta.read_bytes()
    meta.write_bytes(metadata[: len(metadata) // 2])
    refused(save, tmp_path / "out", r"\.metadata is damaged")
    meta.unlink()
    refused(save, tmp_path / "out", r"\.metadata is missing")
    meta.write_bytes(metadata)
    export(save, tmp_path / "out", progress=False)


def test_the_target_is_replaced_only_when_asked_and_only_by_a_whole_export(tmp_path: Path) -> None:
    save, _ = make(tmp_path / "save")
    out = tmp_path / "out"
    out.mkdir()
    export(save, out, progress=False)  # an empty folder is fine
    (out / "note").write_text("mine")
    refused(save, out, "is not empty")
    refused(save, out, "tokens, but the embedding", vocab_size=99, overwrite=True)
    assert (out / "note").exists()
    export(save, out, progress=False, overwrite=True)
    assert not (out / "note").exists()
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("...")
    refused(save, other, "is no exported model", overwrite=True)


def test_sizes_that_no_model_has_are_refused(tmp_path: Path) -> None:
    args = Namespace(**ARGS)
    changes = [("num_attention_heads", 0), ("num_query_groups", 0), ("num_query_groups", 3), ("num_layers", 0)]
    changes += [("ffn_hidden_size", "12"), ("moe_layer_freq", 0), ("moe_layer_freq", [1]), ("num_experts", -1)]
    for number, (name, value) in enumerate(changes):
        save = write_checkpoint(tmp_path / str(number), Namespace(**(ARGS | {name: value})), megatron_weights(args))
        refused(save, tmp_path / "out", f"the checkpoint's {name}")


def test_a_link_stays_and_its_folder_is_written(tmp_path: Path) -> None:
    save, _ = make(tmp_path / "save")
    (tmp_path / "disk").mkdir()
    for number, target in enumerate((tmp_path / "disk" / "there", tmp_path / "disk" / "not yet")):
        link = tmp_path / f"link{number}"
        link.symlink_to(target)
        if number == 0:
            target.mkdir()
        export(save, link, progress=False)
        export(save, link, progress=False, overwrite=True)
        assert link.is_symlink() and (target / "model.safetensors").is_file()
    assert sorted(path.name for path in (tmp_path / "disk").iterdir()) == ["not yet", "there"]


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    """A limit on the size of a file stands for a full disk: writes fail in the same places, with another number."""
    save, _ = make(tmp_path / "save", hidden_size=32, kv_channels=8)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for room in (10, 4 << 10, 16 << 10):
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
        try:
            with pytest.raises(CheckpointError) as error:
                export(save, tmp_path / "out", progress=False)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert f"{tmp_path / 'out'} cannot be written" in str(error.value) and "\n" not in str(error.value)
        assert [path.name for path in tmp_path.iterdir()] == ["save"]
