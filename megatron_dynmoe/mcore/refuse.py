"""The one form in which a combination that cannot work is refused."""

from __future__ import annotations

from typing import NoReturn

from megatron_dynmoe.config import ConfigError


def refuse(name: str, value: object, reason: str, instead: str) -> NoReturn:
    """Raise a :class:`ConfigError` of one sentence: the flag, its value, why it cannot work, what to do instead."""
    flag = "--" + name.replace("_", "-")
    raise ConfigError(f"{flag} is {value!r}, which a dynamic MoE layer cannot serve: {reason}; {instead}.")
