"""Parquet in the Hugging Face image layout, made readable in any order.

Columns: image, a struct of bytes and path (or bytes alone), and label, class numbers. Parquet is read by row groups of hundreds of
images; so the encoded images are copied once, as they are, to one file in the cache, which all processes map into memory.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from triscale.data import sources
from triscale.data.cache import locked
from triscale.data.sources import DataError, Slices, Texts, parts, split_of
from triscale.files import cache_folder, write_whole
from triscale.quantities import size as size_text
from triscale.text import first_line, printable

if TYPE_CHECKING:
    from triscale.data.datasets import Listing, Watch

IMAGE, LABEL = ("image", "img"), ("label", "fine_label")  # the second names are CIFAR's on the hub
AT_A_TIME = 64  # images
NAMES_AT_A_TIME = 4096
LEAST_ROW = 16  # bytes of a file that a row takes at least, after the first 65,536: the smallest image has some 35
GROWTH = 100  # times a file's size that it may unpack to: encoded images hardly shrink


def by_split(root: Path) -> dict[str, list[Path]]:
    """The Parquet files of a folder, or of `data` in it as the hub has it, by the split that their names tell; "" for others."""
    for folder in (root, root / "data"):
        named: dict[str, list[Path]] = {}
        for path in sorted(p for p in folder.glob("*.parquet") if not p.name.startswith(".")):
            named.setdefault(split_of(path.name), []).append(path)
        if named:
            return named
    return {}


def splits(root: Path) -> tuple[list[Path], list[Path], tuple[str, ...]] | None:
    """(training files, evaluation files, what is in neither) of a folder; no evaluation files: all are one. None where there are none
    at all. Raises DataError where evaluation files would be mixed with others."""
    paths = sorted(p for part in by_split(root).values() for p in part)
    if not paths:
        return None
    named, over = sources.by_split(paths, str(root))
    first, *others = named.values()
    over += tuple(printable(p.name) for part in others[1:] for p in part)
    return first, others[0] if others else [], over


def find_parquet(data: str, train: Sequence[Path], held_out: Sequence[Path], watch: Watch | None = None, *, draw: bool = True) -> Listing:
    """The images of these files; without held_out, by a fixed draw. Raises DataError."""
    from triscale.data.datasets import Listing

    samples = [_samples(paths, watch) for paths in (train, held_out) if paths]
    classes = _classes(train[0], max(int(s.labels.max()) for s in samples) + 1)
    if len(classes) < 2:
        raise DataError(f"{data}: one class only; a classifier needs at least two")
    notes = tuple(f"the images in {Path(data).name} are read from a copy at {s.path} ({size_text(int(s.ends[-1]))})" for s in samples)
    if len(samples) == 1:
        mine, rest, held_out_is = parts(samples[0], len(classes), draw)
        return Listing(data, mine, rest, classes, held_out_is, (), "parquet", notes)
    return Listing(data, samples[0], samples[1], classes, f"{Path(data).name}/{split_of(held_out[0].name) or 'test'}", (), "parquet", notes)


def _samples(paths: Sequence[Path], watch: Watch | None) -> Slices:
    labels = []
    for path in paths:
        file = _open(path)
        label = _column(file, LABEL, path)
        _column(file, IMAGE, path)
        labels.append(_labels(file.read(columns=[label])[label], path))
    both = np.concatenate(labels)
    if not len(both):
        raise DataError(f"{paths[0]}: no rows in it")
    stored_at, ends = _copy(paths, watch)
    if len(ends) != len(both) + 1:
        raise DataError(f"{stored_at}: made of another state of {paths[0]}; delete it and call again")
    return Slices(stored_at, ends, both, Texts(name for path in paths for name in _names(path)))


def _open(path: Path) -> Any:
    try:
        import pyarrow.parquet as pq
    except ImportError:
        raise DataError("reading Parquet needs pyarrow: pip install 'triscale[data]'") from None
    try:
        file = pq.ParquetFile(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: no Parquet file that can be read ({first_line(error)})") from None
    _check_sizes(file.metadata, path)
    return file


def _check_sizes(about: Any, path: Path) -> None:
    """Raises DataError for more rows, or larger row groups, than images can make of a file of this size: they'd fill the memory."""
    there = path.stat().st_size
    if about.num_rows > (1 << 16) + there // LEAST_ROW:
        raise DataError(f"{path}: {about.num_rows} rows in {there} bytes; expected a file of images, which has {LEAST_ROW} bytes a row or more")
    most = max((about.row_group(i).total_byte_size for i in range(about.num_row_groups)), default=0)
    if most > GROWTH * there + (1 << 20):
        raise DataError(f"{path}: a row group unpacks to {most} bytes, more than {GROWTH} times the file's size; it is not what it seems")


def _column(file: Any, known: tuple[str, ...], path: Path) -> str:
    names = file.schema_arrow.names
    found = next((name for name in known if name in names), None)
    if found is None:
        what = "labels: a classifier needs their class numbers in it" if known is LABEL else "images"
        raise DataError(f"{path}: no column '{known[0]}', so no {what}; found {', '.join(map(str, names[:8])) or 'no columns'}")
    return found


def _labels(column: Any, path: Path) -> np.ndarray:
    import pyarrow as pa

    if not pa.types.is_integer(column.type):
        raise DataError(f"{path}: the column 'label' holds {column.type}, expected class numbers (int64)")
    if column.null_count:
        raise DataError(f"{path}: {column.null_count} rows have no label; a classifier needs one for each image")
    labels = column.to_numpy().astype(np.int64)
    if len(labels) and (labels.min() < 0 or labels.max() >= 1 << 20):
        raise DataError(f"{path}: labels from {labels.min()} to {labels.max()}, expected class numbers from 0 (-1 stands for none, as in test sets)")
    return labels


