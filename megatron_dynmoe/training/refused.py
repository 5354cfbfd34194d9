"""Megatron's flags that this entry cannot act on: refused by name, so that none is ignored in silence."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from importlib.util import find_spec

from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

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


# Flags that have another name than what Megatron's parser keeps.
_FLAGS = {"fp8": "--fp8-format", "fp4": "--fp4-format"}


def _local(args: Namespace) -> bool:
    return args.transformer_impl == "local"


def _mask_is_passed_over(args: Namespace) -> bool:
    fused = args.masked_softmax_fusion and (args.bf16 or args.fp16)
    return not _local(args) or fused or not args.create_attention_mask_in_dataloader or args.window_size is not None


def _mtp_on_first_rank(args: Namespace) -> bool:
    layout, size = args.pipeline_model_parallel_layout, args.pipeline_model_parallel_size
    if not args.mtp_num_layers or size < 2:
        return False
    try:
        stages = PipelineParallelLayerLayout(layout, size).layout
    except (AssertionError, ValueError):  # Megatron's own checks say what is wrong with it
        return False
    return any(LayerType.mtp in stage for stage in stages[0])


def _lacks(package: str) -> Callable[[Namespace], bool]:
    return lambda _: find_spec(package) is None


def _stages(args: Namespace) -> bool:
    return args.pipeline_model_parallel_size > 1


def _middle_stages(args: Namespace) -> bool:
    virtual = ("num_layers_per_virtual_pipeline_stage", "num_virtual_stages_per_pipeline_rank")
    interleaved = any(getattr(args, name) for name in (*virtual, "pipeline_model_parallel_layout"))
    return args.pipeline_model_parallel_size > 2 or interleaved


def _without_te(args: Namespace) -> bool:
    return _local(args) or find_spec("transformer_engine") is None


def _no_fp8(args: Namespace) -> bool:
    return not args.fp8 and args.moe_fp8_recipe == "none"


def _no_delayed_fp8(args: Namespace) -> bool:
    """Whether nothing reads what belongs to the delayed recipe."""
    through_te = args.fp8 and args.fp8_recipe == "delayed"
    return not through_te and args.moe_fp8_recipe != "delayed"


_FP8_NEEDS_TE = (
    "it needs Transformer Engine and --transformer-impl transformer_engine; without them --moe-fp8-recipe computes the "
    "experts in FP8, in 'delayed', 'tensorwise', 'blockwise' or 'rowwise'"
)
_NO_DELAYED = "only the recipe 'delayed' reads it; give it with --moe-fp8-recipe delayed, or --fp8-format"
_NEEDS_TE = (
    "the local attention takes whole sequences (dot_product_attention.py); set --transformer-impl transformer_engine"
)
_OUTPUT_LAYER = "Megatron looks for the output layer on every pipeline stage (training.py:2092); use one stage"

# (flag, whether it cannot act beside the others that were given, why and what to do instead)
REFUSED_WITH: list[tuple[str, Callable[[Namespace], bool], str]] = [
    ("fp8", _without_te, _FP8_NEEDS_TE),
    ("fp4", _without_te, _FP8_NEEDS_TE),
    ("fp8_param_gather", _without_te, _FP8_NEEDS_TE + ", with parameters in the model's dtype"),
    (
        "moe_fp8_recipe",
        lambda args: args.moe_fp8_recipe != "none" and not args.num_experts,
        "it is for experts, and the model has none; add --num-experts, or leave it out",
    ),
    ("first_last_layers_bf16", _no_fp8, "no layer is in FP8; add --moe-fp8-recipe, or --fp8-format"),
    ("fp8_margin", lambda args: args.fp8_margin != 0 and _no_delayed_fp8(args), _NO_DELAYED),
    ("fp8_amax_history_len", lambda args: args.fp8_amax_history_len != 1 and _no_delayed_fp8(args), _NO_DELAYED),
    (
        "fp8_amax_compute_algo",
        lambda args: args.fp8_amax_compute_algo != "most_recent" and _no_delayed_fp8(args),
        _NO_DELAYED,
    ),
    ("sft", _local, _NEEDS_TE),
    ("sft", _lacks("datasets"), "Megatron reads conversations with the package datasets, which is missing; install it"),
    ("dataloader_inter_document_masking", _local, _NEEDS_TE),
    ("hybrid_context_parallel", _local, _NEEDS_TE),
    (
        "iterations_to_skip",
        _middle_stages,
        "Megatron reads what it skips on every pipeline stage (training.py:2309), those in the middle have no data; "
        "use at most two stages",
    ),
    ("context_parallel_size", lambda args: args.context_parallel_size > 1 and _local(args), _NEEDS_TE),
    ("logits_load_dir", _stages, _OUTPUT_LAYER),
    ("logits_save_dir", _stages, _OUTPUT_LAYER),
    ("logits_load_dir", _lacks("zstandard"), "the logits are packed with zstandard, which is missing; install it"),
    ("logits_save_dir", _lacks("zstandard"), "the logits are packed with zstandard, which is missing; install it"),
    (
        "logits_load_dir",
        lambda args: not (args.bf16 or args.fp16),
        "in float32 the cross entropy overwrites the logits (cross_entropy.py:42) before they are compared; set --bf16",
    ),
    (
        "reset_attention_mask",
        _mask_is_passed_over,
        "only the local attention reads a mask, unfused, without a window, and where the data loader makes one; "
        "use --dataloader-inter-document-masking with Transformer Engine",
    ),
    (
        "reset_position_ids",
        lambda args: args.position_embedding_type in ("rope", "yarn") and not args.reset_attention_mask,
        "rotary positions do not read them, and count the same only within a document; add --reset-attention-mask",
    ),
    (
        "multiple_validation_sets",
        lambda args: not args.full_validation,
        "Megatron has it for whole sets only (training.py:4578); add --full-validation",
    ),
    (
        "full_validation",
        lambda args: not args.multiple_validation_sets,
        "Megatron fails to evaluate what is no list of sets (training.py:4382); add --multiple-validation-sets, "
        "which takes one set as well",
    ),
    (
        "full_validation",
        lambda args: (args.eval_micro_batch_size or args.micro_batch_size) != 1,
        "it reads one sequence at a time (data_samplers.py:241); set --eval-micro-batch-size 1",
    ),
    (
        "pipeline_model_parallel_layout",
        _mtp_on_first_rank,
        "layers of multi-token prediction on the first pipeline rank would keep an embedding of zeros "
        "(language_module.py:281); put them on a later one",
    ),
]


def check_flags(args: Namespace) -> None:
    """Refuse what was given of :data:`REFUSED`, and of :data:`REFUSED_WITH` beside flags that it clashes with.

    Args:
        args: as Megatron's parser returns them, before anything else has changed them.

    Raises:
        ConfigError: names the flag, its value and what to do instead.
    """
    for name, reason in REFUSED.items():
        _refuse_if(_given(args, name), args, name, reason)
    for name, clashes, reason in REFUSED_WITH:
        _refuse_if(_given(args, name) and clashes(args), args, name, reason)


def _given(args: Namespace, name: str) -> bool:
    value = getattr(args, name, None)
    return value is not None and value is not False and value != []


def _refuse_if(refused: bool, args: Namespace, name: str, reason: str) -> None:
    if refused:
        flag = _FLAGS.get(name) or f"--{name.replace('_', '-')}"
        raise ConfigError(f"{flag} is {getattr(args, name)!r}, which cannot be honoured: {reason}.")
