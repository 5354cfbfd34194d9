"""What routing reads: gate and rule by name with their settings, bounds, and the experts beside the FFN experts.

Torch and the methods are all it needs: an exported model routes with it too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import Field, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from megatron_dynmoe.ranges import COEFFICIENT, COUNT, EXPERTS, MOST_EXPERTS, SCALE, SMALL, Range
from megatron_dynmoe.routers.controller import Controller
from megatron_dynmoe.routers.registry import GATES, RULES, Gate, Method, Rule, fields_of, methods
from megatron_dynmoe.routers.settings import Checked, ConfigError, Settings, refuse, setting, typed_fields

if TYPE_CHECKING:
    from typing import Self


@dataclass(frozen=True, kw_only=True, init=False)
class RouterConfig(Checked):
    """A router without its weights.

    The settings of gate and rule are given by their names beside the fields below, and are read in the same way:
    ``RouterConfig(rule="top-p", top_p=0.3).top_p``.  A setting of a method that is not chosen reads as its default, and
    must not be set to anything else.

    Raises:
        ConfigError: a value that is not accepted, an unknown method, or a setting that nobody reads.
        TypeError: a name that nothing has.
        ValueError: a method's setting has the name of a field below.
    """

    gate: str = setting("softmax", exported="router_gate")
    """Gate: how hidden states become scores, in float32."""

    rule: str = setting("top-p", exported="router_rule")
    """Rule: which experts a token visits."""

    max_experts_per_token: int | None = setting(None, COUNT._replace(optional=True))
    """Upper bound on the experts of one token, under every rule; the most probable stay. Unset: no bound."""

    max_rows: int | None = setting(None, COUNT._replace(optional=True), training=True)
    """Memory guard: upper bound on the routed rows of one layer and micro-batch on each rank. Above it the least
    probable extra assignments are cut; a token's best expert stays, so the bound is never below the token count.
    It holds while training."""

    max_rows_per_token: float | None = setting(None, Range(1, MOST_EXPERTS, optional=True), training=True)
    """The same bound as a multiple of the rank's token count; with both, the smaller one holds."""

    normalize_weights: bool = setting(False, exported="normalize_router_weights")
    """Divide the weights of a token's experts by their sum (GShard). Dynamic MoE and Switch use the raw
    probabilities."""

    load_balance_coeff: float = setting(0.0, COEFFICIENT, megatron="moe_aux_loss_coeff", training=True)
    """Weight alpha of the load-balance loss; --moe-router-load-balancing-type none turns it off."""

    z_loss_coeff: float | None = setting(
        None, COEFFICIENT._replace(optional=True), megatron="moe_z_loss_coeff", training=True
    )
    """Weight of the router z-loss; unset: none."""

    input_jitter_eps: float | None = setting(
        None, Range(0, 1, open="most", optional=True), megatron="moe_input_jitter_eps", training=True
    )
    """Multiply the router's input by uniform noise in [1 - eps, 1 + eps] while training; unset: none."""

    zero_experts: int = setting(0, EXPERTS)
    """Zero experts, E(x) = 0, beside the --num-experts FFN experts (MoE++); any rule chooses among all of them."""

    copy_experts: int = setting(0, EXPERTS)
    """Copy experts, E(x) = x."""

    constant_experts: int = setting(0, EXPERTS)
    """Constant experts, E(x) = a1 x + a2 v with a learned v and [a1, a2] = softmax(W x)."""

    tau: float = setting(0.75, Range(SMALL, 1), training=True)
    """Weight of zero-computation experts in the load-balance loss and in capacities; a smaller one sends more tokens
    to them."""

    capacity_gamma: float | None = setting(None, SCALE._replace(optional=True), training=True)
    """Capacity factor while training: of a rank's T tokens an FFN expert takes gamma * tau * T / (tau N_FFN + N_ZC), a
    zero-computation expert gamma * T / (tau N_FFN + N_ZC), those with the highest scores. Unset: all of them."""

    gating_residual: bool = setting(False)
    """Add a learned map of the previous MoE layer's logits to the logits (MoE++)."""

    logits_norm_std: float | None = setting(None, SCALE._replace(optional=True))
    """Divide each token's logits by their standard deviation over this one; unset: do not."""

    drop_zero_weight: bool = setting(False)
    """Set the weights of zero experts to 0 and normalise the others' (the released MoE++)."""

    expert_input_scale: float = setting(1.0, SCALE)
    """Multiply the experts' input, not the router's, by this: 2 in the released MoE++."""

    settings: tuple[Settings, ...] = ()
    """Those of gate and rule."""

    def __init__(self, **values: Any) -> None:
        given = dict.fromkeys(values.pop("settings", ()))
        for field in own_fields(type(self)):
            object.__setattr__(self, field.name, values.pop(field.name, field.default))
        for kind, registry in (("gate", GATES), ("rule", RULES)):
            name = getattr(self, kind)
            self.require(kind, isinstance(name, str) and name in registry, f"one of {', '.join(registry)}")
        object.__setattr__(self, "settings", tuple(self._chosen(values, given)))
        _refuse_the_others(self, values)
        self.check_fields()
        self.check()

    def _chosen(self, values: dict[str, Any], given: Mapping[Settings, None]) -> Iterator[Settings]:
        """Settings of gate and rule: of ``given`` where they fit, with what ``values`` says on top; it is taken out."""
        before = {type(settings): settings for settings in given}
        for kind in dict.fromkeys(m.settings for m in self.methods if m.settings is not None):
            if taken := {field.name for field in fields(kind)} & self.__dict__.keys():
                raise ValueError(f"{kind.__name__} has a setting {min(taken)!r}, which every router has already.")
            said = {field.name: values.pop(field.name) for field in fields(kind) if field.name in values}
            yield replace(before[kind], **said) if kind in before else kind(**said)

    @property
    def methods(self) -> tuple[Gate, Rule]:
        """Gate and rule."""
        return GATES[self.gate], RULES[self.rule]

    @property
    def controllers(self) -> list[type[Controller]]:
        """Those of gate and rule that this configuration wants."""
        kinds = (method.controller for method in self.methods)
        return [kind for kind in dict.fromkeys(kinds) if kind is not None and kind.wanted(self)]

    @property
    def moving(self) -> set[str]:
        """Names of settings that a controller moves."""
        return {name for kind in self.controllers for name in kind.sets}

    @property
    def zero_computation_experts(self) -> int:
        """Z, the columns of the router beside those of the FFN experts: constant, copy, zero."""
        return self.constant_experts + self.copy_experts + self.zero_experts

    def check(self) -> None:
        """What no single field can say."""
        for settings in self.settings:
            settings.check_router(self)
        gates = RULES[self.rule].gates
        wanted = f"another rule, or {self.rule!r} with --moe-gate {' or '.join(gates)}"
        self.require("rule", not gates or self.gate in gates, wanted)
        fits = self.zero_experts > 0 and GATES[self.gate].probabilities
        wanted = "off, or --moe-zero-experts and a gate whose scores are probabilities"
        self.require("drop_zero_weight", fits or not self.drop_zero_weight, wanted)

    def check_columns(self, experts: int) -> None:
        """What gate and rule want of a layer with so many FFN experts.

        Raises:
            ConfigError: a setting that these experts cannot serve.
        """
        for settings in self.settings:
            settings.check_columns(self, experts)

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("_"):
            for settings in self.__dict__.get("settings", ()):
                if name in settings.__dataclass_fields__:
                    return getattr(settings, name)
            for _, _, method in methods():
                for field in fields_of(method):
                    if field.name == name:
                        return field.default
        raise AttributeError(f"{type(self).__name__!r} has no field or setting {name!r}.")

    def moved(self, values: Mapping[str, float]) -> Self:
        """The same with settings as controllers have moved them; unchecked, so that a step may pass a bound."""
        if not values:
            return self
        parts = []
        for settings in self.settings:
            part = object.__new__(type(settings))
            part.__dict__.update(settings.__dict__ | {n: v for n, v in values.items() if n in settings.__dict__})
            parts.append(part)
        whole = object.__new__(type(self))
        own = {n: v for n, v in values.items() if n in self.__dict__}
        whole.__dict__.update(self.__dict__ | own | {"settings": tuple(parts)})
        return whole


