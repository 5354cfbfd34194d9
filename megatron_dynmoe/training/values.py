"""Numbers that Megatron takes as they are and then divides by, counts with or multiplies weights by."""

from __future__ import annotations

import math
from argparse import Namespace
from importlib.util import find_spec

import torch

from megatron_dynmoe.config import ConfigError
from megatron_dynmoe.mcore.checks import check_balancing
from megatron_dynmoe.ranges import MOST_EXPERTS

# The least that is accepted, where the flag is given.
LEAST = {
    1: """
    num_layers hidden_size ffn_hidden_size num_attention_heads kv_channels seq_length max_position_embeddings seed
    num_experts moe_ffn_hidden_size moe_shared_expert_intermediate_size num_query_groups micro_batch_size
    global_batch_size eval_micro_batch_size eval_global_batch_size train_samples tensor_model_parallel_size
    pipeline_model_parallel_size context_parallel_size expert_model_parallel_size expert_tensor_parallel_size
    num_layers_per_virtual_pipeline_stage num_virtual_stages_per_pipeline_rank make_vocab_size_divisible_by
    vocab_size padded_vocab_size num_distributed_optimizer_instances log_interval eval_interval
    tensorboard_log_interval log_memory_interval save_retain_interval non_persistent_save_interval
    adlr_autoresume_interval save_params_interval save_activations_interval save_tokens_per_expert_interval
    save_wgrads_interval save_dgrads_interval check_weight_hash_across_dp_replicas_interval gpu_sniff_test_interval
    distributed_timeout_minutes distributed_timeout_seconds_after_init dist_ckpt_workers recompute_num_layers
    ddp_num_buckets ddp_bucket_size replication_factor microbatch_group_size_per_vp_stage
    num_dataset_builder_threads loss_scale_window tensorboard_queue_size
    """,
    0: """
    eval_iters train_iters num_workers ckpt_step lr min_lr decoupled_lr decoupled_min_lr lr_warmup_iters
    lr_warmup_samples lr_warmup_init lr_warmup_fraction lr_decay_iters lr_decay_samples lr_wsd_decay_iters
    lr_wsd_decay_samples weight_decay start_weight_decay end_weight_decay clip_grad adam_eps attention_dropout
    hidden_dropout layernorm_epsilon init_method_std embedding_init_method_std rotary_percent rotary_base
    profile_step_start profile_step_end start_eval_at_iter mid_level_dataset_surplus
    decoder_first_pipeline_num_layers decoder_last_pipeline_num_layers moe_z_loss_coeff mtp_loss_scaling_factor
    num_layers_at_start_in_bf16 num_layers_at_end_in_bf16 initial_loss_scale min_loss_scale loss_scale hysteresis
    fim_rate fim_spm_rate save_interval exit_interval exit_duration_in_mins train_sync_interval manual_gc_interval
    mtp_num_layers
    """,
}
# Shares: above 1 they mean nothing, at 1 nothing is left.
_BELOW_ONE = ("attention_dropout", "hidden_dropout", "adam_beta1", "adam_beta2", "lr_warmup_fraction")
_NOT_ZERO = ("rotary_base", "rotary_percent", "layernorm_epsilon", "adam_eps")


