"""Batches for training from images held in memory: shuffled, augmented and normalised as tensors, resumable.

Shapes: images (N, C, S, S) uint8 in; batches (B, C, S, S) float32 channels-last, normalised, with labels (B,) int64.
"""

from __future__ import annotations

import math
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

from triscale.data.normalising import copied, normalise
from triscale.recipe import Preprocess, Recipe


def evaluation_batches(images: Tensor, preprocess: Preprocess, size: int = 256) -> Iterator[Tensor]:
    """All images (N, C, S, S) uint8 once and in order, normalised, in batches of `size` and a last smaller one."""
    for start in range(0, len(images), size):
        yield normalise(images[start : start + size], preprocess)


class Moves(NamedTuple):
    """Of each image of a batch, (B, 1) int64 each: whether it is mirrored, its offset in rows and columns, its erased square's
    centre; (B, 4) int64: its erased rectangle's top, bottom, left and right. None: none of the kind."""

    mirror: Tensor | None
    down: Tensor | None
    right: Tensor | None
    row: Tensor | None
    column: Tensor | None
    patch: Tensor | None = None


def draw_moves(recipe: Recipe, count: int, size: Sequence[int], generator: torch.Generator) -> Moves:
    """For `count` images of `size` (height, width)."""
    height, width = size

    def draw(low: int, high: int) -> Tensor:
        return torch.randint(low, high + 1, (count, 1), generator=generator)

    mirror = draw(0, 1) if recipe.flip else None
    reach = max(1, round(recipe.shift * height)), max(1, round(recipe.shift * width))
    down, right = (draw(-reach[0], reach[0]), draw(-reach[1], reach[1])) if recipe.shift else (None, None)
    row, column = (draw(0, height - 1), draw(0, width - 1)) if recipe.erase else (None, None)
    patch = _patches(recipe.random_erase, height, width, torch.rand(count, 5, generator=generator)) if recipe.random_erase else None
    return Moves(mirror, down, right, row, column, patch)


def _patches(probability: float, height: int, width: int, numbers: Tensor) -> Tensor:
    """numbers (B, 5) in 0..1: whether, area, aspect (uniform in its logarithm), and where. A side is cut at the image's own."""
    whether, area, aspect, down, right = numbers.unbind(1)
    area = (0.02 + (1 / 3 - 0.02) * area) * height * width
    aspect = torch.exp(math.log(0.3) + (math.log(1 / 0.3) - math.log(0.3)) * aspect)
    tall, wide = ((area * aspect).sqrt().round().clamp(1, height), (area / aspect).sqrt().round().clamp(1, width))
    chosen = whether < probability
    top, left = (down * (height - tall + 1)).floor(), (right * (width - wide + 1)).floor()
    return (torch.stack([top, top + tall, left, left + wide], 1) * chosen[:, None]).long()


def move(images: Tensor, moves: Moves, part: slice = slice(None)) -> Tensor:
    """Images (N, C, S, S), any dtype, mirrored and shifted with edges repeated: a new channels-last tensor, or `images` itself
    where there is nothing to do. part: which of the drawn ones they are."""
    if moves.down is None or moves.right is None:
        return images if moves.mirror is None else _mirror(images, moves.mirror[part])
    n, _, height, width = images.shape
    rows, columns = torch.arange(height).expand(n, -1), torch.arange(width).expand(n, -1)
    if moves.mirror is not None:
        columns = torch.where(moves.mirror[part].bool(), columns.flip(1), columns)
    rows = (rows + moves.down[part]).clamp_(0, height - 1).to(images.device)
    columns = (columns + moves.right[part]).clamp_(0, width - 1).to(images.device)
    index = torch.arange(n, device=images.device)[:, None, None]
    return images.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _mirror(images: Tensor, chosen: Tensor) -> Tensor:
    if images.device.type != "cpu":  # no choice by the host there: it would have to wait for the device
        return torch.where(chosen.bool().to(images.device)[:, :, None, None], images.flip(3), images)
    out = copied(images)
    for i in chosen[:, 0].nonzero()[:, 0].tolist():
        out[i] = images[i].flip(2)
    return out


def erase(images: Tensor, moves: Moves, recipe: Recipe, part: slice = slice(None)) -> Tensor:
    """Images (N, C, S, S) with a square of zeros (on normalised images: the mean) of side recipe.erase, cut at the edge, and with
    the rectangles of recipe.random_erase."""
    height, width = images.shape[2:]
    if moves.patch is not None:
        top, bottom, left, right = moves.patch[part].unsqueeze(2).unbind(1)
        rows, columns = torch.arange(height), torch.arange(width)
        inside = ((rows >= top) & (rows < bottom))[:, None, :, None] & ((columns >= left) & (columns < right))[:, None, None, :]
        images = images.masked_fill(inside.to(images.device), 0)
    if moves.row is None or moves.column is None:
        return images
    half = max(1, round(recipe.erase * height / 2))
    inside_y = (torch.arange(height) - moves.row[part]).abs() < half
    inside_x = (torch.arange(width) - moves.column[part]).abs() < half
    return images.masked_fill((inside_y[:, None, :, None] & inside_x[:, None, None, :]).to(images.device), 0)


