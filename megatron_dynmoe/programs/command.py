"""What the commands share: the shape of their help, and where the examples lie."""

import signal
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from megatron_dynmoe import __version__
from megatron_dynmoe.plugins import FLAG

_PACKAGE = Path(__file__).resolve().parents[1]


class _WithDefaults(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Line breaks as they are, and each flag's default."""


def command_parser(description: str | None, *, example: str, defaults: bool = False, **options: Any) -> ArgumentParser:
    """A parser with ``--version``, whose help ends with an example.

    Args:
        description: the module's docstring.
        example: command lines, below each other.
        defaults: whether the help of each flag is followed by its default.
        options: argparse's.
    """
    lines = "".join(f"\n  {line}" for line in example.splitlines())
    form = _WithDefaults if defaults else RawDescriptionHelpFormatter
    parser = ArgumentParser(description=description, epilog=f"example:{lines}", formatter_class=form, **options)
    parser.add_argument("--version", action="version", version=f"megatron_dynmoe {__version__}")
    return parser


def add_plugin_flag(parser: ArgumentParser) -> None:
    """``--moe-plugin``, as the training entry has it; hand what is given to :func:`load_plugins`."""
    parser.add_argument(
        FLAG,
        action="extend",
        nargs="+",
        default=[],
        metavar="PACKAGE.MODULE",
        help="import these modules, which register routers; installed plug-ins are found without",
    )


def sigterm_like_ctrl_c(main: Callable[..., int]) -> Callable[..., int]:
    """A program's ``main`` that SIGTERM interrupts as Ctrl-C does, so that it cleans up; then the old handler holds."""

    @wraps(main)
    def interruptible(*args: Any, **kwargs: Any) -> int:
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            return main(*args, **kwargs)
        finally:
            signal.signal(signal.SIGTERM, before)

    return interruptible


def examples() -> Path:
    """The folder of the examples: inside an installed package, beside the package in a checkout."""
    inside = _PACKAGE / "examples"
    return inside if inside.is_dir() else _PACKAGE.parent / "examples"
