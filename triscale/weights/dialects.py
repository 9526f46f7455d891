"""Tensor names of other code bases, as tables; the same map serves reading and writing.

A Dialect gives, for each part of our modules, the path of its two layers there: convolution and norm, or the reduction
and expansion of squeeze-excitation. Everything else, which parts a network has and their shapes, comes from the module
that its Arch builds, so a table lists names and nothing more.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from triscale.architecture import Arch, Block

if TYPE_CHECKING:
    from torch import Tensor

SHOWN = 10  # names an error lists before it counts the rest
DROPPED = "num_batches_tracked"  # torch's batch counter, which nothing reads

Names = Mapping[str, tuple[str, str]]  # our part -> (convolution, norm) or (reduction, expansion)


class WeightsError(ValueError):
    """Tensors that are not those of the network. The message lists names, shapes and counts."""


@dataclass(frozen=True)
class Dialect:
    """One code base's names.

    trunk: stem, head and classifier (a layer of its own: the second name is unused).
    block: the prefix of a block's layers, a template of stage, layer (in the stage) and index (in the network), each from
        0; stage1, layer1 and index1 count from 1.
    blocks: `variety(block)` -> names of its parts, relative to the prefix. A part that is not listed has no name there.
    leaves: "norm.running_var" -> name, where a tensor's own name differs from torch's; roles are conv, depthwise, norm,
        squeeze (its two layers) and classifier. The value takes its separator along: "/moving_variance".
    """

    name: str
    trunk: Names
    block: str
    blocks: Mapping[str, Names]
    leaves: Mapping[str, str] = field(default_factory=dict)

    def path(self, key: str, blocks: Mapping[tuple[int, int], Block]) -> str:
        """The name of our tensor `key` here. `blocks`: (stage, layer) -> Block."""
        *module, leaf = key.split(".")
        prefix, names, where = "", self.trunk, "a network"
        if module[0] == "body":
            block = blocks[int(module[1]), int(module[2])]
            prefix, names, where = self.block.format(**_place(block)), self.blocks.get(variety(block), {}), f"a block '{variety(block)}'"
            module = module[3:]
        part, layer = module[0], module[-1]
        if part not in names:
            raise WeightsError(f"the {self.name} names have none for '{part}' in {where} (our tensor {key})")
        role = {"se": "squeeze", "classifier": "classifier"}.get(part, "norm" if layer == "norm" else "conv")
        if role == "conv" and part == "depthwise":
            role = "depthwise"
        second = layer in ("norm", "expand")
        return prefix + names[part][second] + self.leaves.get(f"{role}.{leaf}", f".{leaf}")


def variety(block: Block) -> str:
    """The key of a block in `Dialect.blocks`: its kind, with `mbconv1` for no expansion and `conv` for the fused block of expand 1."""
    kind = block.stage.block
    if block.stage.expand == 1 and kind in ("mbconv", "fused_mbconv"):
        return {"mbconv": "mbconv1", "fused_mbconv": "conv"}[kind]
    return kind


def _place(block: Block) -> dict[str, int]:
    zero = {"stage": block.stage_index, "layer": block.layer, "index": block.index}
    return zero | {f"{key}1": value + 1 for key, value in zero.items()}


_OURS = ("conv", "depthwise", "pointwise", "expand", "project", "conv1", "conv2", "conv3", "shortcut")
_OUR_PARTS: Names = {part: (f"{part}.conv", f"{part}.norm") for part in _OURS} | {"se": ("se.reduce", "se.expand")}
_KINDS = ("conv", "separable", "mbconv", "mbconv1", "fused_mbconv", "basic", "bottleneck")

TRISCALE = Dialect(
    "triscale",
    {"stem": ("stem.conv", "stem.norm"), "head": ("head.conv", "head.norm"), "classifier": ("classifier", "")},
    "body.{stage}.{layer}.",
    dict.fromkeys(_KINDS, _OUR_PARTS),
)

_TIMM_SE = ("se.conv_reduce", "se.conv_expand")

# timm's EfficientNet builder: EfficientNet, V2, Lite, MobileNetV1 and V2, MnasNet.
TIMM = Dialect(
    "timm",
    {"stem": ("conv_stem", "bn1"), "head": ("conv_head", "bn2"), "classifier": ("classifier", "")},
    "blocks.{stage}.{layer}.",
    {
        "conv": {"conv": ("conv", "bn1")},
        "separable": {"depthwise": ("conv_dw", "bn1"), "pointwise": ("conv_pw", "bn2")},
        "mbconv1": {"depthwise": ("conv_dw", "bn1"), "se": _TIMM_SE, "project": ("conv_pw", "bn2")},
        "mbconv": {"expand": ("conv_pw", "bn1"), "depthwise": ("conv_dw", "bn2"), "se": _TIMM_SE, "project": ("conv_pwl", "bn3")},
        "fused_mbconv": {"expand": ("conv_exp", "bn1"), "se": _TIMM_SE, "project": ("conv_pwl", "bn2")},
    },
)

_RES_PARTS: Names = {f"conv{i}": (f"conv{i}", f"bn{i}") for i in (1, 2, 3)} | {"shortcut": ("downsample.0", "downsample.1")}

# timm's and torchvision's ResNet.
RESNET = Dialect(
    "ResNet",
    {"stem": ("conv1", "bn1"), "classifier": ("fc", "")},
    "layer{stage1}.{layer}.",
    {"basic": _RES_PARTS, "bottleneck": _RES_PARTS},
)

_TF_SE, _TF_NORM = ("se/conv2d", "se/conv2d_1"), "tpu_batch_normalization"

# The official TensorFlow code's, without the network's own prefix; tf.layers numbers the layers of a scope as they are made.
OFFICIAL = Dialect(
    "official TensorFlow",
    {"stem": ("stem/conv2d", f"stem/{_TF_NORM}"), "head": ("head/conv2d", f"head/{_TF_NORM}"), "classifier": ("head/dense", "")},
    "blocks_{index}/",
    {
        "mbconv1": {"depthwise": ("depthwise_conv2d", _TF_NORM), "se": _TF_SE, "project": ("conv2d", f"{_TF_NORM}_1")},
        "mbconv": {
            "expand": ("conv2d", _TF_NORM),
            "depthwise": ("depthwise_conv2d", f"{_TF_NORM}_1"),
            "se": _TF_SE,
            "project": ("conv2d_1", f"{_TF_NORM}_2"),
        },
    },
    {
        "conv.weight": "/kernel",
        "depthwise.weight": "/depthwise_kernel",
        "squeeze.weight": "/kernel",
        "squeeze.bias": "/bias",
        "classifier.weight": "/kernel",
        "classifier.bias": "/bias",
        "norm.weight": "/gamma",
        "norm.bias": "/beta",
        "norm.running_mean": "/moving_mean",
        "norm.running_var": "/moving_variance",
    },
)

DIALECTS = (TRISCALE, TIMM, RESNET, OFFICIAL)


def shapes(arch: Arch, num_classes: int = 1000, in_channels: int = 3) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of `build(arch, num_classes, in_channels)`, none of which is allocated."""
    import torch  # the tables above are read without it

    from triscale.model import build

    with torch.device("meta"):
        return {key: tuple(t.shape) for key, t in build(arch, num_classes, in_channels).state_dict().items()}


