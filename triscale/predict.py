"""Files in, classes out. A file that can't be read is reported by name, and the rest goes on."""

from __future__ import annotations

import glob
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from triscale.data.decode import IMAGE_SUFFIXES, BadImage, decode
from triscale.data.fast import evaluate_into
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
    """The files named, of each folder the images in it, at any depth, sorted, and what a pattern (*, ?, []) matches, sorted.

    Missing files are left in: reading says so.
    """
    out: list[str] = []
    for path in paths:
        if Path(path).is_dir():
            out += [str(p) for p in sorted(Path(path).rglob("*")) if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file()]
        elif glob.has_magic(path) and not os.path.exists(path):
            found = sorted(glob.glob(path, recursive=True))
            out += image_files(found) if found else [path]
        else:
            out.append(path)
    return out


def logits_of_files(
    files: Sequence[str],
    logits_of: Callable[[Tensor], Tensor],
    preprocess: Preprocess,
    *,
    batch_size: int = 16,
    workers: int | None = None,
    reference: bool = False,
) -> Iterator[tuple[str, Tensor | str]]:
    """(file, logits (classes,) float32) for each file, in order; (file, reason) where it can't be read.

    logits_of: any callable from (N, C, S, S) float32, channels-last, to logits (N, classes). workers: threads that each
    decode, transform and classify a batch, with torch's own threads shared out among them, so that no core waits for
    another; `logits_of` is then called from several threads at once. None: one for each of torch's threads. reference: the
    reference transform instead of the fast one. Raises ValueError where logits have another shape.
    """
    threads = torch.get_num_threads()
    workers = max(1, min(workers or threads, len(files)))
    size = max(1, min(batch_size, -(-len(files) // workers)))
    chunks = [files[start : start + size] for start in range(0, len(files), size)]
    if workers == 1:
        for chunk in chunks:
            yield from _classify(chunk, logits_of, preprocess, reference)
        return
    share = max(1, threads // workers)
    waiting: deque[Future[list[tuple[str, Tensor | str]]]] = deque()
    pool = ThreadPoolExecutor(workers, "predict", initializer=torch.set_num_threads, initargs=(share,))
    try:
        for chunk in chunks:
            waiting.append(pool.submit(_classify, chunk, logits_of, preprocess, reference))
            if len(waiting) > 2 * workers:  # what has been read ahead is bounded
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def _classify(files: Sequence[str], logits_of: Callable[[Tensor], Tensor], preprocess: Preprocess, reference: bool) -> list[tuple[str, Tensor | str]]:
    batch = torch.empty(len(files), preprocess.size, preprocess.size, preprocess.channels)
    reasons: dict[int, str] = {}
    good = 0
    for i, file in enumerate(files):
        try:
            image = decode(file)
            if reference:
                batch[good] = torch.from_numpy(evaluate_transform(image, preprocess)).permute(1, 2, 0)
            else:
                evaluate_into(batch[good], image, preprocess)
        except BadImage as error:
            reasons[i] = str(error) if str(error).startswith(file) else f"{file}: {error}"
            continue
        good += 1
    rows: Iterator[Tensor] = iter(())
    if good:
        with torch.inference_mode():
            logits = logits_of(batch[:good].permute(0, 3, 1, 2))
        if logits.ndim != 2 or len(logits) != good:
            raise ValueError(f"predict: expected logits ({good}, classes), found {tuple(logits.shape)}")
        rows = iter(logits.float().cpu())
    return [(file, reasons[i] if i in reasons else next(rows)) for i, file in enumerate(files)]


def predict_files(
    files: Sequence[str],
    logits_of: Callable[[Tensor], Tensor],
    preprocess: Preprocess,
    classes: Sequence[str],
    *,
    top: int = 5,
    batch_size: int = 16,
    workers: int | None = None,
) -> Iterator[Prediction | Failure]:
    """One result per file, in the order of `files`; see `logits_of_files`.

    Raises ValueError where the network gives another number of classes than there are names.
    """
    for file, row in logits_of_files(files, logits_of, preprocess, batch_size=batch_size, workers=workers):
        if isinstance(row, str):
            yield Failure(file, row)
            continue
        if len(row) != len(classes):
            raise ValueError(f"predict: expected logits of {len(classes)} classes, found {len(row)}")
        if not bool(row.isfinite().all()):
            yield Failure(file, f"{file}: the network's output is not finite; its weights are broken")
            continue
        values, indices = row.softmax(0).topk(min(top, len(classes)))
        yield Prediction(file, tuple((classes[i], p) for i, p in zip(indices.tolist(), values.tolist(), strict=True)))
