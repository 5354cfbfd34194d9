"""Damaged, lost and half-written checkpoints: a sentence, or the very weights that were saved."""

import json
import random
import shutil
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from megatron_dynmoe.checkpoint import CheckpointError, all_places, check_places, common_state, latest_folder, share
from megatron_dynmoe.checkpoint.reader import DistCheckpoint
from tests import ranks
from tests.hf_checkpoints import ARGS, megatron_weights, write_checkpoint
from tests.layouts import flags

FLIPS = 150  # a file; of the large one most lie in weights, of the others everywhere


def content(save: Path, keys: Iterable[str] | None = None) -> dict:
    """All that a resume would get, after the checks that training makes; `keys` are those that the model has."""
    folder = latest_folder(save)
    assert folder is not None
    places = all_places(folder)
    check_places(folder, places, checksums=True)
    checkpoint = DistCheckpoint(save)
    tensors = {key: checkpoint.read(key) for key in keys or checkpoint.shapes}
    return {"folder": folder.name, "args": vars(checkpoint.args), "tensors": tensors} | {
        "iteration": common_state(folder, places)["iteration"]
    }


def same(one: dict, other: dict) -> bool:
    a, b = one["tensors"], other["tensors"]
    rest = all(one[name] == other[name] for name in ("folder", "args", "iteration"))
    return rest and a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("name", [".distcp", ".metadata", "metadata.json", "latest_checkpointed_iteration.txt"])
