"""The zip archives of torch.save, read strictly: what another reader could understand differently is refused.

Torch looks for an archive's directory from the end and for members by name, whatever lies between; a file made by hand
can therefore show one thing to a check and another to torch. What torch.save writes has one form: members one after
the other from the first byte, stored, each with its checksum behind it, then the directory, then the end. Only that is
accepted, with the members that a plain archive has; TorchScript's (`constants.pkl`, `code/`) are not among them.
"""

import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from .errors import CheckpointError, NotPlainError

_END, _END64, _LOCATOR = struct.Struct("<4s4H2LH"), struct.Struct("<4sQ2H2L4Q"), struct.Struct("<4sLQL")
_ENTRY, _LOCAL = struct.Struct("<4s6H3L5H2L"), struct.Struct("<4s5H3L2H")
_MEMBER = re.compile(
    r"data\.pkl|data/\d+|version|byteorder|\.format_version|\.storage_alignment|\.data/serialization_id"
)
_BLOCK = 1 << 24


class DamagedError(CheckpointError):
    """Bytes that are not what was written."""


@dataclass(frozen=True)
class Member:
    """A member of an archive: where its bytes begin in the file, how many they are, their checksum."""

    start: int
    size: int
    crc: int


class Archive:
    """One archive in `file`, which may hold others.

    Args:
        file: binary, seekable.
        start, length: of the archive.

    Raises:
        DamagedError: it has not the form that torch.save gives.
        NotPlainError: it has members that a plain archive has not.
    """

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        self._file, self._start, self._length = file, start, length
        self.members = dict(self._members())
        if "data.pkl" not in self.members:
            raise DamagedError("has no data.pkl")

    def read(self, name: str) -> bytes:
        """The bytes of a member, checked."""
        member = self.members[name]
        raw = self._bytes(member.start, member.size)
        if zlib.crc32(raw) != member.crc:
            raise DamagedError(f"has a wrong checksum of {name}")
        return raw

    def verify(self) -> None:
        """Hold every member against its checksum.

        Raises:
            DamagedError: one does not agree.
        """
        block = bytearray(min(_BLOCK, self._length))
        for name, member in self.members.items():
            crc, left = 0, member.size
            self._file.seek(self._start + member.start)
            while left:
                got = self._file.readinto(memoryview(block)[: min(left, len(block))])  # type: ignore[attr-defined]
                if not got:
                    raise DamagedError(f"ends within {name}")
                crc, left = zlib.crc32(memoryview(block)[:got], crc), left - got
            if crc != member.crc:
                raise DamagedError(f"has a wrong checksum of {name}")

    def _bytes(self, start: int, size: int) -> bytes:
        if not 0 <= start <= start + size <= self._length:
            raise DamagedError("is cut off")
        self._file.seek(self._start + start)
        raw = self._file.read(size)
        if len(raw) != size:
            raise DamagedError("is cut off")
        return raw

    def _unpack(self, form: struct.Struct, start: int, signature: bytes) -> tuple[Any, ...]:
        fields = form.unpack(self._bytes(start, form.size))
        if fields[0] != signature:
            raise DamagedError("is no archive of torch.save")
        return fields[1:]

    def _members(self) -> Iterator[tuple[str, Member]]:
        count, size, directory = self._directory()
        raw, position, at, seen, prefix = self._bytes(directory, size), 0, 0, set(), None
        for _ in range(count):
            path, crc, length, offset, position = _entry(raw, position)
            folder, _, name = path.partition("/")
            prefix = folder if prefix is None else prefix
            if not _MEMBER.fullmatch(name) or folder != prefix or name in seen:
                raise NotPlainError(f"has the member {path!r}, which plain data has not")
            seen.add(name)
            if offset != at:
                raise DamagedError("has gaps between its members")
            start, described = self._member_start(offset, path)
            if described or length or crc:  # an empty member may go without
                at = self._member_end(start, length, crc, wide=max(length, offset) >= 0xFFFFFFFF)
            else:
                at = start
            yield name, Member(start, length, crc)
        if position != size or at != directory:
            raise DamagedError("has a directory that does not fit")

    def _directory(self) -> tuple[int, int, int]:
        """Number of entries, bytes and place of the directory: the last thing but the ends."""
        end = self._length - _END.size
        disk, disk2, count, total, size, offset, comment = self._unpack(_END, end, b"PK\x05\x06")
        locator = end - _LOCATOR.size
        disk64, at, disks = self._unpack(_LOCATOR, locator, b"PK\x06\x07")
        end64 = locator - _END64.size
        rest = self._unpack(_END64, end64, b"PK\x06\x06")
        count64, total64, size64, offset64 = rest[5:]
        short = all(
            a in (b, limit)
            for a, b, limit in [
                (count, count64, 0xFFFF),
                (total, count64, 0xFFFF),
                (size, size64, 0xFFFFFFFF),
                (offset, offset64, 0xFFFFFFFF),
            ]
        )
        plain = (disk, disk2, comment, disk64, disks, rest[0]) == (0, 0, 0, 0, 1, _END64.size - 12)
        if not (short and plain and at == end64 and total64 == count64 and offset64 + size64 == end64):
            raise DamagedError("has an end that does not fit")
        return count64, size64, offset64

    def _member_start(self, offset: int, path: str) -> tuple[int, bool]:
        """Where a member's bytes begin, and whether its size and checksum follow them."""
        _, flags, method, *_, name_size, extra = self._unpack(_LOCAL, offset, b"PK\x03\x04")
        start = offset + _LOCAL.size + name_size
        if self._bytes(start - name_size, name_size) != path.encode() or method != 0 or flags & ~0x808:
            raise DamagedError(f"has another name or form for {path} than its directory says")
        return start + extra, bool(flags & 8)

    def _member_end(self, start: int, size: int, crc: int, *, wide: bool) -> int:
        """Behind the checksum that follows a member; its sizes are `wide` (64 bits) from 4 GiB on."""
        form = struct.Struct("<4sLQQ" if wide else "<4sLLL")
        if self._unpack(form, start + size, b"PK\x07\x08") != (crc, size, size):
            raise DamagedError("has a member whose size or checksum is told in two ways")
        return start + size + form.size


