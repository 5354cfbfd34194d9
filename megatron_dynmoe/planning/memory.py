"""What one GPU holds: weights, gradients, optimizer state, activations with the routed rows."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_dynmoe.planning.kept import router_bytes
from megatron_dynmoe.planning.shapes import Layout, Model


@dataclass(frozen=True)
class Parameters:
    """Parameters on one rank of one pipeline stage: those of its experts, and the others."""

    dense: int
    experts: int


def parameters(model: Model, layout: Layout, stage: int) -> Parameters:
    """Parameters that a rank of pipeline stage ``stage`` stores.

    Matrices of attention, dense and shared feed-forward parts, embedding and output layer are split over TP; norms and
    routers are on every rank; each rank has E / EP whole experts.  A tied output layer on another stage than the
    embedding is a copy (megatron-core, ``initialize_embedding_or_output_weight``).
    """
    layers = layout.stage(model, stage)
    moe = sum(model.moe[layer] for layer in layers)
    split = len(layers) * model.attention + moe * model.feed_forward(model.shared_width)
    split += (len(layers) - moe) * model.feed_forward(model.dense_width)
    first, last = stage == 0, stage == layout.pipeline - 1
    copies = int(first) + int(last and not (first and model.tied))
    split += copies * model.padded_vocabulary(layout.tensor) * model.width
    replicated = len(layers) * model.norms + moe * model.router + (model.width if last else 0)
    return Parameters(
        dense=split // layout.tensor + replicated,
        experts=moe * model.experts // layout.expert * model.per_expert,
    )


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU.

    Attributes:
        weights, gradients: in the model's dtype; in float32.
        optimizer, optimizer_sharded: Adam's state on every rank, or split over the ranks that share parameters
            (``--use-distributed-optimizer``).
        activations: kept from forward to backward, all micro-batches in flight. routed: the routed rows among them.
    """

    weights: float
    gradients: float
    optimizer: float
    optimizer_sharded: float
    activations: float
    routed: float

    def total(self, *, distributed_optimizer: bool) -> float:
        """All of it."""
        state = self.optimizer_sharded if distributed_optimizer else self.optimizer
        return self.weights + self.gradients + state + self.activations


@dataclass(frozen=True)
class LayerRows:
    """Rows of one MoE layer and micro-batch on the rank that has most; all 0 for a dense layer.

    Attributes:
        computed: (token, expert) rows that its experts compute.
        sent, pairs: rows and distinct (token, rank) pairs of its own tokens.
        unit: what is on the wire: "expert" or "rank".
    """

    computed: float = 0.0
    sent: float = 0.0
    pairs: float = 0.0
    unit: str = "expert"


def token_bytes(model: Model, *, moe: bool) -> float:
    """Bytes kept for each of a rank's T tokens in one layer, without routed rows and their indices.

    What backward needs, tensor by tensor, as Korthikanti et al. 2022 count them (arXiv 2205.05198, section 4) for a
    layer without dropout and biases and with flash attention: inputs of the two norms, of the attention and of the
    feed-forward part (4 D), queries, keys and values as the GEMM gives them and, rotated, queries and keys once more,
    the attention's output, and 4 bytes of its log-sum a head.  Under sequence parallelism a rank has 1 / TP of all of
    it.  A feed-forward part keeps the output of its first GEMM and the input of its second.  Norms by torch keep their
    input and its norm in float32 instead of the input (mcore/norm.py), and rotary positions by torch their tables.
    """
    size = model.itemsize
    attention = 3 * (model.heads + model.query_groups) * model.head_width * size + 4 * model.heads
    width = model.shared_width if moe else model.dense_width
    extra = moe_token_bytes(model) - model.width * size if moe else 0
    if model.torch_kernels and size < 4:
        extra += 2 * (8 - size) * model.width + 4 * model.head_width * size
    return 4 * model.width * size + attention + model.matrices * width * size + extra


def moe_token_bytes(model: Model) -> int:
    """Bytes a token of an MoE layer's input, router and zero-computation experts, without a shared expert.

    The router keeps its input in the model's dtype (routers/linear.py), and zero-computation experts theirs, which is
    another tensor where the input is scaled.
    """
    routing, columns = model.routing, model.columns
    zero_computation = routing.zero_computation_experts
    inputs = 1 if zero_computation and routing.expert_input_scale != 1 else 0
    weights = 4 * columns if zero_computation else 0  # of zero-computation experts
    kept = router_bytes(routing, columns, model.width, model.itemsize)
    return inputs * model.width * model.itemsize + kept + weights + 4 * routing.constant_experts


