"""What proposes points and learns from what came of them, without Optuna: at random, and regularised evolution."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

from triscale.search.space import Point, mutate


class Outcome(NamedTuple):
    """A point that was scored. value: higher is better. logp: log-probability of the point when it was drawn, where it is known."""

    point: Point
    value: float
    logp: float | None = None


class Proposer(Protocol):
    """What a sampler is without Optuna."""

    def propose(self, rng: random.Random) -> tuple[Point, float | None]:
        """A point, and its log-probability where there is one to learn from."""

    def learn(self, outcomes: Iterable[Outcome]) -> None:
        """Takes in what came of points, its own or not, in the order in which they ended."""


class Evenly:
    """Every decision drawn evenly. Learns nothing."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes = tuple(sizes)

    def propose(self, rng: random.Random) -> tuple[Point, None]:
        return tuple(rng.randrange(size) for size in self.sizes), None

    def learn(self, outcomes: Iterable[Outcome]) -> None:
        pass


class Evolution:
    """Regularised evolution (Real et al., arXiv 1802.01548): the parent is the best of `tournament` members drawn from the `population`
    youngest outcomes, with replacement; the child differs in one decision. Random points until there is a population."""

    def __init__(self, sizes: Sequence[int], population: int, tournament: int) -> None:
        if not 1 <= tournament <= population:
            raise ValueError(f"evolution: expected 1 <= tournament <= population, found {tournament} and {population}")
        self.first, self.tournament = Evenly(sizes), tournament
        self.members: deque[Outcome] = deque(maxlen=population)
        self.population = population

    def propose(self, rng: random.Random) -> tuple[Point, None]:
        sizes, members = self.first.sizes, self.members
        if len(members) < self.population or max(sizes) == 1:
            return self.first.propose(rng)
        parent = max((members[rng.randrange(len(members))] for _ in range(self.tournament)), key=lambda o: o.value)
        return mutate(parent.point, sizes, rng), None

    def learn(self, outcomes: Iterable[Outcome]) -> None:
        self.members.extend(outcomes)
