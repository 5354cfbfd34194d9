"""Ends on request, cleanly: SIGTERM (a scheduler's kill) unwinds the stack as Ctrl-C does, and temporaries are removed.

Python sets signal handlers in the main thread only; in another one these contexts do nothing.
"""

import os
import signal
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
def signals_held_back(*, sigterm_ends: bool = False) -> Iterator[None]:
    """Ctrl-C and SIGTERM wait until the block is over: for the few renames that must happen together.

    sigterm_ends: SIGTERM ends the process at once, as it does by default; for a block of seconds before which nothing
    was written, and in which a handler must not raise: compiled modules that are being imported abort the process then.
    """
    received = []

    def remember(signum, frame):
        received.append(signum)

    def end(signum, frame):
        os._exit(128 + signum)

    # handlers and not a signal mask, which holds for one thread: another would take the signal
    with _handlers({signal.SIGINT: remember, signal.SIGTERM: end if sigterm_ends else remember}):
        yield
    for signum in received[:1]:
        signal.raise_signal(signum)


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
