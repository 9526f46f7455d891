"""Scaling as a pure function: Arch -> Arch.

Source: Tan & Le 2019, eq. 3 (compound scaling) and the rounding rules of the official utils.py.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from triscale.architecture import MAX_CHANNELS, Arch, Numerics, Stage

ALPHA, BETA, GAMMA = 1.2, 1.1, 1.15  # depth, width, resolution: the paper's grid search on B0, section 4
MIN_RESOLUTION = 32  # the smallest input that a stride-32 network maps to one position
MIN_CHANNELS = 8


class ScalingError(ValueError):
    """Multipliers that are no scaling: zero, negative or not finite."""


@dataclass(frozen=True)
class Scaling:
    """Multipliers of depth, width and resolution; `phi` is kept where they come from `compound`."""

    depth: float = 1.0
    width: float = 1.0
    resolution: float = 1.0
    phi: float | None = None

    def __post_init__(self) -> None:
        for name in ("depth", "width", "resolution"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
                raise ScalingError(f"Scaling.{name}: expected a number above 0, found {value!r}")


@dataclass(frozen=True)
class Coefficients:
    """alpha (depth), beta (width), gamma (resolution), each >= 1: cost grows by alpha x beta^2 x gamma^2 per phi."""

    alpha: float = ALPHA
    beta: float = BETA
    gamma: float = GAMMA

    def __post_init__(self) -> None:
        for name in ("alpha", "beta", "gamma"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not math.isfinite(value) or value < 1:
                raise ScalingError(f"Coefficients.{name}: expected a number >= 1, found {value!r}")

    @property
    def growth(self) -> float:
        return self.alpha * self.beta**2 * self.gamma**2

    def to_json(self, found: Mapping[str, Any] | None = None) -> str:
        """One JSON object with `"format": 1`. found: where they come from, for whoever reads the file."""
        data = {"format": 1, "alpha": self.alpha, "beta": self.beta, "gamma": self.gamma}
        return json.dumps({**data, "found": dict(found)} if found else data, indent=1)

    @staticmethod
    def from_json(text: str) -> Coefficients:
        """What `to_json` wrote. Raises ScalingError that names what is wrong."""
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ScalingError(f"not a coefficients file: no JSON ({error})") from None
        names = ("alpha", "beta", "gamma")
        if not isinstance(data, dict) or data.get("format") != 1 or not set(data) >= set(names):
            raise ScalingError('not a coefficients file: expected a JSON object with "format": 1, alpha, beta and gamma')
        if extra := set(data) - {"format", "found", *names}:
            raise ScalingError(f"not a coefficients file: unknown field {sorted(extra)[0]!r}")
        return Coefficients(*(data[name] for name in names))


def compound(phi: float, alpha: float = ALPHA, beta: float = BETA, gamma: float = GAMMA) -> Scaling:
    """depth alpha^phi, width beta^phi, resolution gamma^phi (paper, eq. 3). phi may be negative or a fraction."""
    Coefficients(alpha, beta, gamma)
    if not isinstance(phi, (int, float)) or not math.isfinite(phi) or abs(phi) > 100:
        raise ScalingError(f"phi: expected a number from -100 to 100, found {phi!r}")
    return Scaling(alpha**phi, beta**phi, gamma**phi, phi)


def round_channels(channels: int, width: float, numerics: Numerics | None = None) -> int:
    """channels x width to a multiple of the divisor, at least one divisor, up once more if below round_limit x the wish.

    At width 1 the channels stay as they are, multiple or not. Source: official utils.py, `round_filters`.
    """
    if width == 1:
        return channels
    numerics = numerics or Numerics()
    divisor, wish = numerics.divisor, channels * width
    rounded = max(divisor, int(wish + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < numerics.round_limit * wish else rounded


def round_layers(layers: int, depth: float) -> int:
    """ceil(depth x layers), at least 1. The product is taken to 9 digits, so that 2.2 x 25 is 55 and not 56."""
    return max(1, math.ceil(round(depth * layers, 9)))


def round_resolution(resolution: int, factor: float) -> int:
    """To the nearest even number, not below 32 (or the resolution itself where that is already smaller)."""
    if factor == 1:
        return resolution
    return max(min(MIN_RESOLUTION, resolution), 2 * int(resolution * factor / 2 + 0.5))


def scale(arch: Arch, scaling: Scaling | None = None, *, depth: float = 1, width: float = 1, resolution: float = 1) -> Arch:
    """`arch` with its depth, width and resolution multiplied, then rounded by its family's rules.

    Stem and head follow the width as their own fields say. Floors: one layer a stage, one divisor of channels, 32 px.
    Where the scaling comes from `compound(phi)` and the network has dropout, 0.3 x clamp(phi, 0, 7) / 7 is added to it
    (the paper goes linearly from 0.2 at B0 to 0.5 at B7). Scaling twice is not scaling by the product: each rounds.
    Raises ScalingError for a multiplier that is not above 0.
    """
    if not isinstance(arch, Arch) or not isinstance(scaling, Scaling | None):
        found = f"{type(arch).__name__} and {type(scaling).__name__}"
        raise ScalingError(f"scale: expected an Arch and a Scaling (compound(phi) makes one), found {found}")
    s = scaling or Scaling(depth, width, resolution)
    if scaling and (depth, width, resolution) != (1, 1, 1):
        raise ScalingError("scale: give either a Scaling or depth, width, resolution, not both")

    def widen(channels: int) -> int:
        return round_channels(channels, s.width, arch.numerics)

    def stage(old: Stage) -> Stage:
        layers = old.layers if old.fixed_depth else round_layers(old.layers, s.depth)
        return replace(old, channels=widen(old.channels), layers=layers)

    stem, head = arch.stem, arch.head
    if stem.scale != "fixed":
        most = stem.channels if stem.scale == "at_most" else MAX_CHANNELS
        stem = replace(stem, channels=min(most, widen(stem.channels)))
    if head.channels and head.scale != "fixed":
        least = head.channels if head.scale == "at_least" else 0
        head = replace(head, channels=max(least, widen(head.channels)))
    extra = 0.3 * min(max(s.phi or 0.0, 0.0), 7.0) / 7 if arch.dropout else 0.0
    return replace(
        arch,
        stem=stem,
        stages=tuple(stage(old) for old in arch.stages),
        head=head,
        resolution=round_resolution(arch.resolution, s.resolution),
        dropout=min(arch.dropout + extra, 0.999),
        name=_label(arch.name, s),
    )


def _label(name: str, s: Scaling) -> str:
    if s.phi is not None:
        return f"{name} phi={s.phi:g}".strip()
    parts = [f"{key}={v:g}" for key, v in (("d", s.depth), ("w", s.width), ("r", s.resolution)) if v != 1]
    return " ".join([name, *parts]).strip()


def fit_input(arch: Arch, resolution: int, smallest_map: int = 4) -> Arch:
    """`arch` for images of `resolution` pixels: strides are taken out, first ones first, until the last map has `smallest_map`.

    The usual change for small images: the stem's stride goes first (and a stem larger than 3x3 becomes 3x3), then its
    pool, then the strides of the stages in order. An arch whose last map is large enough keeps all of them.
    """
    if resolution < 1 or smallest_map < 1:
        raise ScalingError(f"fit_input: expected resolution and smallest_map from 1, found {resolution} and {smallest_map}")

    def last_map(stem_stride: int, pool: bool, strides: list[int]) -> int:
        size = -(-resolution // stem_stride)
        for stride in [2 if pool else 1, *strides]:
            size = -(-size // stride)
        return size

    stem, strides = arch.stem, [s.stride for s in arch.stages]
    if last_map(stem.stride, stem.pool, strides) < smallest_map and stem.stride > 1:
        stem = replace(stem, stride=1, kernel=min(stem.kernel, 3))
    if last_map(stem.stride, stem.pool, strides) < smallest_map and stem.pool:
        stem = replace(stem, pool=False)
    for i, stride in enumerate(strides):
        if stride > 1 and last_map(stem.stride, stem.pool, strides) < smallest_map:
            strides[i] = 1
    stages = tuple(replace(s, stride=stride) for s, stride in zip(arch.stages, strides, strict=True))
    return replace(arch, stem=stem, stages=stages, resolution=resolution)
