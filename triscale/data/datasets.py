"""Data sets by name or folder, held in memory as uint8 at the network's input size.

DATA is a folder with one folder of images per class (or with `train` and one of `val`, `valid`, `validation`, `test`
inside, each so), or a name: `digits` (scikit-learn's bundled scans) or `cifar10` (from a local folder).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from triscale.data.decode import IMAGE_SUFFIXES, BadImage, decode
from triscale.data.transform import square
from triscale.naming import unknown
from triscale.recipe import Preprocess

NAMED = ("digits", "cifar10")
HELD_OUT = 0.2  # share of each class that is kept for testing where DATA has no folder for it
MEMORY_LIMIT = 8 << 30  # bytes of decoded images; larger sets need shards
EVALUATION_FOLDERS = ("val", "valid", "validation", "test")
Progress = Callable[[int, int], None]


class DataError(ValueError):
    """No data set that a classifier can be trained or evaluated on. The message names the folder or file and the remedy."""


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


class _File(NamedTuple):
    source: Path | bytes | np.ndarray
    label: int
    name: str


class Listing(NamedTuple):
    """A data set's files, found but not read. held_out_is: where the held-out ones come from.

    passed_over: what lies in the folders but is no image by its name, or a folder without one.
    """

    data: str
    train: list[_File]
    held_out: list[_File]
    classes: tuple[str, ...]
    held_out_is: str
    passed_over: tuple[str, ...] = ()


def find(data: str, data_dir: str | None = None) -> Listing:
    """The files and classes of `data`: a folder or a name; data_dir: where a named data set lies. Raises DataError."""
    if not data:
        raise DataError("expected a folder or a name, found an empty text")
    if data == "digits":
        return _digits()
    if data == "cifar10":
        return _cifar10(data_dir)
    if Path(data).is_dir():
        return _folder(Path(data))
    hint = "" if os.sep in data or "." in data else f"; {unknown('data set', data, NAMED)}"
    raise DataError(f"{data}: no such folder{hint}")


def load(listing: Listing, preprocess: Preprocess, progress: Progress | None = None) -> Splits:
    """Every image of a data set through `preprocess`'s crop and resize.

    Unreadable images are left out and listed; a class of which none can be read is an error. Raises DataError.
    """
    data, train, held_out, classes, held_out_is, _ = listing
    total = len(train) + len(held_out)
    size = total * preprocess.channels * preprocess.size**2
    if size > MEMORY_LIMIT:
        raise DataError(f"{data}: {total} images at {preprocess.size} px need {size / 2**30:.1f} GiB in memory, more than {MEMORY_LIMIT >> 30}")
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        if progress:
            progress(done, total)

    parts = [_read(part, preprocess, tick) for part in (train, held_out)]
    for part, files in zip(parts, (train, held_out), strict=True):
        for label in {f.label for f in files} - set(part.labels.tolist()):
            raise DataError(f"{data}: no image of class '{classes[label]}' can be read; the first: {part.left_out[0]}")
    return Splits(parts[0], parts[1], classes, held_out_is)


def _read(files: Sequence[_File], preprocess: Preprocess, tick: Callable[[], None]) -> ImageData:
    """Decodes on all cores, keeping the order."""
    images = torch.empty(len(files), preprocess.channels, preprocess.size, preprocess.size, dtype=torch.uint8)
    kept: list[int] = []
    left_out: list[str] = []

    def one(file: _File) -> np.ndarray | BadImage:
        try:
            image = file.source if isinstance(file.source, np.ndarray) else decode(file.source, name=file.name)
            return square(image, preprocess)
        except BadImage as error:
            return error

    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        for i, result in enumerate(pool.map(one, files)):
            if isinstance(result, BadImage):
                left_out.append(str(result))
            else:
                images[len(kept)] = torch.from_numpy(result).permute(2, 0, 1)
                kept.append(i)
            tick()
    labels = torch.tensor([files[i].label for i in kept], dtype=torch.int64)
    return ImageData(images[: len(kept)], labels, tuple(files[i].name for i in kept), tuple(left_out))


def _folder(root: Path) -> Listing:
    train_root = root / "train" if (root / "train").is_dir() else root
    classes = _class_folders(train_root)
    if not classes:
        raise DataError(f"{root}: no images found; expected one folder of images per class, e.g. {root.name}/cat/1.jpg")
    if len(classes) == 1:
        raise DataError(f"{train_root}: one class only, '{classes[0]}'; a classifier needs at least two folders of images")
    files = _files(train_root, classes)
    for name in EVALUATION_FOLDERS:
        other = root / name
        if train_root is root or not other.is_dir():
            continue
        for extra in set(_class_folders(other)) - set(classes):
            raise DataError(f"{other / extra}: no class of this name in {train_root}")
        over = _passed_over(train_root) + _passed_over(other)
        return Listing(str(root), files, _files(other, classes), tuple(classes), f"{root.name}/{name}", over)
    train, held_out = _hold_out(files, len(classes))
    return Listing(str(root), train, held_out, tuple(classes), f"{HELD_OUT:.0%} of each class, by a fixed draw", _passed_over(train_root))


def _class_folders(root: Path) -> list[str]:
    return sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith(".") and any(_images(p)))


def _passed_over(root: Path) -> tuple[str, ...]:
    """Entries of the class folders that aren't read, and folders of no image; hidden ones are nobody's images."""
    out = []
    for folder in sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")):
        images = set(_images(folder))
        if not images and root.name not in EVALUATION_FOLDERS:
            out.append(f"{folder.name}/ (no images)")
        out += [f"{folder.name}/{p.name}" for p in sorted(folder.iterdir()) if p not in images and not p.name.startswith(".")]
    return tuple(out)


def _images(folder: Path) -> Iterable[Path]:
    return (p for p in sorted(folder.iterdir()) if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith("."))


def _files(root: Path, classes: Sequence[str]) -> list[_File]:
    existing = [(i, c) for i, c in enumerate(classes) if (root / c).is_dir()]
    return [_File(p, i, f"{root.name}/{c}/{p.name}") for i, c in existing for p in _images(root / c)]


def _hold_out(files: list[_File], classes: int) -> tuple[list[_File], list[_File]]:
    """HELD_OUT of each class, at least one image and never all, drawn by a generator of fixed seed."""
    train, held_out = [], []
    generator = np.random.default_rng(0)
    for label in range(classes):
        mine = [f for f in files if f.label == label]
        if len(mine) < 2:
            raise DataError(f"{mine[0].name}: the only image of its class; at least two are needed, one of them to test on")
        order = generator.permutation(len(mine))
        n = min(len(mine) - 1, max(1, round(HELD_OUT * len(mine))))
        held_out += [mine[i] for i in order[:n]]
        train += [mine[i] for i in order[n:]]
    return train, held_out


def _digits() -> Listing:
    """1,797 scans of handwritten digits, 8x8, from scikit-learn (UCI Optical Recognition of Handwritten Digits)."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError("digits: needs scikit-learn, which brings the images: pip install 'triscale[demo]'") from None
    scans = load_digits()
    grey = np.round(scans.images * (255 / 16)).astype(np.uint8)  # 0..16
    files = [_File(np.repeat(g[:, :, None], 3, 2), int(t), f"digits/{i:04d}") for i, (g, t) in enumerate(zip(grey, scans.target, strict=True))]
    train, held_out = _hold_out(files, 10)
    return Listing("digits", train, held_out, tuple("0123456789"), f"{HELD_OUT:.0%} of each class, by a fixed draw")


