"""A detector as data: a backbone, a feature pyramid, box heads and anchors; how it scales and what it costs. Nothing that runs.

Sources: RetinaNet, Lin et al. 2017 (arXiv 1708.02002); FPN, arXiv 1612.03144; the defaults are those of mmdetection's
`retinanet_effb3_fpn_crop896_8x4_1x_coco`, whose head is NAS-FPN's RetinaSepBN.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Literal, NamedTuple

from triscale.architecture import FORMAT, MAX_CHANNELS, Arch, ArchError, Head, _flag, _one_of, _part, _real, _refuse, _whole
from triscale.cost_model import cost
from triscale.families import arch as named
from triscale.families import names
from triscale.naming import unknown
from triscale.scaling import Scaling, round_channels, scale
from triscale.text import aligned

Extra = Literal["backbone", "pyramid"]


@dataclass(frozen=True)
class Pyramid:
    """Levels of one width at strides 2^first ... 2^last. Lateral 1x1 convolutions with biases on the backbone's maps; the coarser sum,
    doubled by nearest neighbour, is added; a 3x3 convolution each. What lies above the backbone's last map are stride-2 3x3
    convolutions: the first on `extra`, the backbone's last map or the pyramid's, each other on the ReLU of the one before.

    norm: batch norm instead of a bias, in all but the laterals.
    """

    channels: int = 256
    first: int = 3
    last: int = 7
    extra: Extra = "backbone"
    norm: bool = True

    def __post_init__(self) -> None:
        _whole(self, "channels", 1, MAX_CHANNELS)
        _whole(self, "first", 2, 5)
        _whole(self, "last", 5, 9)
        _one_of(self, "extra", Extra)
        _flag(self, "norm")

    @property
    def strides(self) -> tuple[int, ...]:
        return tuple(2**level for level in range(self.first, self.last + 1))


@dataclass(frozen=True)
class BoxHead:
    """Two towers of `convs` 3x3 convolutions with ReLU, one for classes and one for boxes, shared by all levels, each ended by a 3x3
    convolution with a bias.

    norm: batch norms in the towers, of each level its own, instead of biases. prior: the probability that every class begins with.
    """

    convs: int = 4
    channels: int = 256
    norm: bool = True
    prior: float = 0.01

    def __post_init__(self) -> None:
        _whole(self, "convs", 0, 64)
        _whole(self, "channels", 1, MAX_CHANNELS)
        _flag(self, "norm")
        _real(self, "prior", 0, 0.5, above=True)


@dataclass(frozen=True)
class Anchors:
    """At each place (i, j) of a level of stride s boxes centred on (j s, i s), as mmdetection and torchvision have it: of area
    (scale x s x 2^(k/octaves))^2 for k = 0 ... octaves - 1, and height over width in `ratios`.

    rounded: sizes cut and corners rounded to whole pixels, as torchvision has it.
    """

    scale: float = 4.0
    octaves: int = 3
    ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    rounded: bool = False

    def __post_init__(self) -> None:
        _real(self, "scale", 0, 1024, above=True)
        _whole(self, "octaves", 1, 64)
        if not isinstance(self.ratios, (tuple, list)) or not self.ratios or not all(type(r) in (int, float) and 0 < r < 1e3 for r in self.ratios):
            raise _refuse(self, "ratios", "one or more numbers above 0")
        object.__setattr__(self, "ratios", tuple(map(float, self.ratios)))
        _flag(self, "rounded")

    @property
    def each(self) -> int:
        """Anchors a place."""
        return self.octaves * len(self.ratios)


@dataclass(frozen=True)
class DetectorArch:
    """A whole detector for squares of backbone.resolution pixels. `name` is a label. The backbone's head takes no part."""

    backbone: Arch
    pyramid: Pyramid = field(default_factory=Pyramid)
    head: BoxHead = field(default_factory=BoxHead)
    anchors: Anchors = field(default_factory=Anchors)
    name: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        for part, kind in (("backbone", Arch), ("pyramid", Pyramid), ("head", BoxHead), ("anchors", Anchors)):
            if not isinstance(getattr(self, part), kind):
                raise _refuse(self, part, f"a {kind.__name__}")
        missing = [stride for stride in self.pyramid.strides if stride <= 32 and stride not in self.taps]
        if missing:
            there = ", ".join(map(str, self.taps))
            raise ArchError(f"DetectorArch.backbone: expected maps at strides {', '.join(map(str, missing))}, found those at {there}")

    @property
    def trunk(self) -> Arch:
        """The backbone without what comes after its last stage."""
        return replace(self.backbone, head=Head(0))

    @property
    def taps(self) -> dict[int, int]:
        """Stride -> channels of the deepest map of that stride, as `ConvNet.stages` gives them."""
        stride = self.backbone.stem.stride * (2 if self.backbone.stem.pool else 1)
        out = {}
        for stage in self.backbone.stages:
            stride *= stage.stride
            out[stride] = stage.channels
        return out

    @property
    def laterals(self) -> tuple[tuple[int, int], ...]:
        """(stride, channels) of the backbone's maps that the pyramid takes."""
        return tuple((stride, self.taps[stride]) for stride in self.pyramid.strides if stride <= 32)

    def to_json(self) -> str:
        """One JSON object with `"format": 1`; `from_json` gives back an equal DetectorArch."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1)

    @staticmethod
    def from_json(text: str) -> DetectorArch:
        """What `to_json` wrote. Raises ArchError that names what is wrong, and where."""
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ArchError(f"not a detector file: no JSON ({error})") from None
        if not isinstance(data, dict) or data.pop("format", None) != FORMAT or not isinstance(data.get("backbone"), dict):
            raise ArchError(f'not a detector file: expected a JSON object with "format": {FORMAT} and a backbone')
        data["backbone"] = Arch.from_json(json.dumps({"format": FORMAT, **data["backbone"]}))
        for key, kind in (("pyramid", Pyramid), ("head", BoxHead), ("anchors", Anchors)):
            if key in data:
                data[key] = _part(kind, data[key], key)
        return _part(DetectorArch, data, "detector")


def is_detector(text: str) -> bool:
    """Whether a JSON text is meant as a detector and not as a network."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(data, dict) and "backbone" in data


