"""A detector as one ONNX file, which is written only where ONNX Runtime computes from it what torch does.

Inputs. images (N, C, S, S): float32, normalised, padding 0; or uint8 with the normalisation inside. contents (N, 2) int64, where
suppression or normalisation are inside: height and width of each picture's part of the square, at its upper left, as
`geometry.Frame.content` has it; (S, S) where nothing is padded.

Outputs, boxes as x1, y1, x2, y2 in the square's pixels, cut at its edge, or at that of `contents`:
- without suppression scores (N, M, K), after the sigmoid, and boxes (N, M, 4): of M anchors and K classes, levels from fine to
  coarse. As mmdetection's own export without NMS has it; its order of anchors is ours.
- with it boxes (N, D, 4), scores (N, D) from high to low, labels (N, D) int64 from 0 and counts (N,) int64, D = rules.max_boxes: the
  first counts[i] rows of image i are what `Detector.detect` gives; the others are filled up with box 0, score 0, label -1.

Metadata, each as JSON: classes, category_ids, size, mean, std, rules and tolerance.
"""

from __future__ import annotations

import copy
import json
import os
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import nms as suppress

from triscale.detect.anchors import make_anchors
from triscale.detect.boxes import decode
from triscale.detect.model_file import DetectorCard
from triscale.detect.onnx_check import TOLERANCE, Agreement, agreement
from triscale.detect.retinanet import Detector
from triscale.files import write_whole
from triscale.recipe import Preprocess

OPSET = 18  # what torch's exporter writes without converting, and the oldest of that
LARGEST = (2 << 30) - (16 << 20)  # bytes of weights: a protobuf message holds 2 GiB
NONE = -1.0  # a score that is none: below every bound
CHECKED = (1, 3)  # batch sizes, where the file takes any


class ExportError(ValueError):
    """A detector that makes no such file. One line."""


class Exported(NamedTuple):
    """inputs and outputs: name, type and shape of each, as ("images", "float32", "(batch, 3, 896, 896)")."""

    path: Path
    inputs: tuple[tuple[str, str, str], ...]
    outputs: tuple[tuple[str, str, str], ...]
    agreement: Agreement


@torch.library.custom_op("triscale::survivors", mutates_args=(), schema="(Tensor boxes, Tensor scores, int most, float iou) -> Tensor")
def survivors(boxes: Tensor, scores: Tensor, most: int, iou: float) -> Tensor:
    """boxes (N, M, 4), scores (N, K, M) -> (N, M) bool: a class's `most` best with a score above 0, less those that a better one of
    the class overlaps by more than iou. One operator, so that its ONNX form below need not be found in a graph."""
    out = torch.zeros(boxes.shape[:2], dtype=torch.bool, device=boxes.device)
    for i, image in enumerate(scores):
        for row in image:
            there = (row > 0).nonzero().squeeze(1)
            out[i, there[suppress(boxes[i, there], row[there], iou)[:most]]] = True
    return out


@survivors.register_fake
def _(boxes: Tensor, scores: Tensor, most: int, iou: float) -> Tensor:
    return boxes.new_empty(boxes.shape[:2], dtype=torch.bool)


def _survivors_in_onnx(boxes: Any, scores: Any, most: int, iou: float) -> Any:
    import onnx
    from onnxscript import opset18

    op: Any = opset18
    limits = op.Constant(value_ints=[most]), op.Constant(value_floats=[iou]), op.Constant(value_floats=[0.0])
    chosen = op.NonMaxSuppression(boxes, scores, *limits)  # (boxes kept in all, 3): image, class, box
    places = op.Gather(chosen, op.Constant(value_ints=[0, 2]), axis=1)
    false, true = (onnx.helper.make_tensor("value", onnx.TensorProto.BOOL, [1], [v]) for v in (False, True))
    nothing = op.ConstantOfShape(op.Shape(boxes, start=0, end=2), value=false)
    return op.ScatterND(nothing, places, op.ConstantOfShape(op.Shape(places, start=0, end=1), value=true))


def _mean_in_onnx(x: Any, dim: list[int], keepdim: bool = False, dtype: None = None) -> Any:
    """One axis after the other, the last first.

    On a CPU ONNX Runtime adds one value to the next in float32: over a map of 448 x 448, half of it equal values as padding's are, a mean
    was off by 1.6e-4 of the largest, by axes 7e-7, in the same time. B3's scores at 896 px were off by 7e-4. (onnxruntime issue 28450)
    """
    from onnxscript import opset18

    op: Any = opset18
    for axis in sorted(dim, reverse=True):
        x = op.ReduceMean(x, op.Constant(value_ints=[axis]), keepdims=int(keepdim))
    return x


