"""Numbers with units as people type and read them: 400M, 2e9, 1.5GiB, 20ms."""

from __future__ import annotations

import re

_SCALES = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "ki": 2.0**10, "mi": 2.0**20, "gi": 2.0**30, "ti": 2.0**40}
_SECONDS = {"": 1.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "min": 60.0, "h": 3600.0}
_NUMBER = re.compile(r"\s*([0-9]*\.?[0-9]+(?:e[+-]?[0-9]+)?)\s*([a-z]*)\s*", re.IGNORECASE)


def count(text: str) -> float:
    """A count or a number of bytes: 400M, 2G, 2e9, 1.5GiB, 100MB. Decimal, unless the unit has an `i`. Raises ValueError."""
    value, unit = _split(text)
    scale = _SCALES.get(unit.lower().removesuffix("b"))
    if scale is None:
        raise ValueError(f"expected a number such as 400M, 2e9 or 1.5GiB, found '{text}'")
    return value * scale


def seconds(text: str) -> float:
    """A duration: 20ms, 0.02, 1.5s, 10min, 2h. Raises ValueError."""
    value, unit = _split(text)
    scale = _SECONDS.get(unit.lower())
    if scale is None:
        raise ValueError(f"expected a duration such as 20ms, 0.02s, 10min or 2h, found '{text}'")
    return value * scale


def _split(text: str) -> tuple[float, str]:
    found = _NUMBER.fullmatch(text)
    if not found:
        raise ValueError(f"expected a number above 0, with a unit or without, found '{text}'")
    return float(found[1]), found[2]


def short(value: float, digits: int = 3) -> str:
    """385814752 -> 386M."""
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.{digits}g}{unit}"
    return f"{value:.{digits}g}"


def size(count_of_bytes: float) -> str:
    """99321500 -> 99.3 MB."""
    for limit, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count_of_bytes >= limit:
            return f"{count_of_bytes / limit:.3g} {unit}"
    return f"{count_of_bytes:.0f} B"
