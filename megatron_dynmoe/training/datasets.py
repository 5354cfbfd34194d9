"""Train, validation and test datasets, through megatron-core's builder, as Megatron's own GPT entry asks for them."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.parallel_state import get_data_parallel_world_size, get_tensor_model_parallel_rank
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training import get_args, get_tokenizer
from megatron.training.datasets.fim_dataset import GPTFIMDataset, GPTFIMDatasetConfig
from megatron.training.datasets.sft_dataset import SFTDataset
from megatron.training.utils.common_utils import get_blend_and_blend_per_split

from megatron_dynmoe.config import ConfigError
from megatron_dynmoe.training.batch import needs_tokens, packs_documents

# Fields of megatron-core's dataset configuration that flags say; the flags whose names differ.
_FIELDS = """
    random_seed sequence_length split multiple_validation_sets full_validation num_dataset_builder_threads path_to_cache
    mmap_bin_files reset_position_ids reset_attention_mask eod_mask_loss create_attention_mask object_storage_cache_path
    mid_level_dataset_surplus allow_ambiguous_pad_tokens fast_cache_load defer_npy_index_mmap inter_document_masking
    context_parallel_size data_parallel_size hybrid_context_parallel
""".split()
_FLAGS = {
    "random_seed": "seed",
    "sequence_length": "seq_length",
    "path_to_cache": "data_cache_path",
    "create_attention_mask": "create_attention_mask_in_dataloader",
    "fast_cache_load": "dataloader_fast_cache_load",
    "defer_npy_index_mmap": "dataloader_defer_npy_index_mmap",
    "inter_document_masking": "dataloader_inter_document_masking",
}
_FIM = ("fim_rate", "fim_spm_rate", "fim_split_sample", "fim_fragment_rate", "fim_no_prefix")


def data_prefixes(args: Namespace) -> list[str]:
    """Path prefixes of all indexed datasets that the flags name, weights left out."""
    if args.sft:  # names files of conversations, which are not indexed
        return []
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    return [prefix for prefixes, _ in filter(None, [blend, *(blend_per_split or ())]) for prefix in prefixes]


def build_datasets(num_samples: list[int], vp_stage: int | None = None, *, config: TransformerConfig) -> tuple:
    """Train, validation and test datasets of at least ``num_samples`` sequences; ``None`` on ranks that read none.

    Args:
        num_samples: of each; ``None`` for all of them once.
        vp_stage: the virtual stage that will read them.
        config: of the model: says which stages read tokens.

    Raises:
        ConfigError: with full validation, a data-parallel rank would have no sequence, or there is a test set.
    """
    args = get_args()

    def read_here() -> bool:
        # Full validation compares the datasets' lengths on every rank (megatron/training/training.py:4650).
        rank_reads = args.full_validation or get_tensor_model_parallel_rank() == 0
        return rank_reads and (args.full_validation or packs_documents(args) or needs_tokens(config, vp_stage))

    built = BlendedMegatronDatasetBuilder(_dataset_class(args), num_samples, read_here, dataset_config(args)).build()
    if args.full_validation:
        _check_full_validation(built[1], test=built[2])
    return tuple(built)


def _check_full_validation(datasets: Any, *, test: Any) -> None:
    """megatron repeats each rank's share without end, so an empty one would be waited for without end."""
    if test is not None:  # evaluate_and_print_results takes it for a list of sets (megatron/training/training.py:4365)
        raise ConfigError("--full-validation cannot stand beside a test set; give --split a test share of 0.")
    least = get_data_parallel_world_size()
    for index, dataset in enumerate(datasets if isinstance(datasets, list) else [datasets]):
        count = 0 if dataset is None else len(dataset)
        if count < least:
            raise ConfigError(
                f"--full-validation: validation set {index} has {count} sequences for {least} data-parallel ranks; "
                f"accepted: at least {least}, so that every rank has one."
            )


def _dataset_class(args: Namespace) -> type:
    if args.sft:
        return SFTDataset
    if args.mock_data:
        return MockGPTDataset
    return GPTFIMDataset if args.fim_data else GPTDataset


def dataset_config(args: Namespace) -> GPTDatasetConfig:
    """megatron-core's dataset configuration that the parsed flags say.

    Raises:
        ConfigError: the file that ``--per-dataset-sequences-path`` names cannot be read or lacks a dataset, or a token
            of ``--fim-data`` is not in the vocabulary.
    """
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    values = {name: getattr(args, _FLAGS.get(name, name)) for name in _FIELDS}
    values |= {
        "blend": blend,
        "blend_per_split": blend_per_split,
        "tokenizer": get_tokenizer(),
        "sequences_per_dataset": _sequences_per_dataset(args),
        "sequence_parallel_size": args.tensor_model_parallel_size * args.sequence_parallel,
    }
    if not args.fim_data:
        return GPTDatasetConfig(**values)
    values |= {name: getattr(args, name) for name in _FIM}
    return GPTFIMDatasetConfig(**values, fim_extra_tokens=_fim_tokens(args, values["tokenizer"]))


def _fim_tokens(args: Namespace, tokenizer: Any) -> dict[str, str]:
    """The special tokens of fill-in-the-middle; an unknown one would become another in silence."""
    tokens = {
        "prefix": args.fim_prefix_token,
        "middle": args.fim_middle_token,
        "suffix": args.fim_suffix_token,
        "pad": args.fim_pad_token,
        "eod": args.fim_eod_token,
    }
    known = tokenizer._tokenizer  # where GPTFIMDataset looks
    vocabulary = known.tokenizer.get_vocab() if hasattr(getattr(known, "tokenizer", None), "get_vocab") else None
    if vocabulary is None:
        raise ConfigError(
            f"--fim-data needs a tokenizer with special tokens; --tokenizer-type is {args.tokenizer_type!r}, accepted: "
            "'HuggingFaceTokenizer'."
        )
    for name, token in tokens.items():
        if token not in vocabulary:
            raise ConfigError(f"--fim-{name}-token is {token!r}, which the tokenizer lacks; name one of its tokens.")
    return tokens


def _sequences_per_dataset(args: Namespace) -> dict[str, Any] | None:
    path = args.per_dataset_sequences_path
    if path is None:
        return None
    flag = f"--per-dataset-sequences-path: {path}"
    try:
        counts = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{flag} cannot be read ({error}).") from None
    for prefix in data_prefixes(args):
        pair = counts.get(prefix) if isinstance(counts, dict) else None
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(count, int) for count in pair)):
            raise ConfigError(f"{flag} says {pair!r} of {prefix}; accepted: [its sequences, its documents].")
    return counts
