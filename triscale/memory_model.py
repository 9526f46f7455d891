"""Peak memory of a forward pass and of a training step, by replaying what the eager modules allocate and free.

The replay (replay.py) follows blocks.py call by call. Blocks that repeat are replayed once: each
changes what is alive by the same amount, so the peak is at the first or the last of them.

Counted: every tensor that the pass makes, i.e. activations, gradients of activations and of weights, padded and folded
copies. Not counted: workspaces inside one operator, and the allocator's rounding. Weights, optimiser state and the input
batch are separate fields. Held against the live storages of real runs in tests/test_memory.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from triscale.architecture import Arch, Block, Numerics
from triscale.replay import Replay, Value, is_conv


@dataclass(frozen=True)
class Memory:
    """Bytes. The peaks are the most that one pass has alive beside weights, input batch and optimiser state."""

    weights: int
    input: int
    inference_peak: int
    training_peak: int

    @property
    def inference(self) -> int:
        """All that inference needs: weights, input batch and the pass's own peak."""
        return self.weights + self.input + self.inference_peak

    def training(self, optimizer_slots: int = 2) -> int:
        """All that a training step needs; RMSProp with momentum and Adam keep 2 values a weight, SGD with momentum 1."""
        return self.weights * (1 + optimizer_slots) + self.input + self.training_peak


@dataclass(frozen=True)
class _Part:
    """What one part of the network does to the elements alive, against its start: the change and the peak, both ways."""

    forward: int
    forward_peak: int
    backward: int
    backward_peak: int
    out: tuple[int, int, int]


def _replay(
    run: Callable[[Replay, Value], Value], shape: tuple[int, int, int], batch: int, numerics: Numerics, mode: tuple[bool, bool, bool]
) -> _Part:
    """mode: (training, whether the producer keeps the input for itself, whether the input needs a gradient)."""
    training, kept, needs_grad = mode
    r = Replay(batch, numerics, training)
    x = r.value(shape)
    x.storage[1] += kept
    x.needs_grad = needs_grad
    start = r.peak = r.live
    out = run(r, x)
    r.drop(x.storage)
    forward, forward_peak = r.live - start, r.peak - start
    if not training:
        return _Part(forward, forward_peak, 0, 0, out.shape)
    r.drop(out.storage)  # by now the next part's backward has let go of it
    out.grad = r.new(out.size)
    start = r.peak = r.live
    r.backward()
    return _Part(forward, forward_peak, r.live - start, r.peak - start, out.shape)


@lru_cache(maxsize=4096)
def _block_part(block: Block, shape: tuple[int, int, int], batch: int, numerics: Numerics, training: bool, kept: bool) -> _Part:
    return _replay(lambda r, x: r.block(block, x), shape, batch, numerics, (training, kept, True))


def _parts(arch: Arch, num_classes: int, shape: tuple[int, int, int], batch: int, training: bool) -> list[tuple[_Part, int]]:
    """Stem, blocks with their number of repeats, head with the loss."""
    n, in_place = arch.numerics, training and arch.numerics.activation == "relu"

    def stem(r: Replay, x: Value) -> Value:
        y, pooled = r.stem(arch.stem, x)
        if pooled is None:
            return y
        r.drop(y.storage)
        return pooled

    def head(r: Replay, x: Value) -> Value:
        y = r.conv_norm_act(x, arch.head.channels) if arch.head.channels else x
        pooled = r.value((y.shape[0], 1, 1))
        r.node(pooled, [(y, False)], [])
        if y is not x:
            r.drop(y.storage)
        logits = r.value((max(num_classes, 1), 1, 1))
        r.node(logits, [(pooled, False)], [pooled.storage], (y.shape[0] + 1) * num_classes)
        r.drop(pooled.storage)
        return logits

    first = _replay(stem, shape, batch, n, (training, True, False))  # the batch is the caller's
    parts = [(first, 1)]
    kept = in_place and not arch.stem.pool
    for block, times in arch.distinct_blocks():
        part = _block_part(block, parts[-1][0].out, batch, n, training, kept)
        parts.append((part, times))
        ends_in_act = block.stage.block in ("separable", "basic", "bottleneck") or (is_conv(block) and block.shortcut == "none")
        kept = in_place and ends_in_act
    parts.append((_replay(head, parts[-1][0].out, batch, n, (training, kept, True)), 1))
    return parts


def _pass_peak(parts: list[tuple[_Part, int]], training: bool) -> int:
    live = peak = 0
    for part, times in parts:
        peak = max(peak, live + part.forward_peak, live + (times - 1) * part.forward + part.forward_peak)
        live += times * part.forward
    if training:
        for part, times in reversed(parts):
            peak = max(peak, live + part.backward_peak, live + (times - 1) * part.backward + part.backward_peak)
            live += times * part.backward
    return peak


def peak_memory(arch: Arch, num_classes: int, in_channels: int, batch: int, size: tuple[int, int], bytes_per_value: int, params: int) -> Memory:
    """The Memory of one network; cost_model.Cost.memory calls it. `params`: parameters without running statistics."""
    shape = (in_channels, *size)
    peaks = [_pass_peak(_parts(arch, num_classes, shape, batch, training), training) for training in (False, True)]
    inputs = batch * in_channels * size[0] * size[1]
    return Memory(params * bytes_per_value, inputs * bytes_per_value, peaks[0] * bytes_per_value, peaks[1] * bytes_per_value)
