"""Reads megatron-core's `torch_dist` checkpoints without megatron, a process group or a GPU.

Such a folder is a PyTorch distributed checkpoint: `.metadata` says, for every key, the global shape and in which file
each chunk lies, whatever layout (tensor, pipeline, expert, data parallel) wrote it. Three things are megatron's own:

- `metadata.json` is written last, so a folder without it is an interrupted save;
- everything that is not a tensor, the command line's `args` among it, is one pickled object under
  `common_state/shard_0_1` (megatron-core 0.19), or the file `common.pt` (before);
- `SAVE/latest_checkpointed_iteration.txt` names the newest of `SAVE/iter_0000100`, `SAVE/iter_0000200`, ...
"""

import argparse
import io
import json
import math
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from ..errors import UserError
from .plain_pickle import PlainPickle, PlainUnpickler

_COMMON_KEY = "common_state/shard_0_1"
_LATEST = "latest_checkpointed_iteration.txt"


class ExportError(UserError):
    """A checkpoint, or a request, that cannot be exported; `str(error)` is one sentence for the user."""


class _CheckedReader(FileSystemReader):
    """PyTorch's reader; checks the CRC of each chunk, which `torch.load` does not, and unpickles plain objects only."""

    def read_metadata(self, *args, **kwargs) -> Metadata:
        with open(self.path / ".metadata", "rb") as file:
            return PlainUnpickler(file).load()

    def _slice_file(self, file, sinfo):
        file.seek(sinfo.offset)
        chunk = io.BytesIO(file.read(sinfo.length))
        if not sinfo.transform_descriptors:  # a compressed chunk is no zip archive; its codec checks it
            with zipfile.ZipFile(chunk) as archive:
                if (member := archive.testzip()) is not None:
                    raise zipfile.BadZipFile(f"checksum of {member} is wrong")
            chunk.seek(0)
        return chunk


class _Target:
    """The part of a load planner that the reader talks to: where to put one tensor, or one object."""

    def __init__(self, tensor: Tensor | None = None):
        self.tensor = torch.empty(0) if tensor is None else tensor
        self.object: Any = None

    def resolve_tensor(self, item: ReadItem) -> Tensor:
        view = self.tensor
        for dim, (start, length) in enumerate(zip(item.dest_offsets, item.lengths, strict=True)):
            view = view.narrow(dim, start, length)
        return view

    def commit_tensor(self, item: ReadItem, tensor: Tensor) -> None:
        pass

    def load_bytes(self, item: ReadItem, value: io.BytesIO) -> None:
        self.object = torch.load(value, map_location="cpu", weights_only=False, pickle_module=PlainPickle)


