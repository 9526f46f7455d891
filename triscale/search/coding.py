"""How a point is written in a study: as parameters, one a decision or one a group of decisions.

A storage writes each parameter on its own, so that fewer of them cost less; samplers that model each parameter, as Optuna's TPE
does, need one a decision. A study has one form; the samplers that take it can share the study.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any

from triscale.search.space import FIELDS, Point, Space

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

MOST = 1 << 53  # a storage keeps numbers as doubles


@dataclass(frozen=True)
class Coding:
    """names, sizes: of the decisions. group: decisions a parameter: 1, or all of a block in one whole number of mixed radix."""

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    group: int = 1

    def __post_init__(self) -> None:
        if len(self.names) != len(self.sizes) or self.group < 1:
            raise ValueError(f"Coding: expected as many names as sizes and a group from 1, found {len(self.names)}, {len(self.sizes)}, {self.group}")
        if any(prod(part) > MOST for part in self._parts(self.sizes, self.group)):
            raise ValueError(f"Coding: {self.group} decisions a parameter have more than 2^53 values, which a storage would round; take fewer")

    @staticmethod
    def of(space: Space, group: int = 1) -> Coding:
        return Coding(space.decisions, space.sizes, group)

    @staticmethod
    def by_block(space: Space) -> Coding:
        return Coding(space.decisions, space.sizes, len(FIELDS))

    @cached_property
    def distributions(self) -> dict[str, BaseDistribution]:
        """Optuna's description of the parameters: categories by number for single decisions, whole numbers for groups."""
        from optuna.distributions import CategoricalDistribution, IntDistribution

        if self.group == 1:
            return {name: CategoricalDistribution(tuple(range(size))) for name, size in zip(self.names, self.sizes, strict=True)}
        return {self._name(i): IntDistribution(0, prod(part) - 1) for i, part in enumerate(self._parts(self.sizes, self.group))}

    def params(self, point: Sequence[int]) -> dict[str, int]:
        """The parameters that say this point."""
        if self.group == 1:
            return dict(zip(self.names, point, strict=True))
        out = {}
        for i, (part, sizes) in enumerate(zip(self._parts(point, self.group), self._parts(self.sizes, self.group), strict=True)):
            value = 0
            for index, size in zip(part, sizes, strict=True):
                value = value * size + index
            out[self._name(i)] = value
        return out

    def point(self, params: Mapping[str, Any]) -> Point | None:
        """The point that parameters say, whatever their grouping; None where they are no point of these decisions."""
        if not params:
            return None
        if all(name in params for name in self.names):
            return tuple(int(params[name]) for name in self.names)
        group = next((int(name.split()[1]) for name in params if name.startswith("group")), 0)
        if not group:
            return None
        point: list[int] = []
        for i, sizes in enumerate(self._parts(self.sizes, group)):
            value = params.get(f"group {group} part {i + 1}")
            if value is None:
                return None
            digits = []
            for size in reversed(sizes):
                value, digit = divmod(int(value), size)
                digits.append(digit)
            point += reversed(digits)
        return tuple(point)

    def _name(self, part: int) -> str:
        return f"group {self.group} part {part + 1}"

    @staticmethod
    def _parts(values: Sequence[int], group: int) -> list[tuple[int, ...]]:
        return [tuple(values[i : i + group]) for i in range(0, len(values), group)]
