"""Squeeze-excitation's two small layers in one launch, from the pooled sums that the depthwise kernel leaves.

gate = sigmoid(w2 @ act(w1 @ mean + b1) + b2), all in fp32 and with exact exponentials: a gate multiplies every place of
its channel, so its error would not average out. One program an image; every sum has a fixed order.

Bytes an image: 4 T C for the sums, 4 C for the gate. The weights, 2 R C of them, come from L2 for every image: in fp32, as the
engine keeps them, 8 R C bytes a block, 2.5 MB in all of B0, where the rest of the network moves 27 MB through L2 as well; two
images a program would halve that 9 %, and leave half of the multiprocessors idle below 264 images. They may be of any float type.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from triscale.kernels.activation import activate, activate_reference
from triscale.kernels.machine import SHARED, Variant, on, shared_memory
from triscale.kernels.operands import FLOATS, SINGLE, check
from triscale.kernels.pointwise_tiles import MULTIPROCESSORS


@dataclass(frozen=True)
class SqueezeConfig:
    """block_c channels with all R squeezed ones, and block_t parts of the sums, at a time."""

    block_c: int
    block_t: int
    warps: int = 8
    stages: int = 2

    def shared(self, parts: int, squeezed: int) -> int:
        """Bytes of shared memory, from above: all stages but one of the weights, and of the sums that come in one piece; a reduction."""
        held = triton.next_power_of_2(squeezed) + (self.block_t if parts <= self.block_t else 0)
        return 4 * (self.stages - 1) * self.block_c * held + 512 * self.warps


@triton.jit
def _load_sums(sums, t, c, parts, channels: tl.constexpr):
    return tl.load(sums + t[:, None] * channels + c[None, :], mask=(t < parts)[:, None] & (c < channels)[None, :], other=0.0)


@triton.jit(do_not_specialize=("parts", "places"))
def squeeze_kernel(
    sums,  # (N, parts, channels)
    w1,  # (R, C)
    b1,
    w2,  # (C, R)
    b2,
    gate,  # (N, C)
    parts,
    places,
    channels: tl.constexpr,
    squeezed: tl.constexpr,
    act: tl.constexpr,
    block_c: tl.constexpr,
    block_t: tl.constexpr,
    block_r: tl.constexpr,
    once: tl.constexpr,  # parts <= block_t: no loop inside the first one, which can then load ahead
    stages: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    sums += image * parts * channels
    t = tl.arange(0, block_t)
    r = tl.arange(0, block_r)
    # Reduced over channels once, after the loop: inside, every addition would cross the lanes of a warp.
    acc_rc = tl.zeros((block_r, block_c), tl.float32)
    for start in tl.range(0, channels, block_c, num_stages=stages):
        c = start + tl.arange(0, block_c)
        sum_tc = _load_sums(sums, t, c, parts, channels)
        if not once:
            for first in range(block_t, parts, block_t):
                sum_tc += _load_sums(sums, first + t, c, parts, channels)
        w1_rc = tl.load(w1 + r[:, None] * channels + c[None, :], mask=(r < squeezed)[:, None] & (c < channels)[None, :], other=0.0)
        acc_rc += w1_rc.to(tl.float32) * (tl.sum(sum_tc, 0) / places)[None, :]
    z_r = tl.sum(acc_rc, 1) + tl.load(b1 + r, mask=r < squeezed, other=0.0)
    squeezed_r = z_r * tl.sigmoid(z_r) if act == "silu" else activate(z_r, act)
    for start in tl.range(0, channels, block_c, num_stages=stages):
        c = start + tl.arange(0, block_c)
        w2_cr = tl.load(w2 + c[:, None] * squeezed + r[None, :], mask=(c < channels)[:, None] & (r < squeezed)[None, :], other=0.0)
        z_c = tl.sum(w2_cr.to(tl.float32) * squeezed_r[None, :], 1) + tl.load(b2 + c, mask=c < channels, other=0.0)
        tl.store(gate + image * channels + c, tl.sigmoid(z_c), mask=c < channels)


@lru_cache(maxsize=1024)
def configs(images: int, parts: int, channels: int, squeezed: int, *, shared: int = SHARED) -> tuple[SqueezeConfig, ...]:
    """Ways to cut the two layers, 32 weights a thread at a time; more warps come first where multiprocessors would be idle.

    shared: bytes that a program may have on this GPU; 27 KiB are enough for one of them up to 1024 squeezed channels; above 4096
    of these 99 KiB are not, and there is none.
    """
    rows = triton.next_power_of_2(squeezed)
    warps = (16, 8, 4) if images <= MULTIPROCESSORS else (8, 4, 16)
    found = []
    for n in warps if rows <= 128 else (8, 4):  # 16 warps on 256 rows spill (ptxas of Triton 3.6)
        block_c = min(max(1024 * n // rows, 4), triton.next_power_of_2(channels))
        block_t = min(max(512 * n // block_c, 1), triton.next_power_of_2(parts))
        found += [SqueezeConfig(block_c, block_t, n, stages) for stages in (2, 3)]
    return tuple(c for c in found if c.shared(parts, squeezed) <= shared)


def _constants(parts: int, channels: int, squeezed: int, act: str, config: SqueezeConfig) -> dict[str, Any]:
    blocks = {"block_c": config.block_c, "block_t": config.block_t, "block_r": triton.next_power_of_2(squeezed)}
    return {"channels": channels, "squeezed": squeezed, "act": act, **blocks, "once": parts <= config.block_t, "stages": config.stages}


def squeeze(
    sums: Tensor, places: int, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, *, act: str = "silu", config: SqueezeConfig | None = None
) -> Tensor:
    """Partial sums (N, T, C) fp32 over `places` places an image -> gate (N, C) fp32.

    w1 (R, C) and w2 (C, R) of one float type, b1 (R,) and b2 (C,) fp32; all contiguous, on one GPU. config: one of
    `configs(N, T, C, R)`; None takes the first. Raises ValueError for anything else.
    """
    operands = {"sums": (sums, "NTC", SINGLE), "w1": (w1, "RC", FLOATS), "b1": (b1, "R", SINGLE)}
    sizes = check("squeeze", {**operands, "w2": (w2, "CR", (w1.dtype,)), "b2": (b2, "C", SINGLE)}, act)
    n, parts, channels, squeezed = (sizes[letter] for letter in "NTCR")
    if places < 1:
        raise ValueError(f"squeeze: expected sums over at least 1 place an image, found {places}")
    ways = (config,) if config else configs(n, parts, channels, squeezed, shared=shared_memory(sums.device))
    if not ways:
        raise ValueError(f"squeeze: {squeezed} squeezed channels need more shared memory than this GPU has")
    c = ways[0]
    gate = torch.empty((n, channels), dtype=torch.float32, device=sums.device)
    if n:
        constants = _constants(parts, channels, squeezed, act, c)
        with on("squeeze", sums, w1, b1, w2, b2):
            squeeze_kernel[(n,)](sums, w1, b1, w2, b2, gate, parts, places, **constants, num_warps=c.warps, num_stages=1, enable_fp_fusion=True)
    return gate


def squeeze_reference(sums: Tensor, places: int, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, *, act: str = "silu") -> Tensor:
    """`squeeze` in torch, every step in the sums' dtype."""
    mean = sums.sum(1) / places
    squeezed = activate_reference(mean @ w1.to(mean.dtype).T + b1.to(mean.dtype), act)
    return torch.sigmoid(squeezed @ w2.to(mean.dtype).T + b2.to(mean.dtype))


def variants() -> list[Variant]:
    """Blocks of B0, B7 and L2, in a large batch and alone, by the first configuration; weights in fp32, as the engine keeps them."""
    return [variant(*sizes) for sizes in ((256, 23, 32, 8), (1, 448, 32, 8), (1, 7, 1152, 48), (256, 4, 3840, 160), (1, 8, 8256, 344))]


def variant(images: int, parts: int, channels: int, squeezed: int, shared: int = SHARED) -> Variant:
    """What compiles for the first configuration of these sizes."""
    c = configs(images, parts, channels, squeezed, shared=shared)[0]
    signature = dict.fromkeys(("sums", "w1", "b1", "w2", "b2", "gate"), "*fp32") | {"parts": "i32", "places": "i32"}
    constants = _constants(parts, channels, squeezed, "silu", c)
    name = f"squeeze {channels}->{squeezed} of {parts} {c.block_c}x{c.block_t} {c.warps} warps"
    return Variant(name, squeeze_kernel, signature, constants, warps=c.warps, max_shared=c.shared(parts, squeezed))
