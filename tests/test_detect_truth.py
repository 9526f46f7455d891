"""The ground truth of real images, encoded on the anchors and sent back: what the way itself loses, by COCO's own count."""

import numpy as np
import pytest
import torch
from torchvision.ops import box_iou

from triscale.detect.anchors import make_anchors
from triscale.detect.boxes import BACKGROUND, assign, encode, select
from triscale.detect.coco import read_coco
from triscale.detect.evaluate import coco_scores
from triscale.detect.geometry import back, evaluation_frame, into
from triscale.detect.rules import MMDETECTION
from triscale.detector import Anchors

SIZE, STRIDES = 320, (8, 16, 32, 64, 128)
MAPS = tuple((-(-SIZE // s), -(-SIZE // s)) for s in STRIDES)
ANCHORS = make_anchors(Anchors(), STRIDES, MAPS, (SIZE, SIZE), torch.device("cpu"))
COUNTS = [len(a) for a in ANCHORS]
ALL = torch.cat(ANCHORS)


def through(boxes, labels, classes):
    """Boxes of the input as detections: every anchor that learns a box gives just that box, surely; the others nothing."""
    which = assign(ALL, boxes, MMDETECTION)
    learns = which != BACKGROUND
    deltas, logits = torch.zeros(len(ALL), 4), torch.full((len(ALL), classes), -20.0)
    deltas[learns] = encode(boxes[which[learns]], ALL[learns])
    logits[learns, labels[which[learns]]] = 5.0
    parts = (logits.split(COUNTS), deltas.split(COUNTS), ANCHORS)
    return select(zip(*parts, strict=True), (SIZE, SIZE), MMDETECTION), which


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_the_truth_comes_back(shared, split):
    """AP at least 0.98; each box that is lost is lost for a reason: a box of its class overlaps it beyond suppression's bound, or
    took all its anchors. Moved by half their width the same boxes score next to nothing."""
    folder = shared / "data" / "bccd"
    data = read_coco(folder / "annotations" / f"instances_{split}.json", folder / "images")
    results, moved, reasons = [], [], []
    for number, image in enumerate(data.images):
        boxes, labels = data.targets(number)
        frame = evaluation_frame((image.height, image.width), SIZE)
        inside, kept = into(boxes, frame)
        inside, labels = torch.from_numpy(inside), torch.from_numpy(np.asarray(labels)[kept])
        found, which = through(inside, labels, len(data.classes))
        there = torch.from_numpy(back(found.boxes.numpy(), frame))
        for box, score, label in zip(there.tolist(), found.scores.tolist(), found.labels.tolist(), strict=True):
            x1, y1, x2, y2 = box
            row = {"image_id": image.id, "category_id": data.category_ids[label], "score": score}
            results.append({**row, "bbox": [x1, y1, x2 - x1, y2 - y1]})
            moved.append({**row, "bbox": [x1 + (x2 - x1) / 2, y1, x2 - x1, y2 - y1]})
        reasons += lost(torch.from_numpy(boxes[kept]), labels, there, found.labels, which)
    score = coco_scores(data, results).numbers["AP"]
    print(f"{split}: AP {score:.4f}; {len(reasons)} of {len(data.labels)} boxes lost: {', '.join(sorted(set(reasons))) or 'none'}")
    assert score >= 0.98
    assert "?" not in reasons
    assert coco_scores(data, moved).numbers["AP"] < 0.01


def lost(boxes, labels, found, found_labels, which):
    """Why each box that isn't among those found is not; "?" where there is no reason."""
    out = []
    for i, (box, label) in enumerate(zip(boxes, labels, strict=True)):
        same = found[found_labels == label]
        if len(same) and float(box_iou(box[None], same).max()) > 0.99:
            continue
        others = boxes[(labels == label) & (torch.arange(len(boxes)) != i)]
        if len(others) and float(box_iou(box[None], others).max()) > MMDETECTION.nms_iou:
            out.append("suppressed by another of its class")
        else:
            out.append("no anchor is its own" if not (which == i).any() else "?")
    return out
