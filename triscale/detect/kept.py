"""What a detector's run folder keeps for its page: samples.npz, what the network saw, and found.npz, what it found in the end.

Pictures lie in them as image files, small ones without loss, boxes in the pixels of the picture as it is kept. Both together take
1.1 MB at most, and 2 kB a class.
"""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from triscale.data.decode import BadImage, decode
from triscale.detect.coco import BoxData
from triscale.detect.evaluate import Scores
from triscale.run_log import LogError
from triscale.run_log.pictures import load_arrays, save_arrays
from triscale.text import first_line, printable

SAMPLES, FOUND = "samples.npz", "found.npz"
VIEWS = 9  # training views kept
WORST, EVENLY = 6, 2  # pictures kept of the final evaluation
SIDE, BYTES = 640, 64_000  # of a kept picture, at most
MIN_SCORE = 0.3  # boxes with more are told and drawn; a detector gives many with less, which COCO's numbers rank
OVERLAP = 0.5  # IoU from which a box is found
WRONG, RIGHT, UNCOUNTED = 0, 1, 2  # verdicts: a false or a missed box, a right one, a crowd or a box in one
STEPS = 65535  # of precision, which is kept as uint16


class Marked(NamedTuple):
    """boxes (n, 4) float32, labels (n,) int64, scores (n,) float32, verdicts (n,) int8."""

    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray
    verdicts: np.ndarray

    def errors(self) -> int:
        return int((self.verdicts == WRONG).sum())


class Drawn(NamedTuple):
    """A picture, image (H, W, 3) uint8, with the boxes that are true and those that were found."""

    name: str
    image: np.ndarray
    true: Marked
    found: Marked


class Kept(NamedTuple):
    """The same as it is kept: file is a PNG's or a JPEG's bytes, of a picture of this height and width."""

    name: str
    file: bytes
    height: int
    width: int
    true: Marked
    found: Marked


@dataclass(frozen=True)
class Seen:
    """views: augmented training pictures. data: what the run calls its data. images: how many each split has; boxes (K,): to learn,
    of each class."""

    views: tuple[Kept, ...]
    data: str
    classes: tuple[str, ...]
    images: dict[str, int]
    boxes: np.ndarray


@dataclass(frozen=True)
class Finds:
    """What the final evaluation found with scores above MIN_SCORE.

    errors (N, 2): missed and false boxes of each image; by_class (K, 3): boxes found, missed and false. pictures: the WORST with most
    errors, then EVENLY of the others. precision (10, 101, K): as Scores has it, to 1 / 65535, 0 for classes without boxes.
    """

    pictures: tuple[Kept, ...]
    errors: np.ndarray
    by_class: np.ndarray
    precision: np.ndarray


def judge(true: Marked, found: Marked) -> tuple[Marked, Marked]:
    """Both with their verdicts; true ones come with UNCOUNTED where they are crowds.

    As COCO counts at IoU 0.5: from the highest score down each box takes the true one of its class that it overlaps most of those
    not taken yet; a box of which half lies in a crowd of its class, and which takes none, doesn't count.
    """
    overlap, inside = _overlaps(found.boxes, true.boxes)
    crowd = true.verdicts == UNCOUNTED
    truths, finds = np.where(crowd, UNCOUNTED, WRONG).astype(np.int8), np.zeros(len(found.boxes), np.int8)
    for i in np.argsort(-found.scores, kind="stable"):
        mine = true.labels == found.labels[i]
        free = np.flatnonzero(mine & (truths == WRONG))
        best = free[np.argmax(overlap[i, free])] if len(free) else -1
        if best >= 0 and overlap[i, best] >= OVERLAP:
            truths[best] = finds[i] = RIGHT
        elif (inside[i, mine & crowd] >= OVERLAP).any():
            finds[i] = UNCOUNTED
    return true._replace(verdicts=truths), found._replace(verdicts=finds)


def write_seen(folder: Path, views: Iterable[Drawn], data: str, train: BoxData, images: Mapping[str, int]) -> None:
    """Keeps the first VIEWS of `views`, with what the run is of. Raises OSError."""
    about = {"data": np.array(data), "classes": np.array(train.classes, np.str_), "boxes": train.counts()}
    counts = {"splits": np.array(list(images), np.str_), "images": np.array(list(images.values()), np.int64)}
    save_arrays(folder / SAMPLES, {**about, **counts, **_packed(list(islice(views, VIEWS)))})


