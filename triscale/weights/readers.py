"""Checkpoint files of every format as one thing: names, shapes, and a tensor when it is asked for.

Nothing in a file is executed. Tensors are read one at a time where the format allows it, so that a network of 2 GB is never
in memory twice.
"""

from __future__ import annotations

import argparse
import json
import os
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from triscale.text import first_line
from triscale.weights import tensorflow
from triscale.weights.dialects import WeightsError
from triscale.weights.keras import check_sizes, read_keras
from triscale.weights.parts import Shape

# Where training scripts put the tensors. The moving average comes first: timm's and torchvision's reference.
AVERAGES = ("state_dict_ema", "model_ema")
WRAPPERS = ("state_dict", "model_state_dict", "model")
SWAPPED = ("ema_state_dict",)  # mmengine saves its average as state_dict, and the weights themselves here
COUNTS = ("n_averaged", "steps")  # of averages
MAX_HEADER = 100 << 20  # bytes of a safetensors header; the library's own limit
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
WHOLE = {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}


@dataclass(frozen=True)
class Stored:
    """A checkpoint's tensors by their own names and in their own layouts. label: what messages call it.

    take: reads one, once; the result is the caller's own. metadata: what a safetensors file says of itself, or the mean and
    std of a Keras file's preprocessing layers. streams: tensors lie in the file until they are taken, and can be taken again.
    """

    label: str
    shapes: Mapping[str, Shape]
    take: Callable[[str], Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)
    streams: bool = False


def open_tensors(source: str | os.PathLike[str] | Mapping[str, Tensor], *, raw: bool = False) -> Stored:
    """A checkpoint file, or a state dict, opened. Raises WeightsError or CheckpointError with one line that names the file.

    Formats: .safetensors, .pth, .pt, .bin (torch.save of tensors in plain containers), .npz, .h5, .keras, and TensorFlow's
    index and data files (the .index, the prefix, or their folder). raw: the weights themselves where a moving average lies
    beside them.
    """
    if isinstance(source, Mapping):
        return _mapping("the state dict", _unwrapped("the state dict", source, raw))
    path = Path(source)
    if path.is_dir() or path.suffix == ".index" or path.with_name(path.name + ".index").is_file():
        return _tensorflow(path, raw)
    if not path.is_file():
        raise WeightsError(f"{path}: no such file")
    pickled = (".pth", ".pt", ".bin", ".ckpt", ".tar")  # .pth.tar is how timm calls them; no archive
    readers: dict[str, Callable[[Path], Stored]] = {".safetensors": _safetensors, ".npz": _npz, ".h5": _keras, ".hdf5": _keras, ".keras": _keras}
    readers |= dict.fromkeys(pickled, lambda p: _pickled(p, raw))
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise WeightsError(f"{path}: expected a file {', '.join(readers)} or .index, found '{path.suffix}'")
    try:
        return reader(path)
    except (WeightsError, MemoryError):
        raise
    except Exception as error:  # a parser on garbage may raise anything; what it says goes into our message
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> WeightsError:
    return WeightsError(f"{path}: not a checkpoint that can be read safely ({first_line(error)[:160]})")


def _mapping(label: str, state: dict[str, Tensor], metadata: Mapping[str, str] | None = None) -> Stored:
    return Stored(label, {name: tuple(value.shape) for name, value in state.items()}, state.pop, metadata or {})


