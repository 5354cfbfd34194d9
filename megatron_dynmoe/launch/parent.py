"""A process that must not outlive the one that started it.

torchrun starts each rank in a session of its own, so a rank survives a torchrun that was killed, trains on by itself
and goes on saving into the folder that the next run uses. The helper processes of asynchronous checkpoints survive
their rank likewise.

A thread asks for the parent's process number and ends the process when that changes. Linux can send a signal instead
(``PR_SET_PDEATHSIG``), but does so when the *thread* that forked ends, and checkpoints are written from threads.
"""

import os
import signal
import sys
import threading
import time

SECONDS_BETWEEN_LOOKS = 0.5

_watched = False


def end_with_parent(parent: int | None = None) -> None:
    """From now on this process and whatever it forks end within a second after their parent; a second call is idle.

    Args:
        parent: process number of the parent, if it was noted earlier; it may be gone by now.
    """
    global _watched
    if _watched:
        return
    _watched = True
    if signal.getsignal(signal.SIGTERM) is signal.SIG_IGN:  # inherited from a torchrun that its supervisor made deaf
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _start(parent or os.getppid(), loud=True)
    os.register_at_fork(after_in_child=lambda: _start(os.getppid(), loud=False))


def under_torchrun() -> bool:
    """Whether torchrun started this process. Others may leave on purpose: the shell of ``nohup python ... &`` does."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def _start(parent: int, *, loud: bool) -> None:
    threading.Thread(target=_watch, args=(parent, loud), name="end-with-parent", daemon=True).start()


def _watch(parent: int, loud: bool) -> None:
    while os.getppid() == parent:
        time.sleep(SECONDS_BETWEEN_LOOKS)
    if loud:
        rank = os.environ.get("RANK", "?")
        print(f"error: rank {rank} ends: its launcher, process {parent}, is gone.", file=sys.stderr, flush=True)
    os._exit(1)  # at once, whatever the main thread waits for
