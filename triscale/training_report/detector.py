"""A detector's page: COCO's numbers, curves, what the network saw, what it finds and misses, by class and in pictures."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from triscale.commands.detect_evaluation import MEANING
from triscale.detect.curves import precision_recall_plot
from triscale.detect.evaluate import NUMBERS
from triscale.detect.kept import MIN_SCORE, OVERLAP
from triscale.detector import detector_cost, detector_table
from triscale.quantities import short
from triscale.text import aligned, printable
from triscale.training_report.detector_folder import DetectorRun, read_detector_run
from triscale.training_report.detector_pictures import found_part, seen_part
from triscale.training_report.page import curves_part, lead, notes_part, settings_part, time_part, title, with_names
from triscale.training_report.plots import Line, Panel

ROWS = 20  # classes up to which the page shows each; of more, half of ROWS from either end


def detector_page(folder: Path) -> dict[str, Any]:
    """What report.html is filled with. Raises ReportError."""
    run = read_detector_run(folder)
    parts = [
        curves_part(run, _measured(run)),
        _numbers(run),
        _classes(run),
        _precision(run),
        seen_part(run),
        found_part(run),
        time_part(run),
        notes_part(run),
        settings_part(run, _facts(run)),
        _parts(run),
    ]
    name, result = (run.arch.name if run.arch else None) or "detector", _result(run)
    if run.finished:
        result = result[0].upper() + result[1:]
    return {"title": title(name, run.data), "lead": lead(run, _cost(run), result), "sections": [part for part in parts if part]}


def _cost(run: DetectorRun) -> str:
    if run.arch is None:
        return "The detector"
    c, backbone = detector_cost(run.arch, max(1, len(run.classes))), run.arch.backbone
    name = f"RetinaNet on {backbone.name or 'a network of its own'}"
    return f"{name} at {backbone.resolution} px ({short(c.macs)} MACs, {short(c.params)} parameters)"


def _result(run: DetectorRun) -> str:
    if run.scores is not None:
        boxes = sum(c.boxes for c in run.scores.classes)
        there = f"{boxes:,} boxes in {run.scores.images:,} images of the {run.split} split"
        return f"box AP {shown(run.scores.numbers['AP'])}, AP50 {shown(run.scores.numbers['AP50'])} for {there}"
    measured = [e for e in run.log.epochs if e.ap is not None]
    if measured:
        last, images = measured[-1], run.seen.images.get("val") if run.seen else None
        fifty = f", AP50 {last.ap50:.3f}" if last.ap50 is not None else ""
        return f"box AP {last.ap:.3f}{fifty} on the {f'{images:,} images of the ' if images else ''}val split"
    if run.log.epochs:
        return f"training loss {run.log.epochs[-1].loss:.3f}, boxes not judged yet"
    return "boxes not judged yet"


def shown(value: float) -> str:
    """A share; a dash where there was nothing to count."""
    return "-" if value != value else f"{value:.3f}"


def _measured(run: DetectorRun) -> Panel | None:
    lines = []
    for name in ("ap", "ap50"):
        points = [(e.epoch, value) for e in run.log.epochs if (value := getattr(e, name)) is not None]
        lines += [Line(f"{name.upper()} {points[-1][1]:.3f}", points)] if points else []
    return Panel("box AP and AP50 on the val split", lines, whole=True) if lines else None


def _numbers(run: DetectorRun) -> dict[str, Any] | None:
    if run.scores is None:
        return None
    said = [(f"{name}: {MEANING[name]}", shown(run.scores.numbers[name])) for name in NUMBERS]
    return {"title": f"COCO's twelve numbers on the {run.split} split", "side": [said[:6], said[6:]]}


def _classes(run: DetectorRun) -> dict[str, Any] | None:
    """By class, from the best AP down; beside COCO's numbers what is found at the score that the pictures show."""
    if run.scores is None:
        return None
    classes, finds = run.scores.classes, run.finds
    learned = run.seen.boxes.tolist() if run.seen and len(run.seen.boxes) == len(classes) else None
    columns = ["boxes to learn"] * bool(learned) + ["boxes to find", "AP", "AP50", "AR100"] + ["found", "missed", "false"] * bool(finds)
    order = sorted((k for k, c in enumerate(classes) if c.boxes), key=lambda k: -classes[k].AP)
    absent = [k for k, c in enumerate(classes) if not c.boxes]

    def row(k: int) -> list[str]:
        c = classes[k]
        counts = [f"{n:,}" for n in [*([learned[k]] if learned else []), c.boxes, *(finds.by_class[k].tolist() if finds else [])]]
        middle = 1 + bool(learned)
        return [printable(c.name), *counts[:middle], *map(shown, (c.AP, c.AP50, c.AR100)), *counts[middle:]]

    part: dict[str, Any] = {"title": "By class", "texts": []}
    chosen = order + absent
    if len(chosen) > ROWS:
        part |= {"summary": f"All {len(classes)} classes", "details": [aligned(["class", *columns], [row(k) for k in chosen])]}
        if len(order) > ROWS:
            part["texts"].append(
                f"Of the {len(order)} classes with boxes to find, the {ROWS // 2} of the highest AP and the {ROWS // 2} of the lowest."
            )
            order = order[: ROWS // 2] + order[-(ROWS // 2) :]
        chosen = order
    if finds:
        found, missed, false = finds.by_class.sum(0).tolist()
        at = f"At a score above {MIN_SCORE:g} and IoU {OVERLAP:g}"
        part["texts"].append(f"{at}, {found:,} of {found + missed:,} boxes are found and {false:,} detections are false.")
    return {**part, "table": {"header": ["class", *columns], "rows": [{"cells": row(k)} for k in chosen]}}


def _precision(run: DetectorRun) -> dict[str, Any] | None:
    if run.scores is None or run.finds is None:
        return None
    return {"title": "Precision and recall", "natural": with_names(precision_recall_plot(run.scores))}


def _facts(run: DetectorRun) -> dict[str, Any]:
    facts = {k: v for k, v in (run.card.provenance if run.card else {}).items() if k != "recipe"}
    if run.classes:
        facts["classes"] = len(run.classes)
    if run.seen:
        facts |= {f"{split} images": f"{count:,}" for split, count in run.seen.images.items() if count}
        facts["boxes to learn"] = f"{int(run.seen.boxes.sum()):,}"
    if run.card:
        facts |= {f"preprocess {k}": v for k, v in run.card.preprocess.to_dict().items() if k != "format"}
        facts |= {f"rule {k}": v for k, v in asdict(run.card.rules).items()}
    return facts


def _parts(run: DetectorRun) -> dict[str, Any] | None:
    if run.arch is None:
        return None
    return {"title": "The detector", "summary": "Its parts, with their cost", "details": [detector_table(run.arch, max(1, len(run.classes)))]}
