"""What a resumed run may not change in silence: the arguments that decide what the model computes.

Names are those of megatron's parsed arguments (`--moe-top-p` is `moe_top_p`). An argument that a checkpoint does not
have is from a version without the feature, and is not compared.
"""

import filecmp
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_dynmoe.config import DynMoEConfig
from megatron_dynmoe.routers.registry import fields_of, methods
from megatron_dynmoe.routers.router_config import all_fields
from megatron_dynmoe.routers.settings import dest_of_field

from .errors import CheckpointError

# Megatron's arguments that change the function and leave all shapes as they are.
MODEL = (
    *("position_embedding_type", "rotary_base", "rotary_percent", "rotary_interleaved", "use_rope_scaling"),
    *("rotary_seq_len_interpolation_factor", "no_rope_freq", "normalization", "layernorm_epsilon", "norm_epsilon"),
    *("apply_layernorm_1p", "layernorm_zero_centered_gamma", "apply_residual_connection_post_layernorm"),
    *("swiglu", "squared_relu", "quick_geglu", "openai_gelu", "activation_func_clamp_value", "glu_linear_offset"),
    *("qk_layernorm", "qk_l2_norm", "softmax_type", "window_size", "window_attn_skip_freq", "attention_output_gate"),
    *("apply_query_key_layer_scaling", "experimental_attention_variant", "moe_shared_expert_gate", "moe_latent_size"),
    *("use_mup", "mtp_num_layers"),
)
# Those that change shapes, or how a tensor is divided: no flag makes such a checkpoint load.
SHAPES = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels"),
    *("multi_latent_attention", "add_bias_linear", "add_qkv_bias", "untie_embeddings_and_output_weights"),
    *("num_experts", "moe_layer_freq", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size"),
)
# Of the learning-rate schedule's state (optimizer_param_scheduler.py:341): the flag that says it.
_SCHEDULE = {
    "max_lr": "--lr",
    "min_lr": "--min-lr",
    "lr_warmup_steps": "--lr-warmup-iters (or its fraction or samples)",
    "lr_decay_steps": "--train-iters or --lr-decay-iters (times --global-batch-size)",
    "lr_decay_style": "--lr-decay-style",
    "start_wd": "--weight-decay or --start-weight-decay",
    "end_wd": "--weight-decay or --end-weight-decay",
    "wd_incr_steps": "--train-iters (times --global-batch-size)",
    "wd_incr_style": "--weight-decay-incr-style",
}
# Arguments whose flag has another name: `--disable-bias-linear` stores add_bias_linear.
_FLAGS = {"add_bias_linear": "--disable-bias-linear", "layernorm_epsilon": "--norm-epsilon"}


def routing_arguments() -> list[str]:
    """Of every setting that decides which experts a token visits and what it gets from them."""
    return [dest_of_field(field) for field in all_fields(DynMoEConfig) if not field.metadata.get("training")]


def _readers(name: str) -> set[tuple[str, str]]:
    """("moe_gate" or "moe_rule", its name) of the methods that alone read the argument ``name``; empty: all do."""
    own = ((kind, method, field) for kind, method, traits in methods() for field in fields_of(traits))
    return {(f"moe_{kind}", method) for kind, method, field in own if dest_of_field(field) == name}


def check_function(saved: Namespace, given: Namespace, *, allow: bool) -> list[str]:
    """Hold what the model computes against what it was trained to compute.

    Args:
        saved: the checkpoint's arguments.
        given: this run's, validated.
        allow: routing and other functions may change, shapes may not.

    Returns:
        one sentence for each change that was allowed.

    Raises:
        CheckpointError: naming flag, saved and given value of all differences.
    """
    if shapes := list(_differences(saved, given, SHAPES)):
        raise CheckpointError(f"the checkpoint is of another model: {'; '.join(shapes)}; accepted: the saved values.")
    changed = list(_differences(saved, given, (*routing_arguments(), *MODEL)))
    if changed and not allow:
        raise CheckpointError(
            f"the checkpoint was trained with another function: {'; '.join(changed)}; accepted: the saved values, or "
            "--moe-allow-routing-change."
        )
    return [f"{change} (--moe-allow-routing-change)." for change in changed]


def check_implementation(saved: Namespace, given: Namespace) -> None:
    """Megatron looks for the FP8 state of each layer of Transformer Engine's, which other layers do not save.

    Raises:
        CheckpointError: with the flag under which it goes on without.
    """
    there = [getattr(args, "transformer_impl", "") == "transformer_engine" for args in (saved, given)]
    if there == [False, True] and given.dist_ckpt_strictness not in ("log_all", "ignore_all"):
        raise CheckpointError(
            f"--transformer-impl is 'transformer_engine', the checkpoint was saved by {saved.transformer_impl!r} "
            "and has no FP8 states; accepted: the saved value, or --dist-ckpt-strictness log_all, which starts them "
            "anew and lists all that it did not find."
        )


