"""Depthwise convolution with folded norm and activation, and the pooling that squeeze-excitation needs, in one pass.

Bytes moved: input once (what tiles share comes from cache) and output once, 2 each: at stride 1 4 bytes an output; and for
the partial sums 4 / (strip * rows) an output, in all of B0 0.6 % of the maps' bytes at batch 256 and 5 % at batch 1, where
tiles are small to have many. Work: K² multiply-adds an output on fp32 units, for tensor cores have no use for one channel at a
time, 3 instructions for SiLU and pooling, and 5 to 7 to load, widen, mask and store. An H200 has time for 30 while memory
moves 4 bytes: a 3x3 takes 17 to 19 and is bound by memory; a 5x5 at stride 1 takes 35 to 38 and is bound by its multiply-adds.

A lane computes `vector` adjacent channels of a strip of output columns and walks down the rows of its tile. It keeps the
weights and the sums of the output rows still open in registers (tuples, which the compiler unrolls): every input is loaded and
widened once per lane, and the next row is on its way while this one is used. Lanes are numbered over (image, strip, channel),
so no channel count is padded to a power of two. Rows are the same for all lanes of a program, so padded rows are never visited.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from triscale.blocks import same_padding
from triscale.kernels.activation import activate, activate_reference, halved, rounded
from triscale.kernels.machine import Variant, on
from triscale.kernels.operands import FLOATS, HALF, check
from triscale.kernels.tiling import DepthwiseConfig, Pad, Shape, columns, configs, tiles

SIZES = range(1, 8)  # of kernels: the taps of a larger one don't fit into a lane's registers


@triton.jit
def _inside(ok, first, width, columns: tl.constexpr, left: tl.constexpr, right: tl.constexpr):
    """Masks of `columns` columns from `first` on: `ok`, and in the image, where `left` and `right` many at the ends may not be."""
    masks = ()  # type: Any
    for j in tl.static_range(columns):
        mask = ok
        if j < left:
            mask = mask & (first + j >= 0)
        if j >= columns - right:
            mask = mask & (first + j < width)
        masks += (mask,)
    return masks


@triton.jit
def _load_taps(weight, channels: tl.constexpr, taps: tl.constexpr, act: tl.constexpr):
    """`weight` points at the lanes' channels of the first tap."""
    loaded = ()  # type: Any
    for k in tl.static_range(taps):
        loaded += (halved(tl.load(weight + k * channels).to(tl.float32), act),)
    return loaded


@triton.jit
def _widened(rows, count: tl.constexpr):
    wide = ()  # type: Any
    for j in tl.static_range(count):
        wide += (rows[j].to(tl.float32),)
    return wide


@triton.jit
def _load_rows(x, row, step, end, column_ok, channels: tl.constexpr, columns: tl.constexpr, stride: tl.constexpr):
    """`stride` input rows from `row` on: one tensor (lanes,) a column, 0 outside the image; `end`: (lanes,), the first row below."""
    rows = ()  # type: Any
    for s in tl.static_range(stride):
        inside = (row + s).to(tl.uint32) < end  # above the image, -1 is the largest number
        for j in tl.static_range(columns):
            rows += (tl.load(x + (row + s) * step + j * channels, mask=column_ok[j] & inside, other=0.0),)
    return rows


