"""Files in, classes out. A file that can't be read is reported by name, and the rest goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from triscale.data.decode import IMAGE_SUFFIXES, BadImage, decode
from triscale.data.transform import evaluate_transform
from triscale.recipe import Preprocess


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of one file, (class name, probability) from the top."""

    file: str
    top: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Failure:
    """A file that was not classified, and why (one line that names it)."""

    file: str
    reason: str


def image_files(paths: Iterable[str]) -> list[str]:
    """The files named, and of each folder the images in it, at any depth, sorted. Missing files are left in: reading says so."""
    out: list[str] = []
    for path in paths:
        if Path(path).is_dir():
            out += [str(p) for p in sorted(Path(path).rglob("*")) if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file()]
        else:
            out.append(path)
    return out


def predict_files(
    files: Sequence[str], logits_of: Callable[[Tensor], Tensor], preprocess: Preprocess, classes: Sequence[str], *, top: int = 5, batch_size: int = 32
) -> Iterator[Prediction | Failure]:
    """One result per file, in the order of `files`.

    logits_of: any callable from (N, C, S, S) float32, channels-last, to logits (N, classes). Raises ValueError where it
    gives another number of classes than there are names.
    """
    for start in range(0, len(files), batch_size):
        chunk = files[start : start + batch_size]
        read = [_read(file, preprocess) for file in chunk]
        good = [x for x in read if isinstance(x, np.ndarray)]
        rows = iter(_probabilities(good, logits_of, len(classes)))
        for file, result in zip(chunk, read, strict=True):
            if isinstance(result, str):
                yield Failure(file, result)
            else:
                row = next(rows)
                if not bool(row.isfinite().all()):
                    yield Failure(file, f"{file}: the network's output is not finite; its weights are broken")
                    continue
                values, indices = row.topk(min(top, len(classes)))
                yield Prediction(file, tuple((classes[i], p) for i, p in zip(indices.tolist(), values.tolist(), strict=True)))


def _read(file: str, preprocess: Preprocess) -> np.ndarray | str:
    try:
        return evaluate_transform(decode(file), preprocess)
    except BadImage as error:
        return str(error)


def _probabilities(images: list[np.ndarray], logits_of: Callable[[Tensor], Tensor], classes: int) -> Iterable[Tensor]:
    if not images:
        return []
    x = torch.from_numpy(np.stack(images)).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        logits = logits_of(x)
    if logits.shape != (len(images), classes):
        raise ValueError(f"predict: expected logits {(len(images), classes)}, found {tuple(logits.shape)}")
    return list(logits.float().softmax(1))
