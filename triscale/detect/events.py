"""What the training of a detector tells, beside what any run does."""

from __future__ import annotations

from dataclasses import dataclass

from triscale.detect.evaluate import Scores
from triscale.detect.retinanet import Detector


@dataclass(frozen=True)
class Evaluated:
    """COCO's numbers after an epoch (counted from 1), with the detector that reached them. on: which split; train_loss: the mean over
    the epoch's steps, 0 for the final evaluation. left_out: why each image that couldn't be read so far was."""

    epoch: int
    train_loss: float
    scores: Scores
    seconds: float
    net: Detector
    on: str
    left_out: tuple[str, ...] = ()
