"""Names of gates and rules.  A name is registered once; an unknown one is answered with those there are.

The simplest gate is a function of ``(x_TD, weight_ED)``, the simplest rule one of ``(scores_TE, config)``.  One that
learns more than the router's weight says so when it registers, and is then given those parameters as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from torch import Tensor

from megatron_dynmoe.config import NAMES

if TYPE_CHECKING:
    from megatron_dynmoe.config import DynMoEConfig

# (config, experts, width) -> further parameters by name: their initial values, float32 and the same on every rank, or
# their shape, to be filled as the model's weights are.
Parameters = Callable[["DynMoEConfig", int, int], dict[str, Any]]
NONE: Mapping[str, Tensor] = MappingProxyType({})


def softmax_over_experts(logits_TE: Tensor) -> Tensor:
    """Probabilities: each row sums to one."""
    return logits_TE.softmax(dim=-1)


@dataclass(frozen=True)
class Gate:
    """Hidden states to logits, and logits to scores, all float32 [T, E].

    Attributes:
        function: ``(x_TD, weight_ED)`` to logits; with ``parameters`` also ``(..., config, parameters)``.
        scores: logits to scores; softmax over the experts if not said otherwise.
        parameters: what it learns beside the weight.
        weight_shape: (experts, width) to the shape of the weight, if that is not [E, D].
        init_weight: fills the weight in place; unset: the model's own initialisation.
        keep_float32: the router's parameters stay float32 in a model of another dtype.
    """

    function: Callable[..., Tensor]
    scores: Callable[[Tensor], Tensor] = softmax_over_experts
    parameters: Parameters | None = None
    weight_shape: Callable[[int, int], tuple[int, int]] | None = None
    init_weight: Callable[[Tensor], Any] | None = None
    keep_float32: bool = False

    def logits(
        self, x_TD: Tensor, weight_ED: Tensor, config: DynMoEConfig, parameters: Mapping[str, Tensor] = NONE
    ) -> Tensor:
        """Logits of each token."""
        if self.parameters is None:
            return self.function(x_TD, weight_ED)
        return self.function(x_TD, weight_ED, config, parameters)


@dataclass(frozen=True)
class Rule:
    """Scores to the map of chosen experts: float32 [T, E] to bool [T, E].

    Attributes:
        function: ``(scores_TE, config)``; with ``parameters`` also ``(..., parameters)``.
        parameters: what it learns.
        weights: ``(scores_TE, map_TE, config, parameters)`` to the weights [T, E], 0 where not chosen; unset: the
            chosen scores.  With it, the load-balance loss reads these weights in the place of the scores.
        may_be_empty: a token may choose nobody.  While training its output is then 0; in evaluation it visits the
            expert with the highest score.
    """

    function: Callable[..., Tensor]
    parameters: Parameters | None = None
    weights: Callable[..., Tensor] | None = None
    may_be_empty: bool = False

    def __call__(self, scores_TE: Tensor, config: DynMoEConfig, parameters: Mapping[str, Tensor] = NONE) -> Tensor:
        """The map of chosen experts."""
        if self.parameters is None:
            return self.function(scores_TE, config)
        return self.function(scores_TE, config, parameters)


GATES: dict[str, Gate] = {}
RULES: dict[str, Rule] = {}


def register_gate[Function: Callable](name: str, **traits: Any) -> Callable[[Function], Function]:
    """Decorator: make a gate known as ``--moe-gate name``; ``traits`` are fields of :class:`Gate`.

    Raises ValueError if the name is taken.
    """

    def add(function: Function) -> Function:
        _enter(GATES, "gate", name, Gate(function, **traits))
        return function

    return add


def register_rule[Function: Callable](name: str, **traits: Any) -> Callable[[Function], Function]:
    """Decorator: make a rule known as ``--moe-rule name``; ``traits`` are fields of :class:`Rule`.

    Raises ValueError if the name is taken.
    """

    def add(function: Function) -> Function:
        _enter(RULES, "rule", name, Rule(function, **traits))
        return function

    return add


def _enter[Entry](registry: dict[str, Entry], kind: str, name: str, entry: Entry) -> None:
    if name in registry:
        raise ValueError(f"the {kind} {name!r} is registered already; the names taken: {', '.join(registry)}.")
    registry[name] = entry
    if name not in NAMES[kind]:
        NAMES[kind].append(name)
