"""What a search's record says, as the numbers that sentences, tables and plots share."""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeGuard

from triscale.architecture import Arch
from triscale.quantities import short, size
from triscale.scaling import Coefficients
from triscale.search.record import Record, Trial
from triscale.search.reward import Objective, reward
from triscale.search.space import FIELDS
from triscale.text import printable

CERTAIN = 2.0  # standard errors of a difference from which on two scores are told apart: 95 %
AXES = {"macs": "multiply-adds per image", "latency": "latency (s)", "memory": "memory (bytes)", "params": "parameters"}


@dataclass(frozen=True)
class Network:
    """One side of a comparison; None is not known. cost: as a trial's."""

    name: str
    arch: Arch | None
    score: float | None
    value: float | None
    cost: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Triple:
    """A trial of a coefficient search."""

    trial: Trial
    coefficients: Coefficients


def known(value: float | None) -> TypeGuard[float]:
    """A number, neither None nor NaN nor infinite."""
    return value is not None and math.isfinite(value)


def ranked(record: Record) -> tuple[Trial, ...]:
    """The record's own ranking of the complete trials that have a score and a value; NaN would put any order in disorder."""
    return replace(record, trials=tuple(t for t in record.complete if known(t.score) and known(t.value))).ranked


def number(value: float | None) -> str:
    """A score or value to four digits."""
    if not known(value):
        return "–"
    digits = 4 if abs(value) < 10 else 2
    return f"{value:,.{digits}f}" if value == 0 or 1e-3 <= abs(value) < 1e6 else f"{value:.4g}"


def amount(kind: str, value: float | None) -> str:
    """A cost with its unit, short: 386M, 12.1 ms, 40.2 MB."""
    if not known(value):
        return "–"
    return f"{1000 * value:.3g} ms" if kind == "latency" else size(value) if kind == "memory" else short(value)


def phrase(kind: str, value: float | None) -> str:
    """A cost as it stands in a sentence: 386M MACs, 12.1 ms of latency."""
    names = {"macs": "MACs", "params": "parameters", "latency": "of latency", "memory": "of memory"}
    return f"{amount(kind, value)} {names.get(kind, printable(kind))}" if known(value) else f"unknown {kind}"


def metric(record: Record) -> str:
    """The cost that counts: the target's, else MACs."""
    return record.target[0] if record.target else "macs"


def value_of(record: Record, score: float | None, cost: Mapping[str, float]) -> float | None:
    """What a score at a cost is worth by the record's own target and exponents; None where it can't be said."""
    if not known(score) or not record.target:
        return score
    kind, target = record.target
    paid = cost.get(kind)
    return reward(score, paid, target, record.exponents) if known(paid) and paid > 0 and target > 0 else None


def reference(record: Record, classes: int, channels: int) -> Network:
    """The reference, its cost counted; its latency, and a score that the record doesn't give, from a trial of the same network."""
    arch = record.reference
    same = next((t for t in ranked(record) if t.arch is not None and t.arch.topology == arch.topology), None)
    counted = Objective("memory" if metric(record) == "memory" else "macs", 1.0, classes=classes, channels=channels).costs(arch)
    measured = {k: v for k, v in same.cost.items() if k not in counted} if same else {}
    score = record.reference_score if known(record.reference_score) else same.score if same else None
    costs = counted | measured
    return Network(printable(arch.name) or "reference", arch, score, value_of(record, score, costs), costs)


def network_of(trial: Trial) -> Network:
    return Network(f"trial {trial.number}", trial.arch, trial.score, trial.value, trial.cost)


def priced(record: Record) -> list[tuple[Trial, float, float]]:
    """The ranked trials whose cost is known: trial, cost, score."""
    kind = metric(record)
    return [(t, t.cost[kind], t.score) for t in ranked(record) if known(t.cost.get(kind)) and known(t.score)]


def running_best(trials: Iterable[Trial], at: str = "number") -> list[tuple[float, float]]:
    """(number or time, value) at each trial that was better than all before it."""
    out: list[tuple[float, float]] = []
    for t in sorted((t for t in trials if known(t.value)), key=lambda t: (getattr(t, at), t.number)):
        if known(t.value) and (not out or t.value > out[-1][1]):
            out.append((getattr(t, at), t.value))
    return out


def images(record: Record) -> int | None:
    """How many images a score is taken on, where the settings say it."""
    found = re.fullmatch(r"\d{1,12}", re.sub(r"[\s,_]", "", record.settings.get("scored images", "")))
    return int(found[0]) or None if found else None


def standard_error(score: float | None, n: int | None) -> float | None:
    """sqrt(p (1 - p) / n) of an accuracy on n images; None where that isn't known or the score is no share."""
    return math.sqrt(score * (1 - score) / n) if n and known(score) and 0 <= score <= 1 else None


def told_apart(a: float | None, b: float | None, n: int | None) -> bool | None:
    """Whether two accuracies differ by more than 2 standard errors of their difference; None where that can't be said."""
    first, second = standard_error(a, n), standard_error(b, n)
    if first is None or second is None or a is None or b is None:
        return None
    return abs(a - b) > CERTAIN * math.hypot(first, second)


def values_apart(record: Record, a: Network, b: Network) -> bool | None:
    """The same of two values: each is a score times a factor that the cost makes, and so is its standard error."""
    n = images(record)
    errors = [standard_error(side.score, n) for side in (a, b)]
    if a.value is None or b.value is None or not a.score or not b.score or errors[0] is None or errors[1] is None:
        return None
    first, second = errors[0] * a.value / a.score, errors[1] * b.value / b.score
    return abs(a.value - b.value) > CERTAIN * math.hypot(first, second)


def triples(record: Record) -> tuple[Triple, ...]:
    """The trials whose three coefficients can be read: the ranked first, then the others by number."""
    first = ranked(record)
    placed = {t.number for t in first}
    out = []
    for t in (*first, *sorted((t for t in record.trials if t.number not in placed), key=lambda t: t.number)):
        try:
            out.append(Triple(t, Coefficients(*(float(t.choices[name]) for name in ("alpha", "beta", "gamma")))))
        except (KeyError, ValueError, TypeError):
            continue
    return tuple(out)


def budget(record: Record) -> float | None:
    """What alpha x beta^2 x gamma^2 should be, where the settings say it."""
    try:
        value = float(record.settings.get("budget", ""))
    except ValueError:
        return None
    return value if math.isfinite(value) and value >= 1 else None


def importance_grid(record: Record) -> tuple[list[list[float]], dict[str, float]]:
    """(blocks x FIELDS) shares of the decisions "block 3 kernel", and what else there is."""
    rows = [[0.0] * len(FIELDS) for _ in record.reference.stages]
    rest = {}
    for name, share in record.importance.items():
        found = re.fullmatch(r"block (\d{1,3}) (\w+)", name)
        if not known(share):
            continue
        if found and 1 <= int(found[1]) <= len(rows) and found[2] in FIELDS:
            rows[int(found[1]) - 1][FIELDS.index(found[2])] = share
        else:
            rest[name] = share
    return rows, rest


def thinned(trials: Sequence[Trial], most: int) -> list[Trial]:
    """At most `most` of them, evenly spread."""
    if len(trials) <= most:
        return list(trials)
    return [trials[i * len(trials) // most] for i in range(most)]


def place(values: Sequence[float], value: float) -> int:
    """The rank, from 1, of a value among others in falling order; of equals the first."""
    return 1 + bisect_left([-v for v in values], -value)