@triton.jit
def _add_taps(sums, rows, weight, size: tl.constexpr, stride: tl.constexpr, strip: tl.constexpr):
    """`stride` more input rows added to the sums of all open output rows, newest first; `weight`: size * size tensors.

    The oldest output row comes first in the code: its registers are free when the next one moves in.
    """
    columns: tl.constexpr = (strip - 1) * stride + size
    added = ()  # type: Any
    for age in tl.static_range((size - 1) // stride, -1, -1):
        row = ()  # type: Any
        for i in tl.static_range(strip):
            total = sums[age * strip + i]
            for s in tl.static_range(stride):
                if age * stride + s < size:
                    for k in tl.static_range(size):
                        total += rows[s * columns + i * stride + k] * weight[(age * stride + s) * size + k]
            row += (total,)
        added = row + added
    return added


@triton.jit
def _store_row(at, row, column_ok, pooled, channels: tl.constexpr, strip: tl.constexpr, ragged: tl.constexpr, act: tl.constexpr, pool: tl.constexpr):
    """Activates and stores one finished output row; returns `pooled` plus its sum over the strip."""
    for i in tl.static_range(strip):
        out = activate(row[i], act)
        tl.store(at + i * channels, rounded(out, at.dtype.element_ty), mask=column_ok[i])
        if pool:
            pooled += tl.where(column_ok[i], out, 0.0) if ragged else out
    return pooled


_COUNTS = ("first", "images", "height", "width", "out_height", "out_width", "rows", "tiles", "strips", "pad_top", "pad_left")


@triton.jit(do_not_specialize=_COUNTS)
def depthwise_kernel(
    x,
    weight,
    bias,
    y,
    sums,
    first,
    images,
    height,
    width,
    out_height,
    out_width,
    rows,
    tiles,
    strips,
    pad_top,
    pad_left,
    size: tl.constexpr,
    stride: tl.constexpr,
    channels: tl.constexpr,
    strip: tl.constexpr,
    left: tl.constexpr,
    right: tl.constexpr,
    ragged: tl.constexpr,
    act: tl.constexpr,
    pool: tl.constexpr,
    lanes: tl.constexpr,
):
    """Images first to first + images. rows: output rows of a tile, `tiles` an image; strips: of `strip` output columns, a row.

    left, right: so many input columns at a strip's ends may lie outside the image. ragged: so may output columns.
    """
    columns: tl.constexpr = (strip - 1) * stride + size
    older: tl.constexpr = (size - 1) // stride  # output rows that are open beside the newest
    tile = tl.program_id(0) % tiles
    element = tl.program_id(0) // tiles * lanes + tl.arange(0, lanes)
    c = element % channels
    place = element // channels
    column = place % strips * strip
    ok = place // strips < images
    n = (first + place // strips).to(tl.int64)  # from here on offsets are in int64
    in_column = column * stride - pad_left
    in_ok = _inside(ok, in_column, width, columns, left, right)
    out_ok = _inside(ok, column, out_width, strip, 0, strip if ragged else 0)
    taps = _load_taps(weight + c, channels, size * size, act)
    start = halved(tl.load(bias + c).to(tl.float32), act)
    out_row = tile * rows
    count = tl.minimum(rows, out_height - out_row)
    in_row = out_row * stride - pad_top
    x += (n * height * width + in_column) * channels + c
    y += (n * out_height * out_width + column) * channels + c
    in_step = width.to(tl.int64) * channels
    out_step = out_width.to(tl.int64) * channels

    # Step t takes input rows t * stride to t * stride + stride - 1 of the tile and finishes its output row t - older.
    end = count + older
    begin = tl.minimum(tl.maximum(-in_row, 0) // stride, older)
    last = tl.maximum(tl.minimum(height, in_row + (count - 1) * stride + size), 0)
    last = tl.full([lanes], last, tl.int32).to(tl.uint32)
    filled = tl.maximum(tl.minimum((height - in_row + stride - 1) // stride, end), begin)
    open_rows = (start,) * (older * strip)
    pooled = tl.zeros([lanes], tl.float32)
    ahead = _load_rows(x, in_row + begin * stride, in_step, last, in_ok, channels, columns, stride)
    for t in range(begin, filled):
        now = _widened(ahead, stride * columns)
        ahead = _load_rows(x, in_row + (t + 1) * stride, in_step, last, in_ok, channels, columns, stride)
        open_rows = _add_taps((start,) * strip + open_rows, now, taps, size, stride, strip)
        if t >= older:
            pooled = _store_row(y + (out_row + t - older) * out_step, open_rows[older * strip :], out_ok, pooled, channels, strip, ragged, act, pool)
        open_rows = open_rows[: older * strip]
    for t in range(filled, end):  # below the image: what is open is finished
        open_rows = (start,) * strip + open_rows
        if t >= older:
            pooled = _store_row(y + (out_row + t - older) * out_step, open_rows[older * strip :], out_ok, pooled, channels, strip, ragged, act, pool)
        open_rows = open_rows[: older * strip]
    if pool:
        tl.store(sums + ((n * tiles + tile) * strips + column // strip) * channels + c, pooled, mask=ok)


def _constants(shape: Shape, config: DepthwiseConfig, act: str, pool: bool) -> dict[str, Any]:
    """The constexpr parameters of the kernel."""
    read, (_, strips) = columns(shape, config), tiles(shape, config)
    beyond = (strips - 1) * config.strip * shape.stride - shape.pad[2] + read - shape.width  # of the last strip's columns
    return {
        "size": shape.size,
        "stride": shape.stride,
        "channels": shape.channels,
        "strip": config.strip,
        "left": min(shape.pad[2], read),
        "right": min(max(beyond, 0), read),
        "ragged": shape.out_width % config.strip != 0,
        "act": act,
        "pool": pool,
        "lanes": config.warps * 32 * config.vector,
    }


def _shape(x: Tensor, weight: Tensor, bias: Tensor, stride: int, pad: Pad, act: str) -> Shape:
    """The shape, or ValueError that says what is wrong with it."""
    sizes = check("depthwise", {"x": (x, "NHWC", HALF), "weight": (weight, "KKC", FLOATS), "bias": (bias, "C", FLOATS)}, act)
    size, height, width = sizes["K"], sizes["H"], sizes["W"]
    if size not in SIZES:
        raise ValueError(f"depthwise: expected a kernel of at most {SIZES[-1]}x{SIZES[-1]}, found {size}x{size}")
    if stride not in (1, 2) or len(pad) != 4 or min(pad) < 0:
        raise ValueError(f"depthwise: expected stride 1 or 2 and four paddings of at least 0, found {stride} and {pad}")
    pad = tuple(pad)  # type: ignore[assignment] # a list can't be looked up
    shape = Shape(sizes["N"], height, width, sizes["C"], size, stride, pad)
    if min(shape.out_height, shape.out_width) < 1:
        raise ValueError(f"depthwise: a {size}x{size} kernel finds no place in {height}x{width} padded by {pad}")
    return shape


def depthwise(
    x: Tensor, weight: Tensor, bias: Tensor, *, stride: int, pad: Pad, act: str, pool: bool = False, config: DepthwiseConfig | None = None
) -> tuple[Tensor, Tensor | None]:
    """act(convolution + bias), and with `pool` its partial sums; equal from run to run, bit for bit.

    x: (N, H, W, C), bf16 or fp16. weight: (K, K, C) and bias: (C,), any float type of 16 bits or more. All contiguous, on one GPU.
    pad: top, bottom, left, right. Raises ValueError for anything else.
    Returns y (N, HO, WO, C) in x's type, and sums (N, T, C) fp32 over T parts of each image, of what was not yet rounded.
    """
    shape = _shape(x, weight, bias, stride, pad, act)
    y = x.new_empty(shape.images, shape.out_height, shape.out_width, shape.channels)
    config = config or configs(shape, pool=pool)[0]
    down, across = tiles(shape, config)
    sums = x.new_empty((shape.images, down * across, shape.channels), dtype=torch.float32) if pool else None
    at_once = images_at_once(shape, config)
    for first in range(0, shape.images, at_once):
        launch((x, weight, bias, y, sums), shape, config, act, range(first, min(first + at_once, shape.images)))
    return y, sums


def images_at_once(shape: Shape, config: DepthwiseConfig) -> int:
    """So many that lanes and programs are counted in 32 bits; offsets are in 64."""
    down, across = tiles(shape, config)
    return max(1, (2**31 - 2**17) // (across * shape.channels * -(-down // 32)))


def launch(tensors: tuple[Tensor | None, ...], shape: Shape, config: DepthwiseConfig, act: str, images: range) -> None:
    """The kernel on some of the images. tensors: x, weight, bias, y, sums (None: no pooling), whole."""
    down, across = tiles(shape, config)
    constants = _constants(shape, config, act, tensors[4] is not None)
    counts = (images.start, len(images), shape.height, shape.width, shape.out_height, shape.out_width, config.rows, down, across)
    programs = down * -(-len(images) * across * shape.channels // constants["lanes"])
    options = {"num_warps": config.warps, "num_stages": 1, "enable_fp_fusion": True}
    with on("depthwise", *tensors):
        depthwise_kernel[(programs,)](*tensors, *counts, shape.pad[0], shape.pad[2], **constants, **options)


def depthwise_reference(
    x: Tensor, weight: Tensor, bias: Tensor, *, stride: int, pad: Pad, act: str, pool: bool = False
) -> tuple[Tensor, Tensor | None]:
    """The same in torch, in x's type (float64 too); sums has one part."""
    top, bottom, left, right = pad
    kernel = weight.to(x.dtype).permute(2, 0, 1)[:, None]
    padded = F.pad(x.permute(0, 3, 1, 2), (left, right, top, bottom))
    y = activate_reference(F.conv2d(padded, kernel, bias.to(x.dtype), stride, groups=x.shape[3]), act).permute(0, 2, 3, 1).contiguous()
    return y, y.sum((1, 2))[:, None] if pool else None


def variants() -> list[Variant]:
    """Convolutions of B0, B4, B7 and MobileNetV2 with SAME padding at batch 128, and of odd channels, as the first of `configs` runs them."""
    found = []
    for size, stride, channels, side, dtype, act, most in (
        (3, 1, 32, 112, "bf16", "silu", 22.0),
        (3, 2, 96, 112, "bf16", "relu6", 32.0),
        (5, 2, 144, 56, "bf16", "silu", 64.0),
        (5, 1, 1152, 7, "fp16", "silu", 40.0),
        (5, 1, 960, 24, "bf16", "silu", 40.0),
        (3, 1, 64, 300, "bf16", "silu", 22.0),
        (3, 2, 37, 14, "fp16", "relu", 40.0),
    ):
        pad = same_padding(side, size, stride)
        shape = Shape(128, side, side, channels, size, stride, (*pad, *pad))
        pool = act == "silu"
        c = configs(shape, pool=pool)[0]
        pointers = {"x": dtype, "weight": "fp32", "bias": "fp32", "y": dtype} | ({"sums": "fp32"} if pool else {})
        signature = {key: f"*{type_}" for key, type_ in pointers.items()} | dict.fromkeys(_COUNTS, "i32")
        constants = _constants(shape, c, act, pool) | ({} if pool else {"sums": None})
        name = f"depthwise {size}x{size} s{stride} {channels}x{side} {dtype} {act} {c.strip} by {c.vector}"
        outputs = c.strip * c.vector
        found.append(Variant(name, depthwise_kernel, signature, constants, c.warps, 1, outputs=outputs, max_instructions=most))
    return found
