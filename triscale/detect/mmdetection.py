"""mmdetection's tensor names for a detector: the map, and its checkpoints read and written, strictly.

Source: mmdetection's FPN, RetinaHead (no norms in the head) and RetinaSepBNHead (norms). Batch counters are neither read nor
written; torch does without them in a plain state dict. A checkpoint is {"state_dict": tensors, "meta": {"CLASSES": names, ...}}.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from triscale.detect.retinanet import Detector
from triscale.detector import DetectorArch
from triscale.files import write_whole
from triscale.text import first_line
from triscale.weights.dialects import WeightsError, dialect_of, names
from triscale.weights.match import COUNTERS, Match, strict
from triscale.weights.parts import Shape, tensors
from triscale.weights.readers import Stored, open_tensors

CONV, NORM = ("weight", "bias"), ("weight", "bias", "running_mean", "running_var")
TOWERS = (("classes", "cls"), ("boxes", "reg"))


def mmdet_names(arch: DetectorArch, in_channels: int = 3) -> dict[str, tuple[str, ...]]:
    """Our tensor names -> mmdetection's; several where a convolution that the levels share is listed for each.

    Raises WeightsError where OpenMMLab has no names for the backbone.
    """
    trunk = arch.trunk
    ours = tensors(trunk, 0, in_channels)
    out = {f"backbone.{key}": (name,) for key, name in names(trunk, dialect_of("openmmlab", trunk), ours).items()}
    return out | dict(_neck(arch)) | dict(_heads(arch))


def _neck(arch: DetectorArch) -> Iterator[tuple[str, tuple[str, ...]]]:
    for i in range(len(arch.laterals)):
        for leaf in CONV:
            yield f"pyramid.laterals.{i}.{leaf}", (f"neck.lateral_convs.{i}.conv.{leaf}",)
    for i in range(len(arch.pyramid.strides)):
        ours, theirs = f"pyramid.outputs.{i}", f"neck.fpn_convs.{i}"
        if not arch.pyramid.norm:
            yield from ((f"{ours}.{leaf}", (f"{theirs}.conv.{leaf}",)) for leaf in CONV)
            continue
        yield f"{ours}.conv.weight", (f"{theirs}.conv.weight",)
        yield from ((f"{ours}.norm.{leaf}", (f"{theirs}.bn.{leaf}",)) for leaf in NORM)


def _heads(arch: DetectorArch) -> Iterator[tuple[str, tuple[str, ...]]]:
    levels = range(len(arch.pyramid.strides))
    for ours, theirs in TOWERS:
        for j in range(arch.head.convs):
            conv, stack = f"head.{ours}.convs.{j}", f"bbox_head.{theirs}_convs"
            if not arch.head.norm:
                yield from ((f"{conv}.{leaf}", (f"{stack}.{j}.conv.{leaf}",)) for leaf in CONV)
                continue
            yield f"{conv}.weight", tuple(f"{stack}.{level}.{j}.conv.weight" for level in levels)
            for level in levels:
                yield from ((f"head.{ours}.norms.{j}.{level}.{leaf}", (f"{stack}.{level}.{j}.bn.{leaf}",)) for leaf in NORM)
        yield from ((f"head.{ours}.output.{leaf}", (f"bbox_head.retina_{theirs}.{leaf}",)) for leaf in CONV)


def load_mmdet(net: Detector, source: str | os.PathLike[str] | Mapping[str, Tensor]) -> Detector:
    """Puts a checkpoint of mmdetection, a file or a state dict, into `net`, in place, and returns it.

    Strict: every tensor used once, every shape checked, and the copies of a shared convolution equal; else WeightsError lists
    what is wrong and `net` is as it was. Nothing in a file is executed.
    """
    net.load_state_dict(mmdet_state(net, open_tensors(source)))
    return net


def mmdet_state(net: Detector, stored: Stored) -> dict[str, Tensor]:
    """A checkpoint's tensors by the names of `net`, as load_mmdet takes them; of `net`, which may be on the meta device, shapes count."""
    own, table = net.state_dict(), mmdet_names(net.arch, net.in_channels)
    wanted = {name: tuple(own[key].shape) for key, theirs in table.items() for name in theirs}
    missing = tuple(name for name in wanted if name not in stored.shapes)
    left = tuple(name for name in stored.shapes if name not in wanted and not name.endswith(COUNTERS))
    shapes = {name: tuple(stored.shapes[name]) for name in wanted if name in stored.shapes}
    wrong = tuple(f"{name} {shape} instead of {wanted[name]}" for name, shape in shapes.items() if shape != wanted[name])
    trunk = net.arch.trunk
    try:
        strict(Match(trunk, dialect_of("openmmlab", trunk), {}, missing, left, wrong))
        return {key: _agreed([(name, stored.take(name)) for name in theirs]) for key, theirs in table.items()}
    except WeightsError as error:
        raise WeightsError(f"{stored.label}: {error}") from None


