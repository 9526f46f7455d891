"""detect eval: how well a detector finds the boxes of a data set, by COCO's twelve numbers."""

from __future__ import annotations

import json
import math
import platform
import sys
import time
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from triscale.commands.detect_converting import DetectorReading
from triscale.commands.run_folder import run_folder
from triscale.commands.running import Speed, available, progress
from triscale.text import aligned, printable

if TYPE_CHECKING:
    from triscale.detect.coco import BoxData
    from triscale.detect.evaluate import Results, Scores
    from triscale.detect.model_file import DetectorCard
    from triscale.detect.retinanet import Detector

COMMAND = "triscale detect eval"
BATCH = 8  # B3 at 896 pixels takes 0.3 GB an image
MEANING = {
    "AP": "mean over IoU 0.50 to 0.95",
    "AP50": "at IoU 0.50",
    "AP75": "at IoU 0.75",
    "APs": "areas up to 32 x 32 pixels",
    "APm": "from 32 x 32 to 96 x 96",
    "APl": "from 96 x 96",
    "AR1": "recall with 1 box a class in an image",
    "AR10": "with 10",
    "AR100": "with 100",
    "ARs": "areas up to 32 x 32 pixels",
    "ARm": "from 32 x 32 to 96 x 96",
    "ARl": "from 96 x 96",
}


@dataclass
class DetectEval:
    """COCO's twelve numbers of a detector, average precision by class, and precision-recall curves.

    Every image counts once, an image without boxes too; unreadable ones are named, counted and left out. The classes of model and data
    are matched by name. Written are results.json (COCO's result format), scores.json and precision-recall.png.
    """

    data: tyro.conf.Positional[str]
    """A folder in COCO's layout, or one JSON file in its format."""
    weights: Path
    """The detector's model file, or a checkpoint of mmdetection."""
    split: Literal["test", "val", "train"] | None = None
    """Of a folder; test where there is one, else val, unless given."""
    images: Path | None = None
    """The folder that file names in the JSON are relative to, where it isn't found by itself."""
    out: Path | None = None
    """The folder of the results; runs/detect-eval-DATA, with a number where that is taken, unless given."""
    reading: DetectorReading = field(default_factory=DetectorReading)
    speed: Speed = field(default_factory=lambda: Speed(batch=BATCH))


def detect_eval(args: list[str]) -> int:
    """Evaluates; returns the exit status: 1 where images were left out, or the network gave numbers that aren't finite."""
    from triscale.commands import TYRO

    given = tyro.cli(DetectEval, args=args, prog=COMMAND, config=TYRO)
    given.speed.check()
    out = run_folder(given.out, f"detect-eval-{Path(given.data).resolve().name.removesuffix('.json')}", resume=False, first=True)
    from triscale.detect.evaluate import check_evaluator, coco_scores, matched_ids
    from triscale.detect.folders import find_split, has_split

    check_evaluator()
    split = given.split or ("test" if has_split(given.data, "test") else "val")
    source = find_split(given.data, split, given.images)  # missing data is told before the weights are read
    net, card = given.reading.open("detect eval", given.weights)
    data = _read(source.json, source.images)
    try:
        ids = matched_ids(card.classes, data)
    except ValueError as error:
        raise ValueError(f"{given.weights} and {source.json}: {error}") from None
    start = time.perf_counter()
    found = _found(net, data, card, ids, given.speed)
    seconds = time.perf_counter() - start
    _tell(found, data, source.json)
    scores = coco_scores(data, found.rows, left_out=found.unreadable)
    setting = {"data": source.json.name, "weights": given.weights.name} | _setting(card, given.speed)
    body = _body(scores, found, data) | {"seconds": seconds, "images_per_second": scores.images / seconds} | setting
    _write(out, body, scores, found)
    print(_summary(body, scores, out))
    return 1 if found.unreadable or found.broken or data.left_out else 0


def _read(path: Path, images: Path) -> BoxData:
    """The data, with what is to be said about it said. Raises DataError, and ValueError where no box is to be found."""
    from triscale.detect.coco import read_coco

    data = read_coco(path, images)
    for line in (*data.left_out, *data.notes):
        print(f"{COMMAND}: {line}", file=sys.stderr)
    if not data.counts().any():
        raise ValueError(f"{path}: expected boxes to be found, found none in its {len(data)} images")
    return data


