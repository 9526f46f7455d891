"""Samples that lie in files of their own, in one large file, or in memory; parts of them; what is held out.

Each is small when pickled and opens its files in the process that reads them (the protocol: `data/samples.py`).
"""

from __future__ import annotations

import mmap
import os
import re
import stat
import threading
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from triscale.data.decode import MAX_PIXELS
from triscale.data.samples import Samples
from triscale.text import printable

HELD_OUT = 0.2  # share of each class that is kept for testing where DATA has no part for it
LARGEST_FILE = 8 * MAX_PIXELS + (64 << 20)  # bytes of one image; `decode` has the same limit
TRAIN, EVALUATION = "train", ("val", "valid", "validation", "test")
OPEN_MAPS = 128  # files mapped at a time in one process: each holds a file descriptor, of which a process has 1024 as a rule


class DataError(ValueError):
    """No data set that a classifier can be trained or evaluated on. The message names the folder or file and the remedy."""


class LoneImageError(DataError):
    """A class of one image, of which none can be held out."""


_SPLIT = re.compile(rf"({'|'.join((TRAIN, *EVALUATION))})\d*")


def split_of(name: str) -> str:
    """The split that a file's name tells between - _ and dots: its first part if that is one, else the last that is; "" for none."""
    words = [match[1] if (match := _SPLIT.fullmatch(word)) else "" for word in re.split(r"[-_.]+", name.lower())]
    return words[0] or next((w for w in reversed(words) if w), "")


def by_split(paths: Sequence[Path], data: str) -> tuple[dict[str, list[Path]], tuple[str, ...]]:
    """(training files first, then those of the evaluation splits by their usual names; what is in none), or all as one, under "".

    Raises DataError where evaluation files would be mixed with others, to be trained on.
    """
    found: dict[str, list[Path]] = {}
    for path in paths:
        found.setdefault(split_of(path.name), []).append(path)
    present = [s for s in (TRAIN, *EVALUATION) if s in found]
    if len(found) == 1 or present in ([], [TRAIN]):
        return {"": list(paths)}, ()
    if present[0] != TRAIN:
        others = f"{len(present)} evaluation splits" if "" not in found else f"{found[''][0].name}, which tells no split"
        what = f"{found[present[0]][0].name} is there to evaluate on by its name, but no file has '{TRAIN}' in its name; found it beside {others}"
        raise DataError(f"{data}: {what}; name the files {TRAIN}-* and {present[0]}-*, or give those of one split only")
    over = (f"{p.name} (neither {TRAIN} nor {present[1]} by its name)" for p in found.get("", []))
    return {s: found[s] for s in present}, tuple(map(printable, over))


class Texts:
    """Many short texts as one array of bytes: a million names are pickled and sent as fast as they are copied.

    Names of files that are no UTF-8 keep their bytes (surrogateescape).
    """

    def __init__(self, texts: Iterable[str]) -> None:
        data, ends = bytearray(), array("q", [0])
        for text in texts:
            data += text.encode("utf-8", "surrogateescape")
            ends.append(len(data))
        self.data, self.ends = np.frombuffer(bytes(data), np.uint8), np.array(ends, np.int64)

    @staticmethod
    def of(data: np.ndarray, ends: np.ndarray) -> Texts:
        """data: (bytes,) uint8; ends: (N + 1,) int64 from 0, which never fall."""
        out = Texts(())
        out.data, out.ends = data, ends
        return out

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, number: int) -> str:
        if not 0 <= number < len(self):
            raise IndexError(number)
        return self.data[self.ends[number] : self.ends[number + 1]].tobytes().decode("utf-8", "surrogateescape")


class Folder:
    """Image files under one folder. paths: relative to it. prefix: goes before them in names."""

    def __init__(self, root: str | os.PathLike[str], paths: Iterable[str], labels: np.ndarray, prefix: str = "") -> None:
        self.root, self.prefix, self.paths = os.path.abspath(root), prefix, Texts(paths)
        self.labels = np.asarray(labels, np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, number: int) -> str:
        return os.path.join(self.root, self.paths[number])

    def name(self, number: int) -> str:
        return printable(self.prefix + self.paths[number])

    def read(self, number: int) -> bytes:
        return read_file(self.path(number))


def read_file(path: str) -> bytes:
    """A regular file's bytes. Raises OSError, for one larger than an image may be too."""
    # Not blocking, as to open a pipe that nobody writes to would wait for ever.
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(f"expected an image file, found a {'folder' if stat.S_ISDIR(found.st_mode) else 'device, pipe or socket'}")
        if found.st_size > LARGEST_FILE:
            raise OSError(f"{found.st_size} bytes, more than the limit of {LARGEST_FILE}")
        with open(handle, "rb", buffering=0, closefd=False) as file:
            return file.read()
    finally:
        os.close(handle)


