"""What a detector's training begins with: fresh weights, a trunk from a classifier's checkpoint, or a detector of ours."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from triscale.blocks import BatchNorm
from triscale.detect.model_file import load_detector
from triscale.detect.retinanet import Detector, build_detector
from triscale.detector import DetectorArch
from triscale.detector_recipe import DetectorRecipe
from triscale.weights.load import load_trunk


@dataclass(frozen=True)
class Start:
    """Weights to begin with. source: a classifier's checkpoint of any known kind (see `load_trunk`), or with `detector` a detector's
    file of ours. raw: of a checkpoint, not the moving averages. label: what messages call it."""

    source: str | os.PathLike[str]
    detector: bool = False
    raw: bool = False
    label: str = ""


@dataclass(frozen=True)
class Network:
    """A detector ready to be trained. prepare: to be called after each `net.train()`. weights: a sum over those it began with, ""
    for fresh ones. said: what of them stayed fresh, a line each."""

    net: Detector
    prepare: Callable[[], None]
    weights: str
    said: tuple[str, ...]


def start_detector(arch: DetectorArch, classes: tuple[str, ...], channels: int, recipe: DetectorRecipe, start: Start | None = None) -> Network:
    """`arch` for these classes on the CPU, channels-last, initialised under the recipe's seed or from `start`.

    Of a detector's file each part that is the same is taken: backbone, pyramid, heads; the classes' last convolution too where
    the class names are the same. Raises WeightsError or ModelFileError for weights that don't fit, ValueError for a recipe that
    freezes the norms of fresh weights.
    """
    torch.manual_seed(recipe.seed)
    net = build_detector(arch, len(classes), channels)
    if start is None and recipe.freeze_norms:
        raise ValueError("--freeze-norms: there is nothing to keep in fresh weights; --weights gives others")
    said: tuple[str, ...] = ()
    if start:
        label = start.label or os.path.basename(start.source)
        if start.detector:
            said = _from_detector(net, classes, start, label)
        elif fresh := load_trunk(net.backbone, start.source, arch.backbone, raw=start.raw):
            said = (f"fresh in the backbone, not from {label}: {', '.join(fresh[:8])}{f' and {len(fresh) - 8} more' if len(fresh) > 8 else ''}",)
    still = [m for m in net.backbone.modules() if isinstance(m, BatchNorm)] if recipe.freeze_norms else []

    def prepare() -> None:
        for module in still:
            module.eval()

    return Network(net.to(memory_format=torch.channels_last), prepare, _check(net) if start else "", said)


def _from_detector(net: Detector, classes: tuple[str, ...], start: Start, label: str) -> tuple[str, ...]:
    """Copies the parts that are the same; what stays fresh."""
    other, card = load_detector(start.source)
    if other.arch.trunk != net.arch.trunk or other.in_channels != net.in_channels:
        there, here = (d.backbone.name or "another network" for d in (card.arch, net.arch))
        differs = f"{there}, and not the {here}" if there != here else f"another {there} (shape or numerics) than the one"
        raise ValueError(f"{label}: its backbone is {differs} that is to be trained; --backbone and --detector can be left out")
    same = {"backbone": True, "pyramid": other.arch.pyramid == net.arch.pyramid}
    same["head"] = same["pyramid"] and (other.arch.head, other.arch.anchors) == (net.arch.head, net.arch.anchors)
    own = net.state_dict()
    taken = {key: value for key, value in other.state_dict().items() if same[key.split(".")[0]]}
    if card.classes != classes:
        taken = {key: value for key, value in taken.items() if not key.startswith("head.classes.output.")}
    net.load_state_dict(taken, strict=False)
    parts = [name for name, is_same in same.items() if not is_same]
    if same["head"] and card.classes != classes:
        parts.append("the classes' last convolution")
    if not any(key not in taken for key in own):
        return ()
    return (f"fresh, not from {label}: {', '.join(parts)}",)


def _check(net: nn.Module) -> str:
    """A sum over all values."""
    check = 0
    for value in net.state_dict().values():
        check = zlib.crc32(value.detach().reshape(-1).view(torch.uint8).numpy(), check)
    return f"{check:08x}"
