"""What the eager modules allocate and free, call by call: the engine of memory_model.

Tensors are storages with reference counts. A frame that holds one, autograd that saves one, a gradient that waits for the
other branch: each is a reference, dropped when the real one is. The operators below mirror blocks.py.
"""

from __future__ import annotations

from collections.abc import Callable

from triscale.architecture import Block, Numerics, Stem


class Value:
    """A tensor: its storage as [elements, references], the (channels, height, width) of one sample, a gradient on its way."""

    __slots__ = ("grad", "needs_grad", "shape", "size", "storage")

    def __init__(self, storage: list[int], shape: tuple[int, int, int], size: int, needs_grad: bool = True) -> None:
        self.storage, self.shape, self.size, self.needs_grad = storage, shape, size, needs_grad
        self.grad: list[int] | None = None


class Replay:
    """The elements alive and their peak, through a forward pass and then its backward."""

    def __init__(self, batch: int, numerics: Numerics, training: bool) -> None:
        self.batch, self.training = batch, training
        self.follow(numerics)
        self.live = self.peak = 0
        self.nodes: list[Callable[[], None]] = []

    def follow(self, numerics: Numerics) -> None:
        """From here on the modules have these."""
        self.same, self.in_place_act = numerics.padding == "same", numerics.activation == "relu"

    # Storages.
    def new(self, elements: int) -> list[int]:
        self.live += elements
        if self.live > self.peak:
            self.peak = self.live
        return [elements, 1]

    def drop(self, storage: list[int]) -> None:
        storage[1] -= 1
        if storage[1] == 0:
            self.live -= storage[0]

    def value(self, shape: tuple[int, int, int]) -> Value:
        size = self.batch * shape[0] * shape[1] * shape[2]
        return Value(self.new(size), shape, size)

    # Autograd.
    def node(self, out: Value, inputs: list[tuple[Value, bool]], saved: list[list[int]], weights: int = 0, temporary: int = 0) -> None:
        """An operator that autograd records. inputs: (value, whether its gradient is `out`'s own storage)."""
        if not self.training:
            return
        for storage in saved:
            storage[1] += 1

        def backward() -> None:
            grad, out.grad = out.grad, None
            if grad is None:  # the padded copy of an input batch: it needs no gradient
                return
            for value, passes in inputs:
                if not value.needs_grad:
                    continue
                if passes:
                    grad[1] += 1
                    mine = grad
                else:
                    mine = self.new(value.size)
                if value.grad is None:
                    value.grad = mine
                else:  # the engine adds in place into whichever of the two nobody else holds
                    self.drop(mine)
            if temporary:
                self.drop(self.new(temporary))
            if weights:
                self.new(weights)
            self.drop(grad)
            for storage in saved:
                self.drop(storage)

        self.nodes.append(backward)

    def backward(self) -> None:
        for node in reversed(self.nodes):
            node()

    # Operators. The caller owns what it passes in; what comes back is one reference more.
    def conv(self, x: Value, cout: int, kernel: int, stride: int, depthwise: bool = False) -> Value:
        """The convolution of a ConvNormAct: in inference it runs with weights folded for the call."""
        weights = cout * kernel * kernel * (1 if depthwise else x.shape[0])
        folded = None if self.training else self.new(weights + 2 * cout)
        y = self.convolve(x, cout, kernel, stride, weights)
        if folded:
            self.drop(folded)
        return y

    def convolve(self, x: Value, cout: int, kernel: int, stride: int, weights: int, *, shared: bool = False) -> Value:
        """weights: with the bias. shared: a later call makes their gradient first, and this one's is added to it in place."""
        channels, height, width = x.shape
        out_h, out_w = -(-height // stride), -(-width // stride)
        padded = x
        if self.same and stride > 1 and kernel > 1:
            shape = (channels, max((out_h - 1) * stride + kernel, height), max((out_w - 1) * stride + kernel, width))
            if shape != x.shape:
                padded = self.value(shape)
                padded.needs_grad = x.needs_grad
                self.node(padded, [(x, False)], [])
        y = self.value((cout, out_h, out_w))
        self.node(y, [(padded, False)], [padded.storage], *((0, weights) if shared else (weights, 0)))
        if padded is not x:
            self.drop(padded.storage)
        return y

    def norm(self, x: Value) -> Value:
        """Takes x over."""
        y = self.value(x.shape)
        self.node(y, [(x, False)], [x.storage], 2 * x.shape[0])
        self.drop(x.storage)
        return y

    def act(self, x: Value) -> Value:
        """Takes x over. SiLU and ReLU6 save their input, ReLU works in place and saves its result; in inference all do."""
        if self.in_place_act or not self.training:
            out = Value(x.storage, x.shape, x.size)
            self.node(out, [(x, False)], [x.storage])
            return out
        out = self.value(x.shape)
        self.node(out, [(x, False)], [x.storage])
        self.drop(x.storage)
        return out

    def conv_norm_act(self, x: Value, cout: int, kernel: int = 1, stride: int = 1, *, act: bool = True, depthwise: bool = False) -> Value:
        y = self.conv(x, cout, kernel, stride, depthwise)
        if self.training:
            y = self.norm(y)
        return self.act(y) if act else y

    def squeeze_excite(self, x: Value, squeezed: int) -> Value:
        """Takes x over. The gate's own tensors (N, C) count once each; its gradient meets x's before x's producer."""
        if not squeezed:
            return x
        if not self.training:
            self.drop(self.new(3 * self.batch * x.shape[0]))
            return x
        gate = self.value((x.shape[0] * 3 + 2 * squeezed, 1, 1))  # mean, expansion, sigmoid and the two squeezed ones
        weights = 2 * x.shape[0] * squeezed + squeezed + x.shape[0]
        self.node(gate, [(x, False)], [gate.storage], weights)  # the mean's backward spreads its gradient over a whole map
        out = self.value(x.shape)
        self.node(out, [(x, False), (gate, False)], [x.storage], temporary=x.size)  # gradient x map, summed to the gate's
        self.drop(gate.storage)
        self.drop(x.storage)
        return out

    def join(self, branch: Value, shortcut: Value, rate: float) -> Value:
        """branch.mul_(mask).add_(shortcut), in place; the shortcut's gradient is the sum's own."""
        if rate and self.training:
            masked = Value(branch.storage, branch.shape, branch.size)
            self.node(masked, [(branch, False)], [])
            branch = masked
        out = Value(branch.storage, branch.shape, branch.size)
        self.node(out, [(branch, True), (shortcut, True)], [])
        return out

    def pool(self, x: Value, stride: int, channels: int) -> Value:
        """PoolShortcut: average pooling saves its input; the channel padding makes another copy."""
        out = x
        if stride > 1:
            out = self.value((x.shape[0], -(-x.shape[1] // stride), -(-x.shape[2] // stride)))
            self.node(out, [(x, False)], [x.storage])
        if channels > x.shape[0]:
            wide = self.value((channels, *out.shape[1:]))
            self.node(wide, [(out, False)], [])
            if out is not x:
                self.drop(out.storage)
            out = wide
        if out is x:
            x.storage[1] += 1
        return out

    def stem(self, stem: Stem, x: Value) -> tuple[Value, Value | None]:
        """(its map, the pooled map or None)."""
        y = self.conv_norm_act(x, stem.channels, stem.kernel, stem.stride)
        return y, self.stem_pool(y) if stem.pool else None

    def stem_pool(self, x: Value) -> Value:
        """3x3 stride-2 max pool: saves its input and int64 indices (two float32 a value). Does not take x over."""
        channels, height, width = x.shape
        out_h, out_w = -(-height // 2), -(-width // 2)
        padded = x
        if self.same:
            padded = self.value((channels, 2 * out_h + 1, 2 * out_w + 1))
            self.node(padded, [(x, False)], [])
        out = self.value((channels, out_h, out_w))
        indices = self.new(2 * out.size)
        self.node(out, [(padded, False)], [padded.storage, indices])
        self.drop(indices)
        if padded is not x:
            self.drop(padded.storage)
        return out

    def block(self, block: Block, x: Value) -> Value:
        """One block of blocks.py. The caller owns x."""
        y = self.branch(block, x)
        kind = block.shortcut
        conv_like = is_conv(block)
        if kind != "none":
            shortcut, mine = x, False
            if kind == "projection":
                shortcut, mine = self.conv_norm_act(x, block.stage.channels, 1, block.stride, act=False), True
            elif kind == "pool":
                shortcut, mine = self.pool(x, block.stride, block.stage.channels), True
            if conv_like:  # an activation ends the branch, so the sum is a tensor of its own
                total = self.value(y.shape)
                joined = self.join(y, shortcut, block.drop_path)
                out = Value(total.storage, total.shape, total.size)
                self.node(out, [(joined, True)], [])
                self.drop(y.storage)
                y = out
            else:
                y = self.join(y, shortcut, block.drop_path)
            if mine:
                self.drop(shortcut.storage)
        return self.act(y) if block.stage.block in ("separable", "basic", "bottleneck") else y

    def branch(self, block: Block, x: Value) -> Value:
        stage, inner, cout, kernel, stride = block.stage, block.inner, block.stage.channels, block.stage.kernel, block.stride
        if is_conv(block):
            return self.squeeze_excite(self.conv_norm_act(x, cout, kernel, stride), block.squeezed)
        if stage.block == "separable":
            return self.then(self.conv_norm_act(x, x.shape[0], kernel, stride, depthwise=True), cout, act=False)
        if stage.block == "basic":
            return self.then(self.conv_norm_act(x, inner, kernel, stride), cout, kernel, act=False)
        if stage.block == "bottleneck":
            y = self.then(self.conv_norm_act(x, inner), inner, kernel, stride)
        elif stage.block == "fused_mbconv":
            y = self.conv_norm_act(x, inner, kernel, stride)
        elif stage.expand != 1:
            y = self.then(self.conv_norm_act(x, inner), inner, kernel, stride, depthwise=True)
        else:
            y = self.conv_norm_act(x, inner, kernel, stride, depthwise=True)
        return self.then(self.squeeze_excite(y, block.squeezed), cout, act=False)

    def then(self, x: Value, cout: int, kernel: int = 1, stride: int = 1, *, act: bool = True, depthwise: bool = False) -> Value:
        """conv_norm_act that takes x over: the frame that made it is gone when the convolution returns."""
        y = self.conv_norm_act(x, cout, kernel, stride, act=act, depthwise=depthwise)
        self.drop(x.storage)
        return y


def is_conv(block: Block) -> bool:
    return block.stage.block == "conv" or (block.stage.block == "fused_mbconv" and block.stage.expand == 1)
