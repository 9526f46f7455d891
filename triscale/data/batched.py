"""AutoAugment's operations on a whole batch, on any device, each image with its own: what training runs.

`apply` gives the pixels of `data/augment.py`. On a CPU it goes image by image (`data/batched_cpu.py`). On a device each slot
takes up to six passes: geometric operations as one gather, tables as one lookup each, blends, Cutout's mask. A pass takes
the images that have an operation of its kind. The choices on the CPU say which, so the host never waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from triscale.data import augment, batched_cpu
from triscale.data.policies import FILL, GEOMETRIC, OPERATIONS, Choices

# The kinds of passes, in the order they are made; an image has one operation a slot, so the order changes nothing.
KINDS: dict[str, tuple[str, ...]] = {
    "geometric": GEOMETRIC,
    "table": ("Invert", "Posterize", "Solarize", "SolarizeAdd", "Brightness", "Contrast"),
    "adaptive": ("Equalize", "AutoContrast"),
    "color": ("Color",),
    "sharpness": ("Sharpness",),
    "cutout": ("Cutout",),
}
_KIND = np.array([next(i for i, names in enumerate(KINDS.values()) if name in names) for name in OPERATIONS] + [-1])  # [-1]: none
GREY, SMOOTH = augment.GREY.tolist(), augment.SMOOTH.tolist()


class Pass(NamedTuple):
    """rows: (k,) int64 places in the batch, None for all. parameters: (k, ...), by kind:

    geometric (k, 6) float32, `augment.affine`'s. table (k, 256) uint8. adaptive (k, 1) uint8: 1 Equalize, 2 AutoContrast,
    0 neither. color, sharpness (k, 1) float32 factors. cutout (k, 4) int32: top, bottom, left, right.
    """

    kind: str
    rows: Tensor | None
    parameters: Tensor


def apply(images: Tensor, choices: Choices) -> Tensor:
    """images: (B, C, H, W) uint8, any memory format and device, C of 1 or 3. Returns a new tensor of the same shape, channels-last.

    Numerics: `augment.apply_reference` bit for bit on a CPU. On a device its arithmetic in its order; where a compiler fuses
    a product and a sum, a value within a rounding of a whole number may be one level off, or come from the next pixel.
    Raises ValueError for another type, and for images that the choices weren't drawn for.
    """
    if images.dtype != torch.uint8:
        raise ValueError(f"augmentation: expected uint8 images, found {images.dtype}")
    choices.check(tuple(images.shape))
    if images.device.type != "cpu":
        return run(images, prepare(choices, images.device))
    pixels = images.permute(0, 2, 3, 1).clone(memory_format=torch.contiguous_format)
    batched_cpu.apply_in_place(pixels.numpy(), choices)
    return pixels.permute(0, 3, 1, 2)


def prepare(choices: Choices, device: torch.device, whole: bool = False) -> list[Pass]:
    """The choices as the passes of `run`, on the images' device.

    whole: every slot has a pass of every kind over every image, with parameters that change nothing where it isn't needed:
    structure and shapes are then the same for every batch, as torch.compile wants it.
    """
    passes = []
    for slot in range(choices.slots):
        for place, kind in enumerate(KINDS):
            rows = np.flatnonzero(_KIND[choices.operations[:, slot]] == place)
            if len(rows) or (whole and len(choices)):
                values = _parameters(choices, slot, kind, np.arange(len(choices)) if whole else rows)
                passes.append(Pass(kind, None if whole else _to(rows, device), _to(values, device)))
    return passes


def run(images: Tensor, passes: list[Pass]) -> Tensor:
    """images: (B, C, H, W) uint8. Returns a new tensor, channels-last, with these passes of `prepare` made. Tensors alone, without
    a synchronisation: torch.compile takes it whole."""
    pixels = images.permute(0, 2, 3, 1).clone(memory_format=torch.contiguous_format)  # a gather takes neighbouring channels together
    for kind, rows, parameters in passes:
        if rows is None:
            pixels = _PASSES[kind](pixels, parameters)
        else:
            pixels.index_copy_(0, rows, _PASSES[kind](pixels[rows], parameters))
    return pixels.permute(0, 3, 1, 2)


def _to(array: np.ndarray, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _parameters(choices: Choices, slot: int, kind: str, rows: np.ndarray) -> np.ndarray:
    """A row for each image of `rows`; those of another kind's operations change nothing."""
    operations, arguments = choices.operations[rows, slot], choices.arguments[rows, slot]
    needed = _KIND[operations] == list(KINDS).index(kind)
    if kind == "cutout":
        half, centres, sides = arguments.astype(np.int32)[:, None], choices.centres[rows, slot], np.array(choices.size, np.int32)
        boxes = np.stack([np.maximum(centres - half, 0), np.minimum(centres + half, sides)], 2).reshape(-1, 4)
        return np.where(needed[:, None], boxes, 0).astype(np.int32)
    different: dict[tuple[int, float], int] = {}  # a batch has few
    pairs = zip(np.where(needed, operations, -1).tolist(), np.where(needed, arguments, 0).tolist(), strict=True)
    which = [different.setdefault(pair, len(different)) for pair in pairs]
    return np.stack([_row(kind, OPERATIONS[place] if place >= 0 else "", value, choices.size) for place, value in different])[which]


