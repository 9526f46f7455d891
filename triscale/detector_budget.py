"""The largest detector of a scaling family that fits its budgets: what budget.py does for networks."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass

from triscale.budget import HIGHEST, LOWEST, STEP, BudgetError
from triscale.detector import DetectorArch, detector_cost, scale_detector
from triscale.detector_memory import detector_memory
from triscale.scaling import Coefficients, compound

BUDGETS = ("macs", "params", "memory")


@dataclass(frozen=True)
class DetectorFit:
    """binding: the budgets that the next larger detector exceeds. use: for each budget (used, allowed)."""

    phi: float
    arch: DetectorArch
    binding: tuple[str, ...]
    use: dict[str, tuple[float, float]]

    def __str__(self) -> str:
        rows = [f"phi {self.phi:g}; bound by {' and '.join(self.binding)}"]
        return "\n".join(rows + [f"  {name}: {used:,.4g} of {allowed:,.4g} ({used / allowed:.1%})" for name, (used, allowed) in self.use.items()])


@dataclass(frozen=True)
class DetectorWorkload:
    """What the budgets are for. The memory is that of inference or of a training step with SGD and momentum, float32."""

    num_classes: int = 80
    batch: int = 1
    training: bool = False

    def use(self, arch: DetectorArch, names: Mapping[str, float]) -> dict[str, float]:
        c = detector_cost(arch, self.num_classes)
        found: dict[str, float] = {"macs": c.macs, "params": c.params}
        if "memory" in names:
            m = detector_memory(arch, self.num_classes, self.batch)
            found["memory"] = m.training(1) if self.training else m.inference
        return {name: found[name] for name in names}


def fit_detector(
    arch: DetectorArch, budgets: Mapping[str, float], *, coefficients: Coefficients | None = None, workload: DetectorWorkload | None = None
) -> DetectorFit:
    """The largest phi, in steps of 1/1000, whose detector keeps every budget: macs (an image), params, memory (bytes, for `workload`).

    Raises BudgetError where no budget is given, one isn't above 0, the smallest detector of the family exceeds one, or the largest none.
    """
    c, w = coefficients or Coefficients(), workload or DetectorWorkload()
    if not budgets or not set(budgets) <= set(BUDGETS) or not all(value > 0 for value in budgets.values()):
        raise BudgetError(f"fit_detector: expected one or more of {', '.join(BUDGETS)}, above 0, found {dict(budgets)}")
    if c.growth == 1:
        raise BudgetError("fit_detector: the coefficients are all 1, so no phi changes the detector")

    def at(step: int) -> DetectorArch:
        return scale_detector(arch, compound(step / STEP, c.alpha, c.beta, c.gamma))

    def exceeded(step: int) -> tuple[str, ...]:
        return tuple(name for name, value in w.use(at(step), budgets).items() if value > budgets[name])

    if exceeded(LOWEST):
        use = w.use(at(LOWEST), budgets)
        over = ", ".join(f"{name} {use[name]:,} > {budgets[name]:,g}" for name in exceeded(LOWEST))
        raise BudgetError(f"fit_detector: even the smallest detector of this family doesn't fit: {over}")
    high = 0
    while not exceeded(high):  # upwards step by step: far beyond, a detector is too large to be described
        if high == HIGHEST:
            raise BudgetError(f"fit_detector: the budget allows phi {high / STEP:g} and more; give a tighter one")
        high = min(max(STEP, 2 * high), HIGHEST)
    span = range(LOWEST if not high else 0, high)
    low = span[bisect_left(span, True, key=lambda step: bool(exceeded(step))) - 1]
    return DetectorFit(low / STEP, at(low), exceeded(low + 1), {name: (value, budgets[name]) for name, value in w.use(at(low), budgets).items()})
