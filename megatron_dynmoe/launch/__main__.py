"""Supervise torchrun on this node: bounded ends, and new starts from the last checkpoint.

    python -m megatron_dynmoe.launch --save runs/x -- torchrun --nproc-per-node 8 script.py ...
    python -m megatron_dynmoe.launch --save runs/x --nodes 4 --endpoint node0:29500 --id job7 -- torchrun ... (on each)

torchrun alone does not do it over nodes: when a link is cut its agents hang or end with 1, the store ends with the
node that keeps it, and a failure on one node reaches the others after the collectives' timeout. See ``meeting.py``.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

from megatron_dynmoe.errors import one_sentence
from megatron_dynmoe.launch import outcome
from megatron_dynmoe.launch.meeting import Beat, Host, Order, Wire

PAUSE = 0.5  # seconds between beats
BARRIER = 5.0  # seconds for torchrun to leave after its ranks when it has to end; it would wait 300 for other nodes
# The signals that torchrun handles (--signals-to-handle, in torch 2.11 too): all but SIGTERM, which it ignores here.
# Slurm sends SIGTERM to every process of a job. torchrun would kill ranks 30 s later, while they save, and only from
# torch 2.13 on can that time be set. Ranks inherit the ignored signal; parent.end_with_parent() gives it back to them.
OTHERS = "SIGINT,SIGHUP,SIGQUIT"
LINGER = 3.0  # seconds for which a host that ends repeats its last word


def say(words: str) -> None:
    """One line of the supervisor's."""
    print(f"[{socket.gethostname()}] {words}", file=sys.stderr, flush=True)


class Child:
    """torchrun of one generation, with all its descendants."""

    def __init__(self, command: list[str], generation: int) -> None:
        self.generation = generation
        self.folder = tempfile.TemporaryDirectory(prefix="dynmoe-launch-")
        self.outcome = Path(self.folder.name) / "outcome.json"
        environment = os.environ | {outcome.VARIABLE: str(self.outcome), "PET_SIGNALS_TO_HANDLE": OTHERS}
        self.process = subprocess.Popen(command, env=environment, preexec_fn=_before_torchrun)

    def ended(self) -> tuple[int, str] | None:
        """Exit code and sentence, None while it runs."""
        code = self.process.poll()
        if code is None:
            return None
        said = outcome.read(self.outcome) or (code if code >= 0 else 128 - code, "")
        self.folder.cleanup()
        return said if code else (0, "")

    def tell_ranks(self, signum: int) -> None:
        """Send a signal to torchrun's children."""
        for pid in _children(self.process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signum)

    def kill(self) -> None:
        """End torchrun and everything below it, now: without its peers it has nothing to save."""
        family = [self.process.pid, *_descendants(self.process.pid)]
        for pid in family:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        self.folder.cleanup()


