"""Names of gates and rules.  A name is registered once; an unknown one is answered with those there are."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from megatron_dynmoe.config import NAMES

if TYPE_CHECKING:
    from megatron_dynmoe.config import DynMoEConfig


class Gate(Protocol):
    """Hidden states to (logits, scores), both float32 [T, E]."""

    def __call__(self, x_TD: Tensor, weight_ED: Tensor) -> tuple[Tensor, Tensor]: ...


class Rule(Protocol):
    """Scores to the map of chosen experts: float32 [T, E] to bool [T, E]."""

    def __call__(self, scores_TE: Tensor, config: DynMoEConfig) -> Tensor: ...


GATES: dict[str, Gate] = {}
RULES: dict[str, Rule] = {}


def _register[Entry](registry: dict[str, Entry], kind: str, name: str) -> Callable[[Entry], Entry]:
    def add(entry: Entry) -> Entry:
        if name in registry:
            raise ValueError(f"the {kind} {name!r} is registered already; the names taken: {', '.join(registry)}.")
        registry[name] = entry
        if name not in NAMES[kind]:
            NAMES[kind].append(name)
        return entry

    return add


def register_gate(name: str) -> Callable[[Gate], Gate]:
    """Decorator: make a gate known as ``--moe-gate name``. Raises ValueError if the name is taken."""
    return _register(GATES, "gate", name)


def register_rule(name: str) -> Callable[[Rule], Rule]:
    """Decorator: make a rule known as ``--moe-rule name``. Raises ValueError if the name is taken."""
    return _register(RULES, "rule", name)
