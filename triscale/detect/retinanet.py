"""DetectorArch -> torch module: backbone, feature pyramid and box heads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from triscale.architecture import Numerics
from triscale.blocks import BatchNorm, Conv2d, ConvNormAct
from triscale.detect.anchors import Size, cached_anchors, make_anchors
from triscale.detect.boxes import Detections, select
from triscale.detect.losses import Losses, Target, detection_losses
from triscale.detect.rules import MMDETECTION, Rules
from triscale.detector import BoxHead, DetectorArch
from triscale.model import build

# torch's own batch norm, whatever the backbone's numerics: mmdetection's norm_cfg for neck and head gives no eps.
NUMERICS = Numerics(padding="symmetric", activation="relu", norm_eps=1e-5, norm_momentum=0.1, running_variance="unbiased")


class Outputs(NamedTuple):
    """For each level, from fine to coarse, logits (N, A K, H, W) and deltas (N, A 4, H, W); an anchor's channels lie together.

    size: the input's (height, width).
    """

    logits: tuple[Tensor, ...]
    deltas: tuple[Tensor, ...]
    size: Size


class FeaturePyramid(nn.Module):
    """The backbone's maps, from fine to coarse -> one map a level. Initialised Xavier uniform, biases 0."""

    def __init__(self, arch: DetectorArch) -> None:
        super().__init__()
        p, laterals = arch.pyramid, arch.laterals
        self.from_backbone = p.extra == "backbone"
        self.laterals = nn.ModuleList(Conv2d(channels, p.channels, 1, bias=True) for _, channels in laterals)
        self.outputs = nn.ModuleList()
        for i in range(len(p.strides)):
            cin = laterals[-1][1] if i == len(laterals) and self.from_backbone else p.channels
            stride = 1 if i < len(laterals) else 2
            plain = Conv2d(cin, p.channels, 3, stride, padding="symmetric", bias=True)
            self.outputs.append(ConvNormAct(cin, p.channels, 3, NUMERICS, stride=stride) if p.norm else plain)
        for module in self.modules():
            if isinstance(module, Conv2d) and not module.weight.is_meta:
                nn.init.xavier_uniform_(module.weight)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        sums = [lateral(x) for lateral, x in zip(self.laterals, maps, strict=True)]
        for i in reversed(range(len(sums) - 1)):
            sums[i] = sums[i] + F.interpolate(sums[i + 1], size=sums[i].shape[2:], mode="nearest")
        out = [output(x) for output, x in zip(self.outputs, sums, strict=False)]
        x = maps[-1] if self.from_backbone else out[-1]
        for output in list(self.outputs)[len(sums) :]:
            out.append(output(x))
            x = F.relu(out[-1])
        return out


class Tower(nn.Module):
    """3x3 convolutions shared by the levels, each followed by the level's own norm and ReLU, and a last one with a bias.

    Initialised normal with std 0.01, biases 0. Source: NAS-FPN (arXiv 1904.07392); mmdetection's RetinaSepBNHead.
    """

    def __init__(self, cin: int, head: BoxHead, outputs: int, levels: int) -> None:
        super().__init__()
        widths = [cin] + [head.channels] * head.convs
        self.convs = nn.ModuleList(Conv2d(a, b, 3, bias=not head.norm) for a, b in pairwise(widths))
        norms = range(levels if head.norm else 0)
        self.norms = nn.ModuleList(nn.ModuleList(BatchNorm(head.channels, NUMERICS) for _ in norms) for _ in self.convs)
        self.output = Conv2d(widths[-1], outputs, 3, bias=True)
        for conv in (*self.convs, self.output):
            if not cast(Conv2d, conv).weight.is_meta:
                nn.init.normal_(cast(Conv2d, conv).weight, std=0.01)

    def forward(self, x: Tensor, level: int) -> Tensor:
        for conv, norms in zip(self.convs, self.norms, strict=True):
            x = conv(x)
            x = F.relu(cast(nn.ModuleList, norms)[level](x) if len(cast(nn.ModuleList, norms)) else x, inplace=True)
        return cast(Tensor, self.output(x))


