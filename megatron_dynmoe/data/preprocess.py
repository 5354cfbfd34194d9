"""Raw jsonl shards to Megatron's indexed datasets: ``PREFIX.bin``, ``PREFIX.idx`` and a description, ``PREFIX.json``.

Files are written beside their names and renamed when complete, the index last: where there is an ``.idx``, its
dataset is whole. The output depends on the input, the tokenizer and the options only, not on the number of workers.
"""

import json
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tqdm import tqdm

from megatron_dynmoe.data.encode import BadLine, EncodedBatch, EncodeJob, encode_all
from megatron_dynmoe.data.errors import DataError
from megatron_dynmoe.data.indexed import file_sha256
from megatron_dynmoe.data.shards import expand_inputs, read_batches
from megatron_dynmoe.data.signals import signals_end_at_once, signals_held_back, sigterm_unwinds
from megatron_dynmoe.data.tokenizers import TokenizerFile

MAX_REPORTED_BAD_LINES = 20
SUFFIXES = (".bin", ".json", ".idx")  # in the order of their renaming


@dataclass
class Summary:
    """What was written, and the content of ``PREFIX.json``.

    documents, tokens: counts, end-of-document tokens included. text_bytes: UTF-8 bytes of the texts. bad_lines: how
    many were left out; bad_line_examples: the first of them, as ``file:line: reason``. tokenizer: file name, kind and
    SHA-256. max_token_id: largest id written.
    """

    inputs: list[str]
    tokenizer: dict[str, str]
    vocab_size: int
    append_eod: bool
    json_key: str
    dtype: str = ""
    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    max_token_id: int = -1
    bad_lines: int = 0
    bad_line_examples: list[str] = field(default_factory=list)


def preprocess(
    inputs: Iterable[str | Path],
    output_prefix: str | Path,
    *,
    tokenizer: TokenizerFile,
    json_key: str = "text",
    append_eod: bool = False,
    workers: int = 1,
    max_bad_lines: int | None = None,
    overwrite: bool = False,
) -> Summary:
    """Encode jsonl shards (plain, .gz, .zst) into one indexed dataset, one document a line, in the order of the input.

    inputs: files, globs or folders (see ``expand_inputs``). max_bad_lines: fail beyond so many lines that hold no
    usable text; None leaves them all out and counts them. overwrite: replace an existing dataset of that prefix.

    Raises DataError and leaves no file for: unusable options, an input that is missing, truncated or without any
    document, too many bad lines. SIGTERM and Ctrl-C also leave none.
    """
    shards, prefix = expand_inputs(inputs), str(output_prefix)
    _check_options(prefix, workers, max_bad_lines, overwrite)
    encoder = tokenizer.load()
    if append_eod and encoder.eod_id is None:
        raise DataError(
            f"{tokenizer.path}: has no end-of-document token, which --append-eod needs; use a tokenizer with one."
        )
    summary = Summary(
        inputs=[str(p) for p in shards],
        tokenizer={"file": tokenizer.path.name, "kind": tokenizer.kind, "sha256": file_sha256(tokenizer.path)},
        vocab_size=encoder.vocab_size,
        append_eod=append_eod,
        json_key=json_key,
    )
    batches = (batch for shard in shards for batch in read_batches(shard))
    job = EncodeJob(tokenizer, json_key, append_eod)
    with sigterm_unwinds(), _beside(prefix) as temporary, closing(encode_all(batches, job, workers=workers)) as encoded:
        _write(encoded, temporary, summary, sum(p.stat().st_size for p in shards), max_bad_lines)
    return summary


