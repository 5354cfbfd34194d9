"""A model from Megatron's flags: on a command line, in a file of flags, or as JSON of their names.

What the flags of a model leave open, and training takes from elsewhere, a file says in a comment for the plan alone:
``# For the plan: --vocab-size 32000 --mean-k 1.76``.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import shlex
from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from pathlib import Path
from typing import Any, get_args

from megatron_dynmoe.config import ConfigError, DynMoEConfig, dest_of, flag_of
from megatron_dynmoe.planning.shapes import Model, PlanError, require
from megatron_dynmoe.routers.router_config import all_fields

# Those of Megatron's flags that say what memory, rows or time depend on; names and defaults are Megatron's.
_NUMBERS = {
    "num_layers": None,
    "hidden_size": None,
    "num_attention_heads": None,
    "kv_channels": None,
    "num_query_groups": 1,
    "ffn_hidden_size": None,
    "moe_ffn_hidden_size": None,
    "num_experts": None,
    "moe_shared_expert_intermediate_size": 0,
    "mtp_num_layers": 0,
    "vocab_size": None,
    "make_vocab_size_divisible_by": 128,
    "seq_length": None,
    "micro_batch_size": None,
    "global_batch_size": None,
    "num_layers_at_start_in_bf16": 1,
    "num_layers_at_end_in_bf16": 1,
}
_SWITCHES = (
    "group_query_attention",
    "swiglu",
    "untie_embeddings_and_output_weights",
    "bf16",
    "fp16",
    "use_distributed_optimizer",
    "moe_permute_fusion",
    "qk_layernorm",
    "fp8_param_gather",
    "first_last_layers_bf16",
)
# How the script of a run lays it out.
LAYOUT = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size")
_COMMENT = re.compile(r"^# For the plan: (.*)$", re.MULTILINE)
_REQUIRED = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "num_experts",
    "vocab_size",
    "seq_length",
    "micro_batch_size",
    "global_batch_size",
)


def add_model_flags(parser: ArgumentParser) -> None:
    """Add the flags of a model, named as Megatron's."""
    group = parser.add_argument_group("model, with the names and defaults of Megatron's flags")
    for name, default in _NUMBERS.items():
        group.add_argument(_flag(name), type=int, default=default)
    for name in _SWITCHES:
        group.add_argument(_flag(name), action="store_true")
    group.add_argument("--moe-layer-freq", default="1")
    group.add_argument("--recompute-granularity", choices=("full", "selective"), default=None)
    group.add_argument("--init-method-std", type=float, default=0.02)
    group.add_argument("--transformer-impl", default="transformer_engine")
    group.add_argument("--fp8-format", choices=("e4m3", "hybrid"), default=None)
    for name in LAYOUT:
        group.add_argument(_flag(name), type=int, default=None)
    group.add_argument("--moe-preset", default=None)
    for entry in all_fields(DynMoEConfig):  # unset, the preset's value holds
        kind = (get_args(entry.type) or (entry.type,))[0]  # of `int | None`, int
        reading: dict[str, Any] = {"action": BooleanOptionalAction} if kind is bool else {"type": kind}
        group.add_argument(flag_of(entry.name), dest=dest_of(entry.name), default=None, **reading)
    trained = parser.add_argument_group("routing")
    trained.add_argument("--mean-k", type=float, help="mean experts per token of the trained model")


def read_flags(path: Path) -> Namespace:
    """The flags that a file says: Megatron's flags as on a command line (# starts a comment), or a JSON object of
    their names, as in a checkpoint's ``args``; flags that do not matter here are passed over.

    Raises:
        PlanError: the file cannot be read, or a value is not accepted.
    """
    try:
        text = path.read_text(encoding="utf-8")
        words = _words_of_json(json.loads(text)) if path.suffix == ".json" else words_of(text)
    except (OSError, ValueError) as error:
        raise PlanError(f"{path} cannot be read as flags ({error}); give Megatron's flags or a .json object.") from None
    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False, add_help=False)
    add_model_flags(parser)
    try:
        return parser.parse_known_args(words)[0]
    except argparse.ArgumentError as error:
        raise PlanError(f"{path}: {error}.") from None


