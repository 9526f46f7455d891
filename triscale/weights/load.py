"""Checkpoints of any known file format and dialect into a network: strict, and the module is untouched on failure."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from triscale.model import ConvNet
from triscale.weights import tensorflow
from triscale.weights.dialects import WeightsError, translate

WRAPPERS = ("state_dict", "model_state_dict", "state_dict_ema", "model")  # where training scripts put the tensors


def load_weights(net: ConvNet, source: str | os.PathLike[str] | Mapping[str, Tensor], *, raw: bool = False) -> ConvNet:
    """Puts a checkpoint into `net`, in place, and returns it.

    source: a file (.safetensors, .pth, .pt, .bin, .npz; TensorFlow's .index, its prefix or folder), or a state dict. The
    dialect is recognised by its names: ours, timm's EfficientNet and ResNet (torchvision's too), the official TensorFlow
    code's. raw: of a TensorFlow checkpoint, the variables themselves instead of their moving averages.

    Strict: every tensor used once, every shape checked, else WeightsError lists what is missing, left over or of another
    shape and `net` is as it was. Nothing in a file is executed. Numerics (padding, eps) are the net's: build it with those
    that the weights were trained with.
    """
    state = source if isinstance(source, Mapping) else read_state(source, raw=raw)
    try:
        values = translate(state, net.arch, net.num_classes, net.in_channels)
    except WeightsError as error:
        where = "" if isinstance(source, Mapping) else f"{os.fspath(source)}: "
        raise WeightsError(f"{where}{error}") from None
    net.load_state_dict(values)
    return net


def read_state(path: str | os.PathLike[str], *, raw: bool = False) -> dict[str, Tensor]:
    """The tensors of a checkpoint file by their own names, in torch's layouts. Raises WeightsError or CheckpointError."""
    path = Path(path)
    if path.is_dir() or path.suffix == ".index" or path.with_name(path.name + ".index").is_file():
        return {name: _torch_layout(name, value) for name, value in tensorflow.read(path, raw=raw).items()}
    if not path.is_file():
        raise WeightsError(f"{path}: no such file")
    readers: dict[str, Callable[[Path], object]] = {".safetensors": load_file, ".npz": _npz, ".pth": _pickled, ".pt": _pickled, ".bin": _pickled}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise WeightsError(f"{path}: expected a file {', '.join(readers)} or .index, found '{path.suffix}'")
    try:
        state = reader(path)
    except (SafetensorError, pickle.UnpicklingError, zipfile.BadZipFile, RuntimeError, ValueError, OSError, EOFError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise WeightsError(f"{path}: not a checkpoint that can be read safely ({reason[:160]})") from None
    return _flat(path, state)


def _pickled(path: Path) -> object:
    return torch.load(path, map_location="cpu", weights_only=True)


def _npz(path: Path) -> object:
    with np.load(path, allow_pickle=False) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def _flat(path: Path, state: object) -> dict[str, Tensor]:
    """Tensors by name, taken out of a training script's wrapper and of DataParallel's `module.`."""
    for key in WRAPPERS:
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not state or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise WeightsError(f"{path}: no table of tensors by name in it")
    return {key.removeprefix("module."): value for key, value in state.items()}


def _torch_layout(name: str, value: np.ndarray) -> Tensor:
    """TensorFlow's layout to torch's: HWIO -> OIHW, depthwise (H, W, C, 1) -> (C, 1, H, W), dense (in, out) -> (out, in)."""
    tensor = torch.from_numpy(value)
    if value.ndim == 4:
        tensor = tensor.permute((2, 3, 0, 1) if name.endswith("depthwise_kernel") else (3, 2, 0, 1))
    elif value.ndim == 2:
        tensor = tensor.T
    return tensor.contiguous()
