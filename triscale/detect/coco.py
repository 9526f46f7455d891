"""Pictures with boxes from COCO JSON, checked whole before anything is trained: what is wrong is told by id.

An error: what contradicts itself, so that no reading of it is safe (a JSON of another layout, double ids, unknown categories,
boxes that aren't four numbers). A counted note: what can be set right or left out. Boxes outside their image or without area and
boxes of images that aren't listed are dropped, those across an edge cut there; images that are missing, can't be read or have
another size than the JSON says are left out.

Conventions: boxes are x1, y1, x2, y2 in pixels of the upright image, continuous: x1 is the left edge of the first pixel, x2 the
right edge of the last, the width x2 - x1. Category ids, with whatever gaps, become classes 0..K-1 in the order of the ids. Images
and boxes are in the order of their ids, whatever the order in the file.

mmdetection leaves out more for training: boxes under one pixel wide or high, and images without boxes. `with_boxes` has the latter.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from triscale.data.decode import BadImage, decode
from triscale.data.sources import DataError
from triscale.detect.coco_json import BoxRow, ImageRow, box_rows, categories, image_rows, listed, many, read_tables
from triscale.detect.image_size import image_size
from triscale.text import printable

MOST_BOXES = 10_000  # of one image: matched with 150 000 anchors they take 6 GB
Watch = Callable[[int, int], None]  # files looked at, in all


class ImageEntry(NamedTuple):
    """name: a path under the folder of images. Size in pixels, upright."""

    id: int
    name: str
    height: int
    width: int


@dataclass(frozen=True, eq=False)
class BoxData:
    """N images and their M boxes, one image's after the other's; image i has those from starts[i] to starts[i + 1].

    boxes (M, 4) float32, cut at the image's edge; labels (M,) int64 in 0..K-1; crowd (M,) bool: a region of uncounted objects, no
    target in training; given (M, 4) float64: x, y, width, height as in the file; areas (M,) float64: the file's, which COCO's
    small, medium and large go by; ids (M,) int64; starts (N + 1,) int64. category_ids: the file's, of each class.
    notes: what the user should be told, a line each. left_out: why each image was that isn't here, a line each.
    """

    root: Path
    images: tuple[ImageEntry, ...]
    classes: tuple[str, ...]
    category_ids: tuple[int, ...]
    boxes: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    given: np.ndarray
    areas: np.ndarray
    ids: np.ndarray
    starts: np.ndarray
    notes: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.images)

    def name(self, number: int) -> str:
        return printable(self.images[number].name)

    def path(self, number: int) -> Path:
        return self.root / self.images[number].name

    def image(self, number: int) -> np.ndarray:
        """(H, W, 3) uint8 RGB, upright. Raises BadImage where the file can't be read or its size isn't that of the entry."""
        entry, pixels = self.images[number], decode(self.path(number))
        if pixels.shape[:2] != (entry.height, entry.width):
            found = f"{pixels.shape[1]}x{pixels.shape[0]}"
            raise BadImage(f"{self.name(number)}: expected {entry.width}x{entry.height} pixels, found {found}; its boxes may be wrong")
        return pixels

    def targets(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Boxes (B, 4) float32 and labels (B,) int64 of an image, without crowds; B may be 0."""
        mine = slice(self.starts[number], self.starts[number + 1])
        single = ~self.crowd[mine]
        return self.boxes[mine][single], self.labels[mine][single]

    def crowds(self, number: int) -> np.ndarray:
        """Crowd regions (B, 4) float32 of an image."""
        mine = slice(self.starts[number], self.starts[number + 1])
        return self.boxes[mine][self.crowd[mine]]

    def counts(self) -> np.ndarray:
        """(K,) int64: boxes of each class, without crowds."""
        return np.bincount(self.labels[~self.crowd], minlength=len(self.classes))

    def with_boxes(self) -> np.ndarray:
        """Numbers of the images that have a box that is no crowd: what mmdetection trains on."""
        images = np.repeat(np.arange(len(self)), np.diff(self.starts))
        return np.unique(images[~self.crowd])

    def to_coco(self) -> dict[str, Any]:
        """The same as COCO JSON, boxes and areas as they were given: the truth for COCO's evaluation, crowds in it.

        Annotations keep their ids, but where one is 0 they are numbered from 1: pycocotools takes a match with number 0 for none.
        """
        ids = self.ids if self.ids.all() else np.arange(1, len(self.ids) + 1)
        images = [{"id": e.id, "file_name": e.name, "height": e.height, "width": e.width} for e in self.images]
        owners = np.repeat([e.id for e in self.images], np.diff(self.starts)).tolist()
        columns = zip(ids.tolist(), owners, self.labels.tolist(), self.given.tolist(), self.areas.tolist(), self.crowd.tolist(), strict=True)
        annotations = [
            {"id": i, "image_id": image, "category_id": self.category_ids[label], "bbox": box, "area": area, "iscrowd": int(crowd)}
            for i, image, label, box, area, crowd in columns
        ]
        classes = [{"id": i, "name": name} for i, name in zip(self.category_ids, self.classes, strict=True)]
        return {"images": images, "annotations": annotations, "categories": classes}


