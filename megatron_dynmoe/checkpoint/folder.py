"""Which folder `--load` means, and whether what is in it was finished.

`SAVE/latest_checkpointed_iteration.txt` names the newest of `SAVE/iter_0000100`, `SAVE/iter_0000200`, ... Megatron
writes `metadata.json` last into an iteration, and the tracker file after it (megatron/training/checkpointing.py).
"""

import json
from pathlib import Path

from .errors import CheckpointError
from .index import INDEX

TRACKER = "latest_checkpointed_iteration.txt"
CONFIG = "metadata.json"
RELEASE = "release"


def latest_folder(root: Path, step: int | None = None) -> Path | None:
    """The folder that `--load root` (and `--ckpt-step`) mean, or `None` if nothing was saved there yet.

    Raises:
        CheckpointError: the tracker file is lost or damaged, or names a folder that is not there.
    """
    tracker = root / TRACKER
    if step:
        folder, named = root / f"iter_{step:07d}", f"--ckpt-step {step}"
    elif not tracker.exists():
        _check_nothing_lost(root)
        return None
    else:
        word = tracker.read_text(encoding="utf-8", errors="replace").strip()
        if word != RELEASE and not (word.isascii() and word.isdigit()):
            raise CheckpointError(f"{tracker} says {word!r}; accepted: an iteration number or {RELEASE!r}.")
        folder, named = root / (RELEASE if word == RELEASE else f"iter_{int(word):07d}"), f"{tracker}"
    if not folder.is_dir():
        saved = ", ".join(path.name for path in iterations(root)) or "none"
        raise CheckpointError(f"{folder} does not exist, although {named} names it; iterations in {root}: {saved}.")
    if not any(folder.iterdir()):
        raise CheckpointError(f"{folder} is empty, although {named} names it; choose another with --ckpt-step.")
    return folder


def _check_nothing_lost(root: Path) -> None:
    """Refuse finished iterations without a tracker file: training would start over beside them."""
    if done := [path for path in iterations(root) if is_finished(path)]:
        newest = int(done[-1].name.removeprefix("iter_"))
        raise CheckpointError(
            f"{root / TRACKER} is missing, but {', '.join(path.name for path in done)} are there; "
            f"give --ckpt-step {newest}, or write {newest} into that file."
        )


def iterations(root: Path) -> list[Path]:
    """The folders of iterations in `root`, oldest first."""
    names = (path for path in root.glob("iter_*") if path.is_dir() and path.name.removeprefix("iter_").isdigit())
    return sorted(names, key=lambda path: int(path.name.removeprefix("iter_")))


def is_finished(folder: Path) -> bool:
    """Whether the save of this iteration came to its end, as far as the names of its files tell."""
    return (folder / CONFIG).is_file() or any(folder.glob("mp_rank_*"))


def notes(root: Path, chosen: Path | None) -> list[str]:
    """One sentence for each iteration in `root` that is unfinished, or newer than the one that is loaded."""
    said = []
    what = f"loading {chosen.name}" if chosen is not None else "training starts at iteration 1"
    for folder in iterations(root):
        if not is_finished(folder):
            said.append(f"{folder} was not finished (no {CONFIG}) and is left alone; {what}.")
        elif chosen is not None and chosen.parent == root and chosen.name.startswith("iter_") and folder > chosen:
            said.append(f"{folder} is newer than what {TRACKER} or --ckpt-step names; {what}.")
    return said


def format_of(folder: Path) -> str:
    """How the iteration was saved: 'torch_dist', 'torch' (a file a rank), or 'torch_dcp' (an index alone).

    Raises:
        CheckpointError: none of these, or the file that tells is damaged.
    """
    path = folder / CONFIG
    if path.exists():
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
            backend, version = config["sharded_backend"], config.get("sharded_backend_version", 1)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise CheckpointError(
                f"{path} is not what megatron writes; it must be JSON with sharded_backend."
            ) from None
        if (backend, version) != ("torch_dist", 1):
            raise CheckpointError(f"{path} says {backend!r}, version {version!r}; accepted: 'torch_dist', version 1.")
        return "torch_dist"
    if any(folder.glob("mp_rank_0*")):
        return "torch"
    if (folder / INDEX).exists():
        return "torch_dcp"
    raise CheckpointError(f"{folder} has no {CONFIG}: not a checkpoint, or a save that was interrupted.")
