"""Ends on request, cleanly: SIGTERM (a scheduler's kill) unwinds the stack as Ctrl-C does, and temporaries are removed.

Python sets signal handlers in the main thread only; in another one these contexts do nothing.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def sigterm_unwinds() -> Iterator[None]:
    """Within the block SIGTERM raises SystemExit(143)."""

    def stop(signum, frame):
        raise SystemExit(128 + signum)

    with _handlers({signal.SIGTERM: stop}):
        yield


@contextmanager
def signals_held_back() -> Iterator[None]:
    """Ctrl-C and SIGTERM wait until the block is over: for the few renames that must happen together."""
    received = []

    def remember(signum, frame):
        received.append(signum)

    # handlers and not a signal mask, which holds for one thread: another would take the signal
    with _handlers({signal.SIGINT: remember, signal.SIGTERM: remember}):
        yield
    for signum in received[:1]:
        signal.raise_signal(signum)


@contextmanager
def signals_end_at_once(words: str) -> Iterator[None]:
    """Within the block Ctrl-C and SIGTERM print ``words`` and end the process, with 130 or 143.

    For imports of many seconds before anything is written: compiled modules abort the process when a handler raises
    while they are imported. In an interactive Python, which must live on, the signals wait.
    """
    if hasattr(sys, "ps1") or "ipykernel" in sys.modules:
        with signals_held_back():
            yield
        return

    def end(signum, frame):
        os.write(2, f"\n{words}\n".encode())
        os._exit(128 + signum)

    with _handlers({signal.SIGINT: end, signal.SIGTERM: end}):
        yield


@contextmanager
def _handlers(handlers: dict) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {signum: signal.signal(signum, handler) for signum, handler in handlers.items()}
    try:
        yield
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
