"""Samplers of networks, as Optuna takes them: random, regularised evolution, MnasNet's controller, and Optuna's own.

Ours keep no file. What they know is a function of the study's finished trials, in the order of their ends; a study that is resumed, or
joined by another process, is read from its beginning, later only what is new. The draws of a trial come from (seed, trial number),
so that workers with the same seed draw different points, and a resumed study goes on as an uninterrupted one.
"""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.storages import BaseStorage
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from triscale.naming import unknown
from triscale.search.coding import Coding
from triscale.search.evolution import Evenly, Evolution, Outcome, Proposer
from triscale.search.space import Point

if TYPE_CHECKING:
    from triscale.search.controller import PPO

LOGP = "triscale:log_probability"  # a trial's attribute: of its point, in nats, by the controller that drew it
SAMPLERS = ("random", "evolution", "ppo", "tpe", "nsga2")


class PointSampler(BaseSampler):
    """A sampler of whole points for one study at a time, of one objective.

    coding: how points are written; trials in another coding of the same decisions are read too. seed: of the draws; by chance without.
    A pruned trial counts with its last reported value, so what is reported must be of the same kind as the value; failed trials and
    values that aren't finite don't count. An enqueued point may be in any coding.
    """

    def __init__(self, coding: Coding, seed: int | None = None) -> None:
        self.coding = coding
        self._seed = random.SystemRandom().getrandbits(63) if seed is None else seed
        self._others = RandomSampler(self._seed % 2**32)  # for parameters that are no decisions
        self._lock = threading.RLock()
        self._begin(None)

    def _fresh(self) -> Proposer:
        """The proposer before any outcome."""
        raise NotImplementedError

    def _begin(self, study: Study | None) -> None:
        """Knows nothing yet of this study."""
        self._storage: BaseStorage | None = study._storage if study else None
        self._study_id, self._sign = study._study_id if study else -1, 1.0
        self._read, self._open = 0, list[int]()  # how many trials were seen; the numbers of those that hadn't ended
        if study is None:
            return
        directions = study.directions
        if len(directions) != 1:
            self._storage = None
            raise ValueError(f"{type(self).__name__}: expected a study of one objective, found {len(directions)}; take nsga2 for several")
        self._sign = 1.0 if directions[0] == StudyDirection.MAXIMIZE else -1.0
        self._proposer = self._fresh()

    def __getstate__(self) -> dict[str, Any]:
        """A copy reads its study anew."""
        left_out = {"_lock": None, "_proposer": None, "_storage": None}
        return {key: value for key, value in self.__dict__.items() if key not in left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.RLock())
        self._begin(None)

    def reseed_rng(self) -> None:
        self._seed = random.SystemRandom().getrandbits(63)
        self._others.reseed_rng()

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self.coding.distributions

    def sample_independent(self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution) -> Any:
        return self._others.sample_independent(study, trial, param_name, param_distribution)

    def sample_relative(self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]) -> dict[str, Any]:
        return self.draw(study, trial)

    def draw(self, study: Study, trial: FrozenTrial, of: int = 1, screen: Callable[[Point], float] | None = None) -> dict[str, int]:
        """The parameters of the trial: of `of` proposals the one that `screen` gives most. Raises ValueError for several objectives."""
        fixed = trial.system_attrs.get("fixed_params", {})
        given = self.coding.point(fixed)
        if given is not None:
            return self.coding.params(given)
        with self._lock:
            if self._storage is not study._storage or self._study_id != study._study_id:
                self._begin(study)
            self._catch_up(study)
            rng = random.Random(f"{self._seed} {trial.number}")
            proposals = [self._proposer.propose(rng) for _ in range(of)]
        point, logp = proposals[0] if screen is None else proposals[best([screen(point) for point, _ in proposals])]
        if logp is not None and not fixed:  # what the user fixed in part isn't the point that was drawn
            study._storage.set_trial_system_attr(trial._trial_id, LOGP, logp)
        return self.coding.params(point)

    def _catch_up(self, study: Study) -> None:
        """Learns from the trials that ended since the last time. A pass over them and those that are open, not over all."""
        trials = study._storage.get_all_trials(study._study_id, deepcopy=False)  # a list by number; the trials are not copied
        news = [trials[number] for number in self._open] + trials[self._read :]
        self._read, self._open = len(trials), [t.number for t in news if not t.state.is_finished()]
        ended = sorted((t for t in news if t.state.is_finished()), key=lambda t: (t.datetime_complete, t.number))
        self._proposer.learn([o for o in (_outcome(t, self.coding, self._sign) for t in ended) if o is not None])


def _outcome(trial: FrozenTrial, coding: Coding, sign: float) -> Outcome | None:
    """What a finished trial teaches; None where that is nothing."""
    value = None
    if trial.state == TrialState.COMPLETE:
        value = trial.value
    elif trial.state == TrialState.PRUNED and trial.intermediate_values:
        value = trial.intermediate_values[max(trial.intermediate_values)]
    if value is None or not math.isfinite(value):
        return None
    point = coding.point(trial.params)
    return None if point is None else Outcome(point, sign * value, trial.system_attrs.get(LOGP))


