"""A network as data: stem, stages, head, input size and numeric dialect, and nothing that runs.

`Arch` is frozen, hashable and compared by value. It validates itself when it is made, prints as Table 1 of the
EfficientNet paper, and round-trips through JSON. Everything else in the project reads it.

Source: Tan & Le, ICML 2019 (arXiv 1905.11946), section 4 and Table 1.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Literal, get_args

from triscale.naming import unknown

FORMAT = 1

BlockKind = Literal["conv", "separable", "mbconv", "fused_mbconv", "basic", "bottleneck"]
Skip = Literal["identity", "pool", "none"]
Padding = Literal["same", "symmetric"]
Activation = Literal["silu", "relu", "relu6"]
HeadScale = Literal["width", "fixed", "at_least"]
StemScale = Literal["width", "fixed", "at_most"]
DropPathRule = Literal["i/n", "i/(n-1)"]
RunningVariance = Literal["biased", "unbiased"]
Shortcut = Literal["none", "identity", "projection", "pool"]

# Bounds for untrusted JSON: far above any published network, low enough that no cost or loop runs away.
MAX_CHANNELS, MAX_LAYERS, MAX_STAGES, MAX_RESOLUTION, MAX_KERNEL = 1 << 20, 4096, 64, 1 << 16, 63


class ArchError(ValueError):
    """A description that is no network. The message names the field, what was expected and what was found."""


def _refuse(owner: object, name: str, expected: str) -> ArchError:
    return ArchError(f"{type(owner).__name__}.{name}: expected {expected}, found {repr(getattr(owner, name))[:80]}")


def _whole(owner: object, name: str, low: int, high: int) -> None:
    value = getattr(owner, name)
    if type(value) is not int or not low <= value <= high:
        raise _refuse(owner, name, f"a whole number from {low} to {high}")


def _real(owner: object, name: str, low: float, high: float, *, above: bool = False) -> None:
    """`above`: the lower bound itself is refused. Integers are stored as floats, so that 6 and 6.0 are one value."""
    value = getattr(owner, name)
    if type(value) not in (int, float) or not math.isfinite(value) or not low <= value <= high or (above and value == low):
        raise _refuse(owner, name, f"a number {'above' if above else 'from'} {low:g} {'and at most' if above else 'to'} {high:g}")
    object.__setattr__(owner, name, float(value))


def _one_of(owner: object, name: str, allowed: Any) -> None:
    value, names = getattr(owner, name), get_args(allowed)
    if value not in names:
        near = f" ({unknown(name, value, names)})" if isinstance(value, str) else ""
        raise _refuse(owner, name, f"one of {', '.join(names)}{near}")


def _flag(owner: object, name: str) -> None:
    if type(getattr(owner, name)) is not bool:
        raise _refuse(owner, name, "true or false")


def _odd_kernel(owner: Stem | Stage) -> None:
    _whole(owner, "kernel", 1, MAX_KERNEL)
    if owner.kernel % 2 == 0:
        raise _refuse(owner, "kernel", "an odd whole number")


@dataclass(frozen=True)
class Stem:
    """The first convolution: `kernel` x `kernel`, then norm and activation, then (`pool`) a 3x3 stride-2 max pool.

    scale: how `scale` treats the channels: with the width; `fixed` (EfficientNet-Lite); `at_most` with the width but never
    above this value (ResNet: the counts of wide ResNets keep 64).
    """

    channels: int = 32
    kernel: int = 3
    stride: int = 2
    pool: bool = False
    scale: StemScale = "width"

    def __post_init__(self) -> None:
        _whole(self, "channels", 1, MAX_CHANNELS)
        _odd_kernel(self)
        _whole(self, "stride", 1, 2)
        _flag(self, "pool")
        _one_of(self, "scale", StemScale)


@dataclass(frozen=True)
class Stage:
    """`layers` blocks of one kind; the first has `stride` and changes the channels, the rest keep both.

    block:
      conv          k x k convolution, norm, activation
      separable     depthwise k x k, norm, activation, 1x1, norm, activation (MobileNetV1)
      mbconv        1x1 expansion (left out at expand 1), depthwise k x k, squeeze-excitation, 1x1 projection
      fused_mbconv  k x k expansion, squeeze-excitation, 1x1 projection; at expand 1 the same as `conv` (EfficientNetV2)
      basic         two k x k convolutions (ResNet-18, -34)
      bottleneck    1x1, k x k with the stride, 1x1 (ResNet-50 and deeper)
    expand: inner channels = int(expand x block input channels); for `bottleneck` int(expand x output channels).
    squeeze: squeezed channels = max(1, int(squeeze x block *input* channels)), not rounded further; 0 leaves
        squeeze-excitation out. Source: official efficientnet_model.py.
    skip: identity joins input and output where stride is 1 and the channels agree (for `basic` and `bottleneck` a 1x1
        projection stands in elsewhere); pool also joins elsewhere, by stride x stride average pooling and zero channels
        added, where the output has no fewer channels than the input; none joins nothing.
    channels: the block's output channels.
    fixed_depth: `scale` leaves `layers` alone (EfficientNet-Lite's first and last stage).
    """

    block: BlockKind
    kernel: int
    stride: int
    expand: float
    squeeze: float
    skip: Skip
    channels: int
    layers: int
    fixed_depth: bool = False

    def __post_init__(self) -> None:
        _one_of(self, "block", BlockKind)
        _odd_kernel(self)
        _whole(self, "stride", 1, 2)
        _real(self, "expand", 0, 64, above=True)
        _real(self, "squeeze", 0, 1)
        _one_of(self, "skip", Skip)
        _whole(self, "channels", 1, MAX_CHANNELS)
        _whole(self, "layers", 1, MAX_LAYERS)
        _flag(self, "fixed_depth")
        if self.squeeze and self.block in ("separable", "basic", "bottleneck"):
            raise _refuse(self, "squeeze", f"0 for block '{self.block}'")

    @property
    def operator(self) -> str:
        """The paper's name for the stage's operator, e.g. `MBConv6, k3x3`."""
        stem = {"conv": "Conv", "separable": "Separable", "basic": "Basic", "bottleneck": "Bottleneck"}
        stem |= {"mbconv": f"MBConv{self.expand:g}", "fused_mbconv": f"Fused-MBConv{self.expand:g}"}
        return f"{stem[self.block]}, k{self.kernel}x{self.kernel}" + (", SE" if self.squeeze else "")


@dataclass(frozen=True)
class Head:
    """A 1x1 convolution with norm and activation (`channels` 0: none), global average pooling, dropout, classifier.

    scale: how `scale` treats the channels: with the width; `fixed` (EfficientNet-Lite); `at_least` with the width but
    never below this value (MobileNetV2).
    """

    channels: int = 1280
    scale: HeadScale = "width"

    def __post_init__(self) -> None:
        _whole(self, "channels", 0, MAX_CHANNELS)
        _one_of(self, "scale", HeadScale)


@dataclass(frozen=True)
class Numerics:
    """The numeric dialect of a family or a checkpoint; the defaults are the official EfficientNet code's.

    padding: `same` is TensorFlow's, from the actual input size (the odd pixel at the bottom and right); `symmetric` is
        (kernel - 1) / 2 on each side. Both give ceil(input / stride).
    norm_momentum: in torch's sense, the weight of the new value (TensorFlow's 0.99 is 0.01).
    running_variance: `biased` stores the batch variance as TensorFlow does, `unbiased` times n / (n - 1) as torch does.
    drop_path: rate of the deepest block; block i of n (from 0) drops with drop_path x i/n, or x i/(n - 1).
    divisor, round_limit: channels are rounded to a multiple of `divisor`, up once more if below round_limit x the wish.
    """

    padding: Padding = "same"
    activation: Activation = "silu"
    norm_eps: float = 1e-3
    norm_momentum: float = 0.01
    running_variance: RunningVariance = "biased"
    drop_path: float = 0.2
    drop_path_rule: DropPathRule = "i/n"
    divisor: int = 8
    round_limit: float = 0.9

    def __post_init__(self) -> None:
        _one_of(self, "padding", Padding)
        _one_of(self, "activation", Activation)
        _real(self, "norm_eps", 0, 1, above=True)
        _real(self, "norm_momentum", 0, 1)
        _one_of(self, "running_variance", RunningVariance)
        _real(self, "drop_path", 0, 0.999)
        _one_of(self, "drop_path_rule", DropPathRule)
        _whole(self, "divisor", 1, 1024)
        _real(self, "round_limit", 0, 1)


@dataclass(frozen=True)
class Block:
    """One block of a network with its place filled in. Derived from `Arch`, never stored."""

    stage: Stage
    stage_index: int
    layer: int
    index: int
    in_channels: int
    stride: int
    drop_path: float

    @cached_property
    def inner(self) -> int:
        """Channels between the block's first and last convolution."""
        s = self.stage
        if s.block == "basic":
            return s.channels
        return max(1, int(s.expand * (s.channels if s.block == "bottleneck" else self.in_channels)))

    @cached_property
    def squeezed(self) -> int:
        """Channels inside squeeze-excitation, 0 where the block has none."""
        return max(1, int(self.stage.squeeze * self.in_channels)) if self.stage.squeeze else 0

    @cached_property
    def shortcut(self) -> Shortcut:
        s = self.stage
        if s.skip == "none":
            return "none"
        if self.stride == 1 and self.in_channels == s.channels:
            return "identity"
        if s.block in ("basic", "bottleneck"):
            return "projection"
        return "pool" if s.skip == "pool" and s.channels >= self.in_channels else "none"


