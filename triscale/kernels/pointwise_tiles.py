"""How a 1x1 convolution's matrix product is cut into tiles: the choices, and an order among them where none was measured."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import product

from triscale.kernels.machine import SHARED

MULTIPROCESSORS = 132  # of an H100 or H200


@dataclass(frozen=True)
class PointwiseConfig:
    """Tiles of block_m rows and block_o output channels, block_k input channels a step; warps and copies in flight (stages).

    tail_k: block_k + tail_k >= cin, and a program holds its rows of x while `span` tiles of output channels take them in turn.
    by_image: a tile ends where its image ends, and one gate serves all its rows; else each row loads its own.
    """

    block_m: int
    block_o: int
    block_k: int
    tail_k: int = 0
    span: int = 1
    by_image: bool = False
    warps: int = 4
    stages: int = 3

    @property
    def held(self) -> bool:
        return self.span > 1 or self.tail_k > 0

    def shared(self, gated: bool) -> int:
        """Bytes of shared memory, from above: `stages` copies of the weights, of x unless held, of gates by row; y on its way out.

        y takes the place of what was loaded, except where the next tile's weights are on their way already.
        """
        k = self.block_k + self.tail_k
        x = 2 * self.block_m * k * (3 if gated and not self.by_image else 1)
        loaded = x * (1 if self.held else self.stages) + 2 * self.stages * k * self.block_o
        y = 2 * self.block_m * self.block_o
        return 2048 + (loaded + y if self.held else max(loaded, y))


def blocks(n: int, block: int) -> int:
    """Blocks that n fills, the last one perhaps in part."""
    return -(-n // block)


def _power(n: int) -> int:
    """The smallest power of two from n, and from 16, a tensor core's smallest."""
    return max(16, 1 << (n - 1).bit_length())


def halves(channels: int) -> tuple[int, int]:
    """block_k and tail_k that hold all of cin with the least padding: 80 = 64 + 16, 144 = 128 + 16, 24 in 32 + 0."""
    block = max(16, _power(channels + 1) // 2)
    tail = _power(channels - block) if channels > block else 0
    return (block + tail, 0) if tail == block else (block, tail)


def clocks(c: PointwiseConfig, rows: int, places: int, cin: int, cout: int, gated: bool) -> float:
    """Estimated clocks of a Hopper GPU without HBM, whose bytes are the same for all: counts, not measurements.

    Per program: products at 70 % of a tensor core's 2048 a clock (at half of that below 64 rows, which has no warp-group
    products; as if of 32 columns at least, which the rows' way from shared memory takes); L2 at 32 bytes a clock (gates by
    row, 4 bytes each, come from there too); instructions at 128 a clock, 8 an output (SiLU's tanh, at 16 a clock, takes as
    long; 4 where x is gated, which has no activation), 8 a gated input (12 with gates by row), 100 a step and thread; 700
    clocks for a load's way.
    """
    steps = c.span * (1 if c.held else blocks(cin, c.block_k))
    k = c.block_k + c.tail_k if c.held else blocks(cin, c.block_k) * c.block_k
    tiles = rows // places * blocks(places, c.block_m) if c.by_image else blocks(rows, c.block_m)
    width = min(cout, c.block_o * c.span)
    products = c.block_m * max(c.block_o, 32) * c.span * k / (1434 if c.block_m >= 64 else 717)
    by_row = gated and not c.by_image
    moved = ((6 if by_row else 2) * cin * c.block_m * (1 if c.held else c.span) + 2 * width * (cin + c.block_m)) / 32
    issued = c.block_m * c.span * ((4 if gated else 8) * c.block_o + gated * (12 if by_row else 8) * k) / 128 + 25 * c.warps * steps
    registers = c.block_m * c.block_o // (32 * c.warps) + 64
    resident = max(1, min(16, SHARED // c.shared(gated), 65536 // (32 * c.warps * registers)))
    work = max(products, moved) + issued if resident == 1 else max(products, moved, issued)
    each = blocks(tiles * blocks(cout, c.span * c.block_o), MULTIPROCESSORS)
    return max(each * work, blocks(each, resident) * (work + 700 * (1 + steps / c.stages)))


def spills(c: PointwiseConfig, cin: int, *, gated: bool, residual: bool) -> bool:
    """Whether a thread's 255 registers don't suffice for it on sm_90, as compiled by Triton 3.6 and 3.9.

    Gates and residuals come on top of the outputs; and gates by row come with as many addresses as x has, where channels that
    are odd or no multiple of 8 make loads narrow: each takes registers of its own. With a single gate an image that is so for odd
    channels alone.
    """
    outputs, loaded = (c.block_m * side // (32 * c.warps) for side in (c.block_o, c.block_k))
    if (gated or residual) and c.block_m * c.block_o > 128 * 128:
        return True
    if not gated or cin % 8 == 0:
        return False
    if c.by_image:
        return cin % 2 == 1 and outputs >= 32
    return loaded > 32 or (cin % 2 == 1 and (loaded > 16 or outputs > 32))


@lru_cache(maxsize=1024)
def configs(
    rows: int,
    places: int,
    cin: int,
    cout: int,
    *,
    gated: bool = False,
    residual: bool = False,
    pool: bool = False,
    shared: int = SHARED,
) -> tuple[PointwiseConfig, ...]:
    """At most twelve ways to cut rows x cin x cout, the likely fastest first; no two of one tile and loop.

    places: rows of one image. pool: tiles by image only. shared: bytes that a program may have on this GPU.
    """
    best: dict[object, tuple[float, str, PointwiseConfig]] = {}
    for by_image, block_m, block_o in product({pool or gated, pool}, (128, 64, 32, 16), (256, 128, 64, 32, 16)):
        if block_o > _power(cout) or block_m > _power(places if by_image else rows):
            continue
        warps = 8 if block_m * block_o > 128 * 64 else 4
        found = [PointwiseConfig(block_m, block_o, min(k, _power(cin)), 0, 1, by_image, warps, stages) for k, stages in product((64, 32), (3, 4))]
        parts = blocks(cout, block_o)
        if cin <= 256 and not gated:  # gated rows pass through registers, which hold too few
            spans = {blocks(parts, 2**i) for i in range(parts.bit_length())}
            found += [PointwiseConfig(block_m, block_o, *halves(cin), span, by_image, warps, 2) for span in spans]
        for c in found:
            tile = block_m, block_o, by_image, c.held
            if c.shared(gated) <= shared and not spills(c, cin, gated=gated, residual=residual):
                best[tile] = min(best.get(tile, (float("inf"), "", c)), (clocks(c, rows, places, cin, cout, gated), str(c), c))
    return tuple(c for *_, c in sorted(best.values(), key=lambda found: found[:2])[:12])
