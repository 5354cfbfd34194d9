"""Writes a distributed checkpoint in one process, chunk by chunk, without megatron or a process group.

PyTorch's own planner and writer do it, as for ranks that each write a part: here one part after the other, each a file.
What a part holds is read when it is written, so no more than one file's chunks are in memory (the writer keeps the last
chunk of each key until its file is closed).
"""

import io
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from .check import COMMON_KEY
from .folder import CONFIG


@dataclass(frozen=True)
class Chunk:
    """A box of tensor `key`, which is `size` as a whole: where it begins, its shape, and what reads it.

    `read()` returns a tensor of as many elements and of `dtype`, in the same order.
    """

    key: str
    size: tuple[int, ...]
    start: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        """Of its elements."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_iteration(
    folder: Path,
    chunks: Sequence[Chunk],
    objects: dict[str, Any],
    common: dict[str, Any],
    *,
    max_file_bytes: int = 1 << 30,
    progress: Callable[[Chunk], Any] = lambda _: None,
) -> None:
    """Write `folder`, which exists and is empty, as megatron-core 0.19 writes one iteration.

    Args:
        chunks: they tile their tensors.
        objects: what is no tensor, by sharded key (`x._extra_state/shard_0_1`).
        common: the state that all ranks share, with megatron's `args`.
        max_file_bytes: bound on a file (one chunk may exceed it), and on the memory needed.
        progress: called with each chunk when it is read.

    Raises:
        ValueError: chunks overlap, or leave their tensor.
        OSError: the folder cannot be written.
    """
    planner = _Planner(chunks, {**objects, COMMON_KEY: common}, progress)
    writer = FileSystemWriter(folder, per_thread_copy_ahead=0)  # nothing to overlap: there is no device
    writer.reset()
    planner.set_up_planner({}, is_coordinator=True)
    writer.set_up_storage_writer(is_coordinator=True)
    plans, metadata = planner.create_global_plan(list(planner.parts(max_file_bytes)))
    plans = writer.prepare_global_plan(plans)
    results = [writer.write_data(planner.finish_plan(plan), planner).wait() for plan in plans]
    writer.finish(metadata, results)
    # Last, as megatron does: with it the iteration is finished.
    (folder / CONFIG).write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))


class _Planner(DefaultSavePlanner):
    """PyTorch's planner over chunks and objects that are made when they are written."""

    def __init__(self, chunks: Sequence[Chunk], objects: dict[str, Any], progress: Callable[[Chunk], Any]):
        super().__init__(flatten_state_dict=False)
        self._chunks = {(chunk.key, chunk.start): chunk for chunk in chunks}
        self._objects, self._progress = objects, progress

    def parts(self, max_file_bytes: int) -> Iterator[SavePlan]:
        """What goes into one file each: the objects first, then chunks in their order."""
        items = [WriteItem(index=MetadataIndex(key), type=WriteItemType.BYTE_IO) for key in self._objects]
        filled = 0
        for chunk in self._chunks.values():
            if filled and filled + chunk.bytes > max_file_bytes:
                yield SavePlan(items)
                items, filled = [], 0
            items.append(_item(chunk))
            filled += chunk.bytes
        yield SavePlan(items)

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        """The bytes of an object, the tensor of a chunk."""
        index = write_item.index
        if index.offset is None:
            raw = io.BytesIO()
            torch.save([self._objects[index.fqn]], raw)  # a list of this rank's shards
            return raw
        chunk = self._chunks[index.fqn, tuple(index.offset)]
        self._progress(chunk)
        return chunk.read().reshape(chunk.shape)


def _item(chunk: Chunk) -> WriteItem:
    start, shape = torch.Size(chunk.start), torch.Size(chunk.shape)
    data = TensorWriteData(
        chunk=ChunkStorageMetadata(offsets=start, sizes=shape),
        properties=TensorProperties(dtype=chunk.dtype),
        size=torch.Size(chunk.size),
    )
    return WriteItem(index=MetadataIndex(chunk.key, start), type=WriteItemType.SHARD, tensor_data=data)
