"""The run of tests/te beside the ordinary tests, in what they leave of the processors."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from typing import IO

import pytest

from tests.te.start import ROOT, packages_are_missing

# Where a session keeps the run that it has started.
LEG: pytest.StashKey[Leg] = pytest.StashKey()
# A session of as many tests is worth it; of fewer, tests/test_te.py starts the run when it comes to it.
MANY = 200


@dataclass
class Leg:
    """A run of pytest, in a session of its own."""

    process: subprocess.Popen
    log: IO[str]

    def wait(self) -> int:
        """To its end; pytest's exit code."""
        return self.process.wait()

    def output(self) -> str:
        """What it has printed, the end of it."""
        self.log.seek(0)
        return self.log.read()[-25_000:]

    def end(self) -> None:
        """Kill it, with its ranks, if it still runs."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def start(nice: int = 0) -> Leg:
    """Start it."""
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-o", "suite_limit_minutes=40", str(ROOT / "tests" / "te")]
    log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115  (lives as long as the run)
    process = subprocess.Popen(
        ["nice", "-n", str(nice), *command], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )
    return Leg(process, log)


def start_beside(session: pytest.Session) -> None:
    """Start it now if this session will come to it, late and after many others."""
    names = [item.name for item in session.items]
    if "test_transformer_engine_leg" in names and len(names) >= MANY and not packages_are_missing():
        session.config.stash[LEG] = start(nice=19)


def end_with(config: pytest.Config) -> None:
    """Leave nothing behind when a session ends early."""
    if leg := config.stash.get(LEG, None):
        leg.end()
