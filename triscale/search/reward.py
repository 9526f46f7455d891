"""The objective of a network search: ACC x (cost / T)^w, from MnasNet (arXiv 1807.11626, eq. 2 and 3) and section 4 of the paper."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from triscale.architecture import Arch
from triscale.cost_model import cost

Target = Literal["macs", "latency", "memory"]
SOFT = (-0.07, -0.07)  # the paper's w: twice the cost is worth 5 % of the accuracy
HARD = (0.0, -1.0)  # MnasNet's hard constraint: below T only accuracy counts, above it falls with the cost
UNITS: dict[str, str] = {"macs": "MACs", "latency": "s", "memory": "bytes"}


def reward(score: float, cost: float, target: float, exponents: tuple[float, float] = SOFT) -> float:
    """score x (cost / target)^w; w is exponents[0] at or below the target and exponents[1] above. cost and target in one unit.

    Raises ValueError for a cost or target that isn't above 0, and for a score below 0, which a higher cost would raise.
    """
    if not (cost > 0 and target > 0):
        raise ValueError(f"reward: expected a cost and a target above 0, found {cost!r} and {target!r}")
    exponent = exponents[cost > target]
    if score < 0 and any(exponents):
        raise ValueError(f"reward: expected a score from 0, as score x (cost / T)^w would reward costs else, found {score:g}")
    return float(score * (cost / target) ** exponent)


@dataclass(frozen=True)
class Objective:
    """What a network is worth. kind, target: of the cost, T: multiply-adds, seconds or bytes for one image. exponents: w at or
    below T and above it. classes, channels: of the networks that are counted. measure: a network's latency in seconds, for that kind.

    memory is inference at batch 1 in float32 by the memory model.
    """

    kind: Target = "macs"
    target: float = 0.0
    exponents: tuple[float, float] = SOFT
    classes: int = 1000
    channels: int = 3
    measure: Callable[[Arch], float] | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(Target):
            raise ValueError(f"target: expected one of {', '.join(get_args(Target))}, found {self.kind!r}")
        if not (math.isfinite(self.target) and self.target > 0):
            raise ValueError(f"target: expected a number of {UNITS[self.kind]} above 0, found {self.target!r}")
        if not all(math.isfinite(w) for w in self.exponents):
            raise ValueError(f"exponents: expected finite numbers, found {self.exponents!r}")
        if self.kind == "latency" and self.measure is None:
            raise ValueError("target latency: expected a function that measures it")

    def costs(self, arch: Arch) -> dict[str, float]:
        """MACs and parameters, and what the target counts."""
        c = cost(arch, self.classes, self.channels)
        out: dict[str, float] = {"macs": c.macs, "params": c.params}
        if self.kind == "memory":
            out["memory"] = c.memory.inference
        elif self.measure is not None and self.kind == "latency":
            out["latency"] = self.measure(arch)
        return out

    def value(self, score: float, costs: dict[str, float]) -> float:
        """The reward."""
        return reward(score, costs[self.kind], self.target, self.exponents)