def check_values(args: Namespace) -> None:
    """Refuse numbers out of range.

    Raises:
        ConfigError: with the flag, its value, and what would be accepted.
    """
    for least, names in LEAST.items():
        for name in names.split():
            value = getattr(args, name)
            if isinstance(value, (int, float)) and not value >= least:
                _refuse(name, value, f"a number of at least {least}")
    for name, value in vars(args).items():
        if isinstance(value, float) and not math.isfinite(value):
            _refuse(name, value, "a finite number")
    for name in _BELOW_ONE:
        value = getattr(args, name)
        if value is not None and not 0 <= value < 1:
            _refuse(name, value, "a number from 0 to below 1")
    for name in _NOT_ZERO:
        if getattr(args, name) == 0:
            _refuse(name, 0, "a number above 0")
    for name in ("optimizer_offload_fraction", "activation_offload_fraction"):
        if not 0 <= getattr(args, name) <= 1:
            _refuse(name, getattr(args, name), "a number from 0 to 1")
    if args.num_experts is not None and args.num_experts > MOST_EXPERTS:
        _refuse("num_experts", args.num_experts, f"at most {MOST_EXPERTS}")
    if args.num_experts is not None:
        check_balancing(args.moe_router_load_balancing_type)
    _check_layer_freq(args.moe_layer_freq, args.num_layers)
    if args.num_experts is not None and isinstance(args.moe_layer_freq, list) and not any(args.moe_layer_freq):
        _refuse("moe_layer_freq", args.moe_layer_freq, "at least one 1 (MoE) beside --num-experts")
    if args.window_size is not None and len(args.window_size) != 2:
        _refuse("window_size", args.window_size, "two numbers, the tokens seen to the left and to the right, as 128,0")
    if args.group_query_attention and args.num_attention_heads and args.num_attention_heads % args.num_query_groups:
        wanted = f"a divisor of --num-attention-heads {args.num_attention_heads}"
        _refuse("num_query_groups", args.num_query_groups, wanted)
    if args.transformer_impl == "transformer_engine" and find_spec("transformer_engine") is None:
        _refuse("transformer_impl", args.transformer_impl, "'local', as Transformer Engine is not installed")
    for unit in ("iters", "samples"):
        _check_warmup(args, unit)
    check_recipe(args)


def _check_warmup(args: Namespace, unit: str) -> None:
    """Megatron asserts it when the optimizer is made (optimizer_param_scheduler.py:160)."""
    warmup, asked = getattr(args, f"lr_warmup_{unit}"), getattr(args, f"lr_decay_{unit}")
    decay = getattr(args, f"train_{unit}") if asked is None else asked
    if decay and warmup and args.lr_warmup_fraction is None and warmup >= decay:
        flag = f"--train-{unit}" if asked is None else f"--lr-decay-{unit}"
        _refuse(f"lr_warmup_{unit}", warmup, f"a number below {flag} {decay}")


def check_ranks(args: Namespace) -> None:
    """Refuse expert-parallel sizes that the ranks do not divide by; Megatron finds out when groups are made.

    Args:
        args: validated.

    Raises:
        ConfigError: with the sizes and the number of ranks.
    """
    sizes = [args.expert_model_parallel_size, args.expert_tensor_parallel_size, args.pipeline_model_parallel_size]
    if args.world_size % math.prod(sizes):
        ep, etp, pp = sizes
        raise ConfigError(
            f"--expert-model-parallel-size {ep} times --expert-tensor-parallel-size {etp} times "
            f"--pipeline-model-parallel-size {pp} does not divide the world size, {args.world_size}; accepted: sizes "
            "whose product does."
        )


def check_recipe(args: Namespace) -> None:
    """Refuse a recipe that this GPU lacks, which Transformer Engine does in the first step only.

    Raises:
        ConfigError: mxfp8 below capability 10.
    """
    if args.fp8 and args.fp8_recipe == "mxfp8" and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability()
        if capability < (10, 0):
            gpu = ".".join(map(str, capability))
            wanted = (
                f"delayed, tensorwise or blockwise: this GPU's capability is {gpu}, and mxfp8 is for 10.0 (Blackwell)"
            )
            _refuse("fp8_recipe", args.fp8_recipe, wanted)


def _check_layer_freq(freq: int | list[int], layers: int | None) -> None:
    ones = isinstance(freq, list) and all(type(part) is int and part in (0, 1) for part in freq)
    if not ones and not (type(freq) is int and freq >= 1):
        _refuse("moe_layer_freq", freq, "a number of at least 1, or a list of one 0 (dense) or 1 (MoE) a layer")
    if isinstance(freq, list) and layers is not None and len(freq) != layers:
        _refuse("moe_layer_freq", freq, f"a list of as many numbers as --num-layers {layers}")


def _refuse(name: str, value: object, wanted: str) -> None:
    raise ConfigError(f"--{name.replace('_', '-')} is {value!r}; accepted: {wanted}.")
