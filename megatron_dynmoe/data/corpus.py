"""Collect a corpus from this machine as RedPajama-style shards, with documents held out for evaluation.

``OUT/{code,docs}/train-00000.jsonl`` and so on, ``OUT/{code,docs}/heldout-00000.jsonl``, ``OUT/manifest.json``; a
line is ``{"text": ..., "meta": {"source", "path", "subset", "sha256"}}``. Documents with equal text are taken once.
The text's own hash says whether a document is held out, so the split does not move when packages come or go, and no
text is ever on both sides.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from megatron_dynmoe.data.errors import DataError
from megatron_dynmoe.data.shards import open_shard
from megatron_dynmoe.data.signals import signals_held_back, sigterm_unwinds
from megatron_dynmoe.data.sources import CODE, DOCS, Document, find_documents

SUBSETS = (CODE, DOCS)
TRAIN, HELD_OUT = "train", "heldout"
MANIFEST = "manifest.json"


@dataclass
class SplitCounts:
    """documents: lines written. text_bytes: UTF-8 bytes of their texts. shards: file names."""

    documents: int = 0
    text_bytes: int = 0
    shards: list[str] = field(default_factory=list)


def is_held_out(text: str, percent: float) -> bool:
    """Whether the text falls among the ``percent`` of all texts held out; a function of the text alone."""
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8], "big") < percent / 100 * 2**64


def collect(
    output: str | Path,
    *,
    megabytes: float = 24.0,
    heldout_percent: float = 1.0,
    shard_megabytes: float = 4.0,
    compressed: tuple[str, ...] = (),
    overwrite: bool = False,
) -> dict:
    """Write the corpus folder and return its manifest.

    megabytes: limit of training text of each subset, in millions of UTF-8 bytes. heldout_percent: part of the
    documents kept out of training. compressed: subsets written as ``.jsonl.zst``. Everything is written to a folder
    beside ``output`` and renamed at the end.

    Raises DataError for an impossible setting, or when ``output`` holds something and ``overwrite`` is false.
    """
    output = Path(output)
    _check(output, megabytes, heldout_percent, compressed, overwrite)
    with sigterm_unwinds(), _beside(output) as folder:
        writers = {
            subset: _SubsetWriter(
                folder / subset, shard_megabytes * 1e6, ".jsonl.zst" if subset in compressed else ".jsonl"
            )
            for subset in SUBSETS
        }
        _fill(writers, limit=int(megabytes * 1e6), heldout_percent=heldout_percent)
        manifest = {
            "heldout_percent": heldout_percent,
            "subsets": {name: {s: asdict(c) for s, c in w.close().items()} for name, w in writers.items()},
        }
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    return manifest


def _fill(writers: dict[str, "_SubsetWriter"], *, limit: int, heldout_percent: float) -> None:
    wanted, seen = set(writers), set()
    with tqdm(total=limit * len(writers), unit="B", unit_scale=True, desc="collecting text") as progress:
        for document in find_documents(wanted=wanted):
            digest = hashlib.sha256(document.text.encode()).hexdigest()
            if digest in seen or document.subset not in wanted:
                continue
            seen.add(digest)
            split = HELD_OUT if is_held_out(document.text, heldout_percent) else TRAIN
            writer = writers[document.subset]
            size = writer.add(document, digest, split)
            if split == TRAIN:
                progress.update(size)
            if writer.counts[TRAIN].text_bytes >= limit:
                wanted.discard(document.subset)


class _SubsetWriter:
    """The shards of one subset; a shard is closed when it has reached its size."""

    def __init__(self, folder: Path, shard_bytes: float, suffix: str) -> None:
        folder.mkdir()
        self.folder, self.shard_bytes, self.suffix = folder, shard_bytes, suffix
        self.counts = {TRAIN: SplitCounts(), HELD_OUT: SplitCounts()}
        self.streams: dict[str, BinaryIO] = {}
        self.room = {TRAIN: 0.0, HELD_OUT: 0.0}

    def add(self, document: Document, digest: str, split: str) -> int:
        meta = {"source": document.source, "path": document.path, "subset": document.subset, "sha256": digest}
        line = json.dumps({"text": document.text, "meta": meta}, ensure_ascii=False).encode() + b"\n"
        if self.room[split] <= 0:
            self._next_shard(split)
        self.streams[split].write(line)
        self.room[split] -= len(line)
        size = len(document.text.encode())
        self.counts[split].documents += 1
        self.counts[split].text_bytes += size
        return size

    def _next_shard(self, split: str) -> None:
        if split in self.streams:
            self.streams[split].close()
        name = f"{split}-{len(self.counts[split].shards):05d}{self.suffix}"
        self.counts[split].shards.append(name)
        self.streams[split] = open_shard(self.folder / name)
        self.room[split] = self.shard_bytes

    def close(self) -> dict[str, SplitCounts]:
        for stream in self.streams.values():
            stream.close()
        return self.counts


@contextmanager
def _beside(output: Path) -> Iterator[Path]:
    """A folder next to ``output`` that takes its place when the block succeeds, and is gone when it does not."""
    output.parent.mkdir(parents=True, exist_ok=True)
    folder = output.with_name(f"{output.name}.tmp-{os.getpid()}")
    folder.mkdir()
    try:
        yield folder
        old = output.with_name(f"{output.name}.old-{os.getpid()}")
        with signals_held_back():
            if output.exists():
                os.replace(output, old)
            os.replace(folder, output)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _check(
    output: Path, megabytes: float, heldout_percent: float, compressed: tuple[str, ...], overwrite: bool
) -> None:
    if not megabytes > 0:
        raise DataError(f"megabytes is {megabytes}; it must be above 0.")
    if not 0 <= heldout_percent < 100:
        raise DataError(f"heldout_percent is {heldout_percent}; it must be at least 0 and below 100.")
    if unknown := set(compressed) - set(SUBSETS):
        raise DataError(f"no subset is called {', '.join(sorted(unknown))}; there are {', '.join(SUBSETS)}.")
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not (output / MANIFEST).is_file():  # a mistyped --output must not cost anyone a folder
        raise DataError(f"{output}: holds something that is not a corpus; name a new or empty folder.")
    if not overwrite:
        raise DataError(f"{output}: already holds a corpus; name another folder, or pass --overwrite to replace it.")
