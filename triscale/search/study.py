"""One worker's part in a study: it asks for networks, has them scored, tells what came of them, and takes up what others lost.

Any number of these, on one machine or many, share a study through its storage. A trial counts when it is complete, pruned or
failed by its own score; one whose worker died is dropped and begun again by whoever sees it first.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from triscale.architecture import Arch
from triscale.search.events import Began, Ended, Event, Reported, Running, Score, SearchError, Told
from triscale.search.liveness import Liveness
from triscale.search.problem import Problem
from triscale.search.record import Record, Trial
from triscale.search.scoring import Died, Failed, Finished, Message, Scored, scoring
from triscale.search.trials import counts, fixed, record_of, trial_of

# Attributes: of the study, and of its trials. LOST: its worker ended, it is begun again; NEEDLESS: it isn't, another does for it.
IDENTITY, WORKER, RESULT, LOST, NEEDLESS, RETRY_OF, FIRST = "identity", "worker", "result", "lost", "needless", "retry of", "first"
EXHAUSTED = "exhausted"  # begun often enough: fails with this reason
GIVEN_BACK = "given back: its worker was stopped"
UNBORN = 3  # processes that end before they have the score
ALIKE = 5  # trials that fail one after the other, with none complete, before the search is given up


class Search:
    """A study and this process's part in it. name: of the study in its storage, where several may lie.

    Raises SearchError where the storage has another search under this name.
    """

    def __init__(
        self,
        problem: Problem,
        score: Score,
        sampler: optuna.samplers.BaseSampler,
        running: Running,
        *,
        storage: BaseStorage | None = None,
        name: str = "search",
        about: Mapping[str, Any] | None = None,
    ) -> None:
        """about: what scores depend on beside the network (data, recipe, seed); a study of other things isn't joined."""
        self.problem, self.running = problem, running
        self._score = score
        self._peek: Callable[[Arch], tuple[float, ...] | None] | None = getattr(score, "peek", None)
        self.study = _join(problem, sampler, running, storage, name, about or {})
        self._alive = Liveness(self.study, running.alive_after)
        self._open: dict[int, _Open] = {}
        self._failures = self._unborn = 0
        self._steps: int = getattr(score, "steps", 0)  # values that a whole score has, where that is known
        self._looked = -1e9
        self._waited = False
        self._settled = self._settled_count = 0

    @property
    def wanted(self) -> int:
        return min(self.running.trials, self.problem.most or self.running.trials)

    def standing(self, shown: int) -> tuple[int, list[Trial]]:
        """How many trials of all workers have ended and count, and the best of them."""
        ended = [t for t in self._trials() if t.state.is_finished() and counts(t)]
        complete = [t for t in ended if t.state == TrialState.COMPLETE and RESULT in t.user_attrs]
        worth = {t.number: self.problem.worth(t.user_attrs[RESULT]["scores"][-1], t.user_attrs[RESULT]["costs"]) for t in complete}
        best = sorted(complete, key=lambda t: (-worth[t.number], t.number))[:shown]
        return len(ended), [trial_of(self.problem, t) for t in best]

    def record(self, settings: Mapping[str, str] | None = None, importance: Mapping[str, float] | None = None) -> Record:
        """The study as it stands."""
        return record_of(self.problem, self._trials(), self.wanted, settings or {}, importance or {})

    def traces(self) -> dict[int, str]:
        """Of the failed trials by number, where in the score's code it happened; "" where that isn't known."""
        failed = [t for t in self._trials() if t.state == TrialState.FAIL and counts(t)]
        return {t.number: t.user_attrs.get(RESULT, {}).get("trace", "") for t in failed}

    def events(self) -> Iterator[Event]:
        """Goes on with the study until all trials that are wanted have ended, yielding what happens.

        Closing the iterator, or an exception thrown into it, gives back the trials that have not ended.
        Raises SearchError where the first trials all fail, OSError or the driver's error where the storage stays away.
        """
        at_work = scoring(self._score, self.running.workers, self.running.timeout)
        self._alive.start()
        try:
            yield from self._first()
            while True:
                yield from self._bury()
                while len(self._open) < at_work.slots:
                    begun = self._begin()
                    if begun is None:
                        break
                    yield from self._start(begun, at_work)
                if self._open:
                    for message in at_work.messages(1.0):
                        yield from self._heed(message, at_work)
                elif self._done():
                    return
                else:
                    yield from self._wait_for_others()
        finally:
            at_work.close()
            self._give_back()
            self._alive.stop()

    def _trials(self) -> list[FrozenTrial]:
        return self.study._storage.get_all_trials(self.study._study_id, deepcopy=False)

    def _first(self) -> Iterator[Event]:
        """The reference is the first trial, where it is one of the networks searched."""
        params = self.problem.first()
        if params is not None:
            if not any(t.user_attrs.get(FIRST) for t in self._trials()):
                self.study.enqueue_trial(params, user_attrs={FIRST: True})
        elif self.problem.kind == "network":
            yield Told("the reference isn't one of the networks of its space, so it isn't scored with them")

    def _begin(self) -> optuna.Trial | None:
        """The next trial; None where there is none to begin."""
        while True:
            trials = self._trials()
            waiting = any(t.state == TrialState.WAITING for t in trials[self._settled :])
            if not waiting and self._counted(trials) >= self.wanted:
                return None
            with contextlib.suppress(UpdateFinishedTrialError):  # it took so long that others gave it up
                trial = self.study.ask(self.problem.distributions)
                trial.set_user_attr(WORKER, self._alive.card)
                needless = self._needless(trial.number)
                if not needless:
                    return trial
                self._drop(trial._trial_id, needless, NEEDLESS)

    def _counted(self, trials: list[FrozenTrial]) -> int:
        """How many of these trials, all from the first on, count. What leads and has ended is counted once."""
        while self._settled < len(trials) and trials[self._settled].state.is_finished():
            self._settled_count += counts(trials[self._settled])
            self._settled += 1
        return self._settled_count + sum(map(counts, trials[self._settled :]))

    def _needless(self, number: int) -> str:
        """Why a trial of this number isn't to be done: workers that ask at one time may begin more than are wanted, or one twice.
        Of two the lower number is the one that counts, whoever looks."""
        trials = self._trials()
        if self._counted(trials[:number]) >= self.wanted:
            return "more trials than are wanted"
        this = trials[number]
        if not (self.problem.unique or RETRY_OF in this.user_attrs or FIRST in this.user_attrs):
            return ""
        if self.problem.unique:
            trials = self._all_known(number)
        for t in filter(counts, trials[:number]):
            retries = RETRY_OF in this.user_attrs and _root(this, trials) == _root(t, trials)
            both_first = FIRST in this.user_attrs and FIRST in t.user_attrs
            if retries or both_first or (self.problem.unique and fixed(t) == this.params):
                return f"the same as trial {t.number}"
        return ""

    def _all_known(self, number: int) -> list[FrozenTrial]:
        """The trials, when those before this one have their parameters, or after a while: a worker that ended there leaves none."""
        deadline = time.monotonic() + 5
        while True:
            trials = self._trials()
            beginning = [
                t for t in trials[:number] if t.state == TrialState.RUNNING and counts(t) and len(t.params) < len(self.problem.distributions)
            ]
            if not beginning or time.monotonic() > deadline:
                return trials
            time.sleep(0.01)

    def _start(self, trial: optuna.Trial, at_work: Any) -> Iterator[Event]:
        number, arch = trial.number, self.problem.arch(trial.params)
        self._open[number] = o = _Open(trial, arch)
        if why := trial.user_attrs.get(EXHAUSTED):
            yield from self._end(number, TrialState.FAIL, why)
            return
        try:
            o.costs = self.problem.costs(arch)
        except Exception as error:  # whatever a measure of latency may raise
            yield from self._fail(number, f"its cost can't be told: {type(error).__name__}: {error}"[:300])
            return
        yield Began(self._trial(number))
        known = self._peek(arch) if self._peek else None
        if known is None:
            at_work.begin(number, arch)
            return
        o.cached = True
        try:
            for value in known:
                yield from self._report(number, value)
        except (ValueError, ArithmeticError) as error:
            yield from self._fail(number, str(error))
            return
        yield from self._complete(number, 0.0)

    def _heed(self, message: Message, at_work: Any) -> Iterator[Event]:
        number = message.number
        if isinstance(message, Scored):
            try:
                yield from self._report(number, message.value)
                stop = self._prune(number)
            except (ValueError, ArithmeticError) as error:  # a score that the objective can't weigh
                at_work.stop(number)
                yield from self._fail(number, str(error))
            except UpdateFinishedTrialError:
                at_work.stop(number)
                yield self._taken(number)
            else:
                if stop:
                    at_work.stop(number)
                    yield from self._end(number, TrialState.PRUNED, "below the others at this epoch")
                else:
                    at_work.go_on(number)
        elif isinstance(message, Finished):
            yield from self._complete(number, message.seconds)
        elif isinstance(message, Failed):
            self._open[number].trace = message.trace
            yield from self._fail(number, message.why)
        else:
            yield from self._died(message)

    def _fail(self, number: int, why: str) -> Iterator[Event]:
        """Raises SearchError where the first trials of the study have all failed: so will the others."""
        yield from self._end(number, TrialState.FAIL, why)
        self._failures += 1
        if self._failures >= ALIKE and not any(t.state in (TrialState.COMPLETE, TrialState.PRUNED) for t in self._trials()):
            raise SearchError(f"the first {ALIKE} trials all failed; the last: {why}")

    def _report(self, number: int, score: float) -> Iterator[Event]:
        """Raises ValueError for a score that the objective can't weigh."""
        o = self._open[number]
        worth = self.problem.worth(score, o.costs)
        o.scores.append(score)
        if len(self.problem.directions) == 1 and self.running.pruner != "none":
            o.trial.report(worth, len(o.scores))
        yield Reported(number, len(o.scores), score)

    def _prune(self, number: int) -> bool:
        o = self._open[number]
        if len(self.problem.directions) > 1 or self.running.pruner == "none" or len(o.scores) == self._steps:
            return False
        return o.trial.should_prune()

    def _complete(self, number: int, seconds: float) -> Iterator[Event]:
        o = self._open[number]
        o.seconds = seconds
        yield from self._end(number, TrialState.COMPLETE, "", self.problem.values(o.scores[-1], o.costs))

    def _end(self, number: int, state: TrialState, why: str, values: tuple[float, ...] | None = None) -> Iterator[Event]:
        """Tells the study; the result is written before, so that what has ended has one."""
        o = self._open[number]
        try:
            o.trial.set_user_attr(RESULT, o.result(why))
            self.study.tell(number, values, state)
        except (UpdateFinishedTrialError, ValueError):
            if not self._trials()[number].state.is_finished():
                raise
            yield self._taken(number)
            return
        del self._open[number]
        yield Ended(self._trial(number))

    def _taken(self, number: int) -> Told:
        del self._open[number]
        return Told(f"trial {number}: taken from this worker, which had given no sign; its score isn't used", number)

    def _died(self, message: Died) -> Iterator[Event]:
        """The process that scored it ended: it may have been anyone's fault, so the trial is begun again, but not for ever."""
        o = self._open.pop(message.number)
        self._drop(o.trial._trial_id, message.why)
        yield Told(f"trial {message.number}: {message.why}", message.number)
        self._looked = -1e9
        self._unborn = 0 if message.loaded else self._unborn + 1
        if self._unborn >= UNBORN:
            raise SearchError(f"{UNBORN} processes ended before they had the score; a script that searches needs: if __name__ == '__main__'")

    def _bury(self) -> Iterator[Event]:
        """Takes up the trials of workers that live no more, every few seconds."""
        if time.monotonic() - self._looked < min(5.0, self.running.alive_after / 4):
            return
        self._looked = time.monotonic()
        signs: dict[str, Any] | None = None
        for t in self._trials():
            if t.state != TrialState.RUNNING or t.number in self._open:
                continue
            signs = self.study.user_attrs if signs is None else signs
            card = t.user_attrs.get(WORKER)
            alive = self._alive.lives(card, signs) if card else self._alive.changes(f"trial {t.number}", len(t.params))
            if not alive or LOST in t.user_attrs:
                self._drop(t._trial_id, t.user_attrs.get(LOST, "its worker ended"))
                again = "; it is begun again" if self._wish(t) else " before it was known what it would be"
                yield Told(f"trial {t.number}: its worker has ended{again}")
        trials = self._trials()
        retried = {t.user_attrs[RETRY_OF] for t in trials if RETRY_OF in t.user_attrs}
        for t in trials:
            if t.state == TrialState.FAIL and LOST in t.user_attrs and t.number not in retried and self._wish(t):
                self._again(t, trials)

    def _wish(self, t: FrozenTrial) -> dict[str, Any]:
        """The parameters that a lost trial was to have; {} where they aren't all known."""
        wish = fixed(t)
        return wish if len(wish) >= len(self.problem.distributions) else {}

    def _again(self, lost: FrozenTrial, trials: list[FrozenTrial]) -> None:
        """Puts a lost trial's network in line again, if need be to fail. Several workers may; of equals the first counts."""
        chain = _chain(lost, trials)
        attempts = sum(t.user_attrs[LOST] != GIVEN_BACK for t in chain)
        attrs: dict[str, Any] = {RETRY_OF: lost.number}
        if FIRST in lost.user_attrs:
            attrs[FIRST] = True
        if attempts >= self.running.attempts:
            attrs[EXHAUSTED] = f"begun {attempts} times; the last time {lost.user_attrs[LOST]}"
        self.study.enqueue_trial(self._wish(lost), user_attrs=attrs)

    def _drop(self, trial_id: int, why: str, kind: str = LOST) -> None:
        """Ends a trial that isn't to count. Another worker may be doing the same."""
        with contextlib.suppress(UpdateFinishedTrialError):
            self.study._storage.set_trial_user_attr(trial_id, kind, why)
            self.study._storage.set_trial_state_values(trial_id, TrialState.FAIL)

    def _give_back(self) -> None:
        """What has not ended is begun again by another, or when the study is gone on with. Tried once: that the worker has ended shows."""
        storage = getattr(self.study._storage, "inner", self.study._storage)
        for o in self._open.values():
            with contextlib.suppress(Exception):
                storage.set_trial_user_attr(o.trial._trial_id, LOST, GIVEN_BACK)
                storage.set_trial_state_values(o.trial._trial_id, TrialState.FAIL)
        self._open.clear()

    def _done(self) -> bool:
        return not any(t.state in (TrialState.RUNNING, TrialState.WAITING) for t in self._trials())

    def _wait_for_others(self) -> Iterator[Event]:
        if not self._waited:
            self._waited = True
            yield Told("the last trials are being done by other workers; waiting for them")
        time.sleep(0.5)

    def _trial(self, number: int) -> Trial:
        """A trial as reports have it, with what only this worker knows of it yet."""
        o = self._open.get(number)
        return trial_of(self.problem, self._trials()[number], o.result("") if o else None)


