"""Methods of other packages: found as entry points, or named on the command line.

A package that is installed announces its modules in the entry-point group ``megatron_dynmoe.methods``; a module that is
on the path alone is named by ``--moe-plugin PACKAGE.MODULE``.  Importing such a module registers its gates and rules
(:mod:`megatron_dynmoe.routers.registry`); from then on they are methods like the library's own.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable
from functools import cache
from importlib.metadata import EntryPoint, entry_points

from megatron_dynmoe.errors import ConfigError

GROUP = "megatron_dynmoe.methods"
FLAG = "--moe-plugin"


def load_plugins(named: Iterable[str] = ()) -> None:
    """Import the modules of all installed plug-ins, then those that are named; each once.

    An installed plug-in that cannot be imported is said on stderr and left out: this run may not need it, and the name
    of its method is then answered with those there are.

    Raises:
        ConfigError: a named module cannot be imported, or registers what is registered already.
    """
    for entry in entry_points(group=GROUP):
        _load_installed(entry)
    for module in named:
        try:
            importlib.import_module(module)
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise ConfigError(f"{FLAG} is {module!r}, which cannot be imported ({reason}).") from error


@cache
def _load_installed(entry: EntryPoint) -> None:
    try:
        entry.load()
    except Exception as error:
        owner = entry.dist.name if entry.dist is not None else "a package"
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        print(f"megatron_dynmoe: {entry.name} of {owner} ({entry.value}) is left out ({reason}).", file=sys.stderr)


def named_in(argv: list[str]) -> list[str]:
    """The modules that a command line names: ``--moe-plugin A B``, ``--moe-plugin=A``, or the flag several times."""
    found: list[str] = []
    taking = False
    for word in argv:
        if word == FLAG or word.startswith(f"{FLAG}="):
            taking = word == FLAG
            found += [] if taking else [word.split("=", 1)[1]]
        elif word.startswith("-"):
            taking = False
        elif taking:
            found.append(word)
    return found