@dataclass(frozen=True)
class Arch:
    """A whole network. `name` is a label: it takes no part in comparison or hash."""

    stem: Stem
    stages: tuple[Stage, ...]
    head: Head
    resolution: int
    dropout: float = 0.2
    numerics: Numerics = field(default_factory=Numerics)
    name: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        for part, kind in (("stem", Stem), ("head", Head), ("numerics", Numerics)):
            if not isinstance(getattr(self, part), kind):
                raise _refuse(self, part, f"a {kind.__name__}")
        if not isinstance(self.stages, (tuple, list)):
            raise _refuse(self, "stages", "a tuple of Stage values")
        object.__setattr__(self, "stages", tuple(self.stages))
        if not 1 <= len(self.stages) <= MAX_STAGES or not all(isinstance(s, Stage) for s in self.stages):
            raise ArchError(f"Arch.stages: expected 1 to {MAX_STAGES} Stage values, found {self.stages!r}"[:300])
        _whole(self, "resolution", 1, MAX_RESOLUTION)
        _real(self, "dropout", 0, 0.999)
        if not isinstance(self.name, str):
            raise _refuse(self, "name", "a text")

    @property
    def topology(self) -> tuple[Stem, tuple[Stage, ...], Head, int]:
        """What is left without dropout and numeric dialect: equal for two dialects of one network."""
        return self.stem, self.stages, self.head, self.resolution

    @property
    def out_channels(self) -> int:
        """Channels that the classifier sees."""
        return self.head.channels or self.stages[-1].channels

    def blocks(self) -> Iterator[Block]:
        """Every block in order, with its input channels, stride and drop-path rate."""
        n = sum(s.layers for s in self.stages)
        last = n if self.numerics.drop_path_rule == "i/n" else max(n - 1, 1)
        channels, index = self.stem.channels, 0
        for stage_index, stage in enumerate(self.stages):
            for layer in range(stage.layers):
                rate = self.numerics.drop_path * index / last
                yield Block(stage, stage_index, layer, index, channels, stage.stride if layer == 0 else 1, rate)
                channels, index = stage.channels, index + 1

    def distinct_blocks(self) -> list[tuple[Block, int]]:
        """Each stage's first block and, where it has more layers, one of the rest with their number: all that costs differ by."""
        out = []
        channels, index, rate = self.stem.channels, 0, self.numerics.drop_path
        for i, stage in enumerate(self.stages):
            out.append((Block(stage, i, 0, index, channels, stage.stride, rate if index else 0.0), 1))
            if stage.layers > 1:
                out.append((Block(stage, i, 1, index + 1, stage.channels, 1, rate), stage.layers - 1))
            channels, index = stage.channels, index + stage.layers
        return out

    def to_json(self) -> str:
        """One JSON object with `"format": 1`; `from_json` gives back an equal Arch."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1)

    @staticmethod
    def from_json(text: str) -> Arch:
        """The Arch that `to_json` wrote. Raises ArchError (a ValueError) that names what is wrong, and where."""
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:  # ValueError: no JSON, no UTF-8, or a number of thousands of digits
            raise ArchError(f"not an architecture file: no JSON ({error})") from None
        version = data.pop("format", None) if isinstance(data, dict) else None
        if type(version) is not int or version != FORMAT:
            raise ArchError(f'not an architecture file: expected a JSON object with "format": {FORMAT}')
        stages = data.get("stages")
        if not isinstance(stages, list):
            raise ArchError(f"Arch.stages: expected a list, found {type(stages).__name__}")
        data["stages"] = tuple(_part(Stage, s, f"stages[{i}]") for i, s in enumerate(stages[: MAX_STAGES + 1]))
        for key, kind in (("stem", Stem), ("head", Head), ("numerics", Numerics)):
            if key in data:
                data[key] = _part(kind, data[key], key)
        return _part(Arch, data, "arch")

    def __str__(self) -> str:
        # The table needs the costs, and the costs need this file: the one import that waits until it is called.
        from triscale.cost_model import table

        return table(self)

    def with_numerics(self, **changes: Any) -> Arch:
        """The same topology in another dialect, e.g. `with_numerics(padding="symmetric", norm_eps=1e-5)`."""
        return replace(self, numerics=replace(self.numerics, **changes))


def _part(kind: Any, data: object, where: str) -> Any:
    """`kind(**data)` with unknown and missing keys refused, and `where` put before every error."""
    if not isinstance(data, Mapping):
        raise ArchError(f"{where}: expected an object, found {type(data).__name__}")
    known = [f.name for f in fields(kind)]
    for key in data:
        if key not in known:
            raise ArchError(f"{where}: {unknown('field', key, known)}")
    try:
        return kind(**data)
    except ArchError as error:
        raise ArchError(f"{where}: {error}") from None
    except TypeError as error:
        raise ArchError(f"{where}: {str(error).split('()')[-1].strip()}") from None
