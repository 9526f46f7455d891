"""The grid of the paper's section 4, step 1: triples alpha, beta, gamma >= 1 whose alpha x beta^2 x gamma^2 is about the budget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product

from triscale.scaling import Coefficients

BUDGET, TOLERANCE = 2.0, 0.1
DEPTH_STEP, STEP = 0.1, 0.05  # in which the paper's own 1.2, 1.1, 1.15 lies
MOST = 16.0  # budget: the axes are then 151, 61 and 61 long


class GridError(ValueError):
    """Axes that make no grid, or a grid without a point near the budget; the message says what would give one."""


def grid(
    alphas: Sequence[float] = (),
    betas: Sequence[float] = (),
    gammas: Sequence[float] = (),
    *,
    budget: float = BUDGET,
    tolerance: float = TOLERANCE,
) -> tuple[Coefficients, ...]:
    """All triples of the axes with |alpha x beta^2 x gamma^2 - budget| <= tolerance, in the order of the axes.

    An axis that isn't given goes from 1, in steps of 0.1 for alpha and 0.05 for beta and gamma, as far as the budget lets it alone:
    for 2 to 2, 1.4, 1.4, which makes 61 triples. The difference is taken to 9 digits, so that a triple exactly on the edge is in.
    Raises GridError for values below 1, repeated or not finite, a budget below 1, and where no triple is near enough.
    """
    if not (math.isfinite(budget) and 1 <= budget <= MOST and math.isfinite(tolerance) and tolerance >= 0):
        raise GridError(f"budget and tolerance: expected numbers from 1 to {MOST:g} and from 0, found {budget:g} and {tolerance:g}")
    axes = {
        "alpha": alphas or _axis(budget, DEPTH_STEP),
        "beta": betas or _axis(math.sqrt(budget), STEP),
        "gamma": gammas or _axis(math.sqrt(budget), STEP),
    }
    for name, values in axes.items():
        wrong = [v for v in values if not isinstance(v, (int, float)) or not math.isfinite(v) or v < 1]
        if wrong or len(set(values)) != len(values):
            raise GridError(f"{name}: expected different numbers >= 1, found {', '.join(f'{v}' for v in (wrong or values))}")
    triples = [Coefficients(*(float(v) for v in triple)) for triple in product(*axes.values())]
    inside = tuple(c for c in triples if _off(c, budget) <= tolerance)
    if not inside:
        near = min(triples, key=lambda c: _off(c, budget))
        triple = f"{near.alpha:g}, {near.beta:g}, {near.gamma:g}"
        raise GridError(
            f"no triple within {tolerance:g} of alpha x beta^2 x gamma^2 = {budget:g}; the nearest of {len(triples)}, ({triple}), gives "
            f"{near.growth:.4g}: a tolerance of {_up(_off(near, budget)):g}, or finer axes, would have one"
        )
    return inside


def spread(triples: Sequence[Coefficients]) -> tuple[Coefficients, ...]:
    """The same triples in an order whose every beginning covers them well: first the most central one, then always the one
    furthest from all before it (Gonzalez 1985), in the logarithms of the three factors; of equals the first."""
    rest, out = list(dict.fromkeys(triples)), list[Coefficients]()
    if not rest:
        return ()
    places = {c: (math.log(c.alpha), 2 * math.log(c.beta), 2 * math.log(c.gamma)) for c in rest}
    centre = tuple(sum(p[i] for p in places.values()) / len(rest) for i in range(3))
    out.append(min(rest, key=lambda c: math.dist(places[c], centre)))
    distance = {c: math.dist(places[c], places[out[0]]) for c in rest if c != out[0]}
    while len(out) < len(rest):
        chosen = max(distance, key=lambda c: round(distance[c], 12))
        out.append(chosen)
        del distance[chosen]
        distance = {c: min(d, math.dist(places[c], places[chosen])) for c, d in distance.items()}
    return tuple(out)


def _axis(end: float, step: float) -> tuple[float, ...]:
    return tuple(round(1 + step * i, 2) for i in range(int(round((end - 1) / step, 9)) + 1))


def _off(c: Coefficients, budget: float) -> float:
    return round(abs(c.growth - budget), 9)


def _up(value: float) -> float:
    """Three digits, not below the value."""
    digits = 2 - math.floor(math.log10(value)) if value > 0 else 0
    return math.ceil(value * 10**digits) / 10**digits
