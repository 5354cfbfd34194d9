"""The index of a distributed checkpoint (`.metadata`), read as plain data and held against itself.

It has no checksum of its own, but says everything twice: the chunks of a tensor must tile it, each must lie in a file,
and what lies in a file must leave no gap and overlap nothing. A flipped bit breaks one of these.
"""

import itertools
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from .archive import DamagedError
from .errors import CheckpointError, NotPlainError
from .objects import unpickle
from .plain import INDEX_NAMES
from .standins import Record

INDEX = ".metadata"


@dataclass(frozen=True)
class Place:
    """Where a chunk of `key` lies: `length` bytes of `file` from `start` on.

    Of a tensor `size` is the chunk's shape, and `offsets` its place in the whole.
    """

    key: str
    file: str
    start: int
    length: int
    size: tuple[int, ...] | None = None
    dtype: torch.dtype | None = None
    offsets: tuple[int, ...] = ()

    @property
    def is_tensor(self) -> bool:
        """Whether it holds a part of a tensor, or an object."""
        return self.size is not None


def read_index(folder: Path) -> Metadata:
    """The index of `folder`, rebuilt field by field.

    Raises:
        CheckpointError: it is missing, names what is not plain data, is damaged, or does not fit together.
    """
    path = folder / INDEX
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; without this index the checkpoint cannot be read.") from None
    # Torch turns to the index of a rank when this one cannot be read; then that one would be unpickled.
    for other in sorted(folder.glob("__*.metadata")):
        raise CheckpointError(f"{other} is the index of one rank; accepted: one {INDEX} for the whole checkpoint.")
    try:
        return _metadata(unpickle(raw, INDEX_NAMES))
    except NotPlainError as error:
        raise NotPlainError(f"{path} {error}, which plain data does not; see docs/checkpoints.md.") from None
    except (DamagedError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged: it {_said(error)}.") from None


def places(index: Metadata) -> list[Place]:
    """All chunks, in the order of files and bytes."""
    tensors = {key: e for key, e in index.state_dict_metadata.items() if isinstance(e, TensorStorageMetadata)}
    sizes = {(key, chunk.offsets): chunk.sizes for key, entry in tensors.items() for chunk in entry.chunks}
    found = []
    for at, info in index.storage_data.items():
        size = sizes.get((at.fqn, at.offset))
        dtype = tensors[at.fqn].properties.dtype if size is not None else None
        offsets = tuple(at.offset or ())
        found.append(Place(at.fqn, info.relative_path, info.offset, info.length, size, dtype, offsets))
    return sorted(found, key=lambda place: (place.file, place.start))


def check_files(folder: Path, index: Metadata) -> None:
    """Hold the files against the index: all there, each as long as its chunks, which follow each other.

    Raises:
        CheckpointError: naming the file.
    """
    for name, chunks in itertools.groupby(places(index), key=lambda place: place.file):
        path, end = folder / name, 0
        for place in chunks:
            if place.start != end:
                raise CheckpointError(f"{folder / INDEX} is damaged: it leaves a gap or an overlap in {name} at {end}.")
            end += place.length
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; the checkpoint's index names it.")
        if (size := path.stat().st_size) != end:
            what = "the file is truncated" if size < end else "the file or the index is damaged"
            raise CheckpointError(f"{path} has {size} bytes where the index names {end}; {what}.")


def _said(error: Exception) -> str:
    return str(error) if isinstance(error, DamagedError) else f"has a field that is not what it should be ({error})"


def _metadata(found: Any) -> Metadata:
    entries = _of(found, "Metadata", "MCoreMetadata").field("state_dict_metadata")
    stored = found.field("storage_data")
    if type(entries) is not dict or type(stored) is not dict:
        raise DamagedError("has no list of keys")
    result = Metadata(state_dict_metadata={}, storage_data={})
    for key, entry in entries.items():
        result.state_dict_metadata[_text(key)] = _entry(key, entry)
    wanted: set[tuple[str, tuple[int, ...] | None]] = set()
    for key, entry in result.state_dict_metadata.items():
        tensor = isinstance(entry, TensorStorageMetadata)
        wanted |= {(key, tuple(chunk.offsets)) for chunk in entry.chunks} if tensor else {(key, None)}
    for at, info in stored.items():
        result.storage_data[_place(at)] = _storage(info)
    have = {(at.fqn, None if at.offset is None else tuple(at.offset)) for at in result.storage_data}
    if have != wanted:
        key, offset = sorted(have ^ wanted, key=str)[0]
        raise DamagedError(f"does not say where {key!r} {list(offset or ())} lies, or says it of what is not there")
    return result


def _entry(key: str, entry: Any) -> TensorStorageMetadata | BytesStorageMetadata:
    if _of(entry, "TensorStorageMetadata", "BytesStorageMetadata").name.endswith("BytesStorageMetadata"):
        return BytesStorageMetadata()
    size, dtype = _numbers(entry.field("size")), _dtype(entry.field("properties"))
    chunks = [
        ChunkStorageMetadata(offsets=_numbers(chunk.field("offsets")), sizes=_numbers(chunk.field("sizes")))
        for chunk in (_of(chunk, "ChunkStorageMetadata") for chunk in entry.field("chunks"))
    ]
    _check_tiles(key, size, chunks)
    return TensorStorageMetadata(properties=TensorProperties(dtype=dtype), size=size, chunks=chunks)


def _check_tiles(key: str, size: torch.Size, chunks: list[ChunkStorageMetadata]) -> None:
    """Chunks lie in the tensor, have as many elements as it, and share none."""
    whole = math.prod(size) == sum(math.prod(chunk.sizes) for chunk in chunks)
    inside = all(
        len(chunk.offsets) == len(chunk.sizes) == len(size)
        and all(start + length <= end for start, length, end in zip(chunk.offsets, chunk.sizes, size, strict=True))
        for chunk in chunks
    )
    boxes = [(chunk.offsets, chunk.sizes) for chunk in chunks if math.prod(chunk.sizes)]
    if not (whole and inside) or _overlap(boxes):
        raise DamagedError(f"has chunks of {key!r} that do not make the tensor of {'x'.join(map(str, size))}")


def _overlap(boxes: list[tuple[torch.Size, torch.Size]], axis: int = 0) -> bool:
    """Whether two of the boxes (offsets, sizes) share an element: axis by axis where they form a grid."""
    if len(boxes) < 2 or axis == len(boxes[0][0]):
        return len(boxes) > 1
    slabs = defaultdict(list)
    for box in boxes:
        slabs[box[0][axis], box[1][axis]].append(box)
    order = sorted(slabs)
    if all(start + length <= after for (start, length), (after, _) in itertools.pairwise(order)):
        return any(_overlap(slab, axis + 1) for slab in slabs.values())
    return any(
        all(a < b + n and b < a + m for a, m, b, n in zip(*one, *other, strict=True))
        for one, other in itertools.combinations(boxes, 2)
    )


def _place(at: Any) -> MetadataIndex:
    offset = _of(at, "MetadataIndex").field("offset")
    return MetadataIndex(_text(at.field("fqn")), None if offset is None else _numbers(offset))


def _storage(info: Any) -> _StorageInfo:
    name = _text(_of(info, "_StorageInfo").field("relative_path"))
    if not name or Path(name).name != name or name.startswith("."):
        raise NotPlainError(f"refers to {name!r}, a file that is not in its folder")
    if info.field("transform_descriptors"):
        raise NotPlainError(f"has transformed chunks {info.field('transform_descriptors')!r}")
    start, length = _numbers((info.field("offset"), info.field("length")))
    return _StorageInfo(name, start, length)


def _of(record: Any, *names: str) -> Record:
    if not isinstance(record, Record) or type(record).name.rpartition(".")[2] not in names:
        raise DamagedError(f"has something else where a {names[0]} should be")
    return record


def _text(value: Any) -> str:
    if type(value) is not str:
        raise DamagedError("has a key that is no text")
    return value


def _numbers(values: Any) -> torch.Size:
    if type(values) not in (tuple, list) or not all(type(value) is int and value >= 0 for value in values):
        raise DamagedError("has a size or a place that is no whole number")
    return torch.Size(values)


def _dtype(properties: Any) -> torch.dtype:
    state = _of(properties, "TensorProperties").state
    dtype = state[0] if type(state) is tuple and state else None
    if not isinstance(dtype, torch.dtype):
        raise DamagedError("has a tensor without a dtype")
    return dtype
