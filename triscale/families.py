"""The named networks, as rows. `arch(name)` reads them; nothing here is code for one network.

Sources: EfficientNet and Lite, tensorflow/tpu models/official/efficientnet; EfficientNetV2, google/automl and arXiv
2104.00298; MobileNetV1 arXiv 1704.04861, V2 arXiv 1801.04381; MnasNet-A1 arXiv 1807.11626 Figure 7; ResNet arXiv
1512.03385 Table 1, with the stride on the 3x3 convolution as torchvision and timm have it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from triscale.architecture import Arch, Head, Numerics, Stage, Stem
from triscale.naming import unknown
from triscale.scaling import Scaling, scale

OFFICIAL = Numerics()
LITE = Numerics(activation="relu6")
V2_BASE = Numerics(round_limit=0.0)  # V2-B0..B3 round to the nearest multiple, without the 0.9 rule
TORCH = Numerics(padding="symmetric", activation="relu", norm_eps=1e-5, norm_momentum=0.1, running_variance="unbiased", drop_path=0.0)
TORCH_RELU6 = replace(TORCH, activation="relu6")


def _mb(kernel: int, stride: int, expand: float, channels: int, layers: int, squeeze: float = 0.25, **more: Any) -> Stage:
    return Stage("mbconv", kernel, stride, expand, squeeze, "identity", channels, layers, **more)


def _fused(stride: int, expand: float, channels: int, layers: int) -> Stage:
    return Stage("fused_mbconv", 3, stride, expand, 0.0, "identity", channels, layers)


def _res(block: Any, channels: tuple[int, ...], layers: tuple[int, ...]) -> Arch:
    expand = 0.25 if block == "bottleneck" else 1.0
    stages = [Stage(block, 3, min(i, 1) + 1, expand, 0.0, "identity", c, n) for i, (c, n) in enumerate(zip(channels, layers, strict=True))]
    # Widened, the stem stays at 64, as in the count that the project reproduces: 15.870 B MACs for ResNet-50 at w=2.
    return Arch(Stem(64, 7, 2, pool=True, scale="at_most"), tuple(stages), Head(0), 224, 0.0, TORCH)


_EFFICIENTNET = Arch(
    Stem(32),
    (  #   kernel stride expand channels layers: paper, Table 1
        _mb(3, 1, 1, 16, 1),
        _mb(3, 2, 6, 24, 2),
        _mb(5, 2, 6, 40, 2),
        _mb(3, 2, 6, 80, 3),
        _mb(5, 1, 6, 112, 3),
        _mb(5, 2, 6, 192, 4),
        _mb(3, 1, 6, 320, 1),
    ),
    Head(1280),
    224,
    0.2,
    OFFICIAL,
)

_LITE = Arch(
    Stem(32, scale="fixed"),
    tuple(replace(s, squeeze=0.0, fixed_depth=i in (0, 6)) for i, s in enumerate(_EFFICIENTNET.stages)),
    Head(1280, "fixed"),
    224,
    0.2,
    LITE,
)

_V2_B0 = Arch(
    Stem(32),
    (_fused(1, 1, 16, 1), _fused(2, 4, 32, 2), _fused(2, 4, 48, 2), _mb(3, 2, 4, 96, 3), _mb(3, 1, 6, 112, 5), _mb(3, 2, 6, 192, 8)),
    Head(1280),
    224,
    0.2,
    V2_BASE,
)


def _v2(stem: int, fused: tuple[Stage, ...], mb: tuple[Stage, ...], resolution: int, dropout: float) -> Arch:
    return Arch(Stem(stem), fused + mb, Head(1280), resolution, dropout, OFFICIAL)


_BASES: dict[str, Arch] = {
    "efficientnet_b0": _EFFICIENTNET,
    "efficientnet_lite0": _LITE,
    "efficientnetv2_b0": _V2_B0,
    "efficientnetv2_s": _v2(
        24,
        (_fused(1, 1, 24, 2), _fused(2, 4, 48, 4), _fused(2, 4, 64, 4)),
        (_mb(3, 2, 4, 128, 6), _mb(3, 1, 6, 160, 9), _mb(3, 2, 6, 256, 15)),
        384,
        0.2,
    ),
    "efficientnetv2_m": _v2(
        24,
        (_fused(1, 1, 24, 3), _fused(2, 4, 48, 5), _fused(2, 4, 80, 5)),
        (_mb(3, 2, 4, 160, 7), _mb(3, 1, 6, 176, 14), _mb(3, 2, 6, 304, 18), _mb(3, 1, 6, 512, 5)),
        480,
        0.3,
    ),
    "efficientnetv2_l": _v2(
        32,
        (_fused(1, 1, 32, 4), _fused(2, 4, 64, 7), _fused(2, 4, 96, 7)),
        (_mb(3, 2, 4, 192, 10), _mb(3, 1, 6, 224, 19), _mb(3, 2, 6, 384, 25), _mb(3, 1, 6, 640, 7)),
        480,
        0.4,
    ),
    "mobilenet_v1": Arch(
        Stem(32),
        tuple(
            Stage("separable", 3, stride, 1, 0.0, "none", channels, layers)
            for stride, channels, layers in ((1, 64, 1), (2, 128, 2), (2, 256, 2), (2, 512, 6), (2, 1024, 2))
        ),
        Head(0),
        224,
        0.0,
        TORCH_RELU6,
    ),
    "mobilenet_v2": Arch(
        Stem(32),
        tuple(
            _mb(3, stride, expand, channels, layers, 0.0)
            for stride, expand, channels, layers in (
                (1, 1, 16, 1), (2, 6, 24, 2), (2, 6, 32, 3), (2, 6, 64, 4), (1, 6, 96, 3), (2, 6, 160, 3), (1, 6, 320, 1),
            )
        ),
        Head(1280, "at_least"),
        224,
        0.2,
        TORCH_RELU6,
    ),
    "mnasnet_a1": Arch(
        Stem(32),
        (
            replace(_mb(3, 1, 1, 16, 1, 0.0), skip="none"),
            _mb(3, 2, 6, 24, 2, 0.0),
            _mb(5, 2, 3, 40, 3),
            _mb(3, 2, 6, 80, 4, 0.0),
            _mb(3, 1, 6, 112, 2),
            _mb(5, 2, 6, 160, 3),
            _mb(3, 1, 6, 320, 1, 0.0),
        ),
        Head(1280),
        224,
        0.2,
        TORCH,
    ),
    "resnet18": _res("basic", (64, 128, 256, 512), (2, 2, 2, 2)),
    "resnet34": _res("basic", (64, 128, 256, 512), (3, 4, 6, 3)),
    "resnet50": _res("bottleneck", (256, 512, 1024, 2048), (3, 4, 6, 3)),
    "resnet101": _res("bottleneck", (256, 512, 1024, 2048), (3, 4, 23, 3)),
    "resnet152": _res("bottleneck", (256, 512, 1024, 2048), (3, 8, 36, 3)),
}  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """A named member of a family: its base with these multipliers and the table's own resolution and dropout."""

    base: str
    width: float
    depth: float
    resolution: int
    dropout: float


