"""eval: how many images of a folder a network gets right, and which classes it takes for which."""

from __future__ import annotations

import json as json_module
import platform
import sys
import time
from dataclasses import asdict, dataclass
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING

from triscale.commands.running import EngineSpeed, Forward, Weights, progress

if TYPE_CHECKING:
    from torch import Tensor

    from triscale.data.labels import Truth
    from triscale.evaluate import Scores
    from triscale.model import ConvNet
    from triscale.recipe import Preprocess
    from triscale.weights.model_file import ModelCard

TEST_IMAGES = 100_000  # of ImageNet's test set


@dataclass(frozen=True)
class _Work:
    """What one process has counted: reasons of the images that it could not read, by number; seconds of reading and network; and how
    the network was computed."""

    scores: Scores
    failures: dict[int, str]
    seconds: float
    computed: list[str]


_DEFAULT = EngineSpeed()


def eval(
    data: str,
    /,
    *,
    network: Weights,
    labels: Path | None = None,
    real: Path | None = None,
    submission: Path | None = None,
    devkit: Path | None = None,
    out: Path | None = None,
    json: bool = False,
    speed: EngineSpeed = _DEFAULT,
) -> int:
    """Exact top-1 and top-5 accuracy on a folder, accuracy by class, and the confusion matrix as a plot and CSV.

    Every image counts once, also where torchrun starts several processes, which then share the images. Unreadable ones are
    named, counted and left out. A class is found by a labels file, by the folder's name as one of the model's classes, as
    one of ImageNet's WordNet ids, or as a class number (ImageNet-V2).

    Args:
        data: a folder of class folders, or one with val, valid, validation or test inside.
        network: which weights.
        labels: CSV with the columns wnid,index or file,label; DATA/labels.csv where it is there.
        real: ReaL's real.json, for the ReaL accuracy on ImageNet's validation images.
        submission: write this file for ImageNet's test server: five class numbers a line, images in the order of their names.
        devkit: ImageNet's class order on the test server, a WordNet id a line or its map_clsloc.txt.
        out: the folder of the results; runs/eval-DATA, with a number where that is taken, unless given.
        json: print the results as one JSON object.
        speed: how the work is done.
    """
    speed.check()
    out = _new_folder(out, data)
    from triscale.commands.findings import findings, summary, write_findings, write_submission
    from triscale.data.labels import devkit_ids, evaluation_folder, real_labels, truth
    from triscale.evaluate import processes

    evaluation_folder(data)  # a missing folder is told before the weights are read
    weights = network.weights
    net, card = network.open("eval", weights)
    if net.num_classes != len(card.classes):
        raise ValueError(f"{weights}: expected a classifier of {len(card.classes)} classes, found a network with {net.num_classes} outputs")
    images = truth(data, card.classes, labels)
    allowed = real_labels(real, images.names, len(card.classes)) if real else None
    ids = devkit_ids(devkit, len(card.classes)) if submission else None
    if images.labels is None and not (real or submission):
        raise ValueError(f"{data}: images without class folders have no labels; give --labels FILE.csv with file,label, or --submission FILE")
    with processes() as (rank, world):
        work = _shared_work(images, net, card.preprocess, speed, (rank, world))
    if rank:
        return 0  # a status above 0 would make torchrun stop the process that is still writing
    _tell_failures(work, images)
    results = findings(work.scores, images, list(work.failures), work.seconds, allowed)
    results |= {"data": Path(data).resolve().name, "weights": Path(weights).name if Path(weights).exists() else weights}
    results |= _setting(card, speed, world, work)
    write_findings(out, results, work.scores, images.names, card.classes)
    if submission and ids:
        write_submission(submission, work.scores, images.names, ids)
        _tell_submission(submission, len(images.names), devkit)
    print(json_module.dumps(results) if json else summary(results, work.scores, card.classes, out))
    return 1 if work.failures or work.scores.broken else 0


