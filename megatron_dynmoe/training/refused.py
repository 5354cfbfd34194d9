"""Megatron's flags that this entry cannot act on: refused by name, so that none is ignored in silence."""

from __future__ import annotations

from argparse import Namespace

from megatron_dynmoe.config import ConfigError

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


def check_flags(args: Namespace) -> None:
    """Refuse every flag of :data:`REFUSED` that was given.

    Args:
        args: as Megatron's parser returns them, before anything else has changed them.

    Raises:
        ConfigError: names the flag, its value and what to do instead.
    """
    for name, reason in REFUSED.items():
        value = getattr(args, name, None)
        if value is not None and value is not False and value != []:
            raise ConfigError(f"--{name.replace('_', '-')} is {value!r}, which cannot be honoured: {reason}.")
