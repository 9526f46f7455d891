"""The data sets with names: the paper's eight for transfer, ImageNet, and digits. Nothing is ever fetched from here.

Each may lie as torchvision's class for it expects; or in a folder of its name, as folders of classes, shards or Parquet. What is
trained on is what the paper's protocol (Kornblith et al. 2019) trains on: where a set has a validation part, with it.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from triscale.data.cache import locked
from triscale.data.sources import Arrays, DataError, Folder, Joined, parts
from triscale.files import cache_folder, write_whole
from triscale.recipes import FINETUNE
from triscale.text import first_line, printable

if TYPE_CHECKING:
    from triscale.data.datasets import Listing, Watch
    from triscale.data.samples import Samples


class _Torchvision(NamedTuple):
    """How torchvision has it. folder: below --data-dir, with `inside` in it. images: the attribute with the paths of a split."""

    kind: str
    folder: str
    inside: str
    train: tuple[str, ...]
    images: str
    title: str


_SETS = {
    "stanford-cars": _Torchvision(
        "StanfordCars", "stanford_cars", "cars_train, cars_test, devkit and cars_test_annos_withlabels.mat", ("train",), "_samples", "Stanford Cars"
    ),
    "flowers102": _Torchvision("Flowers102", "flowers-102", "jpg, imagelabels.mat and setid.mat", ("train", "val"), "_image_files", "Flowers-102"),
    "fgvc-aircraft": _Torchvision("FGVCAircraft", "fgvc-aircraft-2013b", "data", ("trainval",), "_image_files", "FGVC Aircraft"),
    "oxford-iiit-pet": _Torchvision("OxfordIIITPet", "oxford-iiit-pet", "images and annotations", ("trainval",), "_images", "Oxford-IIIT Pet"),
    "food101": _Torchvision("Food101", "food-101", "images and meta", ("train",), "_image_files", "Food-101"),
}
COUNTS = {"imagenet": 1000, **{name: about.classes for name, about in FINETUNE.items()}}  # classes
_CIFAR = {"cifar10": ("CIFAR10", "cifar-10-batches-py"), "cifar100": ("CIFAR100", "cifar-100-python")}


def find_named(name: str, data_dir: str | None, watch: Watch | None = None, *, draw: bool = True) -> Listing:
    """data_dir: the folder that holds it; $TRISCALE_DATA, else `data`, unless given. Raises DataError, which tells the layout expected."""
    if name == "digits":
        return _digits(draw)
    root = Path(data_dir or os.environ.get("TRISCALE_DATA", "data"))
    listing = _found(name, root, watch, draw)
    if len(listing.classes) != COUNTS[name]:
        some = printable(", ".join(listing.classes[:3]))
        what = f"expected {COUNTS[name]} classes, found {len(listing.classes)} ({some} and so on) in {root}: this is another data set"
        raise DataError(f"{name}: {what}; give its own folder as DATA, or the one that holds {name} with --data-dir")
    return listing


def _found(name: str, root: Path, watch: Watch | None, draw: bool) -> Listing:
    if name in _CIFAR and (root / _CIFAR[name][1]).is_dir():
        return _cifar(name, root)
    if name in _SETS and (root / _SETS[name].folder).is_dir() and not (root / _SETS[name].folder / "train").is_dir():
        return _by_torchvision(name, root)
    listing = _own_folder(name, root, watch, draw)
    if listing is None:
        raise DataError(f"{name}: not found in {root}; {_expected(name)}; give the folder that holds it with --data-dir")
    return listing


def _expected(name: str) -> str:
    own = f"{name}/train and {name}/test with a folder of images per class"
    if name == "imagenet":
        return "expected train and val with a folder per WordNet id (n01440764 and so on), there or in imagenet"
    if name in _CIFAR:
        return f"expected {_CIFAR[name][1]} (torchvision.datasets.{_CIFAR[name][0]} fetches it), or train-*.parquet and test-*.parquet"
    if name in _SETS:
        s = _SETS[name]
        fetches = "" if name == "stanford-cars" else f" (torchvision.datasets.{s.kind} fetches it)"
        return f"expected {s.folder} with {s.inside}{fetches}, or {own}"
    return f"expected {own}"


def _own_folder(name: str, root: Path, watch: Watch | None, draw: bool) -> Listing | None:
    """In the folder of its name, in any layout; CIFAR's Parquet files and ImageNet's folders also right in `root`."""
    from triscale.data.datasets import find, part_of
    from triscale.data.parquet import by_split

    folders = [root / name, *([root / _SETS[name].folder] if name in _SETS else [])]
    if (name == "imagenet" and (root / "train").is_dir()) or (name in _CIFAR and root.is_dir() and by_split(root)):
        folders.append(root)
    folder = next((f for f in folders if f.is_dir()), None)
    if folder is None:
        return None
    listing = (_joined_parquet(folder, watch) or find(str(folder), None, watch, draw=draw))._replace(data=name)
    if name == "imagenet":
        return listing._replace(classes=_imagenet_names(listing.classes))
    if listing.kind == "folder" and (folder / "test").is_dir() and not listing.held_out_is.endswith("/test"):
        joined = Joined([listing.train, listing.held_out])
        listing = listing._replace(train=joined, held_out=part_of(folder / "test", listing.classes))
    return listing._replace(held_out_is=f"{_title(name)}'s test set") if "draw" not in listing.held_out_is else listing


def _joined_parquet(folder: Path, watch: Watch | None) -> Listing | None:
    """Parquet with a validation part besides train and test, which is trained on too."""
    from triscale.data.parquet import by_split, find_parquet

    named = by_split(folder)
    validation = next((named[s] for s in ("val", "valid", "validation") if s in named), None)
    if validation is None or not {"train", "test"} <= named.keys():
        return None
    return find_parquet(str(folder), named["train"] + validation, named["test"], watch)


def _title(name: str) -> str:
    return _SETS[name].title if name in _SETS else {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}.get(name, name.capitalize())


def _imagenet_names(folders: tuple[str, ...]) -> tuple[str, ...]:
    """The classes' names for all thousand ids, whose order is that of every published checkpoint."""
    from triscale.imagenet import imagenet_classes

    return tuple(c.name for c in imagenet_classes()) if folders == tuple(c.wnid for c in imagenet_classes()) else folders


