"""Methods by name: gates and rules, with everything that is their own.

The simplest gate is a function of ``(x_TD, weight_ED)``, the simplest rule one of ``(scores_TE, config)``.  One that
has settings, learns, has losses of its own or moves between steps says so when it registers.  A name is taken once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import Field, dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor

from megatron_dynmoe.routers.controller import Controller
from megatron_dynmoe.routers.settings import Settings, typed_fields

if TYPE_CHECKING:
    from megatron_dynmoe.losses import Totals
    from megatron_dynmoe.routers.router_config import RouterConfig
    from megatron_dynmoe.routers.routing import Routing

# (config, columns, width) -> further parameters by name: their initial values, float32 and the same on every rank, or
# their shape, to be filled as the model's weights are.
Parameters = Callable[["RouterConfig", int, int], dict[str, Any]]
NONE: Mapping[str, Tensor] = MappingProxyType({})
Function = TypeVar("Function", bound=Callable)  # this file runs beside exported weights, with Python 3.10 too


def softmax_over_experts(logits_TE: Tensor) -> Tensor:
    """Probabilities: each row sums to one."""
    return logits_TE.softmax(dim=-1)


@dataclass(frozen=True)
class Routed:
    """What a loss may read of one micro-batch on this rank.

    Attributes:
        routing: of this rank's tokens; padding chooses nobody.
        config: settings as they stand, moved ones included.
        totals: counts over the ranks that share the micro-batch.
        weight_CD: the router's weight.
        parameters: what gate and rule learn beside it.
        active_E: bool; ``None``: all experts are active.
    """

    routing: Routing
    config: RouterConfig
    totals: Totals
    weight_CD: Tensor
    parameters: Mapping[str, Tensor] = NONE
    active_E: Tensor | None = None


@dataclass(frozen=True)
class Loss:
    """An auxiliary loss.

    Attributes:
        name: under which it is logged.
        coefficient: name of the setting that weighs it; 0 or ``None`` there turns it off.
        function: :class:`Routed` to a float32 scalar, this rank's share of the micro-batch's loss.
    """

    name: str
    coefficient: str
    function: Callable[[Routed], Tensor]


@dataclass(frozen=True, kw_only=True)
class Method:
    """What gates and rules have in common.

    Attributes:
        settings: its settings, if it has some.
        parameters: what it learns beside the router's weight.
        losses: its own, in the place of one that every router has where the name is the same.
        controller: what moves between steps.
        log: ``(config, parameters, active_E)`` to tensors on the device: scalars are logged as means over layers, and
            by layer in the metrics file; vectors there alone.
    """

    settings: type[Settings] | None = None
    parameters: Parameters | None = None
    losses: tuple[Loss, ...] = ()
    controller: type[Controller] | None = None
    log: Callable[[RouterConfig, Mapping[str, Tensor], Tensor | None], dict[str, Tensor]] | None = None

    function: Callable[..., Tensor]

    @property
    def about(self) -> str:
        """The first line of the function's docstring, which stands in ``--help``."""
        return (self.function.__doc__ or "").strip().partition("\n")[0]


@dataclass(frozen=True, kw_only=True)
class Gate(Method):
    """Hidden states to logits, and logits to scores, all float32 [T, E].

    Attributes:
        function: ``(x_TD, weight_ED)`` to logits; with ``parameters`` also ``(..., config, parameters)``.
        scores: logits to scores; softmax over the experts if not said otherwise.
        probabilities: a token's scores sum to one.
        weight_shape: (experts, width) to the shape of the weight, if that is not [E, D].
        init_weight: fills the weight in place; unset: the model's own initialisation.
        keep_float32: the router's parameters stay float32 in a model of another dtype.
    """

    scores: Callable[[Tensor], Tensor] = softmax_over_experts
    probabilities: bool = True
    weight_shape: Callable[[int, int], tuple[int, int]] | None = None
    init_weight: Callable[[Tensor], Any] | None = None
    keep_float32: bool = False

    def logits(
        self, x_TD: Tensor, weight_ED: Tensor, config: RouterConfig, parameters: Mapping[str, Tensor] = NONE
    ) -> Tensor:
        """Logits of each token."""
        if self.parameters is None:
            return self.function(x_TD, weight_ED)
        return self.function(x_TD, weight_ED, config, parameters)


