"""The one table of megatron's keys and the Hugging Face names, read by the export and by the import.

Shape letters: `V` vocabulary rows, `D` hidden size, `F` width of a feed-forward network, `E` experts, `H` head size.
Keys of a transformer layer come in two forms: stacked over layers (`decoder.layers.mlp.router.weight` [layers, E, D])
when all layers are alike, one key per layer (`decoder.layers.3.mlp.router.weight` [E, D]) when they are not
(megatron-core 0.19, `TransformerBlock.sharded_state_dict`).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_dynmoe.checkpoint.reader import DistCheckpoint

from .errors import ExportError
from .moved import router_config, training_state
from .rows import Part, Row


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
    pieces = [keys.piece(row) for row in table(fields, vocab_size)]
    if first_gate_map := unmapped(fields):
        keys.unused.add(f"decoder.layers.{first_gate_map[0]}.{first_gate_map[1]}")
    keys.check_all_used(pieces, training_state(fields))
    return pieces


def unmapped(fields: dict[str, Any]) -> tuple[int, str] | None:
    """Layer and key of the gating residual's map in the first mixture, which has no logits before it to map.

    A checkpoint may hold it (layers that are alike are stacked); the exported model has none.
    """
    if not (fields.get("gating_residual") and any(fields["moe_layers"])):
        return None
    return fields["moe_layers"].index(1), "mlp.router.gate_map"


def left_out(checkpoint: DistCheckpoint) -> list[str]:
    """Keys of the layers of multi-token prediction: they help training, and the exported model computes the same
    without them."""
    if not getattr(checkpoint.args, "mtp_num_layers", None):
        return []
    return sorted(key for key in checkpoint.shapes if key.startswith("mtp."))


def table(fields: dict[str, Any], vocab_size: int) -> Iterator[Row]:
    """All rows of a model, in the order of its layers.

    Args:
        fields: the exported model's configuration: those of :func:`config_fields`, and of `slot_fields`.
        vocab_size: rows of the embedding that are tokens.
    """
    width = fields["hidden_size"]

    def vocabulary(key: str, name: str) -> Row:
        return Row((key,), None, (None, width), (Part(name, (vocab_size, width), slice(0, vocab_size)),))

    yield vocabulary("embedding.word_embeddings.weight", "model.embed_tokens.weight")
    for layer in range(fields["num_hidden_layers"]):
        yield from _layer(layer, fields)
    yield _same(None, "decoder.final_layernorm.weight", "model.norm.weight", (width,))
    if not fields["tie_word_embeddings"]:
        yield vocabulary("output_layer.weight", "lm_head.weight")


def _layer(layer: int, fields: dict[str, Any]) -> Iterator[Row]:
    width, head, hf = fields["hidden_size"], fields["head_dim"], f"model.layers.{layer}"
    heads, same = fields["num_attention_heads"], partial(_same, layer)
    # A norm is fused into the linear layer after it, and stored there: by Transformer Engine, and under the same names
    # by megatron's local layers, which have it apart.
    norms = ("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight")
    yield same(norms, f"{hf}.input_layernorm.weight", (width,))
    yield _attention(layer, f"{hf}.self_attn", fields)
    yield same("self_attention.linear_proj.weight", f"{hf}.self_attn.o_proj.weight", (width, heads * head))
    norms = ("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight")
    yield same(norms, f"{hf}.post_attention_layernorm.weight", (width,))
    if not fields["moe_layers"][layer]:
        yield from _mlp(layer, "mlp", f"{hf}.mlp", width, fields["intermediate_size"])
        return
    slots = fields["expert_slots"][layer] if fields.get("expert_slots") else None
    yield from _router(layer, f"{hf}.mlp.router", fields, slots)
    yield from _experts(layer, f"{hf}.mlp.experts", fields, slots)
    if constants := fields.get("constant_experts", 0):
        for name, shape in {"select": (constants, 2, width), "values": (constants, width)}.items():
            yield same(f"mlp.free_experts.{name}", f"{hf}.mlp.free_experts.{name}", shape)
    if fields.get("residual_mixture"):
        yield same("mlp.mixer.weight", f"{hf}.mlp.mixer.weight", (2, width))
        yield same("mlp.mixer.bias", f"{hf}.mlp.mixer.bias", (2,))
    if shared := fields["shared_expert_intermediate_size"]:
        yield from _mlp(layer, "mlp.shared_experts", f"{hf}.mlp.shared_expert", width, shared)
        if fields["shared_expert_gate"]:
            yield same("mlp.shared_experts.gate_weight", f"{hf}.mlp.shared_expert_gate.weight", (1, width))


def _same(layer: int | None, keys: str | tuple[str, ...], name: str, shape: tuple[int, ...]) -> Row:
    return Row((keys,) if isinstance(keys, str) else keys, layer, shape, (Part(name, shape),))


def _attention(layer: int, hf: str, fields: dict[str, Any]) -> Row:
    """Queries, keys and values, interleaved: a group is its query heads, then a key head, then a value head."""
    width, head, groups = fields["hidden_size"], fields["head_dim"], fields["num_key_value_heads"]
    queries = fields["num_attention_heads"] // groups
    every = slice(None)
    parts = (
        Part(f"{hf}.q_proj.weight", (groups * queries * head, width), (every, slice(0, queries))),
        Part(f"{hf}.k_proj.weight", (groups * head, width), (every, queries)),
        Part(f"{hf}.v_proj.weight", (groups * head, width), (every, queries + 1)),
    )
    form = (groups, queries + 2, head, width)
    return Row(("self_attention.linear_qkv.weight",), layer, (groups * (queries + 2) * head, width), parts, form)


def _router(layer: int, hf: str, fields: dict[str, Any], slots: list[int] | None) -> Iterator[Row]:
    """What gate and rule learned, as they say themselves; of what has a row for each slot those of active ones."""
    config, width = router_config(fields), fields["hidden_size"]
    gate, rule = config.methods
    columns = fields["num_experts"] + config.zero_computation_experts
    shapes = {"weight": gate.weight_shape(columns, width) if gate.weight_shape else (columns, width)}
    for method in (gate, rule):
        learned = method.parameters(config, columns, width) if method.parameters else {}
        shapes |= {name: tuple(getattr(value, "shape", value)) for name, value in learned.items()}
    if config.gating_residual and any(fields["moe_layers"][:layer]):
        shapes["gate_map"] = (columns, columns)
    for name, shape in shapes.items():
        by_slot = slots is not None and shape[0] == columns
        part = Part(f"{hf}.{name}", (len(slots), *shape[1:]), slots) if by_slot else Part(f"{hf}.{name}", shape)
        yield Row((f"mlp.router.{name}",), layer, shape, (part,))


def _mlp(layer: int, megatron: str, hf: str, width: int, ffn: int) -> Iterator[Row]:
    """A SwiGLU network: fc1 holds the gate's rows, then those of the upward projection."""
    halves = tuple(Part(f"{hf}.{name}_proj.weight", (ffn, width), (half,)) for half, name in enumerate(("gate", "up")))
    yield Row((f"{megatron}.linear_fc1.weight",), layer, (2 * ffn, width), halves, (2, ffn, width))
    yield _same(layer, f"{megatron}.linear_fc2.weight", f"{hf}.down_proj.weight", (width, ffn))


