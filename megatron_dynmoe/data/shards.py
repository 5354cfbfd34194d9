"""Reading and writing jsonl shards: plain, ``.gz`` and ``.zst``.

A shard is one JSON object a line. Compressed shards are read in a stream, and a stream that ends before its own end
marker is an error: both python-zstandard's ``stream_reader`` and fsspec return what there was and say nothing, which
silently loses the rest of the shard. So frames are decoded here by hand, and the decoder is asked whether it reached
the end of its frame.
"""

import glob
import gzip
import os
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from megatron_dynmoe.data.errors import DataError

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
HELDOUT = "heldout-"
_READ_BYTES = 1 << 18


@dataclass(frozen=True)
class LineBatch:
    """Consecutive whole lines of one shard, still undecoded.

    path: the shard. first_line: number of the first line, from 1. data: the lines, joined by their newlines.
    disk_bytes: bytes of the file on disk read for this batch; over a whole file they sum to its size.
    """

    path: str
    first_line: int
    data: bytes
    disk_bytes: int


def expand_inputs(inputs: Iterable[str | Path]) -> list[Path]:
    """The shards that files, globs and folders name, in a fixed order and each once.

    A folder stands for every ``.jsonl``, ``.jsonl.gz`` and ``.jsonl.zst`` below it, links followed, **except held-out
    shards** (``heldout-*``), so that handing over a whole corpus cannot train on them; a glob or a file that names them
    does get them.

    Raises DataError when an input matches nothing, or where a shard's name stands on something that is no file: a pipe,
    a device, a link that leads nowhere, a folder without shards.
    """
    found: dict[Path, None] = {}
    for item in inputs:
        path = Path(item)
        if path.is_dir():
            shards = _shards_below(path)
            if not shards:
                raise DataError(
                    f"{item}: the folder holds no training shard; expected files ending in {', '.join(SUFFIXES)}."
                )
        elif os.path.lexists(path):
            shards = [path]
        else:
            shards = [Path(p) for p in sorted(glob.glob(str(item), recursive=True))]
            shards = [p for p in shards if not p.is_dir() or p.name.endswith(SUFFIXES)]
            if not shards:
                raise DataError(
                    f"{item}: no such file; give a jsonl file, a glob that matches some, or a folder of them."
                )
        for shard in shards:
            _check_file(shard)
        found.update(dict.fromkeys(shards))
    return list(found)


def _shards_below(root: Path) -> list[Path]:
    """What has a shard's name below ``root``, whatever it is; a folder only if it holds no shard itself."""
    named: list[Path] = []
    seen: set[tuple[int, int]] = set()
    for folder, folders, files in os.walk(root, followlinks=True, onerror=_unreadable):
        here = os.stat(folder)
        if (here.st_dev, here.st_ino) in seen:  # a link to a folder above it
            folders.clear()
            continue
        seen.add((here.st_dev, here.st_ino))
        named += [Path(folder, n) for n in [*files, *folders] if n.endswith(SUFFIXES) and not n.startswith(HELDOUT)]
    return sorted(p for p in named if not (p.is_dir() and any(p in other.parents for other in named)))


def _unreadable(error: OSError) -> None:
    raise DataError(f"{error.filename}: the folder cannot be read ({error.strerror}); accepted: a readable one.")


def _check_file(path: Path) -> None:
    """Raises DataError for what is no file, or would block a reader: opening a named pipe waits for a writer."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        where = f" (a link to {os.readlink(path)})" if path.is_symlink() else ""
        raise DataError(f"{path}: cannot be read{where}: {error.strerror}; accepted: a file.") from None
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFIFO: "a named pipe", stat.S_IFDIR: "a folder without shards", stat.S_IFSOCK: "a socket"}
        raise DataError(f"{path}: is {kinds.get(stat.S_IFMT(mode), 'a device')}; accepted: a file.")


def open_shard(path: Path):
    """Open a shard for writing, compressed as its suffix says (gzip without a time stamp: same content, same bytes)."""
    if path.name.endswith(".zst"):
        return _zstandard(path).ZstdCompressor(level=3).stream_writer(path.open("wb"))
    if path.name.endswith(".gz"):
        return gzip.GzipFile(path, "wb", compresslevel=6, mtime=0)
    return path.open("wb")


def read_batches(path: Path, *, batch_bytes: int = 1 << 19) -> Iterator[LineBatch]:
    """Whole lines of a shard in batches of about ``batch_bytes`` bytes; a longer line is a batch of its own.

    Raises DataError when a shard cannot be read, or a compressed one is cut short or damaged.
    """
    try:
        yield from _read_batches(path, batch_bytes)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); accepted: a readable file.") from None


def _read_batches(path: Path, batch_bytes: int) -> Iterator[LineBatch]:
    with path.open("rb") as raw:
        pending: list[bytes] = []
        size, first_line, told = 0, 1, 0
        for block in _decompressed(raw, path):
            pending.append(block)
            size += len(block)
            if size < batch_bytes or b"\n" not in block:
                continue
            lines, _, rest = b"".join(pending).rpartition(b"\n")
            yield LineBatch(str(path), first_line, lines, raw.tell() - told)
            told = raw.tell()
            first_line += lines.count(b"\n") + 1
            pending, size = [rest], len(rest)
        last = b"".join(pending)
        if last:
            yield LineBatch(str(path), first_line, last.removesuffix(b"\n"), raw.tell() - told)


def read_lines(path: Path) -> Iterator[bytes]:
    """The lines of a shard, without their newlines. Raises DataError as ``read_batches`` does."""
    for batch in read_batches(path):
        yield from batch.data.split(b"\n")


def _decompressed(raw: BinaryIO, path: Path) -> Iterator[bytes]:
    if path.name.endswith(".zst"):
        return _zstd_blocks(raw, path)
    if path.name.endswith(".gz"):
        return _gzip_blocks(raw, path)
    return iter(lambda: raw.read(_READ_BYTES), b"")


def _gzip_blocks(raw: BinaryIO, path: Path) -> Iterator[bytes]:
    # wbits 31: a gzip header and trailer, whose checksum and length zlib verifies
    return _frames(raw, path, lambda: zlib.decompressobj(wbits=31), zlib.error, "gzip")


def _zstd_blocks(raw: BinaryIO, path: Path) -> Iterator[bytes]:
    zstandard = _zstandard(path)
    # frames written with --long declare windows beyond the default limit
    decoder = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    return _frames(raw, path, decoder.decompressobj, zstandard.ZstdError, "zstd")


def _frames(raw: BinaryIO, path: Path, new_frame: Callable, damage: type[Exception], name: str) -> Iterator[bytes]:
    """Decode concatenated frames; both zlib's and zstandard's decompressobj tell ``eof`` and leave ``unused_data``."""
    frame, ended = new_frame(), False
    while block := raw.read(_READ_BYTES):
        while block:
            if ended:
                frame = new_frame()
            try:
                text = frame.decompress(block)
            except damage as error:
                raise DataError(
                    f"{path}: the {name} stream is damaged ({error}); copy or write the file again."
                ) from None
            ended, block = frame.eof, frame.unused_data if frame.eof else b""
            if text:
                yield text
    if not ended:
        raise DataError(
            f"{path}: the {name} stream is truncated, it ends before its end marker; copy or write the file again."
        )


def _zstandard(path: Path):
    try:
        import zstandard
    except ModuleNotFoundError:
        raise DataError(
            f"{path}: a .zst file needs the package zstandard, which is not installed; use .jsonl or .gz."
        ) from None
    return zstandard
