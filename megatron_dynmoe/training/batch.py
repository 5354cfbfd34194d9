"""Batches as Megatron's own GPT entry makes them: read by tensor-parallel rank 0, broadcast, split over context ranks.

Megatron's entry is not in its wheel; its functions are, and do the work here.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from typing import Any

from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.multi_token_prediction import get_mtp_ranks, mtp_on_this_rank
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import (
    flatten_batch_for_packed_sequences,
    get_batch_on_this_cp_rank,
    get_batch_on_this_tp_rank,
)
from megatron.training import get_args
from megatron.training.training import update_seqlen_stats_from_cu_seqlens
from megatron.training.utils.common_utils import is_first_or_last_pipeline_stage

DOCUMENTS = ("cu_seqlens", "cu_seqlens_padded", "max_seqlen")
KEYS = (
    *("tokens", "labels", "loss_mask", "position_ids", "attention_mask"),
    *DOCUMENTS,
    *("local_cp_size", "hybrid_cp_group"),
)


def packs_documents(args: Namespace) -> bool:
    """Whether batches name the documents in a sequence, to which attention is restricted."""
    return bool(args.sft or args.dataloader_inter_document_masking)


def has_mtp(config: TransformerConfig, vp_stage: int | None) -> bool:
    """Whether layers of multi-token prediction are on this stage of the pipeline."""
    layout, layers = config.pipeline_model_parallel_layout, config.mtp_num_layers
    return mtp_on_this_rank(layout=layout, mtp_num_layers=layers, ignore_virtual=False, vp_stage=vp_stage)


def needs_tokens(config: TransformerConfig, vp_stage: int | None) -> bool:
    """Whether this stage reads tokens or labels: the first, the last, and that of multi-token prediction."""
    return is_first_or_last_pipeline_stage(vp_stage) or has_mtp(config, vp_stage)


def get_embedding_ranks(pp_ranks: list[int], *, config: TransformerConfig) -> list[int]:
    """Those of a pipeline's ranks that hold a copy of the word embedding, in ascending order.

    Args:
        pp_ranks: global ranks of one pipeline.
        config: says on which stage multi-token prediction is.
    """
    ranks = {pp_ranks[0]}
    if len(pp_ranks) > 1:
        ranks |= set(get_mtp_ranks(pp_ranks, config))
        if not get_args().untie_embeddings_and_output_weights:
            ranks.add(pp_ranks[-1])
    return sorted(ranks)


def get_batch(
    data_iterator: Iterator | None, config: TransformerConfig, *, vp_stage: int | None, micro_batch_size: int
) -> dict[str, Any]:
    """This rank's share of the next micro-batch, under all of :data:`KEYS`; what the stage does not need is ``None``.

    int64 tokens, labels, position ids [B, S], float loss mask [B, S], bool attention mask [B, 1, S, S]; with documents
    all sequences of the micro-batch are one [1, B S], and int32 ``cu_seqlens`` [1, documents + 1] says where each ends.

    Args:
        data_iterator: read on tensor-parallel rank 0 alone.
        config: of the model.
        vp_stage: the virtual stage that the batch is for.
        micro_batch_size: B.
    """
    args = get_args()
    documents, tokens_here = packs_documents(args), needs_tokens(config, vp_stage)
    if not tokens_here and not documents:
        return dict.fromkeys(KEYS)
    tp_rank, batch = parallel_state.get_tensor_model_parallel_rank(), {}
    if tp_rank == 0:
        assert data_iterator is not None, "the first tensor-parallel rank reads"
        sample = next(data_iterator)
        batch = {key: None if sample.get(key) is None else sample[key].cuda(non_blocking=True) for key in KEYS}
    batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=documents,
        is_hybrid_cp=args.hybrid_context_parallel,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        broadcast_src_rank=parallel_state.get_tensor_model_parallel_src_rank(),
        broadcast_group=parallel_state.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=tp_rank,
        micro_batch_size=micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=has_mtp(config, vp_stage),
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=parallel_state.is_pipeline_first_stage(),
        is_pipeline_last_stage=parallel_state.is_pipeline_last_stage(),
    )
    batch = flatten_batch_for_packed_sequences(batch)
    if not tokens_here:
        return dict.fromkeys(KEYS) | {key: batch[key] for key in DOCUMENTS}
    return get_batch_on_this_cp_rank(
        batch,
        is_hybrid_cp=args.hybrid_context_parallel,
        cp_group=parallel_state.get_context_parallel_group(),  # without a group the split would be over all ranks
        hybrid_cp_group_func=parallel_state.get_hybrid_data_context_parallel_groups,
        use_per_sequence_balancing=args.dataloader_inter_document_masking and not args.sft,
    )


def packed_sequences(batch: dict[str, Any], *, count: bool) -> PackedSeqParams | None:
    """What attention needs to know of the documents in ``batch``; ``None`` without documents.

    Args:
        batch: of :func:`get_batch`.
        count: add their lengths to Megatron's count of floating-point operations; once a training micro-batch.
    """
    if batch["cu_seqlens"] is None:
        return None
    ends, padded = batch["cu_seqlens"].squeeze(0), batch["cu_seqlens_padded"]
    padded = None if padded is None else padded.squeeze(0)
    if count:
        update_seqlen_stats_from_cu_seqlens(ends)
    longest = int(batch["max_seqlen"].item())
    used = ends if padded is None else padded  # as Megatron's entry: attention is told of padded documents only
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=used,
        cu_seqlens_kv=used,
        cu_seqlens_q_padded=padded,
        cu_seqlens_kv_padded=padded,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        local_cp_size=None if batch["local_cp_size"] is None else int(batch["local_cp_size"].item()),
        cp_group=batch["hybrid_cp_group"],
        tokens_per_sample=get_args().seq_length,
    )
