"""Megatron's flags that this entry cannot act on: refused by name, so that none is ignored in silence."""

from __future__ import annotations

from argparse import Namespace

from megatron_dynmoe.config import ConfigError

# The name under which Megatron's parser keeps a flag -> why it cannot act here, and what to do instead.
REFUSED: dict[str, str] = {}


def check_flags(args: Namespace) -> None:
    """Refuse every flag of :data:`REFUSED` that was given.

    Args:
        args: as Megatron's parser returns them, before anything else has changed them.

    Raises:
        ConfigError: names the flag, its value and what to do instead.
    """
    for name, reason in REFUSED.items():
        value = getattr(args, name, None)
        if value is not None and value is not False and value != []:
            raise ConfigError(f"--{name.replace('_', '-')} is {value!r}, which cannot be honoured: {reason}.")