def test_flipped_bits_are_noticed_or_do_not_matter(tmp_path: Path, name: str) -> None:
    args = Namespace(**ARGS)
    save = write_checkpoint(tmp_path / "save", args, megatron_weights(args))
    path = next(path for path in save.rglob("*") if path.name.endswith(name))
    whole, expected, refused = path.read_bytes(), content(save), 0
    draw = random.Random(0)
    for _ in range(FLIPS):
        raw = bytearray(whole)
        for _ in range(draw.choice((1, 1, 1, 3))):
            raw[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
        path.write_bytes(raw)
        try:
            found = content(save, expected["tensors"])
        except CheckpointError as error:
            refused += 1
            assert "\n" not in str(error)
        else:
            assert same(found, expected)
    assert refused > FLIPS // 4  # padding and names of fields that nobody reads are most of the rest


def test_shares_are_a_partition_of_about_equal_bytes() -> None:
    from megatron_dynmoe.checkpoint.index import Place

    draw = random.Random(1)
    places = [Place(str(n), "file", 0, draw.randrange(1, 1000)) for n in range(200)]
    for count in (1, 3, 7, 300):
        shares = [share(places, rank, count) for rank in range(count)]
        assert [place for part in shares for place in part] == places
        sizes = [sum(place.length for place in part) for part in shares]
        assert max(sizes) <= sum(sizes) / count + 1000  # a chunk is not divided
    assert share([], 0, 2) == []


def where(save: Path, end: int) -> list[str]:
    return ["--save", str(save), "--load", str(save), "--save-interval", "1", "--exit-interval", str(end)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """One iteration of a small model, saved by two ranks."""
    save = tmp_path_factory.mktemp("trained")
    ranks.call(ranks.pretrain, flags("dp2", *where(save, 1)), ranks=2, folder=save / "log")
    shutil.rmtree(save / "log")
    return save


def damaged_weight(save: Path) -> None:
    """One bit in the middle of the largest chunk of the second rank's file, which the second rank looks at."""
    folder = save / "iter_0000001"
    place = max((p for p in all_places(folder) if p.file.startswith("__1")), key=lambda place: place.length)
    raw = bytearray((folder / place.file).read_bytes())
    raw[place.start + place.length // 2] ^= 1
    (folder / place.file).write_bytes(raw)


def test_a_rank_that_finds_damage_ends_all_and_says_so(tmp_path: Path, trained: Path) -> None:
    save = shutil.copytree(trained, tmp_path / "save")
    damaged_weight(save)
    run = ranks.start(ranks.pretrain, flags("dp2", *where(save, 2)), ranks=2, folder=tmp_path / "run")
    assert run.wait() == [2, 2]
    said = run.output(0) + run.output(1)
    (sentence,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert sentence.startswith("error: rank 1 on ") and sentence.count("rank ") == 1
    assert "__1_0.distcp" in sentence and "has a wrong checksum of data/0" in sentence
    assert "Traceback" not in said and not (save / "iter_0000002").exists()
    unchecked = flags("dp2", *where(save, 2), "--no-moe-verify-checkpoint")
    run = ranks.call(ranks.pretrain, unchecked, ranks=2, folder=tmp_path / "unchecked")
    assert "looked at without checksums" in run.output()


def try_all(saves: dict[str, str]) -> int:
    for name, save in saves.items():
        print(f"case {name}", flush=True)
        assert ranks.pretrain(flags("serial", *where(Path(save), 2))) == 2, name
    return 0


def test_lost_and_half_written_files_are_named(tmp_path: Path, trained: Path) -> None:
    expected = {}

    def case(name: str, *sentence: str) -> Path:
        expected[name] = sentence
        shutil.copytree(trained / "iter_0000001", tmp_path / name / "iter_0000001")
        (tmp_path / name / "latest_checkpointed_iteration.txt").write_text("1")
        return tmp_path / name

    save = case("no tracker", "latest_checkpointed_iteration.txt is missing", "--ckpt-step 1", "write 1 into")
    (save / "latest_checkpointed_iteration.txt").unlink()
    save = case("garbage", "says '1?'")
    (save / "latest_checkpointed_iteration.txt").write_text("1?")
    save = case("no such iteration", "iter_0000005 does not exist", "iterations in")
    (save / "latest_checkpointed_iteration.txt").write_text("5")
    save = case("empty", "iter_0000005 is empty")
    (save / "iter_0000005").mkdir()
    (save / "latest_checkpointed_iteration.txt").write_text("5")
    save = case("half", "its save was interrupted")
    (save / "iter_0000001/metadata.json").unlink()
    save = case("no index", ".metadata is missing")
    (save / "iter_0000001/.metadata").unlink()
    save = case("bad config", "metadata.json is not what megatron writes")
    (save / "iter_0000001/metadata.json").write_text('{"sharded_backend"')
    save = case("zarr", "metadata.json says 'zarr'", "accepted: 'torch_dist'")
    (save / "iter_0000001/metadata.json").write_text(json.dumps({"sharded_backend": "zarr"}))
    save = case("renamed", "iter_0000007 holds iteration 1")
    (save / "iter_0000001").rename(save / "iter_0000007")
    (save / "latest_checkpointed_iteration.txt").write_text("7")
    save = case("shard is a folder", "__0_0.distcp is missing")
    (save / "iter_0000001/__0_0.distcp").unlink()
    (save / "iter_0000001/__0_0.distcp").mkdir()
    run = ranks.call(try_all, {name: str(tmp_path / name) for name in expected}, ranks=1, folder=tmp_path / "run")
    for part in run.output().split("case ")[1:]:
        name, _, said = part.partition("\n")
        assert said.count("error: ") == 1 and "Traceback" not in said
        for words in expected.pop(name):
            assert words in said, (name, said)
    assert not expected


def test_an_interrupted_first_save_is_named_and_training_starts(tmp_path: Path, trained: Path) -> None:
    save = tmp_path / "save"
    shutil.copytree(trained / "iter_0000001", save / "iter_0000001")
    (save / "iter_0000001/metadata.json").unlink()
    run = ranks.call(ranks.pretrain, flags("serial", *where(save, 1)), ranks=1, folder=tmp_path / "run")
    assert "iter_0000001 was not finished (no metadata.json)" in run.output()
    assert "training starts at iteration 1" in run.output()
    assert (save / "latest_checkpointed_iteration.txt").read_text() == "1"
