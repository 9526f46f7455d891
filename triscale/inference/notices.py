"""What a user should know once: why something runs the plain way, or is measured anew."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable

Tell = Callable[[str], object]


class OptimizeWarning(UserWarning):
    """An optimised network does something other than its user may expect; its results are right."""


_told: set[str] = set()


def warn(text: str) -> None:
    """As a warning of the line outside this package and torch that led here, the same text once a process."""
    if text in _told:
        return
    _told.add(text)
    frame, level = sys._getframe(1), 2
    while frame.f_back and frame.f_globals.get("__name__", "").startswith(("triscale.inference", "torch.")):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, OptimizeWarning, stacklevel=level)


class Once:
    """`tell` that says each text once."""

    def __init__(self, tell: Tell) -> None:
        self.tell, self.told = tell, set[str]()

    def __call__(self, text: str) -> None:
        if text not in self.told:
            self.told.add(text)
            self.tell(text)
