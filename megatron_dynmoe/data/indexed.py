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
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_dynmoe.data.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
# the integer codes of DType; its two float codes never hold tokens
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
SCAN_BYTES = 256 << 20
_SCAN_WINDOWS = 256
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

    prefix: path without ``.bin``/``.idx``. vocab_size: every token id must be below it; taken from ``PREFIX.json``
    where that describes this data, else from the data: all of it up to ``SCAN_BYTES``, a spread sample beyond.
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
        max_id = int(metadata["max_token_id"]) if "max_token_id" in metadata else _max_token(bin_path, dtype)
        if max_id >= vocab_size:
            raise DataError(
                f"{bin_path}: holds token {max_id}, but the vocabulary has {vocab_size} tokens;"
                " train with the tokenizer that made the data."
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
    """PREFIX.json if it describes these tokens; one of other data left behind says nothing."""
    try:
        metadata = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return metadata if isinstance(metadata, dict) and metadata.get("tokens") == tokens else {}


def _check_tokenizer(prefix: str, metadata: dict, model: Path) -> None:
    if model.is_dir():
        model = model / "tokenizer.json"
    made_by = metadata.get("tokenizer", {})
    if made_by.get("sha256") and model.is_file() and file_sha256(model) != made_by["sha256"]:
        raise DataError(
            f"{prefix}: was made with another tokenizer ({made_by.get('file')}, {metadata.get('vocab_size')} tokens)"
            f" than {model}; train with that one, or preprocess the text again with this one."
        )


def _max_token(bin_path: Path, dtype: np.dtype) -> int:
    tokens = np.memmap(bin_path, dtype, mode="r")
    if tokens.nbytes <= SCAN_BYTES:
        return int(tokens.max())
    width = SCAN_BYTES // _SCAN_WINDOWS // dtype.itemsize
    starts = np.linspace(0, len(tokens) - width, _SCAN_WINDOWS, dtype=np.int64)
    return max(int(tokens[start : start + width].max()) for start in starts)
