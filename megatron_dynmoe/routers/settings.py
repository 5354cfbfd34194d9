"""Settings of a method: a small frozen dataclass whose fields know what they accept and how they are said outside.

Every field is a flag of the training entry, ``--moe-`` before its name, with its docstring as help.  A field that
shares one of Megatron's flags (``megatron``) has none of its own, so that the flag keeps its meaning.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Hashable, Iterable
from functools import cache
from typing import Any, NoReturn, cast, get_type_hints

from megatron_dynmoe.errors import ConfigError
from megatron_dynmoe.ranges import Range

# Under which users set every setting, whichever class holds it: what a refusal names beside the flag.
OWNER = "DynMoEConfig"


def setting(
    default: Any,
    accepts: Range | Iterable[str] | None = None,
    *,
    megatron: str | None = None,
    exported: str | None = None,
    training: bool = False,
    symbol: str | None = None,
) -> Any:
    """A field of a :class:`Settings` dataclass.

    Args:
        default: its value if nobody says another.
        accepts: the numbers, or the names, that it accepts; unset: True and False for a bool, else anything.
        megatron: the attribute of Megatron's ``args`` that is read for it.
        exported: its name in an export's ``config.json``, if that is another one.
        training: it acts while training alone (a loss, a schedule, a bound, a place), so a resumed run may change it.
            The others decide what the model computes: a resumed run that changes one is refused.
        symbol: how papers write it; a setting that has one is named in reports of a model.
    """
    names = accepts if accepts is None or isinstance(accepts, Range) else list(accepts)
    said = {"accepts": names, "megatron": megatron, "exported": exported, "training": training}
    said["symbol"] = symbol
    return dataclasses.field(default=default, metadata=said)


class Checked:
    """A dataclass whose fields are settings."""

    def require(self, name: str, accepted: bool, wanted: str) -> None:
        """Raise ConfigError unless ``accepted``: the field ``name`` has its value, and not what is ``wanted``."""
        if not accepted:
            refuse(next(f for f in typed_fields(type(self)) if f.name == name), getattr(self, name), wanted)

    def check_fields(self) -> None:
        """Raise ConfigError for the first field whose value is not what it accepts."""
        for field in typed_fields(type(self)):
            value, accepts = getattr(self, field.name), field.metadata.get("accepts")
            if isinstance(accepts, Range):
                self.require(field.name, accepts.accepts(value), str(accepts))
            elif accepts is not None:
                self.require(field.name, value in accepts, f"one of {', '.join(accepts)}")
            elif field.type is bool:
                self.require(field.name, isinstance(value, bool), "True or False")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Checked):
    """Base of the settings of a gate or rule; checks each field when it is made.

    Raises:
        ConfigError: a field's value is not accepted; the sentence names flag, field, value and what is.
    """

    def __post_init__(self) -> None:
        """Check every field, then :meth:`check`."""
        self.check_fields()
        self.check()

    def check(self) -> None:
        """What no single field can say; override, and refuse with :meth:`require`."""

    def check_router(self, config: Any) -> None:
        """What the router's other settings must be for these; the same."""

    def check_columns(self, config: Any, experts: int) -> None:
        """What a layer with so many FFN experts must be for these; the same."""


def refuse(field: dataclasses.Field, value: Any, wanted: str) -> NoReturn:
    """Raise ConfigError: the setting of ``field`` is ``value``, and not what is ``wanted``."""
    raise ConfigError(f"{flag_of_field(field)} ({OWNER}.{field.name}) is {value!r}; accepted: {wanted}.")


def typed_fields(kind: type) -> tuple[dataclasses.Field, ...]:
    """The fields of a dataclass, their types resolved where the module defers annotations."""
    return _typed_fields(cast(Hashable, kind))


@cache
def _typed_fields(kind: Any) -> tuple[dataclasses.Field, ...]:
    hints = get_type_hints(kind)
    found = [copy.copy(field) for field in dataclasses.fields(kind)]
    for field in found:
        field.type = hints[field.name]
    return tuple(found)


def dest_of_field(field: dataclasses.Field) -> str:
    """The attribute of Megatron's ``args`` that holds a field."""
    return field.metadata.get("megatron") or f"moe_{field.name}"


def flag_of_field(field: dataclasses.Field) -> str:
    """The command-line flag of a field."""
    return "--" + dest_of_field(field).replace("_", "-")
