"""Exact evaluation: every image once, none dropped, also where several processes share the work."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")
UNLABELLED = -1
KEPT = 5  # classes kept of each image
PATIENCE = timedelta(hours=12)  # a process whose images are slower is waited for this long


def predict_logits(net: nn.Module, batches: Iterable[Tensor]) -> Tensor:
    """Logits (N, classes) float32 on the CPU, in order, of batches (B, C, S, S) that are ready for the network."""
    device = next(net.parameters()).device
    was_training = net.training
    net.eval()
    with torch.no_grad():
        parts = [net(batch.to(device)).float().cpu() for batch in batches]
    net.train(was_training)
    return torch.cat(parts)


def top_k_accuracy(logits: Tensor, labels: Tensor, k: int = 1) -> float:
    """Share of rows whose label is among the k largest logits."""
    return logits.topk(min(k, logits.shape[1]), dim=1).indices.eq(labels[:, None]).any(1).float().mean().item()


class Row(NamedTuple):
    """What a network said of one image: its KEPT best classes from the top, none where an output is not finite.

    label: the right class, or UNLABELLED. probability: softmax of the best class, 0 where there is none.
    """

    label: int
    top: tuple[int, ...]
    probability: float


class Scores:
    """Rows by image number, and the counts that follow from them: integers, so that shards add up to the whole exactly.

    An image is counted once however often it is added, as by a sampler that pads its shards to equal length. Where two
    additions of an image differ (batches of other sizes round differently), the smaller Row stays, so that neither order
    nor grouping of additions and merges matters.
    """

    def __init__(self, classes: int) -> None:
        self.classes = classes
        self.rows: dict[int, Row] = {}

    def add(self, numbers: Sequence[int], logits: Tensor, labels: Sequence[int]) -> None:
        """numbers, labels: B image numbers and right classes (or UNLABELLED); logits: (B, classes) floating point.

        Ties are broken as torch.topk does. A row with a NaN or an infinity has no best classes: it is counted as wrong, and
        `broken` counts it. Raises ValueError for another shape, a label outside 0..classes - 1, or two labels of one image.
        """
        if logits.shape != (len(numbers), self.classes) or len(labels) != len(numbers):
            raise ValueError(f"scores: expected logits {(len(numbers), self.classes)}, found {tuple(logits.shape)} and {len(labels)} labels")
        logits = logits.detach().float().cpu()
        finite = logits.isfinite().all(1).tolist()
        top = logits.topk(min(KEPT, self.classes), dim=1).indices
        best = logits.softmax(1).gather(1, top[:, :1]).flatten().tolist()
        for number, label, good, classes, p in zip(numbers, labels, finite, top.tolist(), best, strict=True):
            if not UNLABELLED <= label < self.classes:
                raise ValueError(f"scores: expected labels from 0 to {self.classes - 1}, found {label}")
            self._put(number, Row(label, tuple(classes), p) if good else Row(label, (), 0.0))

    def merge(self, other: Scores) -> Scores:
        """Both together, as a new object. Raises ValueError where the numbers of classes or two labels of an image differ."""
        if self.classes != other.classes:
            raise ValueError(f"scores: expected {self.classes} classes, found {other.classes}")
        both = Scores(self.classes)
        both.rows = dict(self.rows)
        for number, row in other.rows.items():
            both._put(number, row)
        return both

    def _put(self, number: int, row: Row) -> None:
        there = self.rows.setdefault(number, row)
        if there.label != row.label:
            raise ValueError(f"scores: image {number} has two labels, {there.label} and {row.label}")
        self.rows[number] = min(there, row)

    def _labelled(self) -> Iterator[Row]:
        return (row for row in self.rows.values() if row.label != UNLABELLED)

    @property
    def images(self) -> int:
        return len(self.rows)

    @property
    def labelled(self) -> int:
        return sum(1 for _ in self._labelled())

    @property
    def broken(self) -> int:
        """Images whose outputs were not finite."""
        return sum(1 for row in self.rows.values() if not row.top)

    def right(self, k: int = 1) -> int:
        """Labelled images whose label is among the k best classes. k: 1 to KEPT."""
        if not 1 <= k <= KEPT:
            raise ValueError(f"scores: expected k from 1 to {KEPT}, found {k}")
        return sum(row.label in row.top[:k] for row in self._labelled())

    def accuracy(self, k: int = 1) -> float:
        """right(k) as a share of the labelled images, 0..1; NaN without any."""
        return self.right(k) / self.labelled if self.labelled else math.nan

    def per_class(self) -> list[tuple[int, int]]:
        """(images right at top-1, images) of each class."""
        total = Counter(row.label for row in self._labelled())
        right = Counter(row.label for row in self._labelled() if row.top[:1] == (row.label,))
        return [(right[c], total[c]) for c in range(self.classes)]

    def mean_per_class(self) -> float:
        """Mean over the classes that have images of their top-1 accuracy, 0..1; NaN without any."""
        shares = [right / total for right, total in self.per_class() if total]
        return math.fsum(shares) / len(shares) if shares else math.nan

    def pairs(self) -> Counter[tuple[int, int]]:
        """Images by (right class, best class): the confusion matrix without its zeros. Broken rows are in none."""
        return Counter((row.label, row.top[0]) for row in self._labelled() if row.top)

    def confusion(self) -> Tensor:
        """(classes, classes) int64: rows are the right class, columns the best class. Its sum is labelled - broken."""
        matrix = torch.zeros(self.classes, self.classes, dtype=torch.int64)
        for pair, count in self.pairs().items():
            matrix[pair] = count
        return matrix

    def confused(self, limit: int) -> list[tuple[int, int, int]]:
        """(right class, best class, images) of the pairs of two classes, the most frequent first, then by number."""
        wrong = [(true, said, n) for (true, said), n in self.pairs().items() if true != said]
        return sorted(wrong, key=lambda pair: (-pair[2], pair[:2]))[:limit]

    def right_among(self, allowed: Mapping[int, Collection[int]]) -> tuple[int, int]:
        """(right, counted) where an image number may have several right classes; numbers without one aren't counted.

        Source: ReaL accuracy, Beyer et al. 2020, arXiv 2006.07159.
        """
        counted = [(row, allowed[number]) for number, row in self.rows.items() if allowed.get(number)]
        return sum(bool(row.top) and row.top[0] in good for row, good in counted), len(counted)


def wilson(right: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a share (z: 95 %), 0..1; (0, 1) of nothing. Source: Wilson 1927, JASA 22."""
    if not total:
        return 0.0, 1.0
    p, square = right / total, z * z / total
    centre, half = p + square / 2, z * math.sqrt(p * (1 - p) / total + square / (4 * total))
    return max(0.0, (centre - half) / (1 + square)), min(1.0, (centre + half) / (1 + square))


def whole_batches(images: int, batch: int, share: tuple[int, int] = (0, 1)) -> range:
    """The image numbers of a process's part: consecutive, of whole batches, so that every image is in the batch, and gets the output,
    that it has in a single process. share: (rank, processes); parts differ by one batch at most, and where there are fewer batches
    than processes some are empty."""
    (rank, count), batches = share, -(-images // batch)
    first, end = (r * batches // count * batch for r in (rank, rank + 1))
    return range(min(first, images), min(end, images))


@contextmanager
def processes() -> Iterator[tuple[int, int]]:
    """(this process's rank, number of processes), joined by gloo where torchrun's RANK and WORLD_SIZE say that there are several."""
    world = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1
    if world < 2:
        yield 0, 1
        return
    dist.init_process_group("gloo", timeout=PATIENCE)
    try:
        yield dist.get_rank(), world
    finally:
        dist.destroy_process_group()


def gather(part: T) -> list[T]:
    """The `part` of every process in the order of their ranks, in every process; [part] where there is one process."""
    if not (dist.is_available() and dist.is_initialized()):
        return [part]
    parts: list[T | None] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, part)
    return [p for p in parts if p is not None]