@dataclass(frozen=True, kw_only=True)
class Rule(Method):
    """Scores to the map of chosen experts: float32 [T, E] to bool [T, E].

    Attributes:
        function: ``(scores_TE, config)``; with ``parameters`` also ``(..., parameters)``.
        weights: ``(scores_TE, map_TE, config, parameters)`` to the weights [T, E], 0 where not chosen; unset: the
            chosen scores.
        may_be_empty: a token may choose nobody.  While training its output is then 0; in evaluation it visits the
            expert with the highest score.
        gates: names of the gates that it works with; empty: all.
        most: the most columns that a token can choose, of the configuration; unset: all there are.
    """

    weights: Callable[..., Tensor] | None = None
    may_be_empty: bool = False
    gates: tuple[str, ...] = ()
    most: Callable[[RouterConfig], int] | None = None

    def __call__(self, scores_TE: Tensor, config: RouterConfig, parameters: Mapping[str, Tensor] = NONE) -> Tensor:
        """The map of chosen experts."""
        if self.parameters is None:
            return self.function(scores_TE, config)
        return self.function(scores_TE, config, parameters)


GATES: dict[str, Gate] = {}
RULES: dict[str, Rule] = {}
PRESETS: dict[str, dict[str, Any]] = {}


def methods() -> Iterator[tuple[str, str, Method]]:
    """All gates, then all rules: ("gate" or "rule", name, method)."""
    for kind, registry in (("gate", GATES), ("rule", RULES)):
        yield from ((kind, name, method) for name, method in registry.items())


def register_gate(name: str, **traits: Any) -> Callable[[Function], Function]:
    """Decorator: make a gate known as ``--moe-gate name``; ``traits`` are fields of :class:`Gate`.

    Raises ValueError if the name is taken, or one of its settings means something else elsewhere.
    """

    def add(function: Function) -> Function:
        _enter(GATES, "gate", name, Gate(function=function, **traits))
        return function

    return add


def register_rule(name: str, **traits: Any) -> Callable[[Function], Function]:
    """Decorator: make a rule known as ``--moe-rule name``; ``traits`` are fields of :class:`Rule`.

    Raises ValueError if the name is taken, or one of its settings means something else elsewhere.
    """

    def add(function: Function) -> Function:
        _enter(RULES, "rule", name, Rule(function=function, **traits))
        return function

    return add


def register_preset(name: str, fields: dict[str, Any]) -> None:
    """Make the settings of a published system known as ``--moe-preset name``; they stand in the file of its method.

    Raises ValueError if the name is taken.
    """
    if name in PRESETS:
        raise ValueError(f"the preset {name!r} is registered already; the names taken: {', '.join(PRESETS)}.")
    PRESETS[name] = fields


def _enter(registry: dict[str, Any], kind: str, name: str, method: Method) -> None:
    if name in registry:
        raise ValueError(f"the {kind} {name!r} is registered already; the names taken: {', '.join(registry)}.")
    known = {field.name: field for _, _, other in methods() for field in fields_of(other)}
    for field in fields_of(method):
        other = known.get(field.name, field)
        if (field.default, dict(field.metadata)) != (other.default, dict(other.metadata)):
            raise ValueError(f"the {kind} {name!r} has a setting {field.name!r}, which another method has differently.")
    registry[name] = method


def fields_of(method: Method) -> tuple[Field, ...]:
    """The dataclass fields of a method's settings."""
    return () if method.settings is None else typed_fields(method.settings)
