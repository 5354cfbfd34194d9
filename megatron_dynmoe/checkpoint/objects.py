"""Reads the object of an archive as plain data, and what is pickled inside of it."""

import io
from collections.abc import Iterator
from typing import Any, BinaryIO

import torch

from .archive import Archive, DamagedError
from .errors import CheckpointError, NotPlainError
from .plain import OBJECT_NAMES, PlainUnpickler
from .standins import PlainTensor, Record, Storage

# Nested pickles deeper than this are nobody's data.
_DEEPEST = 8
# torch.save before zip: this number, the protocol, the machine, the object, the keys of its storages; then their bytes.
_LEGACY_MAGIC, _LEGACY_PICKLES = 0x1950A86A20F9469CFC6C, 5


def read_object(archive: Archive, *, pickles_inside: bool = False, depth: int = 0) -> Any:
    """The object, with stand-ins for what is no container, number or text.

    Args:
        archive: of torch.save.
        pickles_inside: its bytes, and its tensors of bytes, are pickles in turn, as in Transformer Engine's
            `_extra_state`; otherwise they are looked into when they begin like one.
        depth: how many pickles this one is in.

    Raises:
        NotPlainError: something that is not plain data, here or inside.
        DamagedError: no pickle, or a wrong checksum.
    """
    found = unpickle(archive.read("data.pkl"), OBJECT_NAMES)
    check_storages(archive, found)
    for raw in _bytes_in(found, archive):
        check_bytes(raw, must_be_pickle=pickles_inside, depth=depth + 1)
    return found


def unpickle(raw: bytes, names: dict[tuple[str, str], Any]) -> Any:
    """The object of one pickle.

    Raises:
        NotPlainError: a name that is not in `names`.
        DamagedError: no whole pickle.
    """
    file = io.BytesIO(raw)
    return _load(file, names)


def _load(file: BinaryIO, names: dict[tuple[str, str], Any]) -> Any:
    try:
        return PlainUnpickler(file, names).load()
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        reason = " ".join(str(error).split())
        raise DamagedError(f"is no pickle of plain data ({type(error).__name__}: {reason[:200]})") from error


def check_storages(archive: Archive, found: Any) -> None:
    """Hold the storages that an object refers to against the archive's members.

    Raises:
        DamagedError: one is not there, or has another size.
    """
    for value in _walk(found):
        if type(value) is PlainTensor:
            member, storage = archive.members.get(f"data/{value.storage.key}"), value.storage
            if member is None or (storage.dtype and member.size != storage.numel * storage.dtype.itemsize):
                raise DamagedError(f"has no data/{storage.key} of the size that its data.pkl says")


def check_bytes(raw: bytes, *, must_be_pickle: bool, depth: int) -> None:
    """Look for a pickle or an archive in bytes that a checkpoint carries.

    Raises:
        NotPlainError: there is one, and it is not plain data.
        DamagedError: it `must_be_pickle`, and is none.
    """
    if depth > _DEEPEST:
        raise NotPlainError(f"has pickles in pickles, more than {_DEEPEST} deep")
    if raw[:2] == b"PK":
        read_object(Archive(io.BytesIO(raw), 0, len(raw)), pickles_inside=must_be_pickle, depth=depth)
    elif raw and (must_be_pickle or (raw[0] == 0x80 and raw[1:2] in (b"\2", b"\3", b"\4", b"\5"))):
        try:
            _check_stream(raw, depth)
        except DamagedError:
            if must_be_pickle:
                raise


def _check_stream(raw: bytes, depth: int) -> None:
    """A pickle whose tensors are pickled in it, each as bytes in torch's format before zip (five pickles in a row)."""
    names = OBJECT_NAMES | {
        ("torch.storage", "_load_from_bytes"): _nested(depth),
        ("megatron.core.safe_globals", "safe_load_from_bytes"): _nested(depth),
        ("torch._tensor", "_rebuild_from_type_v2"): _FromType,
    }
    file = io.BytesIO(raw)
    found = _load(file, names)
    for _ in range(_LEGACY_PICKLES - 1 if found == _LEGACY_MAGIC else 0):
        for value in _bytes_in(found, None):
            check_bytes(value, must_be_pickle=False, depth=depth + 1)
        found = _load(file, names)
    for value in _bytes_in(found, None):
        check_bytes(value, must_be_pickle=False, depth=depth + 1)


class _FromType(Record):
    """A tensor that is rebuilt by one function more; only the plain one is accepted."""

    def __new__(cls, function: Any, kind: Any, args: Any, state: Any) -> "_FromType":
        raise NotPlainError("rebuilds a subclass of a tensor")


def _nested(depth: int) -> Any:
    def load(raw: Any) -> Storage:
        if type(raw) is not bytes:
            raise NotPlainError("loads a storage from something else than bytes")
        check_bytes(raw, must_be_pickle=True, depth=depth + 1)
        return Storage(None, "", 0)

    return load


def _bytes_in(found: Any, archive: Archive | None) -> Iterator[bytes]:
    """All bytes of an object: its own, its buffers', and those of its tensors of bytes."""
    for value in _walk(found):
        if isinstance(value, bytes | bytearray):
            yield bytes(value)
        elif isinstance(value, io.BytesIO):
            yield value.getvalue()
        elif archive is not None and type(value) is PlainTensor and value.storage.dtype in (torch.uint8, torch.int8):
            yield archive.read(f"data/{value.storage.key}")


def _walk(found: Any) -> Iterator[Any]:
    """An object and all that it holds."""
    todo, seen = [found], set()
    while todo:
        value = todo.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        yield value
        if isinstance(value, dict):
            todo += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple | set | frozenset):
            todo += list(value)
        if hasattr(value, "__dict__") and not isinstance(value, type):
            todo += list(vars(value).values())
