"""Megatron's flags that this entry cannot act on: refused by name, so that none is ignored in silence."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from functools import cache

from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.arguments import add_megatron_arguments

from megatron_dynmoe.config import ConfigError, DynMoEConfig
from megatron_dynmoe.mcore.experts import why_not_torch

# The name under which Megatron's parser keeps a flag -> why it cannot act here, and what to do instead.
REFUSED: dict[str, str] = {
    "moe_routing_trace_path": "the trace looks for routers of stock top-k (router_trace.py) and would stay empty; "
    "--moe-metrics-file writes what each layer routed",
    "spec": "layers are Megatron's own choice for the other flags, made dynamic; for a layer spec of your own call "
    "megatron_dynmoe.dynamic_layer_spec in Python",
    "yaml_cfg": "the flags of dynamic MoE have no place in Megatron's YAML; give flags",
    "heterogeneous_layers_config_path": "Megatron builds heterogeneous layers without experts only; train such a model "
    "with Megatron's own entry",
    "heterogeneous_layers_config_encoded_json": "Megatron builds heterogeneous layers without experts only; train such "
    "a model with Megatron's own entry",
    "hybrid_layer_pattern": "it describes a hybrid Mamba model, and this entry trains GPT; leave it out",
    "hybrid_override_pattern": "it describes a hybrid Mamba model, and this entry trains GPT; leave it out",
    "mtp_hybrid_override_pattern": "it describes a hybrid Mamba model, and this entry trains GPT; leave it out",
    "is_hybrid_model": "this entry trains GPT; leave it out",
    "moe_use_upcycling": "upcycling copies dense weights into the stock router and experts; start from scratch",
    "perform_rl_step": "reinforcement learning is in Megatron's repository, not in its package; leave it out",
    "vision_pretraining": "this entry trains language models; leave it out",
    "inprocess_restart": "the entry is not restarted within its process; use torchrun --max-restarts",
    "apply_residual_connection_post_layernorm": "nothing in megatron-core reads it; leave it out",
    "openai_gelu": "nothing in megatron-core reads it; leave it out",
    "onnx_safe": "nothing in megatron-core reads it; leave it out",
    "rampup_batch_size": "megatron.training 0.19.2 no longer reads it; use --step-batch-size-schedule",
    "exit_signal_handler_for_dataloader": "nothing in megatron.training reads it; --exit-signal-handler is always on",
    "dist_ckpt_save_pre_mcore_014": "nothing in megatron.training reads it; checkpoints have today's format",
    "enable_full_sharding_in_hsdp": "nothing in megatron reads it; choose --outer-dp-sharding-strategy",
}

# Optimizers that treat matrices apart from other parameters, by their number of dimensions.
_FOR_MATRICES = ("muon", "dist_muon", "adaptive_muon", "soap")


def check_flags(args: Namespace) -> None:
    """Refuse every flag of :data:`REFUSED` that was given.

    Args:
        args: as Megatron's parser returns them, before anything else has changed them.

    Raises:
        ConfigError: names the flag, its value and what to do instead.
    """
    for name, reason in REFUSED.items():
        value = getattr(args, name, None)
        if value != _defaults().get_default(name) and value not in (None, False, []):
            raise ConfigError(f"--{name.replace('_', '-')} is {value!r}, which cannot be honoured: {reason}.")


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
    if dynmoe.expert_backend != "auto":
        return dynmoe.expert_backend == "torch"
    grouped_te = args.transformer_impl == "transformer_engine" and config.moe_grouped_gemm
    return not grouped_te and why_not_torch(config) is None


@cache
def _defaults() -> ArgumentParser:
    return add_megatron_arguments(ArgumentParser(allow_abbrev=False))