class Part(NamedTuple):
    """One row of a detector's cost: parameters, multiply-adds and output elements of convolutions, for one image."""

    name: str
    params: int
    macs: int
    activations: int


class DetectorCost(NamedTuple):
    params: int
    macs: int
    activations: int
    parts: tuple[Part, ...]


def retinanet(backbone: str | Arch, resolution: int = 896) -> DetectorArch:
    """`retinanet_effb3_fpn_crop896_8x4_1x_coco` with this backbone: a name or an Arch, whose input size then is `resolution`."""
    arch = named(backbone) if isinstance(backbone, str) else backbone
    return DetectorArch(replace(arch, resolution=resolution), name=f"retinanet_{arch.name}_fpn")


def detector_names() -> tuple[str, ...]:
    """Every name that `detector` knows: retinanet_BACKBONE_fpn with any network's name."""
    return tuple(f"retinanet_{name}_fpn" for name in names())


def detector(name: str, resolution: int = 896) -> DetectorArch:
    """The named detector. Raises UnknownNameError with the nearest."""
    if name not in detector_names():
        raise unknown("detector", name, detector_names())
    return retinanet(name.removeprefix("retinanet_").removesuffix("_fpn"), resolution)


def detector_table(d: DetectorArch, num_classes: int = 80) -> str:
    """What it is made of, and its parts with their parameters and multiply-adds for one image."""
    c, p, a = detector_cost(d, num_classes), d.pyramid, d.anchors
    rows = [(part.name, f"{part.params:,}", f"{part.macs:,}") for part in c.parts]
    title = f"{d.name or 'detector'}: {d.backbone.resolution} px, {num_classes} classes; MACs are multiply-adds, without the choice of boxes"
    made = f"{d.backbone.name or 'backbone'}; pyramid of {p.channels} channels at strides {', '.join(map(str, p.strides))}; towers of "
    made += f"{d.head.convs} x {d.head.channels}; {a.each} anchors a place, {a.scale:g} strides wide"
    return f"{title}\n{made}\n{aligned(('Part', 'Params', 'MACs'), [*rows, ('total', f'{c.params:,}', f'{c.macs:,}')], total=True)}"


def scaled_table(before: DetectorArch, after: DetectorArch, num_classes: int = 80) -> str:
    """The parts of a detector before and after `scale_detector`. Raises ValueError for two of unlike parts."""
    one, two = detector_cost(before, num_classes), detector_cost(after, num_classes)
    if [part.name for part in one.parts] != [part.name for part in two.parts]:
        raise ValueError("scaled_table: expected a detector and what scale_detector made of it, found two of unlike parts")
    total = [Part("total", c.params, c.macs, c.activations) for c in (one, two)]
    pairs = zip((*one.parts, total[0]), (*two.parts, total[1]), strict=True)
    rows = [(x.name, f"{x.params:,}", f"{y.params:,}", f"{x.macs:,}", f"{y.macs:,}", f"{y.macs / x.macs:.2f}") for x, y in pairs]
    changes = (
        ("px", before.backbone.resolution, after.backbone.resolution),
        ("pyramid", before.pyramid.channels, after.pyramid.channels),
        ("heads", before.head.channels, after.head.channels),
        ("backbone's layers", *(sum(s.layers for s in d.backbone.stages) for d in (before, after))),
    )
    title = f"{after.name or 'detector'}, {num_classes} classes: {', '.join(f'{name} {x} -> {y}' for name, x, y in changes)}"
    return f"{title}\n{aligned(('Part', 'Params', 'scaled', 'MACs', 'scaled', 'times'), rows, total=True)}"


