"""Boxes on anchors: which anchor learns which box, boxes as deltas and back, and the choice of an image's boxes.

Boxes are (x1, y1, x2, y2) float in pixels of the input; width is x2 - x1. Deltas are (dx, dy, dw, dh): the centre's shift over
the anchor's size, and the logarithm of the size over the anchor's. Source: R-CNN, arXiv 1311.2524, appendix C.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.ops import batched_nms, box_iou, clip_boxes_to_image

from triscale.detect.rules import Rules

BACKGROUND, IGNORED = -1, -2
SIZE_BOUND = math.log(1000 / 16)  # of |dw| and |dh|: mmdetection's wh_ratio_clip and torchvision's bbox_xform_clip


class Detections(NamedTuple):
    """One image's boxes (n, 4), scores (n,) from high to low, and labels (n,) int64."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor


def encode(boxes: Tensor, anchors: Tensor) -> Tensor:
    """(n, 4), (n, 4) -> deltas (n, 4). A box without area gives -inf."""
    (low, high), (anchor_low, anchor_high) = boxes.tensor_split(2, -1), anchors.tensor_split(2, -1)
    size = anchor_high - anchor_low
    shift = ((low + high) - (anchor_low + anchor_high)) * 0.5 / size
    return torch.cat((shift, ((high - low) / size).log()), -1)


def decode(deltas: Tensor, anchors: Tensor, *, shrink_bound: bool = True) -> Tensor:
    """(n, 4), (n, 4) -> boxes (n, 4), at most 1000/16 of the anchor's size and, with shrink_bound, at least 16/1000 of it."""
    (low, high), (shift, scale) = anchors.tensor_split(2, -1), deltas.tensor_split(2, -1)
    size = high - low
    centre = (low + high) * 0.5 + shift * size
    half = scale.clamp(-SIZE_BOUND if shrink_bound else None, SIZE_BOUND).exp() * size * 0.5
    return torch.cat((centre - half, centre + half), -1)


@torch.no_grad()
def assign(anchors: Tensor, boxes: Tensor, rules: Rules) -> Tensor:
    """anchors (M, 4), boxes (n, 4) -> (M,) int64: the box that each anchor learns, BACKGROUND or IGNORED.

    A box that no anchor overlaps gets none; mmdetection (min_pos_iou 0) and torchvision would give it every anchor that is off
    it. Crowds are not among `boxes`: their anchors learn background, as in mmdetection's configuration (ignore_iof_thr -1).
    """
    if not len(boxes):
        return torch.full((len(anchors),), BACKGROUND, device=anchors.device)
    overlap = box_iou(boxes, anchors)
    best, nearest = overlap.max(0)
    out = torch.where(best >= rules.positive, nearest, torch.where(best < rules.negative, BACKGROUND, IGNORED))
    box, anchor = ((overlap == overlap.amax(1, keepdim=True)) & (overlap > 0)).nonzero(as_tuple=True)
    if rules.low_quality == "most":
        out[anchor] = nearest[anchor]
        return out
    return out.scatter_reduce_(0, anchor, box, "amax", include_self=False)  # the last box takes a tie, whatever the order of work


def select(levels: Iterable[tuple[Tensor, Tensor, Tensor]], size: tuple[int, int], rules: Rules) -> Detections:
    """One image's boxes from its levels' logits (M, K), deltas (M, 4) and anchors (M, 4). size: (height, width) to clip at.

    A level's candidates, decoded and clipped; then suppression in each class over all levels. mmdetection maps boxes back to the
    original image before it suppresses, which leaves every IoU as it is.
    """
    parts = [_candidates(*level, rules) for level in levels]
    boxes, scores, labels = (torch.cat(part) for part in zip(*parts, strict=True))
    boxes = clip_boxes_to_image(boxes, size)
    if not rules.keep_empty:
        solid = (boxes[:, 2:] > boxes[:, :2]).all(1)
        boxes, scores, labels = boxes[solid], scores[solid], labels[solid]
    keep = batched_nms(boxes, scores, labels, rules.nms_iou)[: rules.max_boxes]
    return Detections(boxes[keep], scores[keep], labels[keep])


def _candidates(logits: Tensor, deltas: Tensor, anchors: Tensor, rules: Rules) -> tuple[Tensor, Tensor, Tensor]:
    """A level's best boxes, scores and labels, not yet clipped."""
    flat = logits.flatten()
    # Few logits come near the bound: the others need no sigmoid. The margin covers its rounding and that of bfloat16 logits.
    index = (flat > _logit(rules.min_score) - 0.1).nonzero().squeeze(1)
    scores = flat[index].float().sigmoid()
    above = scores > rules.min_score
    index, scores = index[above], scores[above]
    scores, order = scores.topk(min(rules.candidates, len(scores)))
    index = index[order]
    place = index // logits.shape[1]
    return decode(deltas[place].float(), anchors[place], shrink_bound=rules.shrink_bound), scores, index % logits.shape[1]


def _logit(p: float) -> float:
    return math.log(p / (1 - p)) if 0 < p < 1 else math.copysign(math.inf, p - 0.5)
