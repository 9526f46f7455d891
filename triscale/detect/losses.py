"""What a detector is trained on: the focal loss of all anchors and the L1 loss of the positive ones' deltas.

Source: Lin et al. 2017 (arXiv 1708.02002), section 3; mmdetection's AnchorHead, FocalLoss and L1Loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from triscale.detect.boxes import IGNORED, assign, encode
from triscale.detect.rules import Rules


class Target(NamedTuple):
    """One image's boxes (n, 4) float with area, in pixels of the input, and labels (n,) int64 from 0. Without crowds."""

    boxes: Tensor
    labels: Tensor


class Losses(NamedTuple):
    """Two scalars, float32. Their sum is what is minimised."""

    classes: Tensor
    boxes: Tensor


class _Image(NamedTuple):
    """One image's sums and its positive anchors, at least 1."""

    classes: Tensor
    boxes: Tensor
    positives: int


def detection_losses(logits: Tensor, deltas: Tensor, anchors: Tensor, targets: Sequence[Target], rules: Rules) -> Losses:
    """logits (N, M, K), deltas (N, M, 4), anchors (M, 4), computed in float32. Rules.normaliser tells how images are put together.

    mmdetection's `batch` is not reduced over processes: each divides by its own count, and gradients are averaged.
    Raises ValueError for targets that are not the batch's, boxes and labels of unequal number, or an unknown label.
    """
    _check(targets, len(logits), logits.shape[2])
    images = [_image(x, d, anchors, target, rules) for x, d, target in zip(logits, deltas, targets, strict=True)]
    if rules.normaliser == "image":
        classes = torch.stack([i.classes / i.positives for i in images]).mean()
        return Losses(classes, torch.stack([i.boxes / i.positives for i in images]).mean())
    count = sum(i.positives for i in images)
    return Losses(torch.stack([i.classes for i in images]).sum() / count, torch.stack([i.boxes for i in images]).sum() / count)


def _image(logits: Tensor, deltas: Tensor, anchors: Tensor, target: Target, rules: Rules) -> _Image:
    matched = assign(anchors, target.boxes, rules)
    positive = (matched >= 0).nonzero().squeeze(1)
    box = matched[positive]
    logits, wanted = logits.float(), torch.zeros_like(logits, dtype=torch.float32)
    wanted[positive, target.labels[box]] = 1
    if rules.negative < rules.positive:
        learns = matched != IGNORED
        logits, wanted = logits[learns], wanted[learns]
    classes = sigmoid_focal_loss(logits, wanted, rules.alpha, rules.gamma, "sum")
    boxes = (deltas[positive].float() - encode(target.boxes[box], anchors[positive])).abs().sum()
    return _Image(classes, boxes, max(1, len(positive)))


def _check(targets: Sequence[Target], images: int, classes: int) -> None:
    if len(targets) != images:
        raise ValueError(f"losses: expected a target for each of {images} images, found {len(targets)}")
    for i, (boxes, labels) in enumerate(targets):
        if boxes.ndim != 2 or boxes.shape[1] != 4 or labels.shape != boxes.shape[:1]:
            raise ValueError(f"losses: expected boxes (n, 4) and labels (n,) for image {i}, found {tuple(boxes.shape)} and {tuple(labels.shape)}")
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
            raise ValueError(f"losses: expected labels from 0 to {classes - 1} for image {i}, found {int(labels.min())} to {int(labels.max())}")
