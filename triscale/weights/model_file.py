"""A model is one .safetensors file: its metadata carries Arch, Preprocess, class names, provenance and measured accuracy.

That file alone is enough to predict, export and fine-tune. Reading it executes nothing, and nothing is read from outside
the file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from triscale.architecture import Arch
from triscale.files import write_whole
from triscale.model import ConvNet, build
from triscale.recipe import Preprocess
from triscale.text import first_line

FORMAT = 1
KEY = "triscale"
C = TypeVar("C")
M = TypeVar("M", bound=nn.Module)


class ModelFileError(ValueError):
    """A file that is no triscale model. The message is one line that names the file."""


@dataclass(frozen=True)
class ModelCard:
    """What a model file says of itself. provenance: free facts (data, recipe, version); measured: e.g. {"top1": 0.98}."""

    arch: Arch
    preprocess: Preprocess
    classes: tuple[str, ...]
    provenance: dict[str, Any] = field(default_factory=dict)
    measured: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> str:
        body = {
            "format": FORMAT,
            "arch": json.loads(self.arch.to_json()),
            "preprocess": self.preprocess.to_dict(),
            "classes": list(self.classes),
            "provenance": self.provenance,
            "measured": self.measured,
        }
        return json.dumps(body)

    @staticmethod
    def from_json(text: str) -> ModelCard:
        data = json.loads(text)
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            raise ValueError(f'expected "format": {FORMAT}')
        classes = data.get("classes")
        if not isinstance(classes, list) or not all(isinstance(c, str) for c in classes) or not classes:
            raise ValueError("expected a list of class names")
        arch, preprocess = Arch.from_json(json.dumps(data.get("arch"))), Preprocess.from_dict(data.get("preprocess") or {})
        return ModelCard(arch, preprocess, tuple(classes), dict(data.get("provenance") or {}), dict(data.get("measured") or {}))


def save_model(path: str | os.PathLike[str], net: ConvNet, card: ModelCard) -> None:
    """Writes the model file, whole or not at all. Tensors are stored contiguous, in the net's own precision. Raises OSError."""
    write_state(path, net, {KEY: card.to_json()})


def write_state(path: str | os.PathLike[str], net: nn.Module, metadata: dict[str, str]) -> None:
    """The module's tensors with these metadata as a .safetensors file, whole or not at all. Raises OSError."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in net.state_dict().items()}

    def write(temporary: Path) -> None:
        try:
            save_file(tensors, temporary, metadata=metadata)
        except SafetensorError as error:  # a full disk comes as this
            raise OSError(f"{path}: could not be written ({first_line(error)})") from None

    write_whole(path, write)


def load_model(path: str | os.PathLike[str]) -> tuple[ConvNet, ModelCard]:
    """The network, in evaluation mode on the CPU, and its card. Raises ModelFileError.

    Every tensor must be there with its shape, and none more. Tensors of another floating-point precision become float32.
    """

    def read(metadata: Mapping[str, str]) -> tuple[ModelCard, Arch]:
        if KEY not in metadata:
            raise ModelFileError(f"a safetensors file, but not a triscale model (no '{KEY}' in its metadata)")
        card = ModelCard.from_json(metadata[KEY])
        return card, card.arch

    return read_state(path, "model", read, lambda card: build(card.arch, len(card.classes), card.preprocess.channels))


def read_state(path: str | os.PathLike[str], noun: str, read: Callable[[Mapping[str, str]], tuple[C, Arch]], make: Callable[[C], M]) -> tuple[M, C]:
    """The module that `write_state` wrote, in evaluation mode on the CPU, float32, and what `read` gives of its metadata.

    noun: what the file should be. read: the card and the network in it, by which a file that would cost much to build is refused;
    raises ModelFileError without the path, ValueError, TypeError or KeyError. make: called on the meta device. Raises ModelFileError.
    """
    path = Path(path)
    if not path.is_file():
        raise ModelFileError(f"{path}: {'not a file' if path.exists() else 'no such file'}")
    try:
        with safe_open(path, framework="pt") as file:
            card, arch = read(file.metadata() or {})
            if sum(stage.layers for stage in arch.stages) > len(file.keys()):  # asked first: a build costs time by the layer
                raise ModelFileError("its architecture has more layers than the file has tensors")
            with torch.device("meta"):
                net = make(card)
            wanted = {name: tuple(value.shape) for name, value in net.state_dict().items()}
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping
            if wanted != found:
                raise ModelFileError(f"tensors don't fit its own architecture; {difference(wanted, found)}")
            net.load_state_dict({name: as_float32(name, file.get_tensor(name)) for name in wanted}, assign=True)
    except (SafetensorError, OSError) as error:
        raise ModelFileError(f"{path}: not a {noun} file ({first_line(error)})") from None
    except ModelFileError as error:
        raise ModelFileError(f"{path}: {error}") from None
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ModelFileError(f"{path}: its metadata make no {noun} ({first_line(error)})") from None
    return net.eval(), card


def as_float32(name: str, tensor: Tensor) -> Tensor:
    """A stored tensor as float32. Raises ValueError for one that isn't floating point."""
    if not tensor.is_floating_point():
        raise ValueError(f"{name} holds {tensor.dtype}, expected floating point")
    return tensor.float()


def difference(wanted: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]) -> str:
    """How the shapes by name differ: the first ten names of each kind."""
    kinds = {
        "missing": [n for n in wanted if n not in found],
        "left over": [n for n in found if n not in wanted],
        "wrong shape": [n for n in wanted if n in found and wanted[n] != found[n]],
    }
    return "; ".join(f"{len(names)} {kind}: {', '.join(names[:10])}" for kind, names in kinds.items() if names)
