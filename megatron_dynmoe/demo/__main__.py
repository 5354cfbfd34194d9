"""``python -m megatron_dynmoe.demo``: run the steps, then say what came of them.

Each step is a command of its own, printed before it runs, so that any of them can be repeated or changed by hand.
"""

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

from megatron_dynmoe.demo.runner import Runner
from megatron_dynmoe.demo.steps import (
    ROUTING,
    DemoError,
    Machine,
    data_steps,
    look_at_machine,
    model_steps,
    shown,
    training_steps,
)
from megatron_dynmoe.demo.summary import sample_of, summarize, table
from megatron_dynmoe.errors import one_sentence
from megatron_dynmoe.programs.command import command_parser

MARK = ".megatron_dynmoe_demo"  # a folder that holds this file is the demo's own, to be emptied


@one_sentence("demo")
def main(argv: list[str] | None = None) -> int:
    """Run the demo; returns 0, 1 after one sentence that says what failed, or 130 after an interruption."""
    example = "dynmoe-demo --output demo --preset moe-plus-plus"
    parser = command_parser(__doc__, example=example, prog="megatron_dynmoe.demo")
    parser.add_argument("--output", type=Path, default=Path("demo"), help="folder for everything (default: demo)")
    parser.add_argument("--continue", dest="go_on", action="store_true", help="do not repeat what was finished before")
    parser.add_argument("--ranks", type=int, help="processes to train with (default: 2, or a GPU each up to 2)")
    parser.add_argument("--preset", choices=list(ROUTING), default=next(iter(ROUTING)), help="published system")
    options = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        demo(options.output.absolute(), go_on=options.go_on, ranks=options.ranks, preset=options.preset)
    except KeyboardInterrupt:
        again = f"python -m megatron_dynmoe.demo --continue --output {options.output}"
        raise KeyboardInterrupt(f"`{again}` goes on from here.") from None
    return 0


def demo(folder: Path, *, go_on: bool = False, ranks: int | None = None, preset: str = "dynamic-moe") -> dict[str, Any]:
    """Run every step in ``folder``, print the table, write and return the summary.

    Raises:
        DemoError: a step failed, or ``folder`` is not the demo's to use.
    """
    start, machine = time.monotonic(), look_at_machine(ranks, preset)
    prepare(folder, go_on=go_on)
    runner = Runner(folder, environment(machine))
    for step in data_steps(folder):
        runner.run(step)
    for step in training_steps(folder, machine, preset) + model_steps(folder):
        log = runner.run(step)
    summary = summarize(folder, sample_of(log.read_text(encoding="utf-8")))
    path = folder / "summary.json"
    beside = path.with_suffix(".new")
    beside.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    os.replace(beside, path)
    print(f"\n{table(summary)}\n\n{time.monotonic() - start:.0f} s in total; the same as JSON: {shown(path)}")
    return summary


def prepare(folder: Path, *, go_on: bool) -> None:
    """Make ``folder``, empty unless ``go_on``.

    Raises:
        DemoError: it holds files that no demo wrote.
    """
    if folder.exists() and not folder.is_dir():
        raise DemoError(f"--output {shown(folder)} is a file; name a folder.")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MARK).exists():
        raise DemoError(f"--output {shown(folder)} holds files of something else; name a new or an empty folder.")
    if folder.is_dir() and not go_on:
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).touch()


def environment(machine: Machine) -> dict[str, str]:
    """This process's environment; the ranks share the cores, and the Python that runs this runs them too."""
    threads = max(1, machine.cores // machine.ranks)
    return {"OMP_NUM_THREADS": str(threads)} | os.environ | {"PYTHONUNBUFFERED": "1"}


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
