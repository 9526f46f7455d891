"""Batches for training from images held in memory: shuffled, augmented and normalised as tensors, resumable.

Shapes: images (N, C, S, S) uint8 in; batches (B, C, S, S) float32 channels-last, normalised, with labels (B,) int64.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from triscale.recipe import Preprocess, Recipe


def normalise(images: Tensor, preprocess: Preprocess) -> Tensor:
    """uint8 (N, C, H, W) -> float32 (x - mean) / std, channels-last."""
    mean = torch.tensor(preprocess.mean, device=images.device).view(1, -1, 1, 1)
    std = torch.tensor(preprocess.std, device=images.device).view(1, -1, 1, 1)
    return images.to(torch.float32, memory_format=torch.channels_last).sub_(mean).div_(std)


def evaluation_batches(images: Tensor, preprocess: Preprocess, size: int = 256) -> Iterator[Tensor]:
    """All images (N, C, S, S) uint8 once and in order, normalised, in batches of `size` and a last smaller one."""
    for start in range(0, len(images), size):
        yield normalise(images[start : start + size], preprocess)


def augment(images: Tensor, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """A random flip, shift and erased square for each image of a batch (N, C, S, S), any dtype; a new tensor.

    Shift: by up to recipe.shift of the side either way, edges repeated. Erase: a square of zeros (on normalised images:
    the mean), its centre anywhere, cut at the edge.
    """
    n, _, height, width = images.shape

    def draw(low: int, high: int) -> Tensor:
        return torch.randint(low, high + 1, (n, 1), generator=generator)

    rows, columns = torch.arange(height).expand(n, -1), torch.arange(width).expand(n, -1)
    if recipe.flip:
        columns = torch.where(draw(0, 1).bool(), columns.flip(1), columns)
    if recipe.shift:
        reach = max(1, round(recipe.shift * height)), max(1, round(recipe.shift * width))
        rows = (rows + draw(-reach[0], reach[0])).clamp_(0, height - 1)
        columns = (columns + draw(-reach[1], reach[1])).clamp_(0, width - 1)
    index = torch.arange(n)[:, None, None]
    rows, columns = rows.to(images.device), columns.to(images.device)
    out = images.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    if recipe.erase:
        half = max(1, round(recipe.erase * height / 2))
        top, left = draw(0, height - 1), draw(0, width - 1)
        inside_y = (torch.arange(height) - top).abs() < half
        inside_x = (torch.arange(width) - left).abs() < half
        out = out.masked_fill((inside_y[:, None, :, None] & inside_x[:, None, None, :]).to(out.device), 0)
    return out


class Batches:
    """Endless epochs over images in memory: `epoch(i)` yields the batches of epoch i.

    Order and augmentation of epoch i depend on the seed and on i alone, so a resumed run sees what an uninterrupted one
    sees. The last, smaller batch is dropped unless it is the only one (a batch norm over a few images is noise).
    """

    def __init__(self, images: Tensor, labels: Tensor, preprocess: Preprocess, recipe: Recipe) -> None:
        if len(images) != len(labels) or not len(images):
            raise ValueError(f"Batches: expected as many labels as images and at least one, found {len(images)} and {len(labels)}")
        self.images, self.labels, self.preprocess, self.recipe = images, labels, preprocess, recipe
        self.size = min(recipe.batch_size, len(images))

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self.images) // self.size

    def epoch(self, index: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + index)
        order = torch.randperm(len(self.images), generator=generator)
        for i in range(len(self)):
            chosen = order[i * self.size : (i + 1) * self.size]
            images = normalise(self.images[chosen], self.preprocess)
            yield augment(images, self.recipe, generator), self.labels[chosen]
