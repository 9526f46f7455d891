"""The pictures, decoded once for all processes: uint8 arrays in one folder, mapped into memory, resized once a resolution."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from triscale.data.datasets import find, load
from triscale.recipe import Preprocess

SIDE = 32  # of CIFAR-10's pictures


class Images(NamedTuple):
    """images (N, 3, S, S) uint8 and labels (N,) int64 of both splits, on one device."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor


def unpack(data_dir: str, folder: Path, train_images: int = 0, test_images: int = 0) -> tuple[str, ...]:
    """Decodes CIFAR-10, or a folder of class folders, into `folder`; returns the classes. Raises DataError.

    train_images, test_images: of each split at most, the first ones of a fixed shuffle; 0 for all.
    """
    named = not (Path(data_dir) / "train").is_dir()
    splits = load(find("cifar10", data_dir) if named else find(data_dir), Preprocess(SIDE, 0))
    for name, part, most in (("train", splits.train, train_images), ("test", splits.held_out, test_images)):
        order = torch.randperm(len(part), generator=torch.Generator().manual_seed(0))[: most or len(part)]
        np.save(folder / f"{name}.npy", part.images[order].numpy())
        np.save(folder / f"{name}-labels.npy", part.labels[order].numpy())
    return splits.classes


def _resized(images: np.ndarray, size: int, device: str) -> Tensor:
    """Bicubic, antialiased, rounded to uint8. On the CPU, so that every device is fed the same pixels."""
    parts = []
    for start in range(0, len(images), 1000):
        part = torch.from_numpy(np.array(images[start : start + 1000]))
        parts.append(part if size == SIDE else F.interpolate(part, (size, size), mode="bicubic", antialias=True))
    return torch.cat(parts).to(device)


@lru_cache(maxsize=1)
def resized(folder: Path, size: int, device: str) -> Images:
    """Both splits at size x size; those of the last size asked for are kept."""
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("train", "train-labels", "test", "test-labels")}
    train, test = (_resized(arrays[name], size, device) for name in ("train", "test"))
    labels = (torch.from_numpy(np.array(arrays[name])) for name in ("train-labels", "test-labels"))
    return Images(train, next(labels).to(device), test, next(labels).to(device))
