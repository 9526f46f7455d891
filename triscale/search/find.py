"""The two searches of the paper as functions of a score that the caller gives: anything that makes a number of an Arch."""

from __future__ import annotations

import math
import os
import time
import warnings
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from triscale.architecture import Arch
from triscale.naming import unknown
from triscale.scaling import Coefficients, compound, scale
from triscale.search.coding import Coding
from triscale.search.events import Event, Running, Score, SearchError
from triscale.search.grid import grid, spread
from triscale.search.joining import identity
from triscale.search.problem import CoefficientProblem, NetworkProblem
from triscale.search.record import Record, Trial, front
from triscale.search.reward import Objective
from triscale.search.samplers import SAMPLERS, Prefiltered
from triscale.search.samplers import sampler as make
from triscale.search.space import Space
from triscale.search.storage import open_storage
from triscale.search.study import Search
from triscale.search.trials import counts, fixed


@dataclass(frozen=True)
class Place:
    """Where a study lies. storage: None for memory, a path for a journal file, or a URL (see `open_storage`). name: of the study.
    about: what scores depend on beside the network; a study of other things is not joined. tell: is told when the storage goes away,
    and when it answers again."""

    storage: str | Path | None = None
    name: str = "search"
    about: tuple[tuple[str, Any], ...] = ()
    tell: Callable[[str], None] = field(default=lambda text: None, compare=False)


@dataclass(frozen=True)
class Screen:
    """A cheap score without training, and of how many proposals the one that it likes best is taken for a trial.

    With an objective of MACs or memory positive scores are weighed by the cost as the trials' are; a latency would have to be measured
    for every proposal, and isn't. A score that raises counts as worst, which is told once.
    """

    score: Callable[[Arch], float]
    of: int = 8

    def __post_init__(self) -> None:
        if self.of < 2:
            raise SearchError(f"screen: expected 2 or more proposals a trial, found {self.of}")

    def worth(self, arch: Arch, objective: Objective | None) -> float:
        try:
            score = float(self.score(arch))
        except Exception as error:
            warnings.warn(f"prefilter: {type(error).__name__}: {error}", stacklevel=2)
            return math.nan
        if score > 0 and objective is not None and objective.kind != "latency":
            return objective.value(score, objective.costs(arch))
        return score


@dataclass(frozen=True)
class Found:
    """The end of a search: the best network with its trial, and all of them. coefficients: of a search for those.
    front: where no other network is both better and cheaper, cheapest first; of one value alone the best."""

    arch: Arch
    trial: Trial
    record: Record
    coefficients: Coefficients | None = None
    front: tuple[Trial, ...] = ()


def find_coefficients(
    score: Score,
    arch: Arch,
    triples: Sequence[Coefficients] = (),
    *,
    running: Running | None = None,
    place: Place | None = None,
    watch: Callable[[Event], None] = lambda event: None,
) -> Found:
    """The alpha, beta, gamma whose network `scale(arch, compound(1, ...))` scores best (paper, section 4, step 1).

    triples: to try, in this order; `spread(grid())` unless given. Where running.trials is less than their number the rest stays
    untried. Raises SearchError where no trial came to a score.
    """
    search = coefficient_search(score, arch, triples or spread(grid()), running=running, place=place)
    return _found(search, watch)


def find_network(
    score: Score,
    space: Space,
    objective: Objective | None = None,
    *,
    sampler: str = "evolution",
    seed: int = 0,
    running: Running | None = None,
    place: Place | None = None,
    watch: Callable[[Event], None] = lambda event: None,
) -> Found:
    """The network of `space` with the highest reward score x (cost / T)^w; without an objective, the highest score.

    sampler: evolution, ppo, random, tpe, or nsga2, which looks for the Pareto front of score and cost instead. The reference is
    the first trial. Raises SearchError where no trial came to a score.
    """
    return _found(network_search(score, space, objective, sampler=sampler, seed=seed, running=running, place=place), watch)


def coefficient_search(
    score: Score,
    arch: Arch,
    triples: Sequence[Coefficients],
    *,
    counted: tuple[int, int] = (1000, 3),
    running: Running | None = None,
    place: Place | None = None,
) -> Search:
    """The search itself, for its events. counted: classes and input channels of the costs that are told."""
    if not triples:
        raise SearchError("triples: expected one or more; grid() makes them")
    problem = CoefficientProblem(arch, different_first(arch, triples), *counted)
    where, running = place or Place(), running or Running()
    storage = open_storage(where.storage, tell=where.tell)
    return Search(problem, score, InOrder(problem.triples), running, storage=storage, name=where.name, about=dict(where.about))


