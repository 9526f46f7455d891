"""What the network sees of a data set's images: each as a square with its boxes, and squares as a batch.

A training view depends on the data, the seed, the epoch and the image's number alone: not on the order in which views are taken,
nor on the process, so that a resumed run sees what an uninterrupted one sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from triscale.detect.coco import BoxData
from triscale.detect.geometry import RATIOS, Frame, draw_numbers, evaluation_frame, into, pixels, train_frame
from triscale.recipe import Preprocess

if TYPE_CHECKING:
    from torch import Tensor


class View(NamedTuple):
    """image (S, S, 3) uint8; boxes (B, 4) float32 in the square, labels (B,) int64; crowds (C, 4) float32, no targets; number: of the image."""

    image: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    crowds: np.ndarray
    frame: Frame
    number: int


class Batch(NamedTuple):
    """images (N, 3, S, S) uint8, channels-last; contents (N, 2) int64: height and width of each picture without padding; boxes and
    labels: N tensors (B, 4) float32 and (B,) int64; numbers (N,) int64; frames: to get back from the squares to the pictures."""

    images: Tensor
    contents: Tensor
    boxes: tuple[Tensor, ...]
    labels: tuple[Tensor, ...]
    numbers: Tensor
    frames: tuple[Frame, ...]


def train_view(data: BoxData, number: int, size: int, *, seed: int, epoch: int, ratios: tuple[float, float] = RATIOS, flip: bool = True) -> View:
    """Resized at random, cropped, mirrored, padded: see `geometry`. Raises BadImage for a file that can't be read or has another size."""
    shape, (boxes, _) = data.images[number][2:], data.targets(number)
    frame = train_frame(shape, boxes, size, draw_numbers(seed, epoch, number), ratios)
    return _view(data, number, frame if flip else frame._replace(mirrored=False))


def evaluation_view(data: BoxData, number: int, size: int) -> View:
    """The longer side `size`, padded; `geometry.back(boxes, view.frame)` undoes it. Raises BadImage as train_view."""
    return _view(data, number, evaluation_frame(data.images[number][2:], size))


def _view(data: BoxData, number: int, frame: Frame) -> View:
    boxes, labels = data.targets(number)
    placed, kept = into(boxes, frame)
    crowds, _ = into(data.crowds(number), frame)
    return View(pixels(data.image(number), frame), placed, labels[kept], crowds, frame, number)


def collate(views: Sequence[View]) -> Batch:
    """Views of one size as a batch. Raises ValueError for none."""
    import torch

    if not views:
        raise ValueError("collate: expected at least one view")
    images = torch.from_numpy(np.stack([v.image for v in views])).permute(0, 3, 1, 2)
    contents = torch.tensor([v.frame.content for v in views])
    boxes, labels = (tuple(torch.from_numpy(a) for a in arrays) for arrays in ([v.boxes for v in views], [v.labels for v in views]))
    return Batch(images, contents, boxes, labels, torch.tensor([v.number for v in views]), tuple(v.frame for v in views))


def normalised(images: Tensor, contents: Tensor, preprocess: Preprocess) -> Tensor:
    """(N, 3, S, S) uint8 -> float32 (x - mean) / std, channels-last, padding 0 exactly: mmdetection pads after it normalises.

    On a CPU the result lies in memory that is used again once nothing refers to it.
    """
    from triscale.data.normalising import normalise

    out = normalise(images, preprocess)
    for picture, (height, width) in zip(out, contents.tolist(), strict=True):
        picture[:, height:] = 0
        picture[:, :height, width:] = 0
    return out