def _agreed(copies: list[tuple[str, Tensor]]) -> Tensor:
    (first, tensor), *rest = copies
    if not tensor.is_floating_point():
        raise WeightsError(f"{first} holds {tensor.dtype}, expected floating point")
    for name, other in rest:
        if not torch.equal(tensor, other):
            raise WeightsError(f"{name} differs from {first}, expected copies of one convolution that the levels share")
    return tensor


def to_mmdet(net: Detector) -> dict[str, Tensor]:
    """The detector's tensors under mmdetection's names, on the CPU; a shared convolution's names hold one tensor."""
    own = {key: value.detach().cpu().contiguous() for key, value in net.state_dict().items()}
    return {name: own[key] for key, theirs in mmdet_names(net.arch, net.in_channels).items() for name in theirs}


def save_mmdet(path: str | os.PathLike[str], net: Detector, classes: Sequence[str]) -> None:
    """Writes the checkpoint, whole or not at all. Raises WeightsError where OpenMMLab has no names for the backbone; OSError."""
    state = {"meta": {"CLASSES": tuple(classes)}, "state_dict": to_mmdet(net)}

    def write(temporary: Path) -> None:
        try:
            torch.save(state, temporary)
        except RuntimeError as error:  # a full disk comes as this
            raise OSError(f"{path}: could not be written ({first_line(error)})") from None

    write_whole(path, write)


def count_classes(shapes: Mapping[str, Shape], arch: DetectorArch) -> int:
    """Classes of a checkpoint's head, by its shape. Raises WeightsError where there is none, or one that the anchors don't fit."""
    name, each = "bbox_head.retina_cls.weight", arch.anchors.each
    if not shapes.get(name):
        raise WeightsError(f"neither a detector's file of ours nor a RetinaNet of mmdetection: no tensor {name} in it")
    outputs = shapes[name][0]
    if not outputs or outputs % each:
        raise WeightsError(f"{name} {tuple(shapes[name])}: {outputs} outputs, expected a multiple of the network's {each} anchors a place")
    return outputs // each


def class_names(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """The classes that a checkpoint's meta tells, mmdetection 2's CLASSES or 3's dataset_meta; none where that is no list of names, or
    holds more than plain data. To be asked of a file that `open_tensors` has taken: tensors are not read."""
    try:
        state = torch.load(path, map_location="meta", weights_only=True)
    except Exception:  # another format, or what torch refuses to make
        return ()
    meta = state.get("meta") if isinstance(state, dict) else None
    if not isinstance(meta, dict):
        return ()
    newer = meta.get("dataset_meta")
    told = meta.get("CLASSES") or (newer.get("classes") or newer.get("CLASSES") if isinstance(newer, dict) else None)
    if isinstance(told, str):  # ("cell"), which was meant to be ("cell",)
        told = (told,)
    return tuple(told) if isinstance(told, (list, tuple)) and all(isinstance(name, str) for name in told) else ()
