"""A data set as tar shards with an index, made once: `triscale pack`.

The folder holds train-000000.tar and so on, val-000000.tar and so on, index.json and index.safetensors (`data/index.py`). Any
WebDataset reader reads the shards: KEY.jpg or KEY.png, and KEY.cls with the class number. Training images are shuffled once, by
a generator of fixed seed, so that a reader that streams sees all classes mixed.

A source counts as the same by the names, labels and sizes of its images, in order; their times are not asked, which copying changes.
The same images, settings and version of Pillow give the same bytes, with any number of workers and however often it was stopped:
what is done is kept shard by shard in `.packing`, which is gone at the end.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL
from PIL import features

from triscale.data.cache import locked
from triscale.data.decode import BadImage
from triscale.data.encode import encoded_as, suffix
from triscale.data.index import INDEX, ROWS, Index, Rows, Shard, index_text, read_index, write_rows
from triscale.data.pool import encode_all
from triscale.data.shards import Shards
from triscale.data.sources import DataError, Folder, Joined, Slices, Subset, Texts
from triscale.data.tar import BLOCK, END, member
from triscale.files import write_text

if TYPE_CHECKING:
    from triscale.data.datasets import Listing
    from triscale.data.samples import Samples

WORK = ".packing"
PARTS = ("train", "val")
MOST_TOLD = 100_000  # unreadable images that the index lists
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Packing:
    """short_side: pixels that larger images are resized to, 0: none are. quality: of their JPEG. shard_size: bytes that a shard
    stays under, unless one image has more."""

    short_side: int = 256
    quality: int = 90
    shard_size: int = 256_000_000

    def __post_init__(self) -> None:
        for name, low, high in (("short_side", 0, 1 << 14), ("quality", 1, 100), ("shard_size", 1 << 12, 1 << 36)):
            value = getattr(self, name)
            if type(value) is not int or not low <= value <= high:
                raise ValueError(f"pack: {name}: expected a whole number from {low} to {high}, found {value!r}")


@dataclass
class _Work:
    """A shard that is being written, or was. rows: (offset, size, label, CRC-32, name). next: the place in the order after it."""

    file: str
    rows: list[list[Any]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    next: int = 0
    bytes: int = 0
    sha256: str = ""


def pack(listing: Listing, out: Path, packing: Packing, *, workers: int = 1, progress: Progress | None = None) -> Index:
    """Writes the pack of `listing` at `out`, or goes on with it, or finds it done; returns its index, which tells what was left out.

    progress: images done, in all. Raises DataError where none of a part can be read, the folder is another pack's, or the disk
    is full; whole shards stay, and the same call goes on.
    """
    about = _about(listing, packing)
    _refuse(out, about)
    if (out / INDEX).is_file():
        shutil.rmtree(out / WORK, ignore_errors=True)
        return _whole(out)
    with locked(out / WORK / "pack", "give another folder"):
        if (out / INDEX).is_file():  # by another process, while this one waited for it
            shutil.rmtree(out / WORK, ignore_errors=True)
            return read_index(out / INDEX)
        try:
            _sweep(out)  # of a process that was killed
            write_text(out / WORK / "about.json", json.dumps(about))
            done: dict[str, list[_Work]] = {}
            total, before = len(listing.train) + len(listing.held_out), 0
            for part, samples in zip(PARTS, (listing.train, listing.held_out), strict=True):
                tick = (lambda n, before=before: progress(before + n, total)) if progress else None
                done[part] = list(_shards(part, samples, out, packing, workers, tick))
                before += len(samples)
                if len(samples) and not any(work.rows for work in done[part]):
                    raise DataError(f"{listing.data}: no image of {len(samples)} can be read; the first: {done[part][0].left_out[0]}")
            index = _finish(listing, out, about, done)
        except OSError as error:
            reason = error.strerror or str(error)
            raise DataError(f"{out}: could not be written ({reason}); whole shards stay: make room, and the same command goes on") from None
        finally:  # not only in the writer: a signal may come while it opens its file
            _sweep(out)
    shutil.rmtree(out / WORK, ignore_errors=True)
    return index


def _sweep(out: Path) -> None:
    """Takes away shards that were not finished."""
    for rest in (out / WORK).glob("*.part"):
        rest.unlink(missing_ok=True)


def _whole(out: Path) -> Index:
    """Of a pack that is there. Raises DataError where a shard is missing or has another size."""
    index = read_index(out / INDEX)
    for shard in index.shards:
        path = out / shard.file
        if not path.is_file() or path.stat().st_size != shard.bytes:
            found = f"{path.stat().st_size} bytes" if path.is_file() else "no such file"
            raise DataError(f"{path}: {found}, expected {shard.bytes} bytes; take it from a copy, or delete {out} and pack again")
    return index


def _about(listing: Listing, packing: Packing) -> dict[str, Any]:
    """What the bytes depend on."""
    digest = hashlib.sha256(json.dumps(listing.classes).encode())
    for samples in (listing.train, listing.held_out):
        digest.update(samples.labels.tobytes())
        digest.update(np.array([_size(samples, i) for i in range(len(samples))], np.int64).tobytes())
        digest.update("\n".join(map(samples.name, range(len(samples)))).encode("utf-8", "surrogateescape"))
    turbo = features.version("libjpeg_turbo")
    library = f"Pillow {PIL.__version__}, {'libjpeg-turbo' if turbo else 'libjpeg'} {turbo or features.version('jpg')}"
    encoder = encoded_as(packing.short_side)
    return {**asdict(packing), "images": digest.hexdigest(), "encoder": f"{encoder}, {library}" if packing.short_side else encoder}


def _size(samples: Samples, number: int) -> int:
    """Bytes of the image file, 0 for pixels: tells most of those that were replaced under the same names. -1: no such file."""
    if isinstance(samples, Subset):
        return _size(samples.samples, int(samples.numbers[number]))
    if isinstance(samples, Joined):
        return _size(*samples.place(number))
    if isinstance(samples, Slices):
        return int(samples.ends[number + 1] - samples.ends[number])
    if isinstance(samples, Shards):
        return int(samples.size[number])
    try:
        return os.stat(samples.path(number)).st_size if isinstance(samples, Folder) else 0
    except OSError:
        return -1


def _refuse(out: Path, about: dict[str, Any]) -> None:
    """Raises DataError for a folder that holds anything but this pack, whole or begun."""
    if not out.exists():
        return
    if not out.is_dir():
        raise DataError(f"{out}: exists already and is no folder; give another")
    begun, whole = out / WORK / "about.json", (out / INDEX).is_file()
    if not whole and not begun.is_file():
        if any(p.name != WORK for p in out.iterdir()):
            raise DataError(f"{out}: exists already and is no pack that was begun; give another folder, or empty this one")
        return
    try:
        found = read_index(out / INDEX).about if whole else json.loads(begun.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise DataError(f"{begun}: cannot be read ({error}); delete {out} and pack again") from None
    told = "other images, by their names, labels or sizes"
    other = [told if k == "images" else f"{k} {found.get(k)!r}, now {v!r}" for k, v in about.items() if found.get(k) != v]
    if other:
        raise DataError(f"{out}: a pack with {'; '.join(other)[:300]}; give another folder, or delete this one")


def _shards(part: str, samples: Samples, out: Path, packing: Packing, workers: int, progress: Callable[[int], None] | None) -> Iterator[_Work]:
    """Each shard once it is whole: first those that are there."""
    order = np.random.default_rng(0).permutation(len(samples)) if part == PARTS[0] else np.arange(len(samples))
    count = images = start = 0
    while start < len(order) and (work := _done(out, f"{part}-{count:06d}.tar")) is not None:
        count, images, start = count + 1, images + len(work.rows), work.next
        yield work
    if progress:
        progress(start)
    if start == len(order):
        return
    writer = _Writer(out, part, count)
    files = encode_all(samples, order[start:], packing.short_side, packing.quality, workers)
    try:
        with closing(files):
            for place, found in enumerate(files, start):
                if isinstance(found, BadImage):
                    writer.work.left_out.append(str(found))
                else:
                    number = int(order[place])
                    sample = _members(f"{images:08d}", found, int(samples.labels[number]))
                    if writer.work.rows and writer.work.bytes + len(sample) + len(END) > packing.shard_size:
                        yield writer.close(place)
                        writer = _Writer(out, part, writer.count + 1)
                    writer.add(sample, found, int(samples.labels[number]), samples.name(number))
                    images += 1
                if progress:
                    progress(place + 1)
        yield writer.close(len(order))
    finally:
        writer.abandon()


def _members(key: str, data: bytes, label: int) -> bytes:
    return member(f"{key}.{suffix(data)}", data) + member(f"{key}.cls", str(label).encode())


def _done(out: Path, name: str) -> _Work | None:
    """The shard, if it is whole."""
    try:
        work = _Work(**json.loads((out / WORK / f"{name}.json").read_text(encoding="utf-8", errors="surrogateescape")))
        return work if work.next and (not work.rows or (out / name).stat().st_size == work.bytes) else None
    except (OSError, ValueError, TypeError):
        return None


class _Writer:
    """One shard: beside its place until it is whole. Its file is made with the first image."""

    def __init__(self, out: Path, part: str, count: int) -> None:
        self.out, self.part, self.count, self.work = out, part, count, _Work(f"{part}-{count:06d}.tar")
        self.path, self.sum = out / WORK / f"{self.work.file}.part", hashlib.sha256()
        self.file = open(self.path, "wb")  # noqa: SIM115 - closed in close or abandon

    def add(self, sample: bytes, data: bytes, label: int, name: str) -> None:
        self.work.rows.append([self.work.bytes + BLOCK, len(data), label, zlib.crc32(data), name])
        self._write(sample)

    def _write(self, data: bytes) -> None:
        self.file.write(data)
        self.sum.update(data)
        self.work.bytes += len(data)

    def close(self, place: int) -> _Work:
        """Under its name, and told in WORK, which together make it count. No file where all images were left out."""
        if self.work.rows:
            self._write(END)
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        self.work.next, self.work.sha256 = place, self.sum.hexdigest()
        write_text(self.out / WORK / f"{self.work.file}.json", json.dumps(asdict(self.work)))
        if self.work.rows:
            os.replace(self.path, self.out / self.work.file)
        return self.work

    def abandon(self) -> None:
        with suppress(OSError):  # a full disk, once more
            self.file.close()


def _finish(listing: Listing, out: Path, about: dict[str, Any], done: dict[str, list[_Work]]) -> Index:
    """The two files of the index, index.json last."""
    works = [(part, work) for part in PARTS for work in done[part] if work.rows]
    rows = [row for _, work in works for row in work.rows]
    offset, size, label, crc = (np.array([row[i] for row in rows], np.int64) for i in range(4))
    shard = np.repeat(np.arange(len(works)), [len(work.rows) for _, work in works])
    sum_of_rows = write_rows(out / WORK / ROWS, Rows(shard, offset, size, label, crc, Texts(row[4] for row in rows)))
    with open(out / WORK / ROWS, "rb") as file:
        os.fsync(file.fileno())
    left_out = [reason for part in PARTS for work in done[part] for reason in work.left_out]
    shards = tuple(Shard(work.file, part, len(work.rows), work.bytes, work.sha256) for part, work in works)
    index = Index(about, listing.classes, listing.held_out_is, shards, tuple(left_out[:MOST_TOLD]), sum_of_rows)
    write_text(out / WORK / INDEX, index_text(index))
    os.replace(out / WORK / ROWS, out / ROWS)
    os.replace(out / WORK / INDEX, out / INDEX)
    return index
