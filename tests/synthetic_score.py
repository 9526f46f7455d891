"""A score with a known optimum, and small studies of it.

A network's accuracy is exp(-loss), its loss the sum over neighbouring decisions of a fixed random table, so that no decision can be
judged alone; its cost is T times a smooth factor a decision; its value is accuracy x (cost / T)^w.
"""

import itertools
import math
import random

import optuna

from triscale.search.coding import Coding
from triscale.search.samplers import SAMPLERS, sampler

SIZES = (4, 2, 2, 3, 3, 3) * 7
W = -0.07


class Score:
    def __init__(self, sizes, seed=1):
        rng = random.Random(seed)
        self.sizes = sizes
        self.loss = [[[rng.uniform(0, 0.1) for _ in range(b)] for _ in range(a)] for a, b in itertools.pairwise(sizes)]
        self.cost = [[1 + 0.1 * choice for choice in range(size)] for size in sizes]  # of T

    def __call__(self, point):
        loss = sum(table[a][b] for table, (a, b) in zip(self.loss, itertools.pairwise(point), strict=True))
        return math.exp(-loss) * math.prod(cost[choice] for cost, choice in zip(self.cost, point, strict=True)) ** W

    def optimum(self):
        """The highest value, exactly: the best of all points that end in each choice, decision by decision."""
        best = [W * math.log(c) for c in self.cost[0]]
        for table, cost in zip(self.loss, self.cost[1:], strict=True):
            best = [max(b - row[choice] for b, row in zip(best, table, strict=True)) + W * math.log(cost[choice]) for choice in range(len(cost))]
        return math.exp(max(best))


SCORE = Score(SIZES)


def code(sizes, group=1):
    return Coding(tuple(f"block {1 + i // 6} decision {i % 6}" for i in range(len(sizes))), tuple(sizes), group)


SMALL = (2, 3, 1, 4, 3, 2, 2, 3)
CODES = {name: code(SMALL, 1 if name in ("tpe", "nsga2") else 6) for name in SAMPLERS}


def small(name, seed=3):
    """A sampler that is past its beginnings after 10 trials."""
    return sampler(name, CODES[name], seed, 40)


def step(study, coding, score):
    trial = study.ask(coding.distributions)
    point = coding.point(trial.params)
    study.tell(trial, score(point))
    return point


def study_of(chosen, **more):
    return optuna.create_study(**{"direction": "maximize", "sampler": chosen, **more})