def _torchvision(kind: str, root: Path, name: str, **split: Any) -> Any:
    from torchvision import datasets

    try:
        return getattr(datasets, kind)(str(root), download=False, **split)
    except (RuntimeError, ImportError, OSError, ValueError, KeyError) as error:  # ImportError: SciPy, which reads .mat files
        raise DataError(f"{name}: {root}: {first_line(error)}; {_expected(name)}") from None


def _by_torchvision(name: str, root: Path) -> Listing:
    from triscale.data.datasets import Listing

    about = _SETS[name]
    loaded = [_torchvision(about.kind, root, name, split=split) for split in (*about.train, "test")]
    samples: list[Samples] = [_paths(part, about, root) for part in loaded]
    count = 1 + max(int(s.labels.max()) for s in samples)
    classes = tuple(map(str, getattr(loaded[0], "classes", None) or range(1, count + 1)))
    train = samples[0] if len(samples) == 2 else Joined(samples[:-1])
    return Listing(name, train, samples[-1], classes, f"{about.title}'s test set")


def _paths(part: Any, about: _Torchvision, root: Path) -> Folder:
    """Of a torchvision data set the paths alone, so that reading stays ours."""
    listed = getattr(part, about.images)
    files, labels = zip(*listed, strict=True) if about.images == "_samples" else (listed, part._labels)
    return Folder(root, (os.path.relpath(f, root) for f in files), np.array(labels, np.int64))


def _scans() -> np.ndarray:
    """(1797, 8, 8, 3) uint8."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError("digits: needs scikit-learn, which brings the images: pip install 'triscale[demo]'") from None
    grey = np.round(load_digits().images * (255 / 16)).astype(np.uint8)  # 0..16
    return np.repeat(grey[:, :, :, None], 3, 3)


def _digits(draw: bool) -> Listing:
    """1,797 scans of handwritten digits, 8x8, from scikit-learn (UCI Optical Recognition of Handwritten Digits)."""
    from triscale.data.datasets import Listing

    _scans()  # tells where scikit-learn is missing
    from sklearn.datasets import load_digits

    train, held_out, held_out_is = parts(Arrays(_scans, load_digits().target, "digits"), 10, draw)
    return Listing("digits", train, held_out, tuple("0123456789"), held_out_is, kind="arrays")


def _cifar(name: str, root: Path) -> Listing:
    """As torchvision keeps it: pickles, whose check sums it knows. Their pixels go once to a file that processes can share."""
    from triscale.data.datasets import Listing

    both: list[Arrays] = []
    classes: tuple[str, ...] = ()
    notes: list[str] = []
    for train in (True, False):
        part = _torchvision(_CIFAR[name][0], root, name, train=train)
        path = cache_folder("arrays") / f"{name}-{'train' if train else 'test'}.npy"
        with locked(path):
            if not _holds(path, part.data):
                write_whole(path, partial(_save, part.data))
        classes = tuple(part.classes)
        both.append(Arrays(partial(np.load, path, mmap_mode="r"), np.array(part.targets), name))
        notes.append(f"the images of {name} are read from a copy at {path} ({part.data.nbytes / 1e6:.0f} MB)")
    return Listing(name, both[0], both[1], classes, f"{_title(name)}'s test set", kind="arrays", notes=tuple(notes))


def _save(pixels: np.ndarray, path: Path) -> None:
    with open(path, "wb") as file:
        np.save(file, pixels)


def _holds(path: Path, pixels: np.ndarray) -> bool:
    try:
        return path.is_file() and np.array_equal(np.load(path, mmap_mode="r", allow_pickle=False), pixels)
    except (OSError, ValueError):
        return False
