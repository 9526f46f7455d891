"""The space of MnasNet (arXiv 1807.11626, section 4) around any reference network: what may vary, block by block, as data.

A network of the space is a point: one index per decision, six decisions a block. `decode` makes an `Arch` of it, `encode` goes
back. Stem, head, strides, input size and numerics are the reference's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from math import prod
from random import Random
from typing import Any

from triscale.architecture import Arch, BlockKind, Skip, Stage
from triscale.scaling import round_channels

Point = tuple[int, ...]


class SpaceError(ValueError):
    """A network or point that the space doesn't have. The message names the block and the decision."""


@dataclass(frozen=True)
class Op:
    """A convolution operator: a block kind with its expansion."""

    name: str
    block: BlockKind
    expand: float


# The paper's regular convolution, depthwise separable convolution and mobile inverted bottleneck with expansion 3 or 6. The
# second is a bottleneck without expansion, hence with a linear 1x1, as the paper's own networks and code have it.
OPS = (Op("conv", "conv", 1.0), Op("sepconv", "mbconv", 1.0), Op("mbconv3", "mbconv", 3.0), Op("mbconv6", "mbconv", 6.0))
KERNELS = (3, 5)
SQUEEZES = (0.0, 0.25)
SKIPS: tuple[Skip, ...] = ("pool", "identity", "none")
FILTERS = (0.75, 1.0, 1.25)  # times the reference's channels
LAYERS = (-1, 0, 1)  # beside the reference's

FIELDS = ("op", "kernel", "squeeze", "skip", "channels", "layers")


@dataclass(frozen=True)
class Choices:
    """What one block may be."""

    ops: tuple[Op, ...]
    kernels: tuple[int, ...]
    squeezes: tuple[float, ...]
    skips: tuple[Skip, ...]
    channels: tuple[int, ...]
    layers: tuple[int, ...]

    @cached_property
    def table(self) -> tuple[tuple[Any, ...], ...]:
        """The choices of each decision, in the order of FIELDS."""
        return self.ops, self.kernels, self.squeezes, self.skips, self.channels, self.layers


