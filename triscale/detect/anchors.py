"""The boxes that a detector's outputs are relative to.

Order, as the heads' channels have it: rows, columns, ratios, octaves. Boxes are (x1, y1, x2, y2) in pixels of the input.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from triscale.detector import Anchors

Size = tuple[int, int]


def make_anchors(arch: Anchors, strides: tuple[int, ...], maps: tuple[Size, ...], size: Size, device: torch.device) -> tuple[Tensor, ...]:
    """For each level (H W A, 4) float32. maps: the levels' (height, width); size: the input's.

    arch.rounded is torchvision's way, with three differences from mmdetection's: octaves' sizes are cut to whole pixels, corners
    are rounded to them, and places lie input size // map size apart, which is not the stride where a map's size was rounded up
    (96 pixels have 2 places of stride 64, 48 apart).
    """
    return tuple(_level(arch, stride, places, size, device) for stride, places in zip(strides, maps, strict=True))


@lru_cache(maxsize=16)
def cached_anchors(arch: Anchors, strides: tuple[int, ...], maps: tuple[Size, ...], size: Size, device: torch.device) -> tuple[Tensor, ...]:
    """`make_anchors`, kept for the last 16 sizes and devices. Not for traced code: it would keep tensors without values."""
    with torch.inference_mode(False):  # tensors made in inference mode could not be used in training later
        return make_anchors(arch, strides, maps, size, device)


def _level(arch: Anchors, stride: int, places: Size, size: Size, device: torch.device) -> Tensor:
    step = [whole // n for whole, n in zip(size, places, strict=True)] if arch.rounded else [stride, stride]
    y, x = (torch.arange(n, device=device, dtype=torch.float32) * s for n, s in zip(places, step, strict=True))
    y, x = torch.meshgrid(y, x, indexing="ij")
    centres = torch.stack((x, y, x, y), -1)
    return (centres[:, :, None] + _cell(arch, stride, device)).reshape(-1, 4)


def _cell(arch: Anchors, stride: int, device: torch.device) -> Tensor:
    """The anchors of one place about (0, 0): (A, 4)."""
    sides = [arch.scale * stride * 2 ** (k / arch.octaves) for k in range(arch.octaves)]
    side = torch.tensor([int(s) for s in sides] if arch.rounded else sides, dtype=torch.float32, device=device)
    root = torch.tensor(arch.ratios, dtype=torch.float32, device=device).sqrt()[:, None]
    width, height = ((1 / root) * side).flatten(), (root * side).flatten()
    corners = torch.stack((-width, -height, width, height), 1) / 2
    return corners.round() if arch.rounded else corners
