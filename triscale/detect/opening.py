"""A detector's file as a network ready to run, with its card: ours says everything itself, mmdetection's checkpoint is completed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from triscale.detect.coco_classes import COCO_CLASSES
from triscale.detect.mmdetection import class_names, count_classes, mmdet_state
from triscale.detect.model_file import KEY, DetectorCard, load_detector
from triscale.detect.retinanet import Detector, build_detector
from triscale.detector import DetectorArch, detector
from triscale.recipe import Preprocess
from triscale.text import printable
from triscale.weights.dialects import WeightsError
from triscale.weights.model_file import KEY as CLASSIFIER_KEY
from triscale.weights.readers import Stored, open_tensors

REFERENCE = "retinanet_efficientnet_b3_fpn"


def open_detector(
    source: str | os.PathLike[str], *, arch: DetectorArch | None = None, size: int | None = None, classes: Sequence[str] = ()
) -> tuple[Detector, DetectorCard]:
    """The detector, in evaluation mode on the CPU, float32 and channels-last, and its card.

    Of a checkpoint of mmdetection arch is the reference's unless given, which loading it then proves but for what has no tensor (padding,
    epsilon, anchors' scale); size the arch's resolution; classes those of its meta, else COCO's where there are 80. What was assumed
    stands in the card's provenance, key "assumed", as lines. size: of the square, also instead of our own file's.

    Raises WeightsError, ModelFileError, CheckpointError, RecipeError, one line: a file that says otherwise than the arguments, tensors
    that don't fit, classes without names.
    """
    stored = open_tensors(source)
    if KEY in stored.metadata or CLASSIFIER_KEY in stored.metadata:
        net, card = load_detector(source)
        for name, given, own in (("architecture", arch, card.arch), ("class names", tuple(classes), card.classes)):
            if given and given != own:
                raise WeightsError(f"{stored.label}: carries its own {name}, which isn't what was given")
        return net, card if size is None else replace(card, preprocess=replace(card.preprocess, size=size))
    assumed = [] if arch else [f"the network is {REFERENCE}"]
    used = arch or detector(REFERENCE)
    preprocess = Preprocess(used.backbone.resolution if size is None else size)
    assumed += ["ImageNet's mean and std"] if size else [f"{preprocess.size} px, ImageNet's mean and std"]
    used = replace(used, backbone=replace(used.backbone, resolution=preprocess.size))
    try:
        count = count_classes(stored.shapes, used)
        names = _names(stored, count, tuple(classes), assumed)
    except WeightsError as error:
        raise WeightsError(f"{stored.label}: {error}") from None
    with torch.device("meta"):
        net = build_detector(used, count)
    try:
        state = mmdet_state(net, stored)
    except WeightsError as error:
        raise WeightsError(f"{error}; expected {used.name or 'the network given'}{'' if arch else ', as no other was given'}") from None
    net.load_state_dict({key: value.float() for key, value in state.items()}, assign=True)
    card = DetectorCard(used, preprocess, names, _ids(names), provenance={"source": Path(source).name, "dialect": "mmdetection", "assumed": assumed})
    return net.eval().to(memory_format=torch.channels_last), card


def _names(stored: Stored, count: int, given: tuple[str, ...], assumed: list[str]) -> tuple[str, ...]:
    told = given or class_names(stored.label)
    if told:
        if len(told) != count or len(set(told)) != count:
            where = "given" if given else "in its meta; give them"
            raise WeightsError(f"its head has {count} classes, but {len(set(told))} different names are {where}: {printable(', '.join(told))[:80]}")
        return told
    if count != len(COCO_CLASSES):
        raise WeightsError(f"its head has {count} classes, and their names aren't in the file; give them")
    assumed.append("the 80 classes are COCO's")
    return tuple(COCO_CLASSES.values())


def _ids(names: tuple[str, ...]) -> tuple[int, ...]:
    """COCO's own for COCO's classes, else from 1."""
    return tuple(COCO_CLASSES) if names == tuple(COCO_CLASSES.values()) else tuple(range(1, len(names) + 1))
