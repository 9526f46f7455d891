"""What a network in evaluation comes down to: a list of steps, each a dataclass with its weights, batch norm folded in.

Weights are laid out as the kernels take them: pointwise (I, O), depthwise (K, K, C), stem (K, K, I, O); those of a dense
convolution as torch has them, (O, I, K, K). Their types: `lowering.converted`. An activation is "silu",
"relu", "relu6" or "none". Sizes of images are not in here: padding is computed from the image that comes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from triscale.architecture import Activation
from triscale.blocks import same_padding

Act = Activation | Literal["none"]
Pad = tuple[int, int, int, int]  # top, bottom, left, right


@dataclass(frozen=True)
class Window:
    """A K x K kernel's way over an image. same: SAME padding at stride 2; else (K - 1) / 2 on each side, which it is at stride 1."""

    kernel: int
    stride: int
    same: bool

    def pad(self, height: int, width: int) -> Pad:
        if not self.same:
            return (self.kernel // 2,) * 4
        return *same_padding(height, self.kernel, self.stride), *same_padding(width, self.kernel, self.stride)

    def out(self, height: int, width: int) -> tuple[int, int]:
        return -(-height // self.stride), -(-width // self.stride)


@dataclass(frozen=True, eq=False)
class Stem:
    """act(convolution)."""

    weight: Tensor
    bias: Tensor
    window: Window
    act: Act


@dataclass(frozen=True, eq=False)
class MaxPool:
    """The largest of each window (ResNet's stem); what lies outside the image counts for nothing."""

    window: Window


@dataclass(frozen=True, eq=False)
class Convolution:
    """A dense K x K convolution. residual: what Keep kept is added `before` the activation or `after` it.

    pool: a Squeeze follows. No kernel of ours: cuDNN and oneDNN are near the arithmetic's limit here.
    """

    weight: Tensor
    bias: Tensor
    window: Window
    act: Act
    residual: Literal["none", "before", "after"] = "none"
    pool: bool = False


@dataclass(frozen=True, eq=False)
class Keep:
    """Keeps x for the sum at the block's end. shortcut: the 1x1 convolution that it goes through where the shape changes."""

    shortcut: Convolution | None = None


@dataclass(frozen=True, eq=False)
class Expand:
    """act(1x1 convolution)."""

    weight: Tensor
    bias: Tensor
    act: Act


@dataclass(frozen=True, eq=False)
class Depthwise:
    """act(depthwise convolution). pool: a Squeeze follows."""

    weight: Tensor
    bias: Tensor
    window: Window
    act: Act
    pool: bool


@dataclass(frozen=True, eq=False)
class ExpandDepthwise:
    """An expansion and the depthwise convolution that alone reads it: an engine may keep what lies between to itself."""

    expand: Expand
    depthwise: Depthwise


@dataclass(frozen=True, eq=False)
class Squeeze:
    """The gate of squeeze-excitation from the means of x: sigmoid(w2 act(w1 mean + b1) + b2); w1 (R, C), w2 (C, R)."""

    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor
    act: Act


@dataclass(frozen=True, eq=False)
class Project:
    """act(1x1 convolution of x, times the gate where gated, plus what Keep kept where residual)."""

    weight: Tensor
    bias: Tensor
    act: Act
    gated: bool = False
    residual: bool = False


@dataclass(frozen=True, eq=False)
class Head:
    """The mean over all places of act(1x1 convolution); without weights, of x itself."""

    weight: Tensor | None = None
    bias: Tensor | None = None
    act: Act = "none"


@dataclass(frozen=True, eq=False)
class Classifier:
    """Logits from what Head gave. weight: (classes, C)."""

    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True, eq=False)
class Plain:
    """A module of (N, C, H, W), as it is. kind: what it is called."""

    module: nn.Module
    kind: str


Step = Stem | MaxPool | Convolution | Keep | Expand | Depthwise | ExpandDepthwise | Squeeze | Project | Head | Classifier | Plain