def _names(path: Path) -> Iterator[str]:
    """Of the images, some at a time; FILE:ROW for one without. Raises DataError where they take more than the file could hold."""
    import pyarrow as pa

    file = _open(path)
    image, rows = _column(file, IMAGE, path), int(file.metadata.num_rows)
    kind = file.schema_arrow.field(image).type
    if not pa.types.is_struct(kind) or kind.get_field_index("path") < 0:
        yield from (f"{path.name}:{i}" for i in range(rows))
        return
    left, done = GROWTH * path.stat().st_size + (1 << 20), 0
    for batch in file.iter_batches(NAMES_AT_A_TIME, columns=[f"{image}.path"]):
        column = batch.column(0).flatten()[0]
        left -= column.nbytes
        if left < 0:
            raise DataError(f"{path}: the names of its images take more than {GROWTH} times the file's size; it is not what it seems")
        yield from (name or f"{path.name}:{i}" for i, name in enumerate(column.to_pylist(), done))
        done += len(column)


def _classes(path: Path, count: int) -> tuple[str, ...]:
    """Of the schema's ClassLabel, else of classes.txt beside the file, else numbers."""
    file = _open(path)
    names = _class_label((file.schema_arrow.metadata or {}).get(b"huggingface", b""), _column(file, LABEL, path))
    where = f"{path}: its schema"
    beside = path.parent / "classes.txt"
    if names is None and beside.is_file():
        names, where = tuple(beside.read_text(encoding="utf-8").splitlines()), str(beside)
    if names is not None and len(names) < count:
        raise DataError(f"{where} has {len(names)} class names, but there is a label {count - 1}")
    return names if names is not None else tuple(map(str, range(count)))


def _class_label(metadata: bytes, label: str) -> tuple[str, ...] | None:
    try:
        names = json.loads(metadata)["info"]["features"][label]["names"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return tuple(names) if isinstance(names, list) and all(isinstance(n, str) for n in names) else None


def _copy(paths: Sequence[Path], watch: Watch | None) -> tuple[Path, np.ndarray]:
    """(the file of encoded images in the cache, where each ends), made unless it is there. Named after paths, sizes and times."""
    states = [(os.path.abspath(p), (s := p.stat()).st_size, s.st_mtime_ns) for p in paths]
    key = hashlib.sha256(json.dumps(states).encode("utf-8", "surrogateescape")).hexdigest()[:16]
    folder = cache_folder("parquet")
    images, places = folder / f"{key}.images", folder / f"{key}.ends.npy"
    with locked(images):
        try:
            if places.is_file() and images.is_file():
                ends = np.load(places, allow_pickle=False)
                if ends.dtype == np.int64 and ends.ndim == 1 and images.stat().st_size == ends[-1]:
                    return images, ends
            lengths: list[np.ndarray] = []
            write_whole(images, lambda temporary: lengths.extend(_write(temporary, paths, watch)))
            ends = np.concatenate([[0], np.cumsum(np.concatenate(lengths))]).astype(np.int64)
            write_whole(places, lambda temporary: _save(temporary, ends))
        except OSError as error:
            need = size_text(sum(s[1] for s in states))
            raise DataError(f"{folder}: could not be written ({error.strerror or error}); it takes {need}: make room, or set TRISCALE_HOME") from None
    return images, ends


def _save(path: Path, array: np.ndarray) -> None:
    with open(path, "wb") as file:
        np.save(file, array)


def _write(temporary: Path, paths: Sequence[Path], watch: Watch | None) -> list[np.ndarray]:
    lengths, done, total = [], 0, sum(_open(p).metadata.num_rows for p in paths)
    with open(temporary, "wb") as out:
        for path in paths:
            limit = out.tell() + GROWTH * path.stat().st_size + (1 << 20)
            for part in _encoded(path, out):
                lengths.append(part)
                done += len(part)
                if out.tell() > limit:
                    raise DataError(f"{path}: its images take more than {GROWTH} times the file's size; it is not what it seems")
                if watch:
                    watch("copying images out of Parquet", done, total)
    return lengths


def _encoded(path: Path, out: IO[bytes]) -> Iterator[np.ndarray]:
    """Writes the image files one after the other; yields their lengths, AT_A_TIME of them. A missing one has 0 bytes."""
    import pyarrow as pa

    file = _open(path)
    image = _column(file, IMAGE, path)
    kind = file.schema_arrow.field(image).type
    inner = kind.get_field_index("bytes") if pa.types.is_struct(kind) else -1
    if inner < 0 and not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise DataError(f"{path}: the column '{image}' holds {kind}, expected a struct of bytes and path, or binary")
    try:
        for batch in file.iter_batches(AT_A_TIME, columns=[f"{image}.bytes" if inner >= 0 else image]):
            column = batch.column(0)
            files = (column.flatten()[0] if inner >= 0 else column).cast(pa.large_binary())
            lengths = [out.write(memoryview(f.as_buffer())) if f.is_valid else 0 for f in files]
            yield np.array(lengths, np.int64)
    except (pa.ArrowInvalid, pa.ArrowIOError) as error:
        raise DataError(f"{path}: corrupt Parquet ({first_line(error)})") from None
