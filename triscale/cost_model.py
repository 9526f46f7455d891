"""What a network costs, by arithmetic on its Arch: no torch, exact, under a millisecond.

Units: parameters are counted as torch counts them (running statistics are not parameters). MACs are multiply-adds of
convolutions and linear layers for one image, what the EfficientNet paper prints as "FLOPS"; they equal half of what
torch.utils.flop_counter reports for the built module. Activations are the output elements of all convolutions and linear
layers for one image (Radosavovic et al. 2020, section 3.1). Memory is in bytes and models the modules of blocks.py run in
eager mode: see memory_model.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

from triscale.architecture import Arch, Block, Stage
from triscale.memory_model import Memory, peak_memory
from triscale.text import aligned


@dataclass(frozen=True)
class StageCost:
    """One row of Table 1: `resolution` is the (height, width) of the stage's input; parameters and MACs cover all layers."""

    operator: str
    resolution: tuple[int, int]
    channels: int
    layers: int
    params: int
    macs: int
    activations: int


Request = tuple[Arch, int, int, int, tuple[int, int], int]  # arch, classes, input channels, batch, (height, width), bytes


@dataclass(frozen=True)
class Cost:
    """Totals and rows. `memory` is worked out when asked for the first time (see Memory); the rest is there at once."""

    params: int
    macs: int
    activations: int
    per_stage: tuple[StageCost, ...]
    request: Request

    @cached_property
    def memory(self) -> Memory:
        return peak_memory(*self.request, self.params)


