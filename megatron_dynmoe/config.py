"""What a dynamic MoE layer is, as one frozen dataclass that knows nothing of Megatron.

Every field is a flag of the training entry: ``top_p`` is ``--moe-top-p``.  A field whose metadata names a flag of
Megatron (``megatron``) has no flag of its own: that flag is read instead, so it keeps its meaning.
Presets name published systems and set several fields at once; what the user sets wins over the preset.
"""

from dataclasses import dataclass, field, fields
from typing import Any, Self

from megatron_dynmoe.errors import UserError
from megatron_dynmoe.presets import PRESETS
from megatron_dynmoe.ranges import RANGES

# Names that a field accepts.  routers/registry.py adds those of gates and rules that are registered from elsewhere.
NAMES: dict[str, list[str]] = {
    "gate": ["softmax", "tanh", "cosine"],
    "rule": ["top-p", "top-k", "top-any"],
    "added_expert_init": ["keep", "fresh", "copy"],
    "expert_backend": ["auto", "torch", "sequential", "te"],
    "dispatch_unit": ["auto", "expert", "rank"],
    "fp8_recipe": ["none", "delayed", "tensorwise", "blockwise", "rowwise"],
    "fp8_format": ["auto", "hybrid", "e4m3"],
    "fp8_amax_compute_algo": ["most_recent", "max"],
}

COEFFICIENTS = ("load_balance_coeff", "entropy_coeff", "diversity_coeff", "simplicity_coeff", "efficiency_coeff")