class BoxHeads(nn.Module):
    """The towers of classes and boxes. The classes' last bias makes every score begin at head.prior."""

    def __init__(self, arch: DetectorArch, num_classes: int) -> None:
        super().__init__()
        cin, head, each, levels = arch.pyramid.channels, arch.head, arch.anchors.each, len(arch.pyramid.strides)
        self.classes = Tower(cin, head, each * num_classes, levels)
        self.boxes = Tower(cin, head, each * 4, levels)
        bias = cast(Tensor, self.classes.output.bias)
        if not bias.is_meta:
            nn.init.constant_(bias, -math.log((1 - head.prior) / head.prior))

    def forward(self, maps: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        return tuple(self.classes(x, i) for i, x in enumerate(maps)), tuple(self.boxes(x, i) for i, x in enumerate(maps))


class Detector(nn.Module):
    """The detector that a DetectorArch describes. `arch`, `num_classes`, `in_channels` and `rules` stay on it.

    forward: (N, C, H, W) float of any size -> Outputs; maps' sizes round up. What `losses` and `detect` compute is float32
    whatever the outputs' precision.
    """

    def __init__(self, arch: DetectorArch, num_classes: int, in_channels: int = 3, rules: Rules = MMDETECTION) -> None:
        super().__init__()
        if type(num_classes) is not int or num_classes < 1:
            raise ValueError(f"build_detector: expected a whole number num_classes >= 1, found {num_classes}")
        self.arch, self.num_classes, self.in_channels, self.rules = arch, num_classes, in_channels, rules
        self.backbone = build(arch.trunk, 0, in_channels)
        self.pyramid = FeaturePyramid(arch)
        self.head = BoxHeads(arch, num_classes)

    @property
    def recompute(self) -> bool:
        """Of the backbone: see ConvNet. Pyramid and heads keep all."""
        return self.backbone.recompute

    @recompute.setter
    def recompute(self, value: bool) -> None:
        self.backbone.recompute = value

    def forward(self, images: Tensor) -> Outputs:
        stages = self.backbone.stages(images)
        maps = self.pyramid([stages[f"stride{stride}"] for stride, _ in self.arch.laterals])
        logits, deltas = self.head(maps)
        return Outputs(logits, deltas, (images.shape[2], images.shape[3]))

    def anchors(self, outputs: Outputs) -> tuple[Tensor, ...]:
        """Each level's anchors (H W A, 4), in the order of `flat`."""
        first = outputs.logits[0]
        maps = tuple((x.shape[2], x.shape[3]) for x in outputs.logits)
        make = make_anchors if torch.compiler.is_compiling() or type(first) is not Tensor else cached_anchors
        return make(self.arch.anchors, self.arch.pyramid.strides, maps, outputs.size, first.device)

    def flat(self, outputs: Outputs) -> tuple[list[Tensor], list[Tensor]]:
        """Each level's logits (N, H W A, K) and deltas (N, H W A, 4)."""
        n, k = len(outputs.logits[0]), self.num_classes
        rows = [[x.permute(0, 2, 3, 1).reshape(n, -1, last) for x in part] for part, last in ((outputs.logits, k), (outputs.deltas, 4))]
        return rows[0], rows[1]

    def losses(self, outputs: Outputs, targets: Sequence[Target]) -> Losses:
        """One target an image; see `detection_losses`."""
        logits, deltas = self.flat(outputs)
        return detection_losses(torch.cat(logits, 1), torch.cat(deltas, 1), torch.cat(self.anchors(outputs)), targets, self.rules)

    @torch.no_grad()
    def detect(self, outputs: Outputs, sizes: Sequence[Size] | None = None) -> list[Detections]:
        """Each image's boxes in pixels of the input, clipped at its own (height, width) there: the input's unless given."""
        sizes = [outputs.size] * len(outputs.logits[0]) if sizes is None else sizes
        if len(sizes) != len(outputs.logits[0]):
            raise ValueError(f"detect: expected a size for each of {len(outputs.logits[0])} images, found {len(sizes)}")
        levels = list(zip(*self.flat(outputs), self.anchors(outputs), strict=True))
        return [select(((x[i], d[i], a) for x, d, a in levels), size, self.rules) for i, size in enumerate(sizes)]


def build_detector(arch: DetectorArch, num_classes: int, in_channels: int = 3, rules: Rules = MMDETECTION) -> Detector:
    """A freshly initialised detector in training mode, float32, on torch's default device.

    Raises ValueError for less than one class or no input channel.
    """
    if not isinstance(arch, DetectorArch):
        raise ValueError(f"build_detector: expected a DetectorArch, found {type(arch).__name__}; triscale.detector.retinanet(name) makes one")
    return Detector(arch, num_classes, in_channels, rules)
