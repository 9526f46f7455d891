"""What is searched: how a trial's parameters become a network, and what a scored network is worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Protocol

from triscale.architecture import Arch
from triscale.cost_model import cost
from triscale.scaling import Coefficients, compound, scale
from triscale.search.coding import Coding
from triscale.search.reward import Objective
from triscale.search.space import Space, SpaceError

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution


class Problem(Protocol):
    """directions: "maximize" or "minimize", one a value. most: trials that make sense; 0: any number. unique: a network is scored
    once only, and a second trial of it is dropped."""

    @property
    def kind(self) -> Literal["network", "coefficients"]: ...
    @property
    def reference(self) -> Arch: ...
    @property
    def directions(self) -> tuple[str, ...]: ...
    @property
    def most(self) -> int: ...
    @property
    def unique(self) -> bool: ...
    @property
    def distributions(self) -> dict[str, BaseDistribution]: ...
    @property
    def objective(self) -> Objective | None: ...
    def identity(self) -> dict[str, Any]: ...
    def arch(self, params: Mapping[str, Any]) -> Arch: ...
    def choices(self, params: Mapping[str, Any]) -> dict[str, str]: ...
    def costs(self, arch: Arch) -> dict[str, float]: ...
    def values(self, score: float, costs: Mapping[str, float]) -> tuple[float, ...]: ...
    def worth(self, score: float, costs: Mapping[str, float]) -> float: ...
    def first(self) -> dict[str, Any] | None: ...


@dataclass(frozen=True)
class NetworkProblem:
    """A network of a space. objective: None: the score alone counts. pareto: two values, the score to be raised and the cost to be
    lowered, instead of their reward. coding: how points are written."""

    space: Space
    coding: Coding
    objective: Objective | None = None
    pareto: bool = False
    kind: Literal["network"] = "network"
    most: int = 0
    unique: bool = False

    def __post_init__(self) -> None:
        if self.pareto and self.objective is None:
            raise ValueError("a Pareto front: expected an objective, which says what the cost is")

    @property
    def reference(self) -> Arch:
        return self.space.reference

    @property
    def directions(self) -> tuple[str, ...]:
        return ("maximize", "minimize") if self.pareto else ("maximize",)

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        return self.coding.distributions

    def identity(self) -> dict[str, Any]:
        o = self.objective
        counted = {"cost": o.kind, "target": o.target, "exponents": list(o.exponents), "classes": o.classes, "channels": o.channels} if o else {}
        space = {**self.space.identity(), "decisions a parameter": self.coding.group}  # samplers that need another coding learn nothing from it
        return {"kind": self.kind, "directions": list(self.directions), "space": space, "objective": counted}

    def arch(self, params: Mapping[str, Any]) -> Arch:
        point = self.coding.point(params)
        if point is None:
            raise SpaceError(f"parameters that are no point of the space: {', '.join(sorted(params))[:200]}")
        return self.space.decode(point)

    def choices(self, params: Mapping[str, Any]) -> dict[str, str]:
        point = self.coding.point(params)
        return self.space.labels(point) if point is not None else {}

    def costs(self, arch: Arch) -> dict[str, float]:
        if self.objective is not None:
            return self.objective.costs(arch)
        c = cost(arch)
        return {"macs": c.macs, "params": c.params}

    def values(self, score: float, costs: Mapping[str, float]) -> tuple[float, ...]:
        if self.pareto and self.objective is not None:
            return score, costs[self.objective.kind]
        return (self.worth(score, costs),)

    def worth(self, score: float, costs: Mapping[str, float]) -> float:
        """The reward, by which networks are ranked, also those of a front."""
        return self.objective.value(score, dict(costs)) if self.objective else score

    def first(self) -> dict[str, Any] | None:
        """The reference's own parameters, so that every search knows what it has to beat; None where it isn't in its space."""
        try:
            return self.coding.params(self.space.encode(self.reference))
        except SpaceError:
            return None


@dataclass(frozen=True)
class CoefficientProblem:
    """The triple whose network at phi = 1 scores best. triples: in the order in which they are tried. classes, channels: of the
    networks whose costs are told."""

    reference: Arch
    triples: Sequence[Coefficients]
    classes: int = 1000
    channels: int = 3
    kind: Literal["coefficients"] = "coefficients"
    directions: tuple[str, ...] = ("maximize",)
    unique: bool = True
    objective: None = None

    @property
    def most(self) -> int:
        return len(self.triples)

    @cached_property
    def distributions(self) -> dict[str, BaseDistribution]:
        from optuna.distributions import FloatDistribution

        return {name: FloatDistribution(1.0, max(getattr(c, name) for c in self.triples) + 1) for name in ("alpha", "beta", "gamma")}

    def identity(self) -> dict[str, Any]:
        return {"kind": self.kind, "reference": self.reference.to_json(), "triples": sorted([c.alpha, c.beta, c.gamma] for c in self.triples)}

    def arch(self, params: Mapping[str, Any]) -> Arch:
        c = self.coefficients(params)
        return scale(self.reference, compound(1, c.alpha, c.beta, c.gamma))

    @staticmethod
    def coefficients(params: Mapping[str, Any]) -> Coefficients:
        return Coefficients(*(float(params[name]) for name in ("alpha", "beta", "gamma")))

    def choices(self, params: Mapping[str, Any]) -> dict[str, str]:
        return {name: f"{params[name]:g}" for name in ("alpha", "beta", "gamma") if name in params}

    def costs(self, arch: Arch) -> dict[str, float]:
        c = cost(arch, self.classes, self.channels)
        return {"macs": c.macs, "params": c.params}

    def values(self, score: float, costs: Mapping[str, float]) -> tuple[float, ...]:
        return (score,)

    def worth(self, score: float, costs: Mapping[str, float]) -> float:
        return score

    def first(self) -> dict[str, Any] | None:
        return None
