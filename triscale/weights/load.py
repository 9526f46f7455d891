"""Checkpoints of any known file format and dialect into a network: strict, and the module is untouched on failure."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping

from torch import Tensor

from triscale.architecture import Arch
from triscale.model import ConvNet
from triscale.weights.dialects import Dialect, WeightsError
from triscale.weights.match import Match, for_transfer, match, strict
from triscale.weights.parts import tensors
from triscale.weights.readers import Stored, open_tensors

LARGE = 256 << 20  # bytes; up to here all tensors are read before the first is changed


class WeightsWarning(UserWarning):
    """Something that was asked for and should be known: what of a network stays fresh in transfer."""


def load_weights(net: ConvNet, source: str | os.PathLike[str] | Mapping[str, Tensor], *, raw: bool = False, transfer: bool = False) -> ConvNet:
    """Puts a checkpoint into `net`, in place, and returns it.

    source: a file (.safetensors, .pth, .pt, .bin, .npz, .h5, .keras; TensorFlow's .index, its prefix or folder), or a state
    dict. The dialect is recognised by its names: ours, timm's, torchvision's, lukemelas', OpenMMLab's, Keras', the official
    TensorFlow code's. raw: the weights themselves where the checkpoint has moving averages of them too, which are preferred.

    Strict: every tensor used once, every shape checked, else WeightsError lists what is missing, left over or of another
    shape and `net` is as it was. transfer: the classifier may be missing or of another number of classes, and up to a tenth
    of the other tensors may be missing, as may a detector's neck and heads be left over; a WeightsWarning says what keeps its
    fresh values. Nothing in a file is executed. Numerics (padding, eps) are the net's: build it with those that the weights
    were trained with. Tensors are converted to the net's precision and device. For a network above 256 MiB a .safetensors or
    TensorFlow file is read twice, one tensor at a time, instead of being held in memory beside it.
    """
    stored = open_tensors(source, raw=raw)
    try:
        found = match(stored.shapes, net.arch, net.num_classes, net.in_channels)
        said = ""
        if transfer:
            found, said = for_transfer(found, net.num_classes)
        found = strict(found)
    except WeightsError as error:
        raise WeightsError(f"{stored.label}: {error}") from None
    if stored.streams and _bytes(net) > LARGE:
        _copy_each(net, stored, found)
    else:
        net.load_state_dict(read_all(stored, found), strict=not said)  # what is missing is said
    if said:
        warnings.warn(f"{stored.label}: {said}", WeightsWarning, stacklevel=2)
    return net


def load_trunk(trunk: ConvNet, source: str | os.PathLike[str] | Mapping[str, Tensor], arch: Arch, *, raw: bool = False) -> tuple[str, ...]:
    """Puts the stem and blocks of a checkpoint of `arch` into a network that ends after them, in place, and returns the file's
    names of those tensors that it lacks and that so stay fresh, at most a tenth.

    source, raw: as in `load_weights`; head and classifier are left where they are. Raises WeightsError, and changes nothing,
    for weights of another network.
    """
    stored = open_tensors(source, raw=raw)
    own = trunk.state_dict()
    try:
        found, _ = for_transfer(match(stored.shapes, arch, 1000, trunk.in_channels), 0)
    except WeightsError as error:
        raise WeightsError(f"{stored.label}: {error}") from None
    mine = Match(arch, found.dialect, {key: name for key, name in found.theirs.items() if key in own})
    trunk.load_state_dict(read_all(stored, mine), strict=False)
    names = found.dialect.names(arch, tensors(arch))
    return tuple(names.get(key, key) for key in own if key not in mine.theirs)


def _bytes(net: ConvNet) -> int:
    return sum(t.numel() * t.element_size() for t in net.state_dict().values())


def _copy_each(net: ConvNet, stored: Stored, found: Match) -> None:
    """One tensor at a time, so that a large network is not in memory twice: read through once first, for a file that breaks off."""
    own = net.state_dict()
    for copy in (False, True):
        for key, name in found.theirs.items():
            value = _ours(stored.take(name), key, name, found.dialect)
            if copy:
                own[key].copy_(value)


def translate(state: Mapping[str, Tensor], arch: Arch, num_classes: int = 1000, in_channels: int = 3) -> dict[str, Tensor]:
    """A state dict in any known dialect under our names and in torch's layouts: what `load_state_dict` of the built network takes.

    Every tensor of the network is found once, every shape agrees and nothing is left over, batch counters apart; else
    WeightsError lists what is missing, left over or of another shape.
    """
    stored = open_tensors(state)
    return read_all(stored, strict(match(stored.shapes, arch, num_classes, in_channels)))


def read_all(stored: Stored, found: Match) -> dict[str, Tensor]:
    """Our names -> tensors, in torch's layouts, float32 unless they are of another floating-point precision already.

    Raises WeightsError for integers, and where the file breaks off.
    """
    return {key: _ours(stored.take(name), key, name, found.dialect) for key, name in found.theirs.items()}


def _ours(tensor: Tensor, key: str, name: str, dialect: Dialect) -> Tensor:
    if not tensor.is_floating_point():
        raise WeightsError(f"{name} holds {tensor.dtype}, expected floating point")
    if dialect.layout == "torch":
        return tensor.contiguous()
    axes = dialect.axes(key, tensor.ndim)
    return tensor.permute([axes.index(i) for i in range(tensor.ndim)]).contiguous()


def write_state(net: ConvNet, dialect: Dialect) -> dict[str, Tensor]:
    """The network's tensors under the dialect's names and in its layouts, on the CPU. Raises WeightsError where it has no names for them."""
    own = net.state_dict()
    named = dialect.names(net.arch, own)
    return {named[key]: value.detach().cpu().permute(dialect.axes(key, value.ndim)).contiguous() for key, value in own.items()}
