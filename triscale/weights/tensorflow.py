"""TensorFlow V2 checkpoints (`NAME.index` and `NAME.data-00000-of-00001`) read without TensorFlow.

The index is a LevelDB table of BundleEntryProto messages; the data files hold the tensors' bytes. Only what these files
need is parsed, every length is checked against the file, and nothing is executed. Sources: tensorflow/core/util/
tensor_bundle and core/lib/io/table_format.txt (format), official utils.get_ema_vars (which variable has an average).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

MAGIC = 0xDB4775248B80FB57
FOOTER = 48
MAX_INDEX = 64 << 20  # bytes; the index of L2's training checkpoint is below 1 MiB
DTYPES = {1: np.dtype("<f4"), 2: np.dtype("<f8"), 3: np.dtype("<i4"), 9: np.dtype("<i8"), 19: np.dtype("<f2")}
AVERAGE = "/ExponentialMovingAverage"
SLOTS = ("/RMSProp", "/RMSProp_1", "/Momentum")


class CheckpointError(ValueError):
    """Files that are no TensorFlow checkpoint, or not a whole one. The message is one line that names the file."""


class Entry(NamedTuple):
    """Where one variable lies."""

    dtype: np.dtype
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int


def prefix_of(path: str | os.PathLike[str]) -> Path:
    """The checkpoint's prefix: `path` itself, or what `.index` or `.data-...` was appended to, or the newest in a folder."""
    path = Path(path)
    if path.is_dir():
        found = sorted(path.glob("*.index"), key=lambda p: p.stat().st_mtime)
        if not found:
            raise CheckpointError(f"{path}: no TensorFlow checkpoint (*.index) in this folder")
        path = found[-1]
    name = path.name
    return path.with_name(name[: -len(".index")] if name.endswith(".index") else name.split(".data-")[0])


def read_index(prefix: Path) -> tuple[int, dict[str, Entry]]:
    """(number of data files, variable name -> Entry). Raises CheckpointError."""
    path = prefix.with_name(prefix.name + ".index")
    try:
        if path.stat().st_size > MAX_INDEX:
            raise CheckpointError(f"{path}: {path.stat().st_size} bytes, too large for a checkpoint's index")
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None
    try:
        if len(data) < FOOTER or struct.unpack_from("<Q", data, len(data) - 8)[0] != MAGIC:
            raise CheckpointError(f"{path}: not the index of a TensorFlow checkpoint, or cut short")
        footer = data[-FOOTER:]
        _, at = _handle(footer, 0)
        index, _ = _handle(footer, at)
        entries, shards = {}, 1
        for _, handle in _block(data, *index):
            where, _ = _handle(handle, 0)
            for key, value in _block(data, *where):
                if key:
                    entries[key.decode()] = _entry(value)
                else:
                    shards = int(next((v for f, v in _fields(value) if f == 1), 1))
    except (IndexError, struct.error, UnicodeDecodeError, OverflowError) as error:
        raise CheckpointError(f"{path}: corrupt ({error})") from None
    return shards, entries


class Source(NamedTuple):
    """One variable: the name it has in the file, where it lies, and in how many data files the checkpoint is."""

    name: str
    entry: Entry
    shards: int


def variables(path: str | os.PathLike[str], *, raw: bool = False) -> tuple[Path, dict[str, Source]]:
    """The checkpoint's prefix, and its variables by name; the network's own prefix ("efficientnet-b0/"), optimiser slots and
    the step are left out.

    Where a variable has a moving average, the average is meant; raw: the variable itself. Raises CheckpointError.
    """
    prefix = prefix_of(path)
    shards, entries = read_index(prefix)
    if not 1 <= shards <= 100_000:
        raise CheckpointError(f"{prefix}.index: expected 1 to 100000 data files, found {shards}")
    out = {}
    for name in entries:
        if name != "global_step" and not name.endswith((AVERAGE, *SLOTS)):
            source = name + AVERAGE if not raw and name + AVERAGE in entries else name
            out[name.split("/", 1)[-1]] = Source(source, entries[source], shards)
    if not out:
        raise CheckpointError(f"{prefix}.index: no variables of a network in it")
    return prefix, out