def different_first(arch: Arch, triples: Sequence[Coefficients]) -> tuple[Coefficients, ...]:
    """The triples, each once, those last whose network an earlier one has already: channels, layers and pixels are rounded."""
    seen, out, again = set[Arch](), list[Coefficients](), list[Coefficients]()
    for c in dict.fromkeys(triples):
        network = scale(arch, compound(1, c.alpha, c.beta, c.gamma))
        (again if network in seen else out).append(c)
        seen.add(network)
    return (*out, *again)


def network_search(
    score: Score,
    space: Space,
    objective: Objective | None = None,
    *,
    sampler: str = "evolution",
    seed: int | None = 0,
    screen: Screen | None = None,
    running: Running | None = None,
    place: Place | None = None,
) -> Search:
    """The search itself, for its events. seed: of the sampler; None: another each time."""
    where, running = place or Place(), running or Running()
    if sampler not in SAMPLERS:  # before the storage makes a file
        raise unknown("sampler", sampler, SAMPLERS)
    pareto = sampler == "nsga2"
    if pareto and objective is None:
        raise SearchError("sampler nsga2: it looks for the front of score and cost; an objective says what the cost is")
    coding = Coding.of(space) if sampler in ("tpe", "nsga2") else Coding.by_block(space)
    problem = NetworkProblem(space, coding, objective, pareto)
    storage = open_storage(where.storage, tell=where.tell)
    if sampler in ("tpe", "nsga2") and seed is not None and identity(storage, where.name):
        # Optuna's own begin their draws anew: a worker that joins would draw what the first one drew. Ours draw by the trial's number.
        seed = zlib.crc32(f"{seed} {os.getpid()} {time.time()}".encode())
    chosen = make(sampler, coding, seed, running.trials)
    if screen is not None:
        chosen = Prefiltered(chosen, lambda point: screen.worth(space.decode(point), objective), screen.of, coding)
    return Search(problem, score, chosen, running, storage=storage, name=where.name, about=dict(where.about))


def pareto(trials: Sequence[Trial], cost: str) -> tuple[Trial, ...]:
    """The complete trials of the Pareto front of score and this cost, cheapest first; equal ones are all in it."""
    rows = [(t, (t.cost[cost], t.score)) for t in trials if t.state == "complete" and t.score is not None]
    return tuple(rows[i][0] for i in front([point for _, point in rows]))


def _found(search: Search, watch: Callable[[Event], None]) -> Found:
    for event in search.events():
        watch(event)
    return result(search)


def result(search: Search) -> Found:
    """What a study has come to so far. Raises SearchError where no trial came to a score."""
    record = search.record()
    best = record.best
    if best is None or best.arch is None:
        failed = [t for t in record.trials if t.state == "failed"]
        raise SearchError(f"no trial came to a score{f'; the last failed: {failed[-1].why}' if failed else ''}")
    chosen = Coefficients(*(float(best.choices[k]) for k in ("alpha", "beta", "gamma"))) if record.kind == "coefficients" else None
    return Found(best.arch, best, record, chosen, pareto(record.trials, record.target[0]) if record.target else (best,))


class InOrder(BaseSampler):
    """Each of the triples once, the first ones first; when all are taken, the last again, which the study then drops."""

    def __init__(self, triples: Sequence[Coefficients]) -> None:
        self._points = [{"alpha": c.alpha, "beta": c.beta, "gamma": c.gamma} for c in triples]

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        from optuna.distributions import FloatDistribution

        return {name: FloatDistribution(1.0, max(p[name] for p in self._points) + 1) for name in self._points[0]}

    def sample_relative(self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]) -> dict[str, Any]:
        trials = study._storage.get_all_trials(study._study_id, deepcopy=False)
        taken = [fixed(t) for t in trials if t.number != trial.number and (counts(t) or t.state == TrialState.WAITING)]
        return next((p for p in self._points if p not in taken), self._points[-1])

    def sample_independent(self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution) -> Any:
        raise SearchError(f"{param_name}: no parameter of this search")
