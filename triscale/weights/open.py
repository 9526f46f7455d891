"""Any checkpoint as a network ready to run, with its card: ours carries everything, another's is recognised."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from triscale.architecture import Arch
from triscale.imagenet import class_names
from triscale.model import ConvNet, build
from triscale.recipe import Preprocess
from triscale.weights.dialects import WeightsError
from triscale.weights.load import read_all
from triscale.weights.match import Identity, identify, match, strict
from triscale.weights.model_file import KEY, ModelCard, load_model
from triscale.weights.readers import Stored, open_tensors
from triscale.weights.zoo import Entry, published

NumericsOf = Literal["auto", "tensorflow", "torch", "arch"]
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
    unless `arch` is given, the network by its shapes; numerics and preprocessing are those of the published checkpoint that
    the path names, else of the code base's plainest one for this network (`zoo.published`), class names ImageNet's for 1000
    classes. What was assumed stands in the card's provenance, key "assumed", as lines. numerics: tensorflow (SAME, 1e-3) or
    torch (symmetric, 1e-5) where timm's names leave it open, arch: those of the given Arch. preprocess: instead of the published
    one.

    A network is allocated once: reading peaks at the tensors' size. Raises WeightsError, CheckpointError or ModelFileError.
    """
    stored = open_tensors(source, raw=raw)
    if KEY in stored.metadata and not isinstance(source, Mapping):
        net, card = load_model(source)
        if numerics not in ("auto", "arch"):
            raise WeightsError(f"{stored.label}: carries its own numerics; it can't be read with those of {numerics}")
        if arch is not None and arch != card.arch:
            raise WeightsError(f"{stored.label}: carries its own architecture ({card.arch.name or 'unnamed'}), and it is not the one given")
        return net, card if preprocess is None else ModelCard(card.arch, preprocess, card.classes, card.provenance, card.measured)
    try:
        found = identify(stored.shapes, arch, numerics_too=numerics == "arch")
        row, certain = published(found.arch.name, found.dialect.project, stored.label)
        used, said = _numerics(found, row, numerics)
        matched = strict(match(stored.shapes, used, found.num_classes, found.in_channels, dialect=found.dialect))
    except WeightsError as error:
        raise WeightsError(f"{stored.label}: {error}") from None
    with torch.device("meta"):
        net = build(used, found.num_classes, found.in_channels)
    values = {key: value.float() for key, value in read_all(stored, matched).items()}
    net.load_state_dict({k: v.clone() for k, v in values.items()} if isinstance(source, Mapping) else values, assign=True)
    if preprocess is None:
        preprocess = _preprocess(found, stored, row)
        said += ["" if row and certain else f"preprocessing as {row.name if row else 'the official code'} has it: {describe(preprocess)}"]
    assumed = [] if certain else [line for line in said if line]
    provenance: dict[str, Any] = {"source": Path(stored.label).name, "dialect": found.dialect.name, "assumed": assumed}
    if row and certain:
        provenance |= {"published": row.name, "published_top1": row.top1}
    if preprocess.channels != found.in_channels:
        channels = f"{found.in_channels} input channel{'s' * (found.in_channels > 1)}"
        raise WeightsError(f"{stored.label}: a network of {channels}, but its preprocessing has {preprocess.channels}; give a Preprocess")
    classes = class_names(found.num_classes) if found.num_classes else ("features",)
    return net.eval(), ModelCard(used, preprocess, classes, provenance)


def trunk_of(source: str | os.PathLike[str], *, arch: Arch | None = None, raw: bool = False) -> tuple[Arch, Preprocess, list[str]]:
    """(network with the numerics, preprocessing, what was assumed) of a checkpoint of another code base that may lack tensors, for
    `load_weights(..., transfer=True)`. arch: where it is known. Raises WeightsError, CheckpointError."""
    stored = open_tensors(source, raw=raw)
    try:
        found = identify(stored.shapes, arch)
    except WeightsError as error:
        raise WeightsError(f"{stored.label}: {error}") from None
    row, certain = published(found.arch.name, found.dialect.project, stored.label)
    used, said = _numerics(found, row, "auto")
    preprocess = _preprocess(found, stored, row)
    said += [] if row and certain else [f"preprocessing as {row.name if row else 'the official code'} has it: {describe(preprocess)}"]
    return used, preprocess, said


def describe(preprocess: Preprocess) -> str:
    """`224 px, cut out before the resize, bicubic, mean 124 116 104, std 58 57 57`."""
    where = {"before": "cut out before the resize", "after": "cut out after the resize", "squash": "squashed"}[preprocess.crop]
    mean, std = (" ".join(f"{v:.0f}" for v in values) for values in (preprocess.mean, preprocess.std))
    return f"{preprocess.size} px, {where} with {preprocess.crop_padding} px around, {preprocess.interpolation}, mean {mean}, std {std}"


def _numerics(found: Identity, row: Entry | None, wanted: NumericsOf) -> tuple[Arch, list[str]]:
    """The network in the numerics that the weights were trained with, and what was assumed."""
    if wanted == "arch":
        return found.arch, []
    if wanted != "auto":
        return found.arch.with_numerics(**NUMERICS[wanted]), []
    if row is None or found.dialect.project != "timm":
        return found.arch, []
    numerics = row.network().numerics
    how = f"{numerics.padding} padding and eps {numerics.norm_eps:g} as {row.name} has it"
    return found.arch.with_numerics(padding=numerics.padding, norm_eps=numerics.norm_eps), [how]


def _preprocess(found: Identity, stored: Stored, row: Entry | None) -> Preprocess:
    """The file's own normalisation, where it has layers for it, in the row's geometry."""
    preprocess = row.preprocess if row else Preprocess(found.arch.resolution)
    if found.in_channels == 1:
        preprocess = replace(preprocess, mean=(127.5,), std=(127.5,))
    if {"mean", "std"} <= stored.metadata.keys():
        mean, std = (tuple(json.loads(stored.metadata[key])) for key in ("mean", "std"))
        preprocess = replace(preprocess, mean=mean, std=std)
    return preprocess