@dataclass(frozen=True)
class Space:
    """Networks that differ from `reference` in the decisions of each block."""

    reference: Arch
    blocks: tuple[Choices, ...]

    def __post_init__(self) -> None:
        if len(self.blocks) != len(self.reference.stages):
            raise SpaceError(f"Space: expected choices for {len(self.reference.stages)} blocks, found {len(self.blocks)}")
        for i, choices in enumerate(self.blocks, 1):
            for field, values in zip(FIELDS, choices.table, strict=True):
                if not values or len(set(values)) != len(values):
                    raise SpaceError(f"block {i}, {field}: expected one or more different choices, found {values!r}")

    @cached_property
    def decisions(self) -> tuple[str, ...]:
        """Their names, "block 3 kernel": six a block."""
        return tuple(f"block {i} {field}" for i in range(1, len(self.blocks) + 1) for field in FIELDS)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """The number of choices of each decision."""
        return tuple(len(values) for choices in self.blocks for values in choices.table)

    @property
    def size(self) -> int:
        """How many points there are. Networks are fewer: where strides and channels leave a skip no choice, its values do the same."""
        return prod(self.sizes)

    def choices(self, decision: int) -> tuple[Any, ...]:
        """What the decision of this number, from 0, chooses from."""
        return self.blocks[decision // len(FIELDS)].table[decision % len(FIELDS)]

    def labels(self, point: Sequence[int]) -> dict[str, str]:
        """The decisions of a point in words: {"block 1 op": "sepconv", ...}."""
        point = self.check(point)
        values = (self.choices(i)[index] for i, index in enumerate(point))
        return {
            name: v.name if isinstance(v, Op) else f"{v:g}" if isinstance(v, float) else str(v)
            for name, v in zip(self.decisions, values, strict=True)
        }

    def check(self, point: Sequence[int]) -> Point:
        """The point as a tuple. Raises SpaceError where it isn't in the space."""
        point = tuple(point)
        if len(point) != len(self.sizes):
            raise SpaceError(f"point: expected {len(self.sizes)} decisions, found {len(point)}")
        for name, index, size in zip(self.decisions, point, self.sizes, strict=True):
            if type(index) is not int or not 0 <= index < size:
                raise SpaceError(f"point: {name}: expected 0 to {size - 1}, found {index!r}")
        return point

    def decode(self, point: Sequence[int]) -> Arch:
        """The network at a point. Raises SpaceError where it isn't in the space."""
        point, stages = self.check(point), []
        for i, (choices, old) in enumerate(zip(self.blocks, self.reference.stages, strict=True)):
            picks = point[len(FIELDS) * i : len(FIELDS) * (i + 1)]
            op, kernel, squeeze, skip, channels, layers = (values[k] for values, k in zip(choices.table, picks, strict=True))
            stages.append(Stage(op.block, kernel, old.stride, op.expand, squeeze, skip, channels, layers, old.fixed_depth))
        return replace(self.reference, stages=tuple(stages), name=f"{self.reference.name}-{_tag(point)}")

    def encode(self, arch: Arch) -> Point:
        """The point of a network, by its topology: `decode(encode(arch))` has the same. Raises SpaceError that tells what differs."""
        found = self.differences(arch)
        if found:
            raise SpaceError(f"{arch.name or 'network'}: not in the space around {self.reference.name}: {'; '.join(found)}")
        return tuple(values.index(value) for choices, s in zip(self.blocks, arch.stages, strict=True) for values, value in _picked(choices, s))

    def differences(self, arch: Arch) -> list[str]:
        """What keeps a network out of the space, in words; [] for one that is in it. Numerics and dropout don't count."""
        ref = self.reference
        if len(arch.stages) != len(ref.stages):
            return [f"{len(arch.stages)} blocks instead of {len(ref.stages)}"]
        parts = (("stem", arch.stem, ref.stem), ("head", arch.head, ref.head), ("resolution", arch.resolution, ref.resolution))
        out = [f"{name} {found} instead of {wanted}" for name, found, wanted in parts if found != wanted]
        for i, (choices, s, old) in enumerate(zip(self.blocks, arch.stages, ref.stages, strict=True), 1):
            for field in ("stride", "fixed_depth"):
                if getattr(s, field) != getattr(old, field):
                    out.append(f"block {i}: {field} {getattr(s, field)} instead of {getattr(old, field)}")
            for field, (values, value) in zip(FIELDS, _picked(choices, s), strict=True):
                if value not in values:
                    known = ", ".join(str(getattr(v, "name", v)) for v in values)
                    out.append(f"block {i}: {field} {getattr(value, 'name', value)} instead of one of {known}")
        return out

    def random(self, rng: Random) -> Point:
        """A point with every decision drawn evenly."""
        return tuple(rng.randrange(size) for size in self.sizes)

    def mutate(self, point: Sequence[int], rng: Random) -> Point:
        """The point with one decision, drawn evenly among those that have a choice, changed to another value."""
        return mutate(self.check(point), self.sizes, rng)

    def identity(self) -> dict[str, Any]:
        """What tells spaces apart, for a file: the reference's topology and numerics and all choices."""
        return {
            "reference": self.reference.to_json(),
            "blocks": [[[asdict(v) if isinstance(v, Op) else v for v in values] for values in choices.table] for choices in self.blocks],
        }


def mutate(point: Point, sizes: Sequence[int], rng: Random) -> Point:
    """`point` with one decision changed to another of its choices."""
    open_ = [i for i, size in enumerate(sizes) if size > 1]
    if not open_:
        raise SpaceError("mutate: the space has one point only")
    i = rng.choice(open_)
    value = rng.randrange(sizes[i] - 1)
    return (*point[:i], value + (value >= point[i]), *point[i + 1 :])


def mnasnet_space(
    reference: Arch,
    *,
    ops: Sequence[Op] = OPS,
    kernels: Sequence[int] = KERNELS,
    squeezes: Sequence[float] = SQUEEZES,
    skips: Sequence[Skip] = SKIPS,
    filters: Sequence[float] = FILTERS,
    layers: Sequence[int] = LAYERS,
) -> Space:
    """The space of the paper around `reference` (there: MobileNetV2).

    filters multiply the reference's channels, rounded by its own rule; layers are added to its own, at least one stays. Choices
    that round to the same value are one choice, so that no two points are one network by rounding.
    """
    blocks = []
    for s in reference.stages:
        channels = _unique(round_channels(s.channels, f, reference.numerics) for f in filters)
        depths = _unique(max(1, s.layers + n) for n in layers)
        blocks.append(Choices(tuple(ops), tuple(kernels), tuple(squeezes), tuple(skips), channels, depths))
    return Space(reference, tuple(blocks))


def plain(arch: Arch) -> Arch:
    """The same network with each stage's skip as plain as it can be said: where strides and channels leave it no choice, several
    values do the same, and networks that differ in them alone compute the same from the same weights."""
    stages = list(arch.stages)
    for i, stage in enumerate(stages):
        for skip in ("none", "identity"):
            simpler = replace(arch, stages=(*stages[:i], replace(stage, skip=skip), *stages[i + 1 :]))
            if skip != stage.skip and _shortcuts(simpler, i) == _shortcuts(arch, i):
                stages[i] = replace(stage, skip=skip)
                break
            if skip == stage.skip:
                break
    return replace(arch, stages=tuple(stages))


def _shortcuts(arch: Arch, stage: int) -> list[str]:
    return [block.shortcut for block in arch.blocks() if block.stage_index == stage]


def _picked(choices: Choices, s: Stage) -> list[tuple[tuple[Any, ...], Any]]:
    """For each decision what there is to choose from and what the stage has."""
    op = next((op for op in choices.ops if (op.block, op.expand) == (s.block, s.expand)), f"{s.block} x{s.expand:g}")
    return list(zip(choices.table, (op, s.kernel, s.squeeze, s.skip, s.channels, s.layers), strict=True))


def _unique(values: Iterable[int]) -> tuple[int, ...]:
    return tuple(sorted(set(values)))


def _tag(point: Point) -> str:
    """A short name for a point, the same everywhere."""
    return hashlib.sha256(repr(point).encode()).hexdigest()[:8]
