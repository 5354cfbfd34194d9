"""Bad input to the training entry: one clear sentence, a non-zero exit, nothing overwritten."""

import json

import numpy as np
import pytest

from tests import ranks
from tests.layouts import flags


def refused(folder, *extra, without=()):
    argv = [word for word in flags("serial", *extra) if word not in without]
    run = ranks.start(ranks.pretrain, argv, ranks=1, folder=folder)
    codes = run.wait()
    lines = [line for line in run.output().splitlines() if line.startswith("error: ")]
    assert codes == [2], run.output()[-3000:]
    assert len(lines) == 1, run.output()[-3000:]
    assert "Traceback" not in run.output()
    return lines[0]


def test_unknown_preset(tmp_path):
    message = refused(tmp_path, "--moe-preset", "dynamic")
    assert "'dynamic'" in message and "dynamic-moe" in message


def test_p_outside_its_range(tmp_path):
    message = refused(tmp_path, "--moe-top-p", "1.5")
    assert "--moe-top-p" in message and "1.5" in message and "[0, 1]" in message


def test_experts_not_divisible(tmp_path):
    message = refused(tmp_path, "--expert-model-parallel-size", "3")
    assert "--num-experts is 4" in message and "multiple of 3" in message


def test_more_initial_experts_than_slots(tmp_path):
    message = refused(tmp_path, "--moe-preset", "dynmoe", "--moe-initial-experts", "5")
    assert "--moe-initial-experts is 5" in message and "--num-experts 4" in message and "at most 4" in message


def test_a_window_that_never_ends(tmp_path):
    message = refused(tmp_path, "--moe-preset", "dynmoe", "--moe-record-from", "700")
    assert "--moe-update-at" in message and "600" in message and "never ends" in message


def indexed(folder, tokens, *, vocabulary=None):
    """A small indexed dataset through megatron's builder (tests run where megatron imports)."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix = folder / "text"
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    import torch

    builder.add_document(torch.tensor(tokens), [len(tokens)])
    builder.finalize(f"{prefix}.idx")
    if vocabulary:
        prefix.with_suffix(".json").write_text(json.dumps({"vocab_size": vocabulary}))
    return prefix


def data_flags(prefix):
    return "--data-path", str(prefix)


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_index_missing_or_truncated(tmp_path, damage):
    prefix = indexed(tmp_path, list(range(100)))
    index = prefix.with_suffix(".idx")
    if damage == "missing":
        index.unlink()
    else:
        index.write_bytes(index.read_bytes()[:-9])
    message = refused(tmp_path / "run", *data_flags(prefix), without=("--mock-data",))
    assert str(index) in message


def test_tokenizer_does_not_match_the_data(tmp_path):
    prefix = indexed(tmp_path, [1, 2, 500, 3])  # the model's vocabulary is 128
    message = refused(tmp_path / "run", *data_flags(prefix), without=("--mock-data",))
    assert str(prefix) in message and "500" in message and "128" in message


def test_corrupted_checkpoint_shard(tmp_path):
    save = tmp_path / "save"
    where = ("--save", str(save), "--load", str(save), "--save-interval", "1")
    ranks.call(ranks.pretrain, flags("serial", *where, "--exit-interval", "1"), ranks=1, folder=tmp_path / "good")
    folder = save / "iter_0000001"
    shard = max(folder.glob("*.distcp"), key=lambda path: path.stat().st_size)
    whole = shard.read_bytes()

    shard.write_bytes(whole[: len(whole) // 2])
    before = sorted((path.name, path.stat().st_mtime_ns) for path in save.rglob("*"))
    message = refused(tmp_path / "truncated", *where, "--exit-interval", "2")
    assert shard.name in message and "truncated" in message

    shard.write_bytes(b"\0" * len(whole))
    message = refused(tmp_path / "zeros", *where, "--exit-interval", "2")
    assert shard.name in message and "damaged" in message

    shard.unlink()
    message = refused(tmp_path / "missing", *where, "--exit-interval", "2")
    assert shard.name in message and "missing" in message
    assert {name for name, _ in before} == {path.name for path in save.rglob("*")} | {shard.name}
