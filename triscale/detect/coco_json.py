"""A COCO JSON file's tables, bounded and checked entry by entry. Untrusted input: it gives tables or DataError, nothing else."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, NoReturn

from triscale.data.sources import DataError
from triscale.text import printable

MAX_BYTES = 2 << 30  # COCO's train2017 has 0.45 GB, LVIS 1.1 GB
MAX_CLASSES = 10_000  # LVIS has 1203
MAX_ID = 1 << 53  # whole numbers that JSON's readers agree on (RFC 8259)
MAX_SIDE, MAX_VALUE = 1 << 24, 1e9
TABLES = ("images", "annotations", "categories")
LISTED = 5  # ids that a message names
LONGEST_NAME = 200  # characters of a class
_LAYOUT = 'expected COCO JSON: an object with the lists "images", "annotations" and "categories"'


class ImageRow(NamedTuple):
    """height, width: 0 where the file doesn't tell them."""

    id: int
    name: str
    height: int
    width: int


class BoxRow(NamedTuple):
    """box: x, y, width, height as in the file, pixels. area: of the file, else width x height."""

    id: int
    image_id: int
    category_id: int
    box: tuple[float, float, float, float]
    area: float
    crowd: bool


def read_tables(path: Path, max_bytes: int = MAX_BYTES) -> dict[str, list[dict[str, Any]]]:
    """The three lists of a COCO JSON file, without the annotations' outlines. Raises DataError for anything else, NaN and Infinity."""
    try:
        size = path.stat().st_size
        if size > max_bytes:
            raise DataError(f"{path}: {size} bytes, more than the limit of {max_bytes}; split it, or leave its segmentations out")
        found = json.loads(path.read_bytes(), object_hook=_without_outline, parse_constant=_refuse)
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError, MemoryError) as error:
        raise DataError(f"{path}: no JSON file that can be read ({' '.join(str(error).split())[:120] or type(error).__name__})") from None
    if not isinstance(found, dict):
        hint = "; a list of results has no images and no categories" if isinstance(found, list) else ""
        raise DataError(f"{path}: {_LAYOUT}, found {_kind(found)}{hint}")
    for name in TABLES:
        if not isinstance(found.get(name), list):
            raise DataError(f"{path}: {_LAYOUT}, found {'no ' + name if name not in found else f'{name}: ' + _kind(found[name])}")
        wrong = next((i for i, row in enumerate(found[name]) if not isinstance(row, dict)), None)
        if wrong is not None:
            raise DataError(f"{path}: {name}[{wrong}]: expected an object, found {_kind(found[name][wrong])}")
    return {name: found[name] for name in TABLES}


def image_rows(path: Path, rows: Sequence[dict[str, Any]]) -> list[ImageRow]:
    """The images in the order of their ids. Raises DataError for a path outside the images' folder, a size that is none, a double id."""
    out = []
    for i, row in enumerate(rows):
        number = _id(path, "images", i, row, "id")
        name = row.get("file_name")
        if not isinstance(name, str) or not _inside(name):
            raise DataError(f"{path}: image {number}: expected file_name, a path inside the folder of images, found {_short(name)}")
        height, width = row.get("height"), row.get("width")
        if height is None and width is None:
            height = width = 0
        elif not (type(height) is int and type(width) is int and 0 < height <= MAX_SIDE and 0 < width <= MAX_SIDE):
            raise DataError(f"{path}: image {number}: expected whole numbers above 0 as width and height, found {_short(width)} and {_short(height)}")
        out.append(ImageRow(number, name, height, width))
    if not out:
        raise DataError(f"{path}: no images in it")
    return _by_id(path, "image", out)


def categories(path: Path, rows: Sequence[dict[str, Any]]) -> dict[int, str]:
    """Category id -> name, in the order of the ids, which may have gaps. Raises DataError for none, no name, a double id or name."""
    out: list[tuple[int, str]] = []
    for i, row in enumerate(rows):
        name = row.get("name")
        number = _id(path, "categories", i, row, "id")
        if not isinstance(name, str) or not name.strip() or len(name) > LONGEST_NAME:
            raise DataError(f"{path}: category {number}: expected a name of up to {LONGEST_NAME} characters, found {_short(name)}")
        out.append((number, name))
    if not 0 < len(out) <= MAX_CLASSES:
        raise DataError(f"{path}: expected 1 to {MAX_CLASSES} categories, found {len(out)}")
    _single(path, "category", (n for n, _ in out))
    names = Counter(name for _, name in out)
    twice = [n for n, name in out if names[name] > 1]
    if twice:
        raise DataError(f"{path}: categories {listed(sorted(twice))} share a name; rename or join them")
    return dict(sorted(out))


