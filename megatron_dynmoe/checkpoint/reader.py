"""Opens megatron-core's `torch_dist` checkpoints without megatron, a process group or a GPU, and reads slices of them.

Such a folder is a PyTorch distributed checkpoint: `.metadata` says, for every key, the global shape and in which file
each chunk lies, whatever layout (tensor, pipeline, expert, data parallel) wrote it. Everything that is not a tensor,
the command line's `args` among it, is one pickled object under `common_state/shard_0_1` (megatron-core 0.19), or the
file `common.pt` (before).
"""

import argparse
import math
from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from .check import all_places, check_places, common_state, read_tensor
from .errors import CheckpointError
from .folder import CONFIG, TRACKER, format_of, iterations, latest_folder
from .index import Place, read_index


class DistCheckpoint:
    """A distributed checkpoint, opened: its arguments, its keys, and slices of its tensors.

    Attributes:
        path: the folder of one iteration.
        args: megatron's arguments as saved by the training that wrote it.
        shapes: key -> global shape, of all tensors (the optimizer's too).
    """

    def __init__(self, folder: str | Path, *, iteration: int | None = None):
        """Opens `SAVE` (newest iteration, or `iteration`) or `SAVE/iter_0000100`; all of it is held to be plain data.

        Raises:
            CheckpointError: no checkpoint there, an interrupted save, a missing or damaged file, no plain data.
        """
        self.path = find_iteration(Path(folder), iteration)
        places = all_places(self.path)
        check_places(self.path, places, checksums=False)  # of what is read later, `read` checks them
        self.args = _args(self.path, common_state(self.path, places))
        entries = read_index(self.path).state_dict_metadata
        self._tensors = {key: entry for key, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}
        self._chunks: dict[str, list[Place]] = defaultdict(list)
        for place in places:
            self._chunks[place.key].append(place)
        self.shapes = {key: tuple(entry.size) for key, entry in self._tensors.items()}

    def dtype(self, key: str) -> torch.dtype:
        """The dtype in which tensor `key` is stored."""
        return self._tensors[key].properties.dtype

    def read(self, key: str, index: tuple[int, ...] = ()) -> Tensor:
        """Tensor `key`, or its slice at the leading indices `index`: only that slice is read from disk.

        Raises:
            CheckpointError: the key is not there, or a file that holds a part of it is missing or corrupted.
        """
        if key not in self._tensors:
            raise CheckpointError(f"{self.path} has no tensor {key!r}.")
        shape, read = self.shapes[key], 0
        target = torch.empty(shape[len(index) :], dtype=self.dtype(key))
        for place in self._chunks[key]:
            begin, size = place.offsets, place.size or ()
            if any(not first <= at < first + length for at, first, length in zip(index, begin, size, strict=False)):
                continue
            try:
                chunk = read_tensor(self.path, place)
            except (CheckpointError, OSError) as error:
                raise CheckpointError(
                    f"{key!r} cannot be read from {place.file} in {self.path}: corrupted ({error})."
                ) from error
            part = chunk[tuple(at - first for at, first in zip(index, begin, strict=False))]
            rest = zip(begin[len(index) :], size[len(index) :], strict=True)
            target[tuple(slice(first, first + length) for first, length in rest)] = part
            read += part.numel()
        if read != math.prod(target.shape):
            raise CheckpointError(f"{self.path} holds only a part of {key!r}{list(index) or ''}: data is missing.")
        return target


def _args(folder: Path, state: dict | None) -> argparse.Namespace:
    if state is None:
        raise CheckpointError(f"{folder} has neither common_state nor common.pt, so the model's arguments are unknown.")
    if not isinstance(args := state.get("args"), argparse.Namespace):
        raise CheckpointError(f"{folder} holds no training arguments ('args'); it must be saved by megatron.training.")
    return args


def find_iteration(folder: Path, iteration: int | None = None) -> Path:
    """The folder of one iteration: `folder` itself, or the one of `folder` that `iteration` or the tracker file names.

    Raises:
        CheckpointError: there is none, or it is not a finished torch_dist checkpoint.
    """
    if not folder.is_dir():
        raise CheckpointError(f"checkpoint {folder} is not a folder; give SAVE or SAVE/iter_0000100.")
    found: Path | None = folder
    if iteration is not None:
        found = folder / f"iter_{iteration:07d}"
        if not found.is_dir():
            saved = ", ".join(path.name for path in iterations(folder)) or "none"
            raise CheckpointError(f"{found} does not exist; iterations in {folder}: {saved}.")
    elif not (folder / CONFIG).is_file() and ((folder / TRACKER).is_file() or iterations(folder)):
        found = latest_folder(folder)
    if found is None or not (found / CONFIG).is_file():
        raise CheckpointError(f"{found or folder} has no {CONFIG}: not a checkpoint, or a save that was interrupted.")
    format_of(found)
    return found
