"""From a decoded image to a network's input, for evaluation: the reference. Without torch: numpy and Pillow.

`data/fast.py` computes the same with torch's kernels, several times faster; tests hold one to the other.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from PIL import Image

from triscale.data.decode import BadImage
from triscale.recipe import Preprocess

_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR, "nearest": Image.Resampling.NEAREST}
TF_A, TF_STEPS = -0.75, 1024  # Keys' constant and the steps of the weight table in tensorflow/core/kernels/image/resize_bicubic_op.cc
LARGEST = 1 << 24  # pixels of a resized image that is made whole: 50 MB of RGB
GREY = (0.299, 0.587, 0.114)  # ITU-R 601


class Plan(NamedTuple):
    """What is cut out of an image, to what it is resized, and what is cut out of that: (top, left, height, width) each."""

    cut: tuple[int, int, int, int]
    resized: tuple[int, int]
    kept: tuple[int, int, int, int]


def plan(shape: tuple[int, ...], preprocess: Preprocess) -> Plan:
    """The geometry of `preprocess` for an image of this shape (height, width, ...).

    before: side max(1, int(float32(size / (size + crop_padding)) x shorter side)), from row (height - side + 1) // 2 and
    column (width - side + 1) // 2. Source: official preprocessing.py, `_decode_and_center_crop`.
    after: the shorter side becomes size + crop_padding, the longer one int(... x longer / shorter); then size x size from row
    round((height - size) / 2), a half to the even row. Source: torchvision's Resize and CenterCrop, which timm takes too.
    """
    height, width, size, side = *shape[:2], preprocess.size, preprocess.size + preprocess.crop_padding
    if preprocess.crop == "before":
        cut = max(1, int(np.float32(size / side) * np.float32(min(height, width))))
        return Plan(((height - cut + 1) // 2, (width - cut + 1) // 2, cut, cut), (size, size), (0, 0, size, size))
    high, wide = side, side
    if preprocess.crop == "after":
        high, wide = (side, max(side, int(side * width / height))) if height <= width else (max(side, int(side * height / width)), side)
    return Plan((0, 0, height, width), (high, wide), (round((high - size) / 2), round((wide - size) / 2), size, size))


def check(image: np.ndarray) -> None:
    """Raises ValueError for anything but an image (H, W, 3) uint8."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"transform: expected an image (H, W, 3) uint8, found {image.shape} {image.dtype}")


def square(image: np.ndarray, preprocess: Preprocess) -> np.ndarray:
    """The crop and resize of `preprocess`, rounded and clipped: (H, W, 3) uint8 RGB -> (size, size, C) uint8.

    Raises ValueError for another shape or type.
    """
    pixels = resized(image, preprocess)
    return pixels if pixels.dtype == np.uint8 else np.clip(np.rint(pixels), 0, 255).astype(np.uint8)


def resized(image: np.ndarray, preprocess: Preprocess) -> np.ndarray:
    """The crop and resize of `preprocess`: (H, W, 3) uint8 RGB -> (size, size, C), uint8, or float32 for bicubic-tf.

    Pillow's filters see nothing beyond the cut, work on 8 bits and are antialiased, but for nearest; its bicubic has
    a = -0.5. bicubic-tf overshoots 0..255 and is not clipped, as in the official evaluation. Grey is ITU-R 601 of the
    resized RGB. Raises ValueError for another shape or type.
    """
    check(image)
    (top, left, height, width), (high, wide), (row, column, tall, broad) = plan(image.shape, preprocess)
    cut = image[top : top + height, left : left + width]
    if preprocess.interpolation == "bicubic-tf" and high * wide > LARGEST:
        raise BadImage(f"{image.shape[1]}x{image.shape[0]} pixels: too thin to be resized to {wide}x{high}")
    if preprocess.interpolation == "bicubic-tf":
        values = resize_tf(cut, high, wide)[row : row + tall, column : column + broad]
        return values if preprocess.channels == 3 else (values @ np.array(GREY, np.float32))[:, :, None]
    # Rows, then columns, with 8 bits between, as Pillow had it when today's weights were made; from version 13 on it takes
    # columns first where the height shrinks far more than the width, which moves noise by up to 15 levels.
    picture, how = Image.fromarray(np.ascontiguousarray(cut)), _FILTERS[preprocess.interpolation]
    if high * wide > LARGEST:  # a thin image of a few bytes would become gigabytes, of which a square is kept: make only that
        x, y = width / wide, height / high
        picture = picture.resize((broad, height), how, (column * x, 0, (column + broad) * x, height))
        picture = picture.resize((broad, tall), how, (0, row * y, broad, (row + tall) * y))
    else:
        picture = picture.resize((wide, height), how).resize((wide, high), how).crop((column, row, column + broad, row + tall))
    pixels = np.array(picture if preprocess.channels == 3 else picture.convert("L"))
    return pixels.reshape(tall, broad, preprocess.channels)


def resize_tf(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """(H, W, C) -> (height, width, C) float32: `tf.image.resize_bicubic` without half-pixel centres and antialiasing, not clipped.

    Position out x float32(in / out); Keys' kernel with A = -0.75, the fraction rounded to 1/1024; edges repeated.
    """
    rows, row_weights = tf_taps(image.shape[0], height)
    columns, column_weights = tf_taps(image.shape[1], width)
    values = image.astype(np.float32)
    values = sum(values[:, columns[:, i]] * column_weights[None, :, i, None] for i in range(4))
    return sum(values[rows[:, i]] * row_weights[:, i, None, None] for i in range(4))


def tf_taps(size: int, out: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each output place the four input places (out, 4) and their weights (out, 4) float32."""
    position = np.arange(out, dtype=np.float32) * np.float32(size / out)
    first = np.floor(position)
    fraction = np.rint((position - first) * np.float32(TF_STEPS)) / TF_STEPS  # rint: ties to even
    near, far = np.stack([fraction, 1 - fraction], 1), np.stack([fraction + 1, 2 - fraction], 1)
    a = TF_A
    inner = ((a + 2) * near - (a + 3)) * near * near + 1
    outer = ((a * far - 5 * a) * far + 8 * a) * far - 4 * a
    weights = np.stack([outer[:, 0], inner[:, 0], inner[:, 1], outer[:, 1]], 1).astype(np.float32)
    return np.clip(first.astype(np.int64)[:, None] + np.arange(-1, 3), 0, size - 1), weights


def evaluate_transform(image: np.ndarray, preprocess: Preprocess) -> np.ndarray:
    """image: (H, W, 3) uint8 RGB. Returns (C, size, size) float32: `resized`, then (x - mean) / std on the 0..255 scale."""
    mean, std = np.asarray(preprocess.mean, dtype=np.float32), np.asarray(preprocess.std, dtype=np.float32)
    normalised = (resized(image, preprocess).astype(np.float32) - mean) / std
    return np.ascontiguousarray(normalised.transpose(2, 0, 1))
