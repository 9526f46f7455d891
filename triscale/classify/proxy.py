"""What scores a network in a search: a short training on a part of the training images, judged on the rest of them.

The held-out images of the data set take no part: a search that chose by them would have seen them. What is heavy is loaded at the
first call in a process and kept there, so a `ProxyScore` is small and can be sent to other processes.
"""

from __future__ import annotations

import hashlib
import threading
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from triscale.architecture import Arch
from triscale.classify.events import Evaluated
from triscale.classify.pictures import Data, InMemory, Streamed, prepare, preprocess_for
from triscale.classify.run import train_classifier
from triscale.data.datasets import Listing, find, picture
from triscale.data.decode import BadImage
from triscale.data.normalising import normalise
from triscale.data.sources import DataError, take
from triscale.data.transform import square
from triscale.recipe import Preprocess, Recipe
from triscale.recipes import named
from triscale.text import printable
from triscale.train.plan import Plan

KEPT = 1 << 30  # bytes of images, of as many resolutions as fit, that stay in memory
PROBED = 64  # images of a part whose contents are looked at to tell data sets apart
SHOWN_WHOLE = ("digits", "cifar10", "cifar100")  # pictures so small that no evaluation crops them, whatever the input size


@dataclass(frozen=True)
class ProxyScore:
    """Called with a network it trains that by `recipe` at the network's resolution and yields the accuracy after each epoch, 0..1.

    The last value is the score. data, data_dir: what `find` takes. share: of the training images of each class that the accuracy
    is measured on, and nothing is trained on: at least one image and never all; a class of one image is trained on. It depends
    on nothing but the data and the share. threads: torch's in this process, set at the call; 0 leaves them. device: one of
    torch's, or auto: cuda where there is one. A recipe's minival takes no part.

    The same network gives the same values on the same machine with as many threads. Raises what `find`, `prepare` and
    `train_classifier` raise; images that can't be read are left out, with one warning a process.
    """

    data: str
    data_dir: str | None = None
    recipe: Recipe = field(default_factory=lambda: named("proxy"))
    share: float = 0.2
    threads: int = 0
    device: str = "cpu"
    crop_padding: int | None = None
    """Of evaluation: as `triscale train` has it unless given: 32 from 96 px on, 0 below and for cifar and digits."""

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"ProxyScore.share: expected a number between 0 and 1, found {self.share!r}")
        if type(self.threads) is not int or self.threads < 0:
            raise ValueError(f"ProxyScore.threads: expected a whole number from 0, found {self.threads!r}")

    def __call__(self, arch: Arch) -> Iterator[float]:
        if self.threads and torch.get_num_threads() != self.threads:
            torch.set_num_threads(self.threads)
        preprocess = self.preprocess(arch.resolution)
        data = self.images(arch.resolution)
        try:
            for event in train_classifier(data, arch, preprocess, self.recipe, plan=Plan(self._device), broken_share=1.0):
                if isinstance(event, Evaluated):
                    yield event.top1
        finally:
            data.close()
            _tell_once(self.data, data.left_out())

    @property
    def steps(self) -> int:
        """How many values a whole score has."""
        return self.recipe.epochs

    @property
    def classes(self) -> tuple[str, ...]:
        return self._listing.classes

    @property
    def channels(self) -> int:
        """Of the network's input: 1 for digits, which are grey, else 3."""
        return 1 if self.data == "digits" else 3

    @property
    def scored_images(self) -> int:
        return len(self._listing.held_out)

    @property
    def trained_images(self) -> int:
        return len(self._listing.train)

    def preprocess(self, resolution: int) -> Preprocess:
        usual = preprocess_for(resolution, self.channels)
        padding = self.crop_padding if self.crop_padding is not None else 0 if self.data in SHOWN_WHOLE else usual.crop_padding
        return replace(usual, crop_padding=padding)

    def images(self, resolution: int) -> Data:
        """What is trained on, and in place of the held-out images what the accuracy is measured on."""
        listed, preprocess = self._listing, self.preprocess(resolution)
        key = (self.data, self.data_dir, self.share, preprocess, self.recipe.crop_area > 0)
        with _lock:
            if key not in _kept:
                coming = (len(listed.train) + len(listed.held_out)) * preprocess.channels * preprocess.size**2
                while _kept and coming + sum(map(_bytes, _kept.values())) > KEPT:  # before the new ones are read
                    _kept.popitem(last=False)
                _kept[key] = prepare(listed, preprocess, self.recipe)
            _kept.move_to_end(key)
            return _kept[key]

    def batch(self, resolution: int, n: int = 64) -> Tensor:
        """(n, C, S, S) float32, normalised, of different training images drawn under the recipe's seed; fewer where there are fewer.
        None of those that are scored is among them. For scores without training, which need no more."""
        return _batch(self.data, self.data_dir, self.share, self.preprocess(resolution), self.recipe.seed, n)

    def fingerprint(self) -> dict[str, Any]:
        """What a score depends on beside the network: for the key of a cache. The data by names and labels, and by the contents of some
        images; not the threads and the machine, which change the last bits of what is computed."""
        return {
            "score": "proxy",
            "data": dict(_fingerprint(self.data, self.data_dir, self.share)),
            "contents": _contents(self.data, self.data_dir, self.share),
            "classes": list(self.classes),
            "share": self.share,
            "recipe": self.recipe.to_dict(),
            "seed": self.recipe.seed,
            "channels": self.channels,
            "crop_padding": self.preprocess(96).crop_padding,  # 96: where the rules differ
            "device": torch.device(self._device).type,  # bfloat16 on some
        }

    @property
    def _device(self) -> str:
        return ("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device

    @property
    def _listing(self) -> Listing:
        return _listing(self.data, self.data_dir, self.share)


_lock = threading.Lock()
_kept: OrderedDict[tuple[Any, ...], Data] = OrderedDict()
_told: set[str] = set()


def _bytes(data: Data) -> int:
    """Of the images that are held in memory."""
    return sum(part.data.images.nbytes for part in (data.train, data.held_out) if isinstance(part, InMemory))


@cache
def _listing(data: str, data_dir: str | None, share: float) -> Listing:
    """The training images of a data set: those that are scored stand where the held-out ones stood."""
    whole = find(data, data_dir)
    numbers = scored(whole.train.labels, share)
    if not len(numbers):
        raise DataError(f"{data}: one image a class to train on; a score needs at least two, one of them to measure the accuracy on")
    rest = np.setdiff1d(np.arange(len(whole.train)), numbers)
    return whole._replace(
        train=take(whole.train, rest), held_out=take(whole.train, numbers), held_out_is=f"{share:g} of the training images of each class"
    )


def scored(labels: np.ndarray, share: float) -> np.ndarray:
    """The numbers, rising, of `share` of the images of each class: at least one and never all, drawn by a generator of fixed seed."""
    generator, out = np.random.default_rng(0), [np.empty(0, np.int64)]
    order = np.argsort(labels, kind="stable")
    for mine in np.split(order, np.flatnonzero(np.diff(labels[order])) + 1):
        count = min(len(mine) - 1, max(1, round(share * len(mine))))
        out.append(generator.permutation(mine)[:count])
    return np.sort(np.concatenate(out))


@cache
def _fingerprint(data: str, data_dir: str | None, share: float) -> dict[str, Any]:
    listing = _listing(data, data_dir, share)
    return Data(Streamed(listing.train), Streamed(listing.held_out), listing.classes, listing.held_out_is).fingerprint()


@cache
def _contents(data: str, data_dir: str | None, share: float) -> str:
    """A sum over the encoded images, of many those at PROBED even places of each part: what tells sets with the same names apart."""
    listing, check = _listing(data, data_dir, share), hashlib.sha256()
    for part in (listing.train, listing.held_out):
        for number in range(0, len(part), max(1, len(part) // PROBED)):
            try:
                read = part.read(number)
            except OSError:
                continue
            check.update(read if isinstance(read, bytes) else np.ascontiguousarray(read).tobytes())
    return check.hexdigest()[:16]


@lru_cache(2)
def _batch(data: str, data_dir: str | None, share: float, preprocess: Preprocess, seed: int, n: int) -> Tensor:
    samples = _listing(data, data_dir, share).train
    squares: list[np.ndarray] = []
    seen: set[bytes] = set()
    broken: list[str] = []
    for number in np.random.default_rng(seed).permutation(len(samples)).tolist():
        if len(squares) == n:
            break
        try:
            pixels = square(picture(samples, number), preprocess)
        except BadImage as error:
            broken.append(str(error))
            continue
        if (key := pixels.tobytes()) not in seen:  # two equal ones would make NASWOT's kernel singular for every network
            seen.add(key)
            squares.append(pixels)
    _tell_once(data, tuple(broken))
    if not squares:
        raise DataError(f"{data}: none of the images to train on can be read; the first: {broken[0]}")
    return normalise(torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2), preprocess)


def _tell_once(data: str, left_out: tuple[str, ...]) -> None:
    if left_out and data not in _told:
        _told.add(data)
        warnings.warn(f"{printable(data)}: {len(left_out)} images can't be read and are left out; the first: {left_out[0]}", stacklevel=3)
