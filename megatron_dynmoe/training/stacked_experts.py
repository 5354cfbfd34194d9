"""What the torch experts, two stacked weights and no linear layers of Megatron's, would pass over in silence."""

from __future__ import annotations

from argparse import Namespace

from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_dynmoe.config import ConfigError, DynMoEConfig
from megatron_dynmoe.mcore.experts import why_not_torch

# Optimizers that treat matrices apart from other parameters, by their number of dimensions.
_FOR_MATRICES = ("muon", "dist_muon", "adaptive_muon", "soap")


def check_experts(args: Namespace, config: TransformerConfig, dynmoe: DynMoEConfig) -> None:
    """Refuse what the torch experts would ignore: they are two stacked weights, not linear layers of Megatron's.

    Raises:
        ConfigError: names the flag, its value and what to do instead.
    """
    if not args.num_experts or not _uses_torch_experts(args, config, dynmoe):
        return
    others = "choose other experts with --moe-expert-backend te or sequential"
    if args.optimizer in _FOR_MATRICES:
        reason = "it would train the experts, which are stacked in one weight, as it trains vectors: with Adam"
        raise ConfigError(
            f"--optimizer is {args.optimizer!r}, which the torch experts cannot serve: {reason}; {others}."
        )
    inside = {"expert_fc1", "moe_act", "fused_group_mlp"}
    for name, parts in (
        ("recompute_modules", {"moe_act"} & set(config.recompute_modules or ())),
        ("offload_modules", inside & set(config.offload_modules or ())),
        ("save_activations_interval", args.save_activations_interval),
        ("save_tokens_per_expert_interval", args.save_tokens_per_expert_interval),
    ):
        if parts:
            value = sorted(parts) if isinstance(parts, set) else parts
            reason = "which the torch experts would ignore"
            raise ConfigError(f"--{name.replace('_', '-')} has {value!r}, {reason}; {others}, or leave it out.")


def _uses_torch_experts(args: Namespace, config: TransformerConfig, dynmoe: DynMoEConfig) -> bool:
    if dynmoe.fp8_recipe != "none":
        return True
    if dynmoe.expert_backend != "auto":
        return dynmoe.expert_backend == "torch"
    grouped_te = args.transformer_impl == "transformer_engine" and config.moe_grouped_gemm
    return not grouped_te and why_not_torch(config) is None
