"""How a step is run: its own process, its whole output in a log, progress on the terminal, one sentence if it fails."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_dynmoe.demo.steps import DemoError, Step, shown

# Longer than the 30 s that torchrun gives its ranks to end before it kills them.
PATIENCE_SECONDS = 45.0


class Runner:
    """Runs steps one after the other and remembers, in ``folder/steps.json``, which are done."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.logs = folder / "logs"
        self.logs.mkdir(parents=True, exist_ok=True)
        self.environment = environment
        self.record = folder / "steps.json"
        self.done: dict[str, list[str]] = json.loads(self.record.read_text()) if self.record.exists() else {}

    def run(self, step: Step) -> Path:
        """Run ``step``, unless the same command has been run here before; returns its log.

        Raises:
            DemoError: the command failed; the message names its log.
        """
        log = self.logs / f"{step.name}.log"
        print(f"\n== {step.says}\n$ {readable(step.command)}", flush=True)
        if self.done.get(step.name) == step.command:
            print("done before, skipped", flush=True)
            return log
        start = time.monotonic()
        for path in step.discards:
            shutil.rmtree(path, ignore_errors=True)
        show = Echo() if step.metrics is None else TrainingBar(step.metrics, step.first_iteration, step.last_iteration)
        try:
            code = self._watch(step.command, log, show)
        finally:
            show.close()
        if code:
            cause = last_error(log.read_text(encoding="utf-8", errors="replace"))
            raise DemoError(f"step {step.name!r} failed with exit code {code}{cause}; its output is in {shown(log)}.")
        self._remember(step)
        print(f"({time.monotonic() - start:.0f} s)", flush=True)
        return log

    def _watch(self, command: list[str], log: Path, show: Callable[[bytes], None]) -> int:
        """Start the command, copy what it says into the log and to ``show``, return its exit status."""
        # In a session of its own, so that Ctrl-C reaches this program alone, which then ends the command in order.
        with (
            log.open("wb") as file,
            subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=self.environment,
                start_new_session=True,
            ) as child,
        ):
            assert child.stdout is not None
            try:
                while chunk := os.read(child.stdout.fileno(), 1 << 16):
                    file.write(chunk)
                    file.flush()
                    show(chunk)
            except BaseException:
                end(child)
                raise
            return child.wait()

    def _remember(self, step: Step) -> None:
        self.done[step.name] = step.command
        beside = self.record.with_suffix(".new")
        beside.write_text(json.dumps(self.done, indent=1))
        os.replace(beside, self.record)


def end(child: subprocess.Popen[bytes]) -> None:
    """Ask a command to end (torchrun passes it on to its ranks); make it if it does not."""
    child.terminate()
    try:
        child.wait(timeout=PATIENCE_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)


def readable(command: list[str]) -> str:
    """The command as a user would type it, this Python's path from the current folder."""
    # absolute(), not resolve(): a venv's python is a link to one that knows nothing of the venv
    return shlex.join([shown(Path(command[0]).absolute()), *command[1:]])


def last_error(text: str) -> str:
    """What a failed command said last of the cause, in brackets: an exception's line, else the last line."""
    # torchrun adds a complaint of its own after the ranks'; it says only that one of them failed
    lines = [line.strip() for line in text.splitlines() if line.strip() and "ChildFailedError" not in line]
    errors = [line for line in lines if re.match(r"(\[?rank\d+\]?:\s*)?[\w.]*(Error|Exception): ", line)]
    if not lines:
        return ""
    cause = re.sub(r"^\[?rank\d+\]?:\s*", "", (errors or lines)[-1]).rstrip(".")
    return f" ({cause[:300]})"


class Echo:
    """Passes a tool's output on, its progress bars included."""

    def __call__(self, chunk: bytes) -> None:
        sys.stdout.write(chunk.decode("utf-8", errors="replace"))
        sys.stdout.flush()

    def close(self) -> None: ...


class TrainingBar:
    """A progress bar over iterations, from the metrics file; megatron's own output is long and goes to the log.

    No bar where there are no iterations: an evaluation alone is quiet.
    """

    def __init__(self, metrics: Path, first: int, last: int) -> None:
        self.metrics = metrics
        # A file of an interrupted run would show progress that this run has not made.
        self.metrics.unlink(missing_ok=True)
        self.bar = tqdm(total=last, initial=first, unit="it", file=sys.stdout, dynamic_ncols=True, disable=last == 0)

    def __call__(self, chunk: bytes) -> None:
        rows = [row for row in read_metrics(self.metrics) if "lm_loss" in row]
        if rows and rows[-1]["iteration"] > self.bar.n and not self.bar.disable:
            self.bar.set_postfix_str(
                f"loss {rows[-1]['lm_loss']:.3f}, {rows[-1]['experts_per_token']:.2f} experts/token, "
                f"{rows[-1]['tokens_per_second']:.0f} tokens/s",
                refresh=False,
            )
            self.bar.update(rows[-1]["iteration"] - self.bar.n)

    def close(self) -> None:
        self(b"")
        self.bar.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file; a last line that is still being written is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines if line]