class DistCheckpoint:
    """A distributed checkpoint, opened: its arguments, its keys, and slices of its tensors.

    Attributes:
        path: the folder of one iteration.
        args: megatron's arguments as saved by the training that wrote it.
        shapes: key -> global shape, of all tensors (the optimizer's too).
    """

    def __init__(self, folder: str | Path, *, iteration: int | None = None):
        """Opens `SAVE` (newest iteration, or `iteration`) or `SAVE/iter_0000100`.

        Raises:
            ExportError: no checkpoint there, an interrupted save, a missing or truncated file.
        """
        self.path = find_iteration(Path(folder), iteration)
        self._reader = _CheckedReader(self.path)
        try:
            self._metadata = self._reader.read_metadata()
            self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
            entries = self._metadata.state_dict_metadata
            tensors = {key: entry for key, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}
            self._check_files()
        except FileNotFoundError as error:
            raise ExportError(
                f"{self.path / '.metadata'} is missing; a complete torch_dist checkpoint has it."
            ) from error
        except ExportError:
            raise
        except Exception as error:
            raise ExportError(
                f"{self.path / '.metadata'} is not the metadata of a torch_dist checkpoint ({error})."
            ) from error
        self._tensors: dict[str, TensorStorageMetadata] = tensors
        self.shapes = {key: tuple(entry.size) for key, entry in tensors.items()}
        self.args = self._read_args()

    def dtype(self, key: str) -> torch.dtype:
        """The dtype in which tensor `key` is stored."""
        return self._tensors[key].properties.dtype

    def read(self, key: str, index: tuple[int, ...] = ()) -> Tensor:
        """Tensor `key`, or its slice at the leading indices `index`: only that slice is read from disk.

        Raises:
            ExportError: the key is not there, or a file that holds a part of it is missing or corrupted.
        """
        if key not in self._tensors:
            raise ExportError(f"{self.path} has no tensor {key!r}.")
        entry = self._tensors[key]
        offsets = torch.Size((*index, *[0] * (len(entry.size) - len(index))))
        sizes = torch.Size((*[1] * len(index), *entry.size[len(index) :]))
        items = create_read_items_for_chunk_list(key, entry, [ChunkStorageMetadata(offsets=offsets, sizes=sizes)])
        if sum(math.prod(item.lengths) for item in items) != math.prod(sizes):
            raise ExportError(f"{self.path} holds only a part of {key!r}{list(index) or ''}: a rank's data is missing.")
        target = _Target(torch.empty(sizes, dtype=entry.properties.dtype))
        self._load(items, target, key)
        return target.tensor.reshape(entry.size[len(index) :])

    def _load(self, items: list[ReadItem], target: _Target, key: str) -> None:
        files = sorted({self._metadata.storage_data[item.storage_index].relative_path for item in items})
        try:
            self._reader.read_data(LoadPlan(items), target).wait()
        except Exception as error:
            # zipfile, torch and pickle each have their own exceptions for bytes that are not what was written.
            raise ExportError(
                f"{key!r} cannot be read from {', '.join(files)} in {self.path}: corrupted ({error})."
            ) from error

    def _check_files(self) -> None:
        ends: dict[str, int] = {}
        for info in self._metadata.storage_data.values():
            ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
        for name, end in sorted(ends.items()):
            file = self.path / name
            if not file.is_file():
                raise ExportError(f"{file} is missing; the checkpoint's metadata names {len(ends)} such files.")
            if file.stat().st_size < end:
                raise ExportError(
                    f"{file} is truncated: {file.stat().st_size} bytes, the metadata says at least {end}."
                )

    def _read_args(self) -> argparse.Namespace:
        legacy = self.path / "common.pt"
        if _COMMON_KEY in self._metadata.state_dict_metadata:
            index = MetadataIndex(_COMMON_KEY)
            empty = torch.Size((0,))
            item = ReadItem(LoadItemType.BYTE_IO, index, empty, index, empty, empty)
            target = _Target()
            self._load([item], target, _COMMON_KEY)
            state = target.object
        elif legacy.is_file():
            try:
                state = torch.load(legacy, map_location="cpu", weights_only=False, pickle_module=PlainPickle)
            except Exception as error:
                raise ExportError(f"{legacy} cannot be read: corrupted ({error}).") from error
        else:
            raise ExportError(
                f"{self.path} has neither {_COMMON_KEY} nor common.pt, so the model's arguments are unknown."
            )
        state = state[0] if isinstance(state, list) else state
        args = state.get("args") if isinstance(state, dict) else None
        if not isinstance(args, argparse.Namespace):
            raise ExportError(
                f"{self.path} holds no training arguments ('args'); it must be saved by megatron.training."
            )
        return args


def find_iteration(folder: Path, iteration: int | None = None) -> Path:
    """The folder of one iteration: `folder` itself, or the one of `folder` that `iteration` or the tracker file names.

    Raises:
        ExportError: there is none, or it is not a finished torch_dist checkpoint.
    """
    if not folder.is_dir():
        raise ExportError(f"checkpoint {folder} is not a folder; give SAVE or SAVE/iter_0000100.")
    found = folder
    tracker = folder / _LATEST
    if iteration is not None:
        found = folder / f"iter_{iteration:07d}"
    elif not (folder / "metadata.json").is_file() and tracker.is_file():
        text = tracker.read_text(encoding="utf-8", errors="replace").strip()
        if not text.isdigit() and text != "release":
            raise ExportError(f"{tracker} says {text!r}; a number of an iteration (or 'release') would be accepted.")
        found = folder / (f"iter_{int(text):07d}" if text.isdigit() else text)
    if not found.is_dir():
        saved = ", ".join(sorted(p.name for p in folder.glob("iter_*"))) or "none"
        raise ExportError(f"{found} does not exist; iterations in {folder}: {saved}.")
    _check_finished(found)
    return found


def _check_finished(folder: Path) -> None:
    config = folder / "metadata.json"
    if not config.is_file():
        raise ExportError(
            f"{folder} has no metadata.json: not a distributed checkpoint, or a save that was interrupted."
        )
    try:
        backend = json.loads(config.read_text(encoding="utf-8"))["sharded_backend"]
    except (ValueError, KeyError, TypeError) as error:
        raise ExportError(f"{config} is not what megatron writes; it must be JSON with 'sharded_backend'.") from error
    if backend != "torch_dist":
        raise ExportError(
            f"{config} says sharded_backend {backend!r}; accepted: torch_dist (megatron's --ckpt-format)."
        )
