"""Commands that end in time, with everything that they started; and files that are never half written."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
import uuid
from pathlib import Path
from typing import Any

# In the environment of a command and so of all its descendants, wherever they were put: marks of this command and of
# those that it is part of, with commas between them.
MARK = "GPU_CHECK_MARKS"


class Ended(RuntimeError):
    """A command was ended at its bound."""


def run(command: list[str], environment: dict[str, str], log: Path, seconds: float, cwd: Path | None = None) -> int:
    """Run a command with its output in ``log``; whatever it started is gone when this returns or raises.

    Raises:
        Ended: it took longer than ``seconds``.
    """
    mark = uuid.uuid4().hex
    deadline = time.monotonic() + seconds
    with log.open("wb") as file:
        marked = environment | {MARK: f"{environment.get(MARK, '')},{mark}"}
        child = subprocess.Popen(command, cwd=cwd, env=marked, stdout=file, stderr=subprocess.STDOUT)
        try:
            return child.wait(timeout=max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise Ended(f"it was ended after {seconds:.0f} seconds{last_line(log)}.") from None
        finally:
            kill_marked(mark)
            child.wait()


def kill_marked(mark: str) -> None:
    """Kill all processes with this mark, which those that left their session or lost their parent still have."""
    deadline = time.monotonic() + 5  # one that the kernel does not let go of must not hold up the others
    while (pids := _marked(mark)) and time.monotonic() < deadline:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def _marked(mark: str) -> list[int]:
    start, found = f"{MARK}=".encode(), []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        with contextlib.suppress(OSError):  # another's, or gone; what has ended and is not yet waited for reads empty
            words = (folder / "environ").read_bytes().split(b"\0")
            if any(word.startswith(start) and mark.encode() in word for word in words):
                found.append(int(folder.name))
    return found


def last_line(log: Path) -> str:
    """The last error line of a log, else its last line, in brackets."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [
        line for line in lines if ("Error" in line and "ChildFailedError" not in line) or line.startswith("error: ")
    ]
    return f" ({(errors or lines)[-1][:300]})" if lines else ""


def write_json(path: Path, value: Any) -> None:
    """Write beside, then replace: never half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".new")
    beside.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(beside, path)
