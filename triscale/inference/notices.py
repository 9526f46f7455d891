"""What a user should know once: why something runs the plain way, or is measured anew."""

from __future__ import annotations

import warnings
from collections.abc import Callable

Tell = Callable[[str], object]


class OptimizeWarning(UserWarning):
    """An optimised network does something other than its user may expect; its results are right."""


_told: set[str] = set()


def warn(text: str) -> None:
    """As a warning, the same text once a process."""
    if text not in _told:
        _told.add(text)
        warnings.warn(text, OptimizeWarning, stacklevel=2)


class Once:
    """`tell` that says each text once."""

    def __init__(self, tell: Tell) -> None:
        self.tell, self.told = tell, set[str]()

    def __call__(self, text: str) -> None:
        if text not in self.told:
            self.told.add(text)
            self.tell(text)