def check_optimizer(saved: Namespace, given: Namespace, schedule: dict[str, Any], state: dict[str, Any]) -> None:
    """Hold optimizer and schedule against what the checkpoint has the state of.

    Args:
        saved: the checkpoint's arguments.
        given: this run's.
        schedule: of this run, by the names of megatron's OptimizerParamScheduler.
        state: the saved one.

    Raises:
        CheckpointError: naming what differs, and the flags that allow it.
    """
    if changed := list(_differences(saved, given, ("optimizer", "use_distributed_optimizer"))):
        raise CheckpointError(
            f"the checkpoint has the state of another optimizer: {'; '.join(changed)}; accepted: the saved values, or "
            "--no-load-optim."
        )
    if given.override_opt_param_scheduler or given.use_checkpoint_opt_param_scheduler:
        return
    for name, flag in _SCHEDULE.items():
        if name in state and name in schedule and state[name] != schedule[name]:
            raise CheckpointError(
                f"{flag} makes {name} {schedule[name]!r}, the checkpoint's schedule has {state[name]!r}; accepted: the "
                "saved value, --override-opt-param-scheduler (go on with the new schedule) or "
                "--use-checkpoint-opt-param-scheduler (with the saved one)."
            )


def check_vocabulary(saved: Namespace, vocab_size: int) -> None:
    """Hold the tokenizer's size against the rows of the saved embedding, which is padded.

    Raises:
        CheckpointError: with both numbers.
    """
    rows = getattr(saved, "padded_vocab_size", None)
    if not rows:
        return
    step = saved.make_vocab_size_divisible_by * saved.tensor_model_parallel_size
    fewest = rows - step + 1 if getattr(saved, "pad_vocab_size", True) else rows
    if not fewest <= vocab_size <= rows:
        raise CheckpointError(
            f"the tokenizer (--tokenizer-type, --tokenizer-model, --vocab-size) has {vocab_size} tokens, the "
            f"checkpoint was trained with {fewest} to {rows}; accepted: the tokenizer of the training."
        )


def check_tokenizer(saved: Namespace, given: Namespace, *, allow: bool) -> list[str]:
    """Hold the tokenizer's kind and file against the training's; a file may have moved.

    Returns:
        one sentence on what was allowed, or could not be compared.

    Raises:
        CheckpointError: another kind, or a file of other content.
    """
    changed = list(_differences(saved, given, ("tokenizer_type",)))
    old, new = getattr(saved, "tokenizer_model", None), getattr(given, "tokenizer_model", None)
    if not changed and old and new and old != new:
        if not (Path(old).is_file() and Path(new).is_file()):
            return [f"--tokenizer-model is {new}, saved {old}: the two cannot be compared."]
        if not filecmp.cmp(old, new, shallow=False):
            changed = [f"--tokenizer-model is {new}, whose content is another than that of the saved {old}"]
    if changed and not allow:
        raise CheckpointError(
            f"the checkpoint was trained with another tokenizer: {'; '.join(changed)}; accepted: the saved one, or "
            "--moe-allow-routing-change."
        )
    return [f"{change} (--moe-allow-routing-change)." for change in changed]


def _differences(saved: Namespace, given: Namespace, names: Sequence[str]) -> Iterator[str]:
    for name in names:
        readers = _readers(name)
        if readers and not any(
            getattr(args, kind, None) == method for args in (saved, given) for kind, method in readers
        ):
            continue
        if not hasattr(saved, name) or not hasattr(given, name):
            continue
        old, new = (_value(args, name) for args in (saved, given))
        if old != new:
            flag = _FLAGS.get(name, "--" + name.replace("_", "-"))
            yield (
                f"{flag} ({name}) is {new!r}, saved {old!r}" if name in _FLAGS else f"{flag} is {new!r}, saved {old!r}"
            )


def _value(args: Namespace, name: str) -> Any:
    """The value in one form: a frequency as its list, what is unset as megatron reads it."""
    value = getattr(args, name)
    if name == "moe_layer_freq" and isinstance(value, int):
        return [int(layer % value == 0) for layer in range(args.num_layers)]
    if name == "num_query_groups" and not args.group_query_attention:
        return args.num_attention_heads
    if name == "moe_ffn_hidden_size":
        return value or args.ffn_hidden_size
    if name in ("mtp_num_layers", "moe_shared_expert_intermediate_size"):
        return value or None
    return value
