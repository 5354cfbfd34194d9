"""A folder is written beside its target and takes the target's name at the end: it is whole, or it is not there."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from megatron_dynmoe.checkpoint.errors import CheckpointError


@contextmanager
def writing(out: Path, refusal: type[CheckpointError]) -> Iterator[None]:
    """Errors of the file system (a full disk) as one sentence; safetensors has an exception of its own for them."""
    try:
        yield
    except OSError as error:
        raise refusal(f"{out} cannot be written ({error.strerror or error}).") from error
    except SafetensorError as error:
        raise refusal(f"{out} cannot be written ({error}).") from error


@contextmanager
def beside(out: Path) -> Iterator[Path]:
    """A new folder on the same file system that becomes `out` at the end, and is removed if the body fails."""
    parent = out.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".tmp", dir=parent))
    try:
        yield folder
        folder.chmod(0o755)  # mkdtemp's folder is the owner's alone
        if out.is_dir():
            # The old one steps aside first: a folder with files in it cannot be replaced in one step.
            aside = folder.with_suffix(".old")
            out.rename(aside)
            try:
                folder.rename(out)
            except BaseException:
                aside.rename(out)
                raise
            shutil.rmtree(aside)
        else:
            folder.rename(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
