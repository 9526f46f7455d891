"""Tar archives as shards: headers written byte for byte the same each time, and members found without reading what is in them.

Source: POSIX.1-1988 ustar, with the long names and sizes of GNU tar and pax. Nothing is ever extracted, so names can't lead anywhere.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from typing import NamedTuple

from triscale.data.sources import DataError

BLOCK = 512
END = bytes(2 * BLOCK)
LONGEST_NAME = 1 << 16  # bytes of a GNU or pax header, for files that nobody vouches for
USUAL_PADDING = 20 << 10  # bytes of zeros after the end mark; writers fill up records of 10 KiB, some of 20
LARGE_RECORDS = tuple(1 << n for n in range(15, 21))  # bytes; of those that fill up larger ones the file is a multiple
_REGULAR, _GNU_NAME, _PAX = (b"0", b"\0", b"7"), b"L", b"x"


class Member(NamedTuple):
    """A regular file of an archive. offset: of its first byte in the archive. size: in bytes."""

    name: str
    offset: int
    size: int


def padded(size: int) -> int:
    """Bytes that a member's data takes: whole blocks."""
    return -(-size // BLOCK) * BLOCK


def member(name: str, data: bytes) -> bytes:
    """Header, data and padding of one file: mode 0644, owner 0, time 0. name: at most 100 ASCII bytes."""
    fields = (
        name.encode("ascii").ljust(100, b"\0"), b"0000644\0", b"0000000\0", b"0000000\0", b"%011o\0" % len(data), b"00000000000\0",
        b" " * 8, b"0", bytes(100), b"ustar\0", b"00", bytes(32 + 32), b"0000000\0", b"0000000\0", bytes(155 + 12),
    )  # fmt: skip
    head = b"".join(fields)
    head = head[:148] + b"%06o\0 " % sum(head) + head[156:]
    return b"".join((head, data, bytes(padded(len(data)) - len(data))))


def members(data: mmap.mmap | bytes, shard: str) -> Iterator[Member]:
    """The regular files of an archive, in order. Raises DataError, which names the shard and the byte, for one that is cut or corrupt."""
    at, total, name, size = 0, len(data), "", -1
    while True:
        head = data[at : at + BLOCK]
        if len(head) < BLOCK:
            raise DataError(f"{shard}: truncated at byte {total}, before the archive's end mark; fetch or pack it again")
        if not any(head):
            return _check_end(data, at, shard)
        if not is_header(head):
            what = "no tar archive (a compressed one? unpack it first)" if not at else f"corrupt at byte {at}: no tar header"
            raise DataError(f"{shard}: {what}")
        length = _size(head, shard, at) if size < 0 else size
        start, kind = at + BLOCK, head[156:157]
        if start + length > total:
            held = _text(head[:100]) or "a member"
            raise DataError(f"{shard}: truncated at byte {total}: {held} needs bytes {start} to {start + length}; fetch or pack it again")
        at = start + padded(length)
        if kind in (_GNU_NAME, _PAX):
            if length > LONGEST_NAME:
                raise DataError(f"{shard}: a name of {length} bytes at byte {start}, more than the limit of {LONGEST_NAME}")
            if kind == _GNU_NAME:
                name = _text(data[start : start + length])
            else:
                name, size = _pax(data[start : start + length], name)
            continue
        if kind in _REGULAR:
            prefix = _text(head[345:500]) if head[257:263] == b"ustar\0" else ""
            yield Member(name or f"{prefix}{'/' if prefix else ''}{_text(head[:100])}", start, length)
        name, size = "", -1


def is_header(head: bytes) -> bool:
    """Whether a block has the check sum of a member's header."""
    return len(head) == BLOCK and _octal(head[148:156]) == sum(head) - sum(head[148:156]) + 8 * ord(" ")


def _check_end(data: mmap.mmap | bytes, at: int, shard: str) -> None:
    """Raises DataError unless the zeros from `at` are an end mark and its padding: a download that broke off in a file made at full
    size beforehand, and a hole in one, have zeros too."""
    total, most = len(data), len(END) + LARGE_RECORDS[-1]
    zeros = data[at : at + most + 1]
    if kept := zeros.lstrip(b"\0"):
        what = f"zeros, then other data from byte {at + len(zeros) - len(kept)}, where a tar header should be; a hole in it, or archives joined"
        raise DataError(f"{shard}: corrupt at byte {at}: {what}; fetch or pack it again")
    if len(zeros) < len(END):
        raise DataError(f"{shard}: truncated at byte {total}, within the archive's end mark; fetch or pack it again")
    if len(zeros) > len(END) + USUAL_PADDING and not any(total % r == 0 and len(zeros) < len(END) + r for r in LARGE_RECORDS):
        raise DataError(f"{shard}: only zeros from byte {at} to its end at {total}, more than an end mark has; part of it never came: fetch it again")


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _octal(field: bytes) -> int:
    digits = field.strip(b" \0")
    return int(digits, 8) if digits and not digits.strip(b"01234567") else -1


def _size(head: bytes, shard: str, at: int) -> int:
    field = head[124:136]
    size = int.from_bytes(field[1:], "big") if field[0] == 0x80 else _octal(field)  # GNU tar's form of sizes over 8 GiB
    if size < 0:
        raise DataError(f"{shard}: corrupt at byte {at}: no size in a tar header")
    return size


def _pax(data: bytes, name: str) -> tuple[str, int]:
    """The name and size that a pax header sets for the next member; size -1 where it sets none."""
    size = -1
    while data:
        length, _, _ = data.partition(b" ")
        if not length.isdigit() or len(length) > 6 or not len(length) + 1 < int(length) <= len(data):
            break
        key, _, value = data[len(length) + 1 : int(length)].rstrip(b"\n").partition(b"=")
        if key == b"path":
            name = value.decode("utf-8", "surrogateescape")
        elif key == b"size" and value.isdigit() and len(value) < 20:
            size = int(value)
        data = data[int(length) :]
    return name, size