class _Open:
    """A trial that this worker has begun."""

    def __init__(self, trial: optuna.Trial, arch: Arch) -> None:
        self.trial, self.arch = trial, arch
        self.costs, self.scores = dict[str, float](), list[float]()
        self.cached, self.seconds, self.trace = False, 0.0, ""
        self.began = time.perf_counter()

    def result(self, why: str) -> dict[str, Any]:
        seconds = self.seconds or (0.0 if self.cached else time.perf_counter() - self.began)
        out: dict[str, Any] = {"why": why, "costs": self.costs, "scores": self.scores, "seconds": seconds, "cached": self.cached}
        return {**out, "trace": self.trace[-4000:]} if self.trace else out


def _chain(t: FrozenTrial, trials: list[FrozenTrial]) -> list[FrozenTrial]:
    """A trial and those that it is a retry of, the first one last."""
    chain = [t]
    while RETRY_OF in chain[-1].user_attrs:
        chain.append(trials[chain[-1].user_attrs[RETRY_OF]])
    return chain


def _root(t: FrozenTrial, trials: list[FrozenTrial]) -> int:
    return _chain(t, trials)[-1].number


def _join(
    problem: Problem, sampler: optuna.samplers.BaseSampler, running: Running, storage: BaseStorage | None, name: str, about: Mapping[str, Any]
) -> optuna.Study:
    """The study of this name, made if it isn't there; refused if it is another's."""
    directions: Any = list(problem.directions)
    with quiet():
        study = optuna.create_study(
            storage=storage, study_name=name, load_if_exists=True, directions=directions, sampler=sampler, pruner=pruner(running.pruner)
        )
    identity = json.loads(json.dumps({"format": 1, **problem.identity(), **about}))
    found = study.user_attrs.get(IDENTITY)
    if found is None:
        study.set_user_attr(IDENTITY, identity)
    elif found != identity:
        keys = [key for key in {**found, **identity} if found.get(key) != identity.get(key)]
        raise SearchError(f"the study '{name}' there is of another search (differs in: {', '.join(sorted(keys))}); give another name or place")
    return study


def identity(storage: BaseStorage, name: str) -> dict[str, Any]:
    """What the study of this name is of, {} where there is none."""
    try:
        return dict(storage.get_study_user_attrs(storage.get_study_id_from_name(name)).get(IDENTITY, {}))
    except KeyError:
        return {}


def pruner(name: str) -> optuna.pruners.BasePruner:
    """median: from the first value on, once five trials have ended; asha: successive halving, a third goes on at each rung."""
    if name == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=1)
    if name == "asha":
        return optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=3)
    return optuna.pruners.NopPruner()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Optuna's own log lines about studies and trials are left out; ours say the same."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)
