"""Places that a run will write to, tried before it starts: hours later is too late to learn that one cannot be."""

from __future__ import annotations

import os
import tempfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

from megatron_dynmoe.config import ConfigError
from megatron_dynmoe.errors import os_sentence

_FOLDERS = ("save", "tensorboard_dir", "data_cache_path", "wandb_save_dir", "non_persistent_global_ckpt_dir")


def check_paths(args: Namespace) -> None:
    """Create the folders that the flags name and write into each; append nothing to the metrics file.

    Raises:
        ConfigError: with the flag, the path and the operating system's reason.
    """
    if os.environ.get("LOCAL_RANK", "0") == "0":  # one rank a node: folders may be local to it
        for name in _FOLDERS:
            if getattr(args, name):
                _try(name, _write_into, Path(getattr(args, name)))
    if args.moe_metrics_file and os.environ.get("RANK", "0") == str(int(os.environ.get("WORLD_SIZE", "1")) - 1):
        _try("moe_metrics_file", _open, Path(args.moe_metrics_file))


def _try(name: str, write: Callable[[Path], None], path: Path) -> None:
    try:
        write(path)
    except OSError as error:
        raise ConfigError(f"--{name.replace('_', '-')}: {os_sentence(error) or error}") from None


def _write_into(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(b"\0" * 4096)


def _open(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    path.open("ab").close()
    if new:
        path.unlink()
