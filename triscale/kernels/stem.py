"""The stem: a small convolution from three colours, normalisation folded in on the way in, norm and activation on the way out.

Bytes moved, at stride 2 for each output place: 12 of the image as uint8 (24 as bf16) and 2 for each output channel; B0 at
224: 0.15 + 0.80 MB an image. Work: on fp32 units the 27 multiply-adds of an output make 33 instructions, and memory
leaves time for 16 (H200). As a matrix product the tensor cores take them over, and to gather a tap serves all channels: 23
instructions an output at 32 channels, 14 at 64.

The product is in fp16, whatever the types outside: 11 bits where bf16 has 8, so that normalised pixels and folded weights
lose nothing that the output would show. Weights must lie within fp16's range, 65504, and images too once normalised.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from triscale.kernels.activation import activate, activate_reference, halved, rounded
from triscale.kernels.machine import Variant, on
from triscale.kernels.operands import FLOATS, HALF, SINGLE, check
from triscale.kernels.tiling import Pad

_COUNTS = ("down", "across", "height", "width", "out_height", "out_width", "pad_top", "pad_left")


@triton.jit
def _gather(x, mean, inv_std, top, side, height, width, first, size: tl.constexpr, stride: tl.constexpr, tile: tl.constexpr, edge: tl.constexpr):
    """(tall * wide, depth) fp16: the normalised pixels under the taps from `first` on; with `edge`, 0 outside the image.

    x points at row `top` and column `side`, where the tile's first tap is. Beyond the last tap, where the weights are 0, it
    is the first tap's pixel.
    """
    tap = first + tl.arange(0, tile[2])
    tap = tl.where(tap < 3 * size * size, tap, 0)
    colour = tap % 3
    scale = tl.load(inv_std + colour)
    shift = -tl.load(mean + colour) * scale
    row = (tl.arange(0, tile[0]) * stride)[:, None] + (tap // (3 * size))[None, :]
    column = (tl.arange(0, tile[1]) * stride)[:, None] + (tap // 3 % size)[None, :]
    at = x + (row * (width * 3) + colour[None, :])[:, None, :] + (column * 3)[None, :, :]
    if edge:
        row_ok = (row >= -top) & (row < height - top)
        inside = row_ok[:, None, :] & ((column >= -side) & (column < width - side))[None, :, :]
        pixel = tl.load(at, mask=inside, other=0).to(tl.float32) * scale[None, None, :] + shift[None, None, :]
        pixel = tl.where(inside, pixel, 0.0)
    else:
        pixel = tl.load(at).to(tl.float32) * scale[None, None, :] + shift[None, None, :]
    return tl.reshape(pixel.to(tl.float16), [tile[0] * tile[1], tile[2]])


@triton.jit(do_not_specialize=_COUNTS)
def stem_kernel(
    x,
    weight,
    bias,
    mean,
    inv_std,
    y,
    down,
    across,
    height,
    width,
    out_height,
    out_width,
    pad_top,
    pad_left,
    size: tl.constexpr,
    stride: tl.constexpr,
    channels: tl.constexpr,
    act: tl.constexpr,
    tall: tl.constexpr,
    wide: tl.constexpr,
    depth: tl.constexpr,
):
    """One of the down * across tiles of an image, tall * wide output places, 16 output channels at a time."""
    n = (tl.program_id(0) // (down * across)).to(tl.int64)
    out_row = tl.program_id(0) % (down * across) // across * tall
    out_column = tl.program_id(0) % across * wide
    top = out_row * stride - pad_top
    side = out_column * stride - pad_left
    # What may exceed 2^31 elements is in the pointers from here on, and the offsets within a tile are small.
    x += ((n * height + top) * width + side) * 3
    y += ((n * out_height + out_row) * out_width + out_column) * channels
    # Most tiles have all their pixels inside the image, and save the masks: a fifth of the instructions.
    edge = (tl.minimum(top, side) < 0) | (top + (tall - 1) * stride + size > height) | (side + (wide - 1) * stride + size > width)
    pixels = ()  # type: Any
    for first in tl.static_range(0, 3 * size * size, depth):
        if edge:
            part = _gather(x, mean, inv_std, top, side, height, width, first, size, stride, (tall, wide, depth), True)
        else:
            part = _gather(x, mean, inv_std, top, side, height, width, first, size, stride, (tall, wide, depth), False)
        pixels += (part,)
    row = tl.arange(0, tall)
    column = tl.arange(0, wide)
    ok = tl.reshape((row < out_height - out_row)[:, None] & (column < out_width - out_column)[None, :], [tall * wide])
    place = tl.reshape((row * out_width)[:, None] + column[None, :], [tall * wide])
    for first in tl.static_range(0, channels, 16):
        c = first + tl.arange(0, 16)
        sums = tl.zeros([tall * wide, 16], tl.float32)
        for k in tl.static_range(len(pixels)):
            tap = k * depth + tl.arange(0, depth)
            valid = (tap < 3 * size * size)[:, None] & (c < channels)[None, :]
            taps = tl.load(weight + tap[:, None] * channels + c[None, :], mask=valid, other=0.0).to(tl.float16)
            sums = tl.dot(pixels[k], taps, sums)
        start = halved(tl.load(bias + c, mask=c < channels, other=0.0).to(tl.float32), act)
        out = activate(halved(sums, act) + start[None, :], act)
        tl.store(y + (place * channels)[:, None] + c[None, :], rounded(out, y.dtype.element_ty), mask=ok[:, None] & (c < channels)[None, :])


@dataclass(frozen=True, order=True)
class StemConfig:
    """A program's tile of tall * wide output places, `depth` taps a product (powers of two, depth at least 16), and its warps."""

    tall: int
    wide: int
    depth: int
    warps: int