def words_of(text: str) -> list[str]:
    """The flags of a model file, those for the plan first."""
    return [*shlex.split(" ".join(_COMMENT.findall(text))), *shlex.split(text, comments=True)]


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _words_of_json(values: Any) -> list[str]:
    if not isinstance(values, dict):
        raise ValueError("it is not a JSON object")
    words = []
    for name, value in values.items():
        if isinstance(value, bool):
            words += [_flag(name)] if value else [_flag("no_" + name)]  # passed over where there is no such flag
        elif name == "moe_aux_loss_coeff" and isinstance(value, list):
            words += [_flag(name), str(value[0])]  # Megatron keeps one value a balancing type
        elif value is not None:
            words += [_flag(name), str(value)]
    return words


def model_of(args: Namespace) -> Model:
    """The model that the parsed flags describe.

    Raises:
        PlanError: a flag is missing or its value not accepted.
    """
    missing = [_flag(name) for name in _REQUIRED if getattr(args, name) is None]
    if missing:
        raise PlanError(f"the model lacks {', '.join(missing)}; give them, or a file with them as --model.")
    for name in ("num_layers", "hidden_size", "num_attention_heads", "num_experts"):
        require(getattr(args, name) >= 1, _flag(name), getattr(args, name), "at least 1")
    require(not args.mtp_num_layers, "--mtp-num-layers", args.mtp_num_layers, "0, as the plan has no place for them")
    ffn = args.ffn_hidden_size  # the defaults are those of megatron/training/arguments.py
    if ffn is None:
        ffn = int(4 * args.hidden_size * 2 / 3 / 64) * 64 if args.swiglu else 4 * args.hidden_size
    if args.hidden_size % args.num_attention_heads and args.kv_channels is None:
        heads = args.num_attention_heads
        raise PlanError(f"--hidden-size is {args.hidden_size}; accepted: a multiple of the {heads} heads.")
    routing = _routing(args)
    sizes = Namespace(**vars(args))
    sizes.ffn_hidden_size, sizes.moe_layer_freq = ffn, moe_layers(args.moe_layer_freq, args.num_layers)
    return Model.from_args(
        sizes,
        vocabulary=args.vocab_size,
        vocabulary_multiple=args.make_vocab_size_divisible_by,
        router_extra=routing.parameters_beside(args.num_experts, args.hidden_size),
        sequence=args.seq_length,
        micro_batch=args.micro_batch_size,
        global_batch=args.global_batch_size,
        itemsize=2 if args.bf16 or args.fp16 else 4,
        recompute=args.recompute_granularity == "full",
        routing=routing,
        init_std=args.init_method_std,
        fused=args.moe_permute_fusion,
        torch_kernels=args.transformer_impl == "local",
        fp8=args.fp8_format is not None,
        wide_ends=(args.num_layers_at_start_in_bf16, args.num_layers_at_end_in_bf16)
        if args.first_last_layers_bf16
        else (0, 0),
        fp8_weights=args.fp8_param_gather,
    )


def _routing(args: Namespace) -> DynMoEConfig:
    given = {entry.name: getattr(args, dest_of(entry.name)) for entry in all_fields(DynMoEConfig)}
    try:
        said = {name: value for name, value in given.items() if value is not None}
        return DynMoEConfig.from_preset(args.moe_preset, **said) if args.moe_preset else DynMoEConfig(**said)
    except ConfigError as error:
        raise PlanError(str(error)) from None


def moe_layers(frequency: str, layers: int) -> tuple[bool, ...]:
    """Which layers have experts: every n-th, beginning with the first, or a pattern such as ``[0]+[1]*23``.

    Raises:
        PlanError: neither, or a pattern of another length.
    """
    try:
        value = _evaluate(ast.parse(str(frequency), mode="eval").body)
    except (ValueError, SyntaxError, TypeError):
        value = None
    if isinstance(value, int) and value >= 1:
        return tuple(index % value == 0 for index in range(layers))
    if not isinstance(value, list) or not all(entry in (0, 1) for entry in value) or len(value) != layers:
        wanted = f"a whole number of at least 1, or a pattern of {layers} zeros and ones such as [0]+[1]*{layers - 1}"
        raise PlanError(f"--moe-layer-freq is {frequency!r}; accepted: {wanted}.")
    return tuple(bool(entry) for entry in value)


def _evaluate(node: ast.expr) -> Any:
    """Numbers, lists, + and *: what Megatron accepts as a pattern, without running it as Python."""
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value
    if isinstance(node, ast.List):
        return [_evaluate(entry) for entry in node.elts]
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Mult)):
        left, right = _evaluate(node.left), _evaluate(node.right)
        if isinstance(node.op, ast.Add):
            return left + right
        if max(value for value in (left, right, 0) if isinstance(value, int)) > 10_000:
            raise ValueError("a pattern of that length")
        return left * right
    raise ValueError("not a pattern")
