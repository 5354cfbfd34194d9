"""From megatron's keys to the Hugging Face names.

Shape letters: `V` vocabulary rows, `D` hidden size, `F` width of a feed-forward network, `E` experts, `H` head size.
Keys of a transformer layer come in two forms: stacked over layers (`decoder.layers.mlp.router.weight` [layers, E, D])
when all layers are alike, one key per layer (`decoder.layers.3.mlp.router.weight` [E, D]) when they are not
(megatron-core 0.19, `TransformerBlock.sharded_state_dict`).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_dynmoe.checkpoint.reader import DistCheckpoint

from .errors import ExportError
from .slots import ROUTER_RECORDS


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
    keys.unused |= set(left_out(checkpoint))
    width, rows = fields["hidden_size"], partial(_cut, rows=vocab_size)
    vocabulary = (None, width)
    pieces = [keys.piece("embedding.word_embeddings.weight", vocabulary, rows("model.embed_tokens.weight"))]
    for layer in range(fields["num_hidden_layers"]):
        pieces += _layer(keys, layer, fields)
    pieces.append(keys.piece("decoder.final_layernorm.weight", (width,), _name("model.norm.weight")))
    if not fields["tie_word_embeddings"]:
        pieces.append(keys.piece("output_layer.weight", vocabulary, rows("lm_head.weight")))
    if fields.get("gating_residual") and any(fields["moe_layers"]):
        # A checkpoint may hold one for the first mixture too, which has no logits before it to map.
        keys.unused.add(f"decoder.layers.{fields['moe_layers'].index(1)}.mlp.router.gate_map")
    keys.check_all_used(pieces)
    return pieces


def left_out(checkpoint: DistCheckpoint) -> list[str]:
    """Keys of the layers of multi-token prediction: they help training, and the exported model computes the same
    without them."""
    if not getattr(checkpoint.args, "mtp_num_layers", None):
        return []
    return sorted(key for key in checkpoint.shapes if key.startswith("mtp."))


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
    slots = fields["expert_slots"][layer] if fields.get("expert_slots") else None
    kept = partial(_kept, slots=slots)
    yield from _router(get, f"{hf}.mlp.router", fields, kept, first=not any(fields["moe_layers"][:layer]))
    ffn = fields["moe_intermediate_size"]
    for piece in _mlp(get, "mlp.experts.experts", f"{hf}.mlp.experts", experts, width, ffn):
        yield replace(piece, convert=partial(_kept_experts, slots=slots, convert=piece.convert))
    if constants := fields.get("constant_experts", 0):
        for name, shape in {"select": (constants, 2, width), "values": (constants, width)}.items():
            yield get([f"mlp.free_experts.{name}"], shape, _name(f"{hf}.mlp.free_experts.{name}"))
    if fields.get("residual_mixture"):
        yield get(["mlp.mixer.weight"], (2, width), _name(f"{hf}.mlp.mixer.weight"))
        yield get(["mlp.mixer.bias"], (2,), _name(f"{hf}.mlp.mixer.bias"))
    if shared:
        yield from _mlp(get, "mlp.shared_experts", f"{hf}.mlp.shared_expert", (), width, shared)
        if fields["shared_expert_gate"]:
            yield get(["mlp.shared_experts.gate_weight"], (1, width), _name(f"{hf}.mlp.shared_expert_gate.weight"))


def _router(get, hf: str, fields: dict[str, Any], kept: Callable, *, first: bool) -> Iterator[Piece]:
    """What gate and rule learned; `first` is the first mixture, which has no logits before it to map."""
    kinds = ("num_experts", "constant_experts", "copy_experts", "zero_experts")
    columns, width = sum(fields.get(kind, 0) for kind in kinds), fields["hidden_size"]
    hidden = 8 * columns if fields.get("router_gate") == "tanh" else None
    yield get(["mlp.router.weight"], (columns, hidden or width), kept(f"{hf}.weight"))
    if hidden:
        yield get(["mlp.router.hidden_weight"], (hidden, width), _name(f"{hf}.hidden_weight"))
    if fields.get("gating_residual") and not first:
        yield get(["mlp.router.gate_map"], (columns, columns), _name(f"{hf}.gate_map"))
    if fields["router_rule"] == "top-any":
        yield get(["mlp.router.thresholds"], (columns,), kept(f"{hf}.thresholds"))
    if fields.get("trained_cosine_scale"):
        yield get(["mlp.router.logit_scale"], (1,), _name(f"{hf}.logit_scale"))


def _mlp(get, megatron: str, hf: str, experts: tuple[int, ...], width: int, ffn: int) -> Iterator[Piece]:
    """A SwiGLU network, or [E] of them: fc1 holds the gate's rows, then those of the upward projection."""
    yield get([f"{megatron}.linear_fc1.weight"], (*experts, 2 * ffn, width), partial(_split_gate_up, hf))
    yield get([f"{megatron}.linear_fc2.weight"], (*experts, width, ffn), partial(_down, hf))


class _Keys:
    """Finds the model's keys in a checkpoint in either form, checks their shapes, and remembers which were used."""

    def __init__(self, checkpoint: DistCheckpoint):
        self.path, self.shapes, self.layers = checkpoint.path, checkpoint.shapes, checkpoint.args.num_layers
        self.unused: set[str] = set()

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
        used = {piece.key for piece in pieces} | self.unused
        model = [key for key in self.shapes if key.split(".")[0] in ("embedding", "decoder", "output_layer", "mtp")]
        used |= {key for key in model if key.rpartition(".")[2] in ROUTER_RECORDS}
        if left := sorted(set(model) - used):
            raise ExportError(f"the export knows no place for {', '.join(left[:5])} ({len(left)} in {self.path}).")


def _name(name: str) -> Callable[[Tensor], dict[str, Tensor]]:
    return lambda tensor: {name: tensor}


def _kept(name: str, *, slots: list[int] | None) -> Callable[[Tensor], dict[str, Tensor]]:
    """A tensor [E, ...] of the router, without the rows of inactive slots."""
    return lambda tensor: {name: tensor if slots is None else tensor[slots]}


def _kept_experts(weight: Tensor, *, slots: list[int] | None, convert: Callable) -> dict[str, Tensor]:
    return convert(weight if slots is None else weight[slots])


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
