"""What a search tells as it goes on, and how it is carried out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from triscale.architecture import Arch
from triscale.naming import unknown
from triscale.search.record import Trial

Score = Callable[[Arch], "float | Iterator[float]"]  # an iterator gives one value an epoch, the last is the score
Pruner = Literal["none", "median", "asha"]


class SearchError(ValueError):
    """A search that can't be begun or gone on with: the message says what to change."""


@dataclass(frozen=True)
class Began:
    """A network whose scoring begins."""

    trial: Trial


@dataclass(frozen=True)
class Reported:
    """A score on the way: that of epoch `step`, from 1."""

    number: int
    step: int
    score: float


@dataclass(frozen=True)
class Ended:
    """A trial that counts: complete, pruned or failed."""

    trial: Trial


@dataclass(frozen=True)
class Told:
    """Something that the user should know. number: of the trial that it ends for this worker, without being counted."""

    text: str
    number: int | None = None


Event = Began | Reported | Ended | Told


@dataclass(frozen=True)
class Running:
    """How trials are carried out.

    trials: wanted in all, by all who take part; complete, pruned and failed ones count. workers: processes of this machine that
    score networks; 0: this process, one after the other. timeout: seconds after which a score is given up; needs workers; 0: none.
    pruner: what stops a trial early by its score after an epoch: median (below the median of the others at that epoch), asha
    (successive halving), or none. attempts: how often a trial is begun whose worker dies. alive_after: seconds without a sign
    after which a worker on another machine is given up.
    """

    trials: int = 100
    workers: int = 0
    timeout: float = 0.0
    pruner: Pruner = "none"
    attempts: int = 3
    alive_after: float = 120.0

    def __post_init__(self) -> None:
        for name, low in (("trials", 1), ("workers", 0), ("timeout", 0), ("attempts", 1), ("alive_after", 1)):
            value = getattr(self, name)
            if not value >= low:
                raise SearchError(f"{name}: expected {low} or more, found {value!r}")
        if self.pruner not in get_args(Pruner):
            raise unknown("pruner", self.pruner, get_args(Pruner))
        if self.timeout and not self.workers:
            raise SearchError("timeout: only a score in a process of its own can be given up; workers from 1 make one")
