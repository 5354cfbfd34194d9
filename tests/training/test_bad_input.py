"""Bad input to the training entry: one clear sentence, a non-zero exit, nothing overwritten."""

import contextlib
import io
import json
import re

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
    assert "--expert-model-parallel-size is 3, which does not divide --num-experts 4; accepted: 1, 2, 4." in message


def test_more_initial_experts_than_slots(tmp_path):
    message = refused(tmp_path, "--moe-preset", "dynmoe", "--moe-initial-experts", "5")
    assert "--moe-initial-experts is 5" in message and "--num-experts 4" in message and "at most 4" in message


def test_a_window_that_never_ends(tmp_path):
    message = refused(tmp_path, "--moe-preset", "dynmoe", "--moe-record-from", "700")
    assert "--moe-update-at" in message and "600" in message and "never ends" in message


NONSENSE = [
    ("--moe-layer-freq 0", "--moe-layer-freq is 0; accepted: a number of at least 1"),
    ("--moe-layer-freq -1", "--moe-layer-freq is -1; accepted"),
    ("--moe-layer-freq [1,0]", "--moe-layer-freq is [1, 0]; accepted: a list of as many numbers as --num-layers 4"),
    ("--moe-layer-freq [1,2,0,1]", "--moe-layer-freq is [1, 2, 0, 1]; accepted"),
    ("--log-interval 0", "--log-interval is 0; accepted: a number of at least 1"),
    ("--log-interval -3", "--log-interval is -3; accepted"),
    ("--eval-interval 0", "--eval-interval is 0; accepted"),
    ("--tensorboard-log-interval 0", "--tensorboard-log-interval is 0; accepted"),
    ("--moe-max-rows-per-token 1e308", "--moe-max-rows-per-token .* is 1e+308; accepted: a number in [1, 65536]"),
    ("--moe-zero-experts 1000000000", "--moe-zero-experts .* is 1000000000; accepted: a whole number in [0, 65536]"),
    ("--moe-router-load-balancing-type sinkhorn", "--moe-router-load-balancing-type is ['sinkhorn'].*use 'aux_loss'"),
    (
        "--moe-router-load-balancing-type aux_loss seq_aux_loss --moe-aux-loss-coeff 0.1 0.1",
        "--moe-router-load-balancing-type is ['aux_loss', 'seq_aux_loss'].*use 'aux_loss'",
    ),
    ("--moe-router-load-balancing-type none --moe-aux-loss-coeff 0.1 0.2", "--moe-aux-loss-coeff is [0.1, 0.2]"),
]


def check_nonsense():
    """The entry again and again in one process: each time one sentence on stderr and exit code 2."""
    for extra, wanted in NONSENSE:
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            code = ranks.pretrain(flags("serial", *extra.split()))
        lines = [line for line in said.getvalue().splitlines() if line.startswith("error: ")]
        assert (code, len(lines)) == (2, 1) and "Traceback" not in said.getvalue(), said.getvalue()
        pattern = ".*".join(re.escape(part) for part in wanted.split(".*"))
        assert re.search(pattern, lines[0]), f"{extra}: {lines[0]}"


def test_nonsense_values_of_flags(tmp_path):
    ranks.call(check_nonsense, ranks=1, folder=tmp_path)


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
