"""What a launcher asks of its operands, held to before Triton sees them: it reads by address, and would read whatever lies there."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

ACTS = ("silu", "relu", "relu6", "none")
HALF = (torch.bfloat16, torch.float16)
SINGLE = (torch.float32,)
FLOATS = (*HALF, torch.float32, torch.float64)

Operand = tuple[Tensor | None, str, tuple[torch.dtype, ...]]


def check(kernel: str, operands: Mapping[str, Operand], act: str) -> dict[str, int]:
    """The sizes by letter. operands: by name the tensor (None: absent), its shape, its types.

    A shape is a string, "NHW3": a letter is any size from 1 (N: from 0), the same wherever it stands; a digit is itself. Raises
    ValueError for other shapes, types and activations, and for tensors that aren't contiguous.
    """
    sizes: dict[str, int] = {}
    for name, (tensor, letters, types) in operands.items():
        if tensor is None:
            continue
        known = [int(letter) if letter.isdigit() else sizes.get(letter, letter) for letter in letters]
        if not _fits(tensor, letters, sizes) or tensor.dtype not in types or not tensor.is_contiguous():
            expected = f"({', '.join(map(str, known))}{',' * (len(known) == 1)}) {' or '.join(str(t).removeprefix('torch.') for t in types)}"
            found = f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}{'' if tensor.is_contiguous() else ', strided'}"
            filled = ", contiguous and not empty" if 0 in tensor.shape else " and contiguous"
            raise ValueError(f"{kernel}: expected {name} to be {expected}{filled}, found {found}")
    if act not in ACTS:
        raise ValueError(f"{kernel}: expected the activation {', '.join(ACTS[:-1])} or {ACTS[-1]}, found {act!r}")
    return sizes


def _fits(tensor: Tensor, letters: str, sizes: dict[str, int]) -> bool:
    """Whether it has that shape; adds the sizes of letters seen first."""
    if tensor.ndim != len(letters):
        return False
    for letter, size in zip(letters, tensor.shape, strict=True):
        if size != (int(letter) if letter.isdigit() else sizes.setdefault(letter, size)) or (size == 0 and letter != "N"):
            return False
    return True
