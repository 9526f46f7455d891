"""Whether ONNX Runtime computes from a detector's graph what torch does, on random pictures that are the same every time.

Suppression decides: a score or an overlap within rounding of another, or of a bound, may turn out either way, and both are right.
So a graph with suppression is asked with a score bound of its own, put so that no decision above it is that close. A fresh
network's scores, all about 0.01, are compared too in this way. What `candidates` and `max_boxes` cut off is not looked at here.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_iou, clip_boxes_to_image

from triscale.detect.boxes import Detections, decode
from triscale.detect.retinanet import Detector, Outputs
from triscale.detect.rules import Rules
from triscale.detect.views import normalised
from triscale.recipe import Preprocess

TOLERANCE = 1e-4  # of a score, and of a box's edge as a share of the square's side
MOST = 256  # detections of a batch that are compared
NEAR_LOGIT, NEAR_IOU = 1e-4, 1e-3  # decisions as close as this may turn; float32 networks agree to about 1e-5


class Agreement(NamedTuple):
    """difference: the largest, of scores as they are and of boxes as a share of the square's side; inf where other boxes came.
    boxes: so many were compared."""

    difference: float
    boxes: int
    batches: tuple[int, ...]

    def told(self) -> str:
        if math.isinf(self.difference):
            return f"boxes are others than torch's ({self.boxes} compared)"
        return f"{self.boxes} boxes and their scores differ from torch's by up to {self.difference:.1e} (boxes: of the side)"


def agreement(model: Any, net: Detector, preprocess: Preprocess, batches: Sequence[int]) -> Agreement:
    """model: the onnx.ModelProto of an export.DetectorGraph; net: its detector, in evaluation, float32, on the CPU."""
    compare = _detections_apart if "counts" in {value.name for value in model.graph.output} else _all_apart
    found = []
    for batch in batches:
        images, contents = _pictures(batch, preprocess)
        x = normalised(images, contents, preprocess)
        with torch.no_grad():
            outputs = net(x)
        given = {"float": x.contiguous(), "uint8": images, "contents": contents}
        found.append(compare(model, net, outputs, given, preprocess.size))
    differences, boxes = zip(*found, strict=True)
    return Agreement(_largest(differences), sum(boxes), tuple(batches))


def _largest(values: Sequence[float]) -> float:
    """NaN where one is, which Python's own max may pass over."""
    return float(torch.tensor(values).max())


