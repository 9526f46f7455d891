"""What the training of a classifier tells, beside what any run does."""

from __future__ import annotations

from dataclasses import dataclass

from triscale.model import ConvNet


@dataclass(frozen=True)
class Evaluated:
    """The accuracy after an epoch (counted from 1), with the model that reached it. on: which images.

    mean_per_class: the mean over the classes of the share that is right, the number that the transfer protocol asks for on
    pets, flowers and aircraft.
    """

    epoch: int
    train_loss: float
    top1: float
    seconds: float
    net: ConvNet
    top5: float = 0.0
    on: str = "held-out"
    mean_per_class: float = 0.0
