"""How a depthwise convolution is cut into lanes and tiles: the choices, and an estimate of what each costs.

The estimate counts instructions (read from the machine code for sm_90), registers and bytes for an H100 or H200. It orders
the choices well enough to start with; measuring the first few on the device settles it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

Pad = tuple[int, int, int, int]  # top, bottom, left, right

# H200 (H100: the same but for 3.35 TB/s): multiprocessors, their schedulers, their registers, and bytes a cycle at 4.3 TB/s, 1.755 GHz.
PROCESSORS, SCHEDULERS, REGISTERS, BYTES_PER_CYCLE = 132, 4, 65536, 2450
L2_BYTES_PER_CYCLE = 3100  # 5.5 TB/s
LATENCY = 800  # cycles from a load that misses every cache to its use
SUMS_PER_CYCLE, SUMS_AT_ONCE = 64, 32768  # bytes of sums that one program of the squeeze kernel reads: each cycle, and before it waits
MOST_REGISTERS = 200  # of a lane, estimated: up to 30 too low, and there are 255


@dataclass(frozen=True)
class Shape:
    """One depthwise convolution: `images` of height x width x channels, size x size taps."""

    images: int
    height: int
    width: int
    channels: int
    size: int
    stride: int
    pad: Pad

    @property
    def out_height(self) -> int:
        return (self.height + self.pad[0] + self.pad[1] - self.size) // self.stride + 1

    @property
    def out_width(self) -> int:
        return (self.width + self.pad[2] + self.pad[3] - self.size) // self.stride + 1

    @property
    def older(self) -> int:
        """Output rows that are open beside the newest while input rows come in."""
        return (self.size - 1) // self.stride


@dataclass(frozen=True, order=True)
class DepthwiseConfig:
    """strip: output columns of a lane. rows: output rows of a tile. vector: adjacent channels of a lane. warps: of a program."""

    strip: int
    rows: int
    vector: int
    warps: int


def tiles(shape: Shape, config: DepthwiseConfig) -> tuple[int, int]:
    """Tiles down and strips across one image."""
    return -(-shape.out_height // config.rows), -(-shape.out_width // config.strip)


def columns(shape: Shape, config: DepthwiseConfig) -> int:
    """Input columns that one strip reads."""
    return (config.strip - 1) * shape.stride + shape.size


def registers(shape: Shape, config: DepthwiseConfig) -> int:
    """Of a lane, estimated: taps, open output rows, the input rows in use (fp32) and ahead (16 bits), addresses."""
    read = shape.stride * columns(shape, config)
    return config.vector * (shape.size**2 + (shape.older + 1) * config.strip + read) + -(-config.vector // 2) * read + 30


def traffic(shape: Shape, config: DepthwiseConfig, pool: bool) -> tuple[float, float]:
    """Bytes from and to memory, and the second-level cache: there, rows and columns that two programs need count twice."""
    down, across = tiles(shape, config)
    read = 2 * shape.images * shape.channels * shape.height * shape.width
    written = shape.images * shape.channels * (2 * shape.out_height * shape.out_width + 4 * pool * down * across)
    shared = shape.size - shape.stride
    wide = config.strip * shape.stride * min(max(32 * config.vector * config.warps // shape.channels, 1), across)
    tall = config.rows * shape.stride
    return read + written, read * (1 + max(shared, 0) / wide) * (1 + max(shared, 0) * (down > 1) / tall) + written


def squeezing(shape: Shape, config: DepthwiseConfig) -> float:
    """Cycles that the squeeze kernel takes to read the partial sums: one program an image, however many parts there are."""
    size = 4 * math.prod(tiles(shape, config)) * shape.channels
    return -(-shape.images // PROCESSORS) * (size / SUMS_PER_CYCLE + -(-size // SUMS_AT_ONCE) * LATENCY)


def cycles(shape: Shape, config: DepthwiseConfig, pool: bool = False) -> float:
    """The time estimated: the largest of issuing, waiting and moving bytes, and a fifth of each; with `pool`, `squeezing` as well.

    More where lanes are narrow, which takes more requests for the same bytes, or large, which leaves fewer to hide a wait.
    """
    down, across = tiles(shape, config)
    warps = math.ceil(shape.images * across * shape.channels / (32 * config.vector * config.warps)) * config.warps * down
    read = shape.stride * columns(shape, config)
    step = read * (1.2 * config.vector + 2.2) + config.strip * (config.vector * (shape.size**2 + 4) + 2) + 35
    steps = min(config.rows + shape.older, -(-shape.height // shape.stride))
    start = 150 + shape.size**2 * (config.vector + 2)
    programs = min(REGISTERS // (-(-registers(shape, config) // 8) * 8 * 32 * config.warps), 64 // config.warps, 32)
    waves = math.ceil(warps / (PROCESSORS * programs * config.warps))
    issuing = math.ceil(warps / (PROCESSORS * SCHEDULERS)) * (start + steps * step)
    waiting = waves * (2 + steps) * max(LATENCY, step)
    memory, cache = traffic(shape, config, pool)
    moving = max(memory / BYTES_PER_CYCLE, cache / L2_BYTES_PER_CYCLE)
    estimate = max(issuing, waiting, moving) + 0.2 * (issuing + waiting + moving)
    return estimate * (1 + 0.1 / config.vector) * (1 + registers(shape, config) / 2000) + (squeezing(shape, config) if pool else 0)


@lru_cache(maxsize=4096)
def configs(shape: Shape, most: int = 12, *, pool: bool = False) -> tuple[DepthwiseConfig, ...]:
    """The configurations worth trying, the best by estimate first; at least one for every shape.

    Of each strip and vector only the best two heights are among them: the estimate is better on rows and warps than on those.
    With `pool`, none leaves the squeeze much more than the first does: who measures this kernel alone wouldn't see that.
    """
    strips = [s for s in (1, 2, 3, 4, 5, 6, 7, 8, 10, 14) if s <= shape.out_width]
    rows = sorted({-(-shape.out_height // n) for n in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128)})
    vectors = [v for v in (1, 2, 4) if shape.channels % v == 0]

    def estimate(c: DepthwiseConfig) -> tuple[float, DepthwiseConfig]:
        return cycles(shape, c, pool), c

    chosen = []
    for strip, vector in product(strips, vectors):
        if registers(shape, DepthwiseConfig(strip, 1, vector, 1)) <= MOST_REGISTERS or strip == vector == 1:
            each = [min((DepthwiseConfig(strip, r, vector, warps) for warps in (4, 2, 8)), key=estimate) for r in rows]
            chosen += sorted(each, key=estimate)[:2]
    first = min(chosen, key=estimate)
    if pool:
        bound = squeezing(shape, first) + 0.1 * cycles(shape, first, pool)
        chosen = [c for c in chosen if squeezing(shape, c) <= bound]
    return tuple(sorted(chosen, key=estimate)[:most])
