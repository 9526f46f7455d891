"""Parts of a network that training leaves alone: all but the classifier, or the statistics of batch norms."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from triscale.blocks import BatchNorm
from triscale.model import ConvNet
from triscale.recipe import Recipe


def freeze(net: ConvNet, recipe: Recipe) -> Callable[[], None]:
    """Takes what the recipe freezes out of training; the returned call, after each `net.train()`, puts it into evaluation mode.

    recipe.freeze: only the classifier is trained, and only its dropout is random. recipe.freeze_norms: batch norms work by
    their running statistics, which stay; their weights and biases are trained. Raises ValueError for a network without
    classifier.
    """
    still: list[nn.Module] = []
    if recipe.freeze:
        if net.classifier is None:
            raise ValueError("freeze: the network has no classifier to train")
        still = [child for child in net.children() if child is not net.classifier]
        for p in (p for child in still for p in child.parameters()):
            p.requires_grad_(False)
    elif recipe.freeze_norms:
        still = [m for m in net.modules() if isinstance(m, BatchNorm)]

    def prepare() -> None:
        for module in still:
            module.eval()

    return prepare
