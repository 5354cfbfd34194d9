"""A stranger's checkpoint runs no code and writes no file: hostile archives in every place, through every reader."""

import collections
import contextlib
import io
import pickle
import shutil
import signal
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_dynmoe.checkpoint import CheckpointError, all_places, check_places, common_state
from tests import hostile, ranks
from tests.hf_checkpoints import ARGS, megatron_weights, write_checkpoint
from tests.layouts import flags

COMMON, EXTRA, WEIGHT = "common_state/shard_0_1", "decoder.layers.0._extra_state/shard_0_1", "output_layer.weight"


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """A checkpoint with an object beside megatron's arguments."""
    args = Namespace(**ARGS)
    extra = {EXTRA: [torch.frombuffer(bytearray(pickle.dumps({"recipe": [1.0]})), dtype=torch.uint8)]}
    return write_checkpoint(tmp_path_factory.mktemp("good"), args, megatron_weights(args) | extra)


def iteration(save: Path) -> Path:
    return save / "iter_0000003"


def look(save: Path) -> None:
    """What training does before it loads."""
    folder = iteration(save)
    places = all_places(folder)
    check_places(folder, places, checksums=False)
    common_state(folder, places)


def place_in_shard(save: Path, key: str, raw: bytes) -> None:
    """Put an archive in the place of one, with an index that fits."""
    folder = iteration(save)
    index = pickle.loads((folder / ".metadata").read_bytes())
    files: dict[str, bytes] = {}
    for at, info in sorted(index.storage_data.items(), key=lambda item: (item[1].relative_path, item[1].offset)):
        old = (folder / info.relative_path).read_bytes()[info.offset : info.offset + info.length]
        chunk, before = (raw if at.fqn == key else old), files.get(info.relative_path, b"")
        files[info.relative_path] = before + chunk
        index.storage_data[at] = type(info)(info.relative_path, len(before), len(chunk))
    for name, content in files.items():
        (folder / name).write_bytes(content)
    (folder / ".metadata").write_bytes(pickle.dumps(index))


def place(save: Path, where: str, raw: bytes) -> None:
    folder = iteration(save)
    if where in (COMMON, EXTRA, WEIGHT):
        place_in_shard(save, where, raw)
    elif where == "legacy":
        shutil.rmtree(folder)
        (folder / "mp_rank_00").mkdir(parents=True)
        (folder / "mp_rank_00/model_optim_rng.pt").write_bytes(raw)
    else:
        (folder / where).write_bytes(raw)


@pytest.fixture(scope="module")
def marker(tmp_path_factory) -> Path:
    """What is written when something hostile runs."""
    return tmp_path_factory.mktemp("marker") / "marker"


@pytest.fixture(scope="module")
def cases(good: Path, marker: Path, tmp_path_factory) -> dict[str, Path]:
    """One checkpoint for each hostile archive and place, and for each hostile pickle as, or in, the index."""
    made, folder, archives = {}, tmp_path_factory.mktemp("hostile"), hostile.archives(marker)
    for where in (COMMON, EXTRA, WEIGHT, "common.pt", "legacy"):
        for name, raw in archives.items():
            made[f"{name} in {where}"] = (where, raw)
    index = pickle.loads((iteration(good) / ".metadata").read_bytes())
    for name, thing in hostile.things(marker).items():
        made[f"{name} as the index"] = (".metadata", hostile.pickled(thing))
        index.planner_data = {"x": thing}
        made[f"{name} in the index"] = (".metadata", hostile.pickled(index))
        made[f"{name} as the index of a rank"] = ("__0.metadata", hostile.pickled(thing))
    result = {}
    for number, (name, (where, raw)) in enumerate(made.items()):
        save = folder / f"{number}"
        shutil.copytree(good, save)
        place(save, where, raw)
        result[name] = save
    return result


# In the index these are dead weight: texts and containers that nobody unpickles again there.
HARMLESS_IN_INDEX = ("in bytes", "in bytes in bytes")


def test_the_archives_are_alive(marker: Path) -> None:
    """What a reader without care makes of them: else the other tests here could not fail."""
    ran = set()
    alive = {"import", "os.system", "eval", "exec", "open", "getattr", "partial", "numpy memmap", "map", "subprocess"}
    for name in alive:
        thing = hostile.things(marker)[name]
        with contextlib.suppress(Exception), contextlib.redirect_stdout(io.StringIO()):
            pickle.loads(hostile.pickled(thing))
        if marker.exists():
            ran.add(name)
            marker.unlink()
    ran |= {"import"} if sys.modules.pop("this", None) else set()
    assert ran == alive


def test_every_hostile_file_is_refused_by_name(good: Path, cases: dict[str, Path], marker: Path) -> None:
    look(good)
    assert len(cases) > 300
    for name, save in cases.items():
        if name.removesuffix(" in the index") in HARMLESS_IN_INDEX:
            continue
        with pytest.raises(CheckpointError) as error:
            look(save)
            pytest.fail(f"{name} was let through")
        assert str(iteration(save)) in str(error.value) and "\n" not in str(error.value), name
        assert not marker.exists(), name
    assert "this" not in sys.modules


