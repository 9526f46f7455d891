"""A 1x1 convolution as one matrix product over all places of all images: expansion, projection and head.

y = act(gate * x @ weight + bias + residual), batch norm folded into weight and bias. The gate (squeeze-excitation's, per
image and channel) is multiplied on while x is loaded and rounded to x's dtype, as a tensor core takes it; sums, bias,
residual and activation are fp32, and y is rounded once. The activation comes after the residual, as in Bottleneck and
DepthwiseSeparable (MBConv's and FusedMBConv's projections have none); a branch that ends in an activation of its own
(ConvBlock) is no case for `residual`.

Bytes, for M = N H W rows of 2-byte elements: 2 M I for x, 2 M O for y, 2 M O for a residual, 4 N I for a gate; with `pool`
4 N T O for the sums instead of y. These are HBM's. From L2 come the weights, 2 I O for each tile of rows, and x again for
every further program on the same rows: O / (span * block_o) in all. So where I is small (every expansion of B0) a program
holds its tile of x and walks all of O, and x is read once at every level; where I is large O is small, and a projection to
at most 256 channels is one tile wide. Programs on the same rows are neighbours in the grid and run together, and the weights (4.9 MB at
most in B7) fit in L2: a grouped order would save nothing, and several programs per multiprocessor already overlap one's
epilogue with another's loads, which is what a persistent kernel is for.

In the kernels' names a suffix tells a tensor's axes: m rows, k input channels, o output channels of the tile.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from triscale.kernels.activation import INTERPRETED, activate, activate_reference, halved, rounded
from triscale.kernels.machine import SHARED, Variant, on, shared_memory
from triscale.kernels.operands import HALF, SINGLE, check
from triscale.kernels.pointwise_tiles import PointwiseConfig, blocks, configs


@triton.jit
def _dot(x_mk, weight_ko, acc_mo):
    if INTERPRETED:  # where tl.dot multiplies the bit patterns of bf16 as integers; fp32 gives equal products
        return tl.dot(x_mk.to(tl.float32), weight_ko.to(tl.float32), acc_mo)
    else:
        return tl.dot(x_mk, weight_ko, acc_mo)


@triton.jit
def _load_x(x, gate, image_m, left, first, cin: tl.constexpr, block_m: tl.constexpr, block_k: tl.constexpr, by_image: tl.constexpr):
    """(block_m, block_k) of x from input channel `first`, times the gate; 0 outside. x and gate point at the tile's first row and image."""
    m = tl.arange(0, block_m)
    k = first + tl.arange(0, block_k)
    mask_mk = (m < left)[:, None] & (k < cin)[None, :]
    x_mk = tl.load(x + m[:, None] * cin + k[None, :], mask=mask_mk, other=0.0)
    if gate is not None:
        if by_image:
            gate_mk = tl.load(gate + k, mask=k < cin, other=0.0)[None, :]
        else:
            gate_mk = tl.load(gate + image_m[:, None] * cin + k[None, :], mask=mask_mk, other=0.0)
        x_mk = rounded(x_mk.to(tl.float32) * gate_mk, x_mk.dtype)
    return x_mk


@triton.jit
def _load_weight(weight, first, o, cin: tl.constexpr, cout: tl.constexpr, block_k: tl.constexpr):
    k = first + tl.arange(0, block_k)
    return tl.load(weight + k[:, None] * cout + o[None, :], mask=(k < cin)[:, None] & (o < cout)[None, :], other=0.0)


@triton.jit
def _finish(acc_mo, bias, residual, y, left, o, cout: tl.constexpr, act: tl.constexpr, pool: tl.constexpr, block_m: tl.constexpr):
    """Bias, residual, activation; then stores the tile, or its sum. residual and y point at the tile's first row (pool: its sum)."""
    m = tl.arange(0, block_m)
    mask_mo = (m < left)[:, None] & (o < cout)[None, :]
    at_mo = m[:, None] * cout + o[None, :]
    u_mo = halved(acc_mo, act) + halved(tl.load(bias + o, mask=o < cout, other=0.0), act)[None, :]
    if residual is not None:
        u_mo += halved(tl.load(residual + at_mo, mask=mask_mo, other=0.0).to(tl.float32), act)
    y_mo = activate(u_mo, act)
    if pool:
        tl.store(y + o, tl.sum(tl.where(mask_mo, y_mo, 0.0), 0), mask=o < cout)
    else:
        tl.store(y + at_mo, rounded(y_mo, y.dtype.element_ty), mask=mask_mo)


