"""Bytes, multiply-adds and predicted time of each kernel launch of an MBConv network, by arithmetic on its Arch: no torch, no GPU.

The launches are those of `triscale.kernels`: batch norm and activation in each, squeeze pooling with the depthwise convolution,
its gate with the projection. A launch moves its inputs and outputs once. Weights are read once a batch, 0.2 % of B0's bytes at
batch 256, and aren't counted, but for the squeeze's: each of its programs, one an image, reads them from the second-level cache.
The classifier counts as a launch alone. All counts are for one image.

Constants are an H200's: copy bandwidth and matrix rate as measured on such a chip (docs/gpu.md says what for), CACHE and LAUNCH
assumed, the rest by its data sheet.
"""

from dataclasses import dataclass
from typing import NamedTuple

from triscale.architecture import Arch

BYTES = 2  # of a bf16 or fp16 element
BANDWIDTH = 4.3e12  # bytes/s, device-to-device copy, reads and writes counted
MATRIX = 790e12  # FLOP/s, bf16 product of 8192 x 8192 matrices
VECTOR = 33.5e12  # FLOP/s in fp32 outside the matrix units: half of 67e12, for conversions and addresses
ISSUED = 132 * 4 * 32 * 1.755e9  # thread instructions/s: multiprocessors, schedulers, lanes, clock
CACHE = 5.5e12  # bytes/s read from the second-level cache: what others' microbenchmarks of an H100 find
LAUNCH = 1.5e-6  # seconds from one kernel of a CUDA graph to the next, beyond what they take
AROUND = 6  # launches about the kernels: the images' copy, the head's sum and division, the classifier, the logits' copy and rounding
SHARE = 0.70  # of each rate that a prediction counts on


class Rates(NamedTuple):
    """Of a device, as measured: bytes/s of a copy, FLOP/s of a bf16 product."""

    bandwidth: float = BANDWIDTH
    matrix: float = MATRIX


H200 = Rates()


@dataclass(frozen=True)
class Step:
    """One launch on one image. place: "stem", "head", or the paper's stage number, .1 its first block, .2 each of the rest.

    times: how many such launches the network has. source, out: (height, width, channels). maps: bytes of feature maps.
    vectors: bytes of fp32 sums and gates, one value a channel; the depthwise kernel's partial sums taken as one part.
    cached: bytes of fp32 weights that each image reads from the second-level cache.
    matrix, vector: multiply-adds in matrix units and outside. squeezed: channels inside squeeze-excitation.
    """

    place: str
    kind: str
    times: int
    source: tuple[int, int, int]
    out: tuple[int, int, int]
    maps: int
    vectors: int = 0
    cached: int = 0
    matrix: int = 0
    vector: int = 0
    kernel: int = 1
    stride: int = 1
    squeezed: int = 0
    residual: bool = False
    gated: bool = False

    @property
    def key(self):
        return self.kind if self.place == self.kind else f"{self.place} {self.kind}"

    @property
    def bytes(self):
        return self.maps + self.vectors

    @property
    def floor(self):
        """Seconds at full bandwidth and full rates: what no kernel that moves these feature maps beats."""
        return max(self.maps / BANDWIDTH, 2 * self.matrix / MATRIX, 2 * self.vector / VECTOR)

    def limits(self, instructions=None, rates=H200):
        """Predicted seconds by what limits them: bytes, cache, matrix units, and instructions where machine code was read.

        instructions: thread instructions an output.
        """
        found = {"bytes": self.bytes / rates.bandwidth, "cache": self.cached / CACHE, "matrix": 2 * self.matrix / rates.matrix}
        if instructions is not None:
            found["instructions"] = elements(self.out) * instructions / ISSUED
        return {limit: seconds / SHARE for limit, seconds in found.items()}


def elements(shape):
    height, width, channels = shape
    return height * width * channels