def test_what_megatron_and_transformer_engine_save_passes(tmp_path: Path, good: Path) -> None:
    numbers = np.random.default_rng(0).integers(0, 9, 5).astype(np.uint32)
    state = {"scale": torch.ones(3), "recipe": collections.OrderedDict(a={1, 2}), "history": torch.zeros(2, 3)}
    engine = torch.frombuffer(bytearray(pickle.dumps(state)), dtype=torch.uint8)  # Transformer Engine 2
    before = io.BytesIO()
    torch.save(state, before)  # Transformer Engine 1
    for number, thing in enumerate((engine, before, torch.empty(0, dtype=torch.uint8), None)):
        save = shutil.copytree(good, tmp_path / f"engine{number}")
        place_in_shard(save, EXTRA, hostile.archive([thing]))
        look(save)
    rng = {"np": ("MT19937", numbers, 1, 0, 0.5), "scalar": numbers[0], "torch": torch.get_rng_state()}
    rng |= {"generator": torch.Generator(), "half": torch.ones(2, dtype=torch.float8_e4m3fn), "path": tmp_path}
    rng |= {"signal": signal.SIGTERM, "dtype": torch.bfloat16, "set": {1}, "layout": torch.strided}
    save = shutil.copytree(good, tmp_path / "rng")
    place(save, "common.pt", hostile.archive({"args": Namespace(**ARGS), "rng": rng}))
    look(save)


def test_the_sentence_names_file_key_and_class(tmp_path: Path, good: Path) -> None:
    save = shutil.copytree(good, tmp_path / "save")
    place_in_shard(save, COMMON, hostile.archive(hostile.Call(eval, "1")))
    with pytest.raises(CheckpointError, match=rf"\.distcp: '{COMMON}' names builtins\.eval"):
        look(save)
    place(save, ".metadata", hostile.pickled(hostile.Call(eval, "1")))
    with pytest.raises(CheckpointError, match=r"\.metadata names builtins\.eval"):
        look(save)


def test_a_file_outside_of_the_folder_is_not_read(tmp_path: Path, good: Path) -> None:
    for number, name in enumerate(("../iter_0000003/__0_0.distcp", "/etc/hostname", ".hidden", "")):
        save = shutil.copytree(good, tmp_path / str(number))
        index = pickle.loads((iteration(save) / ".metadata").read_bytes())
        for info in index.storage_data.values():
            info.relative_path = name
        place(save, ".metadata", pickle.dumps(index))
        with pytest.raises(CheckpointError, match="not in its folder"):
            look(save)


def test_the_tools_refuse_them(tmp_path: Path, cases: dict[str, Path], marker: Path, capsys) -> None:
    from tests.hf.test_hf_export import program

    tried = 0
    export_hf, token_report = program("export_hf"), program("token_report")
    for name, save in cases.items():
        if name.endswith("in legacy") or name.removesuffix(" in the index") in HARMLESS_IN_INDEX:
            continue  # the tools read no such folder
        tried += 1
        assert export_hf.main(["--checkpoint", str(save), "--output", str(tmp_path / "out")]) == 1, name
        if tried % 10 == 0:  # the same reader behind another door
            words = ["--model", str(save), "--tokenizer-model", "x.json", "--text", "a"]
            assert token_report.main([*words, "--output", str(tmp_path / "page.html")]) == 1, name
        assert not marker.exists() and not (tmp_path / "out").exists(), name
        error = capsys.readouterr().err
        assert all(str(save) in line for line in error.splitlines()) and "Traceback" not in error, error
    assert tried > 250


def refuse_all(saves: list[str], marker: str) -> int:
    """A rank that tries to resume from each, as the training program does."""
    ways = [[], ["--use-checkpoint-args"], ["--ckpt-format", "torch", "--auto-detect-ckpt-format"]]
    tries = [["--load", save, *ways[number % len(ways)]] for number, save in enumerate(saves)]
    tries.append(["--pretrained-checkpoint", saves[0]])
    tries.append(["--non-persistent-global-ckpt-dir", saves[0], "--non-persistent-ckpt-type", "global"])
    for words in tries:
        code = ranks.pretrain(flags("serial", *words))
        assert (code, Path(marker).exists()) == (2, False), words
    return 0


def test_training_refuses_them(tmp_path: Path, cases: dict[str, Path], marker: Path) -> None:
    wanted = [f"os.system in {where}" for where in (COMMON, EXTRA, "common.pt", "legacy")]
    wanted += ["os.system as the index", "os.system as the index of a rank", f"torchscript in {COMMON}"]
    chosen = [str(cases[name]) for name in wanted]
    run = ranks.call(refuse_all, chosen, str(marker), ranks=1, folder=tmp_path / "run")
    sentences = [line for line in run.output().splitlines() if line.startswith("error: ")]
    assert len(sentences) == len(chosen) + 2 and "Traceback" not in run.output()
