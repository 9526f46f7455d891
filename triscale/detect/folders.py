"""Where a data set's boxes and pictures lie: COCO's folders, and what people make of them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from triscale.data.sources import DataError

SPLITS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
ROBOFLOW = "_annotations.coco.json"
IMAGES = ("images", "JPEGImages", "imgs", "")


class Source(NamedTuple):
    """A JSON file in COCO's format, and the folder that its file_name are relative to."""

    json: Path
    images: Path


def find_split(data: str | os.PathLike[str], split: str, images: str | os.PathLike[str] | None = None) -> Source:
    """The split train, val or test of a folder, or of the JSON file that `data` is. images: the folder of the pictures, where known.

    Known are DATA/annotations/instances_SPLIT*.json (COCO's own have a year), DATA/annotations/SPLIT.json, DATA/SPLIT.json, and
    DATA/SPLIT/_annotations.coco.json (Roboflow); pictures in DATA/SPLIT*, DATA/images/SPLIT*, DATA/images, DATA/JPEGImages, DATA, or
    beside the JSON. Raises DataError that tells what was looked for.
    """
    root = Path(data)
    if root.is_file():
        return Source(root, _folder(images) if images else _beside(root))
    if not root.is_dir():
        raise DataError(f"{data}: no such folder or file; expected a COCO folder, or a JSON file in its format")
    if split not in SPLITS:
        raise DataError(f"split {split!r}: expected one of {', '.join(SPLITS)}")
    found = list(_jsons(root, split))
    if not found:
        more = "; Pascal VOC's XML becomes COCO's JSON by triscale detect convert" if (root / "Annotations").is_dir() else ""
        raise DataError(
            f"{data}: no {split} split; expected annotations/instances_{split}.json, {split}.json or {split}/_annotations.coco.json{more}"
        )
    if len(found) > 1:
        raise DataError(f"{data}: {len(found)} files for the {split} split ({', '.join(f.name for f in found[:5])}); give the one that is meant")
    return Source(found[0], _folder(images) if images else _pictures(root, found[0], split))


def has_split(data: str | os.PathLike[str], split: str) -> bool:
    """Whether the folder `data` has such a split."""
    return any(_jsons(Path(data), split))


def _jsons(root: Path, split: str) -> Iterator[Path]:
    for name in SPLITS[split]:
        folder = root / "annotations"
        exact = [folder / f"instances_{name}.json", folder / f"{name}.json", root / f"{name}.json", root / name / ROBOFLOW]
        dated = [*folder.glob(f"instances_{name}[0-9]*.json"), *root.glob(f"instances_{name}[0-9]*.json")]
        yield from (there := [path for path in exact if path.is_file()] or sorted(dated))
        if there:
            return


def _pictures(root: Path, json: Path, split: str) -> Path:
    if json.name == ROBOFLOW:  # beside it
        return json.parent
    label = json.stem.removeprefix("instances_")
    names = dict.fromkeys((label, *SPLITS[split]))
    for folder in (*(root / name for name in names), *(root / "images" / name for name in names), *(root / name for name in IMAGES)):
        if folder.is_dir():
            return folder
    return root


def _beside(json: Path) -> Path:
    """The pictures of a JSON file that stands alone: as in a COCO folder where it lies in annotations/, else its own folder."""
    if json.parent.name == "annotations":
        label = json.stem.removeprefix("instances_")
        split = next((split for split, names in SPLITS.items() if label.startswith(names)), "train")
        return _pictures(json.parent.parent, json, split)
    return next(json.parent / name for name in IMAGES if (json.parent / name).is_dir())


def _folder(images: str | os.PathLike[str]) -> Path:
    if not Path(images).is_dir():
        raise DataError(f"--images {images}: no such folder")
    return Path(images)