@triton.jit
def _place(tile, rows, places, block_m: tl.constexpr, by_image: tl.constexpr):
    """A tile's first row, the rows left from there, the first row's image (both int64), and the images that follow it by row."""
    if by_image:
        tiles = tl.cdiv(places, block_m)
        image = (tile // tiles).to(tl.int64)
        place = tile % tiles * block_m
        return image * places + place, places - place, image, tl.zeros((block_m,), tl.int32)
    else:
        row = tile.to(tl.int64) * block_m
        image_m = ((row % places).to(tl.int32) + tl.arange(0, block_m)) // places
        return row, tl.minimum(rows - row, block_m).to(tl.int32), row // places, image_m


@triton.jit(do_not_specialize=("rows", "places"))
def pointwise_kernel(
    x,
    weight,
    bias,
    gate,
    residual,
    y,
    rows,
    places,
    cin: tl.constexpr,
    cout: tl.constexpr,
    act: tl.constexpr,
    pool: tl.constexpr,
    block_m: tl.constexpr,
    block_o: tl.constexpr,
    block_k: tl.constexpr,
    tail_k: tl.constexpr,
    span: tl.constexpr,
    by_image: tl.constexpr,
):
    """x (rows, cin), places: rows of an image; gate and residual may be None. The channels are constants: Triton then knows how far rows are aligned.

    Program p computes the tile of rows p // parts and its p % parts'th part of the output channels, `span` tiles wide.
    """
    held: tl.constexpr = cin <= block_k + tail_k
    parts: tl.constexpr = (cout + span * block_o - 1) // (span * block_o)
    tile = tl.program_id(0) // parts
    part = tl.program_id(0) % parts
    row, left, image, image_m = _place(tile, rows, places, block_m, by_image)
    # What may exceed 2^31 elements is in the pointers from here on, and the offsets are small.
    x += row * cin
    if gate is not None:
        gate += image * cin
    if residual is not None:
        residual += row * cout
    y += (tile.to(tl.int64) if pool else row) * cout
    if held:
        held_mk = _load_x(x, gate, image_m, left, 0, cin, block_m, block_k, by_image)
        if tail_k > 0:
            tail_mk = _load_x(x, gate, image_m, left, block_k, cin, block_m, tail_k, by_image)
    for step in range(span):
        o = (part * span + step) * block_o + tl.arange(0, block_o)
        acc_mo = tl.zeros((block_m, block_o), tl.float32)
        if held:
            acc_mo = _dot(held_mk, _load_weight(weight, 0, o, cin, cout, block_k), acc_mo)
            if tail_k > 0:
                acc_mo = _dot(tail_mk, _load_weight(weight, block_k, o, cin, cout, tail_k), acc_mo)
        else:
            for first in range(0, cin, block_k):
                x_mk = _load_x(x, gate, image_m, left, first, cin, block_m, block_k, by_image)
                acc_mo = _dot(x_mk, _load_weight(weight, first, o, cin, cout, block_k), acc_mo)
        _finish(acc_mo, bias, residual, y, left, o, cout, act, pool, block_m)


def _constants(cin: int, cout: int, act: str, pool: bool, config: PointwiseConfig) -> dict[str, Any]:
    """The kernel's constexpr parameters: the layer's, and the configuration's but for what Triton takes itself."""
    blocks = {key: value for key, value in asdict(config).items() if key not in ("warps", "stages")}
    return {"cin": cin, "cout": cout, "act": act, "pool": pool, **blocks}


def pointwise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    act: str = "none",
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    pool: bool = False,
    config: PointwiseConfig | None = None,
) -> Tensor:
    """x (N, H, W, I), weight (I, O), both bf16 or both fp16; bias (O,), gate (N, I) fp32; residual (N, H, W, O) as x. All contiguous, on one GPU.

    Returns act(gate * x @ weight + bias + residual) as x, or with `pool` its fp32 sums (N, T, O) over T parts of each image,
    always added in the same order. config: one of `configs(...)`; None takes the first. Raises ValueError for anything else.
    """
    same = (x.dtype,)
    operands = {"x": (x, "NHWI", HALF), "weight": (weight, "IO", same), "bias": (bias, "O", SINGLE)}
    sizes = check("pointwise", {**operands, "gate": (gate, "NI", SINGLE), "residual": (residual, "NHWO", same)}, act)
    n, height, width, cin, cout = (sizes[letter] for letter in "NHWIO")
    places = height * width
    kind = {"gated": gate is not None, "residual": residual is not None, "pool": pool}
    c = config or configs(n * places, places, cin, cout, **kind, shared=shared_memory(x.device))[0]
    if pool and not c.by_image:
        raise ValueError(f"pointwise: expected a configuration by image for pooling, found {c}")
    tiles = n * blocks(places, c.block_m) if c.by_image else blocks(n * places, c.block_m)
    shape = (n, blocks(places, c.block_m), cout) if pool else (n, height, width, cout)
    y = torch.empty(shape, dtype=torch.float32 if pool else x.dtype, device=x.device)
    if n:
        grid = (tiles * blocks(cout, c.span * c.block_o),)
        options = {"num_warps": c.warps, "num_stages": c.stages, "enable_fp_fusion": True}
        with on("pointwise", x, weight, bias, gate, residual):
            pointwise_kernel[grid](x, weight, bias, gate, residual, y, n * places, places, **_constants(cin, cout, act, pool, c), **options)
    return y


