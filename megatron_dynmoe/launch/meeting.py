"""How the supervisors of several nodes agree when to start, when to end and when to start again.

One of them, on the node of the rendezvous endpoint, is the host. The others send it a beat every half second, a
datagram that says what they do, and it answers with what they should do. Datagrams need no connection, so a link that
was cut and comes back needs no repair, and nobody can hang in one.

Each start of torchrun on all nodes is a generation. A generation ends when any of its nodes says so, or is not heard of
for ``lost_after`` seconds; every node ends its torchrun before the next one begins. Nodes beyond the number needed are
spares: they wait, and take the place of one that does not come back.
"""

from __future__ import annotations

import errno
import json
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from megatron_dynmoe.launch.outcome import FINAL

FRESH = 5.0  # seconds for which a beat says that a node is there


@dataclass
class Beat:
    """What a node says: who it is, the generation that it runs (0: none), and how its last one ended."""

    node: str
    name: str
    running: int = 0
    seen: int = 0  # the latest generation it knows of
    ended: int = 0  # the generation that ended here by itself, with ...
    code: int = 0
    said: str = ""


@dataclass
class Order:
    """What a node should do: ``wait``, ``run`` a generation, or ``end`` for good with ``code``."""

    what: str
    generation: int = 0
    code: int = 0
    said: str = ""


@dataclass
class Host:
    """Decides for all nodes; :meth:`hear` takes a beat and returns the order for its node."""

    nodes: int
    lost_after: float
    give_up_after: float
    restarts: int  # without a new checkpoint in between
    saved: Callable[[], int]  # iteration of the newest checkpoint
    tell: Callable[[str], None]
    clock: Callable[[], float] = time.monotonic
    generation: int = 0
    crew: list[str] = field(default_factory=list)
    finished: set[str] = field(default_factory=set)
    final: Order | None = None
    heard: dict[str, tuple[float, Beat]] = field(default_factory=dict)
    began: float | None = None  # gathering since; None while a generation runs
    left: int = -1  # restarts left
    progress: int = -1

    def hear(self, beat: Beat) -> Order:
        """Note ``beat``, look at the clock, and say what its node should do."""
        now = self.clock()
        self.heard[beat.node] = now, beat
        self.generation = max(self.generation, beat.seen)
        if self.final is None:
            if self.crew:
                self._look(beat, now)
            else:
                self._gather(now)
        if self.final is not None:
            return self.final
        return Order("run" if beat.node in self.crew else "wait", self.generation)

    def _gather(self, now: float) -> None:
        self.began = now if self.began is None else self.began
        # those that have ended what they ran; who was first stays first
        ready = [node for node, (at, beat) in self.heard.items() if now - at < FRESH and not beat.running]
        if len(ready) >= self.nodes:
            self.crew, self.began, self.finished = ready[: self.nodes], None, set()
            self.generation += 1
            self.tell(f"generation {self.generation} starts on {', '.join(map(self._name, self.crew))}")
        elif now - self.began > self.give_up_after:
            there = f"{len(ready)} of {self.nodes} nodes are there"
            self.final = Order("end", code=1, said=f"gave up: {there} after {self.give_up_after:.0f} s")

    def _look(self, beat: Beat, now: float) -> None:
        lost = [node for node in self.crew if now - self.heard[node][0] > self.lost_after]
        if lost:
            for node in lost:
                name = self._name(node)
                del self.heard[node]
                self.tell(f"node {name} has not been heard of for {self.lost_after:.0f} s; waiting for it or a spare")
            self.crew = []
        elif beat.node in self.crew and beat.ended == self.generation:
            if beat.code == 0:
                self.finished.add(beat.node)
                if self.finished >= set(self.crew):
                    self.final = Order("end", said="finished")
            else:
                self._failed(beat)

    def _failed(self, beat: Beat) -> None:
        self.crew, said = [], beat.said or f"torchrun ended with exit code {beat.code} on {beat.name}"
        saved = self.saved()
        self.left = self.restarts if saved > self.progress or self.left < 0 else self.left - 1
        self.progress = max(saved, self.progress)
        if beat.code in FINAL:
            self.final = Order("end", code=beat.code, said=said)
        elif self.left <= 0:
            self.final = Order(
                "end", code=1, said=f"{self.restarts} restarts without a new checkpoint; the last: {said}"
            )
        else:
            self.tell(f"{said}; starting again from iteration {saved}")

    def _name(self, node: str) -> str:
        return self.heard[node][1].name


class Wire:
    """Beats and orders as datagrams; one word, the job's id, keeps jobs apart.

    The first supervisor of the machine that ``endpoint`` names takes its port and is the host.
    """

    def __init__(self, endpoint: tuple[str, int], word: str) -> None:
        self.word, self.endpoint, self.hosting = word, endpoint, is_here(endpoint[0])
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.setblocking(False)
        if self.hosting:
            try:
                self.socket.bind(("", endpoint[1]))
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                self.hosting = False

    def send(self, what: Beat | Order, to: tuple[str, int] | None = None) -> None:
        """One datagram; a network that is down is what the other side's clock is for."""
        try:
            self.socket.sendto(json.dumps([self.word, asdict(what)]).encode(), to or self.endpoint)
        except OSError:
            return

    def received(self, kind: type) -> list[tuple[Any, tuple[str, int]]]:
        """What has come in, each with its sender; strangers' datagrams are dropped."""
        found = []
        while True:
            try:
                raw, sender = self.socket.recvfrom(65536)
                word, fields = json.loads(raw)
                if word == self.word:
                    found.append((kind(**fields), sender))
            except BlockingIOError:
                return found
            except (ValueError, TypeError):
                continue
            except OSError:  # an earlier datagram was refused: nobody listens there yet
                continue


def is_here(host: str) -> bool:
    """Whether ``host`` is an address of this machine."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((host, 0))
        except OSError:
            return False
        return True
