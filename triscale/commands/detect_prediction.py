"""detect predict: image files in, boxes out, drawn and as COCO results."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter, deque
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import tyro

from triscale.commands.detect_converting import DetectorReading
from triscale.commands.run_folder import run_folder
from triscale.commands.running import Speed, available, progress
from triscale.text import printable

if TYPE_CHECKING:
    from triscale.detect.model_file import DetectorCard
    from triscale.detect.predict import Failure, Found
    from triscale.detect.retinanet import Detector

COMMAND = "triscale detect predict"
RESULTS = "results.json"
LONGEST = 180  # bytes of a drawing's name, without what makes it single; file systems take 255


@dataclass
class DetectPredict:
    """Find objects in image files. Of each picture a PNG with its boxes drawn, and all boxes in COCO's result format."""

    files: tyro.conf.Positional[list[str]]
    """Image files, folders of them, patterns such as 'photos/*.jpg', or - for a list on standard input, one a line."""
    weights: Path
    """The detector's model file, or a checkpoint of mmdetection."""
    out: Path | None = None
    """A new or empty folder for the drawings; runs/detect-predict, with a number where that is taken, unless given."""
    json: Path | None = None
    """A new file for the boxes instead of results.json in --out."""
    ids: Path | None = None
    """A COCO JSON whose ids the results get: of images by file_name, of classes by name. Else files are numbered from 1 as they are
    given, and classes have the ids of the data that the detector was trained on."""
    min_score: float = 0.3
    """Boxes that score no higher are left out; COCO's evaluation takes those above 0.05."""
    reading: DetectorReading = field(default_factory=DetectorReading)
    speed: Speed = field(default_factory=lambda: Speed(batch=4))


def detect_predict(args: list[str]) -> int:
    """Runs the command; returns the exit status: 1 where some files failed, 2 where all did."""
    from triscale.commands import TYRO

    given = tyro.cli(DetectPredict, args=args, prog=COMMAND, config=TYRO)
    _check(given)
    given.out = run_folder(given.out, "detect-predict", resume=False, first=True)
    from triscale.commands.prediction import listed_files
    from triscale.latency import set_threads
    from triscale.predict import image_files

    files = image_files(listed_files(given.files))
    if not files:
        raise ValueError(f"no image files in {', '.join(given.files)}")
    net, card = given.reading.open("detect predict", given.weights)
    ids: Sequence[int] = range(1, len(files) + 1)
    if given.ids is not None:
        ids, categories = ids_by_name(given.ids, files, card.classes)
        card = replace(card, category_ids=categories)
    set_threads(given.speed.threads)
    net.to(available(given.speed.device))
    return _carry_out(given, net, card, files, ids)


def _check(given: DetectPredict) -> None:
    """Raises ValueError for options out of range."""
    from triscale.recipe import MAX_SIZE

    given.speed.check()
    if not 0 <= given.min_score <= 1:
        raise ValueError(f"--min-score: expected a number from 0 to 1, found {given.min_score:g}")
    if given.reading.size is not None and not 1 <= given.reading.size <= MAX_SIZE:
        raise ValueError(f"--size: expected 1 to {MAX_SIZE} pixels, found {given.reading.size}")
    if given.json is not None and given.json.exists():
        raise ValueError(f"--json {given.json}: exists already; give another")


def ids_by_name(path: Path, files: Sequence[str], classes: Sequence[str]) -> tuple[list[int], tuple[int, ...]]:
    """The ids that the COCO JSON `path` has for each file and class. A file is the image whose file_name its whole path ends with.

    Raises ValueError for a file or a class that has none, and for two files of one image.
    """
    from triscale.detect.coco_json import categories, image_rows, listed, many, read_tables

    tables = read_tables(path)
    by_name = {name: number for number, name in categories(path, tables["categories"]).items()}
    if lacking := [name for name in classes if name not in by_name]:
        raise ValueError(f"--ids {path}: the detector's {listed(lacking)} {'is' if len(lacking) == 1 else 'are'} not among its categories")
    rows = image_rows(path, tables["images"])
    known = {PurePosixPath(row.name).parts: row.id for row in rows}
    if len(known) < len(rows):
        raise ValueError(f"--ids {path}: {len(rows) - len(known)} of its {len(rows)} images share their file_name with others")
    parts = [Path(os.path.abspath(file)).parts for file in files]
    found = [next((known[p[i:]] for i in range(len(p)) if p[i:] in known), None) for p in parts]
    if missing := [file for file, number in zip(files, found, strict=True) if number is None]:
        raise ValueError(f"--ids {path}: {len(missing)} of {len(files)} files aren't among its images: {listed(missing)}")
    ids = [number for number in found if number is not None]
    if twice := sorted(number for number, count in Counter(ids).items() if count > 1):
        raise ValueError(f"--ids {path}: several of the files are {many('image', twice)}; give each once")
    return ids, tuple(by_name[name] for name in classes)