def _setting(card: ModelCard, speed: EngineSpeed, world: int, work: _Work) -> dict[str, object]:
    """What the figures were measured with."""
    import torch

    from triscale.demo import processor
    from triscale.version import __version__

    machine = {"processor": processor(), "python": platform.python_version(), "torch": torch.__version__, "triscale": __version__}
    network = {"network": card.arch.name or "unnamed network", "preprocess": card.preprocess.to_dict(), "assumed": card.provenance.get("assumed", [])}
    return network | {"processes": world, "speed": asdict(speed) | {"computed": work.computed}, "machine": machine}


def _shared_work(images: Truth, net: ConvNet, preprocess: Preprocess, speed: EngineSpeed, share: tuple[int, int]) -> _Work:
    """The work of all processes, in each of them."""
    from triscale.evaluate import gather

    parts = gather(_work(images, speed.prepare(net, len(images.names), share[1]), preprocess, net.num_classes, speed, share))
    scores = reduce(lambda a, b: a.merge(b), (part.scores for part in parts))
    failures = {number: reason for part in parts for number, reason in part.failures.items()}
    computed = list(dict.fromkeys(way for part in parts for way in part.computed))
    return _Work(scores, dict(sorted(failures.items())), max(part.seconds for part in parts), computed)


def _work(images: Truth, logits_of: Forward, preprocess: Preprocess, classes: int, speed: EngineSpeed, share: tuple[int, int]) -> _Work:
    """This process's share: every world-th image from its rank on."""
    import torch

    from triscale.evaluate import UNLABELLED, Scores
    from triscale.predict import logits_of_files

    rank, world = share
    numbers = range(len(images.names))[rank::world]
    files, scores, failures = images.files[rank::world], Scores(classes), dict[int, str]()
    waiting: list[tuple[int, Tensor]] = []

    def count() -> None:
        if waiting:
            mine = [n for n, _ in waiting]
            scores.add(mine, torch.stack([row for _, row in waiting]), [images.labels[n] if images.labels else UNLABELLED for n in mine])
            waiting.clear()

    start = time.perf_counter()
    with progress("evaluating", len(files), quiet=rank > 0) as tick:
        rows = logits_of_files(files, logits_of, preprocess, batch_size=speed.batch, workers=speed.workers)
        for number, (_, row) in zip(numbers, rows, strict=True):
            if isinstance(row, str):
                failures[number] = row
            else:
                waiting.append((number, row))
            if len(waiting) >= 256:  # many at once: the counting then costs nothing beside the network
                count()
            tick()
        count()
    return _Work(scores, failures, time.perf_counter() - start, logits_of.used)


def _tell_failures(work: _Work, images: Truth) -> None:
    """Names what failed. Raises ValueError where not one image could be read."""
    total = len(images.names)
    for reason in work.failures.values():
        print(f"triscale eval: {reason}", file=sys.stderr)
    if len(work.failures) == total:
        raise ValueError(f"{images.root}: none of its {total} images could be read")
    if work.failures:
        print(f"triscale eval: {len(work.failures)} of {total} images could not be read and are left out", file=sys.stderr)
    if work.scores.broken:
        found = f"outputs that are not finite for {work.scores.broken} of {work.scores.images} images, which count as wrong"
        print(f"triscale eval: the network gave {found}; its weights may be broken", file=sys.stderr)
    if images.passed_over:
        print(f"triscale eval: {images.passed_over} images beside the labelled ones are passed over", file=sys.stderr)


def _tell_submission(path: Path, images: int, devkit: Path | None) -> None:
    if devkit is None:
        order = "numbers the classes by sorted WordNet ids; the test server takes the development kit's order, which --devkit FILE gives"
        print(f"triscale eval: {path} {order}", file=sys.stderr)
    if images != TEST_IMAGES:
        print(f"triscale eval: {path} has {images} lines; the server expects {TEST_IMAGES}", file=sys.stderr)


def _new_folder(out: Path | None, data: str) -> Path:
    """The folder of the results, which doesn't exist yet or is empty: results never overwrite others, or anything else."""
    if out is None:
        base, i = Path("runs") / f"eval-{Path(data).resolve().name}".replace(" ", "-"), 2
        path = base
        while path.exists():
            path, i = base.with_name(f"{base.name}-{i}"), i + 1
        return path
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out}: exists already and is no empty folder; give another")
    return out
