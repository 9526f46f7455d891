"""COCO's evaluation of a detector: its boxes on every image, and the twelve numbers that pycocotools makes of them."""

from __future__ import annotations

import io
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, redirect_stdout
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from triscale.data.decode import BadImage
from triscale.detect.coco import BoxData
from triscale.detect.coco_json import listed
from triscale.detect.geometry import back
from triscale.detect.retinanet import Detector, Outputs
from triscale.detect.views import Batch, View, collate, evaluation_view, normalised
from triscale.recipe import Preprocess
from triscale.text import printable

NUMBERS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")  # in the order of COCOeval.stats


class Results(NamedTuple):
    """rows: COCO results, {image_id, category_id, bbox [x, y, width, height], score}, image after image, each from high score to low.
    unreadable: image number -> why, one line. broken: numbers of the images for which the network gave a NaN or an infinity, and
    which therefore have no rows."""

    rows: list[dict[str, Any]]
    unreadable: dict[int, str]
    broken: list[int]

    @staticmethod
    def joined(parts: Iterable[Results]) -> Results:
        """Those of parts of the images, in the parts' order, as one."""
        whole = Results([], {}, [])
        for part in parts:
            whole.rows.extend(part.rows)
            whole.unreadable.update(part.unreadable)
            whole.broken.extend(part.broken)
        return whole


class ClassScore(NamedTuple):
    """boxes: those to be found, so without crowds; where there is none, the rest is NaN."""

    name: str
    boxes: int
    AP: float
    AP50: float
    AR100: float


class Scores(NamedTuple):
    """numbers: COCO's twelve by their NUMBERS, 0..1, NaN (COCO: -1) where no box is of that size. AP, AR: means over the IoUs 0.5,
    0.55 ... 0.95 and the classes with boxes; s, m, l: areas up to 32^2 pixels, to 96^2, above; AR1, AR10: with so many boxes of a class
    in an image, the others with 100.

    precision (10, 101, K) float64: at each IoU, recall 0, 0.01 ... 1 and class the highest precision at that recall or a higher
    one, 0 where it isn't reached; NaN for a class without boxes. images: those counted.
    """

    numbers: dict[str, float]
    classes: tuple[ClassScore, ...]
    precision: np.ndarray
    images: int


def coco_results(
    net: Detector,
    data: BoxData,
    preprocess: Preprocess,
    *,
    category_ids: Sequence[int] | None = None,
    numbers: Sequence[int] | None = None,
    batch: int = 8,
    workers: int | None = None,
    tick: Callable[[], object] | None = None,
) -> Results:
    """The boxes that the network finds in each image, in the image's pixels: in evaluation mode, on the network's device, each image
    once. Autocast is the caller's. Every module's training flag is afterwards as before.

    category_ids: of the network's classes; the data's unless given. numbers: of the images; all unless given. workers: threads that
    read images ahead; as many as torch has unless given. tick: called once an image. Raises ValueError for another number of
    classes, or a network that doesn't take RGB.
    """
    ids = tuple(data.category_ids if category_ids is None else category_ids)
    if len(ids) != net.num_classes:
        raise ValueError(f"coco_results: expected a category id for each of the network's {net.num_classes} classes, found {len(ids)}")
    if (net.in_channels, preprocess.channels) != (3, 3):
        raise ValueError(f"coco_results: expected a network of RGB images, found one of {net.in_channels} channels")
    numbers = range(len(data)) if numbers is None else numbers
    found = Results([], {}, [])
    with _evaluating(net), torch.no_grad():
        for views in _views(data, numbers, preprocess.size, batch, max(1, workers or torch.get_num_threads())):
            good = [view for view in views.values() if isinstance(view, View)]
            found.unreadable.update({number: _named(data, number, why) for number, why in views.items() if isinstance(why, BadImage)})
            if good:
                _find(net, collate(good), data, preprocess, ids, found)
            for _ in views:
                if tick:
                    tick()
    return found


@contextmanager
def _evaluating(net: nn.Module) -> Iterator[None]:
    """In evaluation mode; each module's own flag afterwards, as frozen norms in a network that trains have another."""
    flags = [(module, module.training) for module in net.modules()]
    net.eval()
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag


def _views(data: BoxData, numbers: Sequence[int], size: int, batch: int, workers: int) -> Iterator[dict[int, View | BadImage]]:
    """Batches of views by image number, in order; a batch is read while the network has the one before."""
    chunks = [numbers[start : start + batch] for start in range(0, len(numbers), batch)]
    waiting: deque[dict[int, Future[View | BadImage]]] = deque()
    pool = ThreadPoolExecutor(workers, "views")
    try:
        for chunk in chunks:
            waiting.append({number: pool.submit(_view, data, number, size) for number in chunk})
            if len(waiting) > 1 + -(-workers // batch):  # what has been read ahead is bounded
                yield {number: future.result() for number, future in waiting.popleft().items()}
        while waiting:
            yield {number: future.result() for number, future in waiting.popleft().items()}
    finally:
        pool.shutdown(cancel_futures=True)


def _view(data: BoxData, number: int, size: int) -> View | BadImage:
    try:
        return evaluation_view(data, number, size)
    except BadImage as error:
        return error


def _named(data: BoxData, number: int, why: BadImage) -> str:
    """As `BoxData.left_out` has it: the name under the folder of images, not the whole path that `decode` tells."""
    name = data.name(number)
    text = str(why).replace(printable(str(data.path(number))), name)
    return f"image {data.images[number].id}, {text if text.startswith(name) else f'{name}: {text}'}"


def _find(net: Detector, views: Batch, data: BoxData, preprocess: Preprocess, ids: Sequence[int], found: Results) -> None:
    device = next(net.parameters()).device
    outputs = net(normalised(views.images.to(device), views.contents, preprocess))
    whole = _finite(outputs).tolist()
    detections = net.detect(outputs, [frame.content for frame in views.frames])
    for number, frame, said, good in zip(views.numbers.tolist(), views.frames, detections, whole, strict=True):
        if not good:
            found.broken.append(number)
            continue
        corners = back(said.boxes.cpu().numpy(), frame).astype(np.float64)
        boxes = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1).tolist()
        for box, score, label in zip(boxes, said.scores.tolist(), said.labels.tolist(), strict=True):
            found.rows.append({"image_id": data.images[number].id, "category_id": ids[label], "bbox": box, "score": score})


def _finite(outputs: Outputs) -> Tensor:
    """(N,) bool: whether all that the network says of an image is finite. Its choice of boxes would pass over a NaN in silence."""
    return torch.stack([x.isfinite().flatten(1).all(1) for part in (outputs.logits, outputs.deltas) for x in part]).all(0)


def matched_ids(classes: Sequence[str], data: BoxData) -> tuple[int, ...]:
    """The data's category id for each of a network's classes, by name. Raises ValueError, which tells the difference, where the names
    aren't the same ones."""
    ids = dict(zip(data.classes, data.category_ids, strict=True))
    if twice := sorted(name for name, count in Counter(classes).items() if count > 1):
        raise ValueError(f"expected classes of different names, found the network's {listed(twice)} more than once")
    lacking, strange = [c for c in classes if c not in ids], [c for c in data.classes if c not in classes]
    if lacking or strange:
        parts = [f"the network's {listed(lacking)} {'are' if len(lacking) > 1 else 'is'} not in the data"] if lacking else []
        parts += [f"the data's {listed(strange)} {'are' if len(strange) > 1 else 'is'} not in the network"] if strange else []
        raise ValueError(f"expected the same classes in the network and the data: {'; '.join(parts)}; rename, drop or add categories in the JSON")
    return tuple(ids[name] for name in classes)


def check_evaluator() -> None:
    """Raises ValueError where pycocotools isn't installed: what evaluates only at the end asks at its beginning."""
    if find_spec("pycocotools") is None:
        raise ValueError("COCO's evaluation is pycocotools' work, which isn't installed: pip install 'triscale[detect]', or pip install pycocotools")


def coco_scores(data: BoxData, rows: Sequence[Mapping[str, Any]], left_out: Collection[int] = ()) -> Scores:
    """COCO results `rows` against the boxes of `data`, by pycocotools' COCOeval. Takes seconds for thousands of images.

    left_out: numbers of images that count for nothing, as those that couldn't be read. Raises ValueError where pycocotools isn't
    installed, and for results of images or categories that aren't in the data.
    """
    check_evaluator()
    from pycocotools.cocoeval import COCOeval  # type: ignore[import-untyped]

    for field, known in (("image_id", {e.id for e in data.images}), ("category_id", set(data.category_ids))):
        if strange := sorted({row[field] for row in rows} - known):
            raise ValueError(f"coco_scores: expected results of the data's own images and categories, found {field} {listed(strange)}")
    counts = ~np.isin(np.arange(len(data)), list(left_out))
    counted = {entry.id for entry, counts_too in zip(data.images, counts, strict=True) if counts_too}
    sizes = np.bincount(data.labels[~data.crowd & np.repeat(counts, np.diff(data.starts))], minlength=len(data.classes))
    truth = data.to_coco()
    truth["images"] = [image for image in truth["images"] if image["id"] in counted]
    truth["annotations"] = [box for box in truth["annotations"] if box["image_id"] in counted]
    # COCO.loadRes would write into the rows, and fails where there are none.
    boxes = [{**row, "id": i, "area": row["bbox"][2] * row["bbox"][3]} for i, row in enumerate(rows, 1)]
    with redirect_stdout(io.StringIO()):
        run = COCOeval(_indexed(truth), _indexed({**truth, "annotations": boxes}), "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    precision, recall = (np.where(run.eval[what] < 0, np.nan, run.eval[what]) for what in ("precision", "recall"))
    precision, recall = precision[:, :, :, 0, -1], recall[:, :, 0, -1]  # of all areas, with 100 boxes
    classes = tuple(
        ClassScore(name, int(sizes[k]), float(precision[:, :, k].mean()), float(precision[0, :, k].mean()), float(recall[:, k].mean()))
        for k, name in enumerate(data.classes)
    )
    numbers = {name: float("nan") if value < 0 else float(value) for name, value in zip(NUMBERS, run.stats, strict=True)}
    return Scores(numbers, classes, precision, len(counted))


def _indexed(dataset: dict[str, Any]) -> Any:
    from pycocotools.coco import COCO  # type: ignore[import-untyped]

    coco = COCO()
    coco.dataset = dataset
    coco.createIndex()
    return coco
