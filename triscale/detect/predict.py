"""Image files in, boxes out. A file that can't be read is reported by name, and the rest goes on."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from triscale.data.decode import BadImage, decode
from triscale.detect.boxes import Detections
from triscale.detect.geometry import Frame, back, evaluation_frame, pixels
from triscale.detect.model_file import DetectorCard
from triscale.detect.retinanet import Detector
from triscale.detect.views import normalised
from triscale.recipe import Preprocess
from triscale.text import printable


@dataclass(frozen=True, eq=False)
class Found:
    """One picture's boxes (n, 4) float32, x1, y1, x2, y2 in its pixels, upright, cut at its edge; scores (n,) from high to low;
    labels (n,) int64. height, width: the picture's."""

    file: str
    height: int
    width: int
    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray

    def rows(self, image_id: int, category_ids: Sequence[int]) -> list[dict[str, Any]]:
        """COCO results, bbox as x, y, width, height; `file_name` beside them, which COCO's tools pass over."""
        corners = self.boxes.astype(np.float64)
        boxes = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1).round(3).tolist()
        return [
            {"image_id": image_id, "file_name": self.file, "category_id": category_ids[label], "bbox": box, "score": round(score, 6)}
            for box, score, label in zip(boxes, self.scores.tolist(), self.labels.tolist(), strict=True)
        ]


@dataclass(frozen=True)
class Failure:
    """A file in which nothing could be looked for, and why (one line that names it)."""

    file: str
    reason: str


def detect_files(
    net: Detector, card: DetectorCard, files: Sequence[str], *, min_score: float | None = None, batch_size: int = 4, workers: int | None = None
) -> Generator[Found | Failure]:
    """What the detector finds in each file, in the order of `files`.

    Each picture is decoded upright, its longer side resized to card.preprocess.size, padded to a square, and the boxes found there
    brought back into the picture. net: in evaluation mode, run on the device that it is on. min_score: instead of that of its rules;
    boxes with this score or less are left out. workers: threads that each decode, fit and run a batch, with torch's own threads
    shared out among them, so that no core waits for another; as many as torch has unless given.

    Raises ValueError for a network in training mode, one that doesn't take RGB, and one with another number of classes than the card.
    """
    _check(net, card)
    if min_score is not None:
        net = copy.copy(net)  # shares the weights; the caller's keeps its rules
        net.rules = replace(net.rules, min_score=min_score)
    threads = torch.get_num_threads()
    workers = max(1, min(workers or threads, len(files)))
    size = max(1, min(batch_size, -(-len(files) // workers)))
    chunks = [files[start : start + size] for start in range(0, len(files), size)]
    if workers == 1:
        for chunk in chunks:
            yield from _detect(chunk, net, card.preprocess)
        return
    waiting: deque[Future[list[Found | Failure]]] = deque()
    pool = ThreadPoolExecutor(workers, "detect", torch.set_num_threads, (max(1, threads // workers),))
    try:
        for chunk in chunks:
            waiting.append(pool.submit(_detect, chunk, net, card.preprocess))
            if len(waiting) > 2 * workers:  # what is done ahead is bounded
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def _check(net: Detector, card: DetectorCard) -> None:
    if net.training:
        raise ValueError("detect_files: expected a network in evaluation mode, found one in training mode; call net.eval()")
    if (net.in_channels, card.preprocess.channels) != (3, 3):
        raise ValueError(f"detect_files: expected a network of RGB images, found one of {net.in_channels} channels")
    if net.num_classes != len(card.classes):
        raise ValueError(f"detect_files: expected a network of the card's {len(card.classes)} classes, found one of {net.num_classes}")


def _detect(files: Sequence[str], net: Detector, preprocess: Preprocess) -> list[Found | Failure]:
    """A batch. Pictures are let go of one by one: of each only its square is kept."""
    side = preprocess.size
    squares = torch.empty(len(files), side, side, 3, dtype=torch.uint8)
    frames: list[Frame] = []
    reasons: dict[int, str] = {}
    for i, file in enumerate(files):
        try:
            image = decode(file)
        except BadImage as error:
            reasons[i] = str(error)
            continue
        frame = evaluation_frame((image.shape[0], image.shape[1]), side)
        squares[len(frames)] = torch.from_numpy(pixels(image, frame))
        frames.append(frame)
    results = iter(_boxes(net, squares[: len(frames)].permute(0, 3, 1, 2), frames, preprocess) if frames else ())
    return [Failure(file, reasons[i]) if i in reasons else _result(file, *next(results)) for i, file in enumerate(files)]


def _boxes(net: Detector, images: Tensor, frames: Sequence[Frame], preprocess: Preprocess) -> Iterator[tuple[Frame, Detections | None]]:
    """Of each picture the boxes in its square (images (N, 3, S, S) uint8); None where the network's output isn't finite."""
    contents = [frame.content for frame in frames]
    with torch.inference_mode():
        outputs = net(normalised(images.to(next(net.parameters()).device), torch.tensor(contents), preprocess))
        maps = (*outputs.logits, *outputs.deltas)
        finite = torch.stack([x.isfinite().flatten(1).all(1) for x in maps]).all(0).tolist()  # the choice of boxes passes over a NaN
        found = net.detect(outputs, contents)
    yield from ((frame, one if good else None) for frame, one, good in zip(frames, found, finite, strict=True))


def _result(file: str, frame: Frame, found: Detections | None) -> Found | Failure:
    if found is None:
        return Failure(file, f"{printable(file)}: the network's output is not finite; its weights are broken")
    boxes = back(found.boxes.float().cpu().numpy(), frame)
    return Found(file, frame.height, frame.width, boxes, found.scores.cpu().numpy(), found.labels.cpu().numpy())