def augment(images: Tensor, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """A random flip, shift and erased square for each image of a batch (N, C, S, S), any dtype; a new tensor.

    Shift: by up to recipe.shift of the side either way, edges repeated. Erase: see `erase`; its centre is anywhere.
    """
    moves = draw_moves(recipe, len(images), images.shape[2:], generator)
    out = erase(move(images, moves), moves, recipe)
    return out.clone() if out is images else out


class Finish:
    """From uint8 pictures to the network's input, a batch at a time, on the pictures' device: flip, shift, policy, normalisation,
    erased square, mixing.

    Called with images (B, C, S, S) uint8, labels (B,) int64, a generator, and which part of how large a batch they are. Returns
    float32 channels-last images, and labels (B,) int64, or (B, classes) float32 where the recipe mixes images. Random numbers
    are drawn for the whole batch, on the CPU, so that a part of it gets what it would get in the whole; mixing alone is done
    within the part.
    """

    def __init__(self, preprocess: Preprocess, recipe: Recipe, classes: int = 0) -> None:
        if (recipe.mixup or recipe.cutmix) and classes < 2:
            raise ValueError("mixup and cutmix: expected the number of classes")
        self.preprocess, self.recipe, self.classes = preprocess, recipe, classes

    def __call__(
        self, images: Tensor, labels: Tensor, generator: torch.Generator, part: slice = slice(None), whole: int = 0
    ) -> tuple[Tensor, Tensor]:
        recipe, whole = self.recipe, whole or len(images)
        moves = draw_moves(recipe, whole, images.shape[2:], generator)
        images = move(images, moves, part)
        if recipe.augment != "none":
            from triscale.data import batched, policies

            images = batched.apply(images, policies.draw(recipe, whole, (images.shape[2], images.shape[3]), generator)[part])
        out = erase(normalise(images, self.preprocess), moves, recipe, part)
        if recipe.mixup or recipe.cutmix:
            from triscale.data.mix import mix

            return mix(out, labels, self.classes, recipe, generator)
        return out, labels


class Batches:
    """Epochs over images in memory: `epoch(i, start)` yields (images, labels, numbers) of epoch i's batches from `start` on.

    Order and augmentation of a batch depend on the seed, the epoch and the batch's number alone: a resumed run sees what an
    uninterrupted one sees, with any number of workers. The last, smaller batch is dropped unless it is the only one (a batch
    norm over a few images is noise). workers: threads that prepare batches ahead; 0: none. share: (rank, processes); each
    takes its consecutive part of every batch, which `batch_size` has to divide by. numbers: places in `images`. classes: for
    recipes that mix images. device: where batches are finished.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        preprocess: Preprocess,
        recipe: Recipe,
        *,
        names: Sequence[str] = (),
        workers: int = 0,
        share: tuple[int, int] = (0, 1),
        classes: int = 0,
        device: str = "cpu",
    ) -> None:
        if len(images) != len(labels) or not len(images):
            raise ValueError(f"Batches: expected as many labels as images and at least one, found {len(images)} and {len(labels)}")
        self.images, self.labels, self.preprocess, self.recipe, self.workers = images, labels, preprocess, recipe, workers
        self.size = min(recipe.batch_size, len(images))
        self.rank, self.processes = share
        self._names, self._device, self._finish = names, torch.device(device), Finish(preprocess, recipe, classes)
        if self.size % self.processes:
            raise ValueError(f"a batch of {self.size} images can't be shared out evenly to {self.processes} processes; another --batch-size can")

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self.images) // self.size

    def names(self, numbers: Tensor) -> list[str]:
        """The files' names, or #number where there are none."""
        return [self._names[i] if self._names else f"#{i}" for i in numbers.tolist()]

    def epoch(self, index: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        order = torch.randperm(len(self.images), generator=self._generator(index))
        if not self.workers:
            for i in range(start, len(self)):
                yield self._batch(order, index, i)
            return
        pool, waiting = ThreadPoolExecutor(self.workers, "batches", torch.set_num_threads, (1,)), deque[Any]()
        try:
            for i in range(start, len(self)):
                waiting.append(pool.submit(self._batch, order, index, i))
                if len(waiting) > self.workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _generator(self, *numbers: int) -> torch.Generator:
        return torch.Generator().manual_seed(zlib.crc32("/".join(map(str, (self.recipe.seed, *numbers))).encode()))

    def _batch(self, order: Tensor, epoch: int, i: int) -> tuple[Tensor, Tensor, Tensor]:
        """This process's part of a batch. Random numbers are drawn for the whole batch, so that it is the same however shared out."""
        chosen = order[i * self.size : (i + 1) * self.size]
        part = self.size // self.processes
        mine = slice(self.rank * part, (self.rank + 1) * part)
        images, labels = (part[chosen[mine]].to(self._device) for part in (self.images, self.labels))
        return *self._finish(images, labels, self._generator(epoch, i), mine, self.size), chosen[mine]
