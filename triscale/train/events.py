"""How a run is carried out beside its recipe, and what any run tells."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from triscale.train.plan import Plan


class ResumeError(ValueError):
    """A run that can't go on from its checkpoint: the message says what differs."""


class Stopped(KeyboardInterrupt):
    """Stopped on request, after a whole step; the state is saved. `step` counts from 1."""

    def __init__(self, step: int) -> None:
        super().__init__(step)
        self.step = step


@dataclass(frozen=True)
class Saved:
    """A model file that now stands whole."""

    epoch: int
    path: Path


@dataclass(frozen=True)
class Resumed:
    """The run goes on from this step, of epoch `epoch` (from 1)."""

    step: int
    epoch: int


@dataclass(frozen=True)
class Running:
    """How a run is carried out. None of it changes what is learnt, but as Plan says.

    workers: what prepares batches ahead: threads for images in memory and for boxes, processes for streamed ones. save_every:
    steps between checkpoints beside those at the epochs' ends; 0: none. keep: checkpoints. resume: from the newest whole one, if
    there is one. shard: the optimiser's state over the processes. broken_share: of training images decoded as they are needed,
    above which it is an error that they can't be read. stop: asked after each step.
    """

    plan: Plan = field(default_factory=Plan)
    workers: int = 0
    save_every: int = 0
    keep: int = 2
    resume: bool = False
    shard: bool = False
    tensorboard: bool = False
    broken_share: float = 0.01
    stop: Callable[[], bool] = lambda: False