def _write(
    encoded: Iterator[EncodedBatch],
    files: dict[str, Path],
    summary: Summary,
    disk_bytes: int,
    max_bad_lines: int | None,
) -> None:
    builder = None
    with tqdm(
        total=disk_bytes, unit="B", unit_scale=True, desc=files[".bin"].name.partition(".bin.tmp")[0]
    ) as progress:
        try:
            for batch in encoded:
                # only now: the first batches are being encoded while Megatron is imported, which takes seconds
                builder = builder or _new_builder(files[".bin"], summary)
                for document in batch.documents():
                    builder.add_document(document, [len(document)])
                _count(batch, summary, max_bad_lines, progress)
        finally:
            if builder:
                builder.data_file.close()
    if builder is None or not summary.documents:
        example = (
            f" (the first of {summary.bad_lines} bad lines is {summary.bad_line_examples[0]})"
            if summary.bad_lines
            else ""
        )
        raise DataError(
            f"{summary.inputs[0]}: the input holds no document{example}; a line must be a JSON object with a text."
        )
    builder.finalize(str(files[".idx"]))
    files[".json"].write_text(json.dumps(asdict(summary), indent=2) + "\n", encoding="utf-8")


def _new_builder(path: Path, summary: Summary):
    with signals_end_at_once("interrupted: nothing was written"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about packages that only training would use
        from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    dtype = DType.optimal_dtype(summary.vocab_size)
    summary.dtype = dtype.__name__
    return IndexedDatasetBuilder(str(path), dtype=dtype)


def _count(batch: EncodedBatch, summary: Summary, max_bad_lines: int | None, progress: tqdm) -> None:
    summary.documents += len(batch.lengths)
    summary.tokens += len(batch.ids)
    summary.text_bytes += batch.text_bytes
    summary.max_token_id = max(summary.max_token_id, int(batch.ids.max(initial=-1)))
    for bad in batch.bad:
        _count_bad(bad, summary, max_bad_lines)
    progress.update(batch.disk_bytes)
    progress.set_postfix(documents=summary.documents, tokens=summary.tokens, bad=summary.bad_lines, refresh=False)


def _count_bad(bad: BadLine, summary: Summary, max_bad_lines: int | None) -> None:
    summary.bad_lines += 1
    if summary.bad_lines <= MAX_REPORTED_BAD_LINES:
        summary.bad_line_examples.append(str(bad))
        tqdm.write(f"left out: {bad}", file=sys.stderr)
    elif summary.bad_lines == MAX_REPORTED_BAD_LINES + 1:
        tqdm.write("left out: more lines, which are only counted", file=sys.stderr)
    if max_bad_lines is not None and summary.bad_lines > max_bad_lines:
        raise DataError(
            f"{bad}; that is bad line {summary.bad_lines}, and at most {max_bad_lines} are allowed (--max-bad-lines)."
        )


@contextmanager
def _beside(prefix: str) -> Iterator[dict[str, Path]]:
    """Temporary files by suffix; they take their names when the block succeeds, and are removed when it does not."""
    Path(prefix).parent.mkdir(parents=True, exist_ok=True)
    temporary = {suffix: Path(f"{prefix}{suffix}.tmp-{os.getpid()}") for suffix in SUFFIXES}
    try:
        yield temporary
        with signals_held_back():
            # an old index must not meet the new tokens, should this process be killed outright between two renames
            Path(prefix + ".idx").unlink(missing_ok=True)
            for suffix in SUFFIXES:
                os.replace(temporary[suffix], prefix + suffix)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)


def _check_options(prefix: str, workers: int, max_bad_lines: int | None, overwrite: bool) -> None:
    # A folder beside the files may have the prefix's name: Megatron keeps its sample indices in PREFIX/cache.
    if prefix.endswith(("/", os.sep)) or not Path(prefix).name:
        raise DataError(
            f"{prefix}: is a folder; the output prefix must end in a file name, to which .bin and .idx are added."
        )
    if workers < 1:
        raise DataError(f"workers is {workers}; it must be at least 1.")
    if max_bad_lines is not None and max_bad_lines < 0:
        raise DataError(f"max_bad_lines is {max_bad_lines}; it must be at least 0.")
    existing = [prefix + suffix for suffix in (".bin", ".idx") if Path(prefix + suffix).exists()]
    if existing and not overwrite:
        raise DataError(
            f"{existing[0]}: already exists; name another output prefix, or pass --overwrite to replace it."
        )
