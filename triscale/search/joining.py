"""A study by its name: made, joined, or refused."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import optuna
from optuna.storages import BaseStorage

from triscale.search.events import Running, SearchError
from triscale.search.problem import Problem

IDENTITY = "identity"  # a study's attribute: what it is of


def join(
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
