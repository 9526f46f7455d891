"""Detection at 512 px, batch 1, two threads: ours on B0 beside torchvision's retinanet_resnet50_fpn_v2, each in both memory formats, in turn.

Both take one picture as a float tensor in [0, 1] and give boxes; normalisation is in the time of both. The choice of boxes is the same:
scores above 0.05, the best 1000 of a level, suppression at an IoU of 0.5 within each class, at most 300 boxes. torchvision's own resizing
is off. 91 classes; pyramids and heads of 256 channels. Weights are random: norms take the statistics of the picture itself, so that
signals stay alive, and the classes' last bias lets exactly PASSING scores of each detector pass.
"""

import math

import torch
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.detection import retinanet_resnet50_fpn_v2

from triscale.detect.retinanet import build_detector
from triscale.detect.rules import TORCHVISION
from triscale.detector import detector_cost, retinanet
from triscale.latency import time_in_turn
from triscale.recipe import IMAGENET_MEAN, IMAGENET_STD

RUNS, SIZE, CLASSES, PASSING = 40, 512, 91, 1000
FORMATS = {"NCHW": torch.contiguous_format, "channels-last": torch.channels_last}


class Ours:
    library, name = "triscale", "retinanet_efficientnet_b0_fpn"

    def __init__(self):
        self.arch = retinanet("efficientnet_b0", SIZE)
        self.net = build_detector(self.arch, CLASSES, rules=TORCHVISION)
        self.last, self.layout = self.net.head.classes.output, torch.contiguous_format
        self.mean, self.std = (torch.tensor(v).view(3, 1, 1) / 255 for v in (IMAGENET_MEAN, IMAGENET_STD))

    def outputs(self, picture):
        return self.net(((picture - self.mean) / self.std)[None].contiguous(memory_format=self.layout))

    def logits(self, picture):
        return torch.cat([x.flatten() for x in self.outputs(picture).logits])

    def boxes(self, picture):
        return self.net.detect(self.outputs(picture))[0].boxes

    def cost(self, picture):
        c = detector_cost(self.arch, CLASSES)
        return c.params, c.macs


class Theirs:
    library, name = "torchvision", "retinanet_resnet50_fpn_v2"

    def __init__(self):
        self.net = retinanet_resnet50_fpn_v2(weights=None, weights_backbone=None, num_classes=CLASSES)
        self.net.transform.resize = lambda image, target: (image, target)
        self.last, self.layout = self.net.head.classification_head.cls_logits, torch.contiguous_format
        rules = (self.net.score_thresh, self.net.nms_thresh, self.net.topk_candidates, self.net.detections_per_img)
        assert rules == (TORCHVISION.min_score, TORCHVISION.nms_iou, TORCHVISION.candidates, TORCHVISION.max_boxes), rules

    def logits(self, picture):
        images, _ = self.net.transform([picture])
        return self.net.head(list(self.net.backbone(images.tensors).values()))["cls_logits"].flatten()

    def boxes(self, picture):
        return self.net([picture])[0]["boxes"]

    def cost(self, picture):
        with FlopCounterMode(display=False) as counter:
            self.logits(picture)
        return sum(p.numel() for p in self.net.parameters()), counter.get_total_flops() // 2


def alive(side, picture):
    """`side` in evaluation, its scores spread so that PASSING of them lie above the rules' bound."""
    torch.nn.init.normal_(side.last.weight, std=0.05)
    torch.nn.init.zeros_(side.last.bias)
    side.net.eval()
    for norm in (m for m in side.net.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        norm.train()
        norm.momentum = 1.0
    side.logits(picture)
    side.net.eval()
    bound = math.log(TORCHVISION.min_score / (1 - TORCHVISION.min_score))
    above, below = side.logits(picture).topk(PASSING + 1).values[-2:].tolist()
    torch.nn.init.constant_(side.last.bias, bound - (above + below) / 2)
    return side


def main():
    torch.manual_seed(0)
    picture = torch.rand(3, SIZE, SIZE)
    calls, about = {}, {}
    with torch.inference_mode():
        for kind in (Ours, Theirs):
            for layout, memory_format in FORMATS.items():
                torch.manual_seed(0)
                side = alive(kind(), picture)
                side.net.to(memory_format=memory_format)
                side.layout = memory_format
                calls[side.library, layout] = lambda side=side: side.boxes(picture)
                params, macs = side.cost(picture)
                passing = int((side.logits(picture).sigmoid() > TORCHVISION.min_score).sum())
                about[side.library, layout] = {
                    **{"detector": side.name, "params": params, "macs": macs},
                    **{"passing": passing, "boxes": len(side.boxes(picture))},
                }
        timings = time_in_turn(calls, runs=RUNS, threads_used=2)
    return [
        {
            "library": key[0],
            "format": key[1],
            **about[key],
            "median_ms": 1e3 * t.median,
            "min_ms": 1e3 * min(t.runs),
            "sd_ms": 1e3 * t.spread,
            "runs": len(t.runs),
        }
        for key, t in timings.items()
    ]


def described(rows):
    """Parts of the page: a table, and the ratio as a sentence."""
    header = ("library", "detector", "format", "GMACs", "M parameters", "median ms", "fastest ms", "sd ms", "scores above 0.05", "boxes")
    cells = [
        [
            *(r["library"], r["detector"], r["format"], f"{r['macs'] / 1e9:.1f}", f"{r['params'] / 1e6:.1f}"),
            *(f"{r['median_ms']:.1f}", f"{r['min_ms']:.1f}", f"{r['sd_ms']:.1f}", f"{r['passing']}", f"{r['boxes']}"),
        ]
        for r in rows
    ]
    yield header, cells
    ours, theirs = (min((r for r in rows if r["library"] == name), key=lambda r: r["median_ms"]) for name in ("triscale", "torchvision"))
    yield (
        f"Each in its better format, triscale's detector is {theirs['median_ms'] / ours['median_ms']:.2f} times as fast "
        f"({theirs['macs'] / 1e9:.1f} against {ours['macs'] / 1e9:.1f} GMACs, a ratio of {theirs['macs'] / ours['macs']:.2f}). From a float "
        "picture to boxes, eager float32, with the normalisation and without any resizing; the same 91 classes, the same rules for the choice "
        "of boxes, random weights."
    )