def read_coco(
    json_path: str | os.PathLike[str], images_root: str | os.PathLike[str], *, check_files: bool = True, watch: Watch | None = None
) -> BoxData:
    """The boxes of a COCO JSON file whose images' file_name are paths under images_root.

    check_files: looks at each image's header, which takes about 0.1 ms a file on a local disk; without it a missing image or a
    wrong size shows as BadImage when the image is read, and a JSON without sizes is refused. Raises DataError, one line; see the
    head of this file for what is an error and what a note.
    """
    path, root = Path(json_path), Path(images_root)
    if not root.is_dir():
        raise DataError(f"{root}: {'not a folder' if root.exists() else 'no such folder'}; expected the folder of the images of {path.name}")
    tables = read_tables(path)
    known = categories(path, tables["categories"])
    rows = image_rows(path, tables["images"])
    annotations, without_area = box_rows(path, tables["annotations"], known)
    notes: dict[str, Sequence[object]] = {"whose area is no number: width x height taken": without_area}
    images, left_out = _files(path, root, rows, watch) if check_files else (_as_told(path, rows), [])
    kept = _placed(path, annotations, {row.id for row in rows}, {e.id: e for e in images}, notes)
    data = _joined(root, images, known, kept)
    return _with_notes(path, data, notes, rows, left_out)


def _as_told(path: Path, rows: Sequence[ImageRow]) -> list[ImageEntry]:
    without = [row.id for row in rows if not row.height]
    if without:
        raise DataError(f"{path}: {many('image', without)}: expected width and height, found neither; let the files be looked at")
    return [ImageEntry(*row) for row in rows]


def _files(path: Path, root: Path, rows: Sequence[ImageRow], watch: Watch | None) -> tuple[list[ImageEntry], list[str]]:
    """The images whose files are there and as large as told, and why each other one isn't among them."""
    images, left_out = [], []
    for i, row in enumerate(rows):
        try:
            images.append(_entry(root, row))
        except BadImage as error:
            left_out.append(f"image {row.id}, {printable(row.name)}: {error}")
        if watch:
            watch(i + 1, len(rows))
    if not images:
        raise DataError(f"{path}: none of its {len(rows)} images can be used under {root}; the first: {left_out[0]}")
    return images, left_out


def _entry(root: Path, row: ImageRow) -> ImageEntry:
    size = image_size(root / row.name)
    if row.height and (row.height, row.width) != (size.height, size.width):
        if size.turned and (row.height, row.width) == (size.width, size.height):
            raise BadImage(f"{row.width}x{row.height} in the JSON is the size before its EXIF orientation; store it upright, or turn its boxes")
        raise BadImage(f"{row.width}x{row.height} in the JSON, {size.width}x{size.height} in the file; its boxes may be wrong")
    return ImageEntry(row.id, row.name, size.height, size.width)


class _Kept(NamedTuple):
    rows: list[BoxRow]
    corners: np.ndarray


