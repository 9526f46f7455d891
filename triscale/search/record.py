"""What a study holds, as plain values that reports and callers read; nothing here knows Optuna."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from triscale.architecture import Arch

State = Literal["complete", "pruned", "failed", "running", "waiting", "lost"]


@dataclass(frozen=True)
class Trial:
    """One network that was scored, or not.

    number: from 0. arch: the network. choices: what was decided, in words ("block 3 kernel": "5", or alpha, beta, gamma).
    score: what the score function gave (None until then); reported: what it gave on the way, one value an epoch, of the score.
    value: what the search maximises, score x cost term. cost: "macs", "params" and, where that is the target, "latency" (s) or
    "memory" (bytes). seconds: that the score took. why: of a failed, lost or pruned trial. cached: the score was known.
    """

    number: int
    state: State
    arch: Arch | None = None
    choices: Mapping[str, str] = field(default_factory=dict)
    score: float | None = None
    reported: tuple[float, ...] = ()
    value: float | None = None
    cost: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    why: str = ""
    cached: bool = False
    began: float = 0.0  # seconds since 1970; 0 where it has not begun
    ended: float = 0.0


@dataclass(frozen=True)
class Record:
    """A whole study.

    kind: of search. reference: the network that is scaled or varied. target: ("macs" | "latency" | "memory", T), None without one.
    exponents: w below and above T. settings: what else was asked for, in words, for the reader. reference_score: the reference's
    score where it was measured. wanted: trials asked for. importance: decision -> its share of what sets the best tenth of the trials
    apart, {} where it isn't known.
    """

    kind: Literal["network", "coefficients"]
    reference: Arch
    trials: tuple[Trial, ...]
    target: tuple[str, float] | None = None
    exponents: tuple[float, float] = (0.0, 0.0)
    settings: Mapping[str, str] = field(default_factory=dict)
    reference_score: float | None = None
    wanted: int = 0
    importance: Mapping[str, float] = field(default_factory=dict)

    @property
    def complete(self) -> tuple[Trial, ...]:
        return tuple(t for t in self.trials if t.state == "complete")

    @property
    def ranked(self) -> tuple[Trial, ...]:
        """The complete trials, best value first; of equals the earlier."""
        return tuple(sorted(self.complete, key=lambda t: (-(t.value if t.value is not None else float("-inf")), t.number)))

    @property
    def best(self) -> Trial | None:
        return next(iter(self.ranked), None)


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Which of the (cost, score) points no other beats: none is at most as dear and at least as good, and better in one of both.

    By cost; equal points are all in. n log n.
    """
    order = sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1], i))
    out: list[int] = []
    for i in order:
        if not out or points[i][1] > points[out[-1]][1] or points[i] == points[out[-1]]:
            out.append(i)
    return out