@lru_cache(256)
def _row(kind: str, name: str, argument: float, size: tuple[int, int]) -> np.ndarray:
    """A row of parameters of a kind other than cutout; name "" for one that changes nothing. Kept: not to be written to."""
    if kind == "geometric":
        return augment.affine(name, argument, size) if name else np.array([1, 0, 0, 0, 1, 0], np.float32)
    if kind == "table":
        return augment.by_value(augment.RAMP, name, argument, size[0] * size[1]) if name else augment.RAMP
    if kind == "adaptive":
        return np.array([KINDS[kind].index(name) + 1 if name else 0], np.uint8)
    return np.array([argument if name else 1], np.float32)


def _geometric(pixels: Tensor, affine: Tensor) -> Tensor:
    """As augment.sources: the nearest pixel, a half away from zero."""
    k, height, width, channels = pixels.shape
    a, b, c, d, e, f = affine[:, :, None, None].unbind(1)
    x = torch.arange(width, device=pixels.device, dtype=torch.float32)[None, None, :]
    y = torch.arange(height, device=pixels.device, dtype=torch.float32)[None, :, None]
    column, row = _round(a * x + b * y + c), _round(d * x + e * y + f)
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    source = torch.where(inside, row * width + column, 0).long().view(k, -1, 1).expand(-1, -1, channels)  # exact in float32 up to 16M pixels
    moved = pixels.view(k, -1, channels).gather(1, source).view_as(pixels)
    return torch.where(inside[..., None], moved, FILL)


def _round(values: Tensor) -> Tensor:
    whole = values.trunc()
    return torch.where((values - whole).abs() >= 0.5, whole + values.sign(), whole)


def _table(pixels: Tensor, table: Tensor) -> Tensor:
    return table.gather(1, pixels.view(len(pixels), -1).long()).view_as(pixels)


def _adaptive(pixels: Tensor, code: Tensor) -> Tensor:
    """The tables of augment.equalize_tables and autocontrast_tables, from one histogram."""
    k, height, width, channels = pixels.shape
    ramp = torch.arange(256, device=pixels.device, dtype=torch.int32)
    index = (pixels.view(k, -1, channels).long() + 256 * torch.arange(channels, device=pixels.device)).view(k, -1)
    one = torch.ones((), dtype=torch.int32, device=pixels.device).expand(index.shape)
    histogram = torch.zeros((k, channels * 256), dtype=torch.int32, device=pixels.device).scatter_add_(1, index, one).view(k, channels, 256)
    low = torch.where(histogram > 0, ramp, 255).amin(2, keepdim=True)
    high = torch.where(histogram > 0, ramp, 0).amax(2, keepdim=True)
    step = (height * width - histogram.gather(2, high.long())) // 255
    below = histogram.cumsum(2, dtype=torch.int32) - histogram
    equal = torch.where(step > 0, ((below + step // 2) // step.clamp(min=1)).clamp(0, 255), ramp)
    span = (high - low).clamp(min=1).float()
    scale = torch.full_like(span, 255.0) / span  # torch makes 255.0 / span a product with a rounded reciprocal
    stretched = (ramp.float() * scale + -low.float() * scale).clamp(0, 255).int()
    stretched = torch.where(high > low, stretched, ramp)
    code = code[:, :, None]
    table = torch.where(code == 1, equal, torch.where(code == 2, stretched, ramp)).to(torch.uint8)
    return table.view(k, -1).gather(1, index).view_as(pixels)


def _color(pixels: Tensor, factor: Tensor) -> Tensor:
    if pixels.shape[3] == 1:  # grey stays
        return pixels
    values = pixels.float()
    red, green, blue = (values * (1 / 255)).unbind(3)
    grey = (red * GREY[0] + green * GREY[1] + blue * GREY[2]) * 255.5
    return _blend(grey.trunc()[..., None], values, factor)


def _sharpness(pixels: Tensor, factor: Tensor) -> Tensor:
    """As augment.sharpness, which see for the order of the sum."""
    k, height, width, channels = pixels.shape
    if min(height, width) < 3:
        return pixels
    values = pixels.float()
    total = torch.zeros((k, height - 2, width - 2, channels), device=pixels.device)
    for row in range(3):
        for column in range(3):
            total = total + values[:, row : row + height - 2, column : column + width - 2] * SMOOTH[row][column]
    out = pixels.clone()
    out[:, 1:-1, 1:-1] = _blend(total.clamp(0, 255).trunc(), values[:, 1:-1, 1:-1], factor)
    return out


def _blend(first: Tensor, second: Tensor, factor: Tensor) -> Tensor:
    return (first + factor[:, :, None, None] * (second - first)).clamp(0, 255).to(torch.uint8)


def _cutout(pixels: Tensor, box: Tensor) -> Tensor:
    top, bottom, left, right = box[:, :, None, None].unbind(1)
    y = torch.arange(pixels.shape[1], device=pixels.device)[None, :, None]
    x = torch.arange(pixels.shape[2], device=pixels.device)[None, None, :]
    inside = (y >= top) & (y < bottom) & (x >= left) & (x < right)
    return torch.where(inside[..., None], FILL, pixels)


_PASSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "geometric": _geometric,
    "table": _table,
    "adaptive": _adaptive,
    "color": _color,
    "sharpness": _sharpness,
    "cutout": _cutout,
}
