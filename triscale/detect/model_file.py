"""A detector is one .safetensors file, as a classifier is: its metadata carries all that predicting and training on need."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from triscale.architecture import Arch
from triscale.detect.retinanet import Detector, build_detector
from triscale.detect.rules import MMDETECTION, Rules
from triscale.detector import DetectorArch
from triscale.recipe import Preprocess
from triscale.weights.model_file import KEY as CLASSIFIER_KEY
from triscale.weights.model_file import ModelFileError, read_state, write_state

FORMAT = 1
KEY = "triscale-detector"


@dataclass(frozen=True)
class DetectorCard:
    """What a detector's file says of itself.

    preprocess: the square's side and the normalisation; how a picture comes into the square is `geometry.evaluation_frame`'s.
    category_ids: of each class in the data that it was trained on, what results in COCO's format carry. provenance: free facts
    (data, recipe, version); measured: e.g. {"AP": 0.41}.
    """

    arch: DetectorArch
    preprocess: Preprocess
    classes: tuple[str, ...]
    category_ids: tuple[int, ...]
    rules: Rules = MMDETECTION
    provenance: dict[str, Any] = field(default_factory=dict)
    measured: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> str:
        body = {
            "format": FORMAT,
            "arch": json.loads(self.arch.to_json()),
            "preprocess": self.preprocess.to_dict(),
            "classes": list(self.classes),
            "category_ids": list(self.category_ids),
            "rules": asdict(self.rules),
            "provenance": self.provenance,
            "measured": self.measured,
        }
        return json.dumps(body)

    @staticmethod
    def from_json(text: str) -> DetectorCard:
        """Raises ValueError or TypeError for anything else than what `to_json` wrote."""
        data = json.loads(text)
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            raise ValueError(f'expected "format": {FORMAT}')
        classes, ids = data.get("classes"), data.get("category_ids")
        if not isinstance(classes, list) or not all(isinstance(c, str) for c in classes) or not classes:
            raise ValueError("expected a list of class names")
        if not isinstance(ids, list) or not all(type(i) is int for i in ids) or len(set(ids)) != len(classes):
            raise ValueError("expected an id for each class")
        return DetectorCard(
            DetectorArch.from_json(json.dumps(data.get("arch"))),
            Preprocess.from_dict(data.get("preprocess") or {}),
            tuple(classes),
            tuple(ids),
            Rules(**data.get("rules", {})),
            dict(data.get("provenance") or {}),
            dict(data.get("measured") or {}),
        )


def save_detector(path: str | os.PathLike[str], net: Detector, card: DetectorCard) -> None:
    """Writes the file, whole or not at all. Tensors are stored contiguous, in the net's own precision. Raises OSError."""
    write_state(path, net, {KEY: card.to_json()})


def load_detector(path: str | os.PathLike[str]) -> tuple[Detector, DetectorCard]:
    """The detector, in evaluation mode on the CPU, float32 and channels-last, and its card. Raises ModelFileError.

    Every tensor must be there with its shape, and none more. Nothing is executed.
    """

    def read(metadata: Mapping[str, str]) -> tuple[DetectorCard, Arch]:
        if KEY not in metadata:
            what = "a classifier" if CLASSIFIER_KEY in metadata else f"no triscale detector (no '{KEY}' in its metadata)"
            raise ModelFileError(f"{what}; expected a detector's file")
        card = DetectorCard.from_json(metadata[KEY])
        return card, card.arch.backbone

    make = lambda card: build_detector(card.arch, len(card.classes), card.preprocess.channels, card.rules)  # noqa: E731
    net, card = read_state(path, "detector", read, make)
    return net.to(memory_format=torch.channels_last), card
