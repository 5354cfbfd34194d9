"""From the Hugging Face configuration to megatron's arguments: the inverse of `saved_args`, and held against it."""

from argparse import Namespace
from pathlib import Path
from typing import Any

from megatron_dynmoe.config import DynMoEConfig
from megatron_dynmoe.routers import GATES, RULES
from megatron_dynmoe.routers.registry import methods
from megatron_dynmoe.routers.router_config import all_fields, exported_fields
from megatron_dynmoe.routers.settings import dest_of_field, flag_of_field

from .errors import ExportError, HFImportError
from .saved_args import EXPRESSIBLE, config_fields

# What says nothing of what the model computes: who reads the folder and how, and the tokenizer's ids.
_NEUTRAL = {
    *("architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "use_cache"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "vocab_size", "expert_slots", "experts_by_layer"),
    *("output_hidden_states", "output_attentions", "return_dict", "moved_settings"),
}
# Arguments and their flags, in the order in which they are shown; what `DynMoEConfig` has a field for comes after.
_FLAGS = {
    "num_layers": "--num-layers",
    "hidden_size": "--hidden-size",
    "ffn_hidden_size": "--ffn-hidden-size",
    "num_attention_heads": "--num-attention-heads",
    "kv_channels": "--kv-channels",
    "max_position_embeddings": "--max-position-embeddings",
    "position_embedding_type": "--position-embedding-type",
    "rotary_base": "--rotary-base",
    "normalization": "--normalization",
    "layernorm_epsilon": "--norm-epsilon",
    "init_method_std": "--init-method-std",
    "make_vocab_size_divisible_by": "--make-vocab-size-divisible-by",
    "num_experts": "--num-experts",
    "moe_layer_freq": "--moe-layer-freq",
    "moe_ffn_hidden_size": "--moe-ffn-hidden-size",
    "moe_shared_expert_intermediate_size": "--moe-shared-expert-intermediate-size",
    "moe_shared_expert_gate": "--moe-shared-expert-gate",
    "swiglu": "--swiglu",
    "untie_embeddings_and_output_weights": "--untie-embeddings-and-output-weights",
}


def model_fields(config: dict[str, Any], file: Path) -> dict[str, Any]:
    """The configuration with all defaults.

    Raises:
        HFImportError: no model has it.
    """
    from .configuration_dynmoe import DynMoEHFConfig

    try:
        # An adaptive number of experts is said of itself only by later exports.
        adaptive = {"adaptive_experts": True} if config.get("expert_slots") else {}
        fields = DynMoEHFConfig.from_dict(config | adaptive).to_dict()
    except Exception as error:  # transformers has exceptions of its own for fields of a wrong type
        raise HFImportError(f"{file} makes no model: {' '.join(str(error).split())}") from error
    _check_slots(fields, file)
    return fields


def training_args(fields: dict[str, Any], file: Path, *, divisible_by: int, max_added_experts: int) -> Namespace:
    """The arguments with which megatron would have trained this model, as far as they say what it is.

    Args:
        fields: of :func:`model_fields`.
        file: where they come from.
        divisible_by: `--make-vocab-size-divisible-by` of the training to come.
        max_added_experts: `--moe-max-added-experts`.

    Raises:
        HFImportError: megatron has no arguments for it.
    """
    mixture = any(fields["moe_layers"])
    try:
        found = _model(fields) | (_mixture(fields) | _routing(fields) if mixture else {"num_experts": None})
        args = Namespace(**{name: accepted[0] for name, accepted in EXPRESSIBLE.items()} | found)
        _check_same(fields, config_fields(args), file)
    except (ExportError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, HFImportError):
            raise
        raise HFImportError(f"{file} makes no model that can be trained: {error}") from error
    if fields["expert_slots"] is not None:
        args.moe_max_added_experts = max_added_experts
    args.make_vocab_size_divisible_by = divisible_by
    args.padded_vocab_size = -(-fields["vocab_size"] // divisible_by) * divisible_by
    return args


def model_flags(args: Namespace) -> list[str]:
    """The flags that say the same on megatron's command line; precision, layout, data and optimizer are not theirs."""
    words = ["--disable-bias-linear"]
    if args.num_query_groups != args.num_attention_heads:
        words += ["--group-query-attention", "--num-query-groups", str(args.num_query_groups)]
    for name, flag in _FLAGS.items():
        words += _words(flag, getattr(args, name, None))
    if args.num_experts is None:
        return words
    for field in all_fields(DynMoEConfig):
        value = getattr(args, dest_of_field(field), field.default)
        if value != field.default:
            words += _words(flag_of_field(field), value)
    return words


def _words(flag: str, value: Any) -> list[str]:
    if value is None or value is False:
        return []
    if value is True:
        return [flag]
    return [flag, str(value).replace(" ", "")]


def _model(fields: dict[str, Any]) -> dict[str, Any]:
    heads, groups = fields["num_attention_heads"], fields["num_key_value_heads"]
    positions = fields["max_position_embeddings"]
    return {
        "num_layers": fields["num_hidden_layers"],
        "hidden_size": fields["hidden_size"],
        "ffn_hidden_size": fields["intermediate_size"],
        "num_attention_heads": heads,
        "group_query_attention": groups != heads,
        "num_query_groups": groups,
        "kv_channels": fields["head_dim"],
        "max_position_embeddings": positions,
        "seq_length": positions,
        "layernorm_epsilon": fields["rms_norm_eps"],
        "rotary_base": int(fields["rope_parameters"]["rope_theta"]),  # --rotary-base takes whole numbers
        "untie_embeddings_and_output_weights": not fields["tie_word_embeddings"],
        "init_method_std": fields["initializer_range"],
        "vocab_size": fields["vocab_size"],
        "mtp_num_layers": None,
        # Of the checkpoint itself: layers are named as megatron's own; no optimizer, no generators, no samples seen.
        "transformer_impl": "local",
        "ckpt_format": "torch_dist",
        "no_save_optim": True,
        "no_save_rng": True,
        "consumed_train_samples": 0,
        "consumed_valid_samples": 0,
        "skipped_train_samples": 0,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
    }


def _mixture(fields: dict[str, Any]) -> dict[str, Any]:
    layers, topk = fields["moe_layers"], fields.get("num_experts_per_tok", 2)  # megatron's default
    # Stock megatron normalises by choosing before the softmax, and cannot do so with one expert.
    before = not (fields["router_rule"] == "top-k" and fields["normalize_router_weights"] and topk > 1)
    return {
        "num_experts": fields["num_experts"],
        # A list makes megatron name each layer apart, a number stacks them (TransformerBlock.sharded_state_dict).
        "moe_layer_freq": 1 if all(layers) else list(layers),
        "moe_ffn_hidden_size": fields["moe_intermediate_size"],
        "moe_shared_expert_intermediate_size": fields["shared_expert_intermediate_size"] or None,
        "moe_shared_expert_gate": fields["shared_expert_gate"],
        "moe_router_topk": topk,
        "moe_router_pre_softmax": before,
    }


def _routing(fields: dict[str, Any]) -> dict[str, Any]:
    """What gate and rule are set by, and what every router has."""
    gate, rule = GATES[fields["router_gate"]], RULES[fields["router_rule"]]
    found = {dest_of_field(field): fields[name] for name, field in exported_fields(gate, rule, own=True).items()}
    return found | {"moe_residual": fields["residual_mixture"]}


def _check_same(fields: dict[str, Any], again: dict[str, Any], file: Path) -> None:
    """Hold the model against what an export of the arguments would say of it.

    Raises:
        HFImportError: naming the first field that the arguments cannot say.
    """
    from .configuration_dynmoe import DynMoEHFConfig

    found = DynMoEHFConfig(**again).to_dict()
    # Earlier exports have the settings of all methods; those of the others are not read.
    unread = {name for *_, method in methods() for name in exported_fields(method)} - found.keys()
    for name in sorted((fields.keys() | found.keys()) - _NEUTRAL - unread):
        if fields.get(name) != found.get(name):
            raise HFImportError(
                f"{file} says {name} = {fields.get(name)!r}, which the training cannot express; accepted: "
                f"{found.get(name)!r}."
            )


def _check_slots(fields: dict[str, Any], file: Path) -> None:
    """Raises HFImportError unless `expert_slots` says for each expert which of `num_experts` slots it had."""
    slots, counts = fields["expert_slots"], fields["experts_by_layer"]
    if slots is None and counts is None and not fields.get("adaptive_experts"):
        return
    valid = slots is not None and counts is not None and len(slots) == len(counts) == len(fields["moe_layers"])
    for is_moe, mine, count in zip(fields["moe_layers"], slots or (), counts or (), strict=False):
        inside = all(0 <= slot < fields["num_experts"] for slot in mine)
        valid = valid and len(mine) == count and sorted(set(mine)) == mine and inside and bool(mine) == bool(is_moe)
    if not valid:
        raise HFImportError(
            f"{file} says experts_by_layer {counts!r} and expert_slots {slots!r}; accepted: for each mixture as many "
            f"slots, ascending, of 0 to {fields['num_experts'] - 1}."
        )
