"""AutoAugment's operations on a CPU, in place, only on the images that need them: the pixels of `data/augment.py`, several times faster.

Per image, so that it stays in the cache. Measured for each kind: a geometric operation gathers rows of C bytes by a kept map
of sources; values go through `bytes.translate`, or through bit operations where there are any; tables of a channel and their
histograms through Pillow; blends run in numpy, which casts float32 to uint8 seven times as fast as torch.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from PIL import Image

from triscale.data.augment import F32, GREY, RAMP, SMOOTH, TABLES, affine, box_side, by_value, sources
from triscale.data.policies import FILL, GEOMETRIC, OPERATIONS, Choices

MAPS = 32  # kept source maps, of 8 bytes a pixel (0.4 MB at 224); v0 has 20, RandAugment 10 a magnitude


def apply_in_place(pixels: np.ndarray, choices: Choices) -> None:
    """pixels: (B, H, W, C) uint8, dense, C of 1 or 3. Each image gets its operations, slot after slot."""
    operations, arguments, centres = choices.operations.tolist(), choices.arguments.tolist(), choices.centres.tolist()
    for number in np.flatnonzero((choices.operations >= 0).any(1)).tolist():
        for operation, argument, centre in zip(operations[number], arguments[number], centres[number], strict=True):
            if operation >= 0:
                _apply(pixels[number], OPERATIONS[operation], argument, (centre[0], centre[1]))


def _apply(image: np.ndarray, name: str, argument: float, centre: tuple[int, int]) -> None:
    if name in GEOMETRIC:
        if argument:
            _geometric(image, name, argument)
    elif name == "Cutout":
        (top, bottom), (left, right) = (box_side(at, int(argument), side) for at, side in zip(centre, image.shape[:2], strict=True))
        image[top:bottom, left:right] = FILL
    elif name in TABLES:
        _adaptive(image, name)
    elif name == "Color":
        if image.shape[2] == 3:  # grey stays
            _color(image, argument)
    elif name == "Sharpness":
        _sharpness(image, argument)
    else:
        _by_value(image, name, argument)


def _geometric(image: np.ndarray, name: str, argument: float) -> None:
    flat = image.reshape(-1, image.shape[2])
    padded = np.empty((len(flat) + 1, flat.shape[1]), np.uint8)
    padded[:-1], padded[-1] = flat, FILL
    # clip: no source is outside; numpy would gather into a buffer first if it had to check
    np.take(padded, _kept_sources(name, argument, *image.shape[:2]), axis=0, out=flat, mode="clip")


@lru_cache(MAPS)
def _kept_sources(name: str, argument: float, height: int, width: int) -> np.ndarray:
    return sources(affine(name, argument, (height, width)), (height, width))


def _adaptive(image: np.ndarray, name: str) -> None:
    picture = Image.fromarray(image if image.shape[2] == 3 else image[:, :, 0])
    tables = TABLES[name](np.array(picture.histogram()).reshape(-1, 256))
    image[:] = np.asarray(picture.point(tables.ravel().tolist())).reshape(image.shape)


def _by_value(image: np.ndarray, name: str, argument: float) -> None:
    if name == "Invert":
        np.invert(image, out=image)
    elif name == "Posterize":
        image &= _table(name, argument, 1)[255]  # what it leaves of eight ones
    elif name == "Solarize":
        image ^= -(image >= int(argument) % 256).view(np.uint8)  # 255 where it is inverted
    else:
        table = _table(name, argument, image.shape[0] * image.shape[1]).tobytes()
        image[:] = np.frombuffer(image.tobytes().translate(table), np.uint8).reshape(image.shape)


@lru_cache(256)
def _table(name: str, argument: float, pixels: int) -> np.ndarray:
    """(256,) uint8."""
    return by_value(RAMP, name, argument, pixels)


def _color(image: np.ndarray, factor: float) -> None:
    """As augment.blend with augment.grey, by channels: numpy is slow where the last dimension has three places."""
    planes = np.stack([image[:, :, c] for c in range(3)])
    values = planes.astype(F32)
    scaled = values * F32(1 / 255)
    scaled *= GREY[:, None, None]
    grey = scaled[0]
    grey += scaled[1]
    grey += scaled[2]
    grey *= F32(255.5)
    grey = grey.astype(np.uint8).astype(F32)
    values -= grey
    _finish_blend(values, grey, factor, planes)
    for c in range(3):
        image[:, :, c] = planes[c]


def _sharpness(image: np.ndarray, factor: float) -> None:
    """As augment.sharpness, over whole rows, in which a neighbour is `channels` places on."""
    height, width, channels = image.shape
    if min(height, width) < 3:
        return
    rows = image.reshape(height, width * channels)
    values = rows.astype(F32)
    outer, centre = values * SMOOTH[0, 0], values[1:-1] * SMOOTH[1, 1]
    span = (width - 2) * channels
    inside = slice(channels, channels + span)
    total = np.zeros((height - 2, span), F32)
    for row in range(3):
        for column in range(3):
            part = centre if row == column == 1 else outer[row : row + height - 2]
            total += part[:, column * channels : column * channels + span]
    np.trunc(total, out=total)
    difference = values[1:-1, inside] - total
    _finish_blend(difference, total, factor, rows[1:-1, inside])


def _finish_blend(difference: np.ndarray, start: np.ndarray, factor: float, out: np.ndarray) -> None:
    """start + factor x difference, clipped and cut, into `out`. Overwrites `difference`."""
    difference *= F32(factor)
    difference += start
    if factor > 1:
        np.clip(difference, 0, 255, out=difference)
    out[:] = difference.astype(np.uint8)