def row_bytes(model: Model, *, fp8: bool = False) -> int:
    """Bytes kept for each row that a rank's experts compute: D + 3 F elements (without gate D + 2 F) and a weight.

    The row; the output of the first GEMM, 2 F with a gate; the weighted product, input of the second GEMM; the float32
    weight.  So it is with this library's experts on any device (experts/grouped.py) and with Transformer Engine's.  In
    FP8 the inputs of the two GEMMs, D + F, are kept in one byte.
    """
    inputs, hidden = model.width + model.expert_width, (model.matrices - 1) * model.expert_width
    return inputs * (1 if fp8 else model.itemsize) + hidden * model.itemsize + 4


def index_bytes(model: Model, tokens: float, rows: LayerRows) -> float:
    """Bytes of what says where rows go.

    Transformer Engine's permutation keeps a row_id_map of 2 E + 1 int32 a token.  Ours keep two int64 a row for its
    place (dispatch/per_expert.py) and one for its weight; (token, rank) rows have both for each pair and again for each
    row at the receiver, and the map (dispatch/per_rank.py).
    """
    if rows.unit == "rank":
        return tokens * model.experts + 24 * (rows.pairs + rows.computed)
    return tokens * (8 * model.experts + 4) if model.fused else 24 * rows.sent


def memory(model: Model, layout: Layout, stage: int, rows_by_layer: list[LayerRows]) -> Memory:
    """What a GPU of pipeline stage ``stage`` holds at its fullest.

    Bytes a parameter are those of megatron's estimate (theoretical_memory_usage.py) for mixed precision, 2 + 4 + 12,
    of which the last, float32 weights and Adam's two moments, is what the distributed optimizer splits; in float32 they
    are 4 + 4 + 8.  Under the 1F1B schedule stage i keeps min(PP - i, micro-batches) micro-batches (Narayanan et al.
    2021, arXiv 2104.04473, section 2.2).  With full recompute a micro-batch keeps each layer's input, and one layer is
    whole at a time.  The last stage adds the final norm and the logits, in the model's dtype and in float32.  What one
    layer has beside is added once: rows on their way, as sent and as received, or in the backward pass the gradients
    of a row and of what lies between its two GEMMs, 2 D + 3 F elements.  FP8 weights that are not kept in FP8 are cast
    once a step and cached, as they are and transposed: two bytes a parameter (Transformer Engine, module/base.py).

    Not counted: the allocator's fragmentation, buffers of communication libraries, the CUDA context.

    Args:
        rows_by_layer: of the busiest rank in a micro-batch, for each layer of the stage.
    """
    held = parameters(model, layout, stage)
    count = held.dense + held.experts
    state = 12 if model.itemsize < 4 else 8
    tokens = layout.tokens(model)
    layers = layout.stage(model, stage)
    moe = [model.moe[layer] for layer in layers]
    routed = [
        rows.computed * row_bytes(model, fp8=model.in_fp8(layer)) + index_bytes(model, tokens, rows)
        if model.moe[layer]
        else 0.0
        for rows, layer in zip(rows_by_layer, layers, strict=True)
    ]
    whole = [tokens * token_bytes(model, moe=has_experts) + rows for has_experts, rows in zip(moe, routed, strict=True)]
    in_flight = min(layout.pipeline - stage, layout.micro_batches)
    if model.recompute:
        kept = in_flight * len(whole) * tokens * model.width * model.itemsize + max(whole)
        routed_kept = max(routed)
    else:
        kept, routed_kept = in_flight * sum(whole), in_flight * sum(routed)
    if stage == layout.pipeline - 1:
        vocabulary = model.padded_vocabulary(layout.tensor)
        kept += tokens * (2 * model.width * model.itemsize + vocabulary * (model.itemsize + 4))
    beside = 2 * model.width + model.matrices * model.expert_width
    kept += max(rows.computed for rows in rows_by_layer) * beside * model.itemsize
    in_fp8 = 2 if model.fp8 and not model.fp8_weights else 0
    return Memory(
        weights=count * model.itemsize + in_fp8 * held.experts,
        gradients=count * 4,
        optimizer=count * state,
        optimizer_sharded=state * (held.dense / layout.data + held.experts / layout.expert_data),
        activations=kept,
        routed=routed_kept,
    )
