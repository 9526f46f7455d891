"""The steps through oneDNN with weights packed once and activations fused: what torch.compile calls on a CPU, without a compiler.

The operators (torch.ops.mkldnn) are torch's own but not public: `available` says whether this torch has them, and what comes
out is held against the network itself before it is used (cpu.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from triscale.inference.executor import Torch, activate, padded
from triscale.inference.steps import Act, Convolution, Depthwise, Expand, ExpandDepthwise, Head, Pad, Project, Squeeze, Stem, Step

# What a pass over memory takes, in multiply-adds an element: 8 bytes at 25 GB/s, on a core that does 50 G multiply-adds a second.
PASS = 16
_OPERATORS = ("_convolution_pointwise", "_linear_pointwise", "_reorder_convolution_weight", "_reorder_linear_weight")
# torch's names of the activations that oneDNN fuses, with their numbers.
_FUSED: dict[Act, tuple[str, list[float]]] = {"none": ("none", []), "silu": ("swish", []), "relu": ("relu", []), "relu6": ("hardtanh", [0.0, 6.0])}


def available() -> bool:
    return torch._C._has_mkldnn and all(hasattr(torch.ops.mkldnn, name) for name in _OPERATORS)


class OneDNN(Torch):
    """fuse: 1x1 convolutions take their activation along, which spares a pass over memory; in float32 oneDNN's SiLU is no faster than torch's.

    Weights are packed when their step first runs, for its size then; other sizes run too. Several threads may call at once.
    """

    def __init__(self, *, fuse: bool) -> None:
        self.fuse = fuse
        self.packed: dict[Step, tuple[Tensor, Tensor]] = {}

    def stem(self, step: Stem, x: Tensor) -> Tensor:
        return self._conv(step, x, lambda: step.weight.permute(3, 2, 0, 1), step.act, step.window.pad(x.shape[2], x.shape[3]))

    def convolution(self, step: Convolution, x: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor | None]:
        before, after = step.residual == "before", step.residual == "after"
        pad = step.window.pad(x.shape[2], x.shape[3])
        y = self._conv(step, x, lambda: step.weight, "none" if before else step.act, pad)
        if kept is not None and (before or after):
            y = y.add_(kept)
        return activate(y, step.act) if before else y, _sums(y) if step.pool else None

    def expand_depthwise(self, step: ExpandDepthwise, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Asymmetric padding goes before the expansion, where it is a sixth as much; the border, act(bias) then, is cleared."""
        height, width = x.shape[2:]
        top, bottom, left, right = pad = step.depthwise.window.pad(height, width)
        extra = (height + top + bottom) * (width + left + right) / (height * width) - 1
        if (top, left) == (bottom, right) or extra * (x.shape[1] + PASS) > PASS:
            return super().expand_depthwise(step, x)
        y = self.expand(step.expand, padded(x, pad))
        for border in (y[:, :, :top], y[:, :, top + height :], y[..., :left], y[..., left + width :]):
            border.zero_()
        return self._depthwise(step.depthwise, y, (0, 0, 0, 0))

    def depthwise(self, step: Depthwise, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return self._depthwise(step, x, step.window.pad(x.shape[2], x.shape[3]))

    def _depthwise(self, step: Depthwise, x: Tensor, pad: Pad) -> tuple[Tensor, Tensor | None]:
        y = self._conv(step, x, lambda: step.weight.permute(2, 0, 1).unsqueeze(1), step.act, pad, groups=x.shape[1])
        return y, _sums(y) if step.pool else None

    def squeeze(self, step: Squeeze, sums: Tensor, places: int) -> Tensor:
        z = torch.addmm(step.b1, sums[:, 0].float(), step.w1.T, alpha=1 / places)
        return F.linear(activate(z, step.act), step.w2, step.b2).sigmoid_()

    def head(self, step: Head, x: Tensor) -> Tensor:
        y = x if step.weight is None else self.pointwise(x, step, None, None)
        return _sums(y)[:, 0].float().div_(y.shape[2] * y.shape[3])

    def pointwise(self, x: Tensor, step: Expand | Project | Head, gate: Tensor | None, residual: Tensor | None) -> Tensor:
        assert step.weight is not None
        assert step.bias is not None
        if gate is not None:
            x = x.mul_(gate[:, :, None, None].to(x.dtype))
        n, channels, height, width = x.shape
        rows = x.permute(0, 2, 3, 1).reshape(-1, channels)
        if step not in self.packed:
            weight = torch.ops.mkldnn._reorder_linear_weight(step.weight.T.contiguous(), len(rows))
            self.packed[step] = weight, step.bias.to(step.weight.dtype)
        if residual is None:
            attr, scalars = _FUSED[step.act if self.fuse else "none"]
            y = torch.ops.mkldnn._linear_pointwise(rows, *self.packed[step], attr, scalars, "")
            y = y if self.fuse else activate(y, step.act)
        else:
            other = residual.permute(0, 2, 3, 1).reshape(len(rows), -1)
            y = activate(torch.ops.mkldnn._linear_pointwise.binary(rows, other, *self.packed[step], "add"), step.act)
        return cast(Tensor, y.view(n, height, width, -1).permute(0, 3, 1, 2))

    def _conv(self, step: Stem | Convolution | Depthwise, x: Tensor, weight: Callable[[], Tensor], act: Act, pad: Pad, *, groups: int = 1) -> Tensor:
        top, bottom, left, right = pad
        inside = [top, left] if (top, left) == (bottom, right) else [0, 0]
        if not any(inside):
            x = padded(x, pad)
        stride = [step.window.stride] * 2
        if step not in self.packed:
            packed = torch.ops.mkldnn._reorder_convolution_weight(weight().to(x.dtype).contiguous(), inside, stride, [1, 1], groups, list(x.shape))
            self.packed[step] = packed, step.bias.to(x.dtype)
        attr, scalars = _FUSED[act]
        return cast(Tensor, torch.ops.mkldnn._convolution_pointwise(x, *self.packed[step], inside, stride, [1, 1], groups, attr, scalars, ""))


def _sums(y: Tensor) -> Tensor:
    """(N, 1, C) over all places; by rows, as torch takes three times as long over H and W of a channels-last tensor."""
    n, channels, height, width = y.shape
    return y.permute(0, 2, 3, 1).reshape(n, height * width, channels).sum(1, keepdim=True)
