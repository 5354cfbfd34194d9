"""One sentence for a failure, from the first rank that fails, and an end within seconds for all others.

A rank that fails alone leaves its peers in a collective that never completes. Those on its node are ended by torchrun;
those on other nodes wait for a timeout, and nobody there learns why. So the first rank that fails leaves its sentence
in the store at ``MASTER_ADDR:MASTER_PORT``, which torchrun's agent keeps from before the first rank starts; every rank
has a thread that waits there. Without such a store (ranks started by other means, before their process group is made)
each rank speaks for itself.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import re
import socket
import sys
import threading
import time
import traceback
from datetime import timedelta

import torch
from torch.distributed import DistError, DistNetworkError, TCPStore

from megatron_dynmoe.launch import outcome

# How long one that only lost its peers lets the one that failed speak first.
PATIENCE = 2.0
SECONDS_BETWEEN_LOOKS = 1.0
# What gloo and NCCL say when a peer has gone.
LOST_PEER = ("connection closed by peer", "connection reset by peer", "timed out", "broken pipe", "nccl", "gloo")

# torchrun may keep one store over its restarts, and a restart must not end by the failure before it.
_KEY = f"megatron_dynmoe/failure/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def watch() -> threading.Event:
    """Look, in a thread, for another rank's failure; this process then ends with that rank's exit code.

    Returns:
        set it when this rank is done.
    """
    done = threading.Event()
    if _world() > 1 and "MASTER_PORT" in os.environ:
        threading.Thread(target=_watch, args=(done,), name="failure-watch", daemon=True).start()
    return done


def say(sentence: str, code: int = 2, error: BaseException | None = None) -> int:
    """Print ``sentence`` unless another rank has said what there is to say; does not return where peers still wait.

    Args:
        sentence: what is wrong.
        code: the exit code; see :mod:`megatron_dynmoe.launch.outcome` for those that no restart mends.
        error: its traceback is printed below the sentence.

    Returns:
        ``code``, or that of the rank that failed first.
    """
    lost_peer = _lost_peer(error)
    if lost_peer:
        sentence = f"a collective lost a rank, which was killed or is out of reach: {_first_line(lost_peer)}"
        time.sleep(PATIENCE)
    mine = {"rank": _rank(), "host": socket.gethostname(), "sentence": sentence, "code": code}
    first = _claim(mine)
    if first == mine or not (lost_peer or first["sentence"] == sentence):
        print(f"error: {_from(mine)}{sentence}", file=sys.stderr, flush=True)
        if error is not None and not lost_peer:
            traceback.print_exception(error)
    return _end(first)


def _watch(done: threading.Event) -> None:
    store = None
    # Not one long wait in the store: a thread that wakes from it while the interpreter shuts down aborts the process.
    while not done.wait(SECONDS_BETWEEN_LOOKS):
        try:
            store = store or _connect()
            if store is not None and store.check([_KEY]):
                first = json.loads(store.get(_KEY))
                break
        except DistError:  # the link is cut, or whoever kept the store is gone
            store = None
    else:
        return
    if first["rank"] == _rank():
        return
    if first["host"] != socket.gethostname() and os.environ.get("LOCAL_RANK") == "0":
        print(f"error: {_from(first)}{first['sentence']}", file=sys.stderr, flush=True)
    time.sleep(PATIENCE)  # time to say what is wrong here too
    if not done.is_set():
        _end(first, leave=True)


def _claim(mine: dict) -> dict:
    """The failure that counts: this rank's own, or that of a rank that came before."""
    with contextlib.suppress(DistError):
        store = _connect()
        if store is not None:
            if store.add(f"{_KEY}/count", 1) > 1:
                store.wait([_KEY], timedelta(seconds=PATIENCE))
                return json.loads(store.get(_KEY))
            store.set(_KEY, json.dumps(mine))
            if _rank() == 0 and not _agent_keeps_store():
                time.sleep(PATIENCE)  # the store ends with this process; let the others read
    return mine


def _connect() -> TCPStore | None:
    """A connection of one's own to the job's store, None where there is none."""
    if _world() == 1 or "MASTER_PORT" not in os.environ:
        return None
    address = os.environ.get("MASTER_ADDR", "127.0.0.1"), int(os.environ["MASTER_PORT"])
    # a plain socket first: the store's own attempts fill the log
    with contextlib.suppress(OSError), socket.create_connection(address, timeout=5):
        return TCPStore(*address, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=30))
    return None


def _end(first: dict, *, leave: bool = False) -> int:
    outcome.write(first["code"], f"{_from(first)}{first['sentence']}")
    if leave or (_world() > 1 and torch.distributed.is_initialized()):
        for child in multiprocessing.active_children():
            child.kill()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(first["code"])  # no teardown: communicators may wait for ever for those that are gone
    return first["code"]


def _from(failure: dict) -> str:
    if re.match(r"rank \d+ on ", failure["sentence"]):  # what another rank found and told this one
        return ""
    return f"rank {failure['rank']} on {failure['host']}: " if _world() > 1 else ""


def _lost_peer(error: BaseException | None) -> BaseException | None:
    """What a collective said of a peer that is gone; others (dataset builders) raise an error of their own from it."""
    while error is not None:
        if isinstance(error, DistNetworkError):
            return error
        if isinstance(error, RuntimeError) and any(words in str(error).lower() for words in LOST_PEER):
            return error
        error = error.__cause__ or error.__context__
    return None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _agent_keeps_store() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _world() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))
