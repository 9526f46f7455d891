"""Data sets by name, folder, shards or Parquet: found without reading images, and read into memory where they fit.

DATA is one of these.

- a folder with one folder of images per class, or with `train` and one of `val`, `valid`, `validation`, `test` inside, each so;
  images in folders within a class's folder are not read, and told
- tar shards in WebDataset layout: a pattern such as train-{000000..000146}.tar or http://host/train-{000000..000146}.tar, or a
  folder that holds train-*.tar and val-*.tar (`data/shards.py`); what `triscale pack` writes is one
- a .parquet file, or a folder of train-*.parquet and validation-*.parquet or test-*.parquet (`data/parquet.py`)
- a name: digits, cifar10 and so on (`data/named.py`)
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from triscale.data.decode import IMAGE_SUFFIXES, BadImage, decode
from triscale.data.index import foreign_note, has_index
from triscale.data.samples import Samples
from triscale.data.sources import EVALUATION, DataError, Folder, parts
from triscale.data.transform import square
from triscale.naming import unknown
from triscale.recipe import Preprocess
from triscale.text import printable

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["EVALUATION_FOLDERS", "NAMED", "DataError", "ImageData", "Listing", "Splits", "find", "load"]

NAMED = (
    "digits", "cifar10", "cifar100", "birdsnap", "stanford-cars", "flowers102", "fgvc-aircraft", "oxford-iiit-pet", "food101", "imagenet",
)  # fmt: skip
MEMORY_LIMIT = 8 << 30  # bytes of decoded images
EVALUATION_FOLDERS = EVALUATION
Progress = Callable[[int, int], None]
Watch = Callable[[str, int, int], None]  # what is being prepared, done, in all


@dataclass(frozen=True)
class ImageData:
    """images (N, C, S, S) uint8, labels (N,) int64, names (N,) of the files. left_out: why each unreadable file was."""

    images: Tensor
    labels: Tensor
    names: tuple[str, ...]
    left_out: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Splits:
    """Training and held-out images with the class names that their labels index. held_out_is: where they come from."""

    train: ImageData
    held_out: ImageData
    classes: tuple[str, ...]
    held_out_is: str


class Listing(NamedTuple):
    """A data set's images, found but not read. held_out_is: where the held-out ones come from.

    passed_over: what lies in the folders but is no image by its name, or a folder without one. kind: folder, shards, parquet or
    arrays. notes: what the user should be told once, e.g. of disk space taken.
    """

    data: str
    train: Samples
    held_out: Samples
    classes: tuple[str, ...]
    held_out_is: str
    passed_over: tuple[str, ...] = ()
    kind: str = "folder"
    notes: tuple[str, ...] = ()


def find(data: str, data_dir: str | None = None, watch: Watch | None = None, *, draw: bool = True) -> Listing:
    """The images and classes of `data`; data_dir: where a named data set lies.

    Nothing is decoded, but remote shards are fetched, and Parquet's images copied to where they can be read in any order; watch
    is told how far that is. draw: false holds nothing out of a set that has no part for it. Raises DataError; FetchError where a server fails.
    """
    from triscale.data import named, parquet, shards

    if not data:
        raise DataError("expected a folder or a name, found an empty text")
    if data in NAMED:
        return named.find_named(data, data_dir, watch, draw=draw)
    if shards.is_pattern(data):
        return shards.find_shards(data, watch, draw=draw)
    path = Path(data)
    if path.is_dir():
        return _directory(path, watch, draw)
    if path.suffix.lower() == ".parquet" and path.is_file():
        return parquet.find_parquet(data, [path], [], watch, draw=draw)
    hint = "" if os.sep in data or "." in data else f"; {unknown('data set', data, NAMED)}"
    raise DataError(f"{data}: no such folder{hint}")


def _directory(root: Path, watch: Watch | None, draw: bool) -> Listing:
    from triscale.data import parquet, shards

    try:
        if has_index(root):
            return shards.find_shards(str(root), watch, draw=draw)
        train_root = root / "train" if (root / "train").is_dir() else root
        scan = _scan(train_root)
        if not scan.images and train_root is not root and not (whole := _scan(root)).images.keys() <= {"train", *EVALUATION_FOLDERS}:
            train_root, scan = root, whole  # a class of trains, with images in its folder
        if not scan.images and any(root.glob("*.tar")):
            return shards.find_shards(str(root), watch, draw=draw)
        if not scan.images and (found := parquet.splits(root)):
            train, held_out, over = found
            listing = parquet.find_parquet(str(root), train, held_out, watch, draw=draw)
            return listing._replace(passed_over=over, notes=foreign_note(root) + listing.notes)
        return _folder(root, train_root, scan, draw)._replace(notes=foreign_note(root))
    except PermissionError as error:
        raise DataError(f"{printable(str(error.filename))}: cannot be opened (permission denied); make it readable, or give another folder") from None


def load(listing: Listing, preprocess: Preprocess, progress: Progress | None = None) -> Splits:
    """Every image of a data set through `preprocess`'s crop and resize.

    Unreadable images are left out and listed; a class of which none can be read is an error. Raises DataError.
    """
    total = len(listing.train) + len(listing.held_out)
    size = total * preprocess.channels * preprocess.size**2
    if size > MEMORY_LIMIT:
        need = f"{total} images at {preprocess.size} px need {size / 2**30:.1f} GiB in memory, more than {MEMORY_LIMIT >> 30}"
        raise DataError(f"{listing.data}: {need}; stream them instead, best from shards that triscale pack has made of them once")
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        if progress:
            progress(done, total)

    read = [_read(part, preprocess, tick) for part in (listing.train, listing.held_out)]
    for part, samples in zip(read, (listing.train, listing.held_out), strict=True):
        for label in set(samples.labels.tolist()) - set(part.labels.tolist()):
            raise DataError(f"{listing.data}: no image of class '{printable(listing.classes[label])}' can be read; the first: {part.left_out[0]}")
    return Splits(read[0], read[1], listing.classes, listing.held_out_is)


def picture(samples: Samples, number: int) -> np.ndarray:
    """The decoded image, (H, W, 3) uint8. Raises BadImage, also where the file can't be read."""
    try:
        data = samples.read(number)
    except OSError as error:
        raise BadImage(f"{samples.name(number)}: cannot be opened ({printable(error.strerror or str(error))})") from None
    return data if isinstance(data, np.ndarray) else decode(data, name=samples.name(number))


