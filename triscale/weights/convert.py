"""Weights in the names and layouts of another code base, in the file format that it loads."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from triscale.architecture import Arch
from triscale.files import write_whole
from triscale.model import ConvNet
from triscale.text import first_line
from triscale.weights.dialects import Dialect, WeightsError, dialect_of
from triscale.weights.load import write_state
from triscale.weights.model_file import ModelCard, save_model

# What `--to` takes -> the code base. Keras has no format of bare arrays: its names and layouts go into an .npz.
TARGETS = {
    "timm": "timm",
    "torchvision": "torchvision",
    "lukemelas": "lukemelas",
    "openmmlab": "openmmlab",
    "keras-npz": "keras",
    "triscale": "triscale",
}
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".npz")


def write_as(path: str | os.PathLike[str], net: ConvNet, card: ModelCard, target: str) -> list[str]:
    """Writes the network's weights as `target` loads them, whole or not at all; returns what the user should know.

    The suffix decides the format: .safetensors, .pth/.pt/.bin (torch.save; OpenMMLab's under "state_dict") or .npz. To
    triscale: a model file with its card. Raises WeightsError where the target has no names for the network, or for another
    suffix; OSError where the file can't be written.
    """
    path = Path(path)
    if path.exists():
        raise WeightsError(f"{path}: exists already; give another name")
    if target == "triscale":
        if not net.num_classes:
            raise WeightsError(f"{path}: a network without classifier makes no triscale model; convert it to another target")
        if path.suffix != ".safetensors":
            raise WeightsError(f"{path}: a triscale model is a .safetensors file")
        # From now on the file says it itself; what was assumed on the way stays on record.
        provenance = {"assumed_before" if key == "assumed" else key: value for key, value in card.provenance.items()}
        save_model(path, net, replace(card, provenance=provenance))
        return []
    dialect = dialect_of(TARGETS[target], net.arch)
    expected = (".npz",) if target == "keras-npz" else SUFFIXES
    if path.suffix not in expected:
        raise WeightsError(f"{path}: expected a file {', '.join(expected)} for {target}, found '{path.suffix}'")
    state = write_state(net, dialect)

    def write(temporary: Path) -> None:
        try:
            if path.suffix == ".safetensors":
                save_file(state, temporary, metadata={"format": "pt"})
            elif path.suffix == ".npz":
                with open(temporary, "wb") as file:
                    np.savez(file, **{name: value.numpy() for name, value in state.items()})  # type: ignore[arg-type]
            else:
                torch.save({"state_dict": state} if target == "openmmlab" else state, temporary)
        except (SafetensorError, RuntimeError) as error:  # a full disk comes as these
            raise OSError(f"{path}: could not be written ({first_line(error)})") from None

    write_whole(path, write)
    return differences(net.arch, dialect)


def differences(arch: Arch, dialect: Dialect) -> list[str]:
    """What the code base's own modules compute differently from `arch`: they would give other outputs from these weights."""
    theirs, ours = dialect.computes(arch).numerics, arch.numerics
    if dialect.project == "timm" and arch.name.startswith("efficientnet") and (ours.padding, ours.norm_eps) == ("same", 1e-3):
        return [f"timm's own {arch.name} pads symmetrically, eps 1e-5; its tf_{arch.name} computes as here"]
    out = []
    for name, words in (("padding", "padding"), ("norm_eps", "batch norm epsilon")):
        if getattr(theirs, name) != getattr(ours, name):
            out.append(f"{words} {getattr(ours, name)} here, {getattr(theirs, name)} in {dialect.project}'s modules")
    return out
