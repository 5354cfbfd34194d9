"""From raw text to what Megatron trains on: corpus shards, tokenizers, indexed datasets.

Light to import: torch and Megatron are imported where they are used.
"""

from megatron_dynmoe.data.errors import DataError
from megatron_dynmoe.data.indexed import IndexedInfo, validate_indexed
from megatron_dynmoe.data.tokenizers import TokenizerFile, to_hf_tokenizer, train_tokenizer

__all__ = [
    "DataError",
    "IndexedInfo",
    "TokenizerFile",
    "to_hf_tokenizer",
    "train_tokenizer",
    "validate_indexed",
]
