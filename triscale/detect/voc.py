"""Pascal VOC's XML as COCO JSON.

A VOC folder has Annotations/*.xml, JPEGImages/ and lists of names in ImageSets/Main/*.txt. Each list becomes
annotations/instances_LIST.json; images stay where they are, file_name is relative to JPEGImages. Lists of one class
(aeroplane_train.txt, two columns) are passed over. Without lists there is one file, instances_all.json.

Corners in VOC are pixels counted from 1, both inside the box; COCO's x, y are edges counted from 0:
x = xmin - 1, y = ymin - 1, width = xmax - xmin + 1, height = ymax - ymin + 1. A box of one pixel, as a slip of the hand leaves it,
is dropped and counted, as one whose corners are exchanged. (mmdetection's converter makes width and height one pixel smaller.)

difficult becomes iscrowd 1, as in mmdetection's converter: no target in training, nothing to be found in evaluation, and what is
found there is not counted as wrong. COCO matches a crowd by the share of the detection that lies in it, and as often as wished; VOC's
own evaluation by IoU. `difficult` is kept beside it.

Categories are all names in Annotations, sorted (VOC's own order for its twenty), with ids from 1, the same in every file; so are
the ids of images and annotations, which are counted over the sorted XML files.
"""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from triscale.data.decode import IMAGE_SUFFIXES, BadImage
from triscale.data.sources import DataError
from triscale.detect.coco_json import LONGEST_NAME, MAX_SIDE, MAX_VALUE, listed
from triscale.detect.image_size import image_size
from triscale.files import write_text
from triscale.text import printable

MAX_XML = 16 << 20  # bytes; an object takes 250
MAX_LIST = 256 << 20
Watch = Callable[[int, int], None]


@dataclass(frozen=True)
class Converted:
    """files: name of the list, JSON written, images and boxes in it. images_root: what file_name is relative to. notes: a line each."""

    files: tuple[tuple[str, Path, int, int], ...]
    images_root: Path
    classes: tuple[str, ...]
    notes: tuple[str, ...]


class _Object(NamedTuple):
    """corners: xmin, ymin, xmax, ymax as in the file."""

    name: str
    corners: tuple[float, float, float, float]
    difficult: bool


class _Picture(NamedTuple):
    stem: str
    file: str
    height: int
    width: int
    objects: list[_Object]


def convert_voc(source: Path, target: Path, watch: Watch | None = None) -> Converted:
    """Writes target/annotations/instances_LIST.json for each list of the VOC folder `source`; see the head of this file.

    watch: XML files read, in all. Raises DataError, one line: no VOC folder, XML that can't be read, a name in a list without XML.
    """
    folder, images = source / "Annotations", source / "JPEGImages"
    for needed in (folder, images):
        if not needed.is_dir():
            inside = sorted(p.parent.name for p in source.glob("*/Annotations")) if source.is_dir() else []
            hint = f"; give one of {listed(inside)} in it" if inside else ""
            raise DataError(f"{needed}: no such folder; expected Pascal VOC: Annotations, JPEGImages and ImageSets/Main{hint}")
    paths = sorted(p for p in folder.iterdir() if p.suffix.lower() == ".xml" and p.name[0] != ".")
    if not paths or _doubles([p.stem for p in paths]):
        raise DataError(f"{folder}: {'two XML files by the name ' + listed(_doubles([p.stem for p in paths])) if paths else 'no XML files in it'}")
    there = {p.name for p in images.iterdir()}
    pictures = []
    for i, path in enumerate(paths):
        pictures.append(_picture(path, images, there))
        if watch:
            watch(i + 1, len(paths))
    classes = tuple(sorted({thing.name for picture in pictures for thing in picture.objects}))
    if not classes:
        raise DataError(f"{folder}: no object in any of its {len(paths)} XML files")
    notes: list[str] = []
    images_table, boxes_table = _tables(pictures, classes, notes)
    categories = [{"id": i, "name": name} for i, name in enumerate(classes, 1)]
    files = []
    for name, stems in _lists(source, [p.stem for p in pictures], notes).items():
        chosen = [images_table[stem] for stem in stems]
        boxes = [box for stem in stems for box in boxes_table[stem]]
        out = target / "annotations" / f"instances_{name}.json"
        write_text(out, json.dumps({"images": chosen, "annotations": boxes, "categories": categories}) + "\n")
        files.append((name, out, len(chosen), len(boxes)))
    return Converted(tuple(files), images, classes, tuple(notes))


def _tables(
    pictures: list[_Picture], classes: tuple[str, ...], notes: list[str]
) -> tuple[dict[str, dict[str, Any]], dict[str, list[dict[str, Any]]]]:
    """By stem: COCO's entry of the image, and those of its boxes."""
    numbers = {name: i for i, name in enumerate(classes, 1)}
    images, boxes, dropped, zero, count = {}, dict[str, list[dict[str, Any]]](), list[str](), list[str](), 0
    for i, picture in enumerate(pictures, 1):
        images[picture.stem] = {"id": i, "file_name": picture.file, "height": picture.height, "width": picture.width}
        boxes[picture.stem] = []
        for thing in picture.objects:
            if min(thing.corners) < 1:
                zero.append(picture.stem)
            box = _edges(thing.corners)
            if box is None:
                dropped.append(picture.stem)
                continue
            count += 1
            entry = {"id": count, "image_id": i, "category_id": numbers[thing.name], "bbox": box, "area": box[2] * box[3]}
            boxes[picture.stem].append({**entry, "iscrowd": int(thing.difficult), "difficult": int(thing.difficult)})
    if dropped:
        notes.append(f"{_count(dropped, 'object')} dropped, of one pixel or with exchanged corners (in {listed(dropped)})")
    if zero:
        notes.append(f"{_count(zero, 'object')} with corners below 1, where VOC counts pixels from 1 (in {listed(zero)}): were they counted from 0?")
    return images, boxes


