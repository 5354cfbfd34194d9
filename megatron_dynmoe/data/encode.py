"""jsonl lines to token ids, in this process or in worker processes, always in the order of the input.

Workers get raw lines and give back arrays: decoding JSON and encoding are both theirs, and what crosses between
processes is small. They import neither torch nor Megatron and start in a fraction of a second. A batch that was
handed out but not yet collected waits in memory, so their number is bounded, and an input of any size needs the same
memory.
"""

import json
import os
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from megatron_dynmoe.data.shards import LineBatch
from megatron_dynmoe.data.tokenizers import Encoder, TokenizerFile
from megatron_dynmoe.data.workers import map_in_order

# with batches of half a megabyte: 32 MB, enough to keep workers busy while the parent imports Megatron
MAX_BATCHES_IN_FLIGHT = 64


@dataclass(frozen=True)
class EncodeJob:
    """How to encode. json_key: the field that holds the text. append_eod: end every document with the tokenizer's
    end-of-document id.
    """

    tokenizer: TokenizerFile
    json_key: str
    append_eod: bool


@dataclass(frozen=True)
class BadLine:
    """A line that gave no document, numbered from 1."""

    path: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.reason}"


@dataclass
class EncodedBatch:
    """ids: int32, all documents end to end. lengths: ids per document. text_bytes: UTF-8 bytes of their texts.
    disk_bytes: as read.
    """

    ids: np.ndarray
    lengths: list[int]
    text_bytes: int
    disk_bytes: int
    bad: list[BadLine] = field(default_factory=list)

    def documents(self) -> Iterator[np.ndarray]:
        start = 0
        for length in self.lengths:
            yield self.ids[start : start + length]
            start += length


def encode_lines(batch: LineBatch, job: EncodeJob, encoder: Encoder) -> EncodedBatch:
    """Encode the good lines of a batch, and say what is wrong with each of the others."""
    texts, bad = [], []
    for number, line in enumerate(batch.data.split(b"\n"), batch.first_line):
        try:
            texts.append(text_of(line, job.json_key))
        except ValueError as error:
            bad.append(BadLine(batch.path, number, str(error)))
    end = [encoder.eod_id] if job.append_eod else []
    documents = [np.array(ids + end, dtype=np.int32) for ids in encoder.encode_batch(texts)]
    ids = np.concatenate(documents) if documents else np.empty(0, np.int32)
    text_bytes = sum(len(text.encode()) for text in texts)
    return EncodedBatch(ids, [len(d) for d in documents], text_bytes, batch.disk_bytes, bad)


def text_of(line: bytes, key: str) -> str:
    """The text in a jsonl line. Raises ValueError, whose message is the reason, when there is none to use."""
    if not line.strip():
        raise ValueError("blank line")
    try:
        record = _loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte 0x{line[error.start]:02x} at offset {error.start})") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error})") from None
    if not isinstance(record, dict):
        raise ValueError(f"not a JSON object but {type(record).__name__}")
    if key not in record:
        raise ValueError(f"no field {key!r}")
    text = record[key]
    if not isinstance(text, str):
        raise ValueError(f"field {key!r} is {'null' if text is None else type(text).__name__}, not a string")
    if not text:
        raise ValueError(f"field {key!r} is empty")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"field {key!r} holds half of a surrogate pair") from None
    return text


def _json_loads() -> Callable[[str], object]:
    try:
        import orjson
    except ModuleNotFoundError:

        def refuse(name: str) -> None:
            raise ValueError(
                f"{name} is no JSON value"
            )  # Python's json would take NaN; a bad line is one on every machine

        return lambda text: json.loads(text, parse_constant=refuse)
    return orjson.loads


_loads = _json_loads()


def encode_all(batches: Iterable[LineBatch], job: EncodeJob, *, workers: int) -> Generator[EncodedBatch]:
    """Encode every batch with ``workers`` processes (1: in this process); results come in the order of the batches.

    Close the iterator to stop early: its workers end with it. Raises DataError when a worker dies.
    """
    if workers == 1:
        yield from map(_start(job), batches)
    else:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the workers are the parallelism
        yield from map_in_order(_start, job, batches, workers=workers, in_flight=MAX_BATCHES_IN_FLIGHT)


def _start(job: EncodeJob) -> Callable[[LineBatch], EncodedBatch]:
    """What a process needs once before it encodes: the tokenizer, loaded."""
    return partial(encode_lines, job=job, encoder=job.tokenizer.load())