def _entry(raw: bytes, position: int) -> tuple[str, int, int, int, int]:
    """Path, checksum, size and offset of the directory's entry at `position`, and where the next one begins."""
    if len(raw) < position + _ENTRY.size:
        raise DamagedError("has a directory that is cut off")
    signature, _, _, flags, method, _, _, crc, packed, size, name, extra, comment, disk, _, _, offset = (
        _ENTRY.unpack_from(raw, position)
    )
    at = position + _ENTRY.size
    if signature != b"PK\x01\x02" or method or comment or disk or flags & ~0x808:
        raise DamagedError("has an entry of another form than torch.save's")
    more = iter(_zip64(raw[at + name : at + name + extra]))
    sizes = [next(more, -1) if field == 0xFFFFFFFF else field for field in (size, packed, offset)]
    if sizes[0] != sizes[1] or min(sizes) < 0:
        raise DamagedError("has a member that is compressed")
    return raw[at : at + name].decode("utf-8", "replace"), crc, sizes[0], sizes[2], at + name + extra


def _zip64(extra: bytes) -> list[int]:
    """The 64-bit numbers of a directory entry, in the order of the fields that overflow."""
    if not extra:
        return []
    if len(extra) < 4:
        raise DamagedError("has an entry with a field that is cut off")
    kind, size = struct.unpack_from("<HH", extra)
    if kind != 1 or size != len(extra) - 4 or size % 8:
        raise DamagedError("has an entry with a field that torch.save does not write")
    return list(struct.unpack_from(f"<{size // 8}Q", extra, 4))
