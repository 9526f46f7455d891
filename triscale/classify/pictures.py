"""The images that a classifier is trained and judged on: held in memory at the network's input size, or streamed from their files.

In memory are data sets that fit, where the recipe takes no random crops; a step then finds its images ready. All others are
decoded anew each time they are needed, by worker processes.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from triscale.data.datasets import ImageData, Listing, Splits, load, picture
from triscale.data.loader import Batches, Finish
from triscale.data.normalising import normalise
from triscale.data.samples import Samples
from triscale.data.sources import DataError, take
from triscale.data.stream import StreamedBatches, evaluation_stream
from triscale.data.transform import square
from triscale.recipe import Preprocess, Recipe
from triscale.train.loop import BatchSource

IN_MEMORY = 4 << 30  # bytes of decoded images above which they are streamed


@dataclass(frozen=True)
class Feeding:
    """How batches are made and where they go. workers: threads for images in memory, processes for streamed ones. broken_share: of
    streamed training images, above which it is an error that they can't be read."""

    workers: int = 0
    broken_share: float = 0.01
    share: tuple[int, int] = (0, 1)
    device: str = "cpu"


@dataclass(frozen=True)
class InMemory:
    """Decoded squares (N, C, S, S) uint8."""

    data: ImageData

    def __len__(self) -> int:
        return len(self.data)

    @property
    def labels(self) -> Tensor:
        return self.data.labels

    def left_out(self) -> tuple[str, ...]:
        return self.data.left_out

    def close(self) -> None:
        """There is nothing to end."""

    @property
    def notes(self) -> list[str]:
        return []

    def name(self, number: int) -> str:
        return self.data.names[number]

    def rows(self, numbers: Tensor) -> InMemory:
        d = self.data
        return InMemory(ImageData(d.images[numbers], d.labels[numbers], tuple(d.names[i] for i in numbers.tolist()), d.left_out))

    def batches(self, preprocess: Preprocess, recipe: Recipe, classes: int, feeding: Feeding) -> BatchSource:
        if recipe.crop_area:
            raise ValueError(
                f"crop_area {recipe.crop_area:g}: random crops are taken from the files, and these images are in memory; 0 goes with them"
            )
        d, f = self.data, feeding
        more: dict[str, Any] = {"names": d.names, "workers": f.workers, "share": f.share, "classes": classes, "device": f.device}
        return Batches(d.images, d.labels, preprocess, recipe, **more)

    def evaluation(self, preprocess: Preprocess, size: int, feeding: Feeding) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(self), size):
            part = self.data.images[start : start + size].to(feeding.device)
            yield normalise(part, preprocess), torch.arange(start, start + len(part))

    def pixels(self, number: int, preprocess: Preprocess) -> np.ndarray:
        return self.data.images[number].permute(1, 2, 0).numpy()


@dataclass
class Streamed:
    """Encoded images, decoded when they are needed. What is met in reading some of them is known to all that are taken from them:
    unreadable: why those were left out that could not be read so far; notes: what else there was."""

    samples: Samples
    unreadable: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    feeds: list[StreamedBatches] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.samples)

    @cached_property
    def labels(self) -> Tensor:
        return torch.from_numpy(np.asarray(self.samples.labels, np.int64))

    def left_out(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.unreadable, *(reason for feed in self.feeds for reason in feed.left_out))))

    def close(self) -> None:
        """Ends the processes that made batches."""
        while self.feeds:
            feed = self.feeds.pop()
            self.unreadable += feed.left_out
            feed.close()

    def name(self, number: int) -> str:
        return self.samples.name(number)

    def rows(self, numbers: Tensor) -> Streamed:
        return Streamed(take(self.samples, numbers.numpy()), self.unreadable, self.notes, self.feeds)

    def batches(self, preprocess: Preprocess, recipe: Recipe, classes: int, feeding: Feeding) -> BatchSource:
        f, finish = feeding, Finish(preprocess, recipe, classes)
        how: dict[str, Any] = {"workers": f.workers, "share": f.share, "device": f.device, "broken_share": f.broken_share}
        batches = StreamedBatches(self.samples, preprocess, recipe, finish=finish, **how)
        batches.tell = self.notes.append
        self.feeds.append(batches)
        return batches

    def evaluation(self, preprocess: Preprocess, size: int, feeding: Feeding) -> Iterator[tuple[Tensor, Tensor]]:
        stream = evaluation_stream(self.samples, preprocess, batch=size, workers=feeding.workers)
        stream.tell = self.notes.append
        try:
            for images, numbers in stream:
                yield normalise(images.to(feeding.device), preprocess), numbers
        finally:
            self.unreadable += [reason for reason in stream.left_out if reason not in self.unreadable]
            stream.close()

    def pixels(self, number: int, preprocess: Preprocess) -> np.ndarray:
        return square(picture(self.samples, number), preprocess)


