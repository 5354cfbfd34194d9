"""What a dynamic MoE layer is, as one frozen dataclass that knows nothing of Megatron.

Every field is a flag of the training entry: ``top_p`` is ``--moe-top-p``.  A field whose metadata names a flag of
Megatron (``megatron``) has no flag of its own: that flag is read instead, so it keeps its meaning.
Presets name published systems and set several fields at once; what the user sets wins over the preset.
"""

import math
from dataclasses import dataclass, field, fields
from typing import Any, Self

# Names that a field accepts.  routers/registry.py adds those of gates and rules that are registered from elsewhere.
NAMES: dict[str, list[str]] = {
    "gate": ["softmax"],
    "rule": ["top-p", "top-k"],
    "expert_backend": ["auto", "torch", "sequential", "te"],
    "dispatch_unit": ["auto", "expert", "rank"],
}


class ConfigError(ValueError):
    """A value that cannot work; the message names the field, the value and what would be accepted."""


def _megatron(name: str, default: Any) -> Any:
    return field(default=default, metadata={"megatron": name})


@dataclass(frozen=True, kw_only=True)
class DynMoEConfig:
    """The three choices of a router (gate, rule, bounds), its losses, and the expert backend.

    Raises:
        ConfigError: a field is out of range; see :meth:`__post_init__`.
    """

    gate: str = "softmax"
    """Gate: how hidden states become scores. 'softmax': a linear map, then softmax over the experts, in float32."""

    rule: str = "top-p"
    """Rule: which experts a token visits. 'top-p': the smallest set whose probability exceeds --moe-top-p
    (Dynamic MoE); 'top-k': the --moe-router-topk most probable (Switch with 1, GShard with 2)."""

    top_p: float = 0.4
    """Probability mass p in [0, 1] that a token's experts must exceed under rule 'top-p': 0 keeps the best expert
    alone, 1 keeps all of them."""

    topk: int = _megatron("moe_router_topk", 2)
    """Experts per token under rule 'top-k'."""

    max_experts_per_token: int | None = None
    """Upper bound on the experts of one token, under every rule; the most probable stay. Unset: no bound."""

    max_rows: int | None = None
    """Memory guard: upper bound on the routed rows of one layer and micro-batch on each rank. Above it the least
    probable extra assignments are cut; a token's best expert stays, so the bound is never below the token count.
    It holds while training."""

    max_rows_per_token: float | None = None
    """The same bound as a multiple of the rank's token count; with both, the smaller one holds."""

    normalize_weights: bool = False
    """Divide the weights of a token's experts by their sum (GShard). Dynamic MoE and Switch use the raw
    probabilities."""

    load_balance_coeff: float = _megatron("moe_aux_loss_coeff", 0.0)
    """Weight alpha of the load-balance loss."""

    entropy_coeff: float = 0.0
    """Weight beta of the entropy ('dynamic') loss, which keeps a top-p router from flat distributions."""

    z_loss_coeff: float | None = _megatron("moe_z_loss_coeff", None)
    """Weight of the router z-loss; unset: none."""

    input_jitter_eps: float | None = _megatron("moe_input_jitter_eps", None)
    """Multiply the router's input by uniform noise in [1 - eps, 1 + eps] while training; unset: none."""

    expert_backend: str = "auto"
    """Who computes the experts: 'torch' (grouped_mm on ragged groups, CPU and CUDA), 'sequential' (Megatron's loop),
    'te' (Transformer Engine's grouped GEMM, FP8). 'auto': 'te' where the layer spec has it, else 'torch' where it
    can serve, else 'sequential'."""

    dispatch_unit: str = "auto"
    """What a row on the wire is, with the alltoall dispatcher: 'expert', a token crosses once for each expert it
    visits; 'rank', once for each rank that holds such experts; 'auto', whichever moves clearly fewer bytes."""

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ConfigError: on the first value that is not accepted.
        """
        for name, names in NAMES.items():
            self._require(name, getattr(self, name) in names, f"one of {', '.join(names)}")
        self._require("top_p", _is_number(self.top_p) and 0 <= self.top_p <= 1, "a number in [0, 1]")
        self._require("topk", _is_count(self.topk), "a whole number of at least 1")
        cap = self.max_experts_per_token
        self._require("max_experts_per_token", cap is None or _is_count(cap), "a whole number of at least 1, or unset")
        rows, share = self.max_rows, self.max_rows_per_token
        self._require("max_rows", rows is None or _is_count(rows), "a whole number of at least 1, or unset")
        accepted = share is None or (_is_number(share) and share >= 1)
        self._require("max_rows_per_token", accepted, "a number of at least 1, or unset")
        for name in ("load_balance_coeff", "entropy_coeff"):
            value = getattr(self, name)
            self._require(name, _is_number(value) and value >= 0, "a number of at least 0")
        z_loss, jitter = self.z_loss_coeff, self.input_jitter_eps
        self._require("z_loss_coeff", z_loss is None or (_is_number(z_loss) and z_loss >= 0), "a number of at least 0")
        self._require("input_jitter_eps", jitter is None or (_is_number(jitter) and 0 <= jitter < 1), "in [0, 1)")

    def _require(self, name: str, accepted: bool, wanted: str) -> None:
        if not accepted:
            value = getattr(self, name)
            raise ConfigError(f"{flag_of(name)} (DynMoEConfig.{name}) is {value!r}; accepted: {wanted}.")

    @classmethod
    def from_preset(cls, preset: str, **overrides: Any) -> Self:
        """The configuration of a published system, with ``overrides`` on top.

        Raises:
            ConfigError: unknown preset, or a value that is not accepted.
        """
        return cls(**(preset_fields(preset) | overrides))


PRESETS: dict[str, dict[str, Any]] = {
    # Huang et al. 2024, arXiv 2403.07652: p = 0.4, alpha = 1e-2, beta = 1e-4, raw probabilities as weights.
    "dynamic-moe": {"rule": "top-p", "top_p": 0.4, "load_balance_coeff": 1e-2, "entropy_coeff": 1e-4},
    # Fedus et al. 2021, arXiv 2101.03961: one expert, weighted by its probability; alpha = 1e-2.
    "switch": {"rule": "top-k", "topk": 1, "load_balance_coeff": 1e-2},
    # Lepikhin et al. 2020, arXiv 2006.16668: two experts, weights normalised over the pair.
    "gshard": {"rule": "top-k", "topk": 2, "normalize_weights": True, "load_balance_coeff": 1e-2},
}


def preset_fields(preset: str) -> dict[str, Any]:
    """The fields that ``preset`` sets.

    Raises:
        ConfigError: the name is not a preset; the message lists those there are.
    """
    if preset not in PRESETS:
        raise ConfigError(f"--moe-preset is {preset!r}; accepted: one of {', '.join(PRESETS)}.")
    return dict(PRESETS[preset])


def dest_of(name: str) -> str:
    """The attribute of Megatron's ``args`` that holds field ``name`` of :class:`DynMoEConfig`."""
    shared = {f.name: f.metadata.get("megatron") for f in fields(DynMoEConfig)}[name]
    return shared or f"moe_{name}"


def flag_of(name: str) -> str:
    """The command-line flag of field ``name`` of :class:`DynMoEConfig`."""
    return "--" + dest_of(name).replace("_", "-")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
