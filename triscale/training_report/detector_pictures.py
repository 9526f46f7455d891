"""Pictures with boxes on a detector's page: what the network saw, and what it finds and misses.

The boxes are drawn over the pictures by the page, so that they stay sharp and say what they are; their colours are those of `detect
predict`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from triscale.detect.drawing import HUES, Rect, class_colour, place
from triscale.detect.kept import MIN_SCORE, OVERLAP, RIGHT, UNCOUNTED, WORST, WRONG, Kept, Marked
from triscale.text import printable
from triscale.training_report.detector_folder import DetectorRun
from triscale.training_report.page import address

KEYS = 6  # classes named below a picture
NAME = 16  # characters of a class name in a picture
TEXT = 0.027  # height of a label as a share of the picture's width, which the page shows some 450 pixels wide
WIDE = 0.62  # width of a character as a share of its height, at most


def seen_part(run: DetectorRun) -> dict[str, Any] | None:
    if run.seen is None or not run.seen.views:
        return None
    pictures = []
    for view in run.seen.views:
        boxes = list(_boxes(run, view.true, "right", RIGHT))
        pictures.append({**_picture(view, boxes), "keys": _keys(run, view.true), "text": "" if boxes else "no boxes"})
    text = "Training images after augmentation, as the network gets them, with the boxes that it learns. Plain ground is padding."
    return {"title": "What the network sees", "pictures": pictures, "texts": [text]}


def found_part(run: DetectorRun) -> dict[str, Any] | None:
    finds = run.finds
    if finds is None or not finds.pictures:
        return None
    pictures = []
    for picture in finds.pictures:
        true, found = picture.true, picture.found
        boxes = [*_boxes(run, true, "crowd", UNCOUNTED), *_boxes(run, found, "crowd", UNCOUNTED), *_boxes(run, found, "right", RIGHT, scored=True)]
        boxes += [*_boxes(run, true, "missed", WRONG), *_boxes(run, found, "false", WRONG, scored=True)]
        said = f"{int((true.verdicts != UNCOUNTED).sum())} boxes: {true.errors()} missed, {found.errors()} false"
        both = Marked(*(np.concatenate(columns) for columns in zip(true, found, strict=True)))
        pictures.append({**_picture(picture, boxes), "keys": _keys(run, both, counted=False), "text": said})
    n, others = len(finds.errors), len(pictures) - WORST
    which = f"the {WORST} with most missed and false boxes, then {others} drawn evenly from the others" if n > len(pictures) else "all"
    text = (
        f"Of the {n:,} images of the {run.split} split, {which}. {int((finds.errors.sum(1) == 0).sum()):,} have neither a missed nor a false box. "
        f"A box is found where one of its class with a score above {MIN_SCORE:g} overlaps it by IoU {OVERLAP:g} or more."
    )
    legend = [("right", "found"), ("missed", "missed"), ("false", "false, with its class and score")]
    legend += [("crowd", "in a crowd, not counted")] if any((p.true.verdicts == UNCOUNTED).any() for p in finds.pictures) else []
    return {"title": "What it finds, the worst first", "legend": legend, "pictures": pictures, "wide": True, "texts": [text]}


def _picture(kept: Kept, boxes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    about = {"image": address(kept.file), "alt": printable(kept.name), "width": kept.width, "height": kept.height}
    return {**about, "boxes": boxes, "labels": _labels([box for box in reversed(boxes) if box["label"]], kept.width, kept.height)}


def _labels(boxes: Sequence[dict[str, Any]], width: int, height: int) -> list[dict[str, Any]]:
    """Where the boxes' labels go in a picture of this size, none on another; a later one has none where there is no room."""
    size = max(1.0, TEXT * width)
    places = place([_rect(box) for box in boxes], [(round(WIDE * size * len(box["label"])), round(1.2 * size)) for box in boxes], (width, height))
    placed = [(box["label"], at) for box, at in zip(boxes, places, strict=True) if at is not None]
    return [{"text": text, "x": at[0], "y": round(at[3] - 0.25 * size, 1), "size": round(size, 2)} for text, at in placed]


def _rect(box: dict[str, Any]) -> Rect:
    """In whole pixels, at least one."""
    left, top = round(box["x"]), round(box["y"])
    return left, top, max(left + 1, round(box["x"] + box["width"])), max(top + 1, round(box["y"] + box["height"]))


def _boxes(run: DetectorRun, marked: Marked, kind: str, verdict: int, *, scored: bool = False) -> Iterator[dict[str, Any]]:
    """Those of this verdict as the page draws them, large ones first, so that small ones lie on top.

    False ones are labelled; missed ones too where there are more classes than colours that can be told apart.
    """
    chosen = np.flatnonzero(marked.verdicts == verdict)
    sizes = marked.boxes[chosen, 2:] - marked.boxes[chosen, :2]
    for i in chosen[np.argsort(-sizes.prod(1), kind="stable")].tolist():
        left, top, right, bottom = (round(v, 1) for v in marked.boxes[i].tolist())
        name, score = run.name(int(marked.labels[i])), f" {marked.scores[i]:.2f}" if scored else ""
        label = (name if len(name) <= NAME else name[: NAME - 1] + "…") + score
        shown = kind == "false" or (kind == "missed" and len(run.classes) > len(HUES))
        box = {"x": left, "y": top, "width": round(right - left, 1), "height": round(bottom - top, 1)}
        yield {**box, "kind": kind, "colour": _colour(int(marked.labels[i])), "title": name + score, "label": label if shown else ""}


def _colour(label: int) -> str:
    return "#{:02x}{:02x}{:02x}".format(*class_colour(label))


def _keys(run: DetectorRun, marked: Marked, *, counted: bool = True) -> list[dict[str, str]]:
    """The classes in a picture, the commonest first."""
    counts = sorted(zip(*np.unique(marked.labels, return_counts=True), strict=True), key=lambda item: -item[1])
    keys = [{"colour": _colour(int(k)), "text": f"{n} {run.name(int(k))}" if counted else run.name(int(k))} for k, n in counts[:KEYS]]
    return keys + ([{"colour": "", "text": f"and {len(counts) - KEYS} classes more"}] if len(counts) > KEYS else [])