def _cifar10(data_dir: str | None) -> Listing:
    """CIFAR-10 as torchvision keeps it (`cifar-10-batches-py`), or as Parquet in the Hugging Face image layout."""
    root = Path(data_dir or os.environ.get("TRISCALE_DATA", "data"))
    if (root / "cifar-10-batches-py").is_dir():
        from torchvision.datasets import CIFAR10

        try:
            parts = [CIFAR10(str(root), train=train, download=False) for train in (True, False)]
        except RuntimeError as error:  # the check sums of its files
            raise DataError(f"{root / 'cifar-10-batches-py'}: {str(error).splitlines()[0]}") from None
        train, held_out = ([_File(image, int(y), f"cifar10/{i}") for i, (image, y) in enumerate(zip(p.data, p.targets, strict=True))] for p in parts)
        return Listing("cifar10", train, held_out, tuple(parts[0].classes), "CIFAR-10's test set")
    found = {split: sorted(p for base in (root, root / "cifar10") for p in base.glob(f"{split}-*.parquet")) for split in ("train", "test")}
    if not all(found.values()):
        raise DataError(f"cifar10: neither cifar-10-batches-py nor train-*.parquet and test-*.parquet in {root}; give its folder with --data-dir")
    names = next((p for p in (found["train"][0].parent / "classes.txt",) if p.is_file()), None)
    classes = tuple(names.read_text().split()) if names else tuple(map(str, range(10)))
    return Listing("cifar10", _parquet(found["train"]), _parquet(found["test"]), classes, "CIFAR-10's test set")


def _parquet(paths: Iterable[Path]) -> list[_File]:
    try:
        import pyarrow.parquet as pq
    except ImportError:
        raise DataError("reading Parquet needs pyarrow: pip install 'triscale[data]'") from None
    out = []
    for path in paths:
        try:
            table = pq.read_table(path, columns=["image", "label"])
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{path}: no Parquet file with columns image and label ({str(error).splitlines()[0]})") from None
        rows = zip(table["image"].to_pylist(), table["label"].to_pylist(), strict=True)
        out += [_File(image["bytes"], int(label), image["path"] or f"{path.name}:{i}") for i, (image, label) in enumerate(rows)]
    return out