_VARIANTS: dict[str, Variant] = {
    #                                          width depth  px   dropout
    "efficientnet_b1": Variant("efficientnet_b0", 1.0, 1.1, 240, 0.2),
    "efficientnet_b2": Variant("efficientnet_b0", 1.1, 1.2, 260, 0.3),
    "efficientnet_b3": Variant("efficientnet_b0", 1.2, 1.4, 300, 0.3),
    "efficientnet_b4": Variant("efficientnet_b0", 1.4, 1.8, 380, 0.4),
    "efficientnet_b5": Variant("efficientnet_b0", 1.6, 2.2, 456, 0.4),
    "efficientnet_b6": Variant("efficientnet_b0", 1.8, 2.6, 528, 0.5),
    "efficientnet_b7": Variant("efficientnet_b0", 2.0, 3.1, 600, 0.5),
    "efficientnet_b8": Variant("efficientnet_b0", 2.2, 3.6, 672, 0.5),
    "efficientnet_l2": Variant("efficientnet_b0", 4.3, 5.3, 800, 0.5),
    "efficientnet_l2_475": Variant("efficientnet_b0", 4.3, 5.3, 475, 0.5),
    "efficientnetv2_b1": Variant("efficientnetv2_b0", 1.0, 1.1, 240, 0.2),
    "efficientnetv2_b2": Variant("efficientnetv2_b0", 1.1, 1.2, 260, 0.3),
    "efficientnetv2_b3": Variant("efficientnetv2_b0", 1.2, 1.4, 300, 0.3),
    "efficientnet_lite1": Variant("efficientnet_lite0", 1.0, 1.1, 240, 0.2),
    "efficientnet_lite2": Variant("efficientnet_lite0", 1.1, 1.2, 260, 0.3),
    "efficientnet_lite3": Variant("efficientnet_lite0", 1.2, 1.4, 280, 0.3),
    "efficientnet_lite4": Variant("efficientnet_lite0", 1.4, 1.8, 300, 0.3),
}


def names() -> tuple[str, ...]:
    """Every name that `arch` knows, family by family."""
    order = ("efficientnet_b", "efficientnet_l2", "efficientnetv2", "efficientnet_lite", "mobilenet", "mnasnet", "resnet")
    known = [*_BASES, *_VARIANTS]
    return tuple(sorted(known, key=lambda n: next(i for i, p in enumerate(order) if n.startswith(p))))


def arch(name: str) -> Arch:
    """The named network. Raises UnknownNameError (a ValueError) that gives the nearest name.

    The members of a family carry the official multipliers, which are not exactly alpha^phi, beta^phi, gamma^phi.
    """
    if not isinstance(name, str) or (name not in _BASES and name not in _VARIANTS):
        raise unknown("network", str(name), names())
    return _named(name)


@cache
def _named(name: str) -> Arch:
    if name in _BASES:
        return replace(_BASES[name], name=name)
    row = _VARIANTS[name]
    scaled = scale(arch(row.base), Scaling(row.depth, row.width))
    return replace(scaled, resolution=row.resolution, dropout=row.dropout, name=name)
