"""The index of a pack: which shards there are, their check sums, and where in them each image lies.

`index.json` tells of the shards and is for people too; `index.safetensors` has a row for each image. The sum in each covers the
next: index.json's own, of index.safetensors, of each shard; and each image has a CRC-32.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from triscale.data.sources import DataError, Texts
from triscale.text import printable

FORMAT = 1
INDEX, ROWS = "index.json", "index.safetensors"
LIMITS = {INDEX: 1 << 28, ROWS: 1 << 34}  # bytes; a billion images have more rows than this
MOST_BYTES = 1 << 50  # of a shard: a petabyte
SPLITS = ("train", "val")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_NUMBERS = {"shard": np.int32, "offset": np.int64, "size": np.int64, "label": np.int32, "crc": np.uint32}


@dataclass(frozen=True)
class Shard:
    """One archive of a pack. split: train or val. samples, bytes: how many. sha256: of the whole file."""

    file: str
    split: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Rows:
    """Of each image: which shard, its first byte there and its size, class, CRC-32 of the image file; and what it was called."""

    shard: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    label: np.ndarray
    crc: np.ndarray
    names: Texts

    def __len__(self) -> int:
        return len(self.shard)


@dataclass(frozen=True)
class Index:
    """about: the settings that the pack was made with. left_out: why each unreadable image was."""

    about: dict[str, Any]
    classes: tuple[str, ...]
    held_out_is: str
    shards: tuple[Shard, ...]
    left_out: tuple[str, ...]
    rows_sha256: str


def index_text(index: Index) -> str:
    """index.json: the same index gives the same bytes."""
    body = {"format": FORMAT, "about": index.about, "classes": list(index.classes), "held_out_is": index.held_out_is}
    body |= {"rows": {"file": ROWS, "sha256": index.rows_sha256}, "shards": [asdict(s) for s in index.shards], "left_out": list(index.left_out)}
    return json.dumps({**body, "sha256": _sum(body)}, indent=1) + "\n"


def _sum(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def write_rows(path: Path, rows: Rows) -> str:
    """Writes index.safetensors at `path`; returns its SHA-256."""
    from safetensors.numpy import save

    arrays = {name: np.ascontiguousarray(getattr(rows, name), kind) for name, kind in _NUMBERS.items()}
    data = save({**arrays, "names": np.ascontiguousarray(rows.names.data), "name_ends": rows.names.ends})
    path.write_bytes(data)
    return hashlib.sha256(data).hexdigest()


def has_index(folder: Path) -> bool:
    """Whether the folder is a pack's, by its index.json, however damaged: other programs have files of this name too."""
    if not (folder / INDEX).is_file():
        return False
    return (folder / ROWS).is_file() or _seems_index(folder / INDEX)


def foreign_note(folder: Path) -> tuple[str, ...]:
    """What to tell of an index.json that isn't a pack's."""
    there = (folder / INDEX).is_file() and not has_index(folder)
    return (printable(f"{folder / INDEX} is ignored: it is no index of a pack"),) if there else ()


def _seems_index(path: Path) -> bool:
    try:
        found = json.loads(_bytes(path))
    except (ValueError, RecursionError):  # DataError is one
        return False
    return isinstance(found, dict) and {"format", "shards"} <= found.keys()


def read_index(path: Path) -> Index:
    """index.json. Raises DataError for anything else, and for one that was changed."""
    try:
        found = json.loads(_bytes(path))
        body = {k: v for k, v in found.items() if k != "sha256"}
        if body["format"] != FORMAT:
            raise DataError(f"{path}: format {body['format']!r}, this version reads {FORMAT}; get a newer triscale, or pack again")
        if found["sha256"] != _sum(body):
            raise DataError(f"{path}: its check sum is wrong: a byte of it has changed; fetch or pack it again")
        shards = tuple(Shard(**s) for s in body["shards"])
        if not shards:
            raise ValueError("no shards")
        if not all(_sound(s) for s in shards) or body["rows"]["file"] != ROWS:
            raise ValueError("names or sizes that no pack has")
        classes, left_out = (tuple(_shown(str(text)) for text in body[name]) for name in ("classes", "left_out"))
        return Index(dict(body["about"]), classes, printable(str(body["held_out_is"])), shards, left_out, str(body["rows"]["sha256"]))
    except DataError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise DataError(f"{path}: no index of a pack ({' '.join(str(error).split())[:100]}); delete it if it is something else") from None


def _sound(shard: Shard) -> bool:
    """A plain file name in the index's own folder, and sizes that a file may have."""
    plain = (
        isinstance(shard.file, str)
        and shard.file.endswith(".tar")
        and Path(shard.file).name == shard.file
        and "\\" not in shard.file
        and shard.file.isprintable()
    )
    numbers = all(type(n) is int and 0 <= n <= MOST_BYTES for n in (shard.samples, shard.bytes))
    return plain and numbers and isinstance(shard.sha256, str) and shard.split in SPLITS


def _shown(text: str) -> str:
    """Without control characters, which steer terminals; a class may be called anything else."""
    return _CONTROL.sub(lambda found: printable(found[0]), text)


def read_rows(path: Path, index: Index) -> Rows:
    """index.safetensors, checked against `index`: every image within its shard, every label with a class. Raises DataError."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    data = _bytes(path)
    if hashlib.sha256(data).hexdigest() != index.rows_sha256:
        raise DataError(f"{path}: its check sum is not that in {INDEX}: a byte of it has changed; fetch or pack it again")
    try:
        arrays = load(data)
        numbers = {name: arrays[name].astype(np.int64 if name != "crc" else np.uint32) for name in _NUMBERS}
        rows = Rows(**numbers, names=Texts.of(arrays["names"], arrays["name_ends"]))
        _check(rows, index)
    except (SafetensorError, KeyError, ValueError, IndexError, TypeError) as error:
        raise DataError(f"{path}: no rows of a pack's index ({' '.join(str(error).split())[:100]})") from None
    return rows


def _check(rows: Rows, index: Index) -> None:
    count = sum(s.samples for s in index.shards)
    sizes = np.array([s.bytes for s in index.shards], np.int64)
    if not all(a.shape == (count,) for a in (rows.shard, rows.offset, rows.size, rows.label, rows.crc)) or rows.names.ends.shape != (count + 1,):
        raise ValueError(f"expected {count} rows")
    if count and (rows.shard.min() < 0 or rows.shard.max() >= len(sizes) or np.any(np.diff(rows.shard) < 0)):
        raise ValueError("a row of a shard that isn't there")
    if count and (min(rows.offset.min(), rows.size.min()) < 0 or np.any(rows.size > sizes[rows.shard] - rows.offset)):
        raise ValueError("an image outside its shard")
    if count and (rows.label.min() < 0 or rows.label.max() >= len(index.classes)):
        raise ValueError("a label without a class")
    ends = rows.names.ends
    if rows.names.data.dtype != np.uint8 or ends.dtype != np.int64 or ends[0] or ends[-1] != len(rows.names.data) or np.any(np.diff(ends) < 0):
        raise ValueError("names that overlap")


def _bytes(path: Path) -> bytes:
    try:
        if path.stat().st_size > LIMITS[path.name]:
            raise DataError(f"{path}: {path.stat().st_size} bytes, more than the limit of {LIMITS[path.name]}")
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