def _safetensors(path: Path) -> Stored:
    """Read with plain reads: mapped pages would count as memory beside the tensors made from them."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > min(MAX_HEADER, size - 8):
            raise ValueError(f"a header of {length} bytes in a file of {size}")
        header = json.loads(file.read(length))
    if not isinstance(header, dict):
        raise ValueError("a header that is no table")
    metadata = header.pop("__metadata__", None) or {}
    where: dict[str, tuple[torch.dtype, Shape, int, int]] = {}
    for name, entry in header.items():
        if not isinstance(entry, dict) or not isinstance(entry.get("shape"), list):
            raise ValueError(f"no tensor in the header's entry '{name[:80]}'")
        dtype, (start, end) = (FLOATS | WHOLE).get(entry["dtype"]), entry["data_offsets"]
        shape = tuple(entry["shape"])
        if dtype is None or not all(type(n) is int and n >= 0 for n in (*shape, start, end)):
            raise ValueError(f"{name[:80]} of type {entry['dtype']} and shape {shape}")
        count = int(np.prod(shape, dtype=object)) if shape else 1
        if end - start != count * dtype.itemsize or end > size - 8 - length:
            raise ValueError(f"{name[:80]} lies outside the file, or has another size than its shape")
        where[name] = dtype, shape, 8 + length + start, end - start

    def take(name: str) -> Tensor:
        dtype, shape, offset, length = where[name]
        out = torch.empty(shape, dtype=dtype)
        if length:
            with open(path, "rb", buffering=0) as file:
                file.seek(offset)
                view = memoryview(out.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]  # numpy's arrays are buffers
                read = 0
                while read < length:
                    got = file.readinto(view[read:])
                    if not got:
                        raise WeightsError(f"{path}: cut short while it was read, {name} is not in it whole")
                    read += got
        return out

    return Stored(str(path), {name: entry[1] for name, entry in where.items()}, take, {str(k): str(v) for k, v in metadata.items()}, True)


def _pickled(path: Path, raw: bool) -> Stored:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            check_sizes(path, [(i.filename, i.file_size) for i in archive.infolist()], path.stat().st_size)
    with torch.serialization.safe_globals([argparse.Namespace]):  # the script's options, which timm and torchvision keep beside them
        state = torch.load(path, map_location="cpu", weights_only=True)
    tensors = _unwrapped(str(path), state, raw)
    # A tensor of stride 0 claims any size and stores one value.
    check_sizes(path, [(name, value.numel() * value.element_size()) for name, value in tensors.items()], path.stat().st_size)
    return _mapping(str(path), tensors)


def _unwrapped(label: str, state: Any, raw: bool) -> dict[str, Tensor]:
    """Tensors by name, taken out of a training script's wrapper and of DataParallel's `module.`. Raises WeightsError."""
    for key in (*SWAPPED, *WRAPPERS, *AVERAGES) if raw else (*AVERAGES, *WRAPPERS, *SWAPPED):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not state:
        raise WeightsError(f"{label}: no table of tensors by name in it")
    if not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()):
        raise WeightsError(f"{label}: no table of tensors by name in it")
    return {key.removeprefix("module."): v.detach() if v.requires_grad else v for key, v in state.items() if key not in COUNTS}


def _npz(path: Path) -> Stored:
    with zipfile.ZipFile(path) as archive:
        check_sizes(path, [(i.filename, i.file_size) for i in archive.infolist()], path.stat().st_size)
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    if not all(isinstance(value, np.ndarray) and value.dtype.kind in "fiu" for value in arrays.values()):
        raise ValueError("members that are no arrays of numbers")
    return _mapping(str(path), {name: torch.from_numpy(value) for name, value in arrays.items()})


def _tensorflow(path: Path, raw: bool) -> Stored:
    prefix, sources = tensorflow.variables(path, raw=raw)
    # Lite's code has plain batch norms; the names are those of the others but for this.
    renamed = {name.replace("/batch_normalization", "/tpu_batch_normalization"): name for name in sources}
    shapes = {name: sources[own].entry.shape for name, own in renamed.items()}
    return Stored(str(path), shapes, lambda name: torch.from_numpy(tensorflow.tensor(prefix, sources[renamed[name]])), streams=True)


def _keras(path: Path) -> Stored:
    arrays, about = read_keras(path)
    return _mapping(str(path), {name: torch.from_numpy(np.asarray(value)) for name, value in arrays.items()}, about)
