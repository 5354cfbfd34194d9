"""What one GPU holds: weights, gradients, optimizer state, activations with the routed rows."""

from __future__ import annotations

from dataclasses import dataclass

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
    dense_part = model.matrices * model.width * model.dense_width
    shared_part = model.matrices * model.width * model.shared_width
    split = len(layers) * model.attention + (len(layers) - moe) * dense_part + moe * shared_part
    first, last = stage == 0, stage == layout.pipeline - 1
    copies = int(first) + int(last and not (first and model.tied))
    split += copies * model.padded_vocabulary(layout.tensor) * model.width
    replicated = 2 * len(layers) * model.width + moe * model.experts * model.width + (model.width if last else 0)
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


def token_bytes(model: Model, *, moe: bool) -> float:
    """Bytes kept for each of a rank's T tokens in one layer, without routed rows.

    What backward needs, tensor by tensor, as Korthikanti et al. 2022 count them (arXiv 2205.05198, section 4) for a
    layer without dropout and biases and with flash attention: inputs of the two norms, of the attention and of the
    feed-forward part (4 D), queries, keys and values, the attention's output, and 4 bytes of its log-sum a head.
    Under sequence parallelism a rank has 1 / TP of all of it.  A feed-forward part keeps the output of its first GEMM
    and the input of its second.  A router keeps its input in float32 and about four float32 values an expert.
    """
    size = model.itemsize
    attention = (2 * model.heads + 2 * model.query_groups) * model.head_width * size + 4 * model.heads
    width = model.shared_width if moe else model.dense_width
    feed_forward = model.matrices * width * size
    router = 16 * model.experts + (4 * model.width if size < 4 else 0)
    return 4 * model.width * size + attention + feed_forward + (router if moe else 0)


def row_bytes(model: Model) -> int:
    """Bytes kept for each row that a rank's experts compute, with this library's grouped experts.

    The row; the output of the first GEMM (2 F, or F without gate); with a gate, the activated half; the product; the
    weighted product; the float32 weight.  So it is on CUDA (experts/grouped.py); on the CPU less is kept.
    """
    elements = model.width + (5 if model.gated else 3) * model.expert_width
    return elements * model.itemsize + 4


def memory(model: Model, layout: Layout, stage: int, rows_by_layer: list[float]) -> Memory:
    """What a GPU of pipeline stage ``stage`` holds at its fullest.

    Bytes a parameter are those of megatron's estimate (theoretical_memory_usage.py) for mixed precision, 2 + 4 + 12,
    of which the last, float32 weights and Adam's two moments, is what the distributed optimizer splits; in float32 they
    are 4 + 4 + 8.  Under the 1F1B schedule stage i keeps min(PP - i, micro-batches) micro-batches (Narayanan et al.
    2021, arXiv 2104.04473, section 2.2).  With full recompute a micro-batch keeps each layer's input, and one layer is
    whole at a time.  The last stage adds the final norm and the logits, in the model's dtype and in float32.  The rows
    of one layer on their way, as sent and as received, are added once.

    Not counted: the allocator's fragmentation, buffers of communication libraries, the CUDA context.

    Args:
        rows_by_layer: rows that the busiest rank computes in a micro-batch, for each layer of the stage (dense: 0).
    """
    held = parameters(model, layout, stage)
    count = held.dense + held.experts
    state = 12 if model.itemsize < 4 else 8
    tokens = layout.tokens(model)
    routed = [rows * row_bytes(model) for rows in rows_by_layer]
    whole = [
        tokens * token_bytes(model, moe=model.moe[layer]) + rows
        for layer, rows in zip(layout.stage(model, stage), routed, strict=True)
    ]
    in_flight = min(layout.pipeline - stage, layout.micro_batches)
    if model.recompute:
        kept = in_flight * len(whole) * tokens * model.width * model.itemsize + max(whole)
        routed_kept = max(routed)
    else:
        kept, routed_kept = in_flight * sum(whole), in_flight * sum(routed)
    if stage == layout.pipeline - 1:
        vocabulary = model.padded_vocabulary(layout.tensor)
        kept += tokens * (2 * model.width * model.itemsize + vocabulary * (model.itemsize + 4))
    kept += 2 * max(rows_by_layer) * model.width * model.itemsize
    return Memory(
        weights=count * model.itemsize,
        gradients=count * 4,
        optimizer=count * state,
        optimizer_sharded=state * (held.dense / layout.data + held.experts / layout.expert_data),
        activations=kept,
        routed=routed_kept,
    )
