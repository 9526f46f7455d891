"""Arch -> torch module.

`build` is deterministic under torch's seed, works on the meta device (`with torch.device("meta")`), and the module runs
in eager mode, torch.compile, torch.export, channels-last, bf16 and at any input size from 32 px.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from triscale.architecture import Arch
from triscale.blocks import ConvNormAct, make_block, recomputing, same_padding


class StemPool(nn.Module):
    """3x3 stride-2 max pool, padded as the convolutions are."""

    def __init__(self, padding: str) -> None:
        super().__init__()
        self.same = padding == "same"

    def forward(self, x: Tensor) -> Tensor:
        if not self.same:
            return F.max_pool2d(x, 3, 2, 1)
        (top, bottom), (left, right) = same_padding(x.shape[2], 3, 2), same_padding(x.shape[3], 3, 2)
        return F.max_pool2d(F.pad(x, (left, right, top, bottom), value=float("-inf")), 3, 2)


class ConvNet(nn.Module):
    """The network that an Arch describes. `arch` and `num_classes` stay on it.

    forward: (N, C, H, W) float -> logits (N, num_classes), or the pooled features (N, channels) where num_classes is 0.
    recompute: under autograd, keep only the blocks' outputs and compute what is inside again in the backward pass, with the same
    random numbers and without counting twice in batch norm's running statistics.
    """

    recompute = False

    def __init__(self, arch: Arch, num_classes: int = 1000, in_channels: int = 3) -> None:
        super().__init__()
        if type(num_classes) is not int or type(in_channels) is not int or num_classes < 0 or in_channels < 1:
            raise ValueError(f"build: expected whole numbers num_classes >= 0 and in_channels >= 1, found {num_classes} and {in_channels}")
        self.arch, self.num_classes, self.in_channels = arch, num_classes, in_channels
        n, stem = arch.numerics, arch.stem
        self.stem = ConvNormAct(in_channels, stem.channels, stem.kernel, n, stride=stem.stride, act=n.activation)
        self.pool = StemPool(n.padding) if stem.pool else None
        blocks = list(arch.blocks())
        self.body = nn.ModuleList(nn.ModuleList(make_block(block, n) for block in blocks if block.stage_index == i) for i in range(len(arch.stages)))
        last = arch.stages[-1].channels
        self.head = ConvNormAct(last, arch.head.channels, 1, n, act=n.activation) if arch.head.channels else None
        self.classifier = Classifier(arch.out_channels, num_classes) if num_classes else None
        self.stage_strides = _strides(arch)

    def stages(self, x: Tensor) -> dict[str, Tensor]:
        """The deepest feature map at each stride, before the head: {"stride2": (N, C, H/2, W/2), "stride4": ...}.

        Sizes round up. For EfficientNet these are the official code's reduction_1 ... reduction_5.
        """
        out = {}
        x = self.stem(x)
        stride = self.arch.stem.stride
        if self.pool is not None:
            out[f"stride{stride}"] = x
            x, stride = self.pool(x), stride * 2
        for stage, stride in zip(self._stage_modules(), self.stage_strides, strict=True):
            for block in stage:
                x = self._through(block, x)
            out[f"stride{stride}"] = x
        return out

    def _stage_modules(self) -> list[nn.ModuleList]:
        return [cast(nn.ModuleList, stage) for stage in self.body]

    def features(self, x: Tensor) -> Tensor:
        """The last feature map, after the head convolution: (N, arch.out_channels, H/32, W/32), sizes rounded up."""
        x = self.stem(x)
        if self.pool is not None:
            x = self.pool(x)
        for stage in self._stage_modules():
            for block in stage:
                x = self._through(block, x)
        return self.head(x) if self.head is not None else x

    def _through(self, block: nn.Module, x: Tensor) -> Tensor:
        again = self.recompute and torch.is_grad_enabled()  # in evaluation too: an attack's passes
        y: Tensor = checkpoint(block, x, use_reentrant=False, context_fn=_second_time) if again else block(x)
        return y

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x).mean((2, 3))
        x = F.dropout(x, self.arch.dropout, self.training)
        return self.classifier(x) if self.classifier is not None else x


def _second_time() -> tuple[AbstractContextManager[object], AbstractContextManager[object]]:
    """The contexts of the first and of the repeated forward pass."""
    return nullcontext(), recomputing()


class Classifier(nn.Linear):
    """Dense layer, initialised uniform in +-1/sqrt(classes), bias 0. Source: official dense_kernel_initializer."""

    def reset_parameters(self) -> None:
        if self.weight.is_meta:  # as in blocks.Conv2d
            return
        bound = self.out_features**-0.5
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.zeros_(self.bias)


def _strides(arch: Arch) -> tuple[int, ...]:
    """The stride of each stage's output against the input."""
    stride = arch.stem.stride * (2 if arch.stem.pool else 1)
    out = []
    for stage in arch.stages:
        stride *= stage.stride
        out.append(stride)
    return tuple(out)


def build(arch: Arch, num_classes: int = 1000, in_channels: int = 3) -> ConvNet:
    """A freshly initialised network (official initialisers) in training mode, float32, on torch's default device.

    Raises ValueError for a negative number of classes or no input channel.
    """
    if not isinstance(arch, Arch):
        raise ValueError(f"build: expected an Arch, found {type(arch).__name__}; triscale.arch(name) makes one")
    return ConvNet(arch, num_classes, in_channels)
