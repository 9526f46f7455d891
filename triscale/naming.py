"""Names that people type: the nearest known one for a misspelt one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UnknownNameError(ValueError):
    """A name that is not in its list. The message gives the nearest known name."""


def unknown(kind: str, name: str, known: Iterable[str]) -> UnknownNameError:
    """The error for `name`, which is not one of `known`; `kind` says what was expected ("network", "recipe field")."""
    names = list(known)
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.3)
    hint = f"; nearest is '{near[0]}'" if near else f"; known are {', '.join(names[:8])}{' ...' if len(names) > 8 else ''}"
    return UnknownNameError(f"unknown {kind} '{name}'{hint}")
