"""From megatron's arguments and keys to the Hugging Face configuration and names.

Shape letters: `V` vocabulary rows, `D` hidden size, `F` width of a feed-forward network, `E` experts, `H` head size.
Keys of a transformer layer come in two forms: stacked over layers (`decoder.layers.mlp.router.weight` [layers, E, D])
when all layers are alike, one key per layer (`decoder.layers.3.mlp.router.weight` [E, D]) when they are not
(megatron-core 0.19, `TransformerBlock.sharded_state_dict`).
"""

from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .checkpoint import DistCheckpoint, ExportError

# Arguments that change what the model computes, and the values this export can express. An argument that a checkpoint
# does not have is from a version without the feature.
_EXPRESSIBLE: dict[str, tuple[Any, ...]] = {
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
    "mtp_num_layers": (None, 0),
    "use_mup": (False,),
    "moe_gate": ("softmax",),
    "moe_rule": ("top-p", "top-k"),
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
    for name, accepted in _EXPRESSIBLE.items():
        value = getattr(args, name, accepted[0])
        if value not in accepted:
            wanted = " or ".join(repr(v) for v in accepted)
            raise ExportError(f"the checkpoint was trained with {name} = {value!r}; the export can express {wanted}.")
    try:
        return _attention_fields(args) | _moe_fields(args)
    except AttributeError as error:
        raise ExportError(f"the checkpoint's saved arguments lack {error.name!r}.") from error


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
        "num_experts_per_tok": args.moe_router_topk,
    }
    if not hasattr(args, "moe_rule"):
        # Stock megatron: top-k, by default with a softmax over the chosen logits, which is the same as normalising.
        return fields | {"router_rule": "top-k", "normalize_router_weights": not args.moe_router_pre_softmax}
    if args.moe_rule == "top-p" and args.moe_top_p is None:
        raise ExportError("the checkpoint's saved arguments say moe_rule = 'top-p' but no moe_top_p.")
    return fields | {
        "router_rule": args.moe_rule,
        "top_p_threshold": float(args.moe_top_p or 0.0),
        "max_experts_per_token": args.moe_max_experts_per_token,
        "normalize_router_weights": bool(args.moe_normalize_weights),
    }


@dataclass(frozen=True)
class Piece:
    """One read: `read(key, index)` of the checkpoint, turned by `convert` into named tensors of the exported model."""

    key: str
    index: tuple[int, ...]
    convert: Callable[[Tensor], dict[str, Tensor]]


def plan(checkpoint: DistCheckpoint, fields: dict[str, Any], vocab_size: int) -> list[Piece]:
    """All reads that make the exported model, in the order of its layers; shapes are checked, nothing is read.

    Args:
        fields: of :func:`config_fields`.
        vocab_size: rows of the embedding to keep; the checkpoint pads them.

    Raises:
        ExportError: a key is missing or has not the shape that the arguments say, or a weight is left over.
    """
    keys = _Keys(checkpoint)
    width, rows = fields["hidden_size"], partial(_cut, rows=vocab_size)
    vocabulary = (None, width)
    pieces = [keys.piece("embedding.word_embeddings.weight", vocabulary, rows("model.embed_tokens.weight"))]
    for layer in range(fields["num_hidden_layers"]):
        pieces += _layer(keys, layer, fields)
    pieces.append(keys.piece("decoder.final_layernorm.weight", (width,), _name("model.norm.weight")))
    if not fields["tie_word_embeddings"]:
        pieces.append(keys.piece("output_layer.weight", vocabulary, rows("lm_head.weight")))
    keys.check_all_used(pieces)
    return pieces


def _layer(keys: "_Keys", layer: int, fields: dict[str, Any]) -> Iterator[Piece]:
    width, head = fields["hidden_size"], fields["head_dim"]
    heads, groups = fields["num_attention_heads"], fields["num_key_value_heads"]
    hf = f"model.layers.{layer}"
    get = partial(keys.layer_piece, layer)
    # Transformer Engine fuses a norm into the linear layer after it, and stores it there.
    fused = "self_attention.linear_qkv.layer_norm_weight"
    yield get(["input_layernorm.weight", fused], (width,), _name(f"{hf}.input_layernorm.weight"))
    split = partial(_split_qkv, f"{hf}.self_attn", groups=groups, head=head)
    yield get(["self_attention.linear_qkv.weight"], ((heads + 2 * groups) * head, width), split)
    yield get(["self_attention.linear_proj.weight"], (width, heads * head), _name(f"{hf}.self_attn.o_proj.weight"))
    fused = "mlp.linear_fc1.layer_norm_weight"
    yield get(["pre_mlp_layernorm.weight", fused], (width,), _name(f"{hf}.post_attention_layernorm.weight"))
    if not fields["moe_layers"][layer]:
        yield from _mlp(get, "mlp", f"{hf}.mlp", (), width, fields["intermediate_size"])
        return
    experts, shared = (fields["num_experts"],), fields["shared_expert_intermediate_size"]
    yield get(["mlp.router.weight"], (*experts, width), _name(f"{hf}.mlp.router.weight"))
    yield from _mlp(get, "mlp.experts.experts", f"{hf}.mlp.experts", experts, width, fields["moe_intermediate_size"])
    if shared:
        yield from _mlp(get, "mlp.shared_experts", f"{hf}.mlp.shared_expert", (), width, shared)
        if fields["shared_expert_gate"]:
            yield get(["mlp.shared_experts.gate_weight"], (1, width), _name(f"{hf}.mlp.shared_expert_gate.weight"))


