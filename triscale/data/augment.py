"""AutoAugment's operations on one image, with the official code's pixels: the reference, in plain numpy.

Images are (H, W, C) uint8. An image of one channel gets what a grey RGB image gets. Every operation equals TensorFlow 1.15
running the official autoaugment.py bit for bit; where that isn't Pillow's, the function says so. `data/batched.py`
computes the same for whole batches; tests hold one to the other.
"""

from __future__ import annotations

import math

import numpy as np

from triscale.data.policies import FILL, GEOMETRIC, OPERATIONS, Choices

F32 = np.float32
GREY = np.array([0.2989, 0.5870, 0.1140], F32)  # tf.image.rgb_to_grayscale
SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], F32) / F32(13)  # Pillow's ImageFilter.SMOOTH
RAMP = np.arange(256, dtype=np.uint8)


def apply_reference(images: np.ndarray, choices: Choices) -> np.ndarray:
    """images: (B, C, H, W) uint8. Returns a new array: each image with its own operations. Raises ValueError for another shape or type."""
    choices.check(images.shape)
    out = [apply_one(image.transpose(1, 2, 0), choices, i).transpose(2, 0, 1) for i, image in enumerate(images)]
    return np.stack(out) if out else images.copy()


def apply_one(image: np.ndarray, choices: Choices, number: int) -> np.ndarray:
    """One image (H, W, C) uint8 with the operations of image `number` of `choices`, in order; a new array."""
    for operation, argument, centre in zip(choices.operations[number], choices.arguments[number], choices.centres[number], strict=True):
        if operation >= 0:
            image = apply_operation(image, OPERATIONS[operation], float(argument), (int(centre[0]), int(centre[1])))
    return image.copy()


def apply_operation(image: np.ndarray, name: str, argument: float = 0.0, centre: tuple[int, int] = (0, 0)) -> np.ndarray:
    """image: (H, W, 1 or 3) uint8. argument: as policies.Choices has it. centre: row and column, for Cutout.

    Raises ValueError for another shape, type or name.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (1, 3):
        raise ValueError(f"augmentation: expected an image (H, W, 1 or 3) uint8, found {image.shape} {image.dtype}")
    if image.shape[2] == 1:
        return apply_operation(np.repeat(image, 3, axis=2), name, argument, centre)[:, :, :1]
    if name in GEOMETRIC:
        return geometric(image, affine(name, argument, image.shape[:2]))
    if name == "Cutout":
        return cutout(image, int(argument), centre)
    if name in TABLES:
        tables = TABLES[name](np.stack([np.bincount(image[:, :, c].ravel(), minlength=256) for c in range(3)]))
        return np.stack([tables[c][image[:, :, c]] for c in range(3)], 2)
    if name == "Color":
        return blend(grey(image)[:, :, None], image, argument)
    if name == "Sharpness":
        return sharpness(image, argument)
    return by_value(image, name, argument, image.shape[0] * image.shape[1])


def by_value(values: np.ndarray, name: str, argument: float, pixels: int) -> np.ndarray:
    """The operations that look at one value alone. values: uint8, any shape. pixels: height x width of the image.

    Posterize: the official shift of 8 - bits is an unsigned byte, and shifts of more than 7 act as 7: 0 bits, and more than
    8, leave 0 and 128. Solarize: the threshold is a byte too, so 256 is 0 and inverts everything. Contrast blends with
    pixels / 256, at most 255 (the official code sums a histogram where Pillow takes its mean). Raises ValueError for another name.
    """
    if name == "Invert":
        return ~values
    if name == "Posterize":
        shift = min((8 - int(argument)) % 256, 7)
        return values >> shift << shift
    if name == "Solarize":
        return np.where(values < int(argument) % 256, values, ~values)
    if name == "SolarizeAdd":
        added = np.clip(values.astype(np.int64) + int(argument), 0, 255).astype(np.uint8)
        return np.where(values < 128, added, values)
    if name == "Brightness":
        return blend(np.zeros_like(values), values, argument)
    if name == "Contrast":
        return blend(np.full_like(values, int(min(pixels / 256, 255))), values, argument)
    raise ValueError(f"augmentation: expected an operation of {', '.join(OPERATIONS)}, found {name!r}")


def blend(first: np.ndarray, second: np.ndarray, factor: float) -> np.ndarray:
    """first + factor x (second - first) in float32, clipped, cut to uint8."""
    start = first.astype(F32)
    return np.clip(start + F32(factor) * (second.astype(F32) - start), 0, 255).astype(np.uint8)


def grey(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 -> (H, W) uint8, as tf.image.rgb_to_grayscale: in 0..1, then x 255.5 and cut."""
    scaled = image.astype(F32) * F32(1 / 255) * GREY
    return ((scaled[..., 0] + scaled[..., 1] + scaled[..., 2]) * F32(255.5)).astype(np.uint8)


