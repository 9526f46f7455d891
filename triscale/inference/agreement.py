"""Whether another way to compute a network gives its logits, as far as the arithmetic allows."""

from __future__ import annotations

import copy
from typing import cast

import torch
from torch import Tensor, nn

LARGEST_ERROR = 1e-4  # of float32's largest logit
L2_ERROR = 5e-2  # of the logits in bfloat16 and float16
OWN = 2  # times the network's own error in that arithmetic, where it was asked for


def comparable(expected: Tensor) -> Tensor:
    """(N,) bool: the images whose logits say something. Those that aren't finite come of broken images or weights."""
    return expected.isfinite().flatten(1).all(1)


def largest_error(logits: Tensor, expected: Tensor) -> float:
    """The largest difference of logits (N, classes), over the comparable images; NaN where one is."""
    rows = comparable(expected)
    return float((logits[rows] - expected[rows]).abs().max()) if bool(rows.any()) else 0.0


def agree(logits: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Whether logits (N, classes), computed in `dtype`, differ from the expected ones by no more than its arithmetic does.
    Images that aren't comparable don't count; where none is, True."""
    rows = comparable(expected)
    if not bool(rows.any()):
        return True
    logits, expected = logits[rows], expected[rows]
    if dtype in (torch.bfloat16, torch.float16):
        return bool((logits - expected).norm() <= L2_ERROR * expected.norm())
    return bool((logits - expected).abs().max() <= LARGEST_ERROR * expected.abs().max())


def no_worse(logits: Tensor, expected: Tensor, net: nn.Module, x: Tensor, dtype: torch.dtype) -> bool:
    """Whether logits, computed in `dtype` from x, are off by no more than OWN times what `net` itself is in `dtype` (relative L2)."""
    own = cast(Tensor, copy.deepcopy(net).to(dtype)(x.to(dtype))).float()
    rows = comparable(expected)
    error = (own[rows] - expected[rows]).norm()  # not finite where the network itself overflows
    return bool(error.isfinite()) and bool((logits[rows] - expected[rows]).norm() <= OWN * error)