class DetectorGraph(nn.Module):
    """The detector from pictures to what the head of this file says, for torch to trace; it runs in torch too.

    preprocess: the square's side, and for uint8 the normalisation.
    """

    anchors: Tensor
    min_score: Tensor
    mean: Tensor
    std: Tensor

    def __init__(self, net: Detector, preprocess: Preprocess, *, nms: bool, uint8: bool = False) -> None:
        super().__init__()
        self.net, self.size, self.nms, self.uint8 = net, preprocess.size, nms, uint8
        strides = net.arch.pyramid.strides
        maps = tuple((-(-self.size // s),) * 2 for s in strides)
        self.register_buffer("anchors", torch.cat(make_anchors(net.arch.anchors, strides, maps, (self.size,) * 2, torch.device("cpu"))))
        # Of a shape of its own: the exporter makes one of constants that are equal, and onnx_check sets this one to another value.
        self.register_buffer("min_score", torch.tensor([[net.rules.min_score]]))
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(getattr(preprocess, name)).view(1, -1, 1, 1))

    def forward(self, images: Tensor, contents: Tensor | None = None) -> tuple[Tensor, ...]:
        outputs = self.net(self._normalised(images, contents) if self.uint8 else images)
        logits = [x.permute(0, 2, 3, 1).flatten(1) for x in outputs.logits]  # levels of (N, H W A K)
        deltas = torch.cat([x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, 4) for x in outputs.deltas], 1)
        bound, classes = self.net.rules.shrink_bound, self.net.num_classes
        if not self.nms:
            boxes = decode(deltas, self.anchors, shrink_bound=bound)
            return torch.cat(logits, 1).reshape(images.shape[0], -1, classes).sigmoid(), self._cut(boxes, contents)
        best, index = self._candidates(logits)
        place = index // classes
        boxes = decode(deltas.gather(1, place[..., None].expand(-1, -1, 4)), self.anchors[place], shrink_bound=bound)
        return self._chosen(self._cut(boxes, contents), best.sigmoid(), index - place * classes)

    def _candidates(self, logits: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Each level's best logits and their places among all logits, (N, C): as boxes.select takes them, but none is too low yet."""
        parts, before = [], 0
        for x in logits:
            best, index = x.topk(min(self.net.rules.candidates, x.shape[1]))
            parts.append((best, index + before))
            before += x.shape[1]
        best, index = (torch.cat(part, 1) for part in zip(*parts, strict=True))
        return best, index

    def _normalised(self, images: Tensor, contents: Tensor | None) -> Tensor:
        """As `views.normalised`: padding is 0 whatever it is in `images`."""
        assert contents is not None
        place = torch.arange(self.size)
        inside = (place[:, None] < contents[:, 0, None, None, None]) & (place < contents[:, 1, None, None, None])
        return torch.where(inside, (images.float() - self.mean) / self.std, 0.0)

    def _cut(self, boxes: Tensor, contents: Tensor | None) -> Tensor:
        if contents is None:
            return boxes.clamp(0, self.size)
        return boxes.clamp(min=0).minimum(contents.flip(1).repeat(1, 2)[:, None].float())

    def _chosen(self, boxes: Tensor, scores: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        rules, classes = self.net.rules, self.net.num_classes
        valid = scores > self.min_score
        if not rules.keep_empty:
            valid = valid & (boxes[..., 2:] > boxes[..., :2]).all(-1)
        own = (labels[:, None] == torch.arange(classes)[:, None]) & valid[:, None]
        kept = survivors(boxes, torch.where(own, scores[:, None], NONE), rules.max_boxes, rules.nms_iou)
        count = min(rules.max_boxes, scores.shape[1])
        scores, order = torch.where(kept, scores, NONE).topk(count)
        there = scores > 0
        boxes = torch.where(there[..., None], boxes.gather(1, order[..., None].expand(-1, -1, 4)), 0.0)
        labels = torch.where(there, labels.gather(1, order), -1)
        lacking = rules.max_boxes - count
        padded = F.pad(boxes, (0, 0, 0, lacking)), F.pad(scores.clamp(min=0), (0, lacking)), F.pad(labels, (0, lacking), value=-1)
        return *padded, there.sum(1)


def export_onnx(
    net: Detector,
    card: DetectorCard,
    path: str | os.PathLike[str],
    *,
    nms: bool,
    size: int | None = None,
    batch: int | Literal["dynamic"] = "dynamic",
    uint8: bool = False,
) -> Exported:
    """Writes the file, whole or not at all; see the head of this file for what goes in and comes out. `net` stays as it is.

    size: of the square instead of the card's. batch: images at a time, fixed. The graph is run by ONNX Runtime on random pictures
    (batches of 1 and 3, or the fixed one) and must agree with torch to TOLERANCE. Raises ExportError, one line: a file that is there
    already, packages that aren't, a network beyond protobuf's 2 GiB, a disagreement; OSError.
    """
    path = Path(path)
    if path.exists():
        raise ExportError(f"{path}: exists already; give another name")
    if lacking := [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]:
        raise ExportError(f"{path}: the export needs {', '.join(lacking)}: pip install 'triscale[deploy]'")
    if batch != "dynamic" and (type(batch) is not int or batch < 1):
        raise ExportError(f"{path}: expected batch 'dynamic' or a whole number >= 1, found {batch!r}")
    if (stored := 4 * sum(v.numel() for v in net.state_dict().values())) > LARGEST:
        raise ExportError(f"{path}: {stored} bytes of weights, more than the {LARGEST} that one ONNX file holds")
    preprocess = card.preprocess if size is None else replace(card.preprocess, size=size)
    net = copy.deepcopy(net).cpu().float().eval().requires_grad_(False)
    graph = DetectorGraph(net, preprocess, nms=nms, uint8=uint8).eval()
    model = _traced(graph, 2 if batch == "dynamic" else batch, fixed=batch != "dynamic")
    _describe(model, card, preprocess, net)
    agreed = agreement(model, net, preprocess, CHECKED if batch == "dynamic" else (batch,))
    if not agreed.difference <= TOLERANCE:
        raise ExportError(f"{path}: not written: ONNX Runtime's {agreed.told()}; expected at most {TOLERANCE:g}")
    write_whole(path, lambda temporary: temporary.write_bytes(model.SerializeToString()))
    return Exported(path, _signature(model.graph.input), _signature(model.graph.output), agreed)


def _traced(graph: DetectorGraph, batch: int, *, fixed: bool) -> Any:
    """The graph as onnx.ModelProto, weights inside."""
    side, channels = graph.size, graph.net.in_channels
    shape = (batch, channels, side, side)
    inputs: dict[str, Tensor] = {"images": torch.zeros(shape, dtype=torch.uint8) if graph.uint8 else torch.zeros(shape)}
    if graph.nms or graph.uint8:
        inputs["contents"] = torch.full((batch, 2), side)
    table: dict[Callable[..., Any], Callable[..., Any]] = {
        torch.ops.triscale.survivors.default: _survivors_in_onnx,
        torch.ops.aten.mean.dim: _mean_in_onnx,
    }
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of the exporter's own making: names of axes that it merges, what it will deprecate
        program = torch.onnx.export(
            graph,
            tuple(inputs.values()),
            dynamo=True,
            verbose=False,
            external_data=False,
            opset_version=OPSET,
            input_names=list(inputs),
            output_names=["boxes", "scores", "labels", "counts"] if graph.nms else ["scores", "boxes"],
            dynamic_shapes=None if fixed else tuple({0: torch.export.Dim("batch")} for _ in inputs),
            custom_translation_table=table,
        )
    assert program is not None
    return program.model_proto


def _describe(model: Any, card: DetectorCard, preprocess: Preprocess, net: Detector) -> None:
    """Puts in what a reader needs, and takes out the exporter's notes: a stack trace a node, with the paths of this installation."""
    import onnx

    graph = model.graph
    for part in (graph, *graph.node, *graph.value_info, *graph.initializer, *graph.input, *graph.output, *model.functions):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    graph.name = net.arch.name or "detector"
    about = {
        "classes": card.classes,
        "category_ids": card.category_ids,
        "size": preprocess.size,
        "mean": preprocess.mean,
        "std": preprocess.std,
        "rules": asdict(net.rules),
        "tolerance": TOLERANCE,
    }
    onnx.helper.set_model_props(model, {key: json.dumps(value) for key, value in about.items()})


def _signature(values: Any) -> tuple[tuple[str, str, str], ...]:
    import onnx

    def line(value: Any) -> tuple[str, str, str]:
        kind = value.type.tensor_type
        shape = ", ".join(d.dim_param or str(d.dim_value) for d in kind.shape.dim)
        return value.name, str(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)), f"({shape})"

    return tuple(line(value) for value in values)