def sharpness(image: np.ndarray, factor: float) -> np.ndarray:
    """Blends with a 3 x 3 mean of weights 1, the centre's 5; the border stays. The order of the sum decides ties: by rows, one after another."""
    height, width = image.shape[:2]
    if min(height, width) < 3:
        return image.copy()
    values, total = image.astype(F32), np.zeros((height - 2, width - 2, image.shape[2]), F32)
    for row in range(3):
        for column in range(3):
            total += values[row : row + height - 2, column : column + width - 2] * SMOOTH[row, column]
    smooth = image.copy()
    smooth[1:-1, 1:-1] = np.clip(total, 0, 255).astype(np.uint8)
    return blend(smooth, image, factor)


def autocontrast_tables(histograms: np.ndarray) -> np.ndarray:
    """Channels' histograms (C, 256) -> their tables (C, 256) uint8: lowest value to 0, highest to 255; a flat channel stays."""
    present = histograms > 0
    low, high = present.argmax(1)[:, None].astype(F32), F32(255) - present[:, ::-1].argmax(1)[:, None].astype(F32)
    scale = F32(255) / np.maximum(high - low, F32(1))
    return np.where(high > low, np.clip(RAMP.astype(F32) * scale + -low * scale, 0, 255).astype(np.uint8), RAMP)


def equalize_tables(histograms: np.ndarray) -> np.ndarray:
    """Channels' histograms (C, 256) -> their tables (C, 256) uint8, in whole numbers as Pillow's; a channel of too few values stays."""
    sums = histograms.cumsum(1)
    last = 255 - (histograms[:, ::-1] > 0).argmax(1)[:, None]
    step = (sums[:, -1:] - np.take_along_axis(histograms, last, 1)) // 255
    below = (sums - histograms + step // 2) // np.maximum(step, 1)
    return np.where(step > 0, np.minimum(below, 255), RAMP).astype(np.uint8)


def cutout(image: np.ndarray, half: int, centre: tuple[int, int]) -> np.ndarray:
    """A square of FILL from centre - half to centre + half, cut at the edges."""
    (top, bottom), (left, right) = (box_side(at, half, side) for at, side in zip(centre, image.shape[:2], strict=True))
    out = image.copy()
    out[top:bottom, left:right] = FILL
    return out


def box_side(centre: int, half: int, side: int) -> tuple[int, int]:
    """First row or column of Cutout's square, and the one after its last."""
    return max(0, centre - half), min(side, centre + half)


def affine(name: str, argument: float, size: tuple[int, ...]) -> np.ndarray:
    """(6,) float32 a, b, c, d, e, f: the pixel at column x, row y comes from column ax + by + c, row dx + ey + f.

    Pixels are points at whole numbers, without Pillow's half-pixel centres. Source: tf.contrib.image, `rotate`,
    `translate`, `transform`.
    """
    value, one, none = F32(argument), F32(1), F32(0)
    if name == "ShearX":
        return np.array([one, value, none, none, one, none])
    if name == "ShearY":
        return np.array([one, none, none, value, one, none])
    if name == "TranslateX":
        return np.array([one, none, value, none, one, none])
    if name == "TranslateY":
        return np.array([one, none, none, none, one, value])
    angle, down, across = value * F32(math.pi / 180), F32(size[0] - 1), F32(size[1] - 1)
    cos, sin = F32(math.cos(angle)), F32(math.sin(angle))
    left = (across - (cos * across - sin * down)) / F32(2)
    top = (down - (sin * across + cos * down)) / F32(2)
    return np.array([cos, -sin, left, sin, cos, top])


def sources(coefficients: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """Where each pixel comes from: (H x W,) intp, row x W + column, and H x W for a pixel that comes from outside.

    The nearest pixel, a half away from zero, in float32.
    """
    (height, width), (a, b, c, d, e, f) = size, coefficients
    x, y = np.arange(width, dtype=F32)[None], np.arange(height, dtype=F32)[:, None]
    column, row = _round(a * x + b * y + c), _round(d * x + e * y + f)
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    return np.where(inside, row * width + column, height * width).ravel()


def _round(values: np.ndarray) -> np.ndarray:
    """std::round. `trunc(x + 0.5)` isn't: 0.49999997 + 0.5 is 1 in float32."""
    whole = np.trunc(values)
    return (whole + np.where(np.abs(values - whole) >= 0.5, np.sign(values), 0)).astype(np.intp)


def geometric(image: np.ndarray, coefficients: np.ndarray) -> np.ndarray:
    """(H, W, C) uint8 resampled by `sources`, FILL where a pixel comes from outside."""
    pixels = np.concatenate([image.reshape(-1, image.shape[2]), np.full((1, image.shape[2]), FILL, np.uint8)])
    return pixels[sources(coefficients, image.shape[:2])].reshape(image.shape)


TABLES = {"Equalize": equalize_tables, "AutoContrast": autocontrast_tables}  # of a channel's values, by its histogram