def write_found(folder: Path, data: BoxData, rows: Sequence[Mapping[str, Any]], scores: Scores, left_out: Collection[int] = ()) -> None:
    """rows: COCO results on `data`; left_out: numbers of images that count for nothing. Raises OSError."""
    labels = {category: label for label, category in enumerate(data.category_ids)}
    by_image: dict[int, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        if row["score"] > MIN_SCORE:
            by_image[row["image_id"]].append(row)
    judged, errors = {}, []
    by_class = np.zeros((len(data.classes), 3), np.int64)
    for number in (n for n in range(len(data)) if n not in left_out):
        true, found = judged[number] = judge(_truth(data, number), _finds(by_image[data.images[number].id], labels))
        errors.append((true.errors(), found.errors()))
        for column, part, verdict in ((0, true, RIGHT), (1, true, WRONG), (2, found, WRONG)):
            np.add.at(by_class[:, column], part.labels[part.verdicts == verdict], 1)
    order = sorted(judged, key=lambda n: -judged[n][0].errors() - judged[n][1].errors())
    rest = order[WORST:]
    even = [rest[(2 * i + 1) * len(rest) // (2 * EVENLY)] for i in range(EVENLY)] if len(rest) > EVENLY else rest
    pictures = []
    for number in order[:WORST] + even:
        try:
            pictures.append(Drawn(data.name(number), data.image(number), *judged[number]))
        except BadImage:  # it could be read when it was judged; its boxes are counted
            continue
    precision = np.rint(np.nan_to_num(scores.precision) * STEPS).astype(np.uint16)  # along recall it hardly changes, so that it packs well
    arrays = {"precision": np.ascontiguousarray(precision.transpose(2, 0, 1)), "by_class": by_class}
    save_arrays(folder / FOUND, {**arrays, "errors": np.array(errors, np.int64).reshape(-1, 2), **_packed(pictures)})


def read_seen(folder: Path) -> Seen | None:
    """None where there is no samples.npz. Raises LogError."""
    body = load_arrays(folder / SAMPLES, ("data", "classes", "boxes", "splits", "images", *_NAMES))
    if body is None:
        return None
    classes = tuple(map(str, body["classes"]))
    if body["boxes"].shape != (len(classes),) or body["splits"].shape != body["images"].shape:
        raise LogError(f"{folder / SAMPLES}: its arrays don't go together")
    images = dict(zip(map(str, body["splits"]), body["images"].tolist(), strict=True))
    return Seen(_unpacked(folder / SAMPLES, body), str(body["data"]), classes, images, body["boxes"])


def read_found(folder: Path) -> Finds | None:
    """None where there is no found.npz, as while a training runs. Raises LogError."""
    body = load_arrays(folder / FOUND, ("precision", "by_class", "errors", *_NAMES))
    if body is None:
        return None
    precision, by_class, errors = body["precision"], body["by_class"], body["errors"]
    if by_class.ndim != 2 or precision.shape != (len(by_class), 10, 101) or by_class.shape[1] != 3 or errors.shape[1:] != (2,):
        raise LogError(f"{folder / FOUND}: its arrays don't go together")
    return Finds(_unpacked(folder / FOUND, body), errors, by_class, precision.transpose(1, 2, 0) / STEPS)


def marked(boxes: np.ndarray, labels: np.ndarray, scores: np.ndarray | None = None, verdicts: np.ndarray | int = RIGHT) -> Marked:
    """Boxes in the forms in which they are kept; scores: 1 unless given."""
    n = len(labels)
    full = np.broadcast_to(np.asarray(verdicts, np.int8), n)
    return Marked(
        np.asarray(boxes, np.float32).reshape(n, 4), np.asarray(labels, np.int64), np.ones(n, np.float32) if scores is None else scores, full
    )


def nothing() -> Marked:
    """No boxes."""
    return marked(np.empty((0, 4)), np.empty(0))


def _truth(data: BoxData, number: int) -> Marked:
    (boxes, labels), crowds = data.targets(number), data.crowds(number)
    mine = slice(data.starts[number], data.starts[number + 1])
    crowd_labels = data.labels[mine][data.crowd[mine]]
    verdicts = np.repeat([WRONG, UNCOUNTED], [len(labels), len(crowds)])
    return marked(np.concatenate([boxes, crowds]), np.concatenate([labels, crowd_labels]), None, verdicts)


def _finds(rows: Sequence[Mapping[str, Any]], labels: Mapping[int, int]) -> Marked:
    boxes = np.array([row["bbox"] for row in rows], np.float64).reshape(-1, 4)
    corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)
    return marked(corners, np.array([labels[row["category_id"]] for row in rows]), np.array([row["score"] for row in rows], np.float32))


def _overlaps(found: np.ndarray, true: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(m, 4), (n, 4) -> (m, n) IoU, and what share of each found box lies in each true one."""
    a, b = found[:, None].astype(np.float64), true[None].astype(np.float64)
    shared = np.clip(np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2]), 0, None).prod(-1)
    first, second = ((x[..., 2:] - x[..., :2]).prod(-1) for x in (a, b))
    return shared / np.maximum(first + second - shared, 1e-12), shared / np.maximum(first, 1e-12)


_KINDS = ("true", "found")
_NAMES = ("names", "files", "ends", *(f"{kind}_{part}" for kind in _KINDS for part in ("counts", *Marked._fields)))


def _packed(pictures: Sequence[Drawn]) -> dict[str, np.ndarray]:
    """As arrays, _NAMES: one picture's part after the other's."""
    files, out = [], defaultdict(list)
    for picture in pictures:
        file, factor = _file(picture.image)
        files.append(file)
        for kind, part in zip(_KINDS, (picture.true, picture.found), strict=True):
            for name, values in part._replace(boxes=part.boxes * np.float32(factor))._asdict().items():
                out[f"{kind}_{name}"].append(values)
            out[f"{kind}_counts"].append(np.array([len(part.labels)], np.int64))
    empty = {f"{kind}_{name}": values for kind in _KINDS for name, values in nothing()._asdict().items()}
    arrays = {name: np.concatenate([empty[name] if name in empty else np.empty(0, np.int64), *out[name]]) for name in _NAMES[3:]}
    names, ends = np.array([picture.name for picture in pictures], np.str_), np.cumsum([len(file) for file in files], dtype=np.int64)
    return {"names": names, "files": np.frombuffer(b"".join(files), np.uint8), "ends": ends, **arrays}


def _unpacked(path: Path, body: Mapping[str, np.ndarray]) -> tuple[Kept, ...]:
    out = []
    try:
        ends = [0, *body["ends"].tolist()]
        files = [body["files"][start:end].tobytes() for start, end in pairwise(ends)]
        parts = [_split(body, kind) for kind in _KINDS]
        for name, file, true, found in zip(map(str, body["names"]), files, *parts, strict=True):
            high, wide, _ = decode(file, name=printable(name)).shape
            out.append(Kept(name, file, high, wide, true, found))
    except (BadImage, ValueError, IndexError) as error:
        raise LogError(f"{path}: its arrays don't go together ({first_line(error)})"[:300]) from None
    return tuple(out)


def _split(body: Mapping[str, np.ndarray], kind: str) -> list[Marked]:
    ends = np.cumsum(body[f"{kind}_counts"])
    if any(len(body[f"{kind}_{name}"]) != ends[-1:].sum() for name in Marked._fields):
        raise ValueError(f"the {kind} boxes' lengths differ")
    columns = [np.split(body[f"{kind}_{name}"], ends[:-1]) for name in Marked._fields]
    return [Marked(*parts) for parts in zip(*columns, strict=True)][: len(ends)]


def _file(image: np.ndarray) -> tuple[bytes, float]:
    """An image file of BYTES at most, and the factor by which the picture is smaller in it: PNG where that is enough, else JPEG."""
    side, longest = min(SIDE, max(image.shape[:2])), max(image.shape[:2])
    while True:
        factor = side / longest
        picture = Image.fromarray(np.ascontiguousarray(image))
        if factor < 1:
            picture = picture.resize([max(1, round(s * factor)) for s in picture.size], Image.Resampling.LANCZOS)
        small = 3 * picture.width * picture.height <= 2 * BYTES  # of a larger one PNG would take long, and hardly be small enough
        for kind in ("PNG", "JPEG") if small else ("JPEG",):
            buffer = io.BytesIO()
            picture.save(buffer, kind, quality=85)
            if buffer.tell() <= BYTES:
                return buffer.getvalue(), factor
        side = int(side * 0.8)
