"""Looks at all of a checkpoint before anything is loaded: that it is plain data, and what was written."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .archive import Archive, DamagedError
from .errors import CheckpointError, NotPlainError
from .folder import format_of
from .index import Place, check_files, places, read_index
from .objects import check_storages, read_object, unpickle
from .plain import OBJECT_NAMES
from .standins import PlainTensor

COMMON_KEY = "common_state/shard_0_1"
COMMON_FILE = "common.pt"


def all_places(folder: Path, kind: str | None = None) -> list[Place]:
    """Every archive of a checkpoint of any format; the index is read and held against the files.

    Args:
        folder: of one iteration.
        kind: its format, if it is known.

    Raises:
        CheckpointError: naming the file.
    """
    kind = kind or format_of(folder)
    if kind == "torch":
        return [_whole(folder, path) for path in sorted(folder.glob("mp_rank_*/*"))]
    index = read_index(folder)
    check_files(folder, index)
    common = [_whole(folder, folder / COMMON_FILE)] if (folder / COMMON_FILE).exists() else []
    return common + places(index)


def _whole(folder: Path, path: Path) -> Place:
    """A file that is one archive."""
    if not path.is_file():
        raise CheckpointError(f"{path} is no file.")
    return Place(path.name, str(path.relative_to(folder)), 0, path.stat().st_size)


def share(found: Sequence[Place], rank: int, ranks: int) -> list[Place]:
    """The part of one rank: neighbours, about as many bytes as every other rank's."""
    ends = list(itertools.accumulate(place.length for place in found))
    total = max(ends[-1], 1) if ends else 1
    return [
        place
        for place, end in zip(found, ends, strict=True)
        if min((2 * end - place.length) * ranks // (2 * total), ranks - 1) == rank
    ]


def check_places(folder: Path, found: Sequence[Place], *, checksums: bool) -> None:
    """Hold archives against what they must be: plain data, of the shape that the index says, undamaged.

    Args:
        folder: of the iteration.
        found: of :func:`all_places`, or a share of it.
        checksums: read all bytes and hold them against their checksums; else only what is unpickled.

    Raises:
        CheckpointError: naming the file and the key.
    """
    for name, chunks in itertools.groupby(found, key=lambda place: place.file):
        with open(folder / name, "rb") as file:
            for place in chunks:
                read_place(folder, place, file, checksums=checksums)


def read_place(folder: Path, place: Place, file: Any, *, checksums: bool = True) -> Any:
    """The object of one archive as plain data; of a tensor its description.

    Raises:
        CheckpointError: naming the file and the key.
    """
    where = f"{folder / place.file}: {place.key!r}"
    try:
        archive = Archive(file, place.start, place.length)
        if checksums:
            archive.verify()
        if not place.is_tensor:
            return read_object(archive, pickles_inside="._extra_state" in place.key)
        found = unpickle(archive.read("data.pkl"), OBJECT_NAMES)
        check_storages(archive, found)
        _check_tensor(found, place)
        return found
    except NotPlainError as error:
        raise NotPlainError(f"{where} {error}; that is no plain data, see docs/checkpoints.md.") from None
    except DamagedError as error:
        raise CheckpointError(f"{where} {error}; it is damaged, choose an earlier iteration.") from None


def read_tensor(folder: Path, place: Place) -> torch.Tensor:
    """The tensor of one archive, built of its bytes, which are held against their checksum.

    Raises:
        CheckpointError: naming the file and the key.
    """
    with open(folder / place.file, "rb") as file:
        found = read_place(folder, place, file, checksums=False)
        try:
            raw = bytearray(Archive(file, place.start, place.length).read(f"data/{found.storage.key}"))
            flat = torch.frombuffer(raw, dtype=place.dtype) if raw else torch.empty(0, dtype=place.dtype)
            return flat.as_strided(found.size, found.stride, found.offset)
        except (DamagedError, RuntimeError, ValueError) as error:  # torch's: a place outside of the storage
            reason = " ".join(str(error).split())
            raise CheckpointError(f"{folder / place.file}: {place.key!r} {reason}; it is damaged.") from None


def _check_tensor(found: Any, place: Place) -> None:
    if type(found) is not PlainTensor:
        raise NotPlainError("is no tensor")
    if found.dtype not in (None, place.dtype) or tuple(found.size) != tuple(place.size or ()):
        raise DamagedError(
            f"is {found.dtype} {list(found.size)} where the index says {place.dtype} {list(place.size or ())}"
        )


def common_state(folder: Path, found: Sequence[Place]) -> dict[str, Any] | None:
    """What megatron saves beside tensors, its `args` among it; `None` if the checkpoint has none.

    Raises:
        CheckpointError: it cannot be read, or is not plain data.
    """
    # megatron-core takes the file where both are (serialization.py:223)
    chosen = [place for key in (COMMON_FILE, "model_optim_rng.pt", COMMON_KEY) for place in found if place.key == key]
    if not chosen:
        return None
    with open(folder / chosen[0].file, "rb") as file:
        state = read_place(folder, chosen[0], file)
    state = state[0] if isinstance(state, list) and state else state
    if not isinstance(state, dict):
        raise CheckpointError(f"{folder / chosen[0].file}: {chosen[0].key!r} holds no dict, as megatron writes it.")
    return state
