"""The 1000 classes of ImageNet-1k (ILSVRC 2012), in the order that every published checkpoint has: WordNet ids sorted."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import NamedTuple

CLASSES = 1000


class ImageNetClass(NamedTuple):
    """wnid: WordNet id, the name of its folder (n01440764). name: its first lemma, made unique (134 "crane bird", 517 "crane")."""

    wnid: str
    name: str


@cache
def imagenet_classes() -> tuple[ImageNetClass, ...]:
    """The classes by index, 0 to 999."""
    text = files("triscale").joinpath("imagenet_classes.txt").read_text(encoding="utf-8")
    return tuple(ImageNetClass(*line.split(" ", 1)) for line in text.splitlines())


def class_names(count: int) -> tuple[str, ...]:
    """Names for a classifier of which nothing else is known: ImageNet's for 1000 outputs, else "class 0", "class 1", ..."""
    return tuple(c.name for c in imagenet_classes()) if count == CLASSES else tuple(f"class {i}" for i in range(count))
