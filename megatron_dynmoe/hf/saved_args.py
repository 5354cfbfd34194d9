"""From the arguments that megatron saved in a checkpoint to the fields of the Hugging Face configuration."""

from argparse import Namespace
from dataclasses import Field
from typing import Any

from megatron_dynmoe.routers import GATES, RULES
from megatron_dynmoe.routers.router_config import RouterConfig, exported_fields, own_fields
from megatron_dynmoe.routers.settings import dest_of_field

from .errors import ExportError

# Arguments that change what the model computes, and the values this export can express. An argument that a checkpoint
# does not have is from a version without the feature.
EXPRESSIBLE: dict[str, tuple[Any, ...]] = {
    "normalization": ("RMSNorm",),
    "layernorm_zero_centered_gamma": (False,),
    "swiglu": (True,),
    "activation_func_clamp_value": (None,),
    "glu_linear_offset": (0.0,),
    "add_bias_linear": (False,),
    "add_qkv_bias": (False,),
    "qk_layernorm": (False,),
    "qk_l2_norm": (False,),
    "apply_residual_connection_post_layernorm": (False,),
    "multi_latent_attention": (False,),
    "experimental_attention_variant": (None,),
    "linear_attention_freq": (None,),
    "attention_output_gate": (False,),
    "softmax_type": ("vanilla",),
    "window_size": (None,),
    "position_embedding_type": ("rope",),
    "rotary_percent": (1.0,),
    "rotary_interleaved": (False,),
    "rotary_seq_len_interpolation_factor": (None,),
    "use_rope_scaling": (False,),
    "no_rope_freq": (None,),
    "use_mup": (False,),
    "moe_router_score_function": ("softmax",),
    "moe_router_enable_expert_bias": (False,),
    "moe_router_num_groups": (None,),
    "moe_router_group_topk": (None,),
    "moe_router_topk_scaling_factor": (None, 1.0),
    "moe_apply_probs_on_input": (False,),
    "moe_latent_size": (None,),
    "moe_mlp_glu_interleave_size": (None,),
    "moe_shared_expert_glu_interleave_size": (None,),
}


def config_fields(args: Namespace) -> dict[str, Any]:
    """Fields of `DynMoEHFConfig` from megatron's saved arguments; all but `vocab_size` and the token ids.

    Raises:
        ExportError: an argument is missing, or has a value that the exported model could not express.
    """
    methods = {"moe_gate": tuple(GATES), "moe_rule": tuple(RULES)} if hasattr(args, "moe_rule") else {}
    for name, accepted in (EXPRESSIBLE | methods).items():
        value = getattr(args, name, accepted[0])
        if value not in accepted:
            wanted = " or ".join(repr(v) for v in accepted)
            named = getattr(args, "moe_plugin", None) if name in methods else None
            hint = f" It was trained with --moe-plugin {' '.join(named)}; name it here too." if named else ""
            raise ExportError(
                f"the checkpoint was trained with {name} = {value!r}; the export can express {wanted}.{hint}"
            )
    try:
        _check_counts(args)
        return _attention_fields(args) | _moe_fields(args)
    except AttributeError as error:
        raise ExportError(f"the checkpoint's saved arguments lack {error.name!r}.") from error


def _check_counts(args: Namespace) -> None:
    """Refuse sizes that no model has: they are divided by, or counted up to."""
    names = ["num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads"]
    names += ["num_query_groups"] if args.group_query_attention else []
    names += [name for name in ("kv_channels", "moe_ffn_hidden_size", "num_experts") if getattr(args, name, None)]
    for name in names:
        value = getattr(args, name)
        if type(value) is not int or value < 1:
            raise ExportError(f"the checkpoint's {name} is {value!r}; accepted: a whole number of at least 1.")
    groups = args.num_query_groups if args.group_query_attention else 1
    if args.num_attention_heads % groups:
        raise ExportError(
            f"the checkpoint's num_query_groups {groups} does not divide {args.num_attention_heads} heads."
        )
    freq = getattr(args, "moe_layer_freq", 1)
    layers = type(freq) is list and len(freq) == args.num_layers and set(freq) <= {0, 1}
    if getattr(args, "num_experts", None) and not layers and (type(freq) is not int or freq < 1):
        wanted = f"a whole number of at least 1, or {args.num_layers} of 0 and 1"
        raise ExportError(f"the checkpoint's moe_layer_freq is {freq!r}; accepted: {wanted}.")


def _attention_fields(args: Namespace) -> dict[str, Any]:
    heads = args.num_attention_heads
    return {
        "hidden_size": args.hidden_size,
        "intermediate_size": args.ffn_hidden_size,
        "num_hidden_layers": args.num_layers,
        "num_attention_heads": heads,
        # megatron reads num_query_groups only under --group-query-attention (its default there is 1)
        "num_key_value_heads": args.num_query_groups if args.group_query_attention else heads,
        "head_dim": args.kv_channels or args.hidden_size // heads,
        "max_position_embeddings": args.max_position_embeddings or args.seq_length,
        "rms_norm_eps": args.layernorm_epsilon,
        "rope_parameters": {"rope_type": "default", "rope_theta": float(args.rotary_base)},
        "tie_word_embeddings": not args.untie_embeddings_and_output_weights,
        "initializer_range": args.init_method_std,
    }


def _moe_fields(args: Namespace) -> dict[str, Any]:
    layers, experts = args.num_layers, getattr(args, "num_experts", None)
    if not experts:
        return {"moe_layers": [0] * layers, "num_experts": 1}
    freq = args.moe_layer_freq
    fields = {
        "moe_layers": list(freq) if isinstance(freq, list) else [int(i % freq == 0) for i in range(layers)],
        "num_experts": experts,
        "moe_intermediate_size": args.moe_ffn_hidden_size or args.ffn_hidden_size,
        "shared_expert_intermediate_size": args.moe_shared_expert_intermediate_size or 0,
        "shared_expert_gate": bool(getattr(args, "moe_shared_expert_gate", False)),
    }
    if not hasattr(args, "moe_rule"):
        # Stock megatron: top-k, by default with a softmax over the chosen logits, which is the same as normalising.
        stock = {"router_rule": "top-k", "num_experts_per_tok": args.moe_router_topk}
        return fields | stock | {"normalize_router_weights": not args.moe_router_pre_softmax}
    return fields | {"residual_mixture": bool(getattr(args, "moe_residual", False))} | _routing_fields(args)


def _routing_fields(args: Namespace) -> dict[str, Any]:
    """Gate and rule with their settings, and what every router has; what acts while training alone is left out.

    Older checkpoints lack what every router got later, which stays at its default; a method came with its settings.
    """
    own = {field.name for field in own_fields(RouterConfig)}
    methods = GATES[getattr(args, "moe_gate", RouterConfig.gate)], RULES[args.moe_rule]
    return {
        name: _saved(args, field, came_later=field.name in own or not field.default)
        for name, field in exported_fields(*methods, own=True).items()
    }


def _saved(args: Namespace, field: Field, *, came_later: bool) -> Any:
    dest = dest_of_field(field)
    value = getattr(args, dest, field.default) if came_later else getattr(args, dest)
    if value is None and field.default is not None:
        raise ExportError(f"the checkpoint's saved arguments say moe_rule = {args.moe_rule!r} but no {dest}.")
    kinds: dict[Any, Any] = {bool: bool, int: int, float: float}
    return kinds[field.type](value) if field.type in kinds else value
