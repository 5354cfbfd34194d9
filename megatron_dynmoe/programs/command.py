"""What the commands share: the shape of their help, and where the examples lie."""

from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any

from megatron_dynmoe import __version__

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


def examples() -> Path:
    """The folder of the examples: inside an installed package, beside the package in a checkout."""
    inside = _PACKAGE / "examples"
    return inside if inside.is_dir() else _PACKAGE.parent / "examples"