def names(arch: Arch, dialect: Dialect, ours: Iterable[str] | None = None) -> dict[str, str]:
    """Our tensor names -> the dialect's, one to one. `ours`: those of a network that exists; by default one of 1000 classes.

    Raises WeightsError where the dialect has no name for a part of the network.
    """
    blocks = {(b.stage_index, b.layer): b for b in arch.blocks()}
    return {key: dialect.path(key, blocks) for key in (shapes(arch) if ours is None else ours)}


def timm_names(arch: Arch) -> dict[str, str]:
    """Our tensor names -> timm's, for the EfficientNet and MobileNet families and for the ResNets."""
    return names(arch, RESNET if arch.stages[0].block in RESNET.blocks else TIMM)


def recognise(keys: Collection[str]) -> Dialect:
    """The dialect that the names are in, by the stem convolution's. Raises WeightsError where it is none of them."""
    for dialect in DIALECTS:
        if dialect.trunk["stem"][0] + dialect.leaves.get("conv.weight", ".weight") in keys:
            return dialect
    raise WeightsError(f"tensor names of no known dialect ({', '.join(d.name for d in DIALECTS)}): {_list(list(keys))}")


def translate(state: Mapping[str, Tensor], arch: Arch, num_classes: int = 1000, in_channels: int = 3) -> dict[str, Tensor]:
    """`state`, in any known dialect, under our names: what `load_state_dict` of the built network takes.

    Every tensor of the network is found once, every shape agrees and nothing is left over, batch counters apart; else
    WeightsError (a ValueError) lists what is missing, left over or of another shape.
    """
    expected = shapes(arch, num_classes, in_channels)
    theirs = names(arch, recognise(state), expected)
    missing = [name for name in theirs.values() if name not in state]
    known = set(theirs.values())
    left = [name for name in state if name not in known and not name.endswith(DROPPED)]
    wrong = [
        f"{name} {tuple(state[name].shape)} instead of {expected[key]}"
        for key, name in theirs.items()
        if name in state and tuple(state[name].shape) != expected[key]
    ]
    if missing or left or wrong:
        kinds = {"missing": missing, "left over": left, "of another shape": wrong}
        found = "; ".join(f"{len(items)} {kind}: {_list(items)}" for kind, items in kinds.items() if items)
        raise WeightsError(f"weights don't fit {arch.name or 'the network'}: {found}")
    return {key: state[name] for key, name in theirs.items()}


def _list(items: list[str]) -> str:
    more = f", ... and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return ", ".join(items[:SHOWN]) + more
