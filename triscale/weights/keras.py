"""Keras files: legacy `.h5` (weights or whole models), `.weights.h5` and `.keras`, read with h5py, without Keras.

All give "layer/variable" names, as `w.path` of Keras 3 has them, and arrays in Keras' layouts. Nothing in them is executed,
links out of the file are not followed, and sizes are checked before anything is read. A functional model's preprocessing
layers (Rescaling, Normalization) are read from its configuration. Sources: keras/src/saving/saving_lib.py, legacy
hdf5_format.py, applications/efficientnet.py.
"""

from __future__ import annotations

import io
import json
import math
import re
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from triscale.weights.dialects import WeightsError

# Keras 3 numbers a layer's variables in the order they were made.
ORDERS = {
    "Conv2D": ("kernel", "bias"),
    "DepthwiseConv2D": ("kernel", "bias"),
    "Dense": ("kernel", "bias"),
    "BatchNormalization": ("gamma", "beta", "moving_mean", "moving_variance"),
    "Normalization": ("mean", "variance", "count"),
}
LARGEST = 64 << 20, 20  # bytes unpacked, and times the file's size: weights don't compress, so more is no checkpoint
VARS = "vars"
MOST = 200_000  # members of all groups; hard links can make 2^n paths of n groups


def read_keras(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """("layer/variable" -> array, {"mean": ..., "std": ...} of the preprocessing layers as JSON, where they are known).

    Raises WeightsError where h5py is missing or the file is no such file.
    """
    try:
        import h5py
    except ImportError:
        raise WeightsError(f"{path}: reading Keras files needs h5py: pip install 'triscale[weights]'") from None
    size = path.stat().st_size
    config: Any = None
    if path.suffix.lower() == ".keras":
        with zipfile.ZipFile(path) as archive:
            check_sizes(path, [(i.filename, i.file_size) for i in archive.infolist()], size)
            config = json.loads(archive.read("config.json"))
            source: Any = io.BytesIO(archive.read("model.weights.h5"))
    else:
        source = path
    with h5py.File(source, "r") as file:
        datasets = dict(_datasets(h5py, file))
        check_sizes(path, [(name, data.nbytes) for name, data in datasets.items()], size)
        if config is None and "model_config" in file.attrs:
            config = json.loads(file.attrs["model_config"])
        arrays = dict(_named(h5py, file, datasets))
    if not arrays:
        raise WeightsError(f"{path}: no layers with weights in it")
    layers = (config or {}).get("config", {}).get("layers", []) if isinstance(config, dict) else []
    return arrays, _preprocessing(layers, arrays)


def check_sizes(path: Path, members: Sequence[tuple[str, int]], size: int) -> None:
    """Refuses a file whose members unpack to far more than weights can. Raises WeightsError."""
    least, times = LARGEST
    total = sum(n for _, n in members)
    if total > max(least, times * size):
        raise WeightsError(f"{path}: {total} bytes unpacked from a file of {size}: refused")


def _datasets(h5py: Any, group: Any, prefix: str = "", seen: list[int] | None = None) -> Iterator[tuple[str, Any]]:
    """Every numeric dataset inside the file, by path. Links to other files and storage outside are passed over."""
    seen = [0] if seen is None else seen
    for name in group:
        seen[0] += 1
        if seen[0] > MOST:
            raise ValueError(f"more than {MOST} members")
        if not isinstance(group.get(name, getlink=True), h5py.HardLink):
            continue
        item = group[name]
        if isinstance(item, h5py.Group):
            yield from _datasets(h5py, item, f"{prefix}{name}/", seen)
        elif item.dtype.kind in "fiu" and not item.external and not item.is_virtual:
            yield f"{prefix}{name}", item


def _named(h5py: Any, file: Any, datasets: dict[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """("layer/variable", array) of either layout of groups; optimiser state is left out."""
    for name, data in datasets.items():
        parts = name.split("/")
        if parts[0] in ("optimizer", "optimizer_weights"):
            continue
        if len(parts) >= 2 and parts[-2] == VARS:  # Keras 3: layers/conv2d_1/vars/0, the layer's name in an attribute
            layer = data.parent.attrs.get("name", parts[-3])
            layer = layer.decode() if isinstance(layer, bytes) else str(layer)
            yield f"{layer}/{_variable(layer, int(parts[-1]), data)}", data[()]
        else:  # legacy: [model_weights/]layer/[layer/ or scopes/]variable[:0]
            parts = parts[1:] if parts[0] == "model_weights" else parts
            variable = parts[-1].split(":")[0].replace("depthwise_kernel", "kernel")
            yield f"{parts[0]}/{variable}", data[()]


def _variable(layer: str, index: int, data: Any) -> str:
    """The name of a layer's variable by its place; batch norms have four, a Normalization layer's third is a number."""
    siblings = len(data.parent)
    if siblings == 4:
        kind = "BatchNormalization"
    elif siblings == 3:
        kind = "Normalization"
    else:
        kind = "Dense"
    order = ORDERS[kind]
    if not 0 <= index < len(order):
        raise WeightsError(f"{layer}: a variable of number {index}, expected fewer than {len(order)}")
    return order[index]


def _preprocessing(layers: Sequence[Any], arrays: dict[str, np.ndarray]) -> dict[str, str]:
    """The affine function that the layers in front of the stem compute, as mean and std on the 0..255 scale: x -> (x - mean) / std.

    Without a configuration, the statistics of a Normalization layer tell the published weights: Keras divides by the root of
    a variance that is ImageNet's standard deviation, then by its root again.
    """
    scale, offset = np.ones(3), np.zeros(3)
    found = False
    for layer in layers:
        kind, config = layer.get("class_name"), layer.get("config", {})
        if kind in ("Conv2D", "ZeroPadding2D"):
            break
        if kind == "Rescaling":
            scale, offset = scale * config["scale"], offset * config["scale"] + config.get("offset", 0.0)
            found = True
        elif kind == "Normalization":
            mean, variance = (config.get(k) for k in ("mean", "variance"))
            if mean is None:
                mean, variance = (arrays[f"{config['name']}/{k}"] for k in ("mean", "variance"))
            std = np.sqrt(np.asarray(variance, np.float64)).reshape(-1)
            scale, offset = scale / std, (offset - np.asarray(mean, np.float64).reshape(-1)) / std
            found = True
    own = next((name.split("/")[0] for name in arrays if re.fullmatch(r"normalization(_\d+)?/variance", name)), "")
    if not layers and own:
        variance, mean = (np.asarray(arrays[f"{own}/{k}"], np.float64).reshape(-1) for k in ("variance", "mean"))
        published = np.allclose(variance, (0.229, 0.224, 0.225), atol=1e-3)
        scale, offset = 1 / (255 * (variance if published else np.sqrt(variance))), -mean / (variance if published else np.sqrt(variance))
        found = True
    if not found or not all(math.isfinite(v) and v > 0 for v in scale):
        return {}
    return {"mean": json.dumps((-offset / scale).tolist()), "std": json.dumps((1 / scale).tolist())}