def _read(samples: Samples, preprocess: Preprocess, tick: Callable[[], None]) -> ImageData:
    """Decodes on all cores, keeping the order."""
    import torch  # here, as `find` and `triscale pack` do without it: it takes seconds

    images = torch.empty(len(samples), preprocess.channels, preprocess.size, preprocess.size, dtype=torch.uint8)
    kept: list[int] = []
    left_out: list[str] = []

    def one(number: int) -> np.ndarray | BadImage:
        try:
            return square(picture(samples, number), preprocess)
        except BadImage as error:
            return error

    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        for i, result in enumerate(pool.map(one, range(len(samples)))):
            if isinstance(result, BadImage):
                left_out.append(str(result))
            else:
                images[len(kept)] = torch.from_numpy(result).permute(2, 0, 1)
                kept.append(i)
            tick()
    labels = torch.from_numpy(samples.labels[kept]) if kept else torch.empty(0, dtype=torch.int64)
    return ImageData(images[: len(kept)], labels, tuple(map(samples.name, kept)), tuple(left_out))


def part_of(root: Path, classes: tuple[str, ...]) -> Folder:
    """The images of one folder of class folders, whose names are among `classes`. Raises DataError."""
    scan = _scan(root)
    for extra in sorted(set(scan.images) - set(classes)):
        raise DataError(f"{printable(str(root / extra))}: no class of this name among those to train on")
    return _samples(root, scan, classes)


class _Scan(NamedTuple):
    """What lies in the class folders of one folder: image names of each class, sorted; what is no image."""

    images: dict[str, list[str]]
    over: tuple[str, ...]


def _folder(root: Path, train_root: Path, train: _Scan, draw: bool) -> Listing:
    """A folder of class folders. Each folder is listed once, and no file is looked at."""
    classes = tuple(sorted(train.images))
    if not classes:
        kinds = f"one folder of images per class, e.g. {root.name}/cat/1.jpg, or train-*.tar or train-*.parquet"
        raise DataError(f"{root}: no images found; expected {kinds}")
    if len(classes) == 1:
        raise DataError(f"{train_root}: one class only, '{printable(classes[0])}'; a classifier needs at least two folders of images")
    samples = _samples(train_root, train, classes)
    other = next((root / name for name in EVALUATION_FOLDERS if (root / name).is_dir()), None) if train_root is not root else None
    if other is None:
        mine, held_out, held_out_is = parts(samples, len(classes), draw)
        return Listing(str(root), mine, held_out, classes, held_out_is, train.over)
    scan = _scan(other)
    for extra in sorted(set(scan.images) - set(classes)):
        raise DataError(f"{printable(str(other / extra))}: no class of this name in {train_root}")
    if not scan.images:
        raise DataError(f"{other}: no images found; expected the class folders of {train_root}")
    return Listing(str(root), samples, _samples(other, scan, classes), classes, f"{root.name}/{other.name}", train.over + scan.over)


def _scan(root: Path) -> _Scan:
    """Hidden entries are nobody's images."""
    images: dict[str, list[str]] = {}
    over: list[str] = []
    with os.scandir(root) as entries:
        folders = sorted(e.name for e in entries if not e.name.startswith(".") and e.is_dir())
    for folder in folders:
        names = sorted(name for name in os.listdir(root / folder) if not name.startswith("."))
        found = [name for name in names if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES]
        if found:
            images[folder] = found
        elif root.name not in EVALUATION_FOLDERS:
            over.append(f"{printable(folder)}/ (no images)")
        if len(found) != len(names):
            known = set(found)
            over += [_passed_over(root, f"{folder}/{name}") for name in names if name not in known]
    return _Scan(images, tuple(over))


def _passed_over(root: Path, name: str) -> str:
    return printable(name) + (" (a folder; images in folders of a class's folder are not read)" if (root / name).is_dir() else "")


def _samples(root: Path, scan: _Scan, classes: tuple[str, ...]) -> Folder:
    paths = [f"{c}/{name}" for c in classes for name in scan.images.get(c, ())]
    labels = np.repeat(np.arange(len(classes)), [len(scan.images.get(c, ())) for c in classes])
    return Folder(root, paths, labels, prefix=f"{root.name}/")
