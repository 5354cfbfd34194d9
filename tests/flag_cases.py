"""Command lines that no run should be started with, and how they are tried: all in one process, none of them trains."""

from __future__ import annotations

import contextlib
import io
import json
import socket
from pathlib import Path
from typing import Any
from unittest import mock

# One a line; after " -> " what the sentence must contain, "accepted" where Megatron makes sense of it.
CASES = Path(__file__).with_suffix(".txt").read_text(encoding="utf-8")


last_config: Any = None  # of the command line that was accepted last


def cases() -> list[tuple[list[str], str]]:
    """(flags, what the answer must contain)."""
    lines = [line.split(" -> ") for line in CASES.replace("{long}", f"/tmp/{'x' * 300}").strip().splitlines()]
    return [(flags.split(), expected) for flags, expected in lines]


def try_all(base: list[str], answers: str) -> None:
    """Write each case's (exit code, what was said) to the file ``answers``; code 0: accepted.

    Under "cases" in the order of :func:`cases`, under "errors" what is said of exceptions, under "help" of ``--help``.
    """
    tried: dict[str, Any] = {"cases": [attempt([*base, *flags]) for flags, _ in cases()], "errors": said_of_errors()}
    tried["help"] = attempt(["--help"])
    Path(answers).write_text(json.dumps(tried))


def said_of_errors() -> dict[str, tuple[int, str]]:
    """Exceptions as a run meets them, and exit code and stderr of what is said."""
    import torch

    from megatron_dynmoe.training import report_failure
    from megatron_dynmoe.training.failures import describe as describe_error
    from megatron_dynmoe.training.log import MetricsFile

    def unwritable() -> None:
        Path("/proc/nonsense").mkdir()

    def full() -> None:
        with Path("/dev/full").open("w") as file:
            file.write("x")

    def full_metrics() -> None:
        with mock.patch("megatron_dynmoe.training.log.is_last_rank", return_value=True):
            MetricsFile("/dev/full").write({})

    def of_torch() -> None:
        torch.optim.SGD([torch.ones(1, requires_grad=True) * 2], lr=1)

    def connection() -> None:
        socket.create_connection(("127.0.0.1", 1))

    said = {}
    for raising in (unwritable, full, full_metrics, of_torch, connection):
        stderr = io.StringIO()
        with contextlib.redirect_stderr(stderr):
            try:
                raising()
            except Exception as error:
                said[raising.__name__] = (report_failure.say(*describe_error(error)), stderr.getvalue())
    return said


def attempt(argv: list[str]) -> tuple[int, str]:
    """Exit code and stderr of the entry, up to the point where it would start."""
    from megatron.core.num_microbatches_calculator import unset_num_microbatches_calculator
    from megatron.training.global_vars import unset_global_variables

    from megatron_dynmoe.training import report_failure
    from megatron_dynmoe.training.command_line import read_flags
    from megatron_dynmoe.training.failures import describe as describe_error
    from megatron_dynmoe.training.pretrain import pretrain_config

    said, other = io.StringIO(), io.StringIO()
    code: Any = 0
    global last_config
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(other):
        try:
            last_config = pretrain_config(*read_flags(argv)[:2])
        except SystemExit as exit:
            code = exit.code
        except Exception as error:
            code = report_failure.say(*describe_error(error))
        finally:
            unset_global_variables()
            with contextlib.suppress(AttributeError):
                unset_num_microbatches_calculator()
    return code, said.getvalue() + (other.getvalue() if argv == ["--help"] else "")


def describe(base: list[str], options: list[str], folder: str) -> None:
    """Write Megatron's flags to ``folder``: by name their options, and what the entry says to each of ``options``."""
    from argparse import ArgumentParser

    from megatron.training.arguments import add_megatron_arguments

    from megatron_dynmoe.training.refused import REFUSED

    parser = add_megatron_arguments(ArgumentParser(allow_abbrev=False, add_help=False))
    kitchen = {action for group in parser._action_groups if group.title == "kitchen" for action in group._group_actions}
    flags: dict[str, list[str]] = {}
    for action in parser._actions:
        if action not in kitchen:  # of a library that is not Megatron's
            flags.setdefault(action.dest, []).extend(action.option_strings)
    refused = {a.dest: attempt([*base, *given(a)]) for a in parser._actions if set(options) & set(a.option_strings)}
    attempt([*base, "--use-rope-scaling", "--rope-scaling-factor", "4"])
    told = {"rope_scaling_factor": last_config.model.rope_scaling_factor}
    written = {"flags": flags, "refused": refused, "reasons": REFUSED, "told": told}
    Path(folder, "flags.json").write_text(json.dumps(written))


def given(action: Any) -> list[str]:
    """A command line that gives the flag, with another value than its default."""
    option = next(name for name in action.option_strings if name.startswith("--"))
    if action.nargs == 0:
        return [option]
    value = next((str(choice) for choice in action.choices or () if choice != action.default), "7")
    return [option, *[value] * (action.nargs if isinstance(action.nargs, int) else 1)]