def scale_detector(detector: DetectorArch, scaling: Scaling) -> DetectorArch:
    """Backbone and input size by `scale`; the pyramid's and the heads' width by the same width multiplier, rounded as the backbone's.

    A scaled input size is a multiple of the coarsest map's stride that the pyramid takes from the backbone (32), so that each coarser
    map is exactly half as large as the finer one that it is added to: the nearest multiple, but not below the size before where it
    grows, nor above where it shrinks.
    """
    backbone, numerics = scale(detector.backbone, scaling), detector.backbone.numerics
    if scaling.resolution != 1:
        step, before = detector.laterals[-1][0], detector.backbone.resolution
        steps = int(before * scaling.resolution / step + 0.5)
        steps = max(steps, -(-before // step)) if scaling.resolution > 1 else min(steps, before // step)
        backbone = replace(backbone, resolution=step * max(1, steps))
    pyramid = replace(detector.pyramid, channels=round_channels(detector.pyramid.channels, scaling.width, numerics))
    head = replace(detector.head, channels=round_channels(detector.head.channels, scaling.width, numerics))
    label = f"phi={scaling.phi:g}" if scaling.phi is not None else "scaled"
    return replace(detector, backbone=backbone, pyramid=pyramid, head=head, name=f"{detector.name} {label}".strip())


def detector_cost(detector: DetectorArch, num_classes: int, resolution: int | tuple[int, int] | None = None) -> DetectorCost:
    """What one forward pass costs on (height, width), the backbone's own resolution unless given, before any box is chosen.

    Counted as cost_model counts. Raises ValueError for less than one class.
    """
    if num_classes < 1:
        raise ValueError(f"detector_cost: expected num_classes >= 1, found {num_classes}")
    size = (resolution, resolution) if isinstance(resolution, int) else resolution or (detector.backbone.resolution,) * 2
    trunk = cost(detector.trunk, 0, resolution=size)
    places = [-(-size[0] // s) * -(-size[1] // s) for s in detector.pyramid.strides]
    parts = [
        Part("backbone", trunk.params, trunk.macs, trunk.activations),
        *_pyramid_parts(detector, places),
        *_head_parts(detector, num_classes, places),
    ]
    return DetectorCost(sum(p.params for p in parts), sum(p.macs for p in parts), sum(p.activations for p in parts), tuple(parts))


def _conv(name: str, cin: int, cout: int, kernel: int, places: int, norm: bool) -> Part:
    weights = cin * cout * kernel * kernel
    return Part(name, weights + (2 if norm else 1) * cout, weights * places, cout * places)


def _pyramid_parts(detector: DetectorArch, places: list[int]) -> Iterator[Part]:
    p, laterals = detector.pyramid, detector.laterals
    for (stride, channels), n in zip(laterals, places, strict=False):
        yield _conv(f"lateral, stride {stride}", channels, p.channels, 1, n, False)
    for i, (stride, n) in enumerate(zip(p.strides, places, strict=True)):
        first_extra = i == len(laterals)
        cin = laterals[-1][1] if first_extra and p.extra == "backbone" else p.channels
        yield _conv(f"pyramid, stride {stride}", cin, p.channels, 3, n, p.norm)


def _head_parts(detector: DetectorArch, num_classes: int, places: list[int]) -> Iterator[Part]:
    h, levels, each = detector.head, len(places), detector.anchors.each
    for name, outputs in (("classes", each * num_classes), ("boxes", each * 4)):
        cin = detector.pyramid.channels
        for i in range(h.convs):
            part = _conv(f"{name}, convolution {i + 1}", cin, h.channels, 3, sum(places), False)
            norms = 2 * h.channels * levels - h.channels if h.norm else 0  # a norm a level instead of the bias
            yield part._replace(params=part.params + norms)
            cin = h.channels
        yield _conv(f"{name}, output", cin, outputs, 3, sum(places), False)