class ConfigError(UserError):
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
    """Gate: how hidden states become scores, in float32. 'softmax': a linear map, then softmax over the experts;
    'tanh': two linear maps with tanh between, then softmax (the released MoE++); 'cosine': the sigmoid of the scaled
    cosine with each expert's embedding (DynMoE)."""

    rule: str = "top-p"
    """Rule: which experts a token visits. 'top-p': the smallest set whose probability exceeds --moe-top-p
    (Dynamic MoE); 'top-k': the --moe-router-topk most probable (Switch with 1, GShard with 2); 'top-any': all whose
    score passes their own learned threshold, perhaps none (DynMoE; needs gate 'cosine')."""

    top_p: float = 0.4
    """Probability mass p in [0, 1] that a token's experts must exceed under rule 'top-p': 0 keeps the best expert
    alone, 1 keeps all of them."""

    topk: int = _megatron("moe_router_topk", 2)
    """Experts per token under rule 'top-k'."""

    cosine_scale: float = 1.0
    """Scale of cosines and thresholds before the sigmoid, under gate 'cosine'; the initial one if it is trained."""

    train_cosine_scale: bool = False
    """Train that scale."""

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
    """Weight alpha of the load-balance loss; --moe-router-load-balancing-type none turns it off. Under rule 'top-any'
    its gradient goes through the division by a token's number of experts, as in DynMoE's public code."""

    entropy_coeff: float = 0.0
    """Weight beta of the entropy ('dynamic') loss, which keeps a top-p router from flat distributions."""

    diversity_coeff: float = 0.0
    """Weight of the diversity loss, which keeps the embeddings of active experts apart (gate 'cosine')."""

    simplicity_coeff: float = 0.0
    """Weight of the simplicity loss, which keeps the embeddings of active experts short (gate 'cosine')."""

    efficiency_coeff: float = 0.0
    """Weight of the efficiency loss, the share of all (token, expert) pairs that is routed (rule 'top-any')."""

    z_loss_coeff: float | None = _megatron("moe_z_loss_coeff", None)
    """Weight of the router z-loss; unset: none."""

    input_jitter_eps: float | None = _megatron("moe_input_jitter_eps", None)
    """Multiply the router's input by uniform noise in [1 - eps, 1 + eps] while training; unset: none."""

    zero_experts: int = 0
    """Zero experts, E(x) = 0, beside the --num-experts FFN experts (MoE++); any rule chooses among all of them."""

    copy_experts: int = 0
    """Copy experts, E(x) = x."""

    constant_experts: int = 0
    """Constant experts, E(x) = a1 x + a2 v with a learned v and [a1, a2] = softmax(W x)."""

    tau: float = 0.75
    """Weight of zero-computation experts in the load-balance loss and in capacities; a smaller one sends more tokens
    to them."""

    capacity_gamma: float | None = None
    """Capacity factor while training: of a rank's T tokens an FFN expert takes gamma * tau * T / (tau N_FFN + N_ZC), a
    zero-computation expert gamma * T / (tau N_FFN + N_ZC), those with the highest scores. Unset: all of them."""

    gating_residual: bool = False
    """Add a learned map of the previous MoE layer's logits to the logits (MoE++)."""

    logits_norm_std: float | None = None
    """Divide each token's logits by their standard deviation over this one; unset: do not."""

    drop_zero_weight: bool = False
    """Set the weights of zero experts to 0 and normalise the others' (the released MoE++)."""

    expert_input_scale: float = 1.0
    """Multiply the experts' input, not the router's, by this: 2 in the released MoE++."""

    adaptive_experts: bool = False
    """Let the number of experts adapt: --num-experts are slots, those that no token visits are removed, and slots are
    added where tokens visit nobody (DynMoE; needs rule 'top-any')."""

    initial_experts: int | None = None
    """Slots that are active at the start of training, with --moe-adaptive-experts; unset: all."""

    record_from: int = 300
    """Iteration of a period from which routing is recorded; 0 is the first."""

    update_at: int = 600
    """Iteration of a period at whose start experts are removed and added, and the recording ends."""

    update_period: int = 900
    """Iterations from one update to the next; 0: only by hand."""

    max_added_experts: int = 1
    """Experts added in one update at most; DynMoE adds one."""

    added_expert_init: str = "keep"
    """Weights of an added expert: 'keep', what its slot holds (DynMoE); 'fresh', newly initialised; 'copy', those of
    the most similar active expert. With the last two its optimizer state starts again."""

    residual: bool = False
    """Mix the shared expert and the routed experts by a learned softmax over the two, per token (residual MoE)
    instead of adding them; needs --moe-shared-expert-intermediate-size."""

    expert_backend: str = "auto"
    """Who computes the experts: 'torch' (grouped_mm on ragged groups, CPU and CUDA), 'sequential' (Megatron's loop),
    'te' (Transformer Engine's grouped GEMM, FP8). 'auto': 'te' where the layer spec has it, else 'torch' where it
    can serve, else 'sequential'."""

    fp8_recipe: str = "none"
    """FP8 for the GEMMs of the torch experts, without Transformer Engine (docs/fp8.md). What shares a scale: 'delayed'
    and 'tensorwise', each expert's rows and weight, by earlier steps or by themselves; 'blockwise', 1 x 128 of rows
    and 128 x 128 of weights; 'rowwise', a row, which torch has a kernel for on Hopper. A CPU computes all of them by
    casting. Experts in FP8 through Transformer Engine, and mxfp8: --fp8-format and --fp8-recipe."""

    fp8_format: str = "auto"
    """With --moe-fp8-recipe: 'e4m3' everywhere, or 'hybrid' with gradients in e5m2. 'auto': 'hybrid' for 'delayed' and
    'tensorwise', else 'e4m3'."""

    fp8_emulate: bool = False
    """With --moe-fp8-recipe on a GPU: cast to FP8 and back and multiply in float32, as on a CPU. Slow, for
    comparisons; it serves every recipe."""

    fp8_margin: int = _megatron("fp8_margin", 0)
    """With recipe 'delayed': divide the scale by 2 to this power."""

    fp8_amax_history_len: int = _megatron("fp8_amax_history_len", 1)
    """With recipe 'delayed': steps whose largest numbers give the scale."""

    fp8_amax_compute_algo: str = _megatron("fp8_amax_compute_algo", "most_recent")
    """With recipe 'delayed': the 'max' of them, or the 'most_recent'."""

    fp8_wgrad: bool = _megatron("fp8_wgrad", True)
    """With --moe-fp8-recipe: the gradient of the weights in FP8, too."""

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
        for name, numbers in RANGES.items():
            self._require(name, numbers.accepts(getattr(self, name)), str(numbers))
        fits = self.zero_experts > 0 and self.gate != "cosine"
        self._require("drop_zero_weight", fits or not self.drop_zero_weight, "off, or --moe-zero-experts and softmax")
        for name, unset in (("fp8_format", "auto"), ("fp8_emulate", False)):
            fits = self.fp8_recipe != "none" or getattr(self, name) == unset
            self._require(name, fits, f"{unset!r} without --moe-fp8-recipe")
        self._check_cosine()
        self._check_adaptation()

    @property
    def zero_computation_experts(self) -> int:
        """Z, the columns of the router beside those of the FFN experts: constant, copy, zero."""
        return self.constant_experts + self.copy_experts + self.zero_experts

    def _check_cosine(self) -> None:
        cosine = self.gate == "cosine"
        self._require("rule", self.rule != "top-any" or cosine, "another rule, or 'top-any' with --moe-gate cosine")
        for name in ("diversity_coeff", "simplicity_coeff"):
            self._require(name, cosine or not getattr(self, name), "0, or --moe-gate cosine")
        self._require("efficiency_coeff", self.rule == "top-any" or not self.efficiency_coeff, "0, or rule 'top-any'")
        what = "0: the scores of --moe-gate cosine are no probabilities"
        self._require("entropy_coeff", not cosine or not self.entropy_coeff, what)

    def _check_adaptation(self) -> None:
        adaptive, initial = self.adaptive_experts, self.initial_experts
        self._require("adaptive_experts", not adaptive or self.rule == "top-any", "off, or --moe-rule top-any")
        what = "off: slots are not combined with zero-computation experts or gating residuals yet"
        combined = self.zero_computation_experts or self.gating_residual
        self._require("adaptive_experts", not adaptive or not combined, what)
        self._require("initial_experts", initial is None or adaptive, "unset, or --moe-adaptive-experts")
        start, end, period = self.record_from, self.update_at, self.update_period
        if period > 0:
            wanted = (
                f"after --moe-record-from {start}, at most --moe-update-period {period}: else the window never ends"
            )
            self._require("update_at", start < end <= period, wanted)

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
