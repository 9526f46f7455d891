"""A picture and its boxes, moved together: for training resized at random, cropped, mirrored and padded; for evaluation fitted.

Conventions: boxes are x1, y1, x2, y2 in pixels, float32, continuous: pixel column i reaches from i to i + 1, a box covers
[x1, x2) x [y1, y2), mirroring takes x to width - x. Pictures are (H, W, 3) uint8 RGB. Coordinates are scaled by the ratio of the
whole sizes after rounding, (new width / width, new height / height), as pixels are.

Source: mmdetection 2.x, Resize(img_scale=(S, S), ratio_range=(0.8, 1.2), keep_ratio=True), RandomCrop(crop_size=(S, S)),
RandomFlip(0.5), Normalize, Pad(size=(S, S)), in this order. Of a crop, boxes are cut at its edge, and those that keep no area are
dropped; any sliver stays. Where ours differs:
- a crop that would lose every box of a picture that has some is drawn anew, ten times at most, then taken at ratio 1, where nothing
  is cropped; mmdetection goes to another picture, so that an epoch has no fixed contents.
- the resize is Pillow's bilinear, which is antialiased where a picture shrinks; OpenCV's isn't. Where it grows, as COCO's pictures
  of 640 pixels do, they agree to a grey level or so.
- padding is the rounded mean colour, so that pictures stay uint8; `views.normalised` makes it 0 exactly.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from PIL import Image

from triscale.data.transform import check
from triscale.data.work import crop_numbers

RATIOS = (0.8, 1.2)
FILL = (124, 116, 104)  # ImageNet's mean colour, rounded
MAX_SIZE = 1 << 13


class Frame(NamedTuple):
    """How a picture of height x width lies in a square of side size: resized to tall x wide, cut from (top, left), mirrored."""

    height: int
    width: int
    size: int
    tall: int
    wide: int
    top: int = 0
    left: int = 0
    mirrored: bool = False

    @property
    def content(self) -> tuple[int, int]:
        """Height and width of the picture's part of the square, at its upper left; the rest is padding."""
        return min(self.tall, self.size), min(self.wide, self.size)

    @property
    def scale(self) -> tuple[float, float]:
        """By which x and y are multiplied."""
        return self.wide / self.width, self.tall / self.height


def draw_numbers(seed: int, epoch: int, number: int) -> np.ndarray:
    """(10, 4) float64 in [0, 1) for `train_frame`: by counter, so that an image's moves depend on these three alone."""
    return crop_numbers(seed, epoch, number)


def train_frame(shape: tuple[int, int], boxes: np.ndarray, size: int, numbers: np.ndarray, ratios: tuple[float, float] = RATIOS) -> Frame:
    """A random frame for a picture of this shape (height, width) with these boxes (B, 4).

    numbers: (tries, 4) in [0, 1): ratio, row, column, mirrored if below 0.5. The longer side becomes int(size x ratio), ratio uniform
    in `ratios`; what exceeds the square is cropped at a uniform whole offset. Raises ValueError for sizes or ratios out of range.
    """
    low, high = ratios
    if not 0 < low <= high <= 10:
        raise ValueError(f"train_frame: expected ratios 0 < low <= high <= 10, found {ratios}")
    for ratio, row, column, mirror in numbers.tolist():
        tall, wide = _resized(shape, _side(size), int(size * (low + (high - low) * ratio)))
        top, left = int(row * (max(tall - size, 0) + 1)), int(column * (max(wide - size, 0) + 1))
        frame = Frame(*shape, size, tall, wide, top, left, mirror < 0.5)
        if not len(boxes) or len(into(boxes, frame)[1]):
            return frame
    return evaluation_frame(shape, size)._replace(mirrored=bool(numbers[-1, 3] < 0.5))


def evaluation_frame(shape: tuple[int, int], size: int) -> Frame:
    """The longer side becomes `size`, the shorter one keeps the aspect; upper left in the square. Raises ValueError as train_frame."""
    return Frame(*shape, size, *_resized(shape, _side(size), size))


def into(boxes: np.ndarray, frame: Frame) -> tuple[np.ndarray, np.ndarray]:
    """Boxes (B, 4) of the picture in the square, cut at the content's edge: (K, 4) float32, and which ones have area left, (K,) int64."""
    high, wide = frame.content
    moved = boxes.reshape(-1, 4).astype(np.float64) * np.tile(frame.scale, 2) - (frame.left, frame.top) * 2
    moved = np.clip(moved, 0, (wide, high) * 2)
    if frame.mirrored:
        moved = mirrored(moved, wide)
    out = moved.astype(np.float32)
    kept = np.flatnonzero((out[:, 2:] > out[:, :2]).all(1))
    return out[kept], kept


def back(boxes: np.ndarray, frame: Frame) -> np.ndarray:
    """Boxes (B, 4) of the square in the picture, cut at its edge: (B, 4) float32. Undoes `into` but for what that cut off."""
    moved = boxes.reshape(-1, 4).astype(np.float64)
    if frame.mirrored:
        moved = mirrored(moved, frame.content[1])
    moved = (moved + (frame.left, frame.top) * 2) / np.tile(frame.scale, 2)
    return np.clip(moved, 0, (frame.width, frame.height) * 2).astype(np.float32)


def mirrored(boxes: np.ndarray, width: float) -> np.ndarray:
    """Boxes (B, 4) of a picture of this width after it is mirrored left to right."""
    return np.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], 1)


def pixels(image: np.ndarray, frame: Frame, fill: tuple[int, int, int] = FILL) -> np.ndarray:
    """The picture (H, W, 3) uint8 in its frame: (size, size, 3) uint8. Raises ValueError where it isn't of the frame's height and width."""
    check(image)
    if image.shape[:2] != (frame.height, frame.width):
        raise ValueError(f"pixels: expected a picture of {frame.height} x {frame.width}, found {image.shape[0]} x {image.shape[1]}")
    high, wide = frame.content
    resized = np.asarray(Image.fromarray(np.ascontiguousarray(image)).resize((frame.wide, frame.tall), Image.Resampling.BILINEAR))
    cut = resized[frame.top : frame.top + high, frame.left : frame.left + wide]
    out = np.empty((frame.size, frame.size, 3), np.uint8)
    out[:high, :wide] = cut[:, ::-1] if frame.mirrored else cut
    out[high:], out[:high, wide:] = fill, fill
    return out


def _resized(shape: tuple[int, int], size: int, side: int) -> tuple[int, int]:
    """Height and width with the longer one `side`: int(length x factor + 0.5) as in mmcv's rescale_size, but at least 1."""
    factor = side / max(shape)
    tall, wide = (max(1, int(length * factor + 0.5)) for length in shape)
    return tall, wide


def _side(size: int) -> int:
    if not 1 <= size <= MAX_SIZE:
        raise ValueError(f"frame: expected a side from 1 to {MAX_SIZE} pixels, found {size}")
    return size