def configs(out_height: int, out_width: int) -> tuple[StemConfig, ...]:
    """The configurations worth trying, that with the fewest places computed in vain first."""
    every = [StemConfig(tall, places // tall, 32, places // 32) for places in (128, 64) for tall in (8, 4, 2, 1)]

    def computed(c: StemConfig) -> tuple[int, int]:
        return -(-out_height // c.tall) * -(-out_width // c.wide) * c.tall * c.wide, -c.tall * c.wide

    return tuple(sorted(every, key=computed))


def stem(
    x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, inv_std: Tensor, *, stride: int, pad: Pad, act: str, config: StemConfig | None = None
) -> Tensor:
    """act(convolution of (x - mean) * inv_std + bias); the padding is 0 after normalisation.

    x: (N, H, W, 3) uint8, bf16 or fp16. weight: (K, K, 3, C) and bias: (C,), any float type of 16 bits or more. mean and inv_std:
    (3,) fp32, in x's units. All contiguous, on one GPU. pad: top, bottom, left, right. Raises ValueError for anything else.
    Returns (N, HO, WO, C), bf16 unless x is fp16.
    """
    operands = {"x": (x, "NHW3", (torch.uint8, *HALF)), "weight": (weight, "KK3C", FLOATS), "bias": (bias, "C", FLOATS)}
    sizes = check("stem", {**operands, "mean": (mean, "3", SINGLE), "inv_std": (inv_std, "3", SINGLE)}, act)
    n, height, width, size, channels = (sizes[letter] for letter in "NHWKC")
    if stride not in (1, 2) or len(pad) != 4 or min(pad) < 0:
        raise ValueError(f"stem: expected stride 1 or 2 and four paddings of at least 0, found {stride} and {pad}")
    out_height, out_width = ((side + before + after - size) // stride + 1 for side, before, after in ((height, *pad[:2]), (width, *pad[2:])))
    if min(out_height, out_width) < 1:
        raise ValueError(f"stem: a {size}x{size} kernel finds no place in {height}x{width} padded by {pad}")
    c = config or configs(out_height, out_width)[0]
    y = torch.empty((n, out_height, out_width, channels), dtype=torch.float16 if x.dtype == torch.float16 else torch.bfloat16, device=x.device)
    down, across = -(-out_height // c.tall), -(-out_width // c.wide)
    counts = (down, across, height, width, out_height, out_width, pad[0], pad[2])
    constants = _constants(size, stride, channels, act, c)
    if n:
        options = {"num_warps": c.warps, "num_stages": 1, "enable_fp_fusion": True}
        with on("stem", x, weight, bias, mean, inv_std):
            stem_kernel[(n * down * across,)](x, weight, bias, mean, inv_std, y, *counts, **constants, **options)
    return y


def _constants(size: int, stride: int, channels: int, act: str, config: StemConfig) -> dict[str, Any]:
    """The kernel's constexpr parameters."""
    tile = {key: value for key, value in asdict(config).items() if key != "warps"}
    return {"size": size, "stride": stride, "channels": channels, "act": act, **tile}


def stem_reference(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, inv_std: Tensor, *, stride: int, pad: Pad, act: str) -> Tensor:
    """`stem` in torch, every step in weight's type (float64 too)."""
    top, bottom, left, right = pad
    pixels = ((x.to(weight.dtype) - mean.to(weight.dtype)) * inv_std.to(weight.dtype)).permute(0, 3, 1, 2)
    z = F.conv2d(F.pad(pixels, (left, right, top, bottom)), weight.permute(3, 2, 0, 1), bias.to(weight.dtype), stride)
    return activate_reference(z, act).permute(0, 2, 3, 1).contiguous()


def variants() -> list[Variant]:
    """The stems of B0 and ResNet-50 from uint8, and one of odd channels from bf16."""
    found = []
    for size, channels, side, dtype, act in (
        (3, 32, 112, "u8", "silu"),
        (7, 64, 112, "u8", "relu"),
        (3, 37, 300, "bf16", "relu6"),
    ):
        c = configs(side, side)[0]
        pointers = {"x": dtype, "weight": "fp32", "bias": "fp32", "mean": "fp32", "inv_std": "fp32", "y": "bf16"}
        signature = {key: f"*{type_}" for key, type_ in pointers.items()} | dict.fromkeys(_COUNTS, "i32")
        name = f"stem {size}x{size} s2 3->{channels} {dtype} {act} {c.tall}x{c.wide}"
        outputs = c.tall * c.wide * channels / (32 * c.warps)
        found.append(Variant(name, stem_kernel, signature, _constants(size, 2, channels, act, c), warps=c.warps, stages=1, outputs=outputs))
    return found