def steps(arch: Arch, size=None, pixel=BYTES):
    """The launches of the network on one image of `size` px, repeated blocks once. pixel: bytes of an image's value, 1 for uint8.

    Raises ValueError for other blocks than mbconv.
    """
    size, stem = size or arch.resolution, arch.stem
    source, here = (size, size, 3), (-(-size // stem.stride), -(-size // stem.stride), stem.channels)
    if stem.pool or not arch.head.channels:
        raise ValueError(f"{arch.name}: expected a stem without pooling and a head, as EfficientNet has")
    maps = pixel * elements(source) + BYTES * elements(here)
    out = [Step("stem", "stem", 1, source, here, maps, matrix=elements(here) * stem.kernel**2 * 3, kernel=stem.kernel, stride=stem.stride)]
    for block, times in arch.distinct_blocks():
        if block.stage.block != "mbconv":
            raise ValueError(f"{arch.name}: expected mbconv blocks, found {block.stage.block}")
        place = f"{block.stage_index + 2}.{min(block.layer, 1) + 1}"
        made = list(_block(place, times, block, here))
        out += made
        here = made[-1].out
    head = (*here[:2], arch.head.channels)
    return [*out, Step("head", "head", 1, here, head, BYTES * elements(here), vectors=4 * head[2], matrix=elements(head) * here[2])]


def _block(place, times, block, here):
    stage, inner = block.stage, block.inner
    wide = (*here[:2], inner)
    if stage.expand != 1:
        yield Step(place, "expand", times, here, wide, BYTES * (elements(here) + elements(wide)), matrix=elements(wide) * here[2])
    deep = (-(-here[0] // block.stride), -(-here[1] // block.stride), inner)
    sums = 4 * inner if block.squeezed else 0
    yield Step(
        place, "depthwise", times, wide, deep, BYTES * (elements(wide) + elements(deep)), sums,
        vector=elements(deep) * stage.kernel**2, kernel=stage.kernel, stride=block.stride, squeezed=block.squeezed,
    )  # fmt: skip
    if block.squeezed:
        vector = 2 * inner * block.squeezed
        cached = 4 * vector
        yield Step(place, "squeeze", times, (1, 1, inner), (1, 1, inner), 0, 2 * sums, cached, vector=vector, squeezed=block.squeezed)
    last, joined = (*deep[:2], stage.channels), block.shortcut == "identity"
    maps = BYTES * (elements(deep) + elements(last) * (2 if joined else 1))
    matrix = elements(last) * inner
    yield Step(place, "project", times, deep, last, maps, sums, matrix=matrix, residual=joined, gated=bool(block.squeezed))


def total(found, value):
    """The sum of `value(step)` over all launches."""
    return sum(step.times * value(step) for step in found)


def bound(found):
    """Images/s at full rates, each launch at its own limit; feature maps alone counted, so without the squeeze, which moves none."""
    return 1 / total([step for step in found if step.maps], lambda step: step.floor)


def predicted(step, code, rates=H200):
    """(seconds, what limits them). code: thread instructions an output, by `code_key`."""
    found = step.limits(code.get(code_key(step)), rates)
    limit = max(found, key=found.get)
    return found[limit], limit


def launches(found):
    """All of one batch, those about the kernels included."""
    return AROUND + total(found, lambda step: 1)


def rate(found, code, batch, rates=H200):
    """Images/s predicted of a CUDA graph of the network on `batch` images."""
    return batch / (batch * total(found, lambda step: predicted(step, code, rates)[0]) + launches(found) * LAUNCH)


def largest_batch(found):
    """A power of two: beyond it the largest feature map has more than 2^31 elements."""
    return 1 << ((1 << 31) // max(elements(step.out) for step in found)).bit_length() - 1


def code_key(step):
    """Which compilation a step runs, as far as its machine code differs: "depthwise 3x3 s1"."""
    return f"{step.kind} {step.kernel}x{step.kernel} s{step.stride}"