def read(path: str | os.PathLike[str], *, raw: bool = False) -> dict[str, np.ndarray]:
    """Every variable of `variables`, in TensorFlow's layouts. Arrays are copies. Raises CheckpointError."""
    prefix, sources = variables(path, raw=raw)
    return {name: tensor(prefix, source) for name, source in sources.items()}


def tensor(prefix: Path, source: Source) -> np.ndarray:
    """One variable's values. Raises CheckpointError where the data file lacks them."""
    name, entry, shards = source
    path = prefix.with_name(f"{prefix.name}.data-{entry.shard:05d}-of-{shards:05d}")
    count = int(np.prod(entry.shape, dtype=object)) if entry.shape else 1
    if entry.size != count * entry.dtype.itemsize:
        raise CheckpointError(f"{prefix}.index: {name} has {entry.size} bytes for shape {entry.shape}")
    try:
        with open(path, "rb") as file:
            file.seek(entry.offset)
            data = file.read(entry.size) if entry.offset + entry.size <= os.fstat(file.fileno()).st_size else b""
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None
    if len(data) != entry.size:
        raise CheckpointError(f"{path}: cut short, {name} is not in it whole")
    return np.frombuffer(data, entry.dtype).reshape(entry.shape).copy()


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise IndexError("a number of more than 64 bits")


def _handle(data: bytes, at: int) -> tuple[tuple[int, int], int]:
    """(offset, size) of a block, and the position behind."""
    offset, at = _varint(data, at)
    size, at = _varint(data, at)
    return (offset, size), at


def _block(data: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """(key, value) pairs of a table block; keys share prefixes with the one before."""
    if offset + size + 1 > len(data) or size < 4:
        raise IndexError("a block outside the file")
    if data[offset + size] != 0:
        raise IndexError("a compressed block, which TensorFlow's checkpoints don't have")
    block = data[offset : offset + size]
    end = size - 4 - 4 * struct.unpack_from("<I", block, size - 4)[0]
    at, key = 0, b""
    while at < end:
        shared, at = _varint(block, at)
        own, at = _varint(block, at)
        length, at = _varint(block, at)
        if shared > len(key) or at + own + length > end:
            raise IndexError("an entry outside its block")
        key = key[:shared] + block[at : at + own]
        yield key, block[at + own : at + own + length]
        at += own + length


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of a protocol-buffer message: varints and fixed numbers as int, the rest as bytes."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        kind = tag & 7
        if kind == 0:
            value, at = _varint(message, at)
            yield tag >> 3, value
            continue
        if kind == 2:
            length, at = _varint(message, at)
        else:
            length = {1: 8, 5: 4}.get(kind, -1)
        if length < 0 or at + length > len(message):
            raise IndexError("a field outside its message")
        yield tag >> 3, message[at : at + length]
        at += length


def _entry(message: bytes) -> Entry:
    found = dict(_fields(message))
    dtype, shape = DTYPES.get(found.get(1, 0)), found.get(2, b"")  # type: ignore[arg-type]
    if dtype is None:
        raise IndexError(f"a tensor of TensorFlow's type {found.get(1)!r}, which no network has")
    if not isinstance(shape, bytes) or 7 in found:
        raise IndexError("a partitioned tensor")
    dims = [dict(_fields(d)).get(1, 0) for f, d in _fields(shape) if f == 2 and isinstance(d, bytes)]
    numbers = [found.get(i, 0) for i in (3, 4, 5)]
    if not all(isinstance(n, int) for n in [*numbers, *dims]):
        raise IndexError("a number that is none")
    return Entry(dtype, tuple(dims), *numbers)  # type: ignore[arg-type]
