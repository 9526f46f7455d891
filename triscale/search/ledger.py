"""What workers of a study agree on without speaking: which trials count, which are needless, and whose worker has ended.

All is told from the trials and their attributes, so that any worker may look, several at one time, and come to the same.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection, Iterator
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from triscale.search.events import Running, Told
from triscale.search.liveness import Liveness
from triscale.search.problem import Problem
from triscale.search.trials import EXHAUSTED, FIRST, LOST, RETRY_OF, WORKER, counts, fixed

GIVEN_BACK = "given back: its worker was stopped"


class Ledger:
    """The trials of a study, as one worker sees them."""

    def __init__(self, study: optuna.Study, problem: Problem, running: Running, alive: Liveness) -> None:
        self.study, self.problem, self.running, self._alive = study, problem, running, alive
        self._looked = -1e9
        self._settled = self._settled_count = 0

    @property
    def wanted(self) -> int:
        return min(self.running.trials, self.problem.most or self.running.trials)

    def trials(self) -> list[FrozenTrial]:
        """All, by number; not copied."""
        return self.study._storage.get_all_trials(self.study._study_id, deepcopy=False)

    def full(self) -> bool:
        """Whether as many trials as are wanted have ended, are at work or wait for others than the next to ask."""
        trials = self.trials()
        waiting = any(t.state == TrialState.WAITING for t in trials[self._settled :])
        return not waiting and self._counted(trials) >= self.wanted

    def done(self) -> bool:
        return not any(t.state in (TrialState.RUNNING, TrialState.WAITING) for t in self.trials()[self._settled :])

    def _counted(self, trials: list[FrozenTrial]) -> int:
        """How many of these trials, all from the first on, count. What leads and has ended is counted once."""
        while self._settled < len(trials) and trials[self._settled].state.is_finished():
            self._settled_count += counts(trials[self._settled])
            self._settled += 1
        return self._settled_count + sum(map(counts, trials[self._settled :]))

    def needless(self, number: int) -> str:
        """Why a trial of this number isn't to be done: workers that ask at one time may begin more than are wanted, or one twice.
        Of two the lower number is the one that counts, whoever looks."""
        trials = self.trials()
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
            trials = self.trials()
            beginning = [
                t for t in trials[:number] if t.state == TrialState.RUNNING and counts(t) and len(t.params) < len(self.problem.distributions)
            ]
            if not beginning or time.monotonic() > deadline:
                return trials
            time.sleep(0.01)

    def bury(self, mine: Collection[int]) -> Iterator[Told]:
        """Takes up the trials of workers that live no more, every few seconds. mine: those that this worker has begun."""
        if time.monotonic() - self._looked < min(5.0, self.running.alive_after / 4):
            return
        self._looked = time.monotonic()
        signs: dict[str, Any] | None = None
        for t in self.trials():
            if t.state != TrialState.RUNNING or t.number in mine:
                continue
            signs = self.study.user_attrs if signs is None else signs
            card = t.user_attrs.get(WORKER)
            alive = self._alive.lives(card, signs) if card else self._alive.changes(f"trial {t.number}", len(t.params))
            if not alive or LOST in t.user_attrs:
                self.drop(t._trial_id, t.user_attrs.get(LOST, "its worker ended"))
                again = "; it is begun again" if self._wish(t) else " before it was known what it would be"
                yield Told(f"trial {t.number}: its worker has ended{again}")
        trials = self.trials()
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

    def drop(self, trial_id: int, why: str, kind: str = LOST) -> None:
        """Ends a trial that isn't to count. Another worker may be doing the same."""
        with contextlib.suppress(UpdateFinishedTrialError):
            self.study._storage.set_trial_user_attr(trial_id, kind, why)
            self.study._storage.set_trial_state_values(trial_id, TrialState.FAIL)

    def give_back(self, trial_ids: Collection[int]) -> None:
        """What has not ended is begun again by another, or when the study is gone on with. Tried once: that the worker has ended shows."""
        storage = getattr(self.study._storage, "inner", self.study._storage)
        for trial_id in trial_ids:
            with contextlib.suppress(Exception):
                storage.set_trial_user_attr(trial_id, LOST, GIVEN_BACK)
                storage.set_trial_state_values(trial_id, TrialState.FAIL)

    def look_now(self) -> None:
        """The next `bury` looks, however soon it is."""
        self._looked = -1e9


def _chain(t: FrozenTrial, trials: list[FrozenTrial]) -> list[FrozenTrial]:
    """A trial and those that it is a retry of, the first one last."""
    chain = [t]
    while RETRY_OF in chain[-1].user_attrs:
        chain.append(trials[chain[-1].user_attrs[RETRY_OF]])
    return chain


def _root(t: FrozenTrial, trials: list[FrozenTrial]) -> int:
    return _chain(t, trials)[-1].number
