"""Tensor names of other code bases, as tables; the same map serves reading and writing.

A Dialect gives, for each part of our modules, the path of its two layers there: convolution and norm, or the reduction
and expansion of squeeze-excitation. Which parts a network has, and their shapes, comes from its Arch (`parts.tensors`), so
a table lists names and nothing more. Sources: the modules of timm, torchvision, efficientnet_pytorch, Keras (held to them
in the tests); official efficientnet_model.py and effnetv2_model.py; mmpretrain's and mmdetection's backbones.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from triscale.architecture import Arch, Block
from triscale.naming import unknown
from triscale.weights.parts import Shape, tensors


class WeightsError(ValueError):
    """Tensors that are not those of the network. The message lists names, shapes and counts."""


Pair = tuple[str, str]
Names = Mapping[str, Pair]  # our part -> (convolution, norm) or (reduction, expansion)
Layout = Literal["torch", "tensorflow"]


@dataclass(frozen=True, eq=False)  # each is one object: hashed by identity
class Dialect:
    """One code base's names for one family of modules.

    project: the code base, what `convert --to` takes. mark: a pattern that one of its tensors' names matches and no other
        dialect's do.
    trunk: stem, head and classifier (a layer of its own: the second name is unused).
    block: the prefix of a block's layers. Both are templates of `_places`.
    blocks: `variety(block)` -> names of its parts, relative to the prefix. A part that is not listed has no name there.
    leaves: "norm.running_var" -> name, where a tensor's own name differs from torch's; roles are conv, depthwise, norm,
        squeeze (its two layers) and classifier. The value takes its separator along: "/moving_variance".
    layout: of convolutions (out, in, h, w) and dense layers (out, in), or TensorFlow's (h, w, in, out), (h, w, channel, 1)
        for depthwise ones, and (in, out).
    others: prefixes of what belongs to other parts of its models: a detector's neck and heads, a preprocessing layer.
    first: (stage, layer) -> prefix, where a block's prefix doesn't follow the template.
    numerics: (pattern of arch names, what its modules compute with) in order; the first that matches counts.
    """

    name: str
    project: str
    mark: str
    trunk: Names
    block: str
    blocks: Mapping[str, Names]
    leaves: Mapping[str, str] = field(default_factory=dict)
    layout: Layout = "torch"
    others: tuple[str, ...] = ()
    first: Mapping[tuple[int, int], str] = field(default_factory=dict)
    numerics: tuple[tuple[str, Mapping[str, Any]], ...] = ()

    def names(self, arch: Arch, ours: Iterable[str]) -> dict[str, str]:
        """Our tensor names -> this dialect's. Raises WeightsError where it has none for a part of the network."""
        places, blocks = _places(arch), {(b.stage_index, b.layer): b for b in arch.blocks()}
        trunk = {part: tuple(name.format(**places[None]) for name in pair) for part, pair in self.trunk.items()}
        prefixes = {where: self.first.get(where, self.block).format(**places[where]) for where in blocks}
        out = {}
        for key in ours:
            *module, leaf = key.split(".")
            prefix, names, what = "", trunk, "a network"
            if module[0] == "body":
                where = int(module[1]), int(module[2])
                kind = variety(blocks[where])
                prefix, names, what = prefixes[where], dict(self.blocks.get(kind, {})), f"a block '{kind}'"
                module = module[3:]
            part, layer = module[0], module[-1]
            if part not in names:
                raise WeightsError(f"the {self.name} names have none for '{part}' in {what} (our tensor {key})")
            out[key] = prefix + names[part][layer in ("norm", "expand") and len(module) > 1] + self.leaves.get(f"{role(key)}.{leaf}", f".{leaf}")
        return out

    def shape(self, key: str, shape: Shape) -> Shape:
        """The shape there of our tensor `key` of `shape`."""
        return tuple(shape[i] for i in self.axes(key, len(shape)))

    def axes(self, key: str, dimensions: int) -> tuple[int, ...]:
        """The permutation of our tensor's axes that gives theirs."""
        if self.layout == "torch" or dimensions == 1:
            return tuple(range(dimensions))
        if dimensions == 2:
            return 1, 0
        return (2, 3, 0, 1) if role(key) == "depthwise" else (2, 3, 1, 0)

    def computes(self, arch: Arch) -> Arch:
        """`arch` in the numerics that this code base's modules compute with."""
        found = next((changes for pattern, changes in self.numerics if re.fullmatch(pattern, arch.name)), {})
        return arch.with_numerics(**found) if found else arch


def role(key: str) -> str:
    """What kind of layer holds our tensor `key`: conv, depthwise, norm, squeeze or classifier."""
    *module, _ = key.split(".")
    if "se" in module:
        return "squeeze"
    if module[-1] in ("norm", "classifier"):
        return module[-1]
    return "depthwise" if module[-2] == "depthwise" else "conv"


def variety(block: Block) -> str:
    """The key of a block in `Dialect.blocks`: its kind, `conv` for the fused block of expand 1, and for the inverted bottleneck
    `mbconv1` without expansion, `plain_...` without squeeze-excitation."""
    kind, expand = block.stage.block, block.stage.expand
    if kind == "mbconv":
        return ("" if block.squeezed else "plain_") + ("mbconv1" if expand == 1 else "mbconv")
    return "conv" if kind == "fused_mbconv" and expand == 1 else kind


def _places(arch: Arch) -> dict[tuple[int, int] | None, dict[str, Any]]:
    """What the templates of names count by, for each (stage, layer), and for the network (None).

    stage, layer (in the stage), letter (a, b, ... for the layer), index (in the network), group (stages up to the next of
    stride 2, OpenMMLab's layers) and place (in the group), each from 0; with a 1 behind it, from 1. For the network: how
    many there are.
    """
    out: dict[tuple[int, int] | None, dict[str, Any]] = {}
    group = place = -1
    for block in arch.blocks():
        new = block.layer == 0 and (block.stage_index == 0 or block.stage.stride > 1)
        group, place = (group + 1, 0) if new else (group, place + 1)
        zero = {"stage": block.stage_index, "layer": block.layer, "index": block.index, "group": group, "place": place}
        out[block.stage_index, block.layer] = zero | {f"{k}1": v + 1 for k, v in zero.items()} | {"letter": chr(ord("a") + block.layer)}
    zero = {"stage": len(arch.stages), "index": len(out), "group": group + 1}
    out[None] = zero | {f"{k}1": v + 1 for k, v in zero.items()}
    return out


def names(arch: Arch, dialect: Dialect, ours: Iterable[str] | None = None) -> dict[str, str]:
    """Our tensor names -> the dialect's, one to one. `ours`: those of a network that exists; by default one of 1000 classes.

    Raises WeightsError where the dialect has no name for a part of the network.
    """
    return dialect.names(arch, tensors(arch) if ours is None else ours)


def dialect_of(project: str, arch: Arch) -> Dialect:
    """The code base's dialect for this network. Raises ValueError for an unknown code base or a network that it has no names for."""
    from triscale.weights.tables import DIALECTS

    known = dict.fromkeys(d.project for d in DIALECTS)
    if project not in known:
        raise unknown("code base", project, known)
    refused = ""
    for dialect in (d for d in DIALECTS if d.project == project):
        try:
            dialect.names(arch, tensors(arch))
            return dialect
        except WeightsError as error:
            refused = refused or str(error)
    raise WeightsError(f"{arch.name or 'this network'} has no names in {project}: {refused}")