def _before_torchrun() -> None:
    """In torchrun, before it starts: it ends with its supervisor, and not by SIGTERM."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG; the thread that forks is this program's only one
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _children(pid: int) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += map(int, task.read_text().split())
    return found


def _descendants(pid: int) -> list[int]:
    """Process numbers of all children, theirs, and so on."""
    return [one for child in _children(pid) for one in (child, *_descendants(child))]


class Node:
    """This node's part: runs what the host orders and tells it how that goes."""

    def __init__(self, options: argparse.Namespace, wire: Wire | None, host: Host | None) -> None:
        self.options, self.wire, self.host = options, wire, host
        self.beat = Beat(node=uuid.uuid4().hex, name=socket.gethostname())
        self.child: Child | None = None
        self.stopping = False
        self.child_had_ranks = 0.0  # when, looked at while stopping
        self.alone = False  # the host is out of reach
        self.answered = time.monotonic()

    def run(self) -> int:
        """Until the host says that it is over, or is gone for too long; the exit code."""
        while True:
            code = self._turn()
            if code is not None:
                return code
            time.sleep(PAUSE)

    def stop(self, signum: int, frame: object) -> None:
        """SIGTERM: the ranks save and leave, then torchrun, then this process; a second signal ends them at once.

        The ranks are told, not torchrun, which is deaf to it: they have as long as whoever sent the signal gives.
        """
        if self.stopping:
            self._drop()
        elif self.child is not None and signum == signal.SIGTERM:  # Ctrl-C reaches the whole family by itself
            self.child.tell_ranks(signum)
        self.stopping, self.child_had_ranks = True, time.monotonic()

    def _turn(self) -> int | None:
        if self.child is not None and (ended := self.child.ended()) is not None:
            self.beat.ended, (self.beat.code, self.beat.said) = self.child.generation, ended
            self.beat.running, self.child = 0, None
        if self.stopping and self.child is not None:
            self.child_had_ranks = time.monotonic() if _children(self.child.process.pid) else self.child_had_ranks
            if time.monotonic() - self.child_had_ranks > BARRIER:
                self._drop()
        order = self._ask()
        if self.stopping and self.child is None:
            return self.beat.code if self.beat.ended == self.beat.seen else 128 + signal.SIGTERM
        silent = time.monotonic() - self.answered
        if order is not None and order.what == "end":
            return self._over(order)
        if order is not None and not self.stopping:
            self._obey(order)
        elif order is None and silent > self.options.give_up_after:
            return self._over(
                Order("end", code=1, said=f"gave up: no word from {self.options.endpoint} for {silent:.0f} s")
            )
        elif order is None and silent > self.options.lost_after and not self.alone:
            say(f"{self.options.endpoint} has not been heard of for {silent:.0f} s; waiting for it")
            self.alone = True
            self._drop()
        return None

    def _ask(self) -> Order | None:
        order = None
        if self.host is not None:
            order = self.host.hear(self.beat)
            if self.wire is not None:
                for beat, sender in self.wire.received(Beat):
                    self.wire.send(self.host.hear(beat), sender)
        elif self.wire is not None:
            self.wire.send(self.beat)
            orders = self.wire.received(Order)
            order = orders[-1][0] if orders else None
        if order is not None:
            self.answered, self.alone = time.monotonic(), False
        return order

    def _obey(self, order: Order) -> None:
        self.beat.seen = order.generation
        if self.child is not None and (order.what == "wait" or order.generation != self.child.generation):
            self._drop()
        elif order.what == "run" and order.generation > max(self.beat.ended, self.beat.running):
            self.child = Child(self._command(order.generation), order.generation)
            self.beat.running = order.generation

    def _command(self, generation: int) -> list[str]:
        program, *rest = self.options.command
        if self.options.nodes == 1:
            return [program, "--standalone", *rest]
        meet = ["--nnodes", str(self.options.nodes), "--rdzv-backend", "c10d"]
        meet += ["--rdzv-endpoint", self.options.endpoint, "--rdzv-id", f"{self.options.id}-{generation}"]
        # torchrun would guess from the host's name which node keeps the store
        meet += ["--rdzv-conf", f"is_host={self.host is not None}"]
        return [program, *meet, *rest]

    def _drop(self) -> None:
        if self.child is not None:
            self.child.kill()
        self.child, self.beat.running = None, 0

    def _over(self, order: Order) -> int:
        self._drop()
        if order.code:
            say(order.said)
        if self.wire is not None and self.host is not None:
            until = time.monotonic() + LINGER
            while time.monotonic() < until:
                self._ask()
                time.sleep(PAUSE)
        return order.code


def saved_iteration(folder: str | None) -> int:
    """The iteration of the newest checkpoint in ``folder``, 0 before the first."""
    try:
        return int((Path(folder or ".") / "latest_checkpointed_iteration.txt").read_text()) if folder else 0
    except (OSError, ValueError):
        return 0


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; ends with one sentence where it cannot work."""
    parser = argparse.ArgumentParser(prog="python -m megatron_dynmoe.launch", description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, default=1, help="Nodes that train together.")
    parser.add_argument("--endpoint", help="host:port where they meet; the port after it is used too.")
    parser.add_argument("--id", default="job", help="A word of this job alone, the same on all nodes.")
    parser.add_argument("--save", help="Folder of the checkpoints; a new one there is progress.")
    parser.add_argument("--lost-after", type=float, default=90, help="Seconds without a word that make a node lost.")
    parser.add_argument("--give-up-after", type=float, default=1800, help="Seconds to wait for a lost node or a spare.")
    parser.add_argument("--restarts", type=int, default=3, help="Restarts without a new checkpoint; 0: none.")
    parser.add_argument("command", nargs="+", help="torchrun and its arguments, without those of the rendezvous.")
    options = parser.parse_args(argv)
    if options.nodes > 1:
        host, colon, port = (options.endpoint or "").rpartition(":")
        if not (host and colon and port.isdigit() and int(port) < 65535):
            parser.error(f"--endpoint is {options.endpoint}; accepted: host:port, which --nodes {options.nodes} needs.")
    return options


@one_sentence("launch")
def main(argv: list[str] | None = None) -> int:
    """Supervise until the job is over; 1 with one sentence on stderr where the command cannot be started."""
    options = parse(argv)
    wire, hosting = None, True
    if options.nodes > 1:
        name, _, port = options.endpoint.rpartition(":")
        wire = Wire((name, int(port) + 1), options.id)
        hosting = wire.hosting
    host = None
    if hosting:
        limits = options.lost_after, options.give_up_after, options.restarts
        host = Host(options.nodes, *limits, lambda: saved_iteration(options.save), say)
    node = Node(options, wire, host)
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, node.stop)
    return node.run()


if __name__ == "__main__":
    sys.exit(main())
