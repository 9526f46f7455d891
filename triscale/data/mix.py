"""Mixup (Zhang et al. 2018, arXiv 1710.09412) and CutMix (Yun et al. 2019, arXiv 1905.04899) of a batch with itself reversed."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from triscale.recipe import Recipe


def mix(images: Tensor, labels: Tensor, classes: int, recipe: Recipe, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """images (B, C, H, W) float, changed in place; labels (B,) int64 -> (images, labels (B, classes) float32 that sum to 1).

    Image i meets image B - 1 - i. One share, drawn from Beta(alpha, alpha), holds for the batch: of the pixels' values (mixup),
    or of the area that stays (CutMix), whose box has its centre anywhere and is cut at the edges; the labels' share is then that
    of the pixels. With both, each batch takes one of the two at even odds.
    """
    draw = np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator)))  # torch's Beta takes no generator
    cut = recipe.cutmix > 0 and (not recipe.mixup or draw.random() < 0.5)
    alpha = recipe.cutmix if cut else recipe.mixup
    share = float(draw.beta(alpha, alpha))
    other = images.flip(0)
    if cut:
        top, bottom, left, right = box(images.shape[2], images.shape[3], share, draw)
        images[:, :, top:bottom, left:right] = other[:, :, top:bottom, left:right]
        share = 1 - (bottom - top) * (right - left) / (images.shape[2] * images.shape[3])
    else:
        images.mul_(share).add_(other, alpha=1 - share)
    target = F.one_hot(labels, classes).float()
    return images, target * share + target.flip(0) * (1 - share)


def box(height: int, width: int, share: float, draw: np.random.Generator) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) of a box of 1 - share of the area and the image's aspect about a random centre, cut at the edges."""
    side = math.sqrt(1 - share)
    tall, wide = int(height * side), int(width * side)
    row, column = int(draw.integers(height)), int(draw.integers(width))
    top, left = row - tall // 2, column - wide // 2
    return max(top, 0), min(top + tall, height), max(left, 0), min(left + wide, width)