def pointwise_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    act: str = "none",
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    pool: bool = False,
) -> Tensor:
    """`pointwise` in torch, every step in x's dtype; the sums as one part (N, 1, O)."""
    if gate is not None:
        x = x * gate[:, None, None].to(x.dtype)
    z = x @ weight.to(x.dtype) + bias.to(x.dtype)
    y = activate_reference(z if residual is None else z + residual.to(x.dtype), act)
    return y.sum((1, 2))[:, None] if pool else y


@dataclass(frozen=True)
class Layer:
    """A 1x1 convolution of `images` of side x side places."""

    kind: str
    images: int
    side: int
    cin: int
    cout: int
    act: str = "none"
    dtype: str = "bf16"
    gated: bool = False
    residual: bool = False
    pool: bool = False

    def configs(self, shared: int = SHARED) -> tuple[PointwiseConfig, ...]:
        """The ways to cut it."""
        rows, kind = self.images * self.side**2, {"gated": self.gated, "residual": self.residual, "pool": self.pool}
        return configs(rows, self.side**2, self.cin, self.cout, **kind, shared=shared)

    def variant(self, c: PointwiseConfig, most: float | None = None) -> Variant:
        """What compiles where the layer is launched with `c`; its bound on instructions, where the longest loop is the one over outputs."""
        types = {"x": self.dtype, "weight": self.dtype, "bias": "fp32", "y": "fp32" if self.pool else self.dtype}
        types |= {"gate": "fp32"} if self.gated else {}
        types |= {"residual": self.dtype} if self.residual else {}
        signature = {key: f"*{type_}" for key, type_ in types.items()} | {"rows": "i32", "places": "i32"}
        absent = dict.fromkeys({"gate", "residual"} - set(types))
        constants = _constants(self.cin, self.cout, self.act, self.pool, c) | absent
        tile = f"{c.block_m}x{c.block_o}x{c.block_k}+{c.tail_k} span {c.span}{' by image' if c.by_image else ''}"
        name = f"{self.kind} {self.cin}->{self.cout} {self.dtype} {tile}"
        outputs = c.block_m * c.block_o / (32 * c.warps) if most else 0.0
        shared = c.shared(self.gated)
        return Variant(name, pointwise_kernel, signature, constants, c.warps, c.stages, outputs=outputs, max_instructions=most, max_shared=shared)


LAYERS = (
    (Layer("expand", 256, 56, 24, 144, "silu"), 8.0),
    (Layer("expand", 256, 24, 160, 960, "silu", "fp16"), 10.0),
    (Layer("project", 256, 56, 144, 24, gated=True, residual=True), None),
    (Layer("project", 1, 14, 240, 80, gated=True), None),
    (Layer("project", 32, 38, 960, 160, gated=True, residual=True), None),
    (Layer("project", 256, 3, 1152, 192, gated=True, residual=True), None),
    (Layer("project", 256, 14, 384, 96, residual=True), None),
    (Layer("project", 256, 14, 333, 53, gated=True, residual=True), None),
    (Layer("project", 256, 7, 512, 2048, "relu", residual=True), None),
    (Layer("expand", 256, 14, 37, 53, "silu"), 14.0),
    (Layer("head", 256, 7, 320, 1280, "silu", pool=True), None),
    (Layer("head", 256, 7, 320, 1280, "relu6", "fp16", pool=True), None),
)


def variants() -> list[Variant]:
    """A layer of each kind of B0, B7, MobileNetV2 and ResNet-50, and of odd channels, by its first configuration."""
    return [layer.variant(layer.configs()[0], most) for layer, most in LAYERS]