def drawing_names(files: Sequence[str]) -> list[str]:
    """A name for each file's drawing: its own with .png, and a number where another has it already, in whatever case."""
    count, used, names = Counter[str](), set[str](), list[str]()
    for file in files:
        stem = printable(Path(file).stem).encode()[:LONGEST].decode(errors="ignore").lstrip(".") or "picture"
        name = f"{stem}.png"
        while name.lower() in used:  # some file systems tell no difference
            count[stem] += 1
            name = f"{stem}-{count[stem] + 1}.png"
        used.add(name.lower())
        names.append(name)
    return names


def _carry_out(given: DetectPredict, net: Detector, card: DetectorCard, files: Sequence[str], ids: Sequence[int]) -> int:
    from triscale.detect.predict import Failure, detect_files

    out, workers, stream = given.out or Path(), given.speed.workers, sys.stdout
    target = given.json or out / RESULTS
    rows, done = list[dict[str, Any]](), 0
    found = detect_files(net, card, files, min_score=given.min_score, batch_size=given.speed.batch, workers=workers)
    drawn = _drawn(found, [out / name for name in drawing_names(files)], card.classes, workers)
    try:
        with progress("detecting", len(files)) as tick, closing(found), closing(drawn):
            for number, result in zip(ids, drawn, strict=True):
                tick()
                if isinstance(result, Failure):
                    print(f"{COMMAND}: {result.reason}", file=sys.stderr)
                    continue
                done += 1
                rows += result.rows(number, card.category_ids)
                # On a terminal the bar makes room for what is printed; what goes elsewhere must not pass through it.
                print(_line(result, card.classes), file=None if stream.isatty() else stream, flush=True)
    except KeyboardInterrupt:
        if done:
            _write(target, rows)
        raise KeyboardInterrupt(f"{done} of {len(files)} pictures are done{f', their boxes in {target}' if done else ''}") from None
    if done:
        _write(target, rows)
        print(f"{len(rows)} box{'es' * (len(rows) != 1)} in {done} picture{'s' * (done != 1)}, drawn in {out}, as COCO results in {target}")
    if failures := len(files) - done:
        print(f"{COMMAND}: {failures} of {len(files)} files failed", file=sys.stderr)
    return 0 if not failures else 1 if done else 2


def _drawn(found: Iterable[Found | Failure], paths: Sequence[Path], classes: Sequence[str], workers: int | None) -> Generator[Found | Failure]:
    """The same results in the same order, each once its picture is drawn: by threads, while the network has the next ones."""
    import torch

    workers = workers or torch.get_num_threads()
    waiting: deque[Future[Found | Failure]] = deque()
    pool = ThreadPoolExecutor(workers, "draw")
    try:
        for result, path in zip(found, paths, strict=True):
            waiting.append(pool.submit(_draw, result, path, classes))
            while waiting and (len(waiting) > 2 * workers or waiting[0].done()):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _draw(result: Found | Failure, path: Path, classes: Sequence[str]) -> Found | Failure:
    """Decodes the picture once more: kept until here, those ahead could take gigabytes."""
    from triscale.data.decode import BadImage, decode
    from triscale.detect.drawing import draw_boxes, save_drawing
    from triscale.detect.predict import Failure

    if isinstance(result, Failure):
        return result
    try:
        image = decode(result.file)
    except BadImage as error:
        return Failure(result.file, str(error))
    if image.shape[:2] != (result.height, result.width):
        return Failure(result.file, f"{printable(result.file)}: was changed while the network had it")
    save_drawing(path, draw_boxes(image, result.boxes, result.labels, result.scores, classes))
    return result


def _line(found: Found, classes: Sequence[str]) -> str:
    """The file, and of each class found in it how many boxes and the best one's score."""
    told = []
    for k in sorted(set(found.labels.tolist())):
        scores = found.scores[found.labels == k]
        told.append(f"{len(scores)} {printable(classes[k])} (best {scores.max():.2f})")
    return f"{printable(found.file)}: {', '.join(told) or 'no boxes'}"


def _write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """COCO results, one box a line."""
    from triscale.files import write_text

    body = ",\n".join(map(json.dumps, rows))
    write_text(path, f"[\n{body}\n]\n" if rows else "[]\n")
