"""The largest network of a scaling family that fits its budgets (paper, eq. 2).

phi is continuous; the networks it gives are not, because depth, width and resolution are rounded. So phi is searched on
a grid of 1/1000, which makes the printed phi give the same network again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from triscale.architecture import Arch
from triscale.cost_model import Cost, cost
from triscale.scaling import Coefficients, compound, scale

STEP = 1000  # steps of phi per unit
LOWEST, HIGHEST = -100 * STEP, 20 * STEP  # from -60 on every named network stands on its floors; at +20 B0 is a million times larger


class BudgetError(ValueError):
    """Budgets that are no numbers above 0, or that even the smallest network exceeds."""


@dataclass(frozen=True)
class Workload:
    """What the memory budget is for: inference or a training step, on `batch` images of float32."""

    batch: int = 1
    training: bool = False
    num_classes: int = 1000
    in_channels: int = 3
    optimizer_slots: int = 2

    def cost(self, arch: Arch) -> Cost:
        return cost(arch, self.num_classes, self.in_channels, batch=self.batch)

    def memory(self, c: Cost) -> int:
        """Bytes of weights, input, activations (and, training, gradients and optimiser state)."""
        return c.memory.training(self.optimizer_slots) if self.training else c.memory.inference


@dataclass(frozen=True)
class Fit:
    """The largest network within all budgets.

    binding: the budgets that the next larger network exceeds. use: for each budget (used, allowed). interval: with a
    latency budget, the (phi that fits, phi measured too slow) that the answer lies between. measured: phi -> seconds.
    """

    phi: float
    arch: Arch
    cost: Cost
    binding: tuple[str, ...]
    use: dict[str, tuple[float, float]]
    interval: tuple[float, float] | None = None
    measured: dict[float, float] = field(default_factory=dict)

    def __str__(self) -> str:
        rows = [f"phi {self.phi:g}; bound by {' and '.join(self.binding)}"]
        rows += [f"  {name}: {used:,.4g} of {allowed:,.4g} ({used / allowed:.1%})" for name, (used, allowed) in self.use.items()]
        if self.interval:
            rows.append(f"  latency fits at phi {self.interval[0]:g} and no longer at {self.interval[1]:g} (as measured)")
        return "\n".join(rows)


def fit_budget(
    arch: Arch,
    *,
    macs: float | None = None,
    params: float | None = None,
    memory: float | None = None,
    latency: float | None = None,
    measure: Callable[[Arch], float] | None = None,
    coefficients: Coefficients | None = None,
    workload: Workload | None = None,
) -> Fit:
    """The largest phi whose network keeps every budget given; phi below 0 shrinks `arch`, down to one layer a stage.

    macs: multiply-adds for one image. params: parameters. memory: bytes, for `workload`. latency: seconds by
    `measure(arch)`, which need be neither smooth nor monotone: it is bisected along phi, the first network that was too slow
    is measured again, and the interval is reported.
    Raises BudgetError where no budget is given, one isn't a number above 0, or the smallest network exceeds one: the
    message says by how much. Source: paper, eq. 2 and 3.
    """
    budgets = {"macs": macs, "params": params, "memory": memory, "latency": latency}
    given = {name: value for name, value in budgets.items() if value is not None}
    if not given:
        raise BudgetError(f"fit_budget: give at least one of {', '.join(budgets)}")
    for name, value in given.items():
        if not isinstance(value, (int, float)) or not value > 0:
            raise BudgetError(f"fit_budget: expected {name} above 0, found {value!r}")
    if latency is not None and measure is None:
        raise BudgetError("fit_budget: a latency budget needs measure=, a callable Arch -> seconds (see triscale.latency)")
    line = _Line(arch, coefficients or Coefficients(), workload or Workload(), {k: v for k, v in given.items() if k != "latency"})
    low, binding = line.largest()
    if latency is None or measure is None:
        return line.fit(low, binding)
    return _within_latency(line, low, binding, latency, measure)


class _Line:
    """The networks along phi, and which of the exact budgets each exceeds."""

    def __init__(self, arch: Arch, coefficients: Coefficients, workload: Workload, budgets: dict[str, float]) -> None:
        self.base, self.budgets, self.workload = arch, budgets, workload
        self.abc = (coefficients.alpha, coefficients.beta, coefficients.gamma)
        grow = [c for c in self.abc if c > 1]
        if not grow:
            raise BudgetError("fit_budget: the coefficients are all 1, so no phi changes the network")

    def arch(self, step: int) -> Arch:
        return scale(self.base, compound(step / STEP, *self.abc))

    def use(self, c: Cost) -> dict[str, float]:
        exact: dict[str, Callable[[], float]] = {"macs": lambda: c.macs, "params": lambda: c.params, "memory": lambda: self.workload.memory(c)}
        return {name: exact[name]() for name in self.budgets}

    def exceeded(self, step: int) -> tuple[str, ...]:
        use = self.use(self.workload.cost(self.arch(step)))
        return tuple(name for name, value in use.items() if value > self.budgets[name])

    def largest(self) -> tuple[int, tuple[str, ...]]:
        """(the largest step that keeps all exact budgets, those that the next one exceeds). Costs never fall along phi."""
        if not self.budgets:
            return HIGHEST, ()
        if self.exceeded(LOWEST):
            raise BudgetError(self.too_small())
        low, high = LOWEST, 0
        if not self.exceeded(0):
            low, high = 0, STEP
            while not self.exceeded(high):
                if high == HIGHEST:
                    raise BudgetError(f"fit_budget: the budget allows phi {high / STEP:g} and more; give a tighter one")
                low, high = high, min(2 * high, HIGHEST)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.exceeded(middle) else (middle, high)
        return low, self.exceeded(high)

    def too_small(self) -> str:
        use = self.use(self.workload.cost(self.arch(LOWEST)))
        over = ", ".join(f"{name} {use[name]:,} > {self.budgets[name]:,g}" for name in use if use[name] > self.budgets[name])
        return f"fit_budget: even the smallest network of this family doesn't fit: {over}"

    def fit(self, step: int, binding: tuple[str, ...], **latency: object) -> Fit:
        arch = self.arch(step)
        c = self.workload.cost(arch)
        use = {name: (value, self.budgets[name]) for name, value in self.use(c).items()}
        extra = latency.pop("use", {})
        return Fit(step / STEP, arch, c, binding, {**use, **extra}, **latency)  # type: ignore[arg-type,dict-item]


def _within_latency(line: _Line, top: int, binding: tuple[str, ...], latency: float, measure: Callable[[Arch], float]) -> Fit:
    """Bisects on measured time below `top`, then measures again what was too slow; of several times the least counts."""
    seen: dict[int, list[float]] = {}

    def seconds(step: int) -> float:
        value = measure(line.arch(step))
        if not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
            raise BudgetError(f"fit_budget: measure gave {value!r}, expected seconds")
        seen.setdefault(step, []).append(value)
        return min(seen[step])

    def too_slow_twice(step: int) -> bool:
        while len(seen.get(step, ())) < 2:
            seconds(step)
        return min(seen[step]) > latency

    grid = STEP // 20  # finer steps of phi change the time by less than it scatters
    low, high = _bracket(seconds, min(top, HIGHEST), latency)
    while high - low > grid:
        middle = (low + high) // 2
        low, high = (low, middle) if seconds(middle) > latency else (middle, high)
    while low < high and not too_slow_twice(high):  # it fits after all: the limit lies further up
        low, high = high, min(high + grid, top)
    at_top = low == top
    return line.fit(
        low,
        binding if at_top else ("latency",),
        use={"latency": (min(seen[low]), latency)},
        interval=None if at_top else (low / STEP, high / STEP),
        measured={step / STEP: min(values) for step, values in sorted(seen.items())},
    )


def _bracket(seconds: Callable[[int], float], top: int, latency: float) -> tuple[int, int]:
    """(a step that fits, one that doesn't); both `top` where the exact budgets already bind below the latency."""
    step = min(0, top)
    if seconds(step) > latency:
        high = step
        for back in (1, 2, 4, 8, 16, 40, 100):
            low = max(LOWEST, step - back * STEP)
            if (took := seconds(low)) <= latency:
                return low, high
            high = low
        raise BudgetError(f"fit_budget: even the smallest network of this family doesn't fit: latency {took:.4g} s > {latency:g} s")
    low = step
    while low < top:
        high = min(top, low + STEP)
        if seconds(high) > latency:
            return low, high
        low = high
    if top == HIGHEST:
        raise BudgetError(f"fit_budget: the budget allows phi {top / STEP:g} and more; give a tighter one")
    return top, top
