"""Optuna's trials as plain values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from triscale.search.problem import Problem
from triscale.search.record import Record, State, Trial

STATES: dict[TrialState, State] = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
}


# A trial's attributes. LOST: its worker ended, it is begun again; NEEDLESS: it isn't, another does for it; EXHAUSTED: begun often
# enough, it fails with this reason; FIRST: the reference.
WORKER, RESULT, LOST, NEEDLESS, RETRY_OF, FIRST, EXHAUSTED = "worker", "result", "lost", "needless", "retry of", "first", "exhausted"


def counts(t: FrozenTrial) -> bool:
    """Whether a trial is one of those that were wanted: it has ended by its score, or is or will be at work."""
    return LOST not in t.user_attrs and NEEDLESS not in t.user_attrs


def fixed(t: FrozenTrial) -> dict[str, Any]:
    """A trial's parameters, those that it shall have where they were given; a worker may have ended before it had them all."""
    return dict(t.system_attrs.get("fixed_params") or t.params)


def trial_of(problem: Problem, t: FrozenTrial, known: Mapping[str, Any] | None = None) -> Trial:
    """known: its result where the study has none yet."""
    params, result = fixed(t), known or t.user_attrs.get(RESULT, {})
    scores: Sequence[float] = result.get("scores", ())
    costs: Mapping[str, float] = result.get("costs", {})
    complete = t.state == TrialState.COMPLETE
    whole = bool(params) and set(params) >= set(problem.distributions)
    return Trial(
        t.number,
        STATES[t.state] if counts(t) else "lost",
        problem.arch(params) if whole else None,
        problem.choices(params),
        scores[-1] if complete and scores else None,
        tuple(scores),
        problem.worth(scores[-1], costs) if complete and scores else None,
        costs,
        result.get("seconds", 0.0),
        str(t.user_attrs.get(LOST) or t.user_attrs.get(NEEDLESS) or result.get("why", "")),
        result.get("cached", False),
        _time(t.datetime_start),
        _time(t.datetime_complete),
    )


def _time(when: datetime | None) -> float:
    return when.timestamp() if when else 0.0


def record_of(problem: Problem, trials: Sequence[FrozenTrial], wanted: int, settings: Mapping[str, str], importance: Mapping[str, float]) -> Record:
    """A study as a report reads it."""
    o = problem.objective
    rows = tuple(trial_of(problem, t) for t in trials)
    first = next((r.score for r, t in zip(rows, trials, strict=True) if t.user_attrs.get(FIRST) and r.score is not None), None)
    target = (o.kind, o.target) if o else None
    return Record(problem.kind, problem.reference, rows, target, o.exponents if o else (0.0, 0.0), settings, first, wanted, importance)
