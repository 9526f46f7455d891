"""What is done to one sample of a stream, and the memory that it is done in. Without torch: worker processes import this.

A ring has slots; a slot holds one batch's part: numbers in, squares of pixels out, and what became of each sample.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from triscale.data.decode import BadImage
from triscale.data.jpeg import TRIES, RandomCrop, read_square
from triscale.data.samples import Samples
from triscale.recipe import Preprocess

PENDING, GOOD, BROKEN, FAILED = range(4)  # of a sample: broken is the data's fault, failed is ours
REASON = 240  # bytes of a reason
_LOW = (1 << 64) - 1
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_11, _27, _30, _31 = (np.uint64(n) for n in (11, 27, 30, 31))
_STEPS = np.arange(1, 4 * TRIES + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)


class Shape(NamedTuple):
    """Of a ring: slots, samples a slot, pixels a side, channels, worker processes."""

    slots: int
    part: int
    size: int
    channels: int
    workers: int


class Ring:
    """Arrays over one block of memory, zeros at first.

    pixels (slots, part, S, S, C) uint8; numbers, status, reasons (slots, part); epochs (slots,). generation (1,): tasks of an
    earlier one are void. current, since (workers,): the sample that a worker is at, -1 for none, and the monotonic clock's
    time when it began.
    """

    def __init__(self, shape: Shape, memory: mmap.mmap | None = None) -> None:
        slots, part, size, channels, workers = self.shape = shape
        block = memory if memory is not None else mmap.mmap(-1, ring_bytes(shape))
        self._block, self._at = block, 0
        self.pixels = self._array(np.uint8, slots, part, size, size, channels)
        self.numbers = self._array(np.int64, slots, part)
        self.status = self._array(np.uint8, slots, part)
        self.reasons = self._array(f"S{REASON}", slots, part)
        self.epochs = self._array(np.int64, slots)
        self.generation = self._array(np.int64, 1)
        self.current = self._array(np.int64, max(1, workers))
        self.since = self._array(np.float64, max(1, workers))

    def _array(self, kind: type | str, *shape: int) -> np.ndarray:
        array: np.ndarray = np.ndarray(shape, kind, self._block, self._at)
        self._at += -(-array.nbytes // 64) * 64  # each from a cache line of its own
        return array


def ring_bytes(shape: Shape) -> int:
    slots, part, size, channels, workers = shape
    return slots * part * (size * size * channels + 8 + 1 + REASON) + 8 * slots + 16 * max(1, workers) + 8 + 64 * 8


@dataclass(frozen=True)
class Work:
    """From a sample's number to a square of pixels. crop_area: the smallest share of a random crop; 0: evaluation's geometry.

    reference: by the slow path that `data/jpeg.py` is compared to.
    """

    samples: Samples
    preprocess: Preprocess
    crop_area: float = 0.0
    seed: int = 0
    reference: bool = False

    def fill(self, out: np.ndarray, number: int, epoch: int) -> None:
        """Writes sample `number` as epoch `epoch` sees it to out, (S, S, C) uint8. Raises BadImage, OSError or ValueError."""
        data = self.samples.read(number)
        box = RandomCrop(self.crop_area, crop_numbers(self.seed, epoch, number)) if self.crop_area else self.preprocess
        try:
            read_square(data, out, box, reference=self.reference)
        except BadImage:  # once more for its name: to ask for it each time would take as long as to parse the header
            read_square(data, out, box, name=self.samples.name(number), reference=self.reference)


def do(work: Work, ring: Ring, worker: int, task: Sequence[int]) -> None:
    """A task's samples, those done already left alone; task: (generation, slot, first sample of the slot, count)."""
    generation, slot, first, count = task
    numbers, status, epoch = ring.numbers[slot], ring.status[slot], int(ring.epochs[slot])
    for i in range(first, first + count):
        if status[i] != PENDING:
            continue
        if ring.generation[0] != generation:
            break
        number = int(numbers[i])
        ring.since[worker], ring.current[worker] = time.monotonic(), number
        try:
            work.fill(ring.pixels[slot, i], number, epoch)
            status[i] = GOOD
        except (OSError, ValueError) as error:  # BadImage is a ValueError, so are a Parquet file's complaints
            mark(ring, slot, i, BROKEN, reason(work.samples, number, error))
        except Exception as error:
            mark(ring, slot, i, FAILED, f"{work.samples.name(number)}: {type(error).__name__}: {error}")
    ring.current[worker] = -1


def mark(ring: Ring, slot: int, i: int, status: int, why: str) -> None:
    """The reason first: who sees the status can read it."""
    ring.reasons[slot, i] = why.encode("utf-8", "replace")[:REASON]
    ring.status[slot, i] = status


def reason(samples: Samples, number: int, error: Exception) -> str:
    """One line that names the sample."""
    name = samples.name(number)
    if isinstance(error, BadImage):
        text = str(error)
    elif isinstance(error, OSError) and error.strerror:
        text = f"cannot be read ({error.strerror})"
    else:
        text = " ".join(str(error).split()) or type(error).__name__
    return text if name in text else f"{name}: {text}"


def crop_numbers(seed: int, epoch: int, number: int) -> np.ndarray:
    """(10, 4) float64 from [0, 1) for RandomCrop: by counter, so that whoever draws them gets the same.

    splitmix64 (Steele, Lea, Flood 2014), its state by the three numbers in turn.
    """
    state = 0
    for part in (seed, epoch, number):
        state = _mix(state ^ part & _LOW)
    x = _STEPS + np.uint64(state)  # `_mix` of 40 numbers at once; _STEPS has its first line
    x = (x ^ (x >> _30)) * _FIRST
    x = (x ^ (x >> _27)) * _SECOND
    return ((x ^ (x >> _31)) >> _11).reshape(TRIES, 4) * 2.0**-53


def _mix(x: int) -> int:
    x = x + 0x9E3779B97F4A7C15 & _LOW
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _LOW
    x = (x ^ x >> 27) * 0x94D049BB133111EB & _LOW
    return x ^ x >> 31
