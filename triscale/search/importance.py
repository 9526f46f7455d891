"""Which decisions matter: how much each sets the best tenth of the trials apart, by Optuna's PED-ANOVA (Watanabe et al. 2023)."""

from __future__ import annotations

import warnings

import optuna
from optuna.trial import FrozenTrial, TrialState, create_trial

from triscale.search.coding import Coding
from triscale.search.joining import quiet
from triscale.search.problem import NetworkProblem
from triscale.search.study import Search
from triscale.search.trials import RESULT

FEWEST = 10  # complete trials below which nothing is said


def importance(search: Search) -> dict[str, float]:
    """Decision -> its share of what sets the best tenth apart; all sum to 1. {} with fewer than ten complete trials, where the values
    don't differ, and for triples, whose three parts are bound to each other. However points are written, decisions are taken singly."""
    problem = search.problem
    if not isinstance(problem, NetworkProblem):
        return {}
    coding = Coding.of(problem.space)
    rows = [row for t in search.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)) if (row := _row(problem, coding, t))]
    if len(rows) < FEWEST or len({row.value for row in rows}) < 2:
        return {}
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a decision with one choice has no importance
        study = optuna.create_study(direction="maximize")
        study.add_trials(rows)
        return dict(optuna.importance.get_param_importances(study, evaluator=optuna.importance.PedAnovaImportanceEvaluator()))


def _row(problem: NetworkProblem, coding: Coding, t: FrozenTrial) -> FrozenTrial | None:
    """The trial with one parameter a decision and one value."""
    point, result = coding.point(t.params), t.user_attrs.get(RESULT, {})
    if point is None or not result.get("scores"):
        return None
    value = problem.worth(result["scores"][-1], result["costs"])
    return create_trial(params=coding.params(point), distributions=coding.distributions, value=value)