def _edges(corners: tuple[float, float, float, float]) -> list[float] | None:
    """VOC's inclusive corners, counted from 1, as COCO's x, y, width, height; None for a single pixel and for exchanged corners."""
    xmin, ymin, xmax, ymax = (int(c) if c == int(c) else c for c in corners)
    if xmax < xmin or ymax < ymin or (xmin, ymin) == (xmax, ymax):
        return None
    return [xmin - 1, ymin - 1, xmax - xmin + 1, ymax - ymin + 1]


def _lists(source: Path, stems: list[str], notes: list[str]) -> dict[str, list[str]]:
    """Name of a list -> stems in it. Raises DataError for a name without XML, or one that stands there twice."""
    out, known, passed_over = dict[str, list[str]](), set(stems), list[str]()
    for path in sorted((source / "ImageSets" / "Main").glob("*.txt")):
        try:
            if path.stat().st_size > MAX_LIST:
                raise DataError(f"{path}: {path.stat().st_size} bytes, more than the limit of {MAX_LIST}")
            lines = [line.split() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: cannot be read ({printable(str(error))})") from None
        if any(len(words) > 1 for words in lines):
            passed_over.append(path.stem)
            continue
        names = [words[0] for words in lines]
        missing = [name for name in names if name not in known]
        if missing:
            raise DataError(f"{path}: {len(missing)} of its {len(names)} names have no XML in Annotations: {listed(missing)}")
        if len(set(names)) < len(names):
            raise DataError(f"{path}: {listed(_doubles(names))} stands there more than once")
        if names:
            out[path.stem] = names
    if passed_over:
        notes.append(f"{_count(passed_over, 'list')} of ImageSets/Main passed over for having more than a name a line: {listed(passed_over)}")
    if not out:
        notes.append("no list of names in ImageSets/Main: all images in one file, instances_all.json")
    return out or {"all": stems}


def _count(things: list[str], noun: str) -> str:
    return f"{len(things)} {noun}{'s' * (len(things) != 1)}"


def _doubles(names: list[str]) -> list[str]:
    return sorted(name for name, count in Counter(names).items() if count > 1)


class _NoDoctype(ET.TreeBuilder):
    """Entities can only be declared in a DTD, and VOC's files have none: without it nothing grows, and nothing is fetched."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise DataError("has a DTD, which annotations have no use for and which could make it grow without bound")


def _picture(path: Path, images: Path, there: set[str]) -> _Picture:
    try:
        if not path.is_file() or path.stat().st_size > MAX_XML:
            raise DataError(f"expected a file of up to {MAX_XML} bytes")
        root = ET.fromstring(path.read_bytes(), ET.XMLParser(target=_NoDoctype()))
        if root.tag != "annotation":
            raise DataError(f"expected <annotation>, found <{printable(root.tag)[:40]}>")
        file = _file(path.stem, (root.findtext("filename") or "").strip(), there)
        height, width = _size(root, images / file)
        return _Picture(path.stem, file, height, width, [_object(thing) for thing in root.iter("object")])
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except (ET.ParseError, ValueError, LookupError) as error:  # LookupError: an encoding that nobody knows
        raise DataError(f"{path}: no XML that can be read ({printable(str(error))[:120]})") from None


def _file(stem: str, told: str, there: set[str]) -> str:
    """The image's name in JPEGImages: the XML's own, else one with what `filename` says. Tools write paths of other machines there."""
    told = told.replace("\\", "/").rsplit("/", 1)[-1]
    if told in there:
        return told
    found = [stem + suffix for suffix in sorted(IMAGE_SUFFIXES | {s.upper() for s in IMAGE_SUFFIXES}) if stem + suffix in there]
    if not found:
        raise DataError(f"no image {stem}.jpg in JPEGImages" + (f", nor {printable(told)[:80]}" if told else ""))
    return found[0]


def _size(root: ET.Element, image: Path) -> tuple[int, int]:
    """Height and width as the XML tells, else, where it tells none or 0, those of the file."""
    told = [_value(root.findtext(f"size/{name}") or "0", name) for name in ("height", "width")]
    if min(told) > 0 and max(told) <= MAX_SIDE:
        return int(told[0]), int(told[1])
    try:
        size = image_size(image)
    except BadImage as error:
        raise DataError(f"it tells no size, and {image.name}: {error}") from None
    return size.height, size.width


def _object(thing: ET.Element) -> _Object:
    name = (thing.findtext("name") or "").strip()
    if not name or len(name) > LONGEST_NAME:
        raise DataError(f"expected an object's <name> of up to {LONGEST_NAME} characters, found {printable(name)[:40] or 'none'}")
    box = thing.find("bndbox")  # the object's own: its parts have theirs inside <part>
    if box is None:
        raise DataError(f"object '{printable(name)}': expected <bndbox>, found none")
    left, top, right, bottom = (_value(box.findtext(c), c) for c in ("xmin", "ymin", "xmax", "ymax"))
    return _Object(name, (left, top, right, bottom), (thing.findtext("difficult") or "0").strip() == "1")


def _value(text: str | None, name: str) -> float:
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    if not abs(value) <= MAX_VALUE:
        raise DataError(f"expected <{name}>, a number, found {printable(text or 'none')[:40]!r}")
    return value