def _experts(layer: int, hf: str, fields: dict[str, Any], slots: list[int] | None) -> Iterator[Row]:
    """As many such networks as there are experts, [E, 2F, D] and [E, D, F]; active slots are numbered anew."""
    experts, width, ffn = fields["num_experts"], fields["hidden_size"], fields["moe_intermediate_size"]
    active = list(enumerate(range(experts) if slots is None else slots))
    halves = tuple(
        Part(f"{hf}.{e}.{name}_proj.weight", (ffn, width), (slot, half))
        for half, name in enumerate(("gate", "up"))
        for e, slot in active
    )
    down = tuple(Part(f"{hf}.{e}.down_proj.weight", (width, ffn), (slot,)) for e, slot in active)
    first, second = (f"mlp.experts.experts.linear_fc{number}.weight" for number in (1, 2))
    yield Row((first,), layer, (experts, 2 * ffn, width), halves, (experts, 2, ffn, width), by_expert=True)
    yield Row((second,), layer, (experts, width, ffn), down, by_expert=True)


class _Keys:
    """Finds the model's keys in a checkpoint in either form, checks their shapes, and remembers which were used."""

    def __init__(self, checkpoint: DistCheckpoint):
        self.path, self.shapes, self.layers = checkpoint.path, checkpoint.shapes, checkpoint.args.num_layers
        self.unused: set[str] = set()

    def piece(self, row: Row) -> Piece:
        """The read of the first of the row's keys that the checkpoint has."""
        names = row.keys if row.layer is None else tuple(f"decoder.layers.{row.layer}.{name}" for name in row.keys)
        for name in names:
            if name in self.shapes:
                return self._checked(name, (), self.shapes[name], row)
        for name in () if row.layer is None else row.keys:
            if (stacked := f"decoder.layers.{name}") in self.shapes:
                first, *rest = self.shapes[stacked]
                if first != self.layers:
                    raise ExportError(
                        f"{stacked!r} in {self.path} has {first} layers, the arguments say {self.layers}."
                    )
                return self._checked(stacked, (row.layer,), tuple(rest), row)
        raise ExportError(
            f"{self.path} has no tensor {' or '.join(names)}, which a model with its arguments must have."
        )

    def _checked(self, key: str, index: tuple, found: tuple[int, ...], row: Row) -> Piece:
        shape = row.shape
        if len(found) != len(shape) or any(want not in (None, have) for want, have in zip(shape, found, strict=True)):
            wanted = "x".join("?" if n is None else str(n) for n in shape)
            raise ExportError(f"{key!r} in {self.path} is {'x'.join(map(str, found))}, the arguments say {wanted}.")
        return Piece(key, index, row.export)

    def check_all_used(self, pieces: list[Piece], state: set[str]) -> None:
        """A weight that no piece reads, and that is no `state` of a router, is of a feature that the export lacks."""
        used = {piece.key for piece in pieces} | self.unused
        model = [key for key in self.shapes if key.split(".")[0] in ("embedding", "decoder", "output_layer", "mtp")]
        used |= {key for key in model if key.rpartition(".")[0].endswith(".router") and key.rpartition(".")[2] in state}
        if left := sorted(set(model) - used):
            raise ExportError(f"the export knows no place for {', '.join(left[:5])} ({len(left)} in {self.path}).")


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