def box_rows(path: Path, rows: Sequence[dict[str, Any]], known: dict[int, str]) -> tuple[list[BoxRow], list[int]]:
    """The annotations in the order of their ids, and the ids of those whose area was no number and became width x height.

    Raises DataError for a category that isn't in `known`, a box that isn't four finite numbers, a double id.
    """
    out, without_area, unknown, no_box = [], [], [], []
    for i, row in enumerate(rows):
        number = _id(path, "annotations", i, row, "id")
        image, category = (_id(path, "annotations", i, row, name) for name in ("image_id", "category_id"))
        box, crowd, area = row.get("bbox"), row.get("iscrowd", 0), row.get("area")
        if crowd not in (0, 1):  # true and false are 1 and 0
            raise DataError(f"{path}: annotation {number}: expected iscrowd 0 or 1, found {_short(crowd)}")
        if category not in known:
            unknown.append(number)
        if not (isinstance(box, list) and len(box) == 4 and all(_number(v) for v in box)):
            no_box.append(number)
            continue
        x, y, width, height = map(float, box)
        if area is not None and not (_number(area) and area >= 0):
            without_area.append(number)
            area = None
        out.append(BoxRow(number, image, category, (x, y, width, height), width * height if area is None else float(area), bool(crowd)))
    if no_box:
        raise DataError(f"{path}: {many('annotation', no_box)}: expected bbox, four finite numbers [x, y, width, height] in pixels")
    if unknown:
        ids = ", ".join(map(str, list(known)[:LISTED])) + (", ..." if len(known) > LISTED else "")
        raise DataError(f"{path}: {many('annotation', unknown)}: category_id isn't among categories ({ids}); add the category, or drop them")
    return _by_id(path, "annotation", out), without_area


def listed(ids: Sequence[object]) -> str:
    """The first few, and how many more."""
    more = f" and {len(ids) - LISTED} more" if len(ids) > LISTED else ""
    return ", ".join(printable(str(i)) for i in ids[:LISTED]) + more


def many(noun: str, ids: Sequence[object]) -> str:
    """`annotation 3`, `annotations 3, 5`."""
    return f"{noun if len(ids) == 1 else noun + 's'} {listed(ids)}"


def _by_id(path: Path, noun: str, rows: list[Any]) -> list[Any]:
    _single(path, noun, (row.id for row in rows))
    return sorted(rows, key=lambda row: row.id)


def _single(path: Path, noun: str, ids: Iterable[int]) -> None:
    twice = sorted(i for i, count in Counter(ids).items() if count > 1)
    if twice:
        raise DataError(f"{path}: {noun} id {listed(twice)} {'stands' if len(twice) == 1 else 'stand'} there more than once; ids have to be unique")


def _id(path: Path, table: str, place: int, row: dict[str, Any], name: str) -> int:
    value = row.get(name)
    if type(value) is not int or abs(value) >= MAX_ID:
        which = f"annotation {row['id']}" if name != "id" else f"{table}[{place}]"
        raise DataError(f"{path}: {which}: expected {name}, a whole number, found {_short(value)}")
    return value


def _number(value: object) -> bool:
    return type(value) in (int, float) and -MAX_VALUE <= value <= MAX_VALUE  # type: ignore[operator]


def _inside(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return bool(parts) and not name.startswith("/") and ".." not in parts and "\0" not in name


def _short(value: object) -> str:
    if isinstance(value, (list, dict)):
        return _kind(value)
    return (
        "none" if value is None else printable(repr(value) if type(value) is not int else f"{value:.4g}" if abs(value) >= MAX_ID else str(value))[:80]
    )


def _kind(value: object) -> str:
    return {list: "a list", dict: "an object", str: "a text", type(None): "null"}.get(type(value), "a number")


def _without_outline(found: dict[str, Any]) -> dict[str, Any]:
    """Outlines are nine tenths of the memory that COCO's annotations take."""
    found.pop("segmentation", None)
    return found


def _refuse(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number of JSON")
