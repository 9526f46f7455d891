"""Published checkpoints, as rows: which network, where its file is, what to feed it, how accurate it was.

The rows are zoo.csv beside this file; an empty cell means not published, or the network's own value. Sources of the rows:
timm 1.0.31's registry and results-imagenet.csv (July 2024); torchvision 0.29's weights; mmpretrain's model cards;
EfficientNet-PyTorch's utils.py; the README files of tensorflow/tpu's EfficientNet and google/automl's EfficientNetV2; Keras's
source and its table of models. No torch is loaded to read them.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from triscale import families
from triscale.architecture import Arch
from triscale.naming import UnknownNameError, unknown
from triscale.recipe import CENTRED_MEAN, CENTRED_STD, IMAGENET_MEAN, IMAGENET_STD, LITE_MEAN, LITE_STD, UNIT_MEAN, UNIT_STD, Preprocess

# The order in which a short name is looked for. timm's come as .safetensors; the next three carry a hash in the file's name;
# the official archives hold optimiser slots too and have no published hash; Keras's files need h5py.
SOURCES = ("timm", "torchvision", "openmmlab", "lukemelas", "official", "keras")

NORMALISE = {
    "imagenet": (IMAGENET_MEAN, IMAGENET_STD),
    "unit": (UNIT_MEAN, UNIT_STD),
    "lite": (LITE_MEAN, LITE_STD),
    "centred": (CENTRED_MEAN, CENTRED_STD),
}


@dataclass(frozen=True)
class Entry:
    """One published checkpoint. Its tensor names are those of the dialect whose `project` is `source`.

    tag: the training, under one name for all sources: imagenet (Inception-style crops and flips), imagenet-aa (AutoAugment),
        imagenet-advprop, imagenet-ns (RandAugment and Noisy Student), imagenet21k, imagenet21k-ft; "" for anything else.
    own: the source's own name for it.
    where: a URL, or a repository of the Hugging Face hub that holds model.safetensors.
    hash: "sha256:" with all 64 hex digits or the first 8 that file names carry, "md5:" with 32, "" where none is published.
    numerics: (field, value) pairs that differ from the named network's.
    top1, top5: percent on ImageNet's validation images, as published; None where not.
    measured: what they were measured with, where that is not `preprocess`; "not published" where the source doesn't say.
    """

    arch: str
    source: str
    tag: str
    own: str
    where: str
    hash: str
    numerics: tuple[tuple[str, Any], ...]
    preprocess: Preprocess
    classes: int
    top1: float | None
    top5: float | None
    measured: str

    @property
    def name(self) -> str:
        """Unique: `efficientnet_b0:timm/aa_in1k`."""
        return f"{self.arch}:{self.source}/{self.own}"

    @property
    def is_url(self) -> bool:
        return self.where.startswith(("http://", "https://"))

    def network(self) -> Arch:
        """The named network in the numeric dialect that the weights were trained in."""
        return families.arch(self.arch).with_numerics(**dict(self.numerics))


def entries(arch_name: str | None = None) -> tuple[Entry, ...]:
    """Every row, or those of one named network, network by network and in the order of SOURCES. Raises UnknownNameError."""
    if arch_name is None:
        return _table()
    families.arch(arch_name)
    return tuple(entry for entry in _table() if entry.arch == arch_name)


def find(name: str, weights: str) -> Entry:
    """The checkpoint `weights` of the network `name`.

    weights: "SOURCE/TAG" with a common tag or the source's own ("official/imagenet-aa", "timm/ra_in1k"); or a common tag
    alone, taken from the first of SOURCES that has it. Raises UnknownNameError, which says what there is for the network.
    """
    rows = entries(name)
    source, slash, tag = weights.partition("/")
    found = [e for e in rows if (e.source == source and tag in (e.tag, e.own) and tag if slash else weights and e.tag == weights)]
    if found:
        return found[0]
    known = list(dict.fromkeys([e.tag for e in rows if e.tag] + [f"{e.source}/{e.own}" for e in rows]))
    nearest = str(unknown(f"weights for {name}", weights, known)).partition("; known are")[0]
    raise UnknownNameError(f"{nearest}; there are {', '.join(known)}")


def published(arch_name: str, source: str, path: str = "") -> tuple[Entry | None, bool]:
    """The row whose preprocessing and numerics a checkpoint of this network in this source's names most likely has, and whether
    its file's name or folder says so.

    timm's `tf_` networks compute otherwise than its own under the same tensor names: a path that says `tf_` means the former.
    Among several the plainest training comes first. None where the source publishes nothing for the network.
    """
    rows = [entry for entry in _table() if (entry.arch, entry.source) == (arch_name, source)]
    parts = path.replace("\\", "/").split("/")[-5:]
    for entry in rows:
        name = entry.where.split("/")[-1]
        if any(name in (part, part.partition(".safetensors")[0]) or part.endswith(f"--{name}") for part in parts):
            return entry, True
    if source == "timm":
        tf = any("tf_" in part for part in parts)
        rows = [entry for entry in rows if ("/tf_" in entry.where) == tf] or rows
    plain = [entry for tag in ("imagenet", "imagenet-aa") for entry in rows if entry.tag == tag]
    return next(iter([*plain, *rows]), None), False


@cache
def _table() -> tuple[Entry, ...]:
    text = (files("triscale.weights") / "zoo.csv").read_text(encoding="utf-8")
    return tuple(_entry(row) for row in csv.DictReader(text.splitlines()))


def _entry(row: dict[str, str]) -> Entry:
    numerics = {"padding": row["padding"], "norm_eps": float(row["eps"]) if row["eps"] else ""}
    mean, std = NORMALISE[row["normalise"]]
    crop: Any = row["crop"]
    interpolation: Any = row["interpolation"]
    return Entry(
        arch=row["arch"],
        source=row["source"],
        tag=row["tag"],
        own=row["own"],
        where=row["where"],
        hash=row["hash"],
        numerics=tuple((key, value) for key, value in numerics.items() if value),
        preprocess=Preprocess(int(row["size"]), int(row["crop_padding"]), crop, interpolation, mean, std),
        classes=int(row["classes"]),
        top1=float(row["top1"]) if row["top1"] else None,
        top5=float(row["top5"]) if row["top5"] else None,
        measured=row["measured"],
    )
