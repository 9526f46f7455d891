"""Activations inside kernels, on fp32 values, and the rounding of what is stored.

SiLU of z is u + u tanh(u) with u = z/2: one special-function instruction and one fused multiply-add. A kernel halves what z
is made of (`halved`: weights and bias, once) rather than z, and halving is exact.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from triscale.kernels.machine import interpreted

# tanh.approx.f32 (relative error at most 2^-11, PTX ISA) has no interpreter: there the plain form stands in.
INTERPRETED = tl.constexpr(interpreted())


@triton.jit
def tanh(u):
    """fp32 -> fp32."""
    if INTERPRETED:
        t = tl.exp(-2.0 * tl.abs(u))  # at most 1: nothing overflows
        return tl.where(u < 0.0, -1.0, 1.0) * (1.0 - t) / (1.0 + t)
    else:
        return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [u], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def halved(x, act: tl.constexpr):
    """x/2 where act is silu, else x: for weights, biases and sums that make up the argument of `activate`."""
    if act == "silu":
        return 0.5 * x
    else:
        return x


@triton.jit
def activate(u, act: tl.constexpr):
    """silu, relu, relu6 or none of z, given u = halved(z, act), fp32."""
    if act == "silu":
        return u + u * tanh(u)
    elif act == "relu":
        return tl.maximum(u, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif act == "relu6":
        return tl.clamp(u, 0.0, 6.0, propagate_nan=tl.PropagateNan.ALL)
    else:
        tl.static_assert(act == "none", "expected silu, relu, relu6 or none")
        return u


@triton.jit
def sigmoid(z):
    """1 / (1 + exp(-z)), fp32."""
    return 0.5 * tanh(0.5 * z) + 0.5


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """fp32 -> dtype, to the nearest, ties to even; the interpreter's own cast to bf16 cuts off."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True).to(dtype)
    else:
        return x.to(dtype)


def activate_reference(z: Tensor, act: str) -> Tensor:
    """silu, relu, relu6 or none of z in z's own dtype."""
    if act == "none":
        return z
    return {"silu": F.silu, "relu": F.relu, "relu6": F.relu6}[act](z)
