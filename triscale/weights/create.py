"""A network by name, with published weights."""

from __future__ import annotations

import os
from pathlib import Path

from triscale import families
from triscale.model import ConvNet, build
from triscale.naming import UnknownNameError
from triscale.recipe import Preprocess
from triscale.weights.dialects import WeightsError
from triscale.weights.fetch import fetch
from triscale.weights.load import load_weights
from triscale.weights.open import open_model
from triscale.weights.zoo import find


def create_model(
    name: str,
    weights: str | os.PathLike[str] | None = None,
    *,
    num_classes: int | None = None,
    in_channels: int = 3,
    offline: bool = False,
) -> ConvNet:
    """The named network: in training mode with fresh weights where `weights` is None, else in evaluation mode with these.

    weights: "imagenet-aa", "timm/ra_in1k" (see `triscale.weights.zoo.find`; fetched once, then read from the cache; offline:
    from the cache alone), or the path of a checkpoint file of this network. A name of the zoo comes before a file or folder
    that is called the same.

    The network has the numerics that its weights were trained with, and `net.preprocess`, what its images go through.
    num_classes: by default the checkpoint's, 1000 without one. With another number the classifier stays fresh and the rest
    is loaded, which a WeightsWarning says. Raises UnknownNameError for a name or tag, FetchError, WeightsError.
    """
    arch = families.arch(name)
    if weights is None:
        preprocess = Preprocess(arch.resolution, mean=(127.5,), std=(127.5,)) if in_channels == 1 else Preprocess(arch.resolution)
        return _ready(build(arch, 1000 if num_classes is None else num_classes, in_channels), preprocess, training=True)
    try:
        entry = find(name, os.fspath(weights))
    except UnknownNameError:
        if not Path(weights).exists():
            raise
        return _from_file(name, Path(weights), num_classes, in_channels)
    if in_channels != entry.preprocess.channels:
        raise WeightsError(
            f"{entry.name}: trained on {entry.preprocess.channels} input channels, not {in_channels}; weights=None builds a fresh network"
        )
    path = fetch(entry, offline=offline)
    if num_classes in (None, entry.classes):
        return _ready(open_model(path, arch=entry.network(), preprocess=entry.preprocess, numerics="arch")[0], entry.preprocess)  # allocated once
    net = build(entry.network(), entry.classes if num_classes is None else num_classes, in_channels)
    return _ready(load_weights(net, path, transfer=True), entry.preprocess)


def _from_file(name: str, path: Path, num_classes: int | None, in_channels: int) -> ConvNet:
    net, card = open_model(path)
    if net.arch.topology[:3] != families.arch(name).topology[:3]:
        raise WeightsError(f"{path}: holds {net.arch.name or 'another network'}, not {name}")
    if num_classes not in (None, net.num_classes) or in_channels != net.in_channels:
        wanted = build(net.arch, net.num_classes if num_classes is None else num_classes, in_channels)
        net = load_weights(wanted, net.state_dict(), transfer=True)
    return _ready(net, card.preprocess)


def _ready(net: ConvNet, preprocess: Preprocess, *, training: bool = False) -> ConvNet:
    net.preprocess = preprocess  # type: ignore[assignment] # modules take any attribute; the stubs know of tensors and modules
    return net.train(training)
