"""Checks of Megatron's indexed datasets (``PREFIX.bin``, ``PREFIX.idx``) before a run starts, without Megatron.

Megatron itself maps both files into memory and believes the index: a truncated one fails with numpy's "buffer is
smaller than requested size", a short ``.bin`` or a token beyond the embedding in the middle of training. Format,
after megatron-core 0.19.2, ``datasets/indexed_dataset.py``, ``_IndexWriter`` (lines 131-226), little-endian::

    9 bytes       b"MMIDIDX\\0\\0"
    8 bytes       version, 1
    1 byte        dtype code (``DType``, lines 44-54)
    8 bytes       S, number of sequences
    8 bytes       D + 1, number of document bounds
    int32[S]      tokens of each sequence
    int64[S]      byte offset of each sequence in the .bin
    int64[D + 1]  first sequence of each document, and S at the end
    int8[S]       mode of each sequence, in multimodal datasets only
"""

import hashlib
import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_dynmoe.data.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
# the integer codes of DType; its two float codes never hold tokens
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
# Read of each dataset by each rank, in windows: 0.1 s from the page cache, 2 s from a disk of 125 MB/s. Ranks read
# different windows, so that data of up to this size times the number of ranks is checked token by token.
SCAN_BYTES = 256 << 20
_SCAN_WINDOWS = 256
_JSON_BYTES = 1 << 20  # a larger PREFIX.json is not what preprocessing wrote
_AGAIN = "preprocess it again"


@dataclass(frozen=True)
class IndexedInfo:
    """What an indexed dataset holds.

    tokens, sequences, documents: counts. dtype: numpy name of a token. bin_bytes: size of the ``.bin``. max_token_id:
    largest id, None where no vocabulary was to be checked. metadata: the ``PREFIX.json`` written by preprocessing, or
    {}.
    """

    prefix: str
    documents: int
    sequences: int
    tokens: int
    dtype: str
    bin_bytes: int
    max_token_id: int | None
    metadata: dict


def validate_indexed(
    prefix: str | Path, *, vocab_size: int | None = None, tokenizer_model: str | Path | None = None
) -> IndexedInfo:
    """Check that a dataset is whole and fits a vocabulary; return what it holds.

    prefix: path without ``.bin``/``.idx``. vocab_size: every token id must be below it. The tokens themselves are
    read: all of them up to ``SCAN_BYTES`` a rank (``RANK`` of ``WORLD_SIZE``), windows spread over the data beyond;
    what ``PREFIX.json`` says is believed for the rest, unless the tokens contradict it.
    tokenizer_model: must be the file that ``PREFIX.json`` names by its SHA-256; not checked without ``PREFIX.json``
    or when it is no file.

    Raises DataError, one sentence, for anything missing, truncated, inconsistent or beyond the vocabulary.
    """
    prefix = str(prefix)
    idx_path, bin_path = Path(prefix + ".idx"), Path(prefix + ".bin")
    for path, other in ((idx_path, bin_path), (bin_path, idx_path)):
        if not path.is_file():
            beside = (
                f"though {other.name} is there; {_AGAIN}"
                if other.is_file()
                else "give a path prefix that has both .bin and .idx"
            )
            raise DataError(f"{path}: no such file, {beside}.")
    dtype, lengths, documents = _read_index(idx_path)
    tokens = int(lengths.sum(dtype=np.int64))
    _check_bin(bin_path, idx_path, tokens * dtype.itemsize)
    metadata = _read_metadata(Path(prefix + ".json"), tokens)
    if tokenizer_model is not None:
        _check_tokenizer(prefix, metadata, Path(tokenizer_model))
    max_id = None
    if vocab_size is not None and tokens:
        least, found = _token_range(bin_path, dtype)
        if least < 0:
            raise DataError(f"{bin_path}: holds token {least}; accepted: tokens of at least 0; {_AGAIN}.")
        max_id = max(found, metadata.get("max_token_id", found))
        if max_id >= vocab_size:
            raise DataError(
                f"{bin_path}: holds token {max_id}, but the vocabulary has {vocab_size} tokens;"
                " train with the tokenizer that made the data."
            )
        if found > metadata.get("max_token_id", found):
            raise DataError(
                f"{prefix}.json: max_token_id is {metadata['max_token_id']}, but {bin_path.name} holds token {found};"
                f" the description is of other data; delete it, or {_AGAIN}."
            )
    return IndexedInfo(prefix, documents, len(lengths), tokens, dtype.name, tokens * dtype.itemsize, max_id, metadata)


