"""Any checkpoint as a network ready to run, with its card: ours carries everything, another's is recognised."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from triscale.architecture import Arch
from triscale.imagenet import class_names
from triscale.model import ConvNet, build
from triscale.recipe import IMAGENET_MEAN, IMAGENET_STD, KERAS_MEAN, KERAS_STD, LITE_MEAN, LITE_STD, UNIT_MEAN, UNIT_STD, Preprocess
from triscale.weights.dialects import WeightsError
from triscale.weights.load import read_all
from triscale.weights.match import Identity, identify, match, strict
from triscale.weights.model_file import KEY, ModelCard, load_model
from triscale.weights.readers import Stored, open_tensors

NumericsOf = Literal["auto", "tensorflow", "torch"]
NUMERICS = {"tensorflow": {"padding": "same", "norm_eps": 1e-3}, "torch": {"padding": "symmetric", "norm_eps": 1e-5}}


def open_model(
    source: str | os.PathLike[str] | Mapping[str, Tensor],
    *,
    arch: Arch | None = None,
    raw: bool = False,
    preprocess: Preprocess | None = None,
    numerics: NumericsOf = "auto",
) -> tuple[ConvNet, ModelCard]:
    """The network of a checkpoint, in evaluation mode on the CPU, and what is known of it.

    A model file of ours says everything itself. Of any other (see `load_weights`) the dialect is recognised by its names and,
    unless `arch` is given, the network by its shapes; numerics are the code base's, preprocessing its custom for that network,
    class names ImageNet's for 1000 classes. What was assumed stands in the card's provenance, key "assumed". numerics:
    tensorflow or torch where timm's names leave it open (its `tf_` networks against its own); auto looks for `tf_` in the
    file's path. preprocess: instead of the file's or the custom one.

    A network is allocated once: reading peaks at the tensors' size. Raises WeightsError, CheckpointError or ModelFileError.
    """
    stored = open_tensors(source, raw=raw)
    if KEY in stored.metadata and not isinstance(source, Mapping):
        net, card = load_model(source)
        if arch is not None and arch != card.arch:
            raise WeightsError(f"{stored.label}: carries its own architecture ({card.arch.name or 'unnamed'}), and it is not the one given")
        return net, card if preprocess is None else ModelCard(card.arch, preprocess, card.classes, card.provenance, card.measured)
    try:
        found = identify(stored.shapes, arch)
        dialect, num_classes, channels = found.dialect, found.num_classes, found.in_channels
        used, why = _numerics(found, stored, numerics, arch is not None)
        matched = strict(match(stored.shapes, used, num_classes, channels, dialect=dialect))
    except WeightsError as error:
        raise WeightsError(f"{stored.label}: {error}") from None
    with torch.device("meta"):
        net = build(used, num_classes, channels)
    values = {key: value.float() for key, value in read_all(stored, matched).items()}
    net.load_state_dict({k: v.clone() for k, v in values.items()} if isinstance(source, Mapping) else values, assign=True)
    assumed = [why] if why else []
    if preprocess is None:
        preprocess = _preprocess(found, stored)
        assumed.append(f"preprocessing as {dialect.project} has it for this network")
    provenance = {"source": Path(stored.label).name, "dialect": dialect.name, "assumed": assumed}
    return net.eval(), ModelCard(used, preprocess, class_names(num_classes) if num_classes else ("features",), provenance)


def _numerics(found: Identity, stored: Stored, wanted: NumericsOf, given: bool) -> tuple[Arch, str]:
    """The network in the numerics that the weights were trained with, and what was assumed."""
    if wanted != "auto":
        return found.arch.with_numerics(**NUMERICS[wanted]), ""
    if given or found.dialect.project != "timm" or not found.arch.name.startswith("efficientnet"):
        return found.arch, ""
    names = [stored.metadata.get("architecture", ""), *Path(stored.label).parts[-5:]]
    config = Path(stored.label).with_name("config.json")  # lies beside the weights in a Hugging Face repository
    if config.is_file() and config.stat().st_size < 1 << 20:
        with contextlib.suppress(ValueError, AttributeError, OSError):
            names.append(str(json.loads(config.read_text(encoding="utf-8")).get("architecture", "")))
    kind: NumericsOf = "tensorflow" if any("tf_" in name for name in names) else "torch"
    how = "SAME padding, eps 1e-3" if kind == "tensorflow" else "symmetric padding, eps 1e-5"
    return found.arch.with_numerics(**NUMERICS[kind]), f"{how} (timm's tf_ networks have the first, its own the second)"


# What a code base feeds a network where it isn't ImageNet's mean and std: (project, pattern of names) -> (mean, std).
_CUSTOMS = (
    ("official", "efficientnet_lite.*", (LITE_MEAN, LITE_STD)),
    ("official", "efficientnetv2_.*", (KERAS_MEAN, KERAS_STD)),
    ("keras", "efficientnetv2_[sml]", (KERAS_MEAN, KERAS_STD)),
    ("keras", "mobilenet_v2", (UNIT_MEAN, UNIT_STD)),
    ("timm", "efficientnet_lite.*|efficientnetv2_[sml]|mobilenet_v1", (UNIT_MEAN, UNIT_STD)),
)


def _preprocess(found: Identity, stored: Stored) -> Preprocess:
    name, project, size = found.arch.name, found.dialect.project, found.arch.resolution
    mean, std = next((s for p, pattern, s in _CUSTOMS if p == project and re.fullmatch(pattern, name)), (IMAGENET_MEAN, IMAGENET_STD))
    if {"mean", "std"} <= stored.metadata.keys():
        mean, std = (tuple(json.loads(stored.metadata[key])) for key in ("mean", "std"))
    after = project in ("timm", "torchvision", "lukemelas")
    return Preprocess(size, 32, "after" if after else "before", "bicubic-tf" if project == "official" else "bicubic", mean, std)
