"""A detector's run folder, read as far as it is there."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from triscale.detect.evaluate import NUMBERS, ClassScore, Scores
from triscale.detect.kept import Finds, Seen, read_found, read_seen
from triscale.detect.model_file import KEY, DetectorCard
from triscale.detector import DetectorArch
from triscale.report import ReportError
from triscale.run_log import LogError
from triscale.text import first_line
from triscale.training_report.folder import ARCH, MODEL, Run, parsed, read_json, read_lines, read_metadata, read_recipe, read_text


@dataclass(frozen=True)
class DetectorRun(Run):
    """scores: the final ones, on `split`; their precision has no class where found.npz isn't there."""

    card: DetectorCard | None
    arch: DetectorArch | None
    seen: Seen | None
    finds: Finds | None
    scores: Scores | None
    split: str

    @property
    def data(self) -> str | None:
        """What the run calls its data."""
        kept = self.card.provenance.get("data") if self.card else None
        return str(kept) if kept else self.seen.data if self.seen else None


def read_detector_run(folder: Path) -> DetectorRun:
    """Raises ReportError where nothing is logged yet or a file can't be read."""
    log, metadata = read_lines(folder), read_metadata(folder / MODEL)
    card = parsed(folder / MODEL, "triscale detector", DetectorCard.from_json, metadata.get(KEY))
    arch = card.arch if card else parsed(folder / ARCH, "DetectorArch", DetectorArch.from_json, read_text(folder / ARCH))
    try:
        seen, finds = read_seen(folder), read_found(folder)
    except LogError as error:
        raise ReportError(str(error)) from None
    scores, split = _scores(folder / "scores.json", finds)
    known = card.classes if card else seen.classes if seen else tuple(c.name for c in scores.classes) if scores else ()
    if finds and known and len(finds.by_class) != len(known):
        raise ReportError(f"{folder / 'found.npz'}: expected the run's {len(known)} classes, found {len(finds.by_class)}")
    return DetectorRun(folder, log, read_recipe(folder, card.provenance if card else {}), known, card, arch, seen, finds, scores, split)


def _scores(path: Path, finds: Finds | None) -> tuple[Scores | None, str]:
    """As `detect.run.write_scores` wrote them, with the precision that found.npz holds, and the split's name."""
    body = read_json(path)
    if not body:
        return None, ""
    try:
        numbers = {name: _number(body[name]) for name in NUMBERS}
        classes = [ClassScore(str(c["name"]), int(c["boxes"]), *(_number(c[k]) for k in ("AP", "AP50", "AR100"))) for c in body["classes"]]
        images, split = int(body["images"]), str(body["split"])
    except (TypeError, KeyError, ValueError) as error:
        raise ReportError(f"{path}: no scores of a detector ({type(error).__name__}: {first_line(error)})"[:300]) from None
    precision = finds.precision if finds else np.empty((10, 101, 0))
    if finds and (len(finds.by_class), len(finds.errors)) != (len(classes), images):
        raise ReportError(f"{path}: found.npz beside it is of other images or classes")
    return Scores(numbers, tuple(classes), precision, images), split


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)
