"""The paper's two searches: for the coefficients of compound scaling, and for a network.

`find_coefficients(score, arch)` and `find_network(score, space)` take any function that makes a number of an Arch.
Names are loaded when they are asked for: spaces, grids and rewards need neither torch nor Optuna.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOME = {
    "find_coefficients": "find",
    "find_network": "find",
    "coefficient_search": "find",
    "network_search": "find",
    "Found": "find",
    "Place": "find",
    "Screen": "find",
    "Running": "events",
    "SearchError": "events",
    "Search": "study",
    "Record": "record",
    "Trial": "record",
    "Objective": "reward",
    "HARD": "reward",
    "SOFT": "reward",
    "Space": "space",
    "SpaceError": "space",
    "mnasnet_space": "space",
    "Cached": "score_cache",
    "ZeroCostScore": "zerocost",
}

__all__ = [
    "HARD",
    "SOFT",
    "Cached",
    "Found",
    "Objective",
    "Place",
    "Record",
    "Running",
    "Screen",
    "Search",
    "SearchError",
    "Space",
    "SpaceError",
    "Trial",
    "ZeroCostScore",
    "coefficient_search",
    "find_coefficients",
    "find_network",
    "mnasnet_space",
    "network_search",
]

if TYPE_CHECKING:
    from triscale.search.events import Running, SearchError
    from triscale.search.find import Found, Place, Screen, coefficient_search, find_coefficients, find_network, network_search
    from triscale.search.record import Record, Trial
    from triscale.search.reward import HARD, SOFT, Objective
    from triscale.search.score_cache import Cached
    from triscale.search.space import Space, SpaceError, mnasnet_space
    from triscale.search.study import Search
    from triscale.search.zerocost import ZeroCostScore


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'triscale.search' has no attribute '{name}'")
    value = getattr(import_module(f"triscale.search.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