Pictures = InMemory | Streamed


@dataclass(frozen=True)
class Data:
    """What is trained on and what is held out, with the class names that the labels index. held_out_is: where the latter come from."""

    train: Pictures
    held_out: Pictures
    classes: tuple[str, ...]
    held_out_is: str

    @property
    def streamed(self) -> bool:
        return isinstance(self.train, Streamed)

    def left_out(self) -> tuple[str, ...]:
        """Why each image that could not be read was left out, as far as they have been read."""
        return (*self.train.left_out(), *self.held_out.left_out())

    def share(self, everyones: Callable[[list[str]], list[str]]) -> None:
        """Every process then knows what any of them could not read. everyones: joins their texts."""
        for part in (self.train, self.held_out):
            if isinstance(part, Streamed):
                part.notes[:] = everyones(part.notes)
                part.unreadable[:] = everyones(list(part.left_out()))

    def close(self) -> None:
        """Ends what reads the images ahead."""
        self.train.close()
        self.held_out.close()

    @staticmethod
    def of(splits: Splits | Data) -> Data:
        if isinstance(splits, Data):
            return splits
        return Data(InMemory(splits.train), InMemory(splits.held_out), splits.classes, splits.held_out_is)

    def check_labels(self) -> None:
        """Raises ValueError for a label that no class has, with its file."""
        for part in (self.train, self.held_out):
            wrong = ((part.labels < 0) | (part.labels >= len(self.classes))).nonzero()
            if len(wrong):
                i = int(wrong[0])
                expected = f"expected 0 to {len(self.classes) - 1} ({len(wrong)} such images)"
                raise ValueError(f"{part.name(i)}: label {int(part.labels[i])}, {expected}")

    def without_minival(self, share: float) -> tuple[Data, Pictures]:
        """This, its training images less a fixed random share of them, and that share: at least one image."""
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(0))
        count = min(len(self.train) - 1, max(1, round(share * len(self.train))))
        rest, chosen = (self.train.rows(numbers.sort().values) for numbers in (order[count:], order[:count]))
        return replace(self, train=rest), chosen

    def fingerprint(self) -> dict[str, Any]:
        """What tells one data set from another: counts, and a sum over the names and labels of all images."""
        check, both = 0, (self.train, self.held_out)
        for i, part in enumerate(both):
            for start in range(0, len(part), 4096):
                numbers = range(start, min(start + 4096, len(part)))
                lines = [f"{part.name(n)}\t{label}" for n, label in zip(numbers, part.labels[start : start + 4096].tolist(), strict=True)]
                text = ("\n" if i or start else "") + "\n".join(lines)
                check = zlib.crc32(text.encode(errors="surrogateescape"), check)
        return {"train": len(self.train), "held_out": len(self.held_out), "files": f"{check:08x}"}


def prepare(
    listing: Listing,
    preprocess: Preprocess,
    recipe: Recipe,
    *,
    stream: bool | None = None,
    broken_share: float = 1.0,
    progress: Callable[[int, int], None] | None = None,
) -> Data:
    """A data set's images as this training needs them. stream: true for no images in memory, none for what fits.
    broken_share: of images to be held in memory, above which it is an error that they can't be read.

    Raises DataError, among others where stream is false and they don't fit.
    """
    size = (len(listing.train) + len(listing.held_out)) * preprocess.channels * preprocess.size**2
    if stream is None:
        stream = recipe.crop_area > 0 or size > IN_MEMORY
    elif not stream and recipe.crop_area:
        raise ValueError("--no-stream: random crops (--crop-area) are taken from the files; --crop-area 0 or streaming goes with them")
    if not stream:
        data = Data.of(load(listing, preprocess, progress))
        left_out, total = data.left_out(), len(listing.train) + len(listing.held_out)
        if len(left_out) > broken_share * total:
            share = f"{len(left_out)} of {total} images can't be read, more than {100 * broken_share:g} %"
            raise DataError(f"{share}; the first: {left_out[0]}. --broken-share allows more")
        return data
    return Data(Streamed(listing.train), Streamed(listing.held_out), listing.classes, listing.held_out_is)


def preprocess_for(size: int, channels: int) -> Preprocess:
    """The official evaluation crop from 96 px on; smaller images are taken whole. Grey images: mean and std one half."""
    padding = 32 if size >= 96 else 0
    return Preprocess(size, padding) if channels == 3 else Preprocess(size, padding, mean=(127.5,), std=(127.5,))
