"""From a decoded image to a network's input, for evaluation and prediction. Without torch: numpy and Pillow."""

from __future__ import annotations

import numpy as np
from PIL import Image

from triscale.recipe import Preprocess

_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR, "nearest": Image.Resampling.NEAREST}


def square(image: np.ndarray, preprocess: Preprocess) -> np.ndarray:
    """The crop and resize of `preprocess`: (H, W, 3) uint8 RGB -> (size, size, C) uint8.

    The centre square of side max(1, int(size / (size + crop_padding) x shorter side)) is cut out from row (H - side + 1) // 2
    and column (W - side + 1) // 2, then resized: the filter sees nothing beyond the cut. Resizing is Pillow's on 8 bits,
    antialiased, bicubic with a = -0.5 (the official TensorFlow code has the same crop, but its resize does not antialias).
    Grey is ITU-R 601 of the resized RGB, on 8 bits. Raises ValueError for another shape or type.
    Source: official preprocessing.py, `_decode_and_center_crop`.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"square: expected an image (H, W, 3) uint8, found {image.shape} {image.dtype}")
    height, width = image.shape[:2]
    side = max(1, int(preprocess.size / (preprocess.size + preprocess.crop_padding) * min(height, width)))
    top, left = (height - side + 1) // 2, (width - side + 1) // 2
    cut = Image.fromarray(np.ascontiguousarray(image[top : top + side, left : left + side]))
    resized = cut.resize((preprocess.size, preprocess.size), _FILTERS[preprocess.interpolation])
    pixels = np.array(resized if preprocess.channels == 3 else resized.convert("L"))
    return pixels.reshape(preprocess.size, preprocess.size, preprocess.channels)


def evaluate_transform(image: np.ndarray, preprocess: Preprocess) -> np.ndarray:
    """image: (H, W, 3) uint8 RGB. Returns (C, size, size) float32: `square`, then (x - mean) / std on the 0..255 scale."""
    mean, std = np.asarray(preprocess.mean, dtype=np.float32), np.asarray(preprocess.std, dtype=np.float32)
    normalised = (square(image, preprocess).astype(np.float32) - mean) / std
    return np.ascontiguousarray(normalised.transpose(2, 0, 1))