class RandomPoints(PointSampler):
    """Every decision drawn evenly."""

    def _fresh(self) -> Proposer:
        return Evenly(self.coding.sizes)

    def _catch_up(self, study: Study) -> None:
        """Reads nothing."""


class RegularisedEvolution(PointSampler):
    """`Evolution` as a sampler. trials: how many the study shall have; population and tournament follow from it where not given.

    A fifth of the trials, from 10 to 50, and half of that: on the score of tests/test_samplers.py, with and without noise of 0.01, at 24,
    100, 300, 1000 and 5000 trials no setting of 12 was better than that by more than 2.5 % of the optimum's value.
    """

    def __init__(
        self, coding: Coding, seed: int | None = None, trials: int = 500, population: int | None = None, tournament: int | None = None
    ) -> None:
        super().__init__(coding, seed)
        self.population = population or max(10, min(50, trials // 5))
        self.tournament = tournament or max(2, self.population // 2)
        self._fresh()  # refuses what doesn't fit

    def _fresh(self) -> Proposer:
        return Evolution(self.coding.sizes, self.population, self.tournament)


class PPOController(PointSampler):
    """`controller.Controller` as a sampler. trials: how many the study shall have; above 500 the learning rate falls with its root.

    Workers of a study have the same weights, whatever their seeds, as far as they saw trials end in one order. Each learns from all
    trials: joining a study costs the updates of all that ended.
    """

    def __init__(self, coding: Coding, seed: int | None = None, trials: int = 500, settings: PPO | None = None) -> None:
        super().__init__(coding, seed)
        self.trials, self.settings = trials, settings

    def _fresh(self) -> Proposer:
        from triscale.search.controller import PPO, Controller

        return Controller(self.coding.sizes, self.settings or PPO(rate=PPO.rate * min(1.0, math.sqrt(500 / max(1, self.trials)))))


class Prefiltered(BaseSampler):
    """Draws `of` points a trial with `sampler` and takes the one that `screen`, a train-free score, gives most (the first of equals; NaN
    is worst).

    With PPO the recorded probability is the controller's own, not that of drawing a point and passing the screen. The ratio of the
    update is still new over old; but its mean is over points the screen let through, so the controller learns what is best among those,
    and the screen's preference itself isn't corrected for. Optuna's samplers are asked `of` times for each parameter.
    """

    def __init__(self, sampler: BaseSampler, screen: Callable[[Point], float], of: int, coding: Coding) -> None:
        if of < 1:
            raise ValueError(f"Prefiltered: expected 1 or more proposals a trial, found {of}")
        self.sampler, self.screen, self.of, self.coding = sampler, screen, of, coding

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self.coding.distributions

    def sample_relative(self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]) -> dict[str, Any]:
        if isinstance(self.sampler, PointSampler):
            return self.sampler.draw(study, trial, self.of, self.screen)
        drawn = [self._drawn(study, trial) for _ in range(self.of)]
        points = [self.coding.point(params) for params in drawn]
        return drawn[best([-math.inf if point is None else self.screen(point) for point in points])]

    def _drawn(self, study: Study, trial: FrozenTrial) -> dict[str, Any]:
        """One proposal of a sampler of Optuna's, which may leave parameters to be drawn on their own."""
        asked = self.sampler.infer_relative_search_space(study, trial)
        params: Mapping[str, Any] = self.sampler.sample_relative(study, trial, asked)
        return {
            name: params[name] if name in params else self._alone(study, trial, name, distribution)
            for name, distribution in self.coding.distributions.items()
        }

    def _alone(self, study: Study, trial: FrozenTrial, name: str, distribution: BaseDistribution) -> Any:
        return 0 if distribution.single() else self.sampler.sample_independent(study, trial, name, distribution)

    def sample_independent(self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution) -> Any:
        return self.sampler.sample_independent(study, trial, param_name, param_distribution)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        self.sampler.before_trial(study, trial)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        self.sampler.after_trial(study, trial, state, values)

    def reseed_rng(self) -> None:
        self.sampler.reseed_rng()


def best(scores: Sequence[float]) -> int:
    """Where the highest is; the first of equals, NaN never unless all are."""
    return max(range(len(scores)), key=lambda i: (not math.isnan(scores[i]), scores[i], -i))


def sampler(name: str, coding: Coding, seed: int | None = None, trials: int = 500) -> BaseSampler:
    """A sampler by its name, one of SAMPLERS, for a study of about `trials` trials.

    tpe and nsga2 are Optuna's own, which model single decisions: they take a Coding with group 1. nsga2 is for several objectives.
    Raises naming.UnknownNameError for another name, ValueError for a coding that doesn't fit.
    """
    if name in ("tpe", "nsga2") and coding.group != 1:
        raise ValueError(f"sampler {name}: expected a Coding of one decision a parameter, found groups of {coding.group}; take Coding.of(space)")
    if name == "random":
        return RandomPoints(coding, seed)
    if name == "evolution":
        return RegularisedEvolution(coding, seed, trials)
    if name == "ppo":
        return PPOController(coding, seed, trials)
    if name == "tpe":
        return TPESampler(seed=seed, n_startup_trials=max(5, min(50, trials // 10)))
    if name == "nsga2":
        return NSGAIISampler(seed=seed, population_size=max(5, min(50, trials // 10)))
    raise unknown("sampler", name, SAMPLERS)