class _Count:
    """Running parameters, MACs and activations, and the size of the map that flows."""

    def __init__(self, size: tuple[int, int]) -> None:
        self.params = self.macs = self.activations = 0
        self.height, self.width = size

    def conv(self, cin: int, cout: int, kernel: int, stride: int = 1, *, groups: int = 1, at: tuple[int, int] | None = None) -> None:
        """A convolution and its norm. `at`: on a map of that size instead of the flowing one, which then stays."""
        height, width = at or (self.height, self.width)
        height, width = -(-height // stride), -(-width // stride)
        weights = cin // groups * cout * kernel * kernel
        self.params += weights + 2 * cout
        self.macs += weights * height * width
        self.activations += cout * height * width
        if at is None:
            self.height, self.width = height, width

    def linear(self, cin: int, cout: int) -> None:
        self.params += cin * cout + cout
        self.macs += cin * cout
        self.activations += cout

    def block(self, block: Block) -> None:
        stage, cin, inner, cout = block.stage, block.in_channels, block.inner, block.stage.channels
        before = self.height, self.width
        kernel, stride = stage.kernel, block.stride
        kind = "conv" if stage.block == "fused_mbconv" and stage.expand == 1 else stage.block
        if kind == "conv":
            self.conv(cin, cout, kernel, stride)
            self.squeeze_excite(cout, block.squeezed)
        elif kind == "separable":
            self.conv(cin, cin, kernel, stride, groups=cin)
            self.conv(cin, cout, 1)
        elif kind == "basic":
            self.conv(cin, inner, kernel, stride)
            self.conv(inner, cout, kernel)
        elif kind == "bottleneck":
            self.conv(cin, inner, 1)
            self.conv(inner, inner, kernel, stride)
            self.conv(inner, cout, 1)
        else:
            if kind == "fused_mbconv":
                self.conv(cin, inner, kernel, stride)
            else:
                if stage.expand != 1:
                    self.conv(cin, inner, 1)
                self.conv(inner, inner, kernel, stride, groups=inner)
            self.squeeze_excite(inner, block.squeezed)
            self.conv(inner, cout, 1)
        if block.shortcut == "projection":
            self.conv(cin, cout, 1, stride, at=before)

    def squeeze_excite(self, channels: int, squeezed: int) -> None:
        if squeezed:
            self.linear(channels, squeezed)
            self.linear(squeezed, channels)


def cost(
    arch: Arch,
    num_classes: int = 1000,
    in_channels: int = 3,
    *,
    batch: int = 1,
    resolution: int | tuple[int, int] | None = None,
    bytes_per_value: int = 4,
) -> Cost:
    """The cost of `build(arch, num_classes, in_channels)` at `resolution` (height, width; the Arch's own unless given).

    `batch` and `bytes_per_value` (4: float32) matter to `memory` alone. Raises ValueError where one of
    them is below 1, or num_classes below 0.
    """
    if num_classes < 0:
        raise ValueError(f"cost: expected num_classes >= 0, found {num_classes}")
    size = (resolution, resolution) if isinstance(resolution, int) else resolution or (arch.resolution, arch.resolution)
    for name, value in (("in_channels", in_channels), ("batch", batch), ("resolution", min(size)), ("bytes_per_value", bytes_per_value)):
        if value < 1:
            raise ValueError(f"cost: expected {name} >= 1, found {value}")
    return _cost(arch, num_classes, in_channels, batch, size, bytes_per_value)


@lru_cache(maxsize=4096)
def _cost(arch: Arch, num_classes: int, in_channels: int, batch: int, size: tuple[int, int], bytes_per_value: int) -> Cost:
    rows = [_stem_row(arch, in_channels, size)]
    size = _after_stem(arch, size)
    blocks = arch.distinct_blocks()
    for i, stage in enumerate(arch.stages):
        row, size = _stage_row(stage, [b for b in blocks if b[0].stage_index == i], size)
        rows.append(row)
    rows.append(_head_row(arch, num_classes, size))
    request = (arch, num_classes, in_channels, batch, rows[0].resolution, bytes_per_value)
    return Cost(sum(r.params for r in rows), sum(r.macs for r in rows), sum(r.activations for r in rows), tuple(rows), request)


def _stem_row(arch: Arch, in_channels: int, size: tuple[int, int]) -> StageCost:
    stem, count = arch.stem, _Count(size)
    count.conv(in_channels, stem.channels, stem.kernel, stem.stride)
    name = f"Conv, k{stem.kernel}x{stem.kernel}" + (" & MaxPool" if stem.pool else "")
    return StageCost(name, size, stem.channels, 1, count.params, count.macs, count.activations)


def _after_stem(arch: Arch, size: tuple[int, int]) -> tuple[int, int]:
    stride = arch.stem.stride
    height, width = -(-size[0] // stride), -(-size[1] // stride)
    return (-(-height // 2), -(-width // 2)) if arch.stem.pool else (height, width)


def _stage_row(stage: Stage, blocks: list[tuple[Block, int]], size: tuple[int, int]) -> tuple[StageCost, tuple[int, int]]:
    params = macs = activations = 0
    after = size
    for block, times in blocks:
        count = _Count(after)
        count.block(block)
        params, macs = params + times * count.params, macs + times * count.macs
        activations += times * count.activations
        after = count.height, count.width
    return StageCost(stage.operator, size, stage.channels, stage.layers, params, macs, activations), after


def _head_row(arch: Arch, num_classes: int, size: tuple[int, int]) -> StageCost:
    count = _Count(size)
    if arch.head.channels:
        count.conv(arch.stages[-1].channels, arch.head.channels, 1)
    if num_classes:
        count.linear(arch.out_channels, num_classes)
    name = "Conv 1x1 & Pooling & FC" if arch.head.channels else "Pooling & FC"
    return StageCost(name, size, arch.out_channels, 1, count.params, count.macs, count.activations)


def table(arch: Arch, num_classes: int = 1000, in_channels: int = 3) -> str:
    """The paper's Table 1 for this network, with the parameters and MACs of each stage. MACs are multiply-adds."""
    c = cost(arch, num_classes, in_channels)
    header = ("Stage", "Operator", "Resolution", "#Channels", "#Layers", "Params", "MACs")
    rows = [
        (f"{i}", r.operator, f"{r.resolution[0]} x {r.resolution[1]}", f"{r.channels}", f"{r.layers}", f"{r.params:,}", f"{r.macs:,}")
        for i, r in enumerate(c.per_stage, 1)
    ]
    rows.append(("", "total", "", "", f"{sum(r.layers for r in c.per_stage)}", f"{c.params:,}", f"{c.macs:,}"))
    title = f"{arch.name or 'network'}: {arch.resolution} px, dropout {arch.dropout:g}, {num_classes} classes; MACs are multiply-adds"
    return f"{title}\n{aligned(header, rows, left=(1,), total=True)}"
