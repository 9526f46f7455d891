"""What anchors learn and which boxes are kept, as data: mmdetection's rules, and torchvision's where they differ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

LowQuality = Literal["own", "most"]
Normaliser = Literal["batch", "image"]


@dataclass(frozen=True)
class Rules:
    """The defaults are those of mmdetection's RetinaNet (MaxIoUAssigner, DeltaXYWHBBoxCoder, FocalLoss, L1Loss, test_cfg).

    positive, negative: an anchor with IoU >= positive with a box learns that box, one with IoU < negative with all boxes learns
        background, and one in between nothing.
    low_quality: the anchors of a box's highest IoU, ties included, learn a box even below `positive`: that box, a later box
        taking them from an earlier one (`own`), or the box with which they overlap most (`most`).
    gamma, alpha: of the focal loss.
    normaliser: of both losses. `batch`: their sum over a process's batch over its number of positive anchors, where an image
        counts at least 1. `image`: each image's sum over its own number, at least 1, then the mean over images.
    shrink_bound: boxes are at least 16/1000 of their anchor's size. That they are at most 1000/16 of it holds always.
    candidates: the best (anchor, class) pairs that a level hands on, of those with a score above min_score.
    nms_iou: a box that overlaps a better one of its class by more goes. max_boxes: that an image keeps.
    keep_empty: whether boxes without area, cut away at the border, are kept.
    """

    positive: float = 0.5
    negative: float = 0.5
    low_quality: LowQuality = "own"
    gamma: float = 2.0
    alpha: float = 0.25
    normaliser: Normaliser = "batch"
    shrink_bound: bool = True
    candidates: int = 1000
    min_score: float = 0.05
    nms_iou: float = 0.5
    max_boxes: int = 100
    keep_empty: bool = False

    def __post_init__(self) -> None:
        for name, low, high in (("negative", 0.0, self.positive), ("positive", 0.0, 1.0), ("min_score", 0.0, 1.0), ("nms_iou", 0.0, 1.0)):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"Rules.{name}: expected a number from {low:g} to {high:g}, found {getattr(self, name)}")
        for name in ("candidates", "max_boxes"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ValueError(f"Rules.{name}: expected a whole number >= 1, found {getattr(self, name)}")
        for name, allowed in (("low_quality", ("own", "most")), ("normaliser", ("batch", "image"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"Rules.{name}: expected {' or '.join(allowed)}, found {getattr(self, name)!r}")


MMDETECTION = Rules()
# torchvision.models.detection.RetinaNet. Its anchors differ too: Anchors.rounded.
TORCHVISION = Rules(negative=0.4, low_quality="most", normaliser="image", shrink_bound=False, max_boxes=300, keep_empty=True)
