"""The right class of each image file of an evaluation: by a labels file, class names, WordNet ids or class numbers.

`truth` takes the first of these that applies; folders are those that hold the images:

1. a labels file given by name;
2. DATA/labels.csv, unless it is a list of WordNet ids and the folders are the model's own class names;
3. all folders are class names of the model;
4. all folders are WordNet ids (n01440764) and the model has 1000 classes: ImageNet's order, the ids sorted;
5. all folders are numbers below the number of classes (ImageNet-V2): the number is the class. As text they would sort 0, 1,
   10, 100, ...; a model that was trained on folders so named has them as class names, and falls under 3.

A labels file is CSV with a header of two kinds: `wnid,index,...`: folder name -> class index; or `file,label,...`: a path
relative to DATA (of DATA's own labels.csv: to its folder) -> class name or, where no class is so called, class index.
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from triscale.data.datasets import EVALUATION_FOLDERS, NAMED, DataError
from triscale.data.decode import IMAGE_SUFFIXES
from triscale.imagenet import CLASSES, imagenet_classes
from triscale.text import first_line, printable

_VALIDATION = re.compile(r"_val_(\d{8})\.")  # ILSVRC2012_val_00000001.JPEG, the first
_REMEDY = "give --labels FILE.csv with the columns wnid,index or file,label"


@dataclass(frozen=True)
class Truth:
    """Image files of an evaluation. names: paths relative to root. labels: class indices, None where nothing tells them.

    how: what gave the labels, in words. passed_over: images of DATA that are not evaluated.
    """

    root: Path
    names: tuple[str, ...]
    labels: tuple[int, ...] | None
    how: str
    passed_over: int = 0

    @property
    def files(self) -> list[str]:
        return [str(self.root / name) for name in self.names]


def truth(data: str, classes: Sequence[str], labels: Path | None = None) -> Truth:
    """The images of the folder `data` and their classes, by the rules at the head of this file.

    `data` is a folder of class folders, or has such folders in val, valid, validation or test (which are taken where it has
    none itself, or has train beside them). A folder of images alone has no labels. Raises DataError, which names the first
    folder or line that can't be placed.
    """
    given = Path(data)
    root = evaluation_folder(data)
    found = labels or next((p for p in (given / "labels.csv", root / "labels.csv") if p.is_file()), None)
    table = _read(found) if found else []
    if found and "file" in table[0]:
        return _by_file(given if labels else found.parent, found, table, classes)
    folders, loose = _folders(root)
    if not folders:
        if not loose:
            raise DataError(f"{root}: no images in it, nor in its folders")
        if labels:
            raise DataError(f"{labels}: lists folders, but {root} has images and no folders; give the columns file,label")
        return Truth(root, tuple(loose), None, "no labels")
    index, how = _of_folders(root, list(folders), classes, found, table, chosen=labels is not None)
    names = [(f"{folder}/{name}", index[folder]) for folder, files in folders.items() for name in files]
    return Truth(root, tuple(name for name, _ in names), tuple(label for _, label in names), how, len(loose))


def real_labels(path: Path, names: Iterable[str], classes: int) -> list[tuple[int, ...]]:
    """The ReaL labels of validation images, by the number in each file's name: class indices, none where no class was agreed on.

    path: real.json of github.com/google-research/reassessed-imagenet: a list of class lists in the order of
    ILSVRC2012_val_00000001.JPEG and so on. Raises DataError for another file, a name without such a number, or a model
    of other than 1000 classes.
    """
    if classes != CLASSES:
        raise DataError(f"{path}: ReaL labels are for ImageNet's {CLASSES} classes, the model has {classes}")
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: no JSON file that can be read ({first_line(error)})") from None
    good = isinstance(table, list) and all(isinstance(row, list) and all(type(c) is int and 0 <= c < CLASSES for c in row) for row in table)
    if not good:
        raise DataError(f"{path}: expected a list of lists of class indices from 0 to {CLASSES - 1}, as in ReaL's real.json")
    out = []
    for name in names:
        match = _VALIDATION.search(name)
        if not match or not 1 <= int(match[1]) <= len(table):
            raise DataError(
                f"{printable(name)}: expected a name like ILSVRC2012_val_00000001.JPEG, numbered from 1 to {len(table)}, to find its ReaL label"
            )
        out.append(tuple(table[int(match[1]) - 1]))
    return out


def devkit_ids(path: Path | None, classes: int = CLASSES) -> tuple[int, ...]:
    """The number from 1 to 1000 that ImageNet's test server has for each class index.

    path: the order of the development kit, where kit fox is 1: a WordNet id a line, or its map_clsloc.txt (`n02119789 1
    kit_fox`). Without it index + 1, which is another order: sorted ids, tench first. Raises DataError for another list, and
    for one in sorted order, which the kit's is not, and for a model of other than 1000 classes.
    """
    if classes != CLASSES:
        raise DataError(f"ImageNet's test server takes its {CLASSES} classes, the model has {classes}")
    wnids = [c.wnid for c in imagenet_classes()]
    if path is None:
        return tuple(range(1, CLASSES + 1))
    try:
        rows = [line.split() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from None
    ids = {row[0]: int(row[1]) if len(row) > 1 and row[1].isdecimal() else i for i, row in enumerate(rows, 1)}
    if sorted(ids) != wnids or sorted(ids.values()) != list(range(1, CLASSES + 1)):
        raise DataError(f"{path}: expected the {CLASSES} WordNet ids of ImageNet, one a line in the development kit's order")
    if [ids[w] for w in wnids] == list(range(1, CLASSES + 1)):
        raise DataError(f"{path}: the WordNet ids are in sorted order; the development kit's order is another (its first is n02119789)")
    return tuple(ids[w] for w in wnids)


def evaluation_folder(given: str) -> Path:
    """The folder in which `truth` looks for class folders. Raises DataError where `given` is no folder."""
    data = Path(given)
    if not data.is_dir():
        named = "; names of data sets are for train, eval takes folders of images" if str(data) in NAMED else ""
        raise DataError(f"{data}: {'not a folder' if data.exists() else 'no such folder'}{named}")
    inside = next((data / name for name in EVALUATION_FOLDERS if (data / name).is_dir()), None)
    if inside is None or not ((data / "train").is_dir() or set(_folders(data)[0]) <= {*EVALUATION_FOLDERS}):
        return data
    return inside


def _folders(root: Path) -> tuple[dict[str, list[str]], list[str]]:
    """Sorted names: of the images in each folder that has some, and of those that lie in root itself. Hidden ones are nobody's."""
    folders = {folder: _images(root / folder) for folder in sorted(e.name for e in os.scandir(root) if e.is_dir() and e.name[0] != ".")}
    return {folder: files for folder, files in folders.items() if files}, _images(root)


