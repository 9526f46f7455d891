"""A pack against its own sums: which shard, and which image in it, isn't what was written."""

from __future__ import annotations

import hashlib
import mmap
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from triscale.data.encode import suffix
from triscale.data.index import INDEX, ROWS, Index, Rows, Shard, read_index, read_rows
from triscale.data.tar import BLOCK, END, member
from triscale.text import printable

PIECE = 1 << 24


def verify(folder: Path, progress: Callable[[int, int], None] | None = None) -> tuple[str, ...]:
    """What is wrong with the pack, a line each: none for a sound one. progress: bytes done, in all.

    Every byte of every file is read. Raises DataError where index.json or index.safetensors itself isn't as written.
    """
    index = read_index(folder / INDEX)
    rows = read_rows(folder / ROWS, index)
    total, done, out = sum(s.bytes for s in index.shards), 0, []
    for i, shard in enumerate(index.shards):
        out += _wrong(folder, shard, rows, np.flatnonzero(rows.shard == i), _first_key(index, i))
        done += shard.bytes
        if progress:
            progress(done, total)
    return tuple(out)


def _first_key(index: Index, number: int) -> int:
    """Keys count the images of a split through its shards."""
    return sum(s.samples for s in index.shards[:number] if s.split == index.shards[number].split)


def _wrong(folder: Path, shard: Shard, rows: Rows, mine: np.ndarray, key: int) -> list[str]:
    path = folder / shard.file
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size != shard.bytes:
                return [f"{path}: {size} bytes, expected {shard.bytes}"]
            if hashlib.file_digest(file, "sha256").hexdigest() == shard.sha256:
                return []
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                found = list(_wrong_samples(path, data, rows, mine, key))
    except OSError as error:
        return [f"{path}: cannot be read ({error.strerror})"]
    return found or [f"{path}: its SHA-256 is not that of the index, but every image in it is whole"]


def _wrong_samples(path: Path, data: mmap.mmap, rows: Rows, mine: np.ndarray, key: int) -> Iterator[str]:
    """Each sample whose bytes aren't those that `pack` writes for it: from its header on to the next one's."""
    end = 0
    for count, i in enumerate(mine.tolist(), key):
        start, size = int(rows.offset[i]), int(rows.size[i])
        image = data[start : start + size]
        name = printable(rows.names[i])
        if zlib.crc32(image) != rows.crc[i]:
            yield f"{path}: {name}: bytes {start} to {start + size} are not those that were packed"
            kind = ""
        else:
            kind = suffix(image)
        label = member(f"{count:08d}.cls", str(int(rows.label[i])).encode())
        expected = member(f"{count:08d}.{kind}", image)
        end = start - BLOCK + len(expected) + len(label)
        if kind and data[start - BLOCK : end] != expected + label:
            yield f"{path}: {name}: its tar headers or its label, bytes {start - BLOCK} to {end}, are not those that were packed"
    if data[end:] != END:
        yield f"{path}: its end, from byte {end} on, is not the one that was packed"
