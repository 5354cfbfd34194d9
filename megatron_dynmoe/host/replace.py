"""How a thing is replaced, and put back."""

from contextlib import ExitStack
from typing import Any

_INHERITED = object()


def replace(undo: ExitStack, owner: Any, **attributes: Any) -> None:
    """Set attributes of a module or class until ``undo`` is closed."""
    for name, value in attributes.items():
        original = vars(owner).get(name, _INHERITED)
        if original is _INHERITED:
            undo.callback(delattr, owner, name)
        else:
            undo.callback(setattr, owner, name, original)
        setattr(owner, name, value)
