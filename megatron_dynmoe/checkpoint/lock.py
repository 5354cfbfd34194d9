"""One run at a time writes into a folder.

A record lock (`fcntl.lockf`), not `flock`: it belongs to this process alone, so it ends when the process does, killed
or not, and children that were forked from it (data workers, writers of checkpoints) do not keep it alive. On NFS it is
passed on to the server (v4, or v3 with lockd), so that it holds between hosts; a mount with `nolock` or `local_lock`
holds it on one host only. Lustre needs `-o flock`; where a file system has no locks at all, training goes on without
one, and says so. The kernel drops the lock when any handle of this process on the file is closed: it is opened once.
"""

import errno
import fcntl
import os
import socket
import sys
import time
from pathlib import Path

from .errors import CheckpointError

LOCK = ".run.lock"
# An elastic restart starts while the run before it may still be going down; torchrun gives its ranks 30 s.
WAIT_S = 45.0

_held: dict[Path, int] = {}


def hold(folder: Path, *, wait_s: float = WAIT_S) -> str | None:
    """Take the lock of `folder`, which is made if it is not there, until this process ends.

    Args:
        folder: where one run writes.
        wait_s: how long to wait for an owner to end.

    Returns:
        a sentence where the file system has no locks, else `None`.

    Raises:
        CheckpointError: another process has it; the message names host, process and since when.
        OSError: the folder cannot be made or written.
    """
    path = (folder / LOCK).absolute()
    if path in _held:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        _wait(handle, folder, wait_s)
    except OSError as error:
        os.close(handle)
        if error.errno in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL):
            return f"{folder} is on a file system without locks ({error.strerror}); let one run at a time write there."
        raise
    except CheckpointError:
        os.close(handle)
        raise
    _held[path] = handle
    owner = f"process {os.getpid()} on {socket.gethostname()}, started {time.strftime('%Y-%m-%d %H:%M:%S')}"
    if job := os.environ.get("SLURM_JOB_ID"):
        owner += f", Slurm job {job}"
    os.ftruncate(handle, 0)
    os.pwrite(handle, f"{owner}\n".encode(), 0)
    return None


def _wait(handle: int, folder: Path, wait_s: float) -> None:
    deadline, told = time.monotonic() + wait_s, False
    while True:
        try:
            return fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
        owner = os.pread(handle, 4096, 0).decode(errors="replace").strip() or "an unknown process"
        if time.monotonic() > deadline:
            raise CheckpointError(
                f"--save {folder} is in use by {owner}; two runs would mix their checkpoints. End that one, or give "
                "another --save."
            )
        if not told:
            print(f"note: {folder} is in use by {owner}; waiting {wait_s:.0f} s for it to end.", file=sys.stderr)
            told = True
        time.sleep(0.2)
