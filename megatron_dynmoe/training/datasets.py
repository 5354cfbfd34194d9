"""Indexed binaries to train, validation and test datasets, through megatron-core's builder."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.training import get_args, get_tokenizer
from megatron.training.utils.common_utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage


def data_prefixes(args: Namespace) -> list[str]:
    """Path prefixes of all indexed datasets that the flags name, weights left out."""
    named = [args.data_path, args.train_data_path, args.valid_data_path, args.test_data_path]
    words = [word for words in named if words for word in words]
    return [word for word in words if not _is_weight(word)]


def _is_weight(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def build_datasets(num_samples: list[int], vp_stage: int | None = None) -> tuple[Any, Any, Any]:
    """Train, validation and test datasets of at least ``num_samples`` sequences.

    Every tensor-parallel rank reads its own copy, so that no batch has to be broadcast.
    """
    args = get_args()
    config = _dataset_config(args)
    dataset = MockGPTDataset if config.mock else GPTDataset
    needed = lambda: is_first_or_last_pipeline_stage(vp_stage)  # noqa: E731
    return tuple(BlendedMegatronDatasetBuilder(dataset, num_samples, needed, config).build())


build_datasets.is_distributed = True


def _dataset_config(args: Namespace) -> GPTDatasetConfig:
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    return GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        multiple_validation_sets=args.multiple_validation_sets,
        full_validation=args.full_validation,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=get_tokenizer(),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
    )