class Maps:
    """Files mapped into memory as they are asked for, the latest OPEN_MAPS of them; none of it is pickled."""

    def __init__(self) -> None:
        self._open: OrderedDict[str, mmap.mmap] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[Maps], tuple[()]]:
        return Maps, ()

    def get(self, path: str, size: int) -> mmap.mmap:
        """The file, which must have `size` bytes. Raises OSError."""
        with self._lock:
            found = self._open.get(path)
            if found is None:
                with open(path, "rb") as file:
                    there = os.fstat(file.fileno()).st_size
                    if there != size:
                        raise OSError(f"{path}: {there} bytes, expected {size}: it has been cut off or changed since it was listed")
                    found = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                self._open[path] = found
                if len(self._open) > OPEN_MAPS:
                    self._open.popitem(last=False)  # closed when the last thread that reads it is done
            self._open.move_to_end(path)
            return found


class Slices:
    """Encoded images one after the other in one file. ends: (N + 1,) int64, where each ends, from 0 on."""

    def __init__(self, path: str | os.PathLike[str], ends: np.ndarray, labels: np.ndarray, names: Texts) -> None:
        self.path, self.ends, self.names, self.maps = os.path.abspath(path), ends, names, Maps()
        self.labels = np.asarray(labels, np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, number: int) -> str:
        return printable(self.names[number])

    def read(self, number: int) -> bytes:
        start, end = self.ends[number : number + 2].tolist()
        return self.maps.get(self.path, int(self.ends[-1]))[start:end] if end > start else b""


class Arrays:
    """Decoded images of one size. load: gives (N, H, W, 3) uint8 in the process that reads them, once; it is pickled in their place."""

    def __init__(self, load: Callable[[], np.ndarray], labels: np.ndarray, prefix: str) -> None:
        self.load, self.prefix = load, prefix
        self.labels = np.asarray(labels, np.int64)
        self._pixels: np.ndarray | None = None

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_pixels": None}

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, number: int) -> str:
        return f"{self.prefix}/{number:0{len(str(len(self) - 1))}}"

    def read(self, number: int) -> np.ndarray:
        if self._pixels is None:
            self._pixels = self.load()
        return np.ascontiguousarray(self._pixels[number])


class Subset:
    """Some of `samples`, in the order of `numbers` (M,)."""

    def __init__(self, samples: Samples, numbers: np.ndarray) -> None:
        self.samples, self.numbers = samples, np.asarray(numbers, np.int64)
        self.labels = samples.labels[self.numbers]

    def __len__(self) -> int:
        return len(self.numbers)

    def name(self, number: int) -> str:
        return self.samples.name(int(self.numbers[number]))

    def read(self, number: int) -> bytes | np.ndarray:
        return self.samples.read(int(self.numbers[number]))


class Joined:
    """The samples of several sources, one after the other."""

    def __init__(self, parts: Sequence[Samples]) -> None:
        self.parts = tuple(parts)
        self.starts = np.cumsum([0, *(len(p) for p in parts)], dtype=np.int64)
        self.labels = np.concatenate([p.labels for p in parts])

    def __len__(self) -> int:
        return len(self.labels)

    def place(self, number: int) -> tuple[Samples, int]:
        part = int(np.searchsorted(self.starts, number, side="right")) - 1
        return self.parts[part], number - int(self.starts[part])

    def name(self, number: int) -> str:
        part, place = self.place(number)
        return part.name(place)

    def read(self, number: int) -> bytes | np.ndarray:
        part, place = self.place(number)
        return part.read(place)


def take(samples: Samples, numbers: np.ndarray) -> Samples:
    """These of the samples, in this order."""
    if isinstance(samples, Subset):
        return Subset(samples.samples, samples.numbers[numbers])
    return Subset(samples, numbers)


def parts(samples: Samples, classes: int, draw: bool) -> tuple[Samples, Samples, str]:
    """(training, held out, what the second is) of a set that comes as one. draw: false leaves it as one, and holds none out."""
    if not draw:
        return samples, take(samples, np.empty(0, np.int64)), "none"
    return *hold_out(samples, classes), f"{HELD_OUT:.0%} of each class, by a fixed draw"


def hold_out(samples: Samples, classes: int) -> tuple[Samples, Samples]:
    """(training, held out): HELD_OUT of each class, at least one image and never all, drawn by a generator of fixed seed.

    Both are ordered by class, then as drawn. Raises LoneImageError for a class of one image.
    """
    train: list[np.ndarray] = []
    held_out: list[np.ndarray] = []
    generator = np.random.default_rng(0)
    order = np.argsort(samples.labels, kind="stable")
    ends = np.searchsorted(samples.labels[order], np.arange(classes + 1))
    for start, end in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        if end == start:
            continue  # a class number without images, of shards
        if end - start < 2:
            name = samples.name(int(order[start]))
            raise LoneImageError(f"{name}: the only image of its class; at least two are needed, one of them to test on")
        mine = order[start:end][generator.permutation(end - start)]
        n = min(len(mine) - 1, max(1, round(HELD_OUT * len(mine))))
        held_out.append(mine[:n])
        train.append(mine[n:])
    return take(samples, np.concatenate(train)), take(samples, np.concatenate(held_out))
