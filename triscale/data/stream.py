"""Batches from encoded images as they are needed: for training (shuffled, cropped, finished) and for evaluation (in order).

Worker processes read, decode, crop and resize to uint8 squares (`data/workers.py`); flip, policy, normalisation and mixing are
done here, a batch at a time on its device (`data/loader.py`'s Finish).
"""

from __future__ import annotations

import warnings
import weakref
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from triscale.data.jpeg import missing
from triscale.data.loader import Finish
from triscale.data.samples import Samples
from triscale.data.tally import Tally
from triscale.data.work import Shape, Work
from triscale.data.workers import CHUNK, Pool
from triscale.recipe import Preprocess, Recipe

AHEAD = 3  # batches that are made while one is used
SEARCH = 1000  # images in a row of which none can be read: then the search for what stands in ends
T = TypeVar("T")


class StreamedBatches:
    """Epochs over encoded images: `epoch(i, start)` yields (images, labels, numbers) of epoch i's batches from `start` on.

    Order, crop and augmentation depend on the seed, the epoch, and the batch's or the sample's number alone: a resumed run sees
    what an uninterrupted one sees, bit for bit, with any number of workers. The order is `Batches`': a permutation of all samples,
    cut into batches, the last smaller one dropped unless it is the only one. share: (rank, processes); each takes its consecutive
    part of every batch, which the batch size has to divide by. workers: processes, which last from the first epoch until `close`;
    0: this one does the work when it is asked for. finish: makes images and labels from uint8 (B, C, S, S) on `device`.

    Images that can't be read are left out of their batch, which is smaller by them (of several processes each takes a neighbour in
    their place, so that all parts stay alike), and listed in `left_out`, each once. More of
    them than broken_share of this process's images of an epoch raise DataError; so do the first LOOK images, if none of them can be
    read. Where a whole part is unreadable the next readable part of the epoch's order stands in for it, seen twice for once: every
    process then has a batch for every step; that none of SEARCH can be read raises DataError. `notes`: what else there is to know (a
    worker's death, a stalled read); `tell` is called with each as it happens, by default with a warning.

    Raises ValueError for counts that don't fit, WorkerError where workers keep dying.
    """

    def __init__(
        self,
        samples: Samples,
        preprocess: Preprocess,
        recipe: Recipe,
        *,
        finish: Finish,
        workers: int,
        share: tuple[int, int] = (0, 1),
        device: torch.device | str = "cpu",
        broken_share: float = 0.01,
    ) -> None:
        _check(samples, workers, share)
        self.samples, self.recipe, self.finish, self.workers, self.device = samples, recipe, finish, workers, torch.device(device)
        self.size = min(recipe.batch_size, len(samples))
        self.rank, self.processes = share
        if self.size % self.processes:
            raise ValueError(f"a batch of {self.size} images can't be shared out evenly to {self.processes} processes; another --batch-size can")
        self._work = Work(samples, preprocess, recipe.crop_area, recipe.seed)
        self._tally = Tally(samples, broken_share, len(self) * (self.size // self.processes))
        self._labels = torch.from_numpy(np.array(samples.labels, np.int64))
        self._pool: Pool | None = None
        self.notes: list[str] = []
        self.tell: Callable[[str], None] = _warn

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self.samples) // self.size

    @property
    def left_out(self) -> list[str]:
        """Why each image that couldn't be read so far couldn't be."""
        return list(self._tally.reasons.values())

    def names(self, numbers: Tensor) -> list[str]:
        """What messages call the samples."""
        return [self.samples.name(i) for i in numbers.tolist()]

    def epoch(self, index: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """One epoch at a time: a new one ends the one before, whose iterator raises RuntimeError where it is asked for more."""
        order = torch.randperm(len(self.samples), generator=self._generator(index)).numpy()
        if self._pool is None or self._pool.closed:
            self._pool = _pool(self._work, self.size // self.processes, self.workers, _weak(self._note))
        pool, self._tally.bad = self._pool, 0
        requests = ((order[self._mine(i)], index) for i in range(start, len(self)))
        batches = iter(range(start, len(self)))
        return _in_order(pool, requests, lambda slot: self._batch(pool, slot, order, index, next(batches)))

    def close(self) -> None:
        """Ends the worker processes; the next epoch starts new ones."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def _mine(self, i: int) -> slice:
        part = self.size // self.processes
        return slice(i * self.size + self.rank * part, i * self.size + (self.rank + 1) * part)

    def _generator(self, *numbers: int) -> torch.Generator:
        """As `Batches` has it, so that images held in memory come in the same order."""
        return torch.Generator().manual_seed(zlib.crc32("/".join(map(str, (self.recipe.seed, *numbers))).encode()))

    def _note(self, text: str) -> None:
        self.notes.append(text)
        self.tell(text)

    def _batch(self, pool: Pool, slot: int, order: np.ndarray, epoch: int, i: int) -> tuple[Tensor, Tensor, Tensor]:
        """This process's part of a batch, from its slot. Random numbers are drawn for the whole batch, and for broken images too."""
        part = self.size // self.processes
        slot, good = self._readable(pool, slot, order, epoch, i)
        numbers = pool.ring.numbers[slot].copy()
        if not good.all():  # a neighbour holds a broken image's place, for those that may be mixed with it
            places = np.flatnonzero(good)
            stand_in = places[np.minimum(np.searchsorted(places, np.arange(part)), len(places) - 1)]
            pool.ring.pixels[slot, ~good] = pool.ring.pixels[slot, stand_in[~good]]
            chosen = torch.from_numpy(numbers[stand_in])
        else:
            chosen = torch.from_numpy(numbers)
        pixels = _on(torch.from_numpy(pool.ring.pixels[slot]), self.device).permute(0, 3, 1, 2)
        mine = slice(self.rank * part, (self.rank + 1) * part)
        images, labels = self.finish(pixels, _on(self._labels[chosen], self.device), self._generator(epoch, i), mine, self.size)
        if images.untyped_storage().data_ptr() == pixels.untyped_storage().data_ptr():
            images = images.clone()  # the slot is another batch's from now on
        if good.all() or self.processes > 1:  # parts of other sizes would have other numbers of collectives, and other weights
            return images, labels, chosen
        keep = torch.from_numpy(np.flatnonzero(good))
        there = keep.to(self.device)
        return images[there].contiguous(memory_format=torch.channels_last), labels[there], chosen[keep]

    def _readable(self, pool: Pool, slot: int, order: np.ndarray, epoch: int, i: int) -> tuple[int, np.ndarray]:
        """The slot with a batch's part and which of it can be read: the batch's own, or the spare one with what stands in."""
        good, at = self._tally.look(pool, slot), self._mine(i).start
        if good.any():
            return slot, good
        spare = pool.shape.slots - 1
        part = self.size // self.processes
        for step in range(part, min(len(order), SEARCH) + part, part):
            pool.submit(spare, np.take(order, np.arange(at + step, at + step + part), mode="wrap"), epoch)
            pool.wait(spare)
            good = self._tally.look(pool, spare, stands_in=True)
            if good.any():
                self._note(f"nothing of a batch's part could be read ({part} images); others of the epoch stood in for it")
                return spare, good
        raise self._tally.nothing(f"{min(part + step, len(order))} images in a row")


class EvaluationStream(Iterator[tuple[Tensor, Tensor]]):
    """`evaluation_stream`'s batches. left_out: why each unreadable image was; notes: what else there is to know, which `tell` is
    called with as it happens."""

    def __init__(self, work: Work, numbers: np.ndarray, batch: int, workers: int) -> None:
        self._tally = Tally(work.samples, 1.0, len(numbers), patience=len(numbers))
        self.notes: list[str] = []
        self.tell: Callable[[str], None] = _warn
        parts = [numbers[i : i + batch] for i in range(0, len(numbers), batch)]
        self._pool = _pool(work, batch, min(workers, max(1, len(numbers))), _weak(self._note))
        self._run = _in_order(self._pool, ((p, 0) for p in parts), partial(_as_they_are, self._pool, self._tally))

    @property
    def left_out(self) -> list[str]:
        return list(self._tally.reasons.values())

    def __next__(self) -> tuple[Tensor, Tensor]:
        try:
            while True:
                images, numbers = next(self._run)
                if len(numbers):
                    return images, numbers
        except BaseException:  # StopIteration too: there is nothing to wait for any more
            self.close()
            raise

    def close(self) -> None:
        """Ends the worker processes."""
        self._pool.close()

    def _note(self, text: str) -> None:
        self.notes.append(text)
        self.tell(text)


def _as_they_are(pool: Pool, tally: Tally, slot: int) -> tuple[Tensor, Tensor]:
    n, good = pool.count[slot], tally.look(pool, slot)
    numbers = torch.from_numpy(pool.ring.numbers[slot, :n][good])
    return torch.from_numpy(pool.ring.pixels[slot, :n][good]).permute(0, 3, 1, 2), numbers


def evaluation_stream(
    samples: Samples,
    preprocess: Preprocess,
    *,
    batch: int,
    workers: int,
    share: tuple[int, int] = (0, 1),
    numbers: np.ndarray | None = None,
    reference: bool = False,
) -> EvaluationStream:
    """Every sample once and in order, as (images (B, C, S, S) uint8 channels-last, numbers (B,) int64), in evaluation's geometry.

    numbers: which samples (default: all). share: (rank, processes); each takes a consecutive part, in which sizes differ by one
    at most. The last batch may be smaller, and so is one of which images can't be read: they are left out and listed. reference:
    decoded whole and resized by Pillow, bit for bit as images held in memory are; else by `data/jpeg.py`, which says how close that
    comes. Raises ValueError for counts that don't fit, DataError where nothing can be read, WorkerError where workers keep dying.
    """
    _check(samples, workers, share)
    if batch < 1:
        raise ValueError(f"evaluation_stream: expected a batch of at least 1, found {batch}")
    chosen = np.arange(len(samples)) if numbers is None else np.asarray(numbers, np.int64)
    rank, processes = share
    mine = chosen[rank * len(chosen) // processes : (rank + 1) * len(chosen) // processes]
    return EvaluationStream(Work(samples, preprocess, reference=reference), mine, max(1, min(batch, len(mine))), workers)


def _check(samples: Samples, workers: int, share: tuple[int, int]) -> None:
    if len(samples) < 1 or len(samples) != len(samples.labels):
        raise ValueError(f"expected at least one image and as many labels, found {len(samples)} and {len(samples.labels)}")
    if workers < 0:
        raise ValueError(f"--workers: expected a number from 0, found {workers}")
    if not 0 <= share[0] < share[1]:
        raise ValueError(f"share: expected (rank, processes) with a rank from 0 to below processes, found {share}")


def _pool(work: Work, part: int, workers: int, tell: Callable[[str], None]) -> Pool:
    """With slots for AHEAD batches, or for as many as keep all workers busy; one that is being used, and one to spare."""
    if said := missing():
        tell(said)
    ahead = max(AHEAD, -(-3 * CHUNK * workers // part)) if workers else 0
    return Pool(work, Shape(ahead + 2, part, work.preprocess.size, work.preprocess.channels, workers), tell)


def _in_order(pool: Pool, requests: Iterable[tuple[np.ndarray, int]], make: Callable[[int], T]) -> Iterator[T]:
    """What `make` makes of each request's slot, in order; later ones are worked on meanwhile. The last slot is left alone."""
    pool.cancel()
    turn, coming = pool.turn, iter(requests)
    free, waiting = deque(range(pool.shape.slots - 1)), deque[int]()

    def ahead() -> None:
        while free and (request := next(coming, None)) is not None:
            waiting.append(free.popleft())
            pool.submit(waiting[-1], *request)

    ahead()
    while waiting:
        if pool.turn != turn:
            raise RuntimeError("another epoch of these batches has begun, or they were closed")
        slot = waiting.popleft()
        pool.wait(slot)
        out = make(slot)
        free.append(slot)
        ahead()
        yield out


def _on(values: Tensor, device: torch.device) -> Tensor:
    """On the device, by way of pinned memory where that lets the copy run beside the computation."""
    if device.type != "cuda":
        return values.to(device)
    return torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values).to(device, non_blocking=True)


def _weak(method: Callable[[str], None]) -> Callable[[str], None]:
    """Calls the method but doesn't hold its object: a stream that nobody holds is freed at once, and its workers end."""
    ref = weakref.WeakMethod(method)

    def call(text: str) -> None:
        if (there := ref()) is not None:
            there(text)

    return call


def _warn(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=2)
