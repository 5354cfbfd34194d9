"""What a dynamic MoE layer is, as one frozen dataclass that knows nothing of Megatron.

Every field is a flag of the training entry: ``top_p`` is ``--moe-top-p``.  A field whose metadata names a flag of
Megatron (``megatron``) has no flag of its own: that flag is read instead, so it keeps its meaning.
Presets name published systems and set several fields at once; what the user sets wins over the preset.
"""

from dataclasses import dataclass
from typing import Any, Self

from megatron_dynmoe import routers
from megatron_dynmoe.errors import ConfigError
from megatron_dynmoe.ranges import Range
from megatron_dynmoe.routers.fresh import router_parameters
from megatron_dynmoe.routers.registry import PRESETS, fields_of
from megatron_dynmoe.routers.router_config import RouterConfig, all_fields, own_fields
from megatron_dynmoe.routers.settings import dest_of_field, flag_of_field, setting

__all__ = ["PRESETS", "ConfigError", "DynMoEConfig", "dest_of", "flag_of", "preset_fields"]


@dataclass(frozen=True, kw_only=True, init=False)
class DynMoEConfig(RouterConfig):
    """A router (gate, rule, bounds, their settings), and what a layer does beside routing.

    Raises:
        ConfigError: a value that is not accepted; see :class:`RouterConfig`.
    """

    residual: bool = setting(False)
    """Mix the shared expert and the routed experts by a learned softmax over the two, per token (residual MoE)
    instead of adding them; needs --moe-shared-expert-intermediate-size."""

    expert_backend: str = setting("auto", ["auto", "torch", "sequential", "te"], training=True)
    """Who computes the experts: 'torch' (grouped_mm on ragged groups; on a CPU chunk by chunk),
    'sequential' (Megatron's loop), 'te' (Transformer Engine's grouped GEMM, FP8). 'auto': 'te' where the layer spec
    has it, else 'torch' where it can serve, else 'sequential'."""

    fp8_recipe: str = setting("none", ["none", "delayed", "tensorwise", "blockwise", "rowwise"], training=True)
    """FP8 for the GEMMs of the torch experts, without Transformer Engine (docs/fp8.md). What shares a scale: 'delayed'
    and 'tensorwise', each expert's rows and weight, by earlier steps or by themselves; 'blockwise', 1 x 128 of rows
    and 128 x 128 of weights; 'rowwise', a row, which torch has a kernel for on Hopper. A CPU computes all of them by
    casting. Experts in FP8 through Transformer Engine, and mxfp8: --fp8-format and --fp8-recipe."""

    fp8_format: str = setting("auto", ["auto", "hybrid", "e4m3"], training=True)
    """With --moe-fp8-recipe: 'e4m3' everywhere, or 'hybrid' with gradients in e5m2. 'auto': 'hybrid' for 'delayed' and
    'tensorwise', else 'e4m3'."""

    fp8_emulate: bool = setting(False, training=True)
    """With --moe-fp8-recipe on a GPU: cast to FP8 and back and multiply in float32, as on a CPU. Slow, for
    comparisons; it serves every recipe."""

    fp8_margin: int = setting(0, Range(-64, 64, whole=True), megatron="fp8_margin", training=True)
    """With recipe 'delayed': divide the scale by 2 to this power."""

    fp8_amax_history_len: int = setting(
        1, Range(1, 1 << 20, whole=True), megatron="fp8_amax_history_len", training=True
    )
    """With recipe 'delayed': steps whose largest numbers give the scale."""

    fp8_amax_compute_algo: str = setting(
        "most_recent", ["most_recent", "max"], megatron="fp8_amax_compute_algo", training=True
    )
    """With recipe 'delayed': the 'max' of them, or the 'most_recent'."""

    fp8_wgrad: bool = setting(True, megatron="fp8_wgrad", training=True)
    """With --moe-fp8-recipe: the gradient of the weights in FP8, too."""

    dispatch_unit: str = setting("auto", ["auto", "expert", "rank"], training=True)
    """What a row on the wire is, with the alltoall dispatcher: 'expert', a token crosses once for each expert it
    visits; 'rank', once for each rank that holds such experts; 'auto', whichever moves clearly fewer bytes."""

    def parameters_beside(self, experts: int, width: int) -> int:
        """Parameters of one layer's router, mixer and zero-computation experts, without a weight [E, D]."""
        mixer = 2 * (width + 1) if self.residual else 0
        constants = 3 * self.constant_experts * width
        return router_parameters(self, experts, width) - experts * width + mixer + constants

    def check(self) -> None:
        """What no single field can say."""
        super().check()
        for name, unset in (("fp8_format", "auto"), ("fp8_emulate", False)):
            fits = self.fp8_recipe != "none" or getattr(self, name) == unset
            self.require(name, fits, f"{unset!r} without --moe-fp8-recipe")

    @classmethod
    def from_preset(cls, preset: str, **overrides: Any) -> Self:
        """The configuration of a published system, with ``overrides`` on top.

        Raises:
            ConfigError: unknown preset, or a value that is not accepted.
        """
        return cls(**without_unread(preset_fields(preset), overrides))


def preset_fields(preset: str) -> dict[str, Any]:
    """The fields that ``preset`` sets.

    Raises:
        ConfigError: the name is not a preset; the message lists those there are.
    """
    if preset not in PRESETS:
        raise ConfigError(f"--moe-preset is {preset!r}; accepted: one of {', '.join(PRESETS)}.")
    return dict(PRESETS[preset])


def without_unread(preset: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """Both together, without what the preset says to a gate or rule that is overridden."""
    both = preset | overrides
    read = {field.name for field in own_fields(DynMoEConfig)}
    for kind, registry in (("gate", routers.GATES), ("rule", routers.RULES)):
        method = registry.get(both.get(kind, getattr(DynMoEConfig, kind)))
        read |= {field.name for field in fields_of(method)} if method else set()
    return {name: value for name, value in both.items() if name in overrides or name in read}


def dest_of(name: str) -> str:
    """The attribute of Megatron's ``args`` that holds the field or setting ``name``."""
    return dest_of_field({field.name: field for field in all_fields(DynMoEConfig)}[name])


def flag_of(name: str) -> str:
    """The command-line flag of the field or setting ``name``."""
    return flag_of_field({field.name: field for field in all_fields(DynMoEConfig)}[name])