def _mlp(get, megatron: str, hf: str, experts: tuple[int, ...], width: int, ffn: int) -> Iterator[Piece]:
    """A SwiGLU network, or [E] of them: fc1 holds the gate's rows, then those of the upward projection."""
    yield get([f"{megatron}.linear_fc1.weight"], (*experts, 2 * ffn, width), partial(_split_gate_up, hf))
    yield get([f"{megatron}.linear_fc2.weight"], (*experts, width, ffn), partial(_down, hf))


class _Keys:
    """Finds the model's keys in a checkpoint in either form, checks their shapes, and remembers which were used."""

    def __init__(self, checkpoint: DistCheckpoint):
        self.path, self.shapes, self.layers = checkpoint.path, checkpoint.shapes, checkpoint.args.num_layers

    def piece(self, key: str, shape: tuple[int | None, ...], convert: Callable) -> Piece:
        return self._checked(key, (), self.shapes.get(key), shape, convert)

    def layer_piece(self, layer: int, names: list[str], shape: tuple[int | None, ...], convert: Callable) -> Piece:
        """The first of `names` that the checkpoint has for `layer`."""
        for name in names:
            own, stacked = f"decoder.layers.{layer}.{name}", f"decoder.layers.{name}"
            if own in self.shapes:
                return self._checked(own, (), self.shapes[own], shape, convert)
            if stacked in self.shapes:
                first, *rest = self.shapes[stacked]
                if first != self.layers:
                    raise ExportError(
                        f"{stacked!r} in {self.path} has {first} layers, the arguments say {self.layers}."
                    )
                return self._checked(stacked, (layer,), tuple(rest), shape, convert)
        return self._checked(f"decoder.layers.{layer}.{' or '.join(names)}", (), None, shape, convert)

    def _checked(self, key, index, found, shape, convert) -> Piece:
        if found is None:
            raise ExportError(f"{self.path} has no tensor {key}, which a model with its arguments must have.")
        if len(found) != len(shape) or any(want not in (None, have) for want, have in zip(shape, found, strict=True)):
            wanted = "x".join("?" if n is None else str(n) for n in shape)
            raise ExportError(f"{key!r} in {self.path} is {'x'.join(map(str, found))}, the arguments say {wanted}.")
        return Piece(key, index, convert)

    def check_all_used(self, pieces: list[Piece]) -> None:
        """A weight that no piece reads belongs to a feature that the exported model lacks."""
        used = {piece.key for piece in pieces}
        model = [key for key in self.shapes if key.split(".")[0] in ("embedding", "decoder", "output_layer", "mtp")]
        if left := sorted(set(model) - used):
            raise ExportError(f"the export knows no place for {', '.join(left[:5])} ({len(left)} in {self.path}).")


def _name(name: str) -> Callable[[Tensor], dict[str, Tensor]]:
    return lambda tensor: {name: tensor}


def _cut(name: str, *, rows: int) -> Callable[[Tensor], dict[str, Tensor]]:
    return lambda tensor: {name: tensor[:rows]}


def _split_qkv(attention: str, mixed: Tensor, *, groups: int, head: int) -> dict[str, Tensor]:
    """De-interleaves [(heads + 2 groups) * H, D]: a group is its query heads, then a key head, then a value head."""
    per_group = mixed.reshape(groups, -1, head, mixed.shape[-1])
    query, key, value = per_group.split([per_group.shape[1] - 2, 1, 1], dim=1)
    parts = {"q_proj": query, "k_proj": key, "v_proj": value}
    return {f"{attention}.{name}.weight": part.reshape(-1, mixed.shape[-1]) for name, part in parts.items()}


def _split_gate_up(mlp: str, fc1: Tensor) -> dict[str, Tensor]:
    gate, up = fc1.chunk(2, dim=-2)
    return _per_expert(mlp, "gate_proj", gate) | _per_expert(mlp, "up_proj", up)


def _down(mlp: str, fc2: Tensor) -> dict[str, Tensor]:
    return _per_expert(mlp, "down_proj", fc2)


def _per_expert(mlp: str, name: str, weight: Tensor) -> dict[str, Tensor]:
    if weight.dim() == 2:
        return {f"{mlp}.{name}.weight": weight}
    return {f"{mlp}.{e}.{name}.weight": one for e, one in enumerate(weight)}


def stored_dtype(checkpoint: DistCheckpoint, pieces: list[Piece]) -> torch.dtype:
    """The dtype of the model's weights, that of most of its pieces (a router may be float32 in a bfloat16 model).

    Raises:
        ExportError: a weight is stored in something else than float32, bfloat16 or float16.
    """
    dtypes = [checkpoint.dtype(piece.key) for piece in pieces]
    for piece, dtype in zip(pieces, dtypes, strict=True):
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ExportError(f"{piece.key!r} is stored as {dtype}; the export reads float32, bfloat16 and float16.")
    return max(set(dtypes), key=dtypes.count)