def _placed(path: Path, rows: Sequence[BoxRow], images: set[int], entries: dict[int, ImageEntry], notes: dict[str, Sequence[object]]) -> _Kept:
    """The annotations that have a place, in the order of images and ids, and their corners (M, 4) float32 within their images."""
    homeless = [row.id for row in rows if row.image_id not in images]
    if rows and len(homeless) == len(rows):
        raise DataError(f"{path}: all {len(rows)} annotations are of images that aren't in its list ({many('annotation', homeless)})")
    mine = sorted((row for row in rows if row.image_id in entries), key=lambda row: row.image_id)  # stable: by id within an image
    given = np.array([row.box for row in mine], np.float64).reshape(-1, 4)
    whole = np.concatenate([given[:, :2], given[:, :2] + given[:, 2:]], 1)
    limits = np.array([(entries[row.image_id].width, entries[row.image_id].height) for row in mine], np.float64).reshape(-1, 2)
    corners = np.clip(whole, 0, np.tile(limits, 2)).astype(np.float32)
    empty = (given[:, 2:] <= 0).any(1)
    outside = ~empty & (corners[:, 2:] <= corners[:, :2]).any(1)
    cut = ~empty & ~outside & ((whole[:, :2] < 0) | (whole[:, 2:] > limits)).any(1)
    ids = np.array([row.id for row in mine], np.int64)
    notes["dropped: their images aren't in the list"] = homeless
    notes["dropped: boxes without area"] = ids[empty].tolist()
    notes["dropped: boxes outside their images"] = ids[outside].tolist()
    notes["cut at the edge of their images"] = ids[cut].tolist()
    keep = np.flatnonzero(~empty & ~outside)
    return _Kept([mine[i] for i in keep], corners[keep])


def _joined(root: Path, images: Sequence[ImageEntry], known: dict[int, str], kept: _Kept) -> BoxData:
    numbers = {e.id: i for i, e in enumerate(images)}
    labels = {category: i for i, category in enumerate(known)}
    owners = np.array([numbers[row.image_id] for row in kept.rows], np.int64)
    columns: dict[str, Any] = {
        "boxes": kept.corners,
        "labels": np.array([labels[row.category_id] for row in kept.rows], np.int64),
        "crowd": np.array([row.crowd for row in kept.rows], bool),
        "given": np.array([row.box for row in kept.rows], np.float64).reshape(-1, 4),
        "areas": np.array([row.area for row in kept.rows], np.float64),
        "ids": np.array([row.id for row in kept.rows], np.int64),
        "starts": np.searchsorted(owners, np.arange(len(images) + 1)).astype(np.int64),
    }
    for column in columns.values():
        column.setflags(write=False)
    return BoxData(root, tuple(images), tuple(known.values()), tuple(known), **columns)


def _with_notes(path: Path, data: BoxData, notes: dict[str, Sequence[object]], rows: Sequence[ImageRow], left_out: list[str]) -> BoxData:
    most = np.diff(data.starts)
    crowded = [data.images[i].id for i in np.flatnonzero(most > MOST_BOXES)]
    if crowded:
        raise DataError(f"{path}: {many('image', crowded)}: more than {MOST_BOXES} boxes in one; cut it into tiles")
    told = [f"{path.name}: {len(ids)} annotation{'s' * (len(ids) != 1)} {what} ({many('id', ids)})" for what, ids in notes.items() if ids]
    if left_out:
        told.append(f"{path.name}: {len(left_out)} of {len(rows)} images left out with their boxes; the first: {left_out[0]}")
    empty = [e.id for e, count in zip(data.images, most, strict=True) if not count]
    if empty:
        told.append(f"{path.name}: {len(empty)} of {len(data)} images without boxes ({many('id', empty)}): all background")
    unseen = [name for name, count in zip(data.classes, data.counts(), strict=True) if not count]
    if unseen:
        told.append(f"{path.name}: {len(unseen)} of {len(data.classes)} classes without an example: {listed(unseen)}")
    shared = defaultdict(list)
    for entry in data.images:
        shared[entry.name].append(entry.id)
    twice = [i for ids in shared.values() if len(ids) > 1 for i in ids]
    if twice:
        told.append(f"{path.name}: {len(twice)} images share their files with others ({many('id', twice)})")
    return replace(data, notes=tuple(told), left_out=tuple(left_out))
