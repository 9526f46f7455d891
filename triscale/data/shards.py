"""Tar shards in WebDataset layout: found, listed without reading images, fetched where they are remote, read in any order.

A sample is the members of one key, which is the name up to the first dot: KEY.jpg (or another kind of image) with KEY.cls, the
class number as text, or KEY.json with "label". What `triscale pack` has written has an index, and is not searched through.
"""

from __future__ import annotations

import glob
import itertools
import json
import mmap
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np

from triscale.data.decode import IMAGE_SUFFIXES
from triscale.data.index import INDEX, ROWS, Index, foreign_note, has_index, read_index, read_rows
from triscale.data.sources import EVALUATION, LARGEST_FILE, TRAIN, DataError, Maps, Texts, by_split, parts
from triscale.data.tar import Member, members
from triscale.text import printable

if TYPE_CHECKING:
    from triscale.data.datasets import Listing, Watch

MOST_SHARDS = 100_000
MOST_CLASSES = 1 << 20
LARGEST_LABEL = {"cls": 32, "json": 1 << 20}  # bytes
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


class Shards:
    """Images within tar files. paths, sizes: of the files. shard, offset, size: (N,), where each image lies."""

    def __init__(self, paths: Sequence[str], sizes: Sequence[int], shard: np.ndarray, offset: np.ndarray, size: np.ndarray) -> None:
        self.paths, self.sizes, self.maps = tuple(os.path.abspath(p) for p in paths), tuple(sizes), Maps()
        self.shard, self.offset, self.size = shard.astype(np.int32), offset.astype(np.int64), size.astype(np.int64)
        self.labels, self.names, self.shard_in_name = np.zeros(len(shard), np.int64), Texts(()), True

    def called(self, labels: np.ndarray, names: Texts, *, shard_in_name: bool) -> Shards:
        """With labels (N,) and names; shard_in_name: SHARD.tar/NAME is what an image is called."""
        self.labels, self.names, self.shard_in_name = np.asarray(labels, np.int64), names, shard_in_name
        return self

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, number: int) -> str:
        name = self.names[number]
        return printable(f"{os.path.basename(self.paths[int(self.shard[number])])}/{name}" if self.shard_in_name else name)

    def read(self, number: int) -> bytes:
        shard, start, size = int(self.shard[number]), int(self.offset[number]), int(self.size[number])
        if size > LARGEST_FILE:
            raise OSError(f"{self.paths[shard]}: an image of {size} bytes at byte {start}, more than the limit of {LARGEST_FILE}")
        data = self.maps.get(self.paths[shard], self.sizes[shard])[start : start + size]
        if len(data) != size:
            raise OSError(f"{self.paths[shard]}: ends at byte {start + len(data)}, within an image from {start} to {start + size}")
        return data


def is_pattern(data: str) -> bool:
    return bool(re.match(r"https?://", data)) or data.endswith((".tar", ".tar.gz", ".tgz"))


def expand(pattern: str) -> list[str]:
    """{000..146} and {a,b} written out, as the shell does. Raises DataError for more than MOST_SHARDS."""
    parts = re.split(r"\{([^{}]*)\}", pattern)
    choices: list[list[str]] = []
    for i, part in enumerate(parts):
        numbers = _RANGE.fullmatch(part) if i % 2 else None
        if numbers:
            first, last = int(numbers[1]), int(numbers[2])
            if abs(last - first) >= MOST_SHARDS:
                raise DataError(f"{pattern}: more than {MOST_SHARDS} shards")
            step = 1 if last >= first else -1
            choices.append([f"{n:0{len(numbers[1])}}" for n in range(first, last + step, step)])
        else:
            choices.append(part.split(",") if i % 2 else [part])
    out = ["".join(c) for c in itertools.islice(itertools.product(*choices), MOST_SHARDS + 1)]
    if len(out) > MOST_SHARDS:
        raise DataError(f"{pattern}: more than {MOST_SHARDS} shards")
    return out


def find_shards(data: str, watch: Watch | None = None, *, draw: bool = True) -> Listing:
    """A folder of shards or a pattern; remote ones are fetched first. Raises DataError, FetchError."""
    if data.endswith((".tar.gz", ".tgz")):
        raise DataError(f"{data}: compressed shards can't be read in any order; unpack them to .tar first (images hardly shrink)")
    if re.match(r"https?://", data):
        from triscale.data.remote import fetch_shards

        urls = [] if data.endswith("/") else expand(data)
        if urls and not urlsplit(urls[0]).path.endswith(".tar"):
            raise DataError(f"{data}: expected shards, e.g. {data.rstrip('/')}/train-{{000000..000146}}.tar, or a pack's folder with a / at its end")
        paths, notes = fetch_shards(data, urls, watch)
        return _listing(data, paths, watch, draw, notes)
    if os.path.isdir(data):
        paths = sorted(p for p in Path(data).iterdir() if p.suffix == ".tar" and not p.name.startswith("."))
        if has_index(Path(data)):
            paths = [Path(data) / s.file for s in read_index(Path(data) / INDEX).shards]
        return _listing(data, paths, watch, draw)
    paths = [Path(p) for one in expand(data) for p in (sorted(glob.glob(one)) or [one])]
    if not paths[0].exists():
        raise DataError(f"{paths[0]}: no such file or shard; expected tar files, e.g. shards/train-{{000000..000146}}.tar")
    return _listing(data, paths, watch, draw)


