"""Start many short multi-rank Megatron runs without paying its ten-second import for each.

A fork server imports Megatron once; every rank of every run is forked from it, so each starts with fresh global state.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.preload"])


@dataclass
class Run:
    """A started run: its processes and where they write."""

    processes: list[Any]
    logs: list[Path] = field(default_factory=list)

    def wait(self, timeout: float = 240) -> list[int | None]:
        """Exit codes of all ranks; a rank that outlives ``timeout`` seconds is killed and reported as -9."""
        deadline = time.monotonic() + timeout
        failed_at = None
        while any(process.is_alive() for process in self.processes):
            if failed_at is None and any(process.exitcode for process in self.processes):
                failed_at = time.monotonic()  # its peers wait for it in a collective: give them a moment, no more
            if time.monotonic() > deadline or (failed_at and time.monotonic() > failed_at + 5):
                self.kill(signal.SIGKILL)
            time.sleep(0.05)
        for process in self.processes:  # what a rank started (megatron's checkpoint writer) must not outlive it
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        return [process.exitcode for process in self.processes]

    def kill(self, signum: int) -> None:
        """Send a signal to every rank that is alive."""
        for process in self.processes:
            if process.is_alive():
                with contextlib.suppress(ProcessLookupError):  # it has just ended
                    os.kill(process.pid, signum)

    def output(self, rank: int = 0) -> str:
        """What a rank printed."""
        return self.logs[rank].read_text(errors="replace")


def start(function: Callable, *args: Any, ranks: int, folder: Path) -> Run:
    """Run ``function(*args)`` on ``ranks`` forked processes that find each other as under torchrun."""
    folder.mkdir(parents=True, exist_ok=True)
    port = _free_port()
    run = Run(processes=[])
    for rank in range(ranks):
        log = folder / f"rank{rank}.log"
        process = _context.Process(target=_rank_main, args=(function, args, rank, ranks, port, str(log)))
        process.start()
        run.processes.append(process)
        run.logs.append(log)
    return run


def call(function: Callable, *args: Any, ranks: int, folder: Path, timeout: float = 240) -> Run:
    """Run to the end and assert that every rank succeeded."""
    run = start(function, *args, ranks=ranks, folder=folder)
    codes = run.wait(timeout)
    tails = "\n".join(f"--- rank {rank}\n{run.output(rank)[-3000:]}" for rank, code in enumerate(codes) if code)
    assert not any(codes), f"exit codes {codes}\n{tails}"
    return run


def pretrain(argv: Sequence[str]) -> int:
    """The training entry, as examples/pretrain_dynmoe.py calls it."""
    from megatron_dynmoe.data import validate_indexed
    from megatron_dynmoe.training.pretrain import main

    return main(list(argv), check_data=lambda prefix, vocabulary: validate_indexed(prefix, vocab_size=vocabulary))


def _rank_main(function: Callable, args: tuple, rank: int, ranks: int, port: int, log: str) -> None:
    os.setsid()  # a process group of its own, which the test can end as a whole
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    code = 1
    try:
        code = function(*args) or 0
    except SystemExit as exit:
        code = exit.code if isinstance(exit.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)  # no teardown: gloo's threads may still wait for a rank that was killed


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