def file_sha256(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file's content."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _read_index(path: Path) -> tuple[np.dtype, np.ndarray, int]:
    """dtype of a token, tokens per sequence (int32 [S]) and number of documents, checked against each other."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        header = stream.read(_HEADER.size)
        if not header.startswith(MAGIC[: len(header)]):
            raise DataError(f"{path}: is not an index of Megatron's format; expected it to begin with MMIDIDX.")
        if len(header) < _HEADER.size:
            raise DataError(f"{path}: is truncated, {size} bytes where its header alone has {_HEADER.size}; {_AGAIN}.")
        _, version, code, sequences, bounds = _HEADER.unpack(header)
        if version != 1 or code not in DTYPES:
            raise DataError(
                f"{path}: has version {version} and dtype code {code};"
                f" expected version 1 and one of the codes {sorted(DTYPES)}."
            )
        expected = _HEADER.size + sequences * (4 + 8) + bounds * 8
        if size < expected:
            raise DataError(f"{path}: is truncated, {size} bytes where its header announces {expected}; {_AGAIN}.")
        if size not in (expected, expected + sequences):
            raise DataError(f"{path}: has {size} bytes where its header announces {expected}; {_AGAIN}.")
        lengths = np.fromfile(stream, np.int32, sequences)
        offsets = np.fromfile(stream, np.int64, sequences)
        documents = np.fromfile(stream, np.int64, bounds)
    dtype = np.dtype(DTYPES[code])
    ends = np.cumsum(lengths, dtype=np.int64) * dtype.itemsize
    whole = bounds > 0 and documents[0] == 0 and documents[-1] == sequences and (np.diff(documents) >= 0).all()
    if not whole or (lengths < 0).any() or not np.array_equal(offsets, ends - lengths * np.int64(dtype.itemsize)):
        raise DataError(f"{path}: its lengths, offsets and document bounds contradict each other; {_AGAIN}.")
    return dtype, lengths, bounds - 1


def _check_bin(bin_path: Path, idx_path: Path, expected: int) -> None:
    size = bin_path.stat().st_size
    if size < expected:
        raise DataError(f"{bin_path}: is truncated, {size} bytes where {idx_path.name} announces {expected}; {_AGAIN}.")
    if size > expected:
        raise DataError(
            f"{bin_path}: has {size} bytes where {idx_path.name} announces {expected},"
            f" the two do not belong together; {_AGAIN}."
        )


def _read_metadata(path: Path, tokens: int) -> dict:
    """PREFIX.json if it describes these tokens; one of other data left behind says nothing.

    Raises:
        DataError: it is about these tokens, but a value is not of its type.
    """
    try:
        if path.stat().st_size > _JSON_BYTES:
            return {}
        metadata = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(metadata, dict) or metadata.get("tokens") != tokens:
        return {}
    for name in ("max_token_id", "vocab_size"):
        value = metadata.get(name, 0)
        if type(value) is not int:
            raise DataError(f"{path}: {name} is {value!r:.80}; accepted: a whole number; {_AGAIN}.")
    made_by = metadata.get("tokenizer", {})
    if not isinstance(made_by, dict) or not all(isinstance(made_by.get(k, ""), str) for k in ("sha256", "file")):
        raise DataError(f"{path}: tokenizer is {made_by!r:.80}; accepted: an object with sha256 and file; {_AGAIN}.")
    return metadata


def _check_tokenizer(prefix: str, metadata: dict, model: Path) -> None:
    if model.is_dir():
        model = model / "tokenizer.json"
    made_by = metadata.get("tokenizer", {})
    if made_by.get("sha256") and model.is_file() and file_sha256(model) != made_by["sha256"]:
        raise DataError(
            f"{prefix}: was made with another tokenizer ({made_by.get('file')}, {metadata.get('vocab_size')} tokens)"
            f" than {model}; train with that one, or preprocess the text again with this one."
        )


def _token_range(bin_path: Path, dtype: np.dtype) -> tuple[int, int]:
    """Least and largest id of the tokens that this rank reads."""
    tokens = np.memmap(bin_path, dtype, mode="r")
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if tokens.nbytes <= SCAN_BYTES:
        return int(tokens.min()), int(tokens.max())
    width = SCAN_BYTES // _SCAN_WINDOWS // dtype.itemsize
    windows = min(_SCAN_WINDOWS * ranks, -(-len(tokens) // width))
    starts = np.linspace(0, len(tokens) - width, windows, dtype=np.int64)[rank::ranks]
    parts = [tokens[start : start + width] for start in starts]
    return min((int(part.min()) for part in parts), default=0), max((int(part.max()) for part in parts), default=0)