def _pictures(batch: int, preprocess: Preprocess) -> tuple[Tensor, Tensor]:
    """Colour fields with noise, (N, C, S, S) uint8, and contents (N, 2): of four the first fills its square, the others lack a quarter
    below, on the right, both. Not noise alone, on which a network that learnt from photographs computes nothing that it ever saw."""
    side, generator = preprocess.size, torch.Generator().manual_seed(0)
    fields = torch.rand(batch, preprocess.channels, 6, 6, generator=generator)
    noise = torch.rand(batch, preprocess.channels, side, side, generator=generator)
    images = F.interpolate(fields, (side, side), mode="bilinear") * 224 + noise * 31
    return images.to(torch.uint8), torch.tensor([[side - i % 2 * (side // 4), side - i // 2 % 2 * (side // 4)] for i in range(batch)])


def _run(model: Any, given: dict[str, Tensor]) -> dict[str, Tensor]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    inputs = session.get_inputs()
    kind = "uint8" if inputs[0].type == "tensor(uint8)" else "float"
    values = {value.name: given[kind if value.name == "images" else value.name].numpy() for value in inputs}
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, map(torch.from_numpy, session.run(names, values)), strict=True))


def _all_apart(model: Any, net: Detector, outputs: Outputs, given: dict[str, Tensor], side: int) -> tuple[float, int]:
    got = _run(model, given)
    logits, deltas = (torch.cat(part, 1) for part in net.flat(outputs))
    boxes = decode(deltas, torch.cat(net.anchors(outputs)), shrink_bound=net.rules.shrink_bound)
    cut = any(value.name == "contents" for value in model.graph.input)
    sizes = given["contents"].tolist() if cut else [outputs.size] * len(boxes)
    boxes = torch.stack([clip_boxes_to_image(image, size) for image, size in zip(boxes, sizes, strict=True)])
    scores, edges = (got["scores"] - logits.sigmoid()).abs().max(), (got["boxes"] - boxes).abs().max() / side
    return _largest((float(scores), float(edges))), boxes.shape[0] * boxes.shape[1]


def _detections_apart(model: Any, net: Detector, outputs: Outputs, given: dict[str, Tensor], side: int) -> tuple[float, int]:
    sizes = [(height, width) for height, width in given["contents"].tolist()]
    bound = _sure_bound(net, outputs, sizes)
    got = _run(_with_bound(model, bound), given)
    theirs = [Detections(*(got[name][i, :n] for name in Detections._fields)) for i, n in enumerate(got["counts"].tolist())]
    ours = _ruled(net, replace(net.rules, min_score=bound)).detect(outputs, sizes)
    return _largest([apart(a, b, side) for a, b in zip(theirs, ours, strict=True)]), sum(len(found.boxes) for found in ours)


def apart(first: Detections, second: Detections, side: int) -> float:
    """The largest difference of a score, or of an edge as a share of `side`, between each box and the nearest of its class among the
    others, whatever their order; inf where they aren't as many of each class."""
    if not torch.equal(first.labels.sort().values, second.labels.sort().values):
        return math.inf
    if not len(first.labels):
        return 0.0
    scores = (first.scores[:, None] - second.scores).abs()
    edges = (first.boxes[:, None] - second.boxes).abs().amax(2) / side
    away = scores.maximum(edges).masked_fill(first.labels[:, None] != second.labels, math.inf)
    return float(torch.cat((away.amin(0), away.amin(1))).max())


def _sure_bound(net: Detector, outputs: Outputs, sizes: list[tuple[int, int]]) -> float:
    """The lowest score bound above which every decision is sure, between two scores; 1, which nothing exceeds, where there is none."""
    most = min(MOST, net.rules.candidates, net.rules.max_boxes)  # which then cut nothing off
    found = _ruled(net, replace(net.rules, min_score=0.0, nms_iou=1.0, max_boxes=most)).detect(outputs, sizes)
    image = torch.arange(len(found)).repeat_interleave(torch.tensor([len(f.scores) for f in found]))
    boxes, scores, labels = (torch.cat(part) for part in zip(*found, strict=True))
    scores, order = scores.sort(descending=True)
    scores, (boxes, labels, image) = scores[:most], (part[order[:most]] for part in (boxes, labels, image))
    logits, overlap = scores.double().logit(1e-12), box_iou(boxes, boxes)
    gap = (logits[:, None] - logits).abs()
    close = ((overlap - net.rules.nms_iou).abs() < NEAR_IOU) | ((overlap > net.rules.nms_iou) & (gap < NEAR_LOGIT))
    rivals = (labels[:, None] == labels) & (image[:, None] == image)
    unsure = (close & rivals).triu(1).any(0)  # box j with a better one
    limit = int(unsure.nonzero()[0]) if unsure.any() else len(scores) - 1
    steps = (-logits.diff()[: max(0, limit)] > NEAR_LOGIT).nonzero()
    if not len(steps):
        return 1.0
    last = int(steps[-1])
    return float((scores[last] + scores[last + 1]) / 2)


def _ruled(net: Detector, rules: Rules) -> Detector:
    other = copy.copy(net)
    other.rules = rules
    return other


def _with_bound(model: Any, bound: float) -> Any:
    import onnx

    out = copy.deepcopy(model)
    (own,) = (tensor for tensor in out.graph.initializer if tensor.name == "min_score")
    own.CopyFrom(onnx.numpy_helper.from_array(np.array([[bound]], np.float32), "min_score"))
    return out
