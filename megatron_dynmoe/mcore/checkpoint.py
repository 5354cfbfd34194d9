"""Look at a distributed checkpoint before Megatron loads it, so that damage is said in one sentence."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from torch.distributed.checkpoint import FileSystemReader

from megatron_dynmoe.errors import UserError


class CheckpointError(UserError):
    """A checkpoint that cannot be loaded; the message names the file and what is wrong with it."""


def latest_folder(load: str | Path, step: int | None = None) -> Path | None:
    """The folder that ``--load`` (and ``--ckpt-step``) mean, or ``None`` if nothing was saved there yet.

    Raises:
        CheckpointError: the tracker file or the folder it names is damaged or missing.
    """
    root = Path(load)
    tracker = root / "latest_checkpointed_iteration.txt"
    if step is None:
        if not tracker.exists():
            return None
        word = tracker.read_text().strip()
        if word == "release":
            return root / "release"
        if not word.isdigit():
            raise CheckpointError(f"{tracker} says {word!r}; accepted: an iteration number or 'release'.")
        step = int(word)
    folder = root / f"iter_{step:07d}"
    if not folder.is_dir():
        raise CheckpointError(f"{folder} does not exist, although {tracker} or --ckpt-step names it; choose another.")
    return folder


def check_folder(folder: Path) -> None:
    """Hold every shard of a ``torch_dist`` checkpoint against its index: all there, none shorter than recorded.

    Folders of other formats have no index and are left to Megatron.

    Raises:
        CheckpointError: an unreadable index, or a missing, truncated or damaged shard.
    """
    index = folder / ".metadata"
    if not index.exists():
        if (folder / "metadata.json").exists():
            raise CheckpointError(f"{index} is missing; without this index the checkpoint cannot be read.")
        return
    try:
        storage = FileSystemReader(folder).read_metadata().storage_data
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointError(f"{index} cannot be read ({type(error).__name__}); the index is damaged.") from error
    pieces = defaultdict(list)
    for piece in storage.values():
        pieces[piece.relative_path].append((piece.offset, piece.length))
    for name, places in sorted(pieces.items()):
        _check_shard(folder / name, places)


def _check_shard(path: Path, places: list[tuple[int, int]]) -> None:
    if not path.exists():
        raise CheckpointError(f"{path} is missing; the checkpoint's index names it.")
    wanted, size = max(offset + length for offset, length in places), path.stat().st_size
    if size < wanted:
        raise CheckpointError(f"{path} has {size} bytes where the index names {wanted}; the shard is truncated.")
    with path.open("rb") as shard:
        for offset, _ in places:
            shard.seek(offset)
            # Each piece is a file of torch.save, which is a zip archive.
            if shard.read(2) not in (b"PK", b"\x80\x02", b"\x80\x04"):
                raise CheckpointError(f"{path} is damaged at byte {offset}; load an earlier one with --ckpt-step.")
