"""What a training begins with: fresh weights, or those of a checkpoint under a new classifier; and what of them is trained."""

from __future__ import annotations

import os
import warnings
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from triscale.architecture import Arch
from triscale.blocks import BatchNorm
from triscale.model import ConvNet, build
from triscale.recipe import Recipe
from triscale.train.advprop import with_auxiliary_norms
from triscale.train.freeze import freeze
from triscale.weights.load import load_weights

PROBE = 0.03  # of a fresh classifier's values over a frozen body


@dataclass(frozen=True)
class Start:
    """Weights to begin with. source: what `load_weights` takes. classes: their names, where known: with the data set's own names
    the classifier is kept, else it is made anew. raw: not the moving averages. label: what messages call them."""

    source: str | os.PathLike[str] | Mapping[str, Tensor]
    classes: tuple[str, ...] = ()
    raw: bool = False
    label: str = ""


@dataclass(frozen=True)
class Network:
    """A network that is ready to be trained. prepare: to be called after each `net.train()`. weights: a sum over those it began
    with, "" for fresh ones."""

    net: ConvNet
    prepare: Callable[[], None]
    weights: str


def start_from(arch: Arch, classes: tuple[str, ...], channels: int, recipe: Recipe, start: Start | None = None) -> Network:
    """`arch` for these classes on the CPU, channels-last, initialised under the recipe's seed or from `start`, with what the
    recipe freezes frozen and the norms that it asks for.

    Raises WeightsError for weights that don't fit, ValueError for a recipe that freezes parts of a network that nothing
    was loaded into.
    """
    torch.manual_seed(recipe.seed)
    net, check = build(arch, len(classes), channels), ""
    if start is None and (recipe.freeze or recipe.freeze_norms):
        raise ValueError("--freeze and --freeze-norms: there is nothing to keep in fresh weights; --weights gives others")
    if recipe.advprop and (recipe.freeze or recipe.freeze_norms):
        raise ValueError("--advprop: its auxiliary norms are trained, which --freeze and --freeze-norms leave out; take one of them")
    if start is not None:
        fresh = {k: v.clone() for k, v in net.state_dict().items() if k.startswith("classifier.")}
        _load(net, start)
        if start.classes != classes:
            if recipe.freeze and net.classifier is not None:  # the official values, +-1/sqrt(classes), drown what a probe learns
                fresh = {k: v * PROBE for k, v in fresh.items()}
            net.load_state_dict(fresh, strict=False)
        check = _check(net)
    if recipe.norm_momentum:
        for norm in (m for m in net.modules() if isinstance(m, BatchNorm)):
            norm.momentum = recipe.norm_momentum
    prepare = freeze(net, recipe)
    if recipe.advprop:
        with_auxiliary_norms(net)
    return Network(net.to(memory_format=torch.channels_last), prepare, check)


def _load(net: ConvNet, start: Start) -> None:
    """That the classifier is new goes without saying here; what else is missing is still told."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        load_weights(net, start.source, raw=start.raw, transfer=True)
    for warning in told:
        if not str(warning.message).endswith(f": the classifier of {net.num_classes} classes"):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def _check(net: nn.Module) -> str:
    """A sum over all values but the classifier's."""
    check = 0
    for name, value in net.state_dict().items():
        if not name.startswith("classifier."):
            check = zlib.crc32(value.detach().contiguous().view(torch.uint8).numpy(), check)
    return f"{check:08x}"
