"""Runs steps. `Torch` computes each in plain torch, in any dtype; the engines override what they do faster.

Between the steps tensors are (N, C, H, W), channels-last.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from triscale.inference.steps import (
    Act,
    Classifier,
    Convolution,
    Depthwise,
    Expand,
    ExpandDepthwise,
    Head,
    Keep,
    MaxPool,
    Pad,
    Plain,
    Project,
    Squeeze,
    Stem,
    Step,
)


class Torch:
    """Each step in plain torch, in the dtype of x."""

    def stem(self, step: Stem, x: Tensor) -> Tensor:
        return self._convolve(x, step.weight.permute(3, 2, 0, 1), step)

    def max_pool(self, step: MaxPool, x: Tensor) -> Tensor:
        pad = step.window.pad(x.shape[2], x.shape[3])
        return F.max_pool2d(padded(x, pad, float("-inf")), step.window.kernel, step.window.stride)

    def convolution(self, step: Convolution, x: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """y, and where the step pools the sums (N, 1, C) of y over all places."""
        if step.residual == "none" or kept is None:
            y = self._convolve(x, step.weight, step)
        elif step.residual == "before":
            y = activate(self._convolve(x, step.weight, step, act="none").add_(kept), step.act)
        else:
            y = self._convolve(x, step.weight, step).add_(kept)
        return y, _sums(y) if step.pool else None

    def expand(self, step: Expand, x: Tensor) -> Tensor:
        return self.pointwise(x, step, None, None)

    def depthwise(self, step: Depthwise, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """As `convolution`."""
        y = self._convolve(x, step.weight.permute(2, 0, 1).unsqueeze(1), step, groups=x.shape[1])
        return y, _sums(y) if step.pool else None

    def expand_depthwise(self, step: ExpandDepthwise, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.depthwise(step.depthwise, self.expand(step.expand, x))

    def squeeze(self, step: Squeeze, sums: Tensor, places: int) -> Tensor:
        """The gate (N, C) from partial sums (N, T, C) over `places` places."""
        mean = sums.sum(1) / places
        return F.linear(activate(F.linear(mean, step.w1, step.b1), step.act), step.w2, step.b2).sigmoid_()

    def project(self, step: Project, x: Tensor, gate: Tensor | None, kept: Tensor | None) -> Tensor:
        return self.pointwise(x, step, gate if step.gated else None, kept if step.residual else None)

    def head(self, step: Head, x: Tensor) -> Tensor:
        """The means (N, C)."""
        return (x if step.weight is None else self.pointwise(x, step, None, None)).mean((2, 3))

    def classifier(self, step: Classifier, x: Tensor) -> Tensor:
        return F.linear(x.to(step.weight.dtype), step.weight, step.bias)

    def plain(self, step: Plain, x: Tensor) -> Tensor:
        weight = next(step.module.parameters(), x)
        return cast(Tensor, step.module(x.to(weight.dtype)))

    def pointwise(self, x: Tensor, step: Expand | Project | Head, gate: Tensor | None, residual: Tensor | None) -> Tensor:
        assert step.weight is not None
        if gate is not None:
            x = x.mul_(gate[:, :, None, None])  # the depthwise convolution's own output: nothing else reads it
        bias = None if step.bias is None else step.bias.to(x.dtype)
        y = F.linear(x.permute(0, 2, 3, 1), step.weight.T, bias).permute(0, 3, 1, 2)
        return activate(y if residual is None else y.add_(residual), step.act)

    def _convolve(self, x: Tensor, weight: Tensor, step: Stem | Convolution | Depthwise, *, groups: int = 1, act: Act | None = None) -> Tensor:
        pad = step.window.pad(x.shape[2], x.shape[3])
        inside = (pad[0], pad[2]) if pad[0] == pad[1] and pad[2] == pad[3] else (0, 0)
        x = x if any(inside) else padded(x, pad)
        return activate(F.conv2d(x, weight.to(x.dtype), step.bias.to(x.dtype), step.window.stride, inside, 1, groups), act or step.act)


def _sums(y: Tensor) -> Tensor:
    """(N, 1, C) over all places, in fp32 at least."""
    return y.sum((2, 3), dtype=torch.promote_types(y.dtype, torch.float32))[:, None]


def padded(x: Tensor, pad: Pad, value: float = 0.0) -> Tensor:
    top, bottom, left, right = pad
    return F.pad(x, (left, right, top, bottom), value=value) if any(pad) else x


def activate(x: Tensor, act: Act) -> Tensor:
    """In place."""
    if act == "none":
        return x
    return {"silu": F.silu, "relu": F.relu, "relu6": F.relu6}[act](x, inplace=True)


def execute(engine: Torch, steps: Sequence[Step], x: Tensor) -> Tensor:
    """x: (N, C, H, W) in the steps' dtype. Returns logits (N, classes), or what Head gives where there is no Classifier. No autograd."""
    kept: Tensor | None = None
    sums: Tensor | None = None
    gate: Tensor | None = None
    for step in steps:
        match step:
            case Keep():
                kept = x if step.shortcut is None else engine.convolution(step.shortcut, x, None)[0]
            case Expand():
                x = engine.expand(step, x)
            case Depthwise():
                x, sums = engine.depthwise(step, x)
            case ExpandDepthwise():
                x, sums = engine.expand_depthwise(step, x)
            case Squeeze():
                assert sums is not None, "a Squeeze comes after a step that pools"
                gate = engine.squeeze(step, sums, x.shape[2] * x.shape[3])
            case Project():
                x = engine.project(step, x, gate, kept)
            case Convolution():
                x, sums = engine.convolution(step, x, kept)
            case Stem():
                x = engine.stem(step, x)
            case MaxPool():
                x = engine.max_pool(step, x)
            case Head():
                x = engine.head(step, x)
            case Classifier():
                x = engine.classifier(step, x)
            case Plain():
                x = engine.plain(step, x)
    return x