def _listing(data: str, paths: list[Path], watch: Watch | None, draw: bool, notes: tuple[str, ...] = ()) -> Listing:
    from triscale.data.datasets import Listing

    folder = paths[0].parent
    of_split, over = by_split(paths, data)
    index = read_index(folder / INDEX) if len({p.parent for p in paths}) == 1 and has_index(folder) else None
    notes += foreign_note(folder)
    if index is not None and {p.name for p in paths} <= {s.file for s in index.shards}:
        found = {split: _packed(folder, index, {p.name for p in part}) for split, part in of_split.items()}
        classes = index.classes
    else:
        found = {split: _scanned(part, watch) for split, part in of_split.items()}
        classes = _classes(folder, max(int(s.labels.max()) for s in found.values()) + 1)
    if len(classes) < 2:
        raise DataError(f"{data}: one class only; a classifier needs at least two")
    over += tuple(f"{split}: {len(of_split[split])} shards" for split in list(found)[2:])
    if len(found) == 1:
        train, held_out, held_out_is = parts(next(iter(found.values())), len(classes), draw)
        return Listing(data, train, held_out, classes, held_out_is, over, "shards", notes)
    split = next(s for s in EVALUATION if s in found)
    return Listing(data, found[TRAIN], found[split], classes, f"{folder.name}/{split}", over, "shards", notes)


def _packed(folder: Path, index: Index, files: set[str]) -> Shards:
    """By the index, of the shards in `files`."""
    rows = read_rows(folder / ROWS, index)
    wanted = np.isin(rows.shard, [i for i, s in enumerate(index.shards) if s.file in files])
    numbers = np.flatnonzero(wanted)
    first, last = (int(numbers[0]), int(numbers[-1]) + 1) if len(numbers) else (0, 0)
    if last - first == len(numbers):  # one stretch, as all shards of one split are
        names = Texts.of(rows.names.data[rows.names.ends[first] : rows.names.ends[last]], rows.names.ends[first : last + 1] - rows.names.ends[first])
    else:
        names = Texts(rows.names[int(i)] for i in numbers)
    for s in (s for s in index.shards if s.file in files):
        found = os.stat(folder / s.file).st_size if os.path.isfile(folder / s.file) else None
        if found != s.bytes:
            what = "no such file" if found is None else f"truncated at byte {found}" if found < s.bytes else f"{found} bytes"
            raise DataError(f"{folder / s.file}: {what}, expected {s.bytes} bytes by its index; fetch or pack it again")
    paths, sizes = [str(folder / s.file) for s in index.shards], [s.bytes for s in index.shards]
    out = Shards(paths, sizes, rows.shard[numbers], rows.offset[numbers], rows.size[numbers])
    return out.called(rows.label[numbers], names, shard_in_name=False)


def _classes(folder: Path, count: int) -> tuple[str, ...]:
    """Of classes.txt, a name a line, else numbers."""
    path = folder / "classes.txt"
    if not path.is_file():
        return tuple(map(str, range(count)))
    names = tuple(path.read_text(encoding="utf-8").splitlines())
    if len(names) < count:
        raise DataError(f"{path}: {len(names)} names, but there is a label {count - 1}")
    return names


class _Found(NamedTuple):
    key: str
    offset: int
    size: int
    label: int


def _scanned(paths: list[Path], watch: Watch | None) -> Shards:
    """By the headers of all members: some 100,000 a second."""
    rows: list[tuple[int, _Found]] = []
    sizes = []
    for i, path in enumerate(paths):
        found, size = scan(path)
        rows += [(i, f) for f in found]
        sizes.append(size)
        if watch:
            watch("listing shards", i + 1, len(paths))
    if not rows:
        raise DataError(f"{paths[0]}: no images in it; expected members such as 000001.jpg with 000001.cls")
    columns = [np.array(c, np.int64) for c in zip(*((i, f.offset, f.size, f.label) for i, f in rows), strict=True)]
    out = Shards([str(p) for p in paths], sizes, *columns[:3])
    return out.called(columns[3], Texts(f.key for _, f in rows), shard_in_name=True)


def scan(path: Path) -> tuple[list[_Found], int]:
    """(the images of one shard, its size in bytes). Raises DataError, which names the shard and the byte or key."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if not size:
                raise DataError(f"{path}: empty file")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return list(_samples(data, str(path))), size
    except OSError as error:
        raise DataError(f"{path}: cannot be opened ({error.strerror})") from None


def _samples(data: mmap.mmap, shard: str) -> Iterator[_Found]:
    def key(m: Member) -> str:
        folder, slash, name = m.name.rpartition("/")
        return f"{folder}{slash}{name.partition('.')[0]}"

    shown = (m for m in members(data, shard) if not m.name.rpartition("/")[2].startswith("."))  # ._000001.jpg: what macOS adds
    for name, group in itertools.groupby(shown, key):
        parts = {m.name[len(name) + 1 :].lower(): m for m in group}
        image = next((m for suffix, m in parts.items() if f".{suffix}" in IMAGE_SUFFIXES), None)
        if image is not None:
            yield _Found(name, image.offset, image.size, _label(data, parts, f"{shard}: {printable(name)}"))


def _label(data: mmap.mmap, parts: dict[str, Member], where: str) -> int:
    kind = next((k for k in LARGEST_LABEL if k in parts), None)
    if kind is None:
        raise DataError(f'{where}: no label beside the image; expected KEY.cls with a class number, or KEY.json with "label"')
    found = parts[kind]
    if found.size > LARGEST_LABEL[kind]:
        raise DataError(f"{where}: .{kind} of {found.size} bytes at byte {found.offset}, more than the limit of {LARGEST_LABEL[kind]}")
    text = data[found.offset : found.offset + found.size]
    try:
        value: Any = int(text) if kind == "cls" else json.loads(text)["label"]
    except (ValueError, KeyError, TypeError, RecursionError):
        value = None
    if type(value) is not int or not 0 <= value < MOST_CLASSES:
        raise DataError(f"{where}: .{kind} at byte {found.offset} has no class number from 0, found {printable(repr(text[:40]))}")
    return value