def _images(folder: Path) -> list[str]:
    return sorted(e.name for e in os.scandir(folder) if e.name[0] != "." and Path(e.name).suffix.lower() in IMAGE_SUFFIXES and not e.is_dir())


def _of_folders(
    root: Path, folders: list[str], classes: Sequence[str], found: Path | None, table: list[dict[str, str]], *, chosen: bool
) -> tuple[Mapping[str, int], str]:
    """folder -> class index by rules 1 to 5, and which of them it was."""
    names = {name: i for i, name in enumerate(classes)}
    if found and (chosen or not all(folder in names for folder in folders)):
        return _by_table(root, folders, len(classes), found, table), found.name
    wnids = {c.wnid: i for i, c in enumerate(imagenet_classes())} if len(classes) == CLASSES else {}
    numbers = {folder: int(folder) for folder in folders if _is_index(folder, len(classes))}
    rules = ((names, "folders named as the model's classes"), (wnids, "folders named by WordNet ids"), (numbers, "folders named by class numbers"))
    for index, how in rules:
        if all(folder in index for folder in folders):
            return index, how
    nearest = max((index for index, _ in rules), key=lambda index: sum(folder in index for folder in folders))
    first = next(folder for folder in folders if folder not in nearest)
    model = f"{len(classes)} classes, first '{printable(classes[0])}'"
    kinds = f"a class name of the model ({model}), an ImageNet WordNet id, or a number below {len(classes)}"
    raise DataError(f"{printable(str(root / first))}: expected {kinds}, as all folders beside it; {_REMEDY}")


def _by_table(root: Path, folders: list[str], classes: int, path: Path, table: list[dict[str, str]]) -> dict[str, int]:
    index = {row["wnid"]: _index(path, row["wnid"], row["index"], classes) for row in table if row["wnid"] in set(folders)}
    for folder in folders:
        if folder not in index:
            raise DataError(f"{printable(str(root / folder))}: not in {path}; every folder of images needs its line there")
    return index


def _by_file(base: Path, path: Path, table: list[dict[str, str]], classes: Sequence[str]) -> Truth:
    names, out = {name: i for i, name in enumerate(classes)}, dict[str, int]()
    for row in table:
        name = PurePosixPath(row["file"])
        if name.is_absolute() or ".." in name.parts or "\0" in row["file"] or not name.parts:
            raise DataError(f"{path}: expected paths inside {base}, found {row['file']!r}")
        label = names[row["label"]] if row["label"] in names else _index(path, row["file"], row["label"], len(classes))
        if out.setdefault(str(name), label) != label:
            raise DataError(f"{path}: two labels for {printable(str(name))}")
    order = sorted(out)
    folders = {(base / name).parent for name in order}
    there = {(folder / name).relative_to(base).as_posix() for folder in folders if folder.is_dir() for name in _images(folder)}
    return Truth(base, tuple(order), tuple(out[name] for name in order), path.name, len(there - set(order)))


def _index(path: Path, name: str, text: str, classes: int) -> int:
    if not _is_index(text, classes):
        raise DataError(f"{path}: {printable(name)}: expected a class of the model, 0 to {classes - 1}, found {text!r}")
    return int(text)


def _is_index(text: str, classes: int) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= 9 and int(text) < classes


def _read(path: Path) -> list[dict[str, str]]:
    """The rows of a labels file, with at least one of the two pairs of columns, none of whose cells is missing."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            columns = next((pair for pair in (("wnid", "index"), ("file", "label")) if {*pair} <= {*(reader.fieldnames or ())}), None)
            rows = [{name: (row[name] or "").strip() for name in columns} for row in reader] if columns else []
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: no CSV file that can be read ({error})") from None
    if not rows:
        raise DataError(f"{path}: expected CSV with a header wnid,index or file,label and a line for each")
    return rows