def own_fields(kind: type[RouterConfig]) -> list[Field]:
    """The fields of the configuration itself, without those of methods."""
    return [field for field in typed_fields(kind) if field.name != "settings"]


def all_fields(kind: type[RouterConfig]) -> list[Field]:
    """The fields of the configuration and of every registered method, each name once."""
    found = {field.name: field for field in own_fields(kind)}
    for _, _, method in methods():
        found |= {field.name: field for field in fields_of(method) if field.name not in found}
    return list(found.values())


def exported_fields(*chosen: Method, own: bool = False) -> dict[str, Field]:
    """What an export is set by, by the names of its ``config.json``; what acts while training alone is not in it.

    Args:
        chosen: gate and rule.
        own: the fields of the configuration, too.
    """
    found = [*(own_fields(RouterConfig) if own else ()), *(field for method in chosen for field in fields_of(method))]
    return {f.metadata["exported"] or f.name: f for f in found if not f.metadata["training"]}


def _refuse_the_others(config: RouterConfig, values: dict[str, Any]) -> None:
    """What is left of ``values`` belongs to methods that are not chosen, where it may only be the default."""
    for name, value in values.items():
        readers = [(kind, method, f) for kind, method, m in methods() for f in fields_of(m) if f.name == name]
        if not readers:
            raise TypeError(f"{type(config).__name__} got an unexpected keyword argument {name!r}")
        # A flag of Megatron's own has other readers.
        if value != readers[0][2].default and not readers[0][2].metadata.get("megatron"):
            who = " or ".join(f"--moe-{kind} {method}" for kind, method, _ in readers)
            wanted = f"{readers[0][2].default!r}, or {who}, which reads it (gate {config.gate!r}, rule {config.rule!r})"
            refuse(readers[0][2], value, wanted)


__all__ = ["ConfigError", "RouterConfig", "all_fields", "exported_fields", "own_fields"]
