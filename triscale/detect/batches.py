"""Batches of training views for the loop: decoded and moved anew each epoch, ahead of the step, resumable."""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from triscale.data.decode import BadImage
from triscale.data.sources import DataError
from triscale.detect.coco import BoxData
from triscale.detect.losses import Target
from triscale.detect.views import View, collate, normalised, train_view
from triscale.recipe import Preprocess

Batch = tuple[Tensor, list[Target], Tensor]
TRIES = 8  # other images in the place of one that can't be read


class BoxBatches:
    """Epochs over a data set's images: `epoch(i, start)` yields (images (B, 3, S, S) float32 normalised, B targets, numbers (B,)).

    Order and views depend on the seed, the epoch and the image's number alone: a resumed run sees what an uninterrupted one sees,
    with any number of workers, and however a batch is shared out. The last, smaller batch is dropped unless it is the only one.
    An image that can't be read is told once in `left_out`, and the next one in the epoch's order stands in for it.

    numbers: the images to train on, all unless given. workers: threads that prepare views ahead, at least 1. share: (rank,
    processes); each takes its consecutive part of every batch. device: where images are normalised and targets lie.
    broken_share: of the images, above which it is an error that they can't be read.
    """

    def __init__(
        self,
        data: BoxData,
        preprocess: Preprocess,
        batch_size: int,
        *,
        seed: int,
        ratios: tuple[float, float],
        flip: bool = True,
        numbers: Sequence[int] | None = None,
        workers: int = 1,
        share: tuple[int, int] = (0, 1),
        device: str = "cpu",
        broken_share: float = 0.05,
    ) -> None:
        self.data, self.preprocess, self.seed, self.ratios, self.flip = data, preprocess, seed, ratios, flip
        self.chosen = torch.as_tensor(list(range(len(data)) if numbers is None else numbers), dtype=torch.int64)
        if not len(self.chosen):
            raise DataError("no image to train on")
        self.size = min(batch_size, len(self.chosen))
        self.rank, self.processes = share
        if self.size % self.processes:
            raise ValueError(f"a batch of {self.size} images can't be shared out evenly to {self.processes} processes; another --batch-size can")
        self.workers, self.device, self.broken_share = max(1, workers), torch.device(device), broken_share
        self.left_out: dict[int, str] = {}

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self.chosen) // self.size

    def names(self, numbers: Tensor) -> list[str]:
        return [self.data.name(i) for i in numbers.tolist()]

    def epoch(self, index: int, start: int = 0) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed}/{index}".encode()))
        order = self.chosen[torch.randperm(len(self.chosen), generator=generator)].tolist()
        part = self.size // self.processes
        places = [[i * self.size + self.rank * part + k for k in range(part)] for i in range(start, len(self))]
        pool, waiting = ThreadPoolExecutor(self.workers, "views", torch.set_num_threads, (1,)), deque[list[Future[View]]]()
        try:
            for mine in places:
                waiting.append([pool.submit(self._view, order, place, index) for place in mine])
                if len(waiting) > 2:
                    yield self._batch(waiting.popleft())
            while waiting:
                yield self._batch(waiting.popleft())
        finally:
            pool.shutdown(cancel_futures=True)

    def _view(self, order: Sequence[int], place: int, epoch: int) -> View:
        """That of the image at this place in the order, or of one of the next that can be read."""
        for i in range(TRIES):
            number = order[(place + i) % len(order)]
            try:
                return train_view(self.data, number, self.preprocess.size, seed=self.seed, epoch=epoch, ratios=self.ratios, flip=self.flip)
            except BadImage as error:
                self.left_out[number] = str(error)
                if len(self.left_out) > self.broken_share * len(self.chosen):
                    share = f"{len(self.left_out)} of {len(self.chosen)} images can't be read, more than {100 * self.broken_share:g} %"
                    raise DataError(f"{share}; the last: {error}. --broken-share allows more") from None
        raise DataError(f"{TRIES} images one after the other can't be read; the last: {self.left_out[number]}")

    def _batch(self, views: Sequence[Future[View]]) -> Batch:
        batch = collate([view.result() for view in views])
        images = normalised(batch.images.to(self.device), batch.contents, self.preprocess)
        targets = [Target(boxes.to(self.device), labels.to(self.device)) for boxes, labels in zip(batch.boxes, batch.labels, strict=True)]
        return images, targets, batch.numbers
