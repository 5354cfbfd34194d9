"""Settings of a method: a small frozen dataclass whose fields know what they accept and how they are said outside.

Every field is a flag of the training entry, ``--moe-`` before its name, with its docstring as help.  A field that
shares one of Megatron's flags (``megatron``) has none of its own, so that the flag keeps its meaning.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable
from typing import Any, get_type_hints

from megatron_dynmoe.errors import ConfigError
from megatron_dynmoe.ranges import Range


def setting(
    default: Any,
    accepts: Range | Iterable[str] | None = None,
    *,
    megatron: str | None = None,
    exported: str | None = None,
) -> Any:
    """A field of a :class:`Settings` dataclass.

    Args:
        default: its value if nobody says another.
        accepts: the numbers, or the names, that it accepts; unset: True and False for a bool, else anything.
        megatron: the attribute of Megatron's ``args`` that is read for it.
        exported: its name in an export's ``config.json``, if that is another one.
    """
    names = accepts if accepts is None or isinstance(accepts, Range) else list(accepts)
    return dataclasses.field(default=default, metadata={"accepts": names, "megatron": megatron, "exported": exported})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Base of the settings of a gate or rule; checks each field when it is made.

    Raises:
        ConfigError: a field's value is not accepted; the sentence names flag, field, value and what is.
    """

    def __post_init__(self) -> None:
        """Check every field, then :meth:`check`."""
        for field in dataclasses.fields(self):
            check_field(type(self).__name__, field, getattr(self, field.name))
        self.check()

    def check(self) -> None:
        """What no single field can say; override, and refuse with :func:`require`."""

    def check_router(self, config: Any) -> None:
        """What the router's other settings must be for these; the same."""


def check_field(owner: str, field: dataclasses.Field, value: Any) -> None:
    """Raise ConfigError if ``value`` is not what the field of class ``owner`` accepts."""
    accepts = field.metadata.get("accepts")
    if isinstance(accepts, Range):
        require(owner, field.name, value, accepts.accepts(value), str(accepts), field)
    elif accepts is not None:
        require(owner, field.name, value, value in accepts, f"one of {', '.join(accepts)}", field)
    elif isinstance(field.default, bool):
        require(owner, field.name, value, isinstance(value, bool), "True or False", field)


def require(
    owner: str, name: str, value: Any, accepted: bool, wanted: str, field: dataclasses.Field | None = None
) -> None:
    """Raise ConfigError unless ``accepted``: ``name`` of class ``owner`` is ``value``, and not what is ``wanted``."""
    if not accepted:
        flag = flag_of_field(field) if field is not None else "--" + f"moe_{name}".replace("_", "-")
        raise ConfigError(f"{flag} ({owner}.{name}) is {value!r}; accepted: {wanted}.")


def typed_fields(kind: type) -> list[dataclasses.Field]:
    """The fields of a dataclass, their types resolved where the module defers annotations."""
    hints = get_type_hints(kind)
    found = [copy.copy(field) for field in dataclasses.fields(kind)]
    for field in found:
        field.type = hints[field.name]
    return found


def dest_of_field(field: dataclasses.Field) -> str:
    """The attribute of Megatron's ``args`` that holds a field."""
    return field.metadata.get("megatron") or f"moe_{field.name}"


def flag_of_field(field: dataclasses.Field) -> str:
    """The command-line flag of a field."""
    return "--" + dest_of_field(field).replace("_", "-")