def _found(net: Detector, data: BoxData, card: DetectorCard, ids: tuple[int, ...], speed: Speed) -> Results:
    import torch

    from triscale.detect.evaluate import coco_results
    from triscale.latency import set_threads

    set_threads(speed.threads)
    net = net.to(torch.device(available(speed.device)))
    with progress("evaluating", len(data)) as tick:
        return coco_results(net, data, card.preprocess, category_ids=ids, batch=speed.batch, workers=speed.workers, tick=tick)


def _tell(found: Results, data: BoxData, path: Path) -> None:
    """Names what failed. Raises ValueError where not one image could be read."""
    for reason in found.unreadable.values():
        print(f"{COMMAND}: {reason}", file=sys.stderr)
    if len(found.unreadable) == len(data):
        raise ValueError(f"{path}: none of its {len(data)} images could be read")
    if found.unreadable:
        print(f"{COMMAND}: {len(found.unreadable)} of {len(data)} images could not be read and are left out", file=sys.stderr)
    if found.broken:
        images = f"{len(found.broken)} of {len(data) - len(found.unreadable)} images"
        print(f"{COMMAND}: the network gave outputs that are not finite for {images}, where it counts as finding nothing", file=sys.stderr)


def _setting(card: DetectorCard, speed: Speed) -> dict[str, Any]:
    """What the figures were measured with."""
    import torch

    from triscale.demo import processor
    from triscale.version import __version__

    machine = {"processor": processor(), "python": platform.python_version(), "torch": torch.__version__, "triscale": __version__}
    device = available(speed.device)
    device = torch.cuda.get_device_name(device) if device.startswith("cuda") else device
    network = {"network": card.arch.name or "unnamed detector", "preprocess": card.preprocess.to_dict(), "rules": asdict(card.rules)}
    return network | {"speed": asdict(speed), "device": device, "machine": machine}


def _body(scores: Scores, found: Results, data: BoxData) -> dict[str, Any]:
    """What scores.json says of the results: shares 0..1, null where there is no box of that kind."""
    counts: dict[str, Any] = {"format": 1, "kind": "detection-evaluation", "images": scores.images, "detections": len(found.rows)}
    counts |= {"boxes": sum(c.boxes for c in scores.classes), "left_out": len(found.unreadable) + len(data.left_out)}
    counts |= {"left_out_reasons": [*data.left_out, *found.unreadable.values()], "not_finite": [data.images[n].name for n in found.broken]}
    numbers = {name: _number(value) for name, value in scores.numbers.items()}
    classes = [{name: _number(value) if isinstance(value, float) else value for name, value in c._asdict().items()} for c in scores.classes]
    return counts | numbers | {"classes": classes}


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def _write(out: Path, body: dict[str, Any], scores: Scores, found: Results) -> None:
    """Writes the folder `out`, each file whole or not at all, scores.json last. Raises OSError."""
    from triscale.detect.curves import precision_recall_plot
    from triscale.files import write_text, write_whole

    write_text(out / "results.json", json.dumps(found.rows) + "\n")
    figure = precision_recall_plot(scores)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a name in a script that the font lacks
        write_whole(out / "precision-recall.png", lambda path: figure.savefig(path, format="png"))
    write_text(out / "scores.json", json.dumps(body, indent=1) + "\n")


def _summary(body: dict[str, Any], scores: Scores, out: Path) -> str:
    """What the command prints: the numbers, the classes, the rate."""
    found = f"{body['detections']:,} found for {body['boxes']:,} boxes of {len(scores.classes)} class{'es' * (len(scores.classes) != 1)}"
    head = f"{body['images']} images of {body['data']} through {body['network']} at {body['preprocess']['size']} px; {found}"
    numbers = [(name, _shown(value), MEANING[name]) for name, value in scores.numbers.items()]
    classes = [(c.name, f"{c.boxes:,}", _shown(c.AP), _shown(c.AP50), _shown(c.AR100)) for c in scores.classes]
    rate = f"{body['images_per_second']:.1f} images/s ({body['seconds']:.1f} s of reading and network). Results: {out}"
    tables = (aligned(("measure", "value", ""), numbers, left=(0, 2)), aligned(("class", "boxes", "AP", "AP50", "AR100"), classes))
    return "\n".join([printable(head), "", tables[0], "", tables[1], "", rate])


def _shown(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"
