"""What several rooms refuse, and the one form in which a combination that cannot work is refused."""

from __future__ import annotations

from typing import NoReturn

from megatron_dynmoe.config import ConfigError
from megatron_dynmoe.errors import UserError


def refuse(name: str, value: object, reason: str, instead: str) -> NoReturn:
    """Raise a :class:`ConfigError` of one sentence: the flag, its value, why it cannot work, what to do instead."""
    flag = "--" + name.replace("_", "-")
    raise ConfigError(f"{flag} is {value!r}, which a dynamic MoE layer cannot serve: {reason}; {instead}.")


def divisors(number: int) -> list[int]:
    """All of them, from 1 to ``number``."""
    return [value for value in range(1, number + 1) if number % value == 0]


def check_division(
    experts: int, ranks: int, flag: str = "--expert-model-parallel-size", error: type[UserError] = ConfigError
) -> None:
    """Refuse ranks that the experts are not divided evenly over.

    Args:
        flag: what says the number of ranks.
        error: of the room that asks.

    Raises:
        UserError: an ``error`` that names both numbers and the ranks that would do.
    """
    if ranks < 1 or experts % ranks:
        accepted = ", ".join(map(str, divisors(experts)))
        raise error(f"{flag} is {ranks}, which does not divide --num-experts {experts}; accepted: {accepted}.")
