"""The blocks that networks are made of, in the official numerics.

Shapes: every block takes and returns (N, C, H, W) float tensors, NCHW or channels-last; a block's stride divides H and W
and rounds up. Source: Tan & Le 2019, section 4; official efficientnet_model.py; the ResNet, MobileNet and EfficientNetV2
papers for their own blocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from triscale.architecture import Activation, Block, Numerics, Padding


def activate(x: Tensor, kind: Activation) -> Tensor:
    """SiLU, ReLU or ReLU6. Works in place where that saves memory: `x` must not be used afterwards.

    Under autograd the derivatives of SiLU and ReLU6 need their input, so torch would copy it before working in place.
    """
    if kind == "relu":
        return F.relu(x, inplace=True)
    return (F.silu if kind == "silu" else F.relu6)(x, inplace=not torch.is_grad_enabled())


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """TensorFlow's SAME padding before and after one axis of `size`: the odd pixel comes after. Output ceil(size/stride)."""
    total: int = torch.sym_max((-(-size // stride) - 1) * stride + kernel - size, 0)  # type: ignore[assignment]  # or a SymInt
    return total // 2, total - total // 2


class Conv2d(nn.Conv2d):
    """Convolution with SAME padding from the actual input size, or symmetric padding (kernel - 1) / 2; no bias unless asked.

    Initialised normal with std sqrt(2 / (k k out)), not truncated; a depthwise convolution counts as out = 1, its channel
    multiplier. Source: official conv_kernel_initializer.
    """

    def __init__(self, cin: int, cout: int, kernel: int, stride: int = 1, *, groups: int = 1, padding: Padding = "same", bias: bool = False) -> None:
        self.same = padding == "same" and stride > 1 and kernel > 1
        self.pointwise = kernel == stride == groups == 1
        # At stride 1 an odd kernel's SAME padding is symmetric at every size: the convolution pads for itself.
        super().__init__(cin, cout, kernel, stride, 0 if self.same else kernel // 2, groups=groups, bias=bias)

    def reset_parameters(self) -> None:
        if self.weight.is_meta:  # nothing to fill, and torch would load its reference operators for it: 1.2 s
            return
        fan_out = self.kernel_size[0] * self.kernel_size[1] * self.out_channels // self.groups
        nn.init.normal_(self.weight, std=math.sqrt(2 / fan_out))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def pad(self, x: Tensor) -> Tensor:
        """`x` with what SAME still lacks at stride 2; `x` itself where nothing is missing."""
        if not self.same:
            return x
        top, bottom = same_padding(x.shape[2], self.kernel_size[0], self.stride[0])
        left, right = same_padding(x.shape[3], self.kernel_size[1], self.stride[1])
        return F.pad(x, (left, right, top, bottom)) if top or bottom or left or right else x

    def forward(self, x: Tensor) -> Tensor:
        return self.convolve(x, self.weight, self.bias)

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The convolution with a weight and bias other than its own (a folded norm's)."""
        if self.pointwise and _few_positions(x):
            return F.linear(x.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)
        return self._conv_forward(self.pad(x), weight, bias)


def _few_positions(x: Tensor) -> bool:
    """Whether a 1x1 convolution runs faster as a matrix product: channels-last maps of at most 4x4 on a CPU.

    Measured with oneDNN: 1280x320 at 2x2, batch 32, forward and backward 3.3 ms as a convolution, 2.2 ms as a product.
    """
    if torch.compiler.is_compiling() or x.device.type != "cpu" or x.shape[2] * x.shape[3] > 16:
        return False
    return x.is_contiguous(memory_format=torch.channels_last)


_recomputing = False


@contextmanager
def recomputing() -> Iterator[None]:
    """The forward pass inside is run a second time, for its activations: batch norms leave their running statistics alone."""
    global _recomputing
    before, _recomputing = _recomputing, True
    try:
        yield
    finally:
        _recomputing = before


class Switch:
    """One for all norms of a network that have an auxiliary one: where it is on, those work in their stead."""

    on = False


class BatchNorm(nn.BatchNorm2d):
    """Batch norm whose running variance may take the biased batch variance, as TensorFlow's does; torch stores n/(n-1) of it.

    `momentum` is the weight of the new value. Counts no batches, so the state holds four tensors. auxiliary: a norm for
    inputs of another distribution (train/advprop.py), None unless one is put there. Subclasses override `normalise`.
    """

    running_mean: Tensor
    running_var: Tensor
    momentum: float
    auxiliary: BatchNorm | None

    def __init__(self, channels: int, numerics: Numerics) -> None:
        super().__init__(channels, numerics.norm_eps, numerics.norm_momentum)
        self.num_batches_tracked = None  # a tenth of the kernel launches of a training step, for a number nothing reads
        self.biased = numerics.running_variance == "biased"
        self.register_module("auxiliary", None)
        self.switch = Switch()

    @property
    def chosen(self) -> BatchNorm:
        """The norm that works now: this one or its auxiliary."""
        return self if self.auxiliary is None or not self.switch.on else self.auxiliary

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.chosen
        y: Tensor = self.normalise(x) if chosen is self else chosen(x)
        return y

    def normalise(self, x: Tensor) -> Tensor:
        """The norm itself, by its own weights and statistics."""
        if self.training and _recomputing:
            mean, var = self.running_mean.clone(), self.running_var.clone()  # autograd keeps as many tensors as the first time
            return F.batch_norm(x, mean, var, self.weight, self.bias, True, self.momentum, self.eps)
        if not (self.training and self.biased):
            return super().forward(x)
        # torch's rule goes to a copy, which autograd keeps: (1 - m) old + m var n/(n-1). Scaled by (n-1)/n its last term is
        # the biased one, and the old value is topped up to (1 - m).
        torch_rule = self.running_var.clone()
        y = F.batch_norm(x, self.running_mean, torch_rule, self.weight, self.bias, True, self.momentum, self.eps)
        n = x.numel() // x.shape[1]
        with torch.no_grad():
            self.running_var.mul_((1 - self.momentum) / n).add_(torch_rule, alpha=(n - 1) / n)
        return y

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: object) -> None:
        state_dict.pop(prefix + "num_batches_tracked", None)
        # Not torch's batch norm's own, which puts the counter into a state that lacks it and then finds it unexpected.
        nn.Module._load_from_state_dict(self, state_dict, prefix, *rest)


class ConvNormAct(nn.Module):
    """Convolution, batch norm, activation (None: none). `shrink` in the names: (N, cin, H, W) -> (N, cout, H/s, W/s)."""

    def __init__(
        self, cin: int, cout: int, kernel: int, numerics: Numerics, *, stride: int = 1, groups: int = 1, act: Activation | None = None
    ) -> None:
        super().__init__()
        self.conv = Conv2d(cin, cout, kernel, stride, groups=groups, padding=numerics.padding)
        self.norm = BatchNorm(cout, numerics)
        self.act: Activation | None = act

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv.convolve(x, *self.folded()) if self._foldable() else self.norm(self.conv(x))
        return activate(x, self.act) if self.act else x

    def _foldable(self) -> bool:
        """Evaluation without autograd or compiler, on the modules as they were built: no hook of theirs would be called."""
        conv, norm = self.conv, self.norm
        if norm.training or torch.is_grad_enabled() or torch.compiler.is_compiling() or type(norm) is not BatchNorm or norm.chosen is not norm:
            return False
        return not (conv._forward_hooks or conv._forward_pre_hooks or norm._forward_hooks or norm._forward_pre_hooks)

    def folded(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the one convolution that equals convolution and norm in evaluation.

        Made anew at each call: a pass over the weights is cheaper than one over the activations, and never stale.
        """
        norm = self.norm
        factor = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
        return self.conv.weight * factor.view(-1, 1, 1, 1), torch.addcmul(norm.bias, norm.running_mean, factor, value=-1)


class SqueezeExcite(nn.Module):
    """x times a gate per image and channel: sigmoid(expand(act(reduce(mean of x)))). Both layers have biases.

    The layers keep the (out, in, 1, 1) weights of the convolutions they are in every checkpoint, and run as matrix products.
    """

    def __init__(self, channels: int, squeezed: int, act: Activation) -> None:
        super().__init__()
        self.reduce = Conv2d(channels, squeezed, 1, bias=True)
        self.expand = Conv2d(squeezed, channels, 1, bias=True)
        self.act: Activation = act

    def forward(self, x: Tensor) -> Tensor:
        gate = F.linear(x.mean((2, 3)), self.reduce.weight.flatten(1), self.reduce.bias)
        gate = F.linear(activate(gate, self.act), self.expand.weight.flatten(1), self.expand.bias)
        gate = gate.sigmoid()[:, :, None, None]
        return x * gate if torch.is_grad_enabled() else x.mul_(gate)


class DropPath(nn.Module):
    """Drop connect: in training, each sample's branch is dropped with `rate`, and divided by 1 - rate where kept."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.rate:
            return x
        kept = torch.rand(x.shape[0], 1, 1, 1, device=x.device, dtype=torch.float32) >= self.rate
        return x.mul_(kept.to(x.dtype) / (1 - self.rate))

    def extra_repr(self) -> str:
        return f"rate={self.rate:g}"


class PoolShortcut(nn.Module):
    """The parameter-free shortcut where shape changes: stride x stride mean (partial windows at the edge), zero channels added."""

    def __init__(self, stride: int, added: int) -> None:
        super().__init__()
        self.stride, self.added = stride, added

    def forward(self, x: Tensor) -> Tensor:
        if self.stride > 1:
            x = F.avg_pool2d(x, self.stride, ceil_mode=True, count_include_pad=False)
        return F.pad(x, (0, 0, 0, 0, 0, self.added)) if self.added else x


class Residual(nn.Module):
    """A branch and its shortcut; subclasses fill `branch`. `drop` acts on the branch, and only where there is a shortcut."""

    final_act: Activation | None = None

    def __init__(self, block: Block, numerics: Numerics) -> None:
        super().__init__()
        kind, cin, cout = block.shortcut, block.in_channels, block.stage.channels
        self.joined = kind != "none"
        self.shortcut: nn.Module = nn.Identity()
        if kind == "projection":
            self.shortcut = ConvNormAct(cin, cout, 1, numerics, stride=block.stride)
        elif kind == "pool":
            self.shortcut = PoolShortcut(block.stride, cout - cin)
        self.drop = DropPath(block.drop_path if self.joined else 0.0)

    def branch(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        y = self.branch(x)
        if self.joined:
            # The norm's and the drop's backward need no output of theirs, so the sum can take its place.
            y = self.drop(y).add_(self.shortcut(x))
        return activate(y, self.final_act) if self.final_act else y


class ConvBlock(Residual):
    """k x k convolution, norm, activation, squeeze-excitation where asked."""

    def __init__(self, block: Block, numerics: Numerics) -> None:
        super().__init__(block, numerics)
        stage = block.stage
        self.conv = ConvNormAct(block.in_channels, stage.channels, stage.kernel, numerics, stride=block.stride, act=numerics.activation)
        self.se = SqueezeExcite(stage.channels, block.squeezed, numerics.activation) if block.squeezed else nn.Identity()

    def branch(self, x: Tensor) -> Tensor:
        return self.se(self.conv(x))

    def forward(self, x: Tensor) -> Tensor:
        y = self.branch(x)
        # Unlike the other blocks' this branch ends in an activation, whose backward may need its output as it is.
        return self.drop(y.clone() if self.drop.rate and self.training else y) + self.shortcut(x) if self.joined else y


class DepthwiseSeparable(Residual):
    """Depthwise k x k, norm, activation, 1x1, norm, activation: MobileNetV1's block."""

    def __init__(self, block: Block, numerics: Numerics) -> None:
        super().__init__(block, numerics)
        stage, cin = block.stage, block.in_channels
        self.depthwise = ConvNormAct(cin, cin, stage.kernel, numerics, stride=block.stride, groups=cin, act=numerics.activation)
        self.pointwise = ConvNormAct(cin, stage.channels, 1, numerics)
        self.final_act = numerics.activation

    def branch(self, x: Tensor) -> Tensor:
        return self.pointwise(self.depthwise(x))


class MBConv(Residual):
    """1x1 expansion (absent at expand 1), depthwise k x k, squeeze-excitation, linear 1x1 projection."""

    def __init__(self, block: Block, numerics: Numerics) -> None:
        super().__init__(block, numerics)
        stage, cin, inner, act = block.stage, block.in_channels, block.inner, numerics.activation
        self.expand = ConvNormAct(cin, inner, 1, numerics, act=act) if stage.expand != 1 else nn.Identity()
        self.depthwise = ConvNormAct(inner, inner, stage.kernel, numerics, stride=block.stride, groups=inner, act=act)
        self.se = SqueezeExcite(inner, block.squeezed, act) if block.squeezed else nn.Identity()
        self.project = ConvNormAct(inner, stage.channels, 1, numerics)

    def branch(self, x: Tensor) -> Tensor:
        return self.project(self.se(self.depthwise(self.expand(x))))


class FusedMBConv(Residual):
    """k x k expansion, squeeze-excitation where asked, linear 1x1 projection (EfficientNetV2)."""

    def __init__(self, block: Block, numerics: Numerics) -> None:
        super().__init__(block, numerics)
        stage, inner, act = block.stage, block.inner, numerics.activation
        self.expand = ConvNormAct(block.in_channels, inner, stage.kernel, numerics, stride=block.stride, act=act)
        self.se = SqueezeExcite(inner, block.squeezed, act) if block.squeezed else nn.Identity()
        self.project = ConvNormAct(inner, stage.channels, 1, numerics)

    def branch(self, x: Tensor) -> Tensor:
        return self.project(self.se(self.expand(x)))


class Basic(Residual):
    """Two k x k convolutions (ResNet-18, -34); the activation comes after the sum."""

    def __init__(self, block: Block, numerics: Numerics) -> None:
        super().__init__(block, numerics)
        stage, act = block.stage, numerics.activation
        self.conv1 = ConvNormAct(block.in_channels, block.inner, stage.kernel, numerics, stride=block.stride, act=act)
        self.conv2 = ConvNormAct(block.inner, stage.channels, stage.kernel, numerics)
        self.final_act = act

    def branch(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x))


class Bottleneck(Residual):
    """1x1, k x k with the stride, 1x1 (ResNet-50 and deeper, "v1.5"); the activation comes after the sum."""

    def __init__(self, block: Block, numerics: Numerics) -> None:
        super().__init__(block, numerics)
        stage, inner, act = block.stage, block.inner, numerics.activation
        self.conv1 = ConvNormAct(block.in_channels, inner, 1, numerics, act=act)
        self.conv2 = ConvNormAct(inner, inner, stage.kernel, numerics, stride=block.stride, act=act)
        self.conv3 = ConvNormAct(inner, stage.channels, 1, numerics)
        self.final_act = act

    def branch(self, x: Tensor) -> Tensor:
        return self.conv3(self.conv2(self.conv1(x)))


def make_block(block: Block, numerics: Numerics) -> Residual:
    """The module for one block of an Arch."""
    kinds = {"conv": ConvBlock, "separable": DepthwiseSeparable, "mbconv": MBConv, "basic": Basic, "bottleneck": Bottleneck}
    kinds["fused_mbconv"] = ConvBlock if block.stage.expand == 1 else FusedMBConv
    return kinds[block.stage.block](block, numerics)
