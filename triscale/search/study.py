"""One worker's part in a study: it asks for networks, has them scored, tells what came of them, and takes up what others lost.

Any number of these, on one machine or many, share a study through its storage. A trial counts when it is complete, pruned or
failed by its own score; one whose worker died is dropped and begun again by whoever sees it first.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.trial import TrialState

from triscale.architecture import Arch
from triscale.search.events import Began, Ended, Event, Reported, Running, Score, SearchError, Told
from triscale.search.joining import join
from triscale.search.ledger import Ledger
from triscale.search.liveness import Liveness
from triscale.search.problem import Problem
from triscale.search.record import Record, Trial
from triscale.search.scoring import Died, Failed, Finished, Message, Scored, scoring
from triscale.search.trials import EXHAUSTED, FIRST, NEEDLESS, RESULT, WORKER, counts, record_of, trial_of

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
        self.study = join(problem, sampler, running, storage, name, about or {})
        self._alive = Liveness(self.study, running.alive_after)
        self._ledger = Ledger(self.study, problem, running, self._alive)
        self._open: dict[int, _Open] = {}
        self._failures = self._unborn = 0
        self._steps: int = getattr(score, "steps", 0)  # values that a whole score has, where that is known
        self._waited = False

    @property
    def wanted(self) -> int:
        """Trials in all."""
        return self._ledger.wanted

    def standing(self, shown: int) -> tuple[int, list[Trial]]:
        """How many trials of all workers have ended and count, and the best of them."""
        ended = [t for t in self._ledger.trials() if t.state.is_finished() and counts(t)]
        complete = [t for t in ended if t.state == TrialState.COMPLETE and RESULT in t.user_attrs]
        worth = {t.number: self.problem.worth(t.user_attrs[RESULT]["scores"][-1], t.user_attrs[RESULT]["costs"]) for t in complete}
        best = sorted(complete, key=lambda t: (-worth[t.number], t.number))[:shown]
        return len(ended), [trial_of(self.problem, t) for t in best]

    def record(self, settings: Mapping[str, str] | None = None, importance: Mapping[str, float] | None = None) -> Record:
        """The study as it stands."""
        return record_of(self.problem, self._ledger.trials(), self.wanted, settings or {}, importance or {})

    def traces(self) -> dict[int, str]:
        """Of the failed trials by number, where in the score's code it happened; "" where that isn't known."""
        failed = [t for t in self._ledger.trials() if t.state == TrialState.FAIL and counts(t)]
        return {t.number: t.user_attrs.get(RESULT, {}).get("trace", "") for t in failed}

    def events(self) -> Iterator[Event]:
        """Goes on with the study until all trials that are wanted have ended, yielding what happens.

        Closing the iterator, or an exception thrown into it, gives back the trials that have not ended.
        Raises SearchError where the first trials all fail, StorageError where the storage stays away.
        """
        at_work = scoring(self._score, self.running.workers, self.running.timeout)
        self._alive.start()
        try:
            yield from self._first()
            while True:
                yield from self._ledger.bury(self._open)
                while len(self._open) < at_work.slots:
                    begun = self._begin()
                    if begun is None:
                        break
                    yield from self._start(begun, at_work)
                if self._open:
                    for message in at_work.messages(1.0):
                        yield from self._heed(message, at_work)
                elif self._ledger.done():
                    return
                else:
                    yield from self._wait_for_others()
        finally:
            at_work.close()
            self._ledger.give_back([o.trial._trial_id for o in self._open.values()])
            self._open.clear()
            self._alive.stop()

    def _first(self) -> Iterator[Event]:
        """The reference is the first trial, where it is one of the networks searched."""
        params = self.problem.first()
        if params is not None:
            if not any(t.user_attrs.get(FIRST) for t in self._ledger.trials()):
                self.study.enqueue_trial(params, user_attrs={FIRST: True})
        elif self.problem.kind == "network":
            yield Told("the reference isn't one of the networks of its space, so it isn't scored with them")

    def _begin(self) -> optuna.Trial | None:
        """The next trial; None where there is none to begin."""
        while not self._ledger.full():
            with contextlib.suppress(UpdateFinishedTrialError):  # it took so long that others gave it up
                trial = self.study.ask(self.problem.distributions)
                trial.set_user_attr(WORKER, self._alive.card)
                needless = self._ledger.needless(trial.number)
                if not needless:
                    return trial
                self._ledger.drop(trial._trial_id, needless, NEEDLESS)
        return None

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
        if self._failures >= ALIKE and not any(t.state in (TrialState.COMPLETE, TrialState.PRUNED) for t in self._ledger.trials()):
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
            if not self._ledger.trials()[number].state.is_finished():
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
        self._ledger.drop(o.trial._trial_id, message.why)
        yield Told(f"trial {message.number}: {message.why}", message.number)
        self._ledger.look_now()
        self._unborn = 0 if message.loaded else self._unborn + 1
        if self._unborn >= UNBORN:
            raise SearchError(f"{UNBORN} processes ended before they had the score; a script that searches needs: if __name__ == '__main__'")

    def _wait_for_others(self) -> Iterator[Event]:
        if not self._waited:
            self._waited = True
            yield Told("the last trials are being done by other workers; waiting for them")
        time.sleep(0.5)

    def _trial(self, number: int) -> Trial:
        """A trial as reports have it, with what only this worker knows of it yet."""
        o = self._open.get(number)
        return trial_of(self.problem, self._ledger.trials()[number], o.result("") if o else None)


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
