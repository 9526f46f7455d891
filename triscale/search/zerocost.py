"""Scores of a network that nobody has trained: seconds become milliseconds, and the ranking becomes a guess.

naswot asks how differently a fresh network treats different images, SynFlow how much its weights together let through. Both
compare networks of one space, size and input; neither knows the labels. Abdelfattah et al. (arXiv 2101.08134) compare them, with
others, by their rank correlation with trained accuracy. Measured here on the 8 networks of the recipe `proxy`, of about one cost,
against their accuracy after 7 epochs: naswot 0.67 to 0.69 over three seeds, SynFlow -0.55, multiply-adds alone 0.48, where 0.3 is chance. So try one
on some networks of your own before it decides what is trained.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from triscale.architecture import Arch
from triscale.blocks import BatchNorm, ConvNormAct, Residual, SqueezeExcite
from triscale.model import ConvNet, build
from triscale.naming import unknown

ZERO_COST = ("naswot", "synflow")
ACTIVATIONS = (F.silu, F.relu, F.relu6)  # what blocks.activate calls
COLUMNS = 1 << 20  # units of a layer that are counted at a time: a float32 sum of ones is exact up to 2^24


def naswot(net: Arch | ConvNet, images: Tensor, *, classes: int = 10, seed: int = 0) -> float:
    """The logarithm of the determinant of K, the kernel of the images' binary codes: larger where a fresh network tells the images
    better apart.

    images: (B, C, S, S) float, normalised, of any classes; B at least 2. K is (B, B): K_ij is the number of activations on whose
    input's sign images i and j agree. An activation's input above 0 is a one. For ReLU that is the linear piece the image lies in,
    as in the paper; SiLU bends there without a corner, and of ReLU6's two corners it is the lower one. The gates of
    squeeze-excitation take part in the pass, but the activation inside them is not counted: it sees means, not positions.
    Batch norms run by the batch's statistics, as at the start of training; dropout and drop path are off.

    An Arch is built with `classes` under `seed`; a ConvNet is copied and scored with the weights it has, and both arguments are
    ignored. float32, counted exactly; the determinant by eigenvalues in float64. -inf where it is 0 within their rounding, as
    with two images of one code. The same on one machine with one number of threads; elsewhere signs next to 0 may differ.

    Known weaknesses: about B log(activations) of the value is the number of activations, so larger inputs and wider networks score
    higher; the seed moves it; values of different batches can't be compared. Source: Mellor et al. 2021, arXiv 2006.04647, section 3.
    """
    if images.ndim != 4 or len(images) < 2 or not images.is_floating_point():
        raise ValueError(f"naswot: expected images (B, C, S, S) float with B from 2, found {tuple(images.shape)} {images.dtype}")
    model = _model(net, classes, images.shape[1], seed).eval()
    for norm in model.modules():
        if isinstance(norm, BatchNorm):
            norm.train()
    codes = _Codes(len(images))
    with torch.no_grad(), codes:
        model(images.to("cpu", torch.float32, memory_format=torch.channels_last))
    return log_determinant(codes.kernel)


def log_determinant(kernel: Tensor) -> float:
    """Of a positive semidefinite matrix (B, B) float64; -inf where its smallest eigenvalue is 0 within rounding."""
    values = torch.linalg.eigvalsh(kernel)
    if values[0] <= len(values) * torch.finfo(torch.float64).eps * values[-1]:
        return -math.inf
    return float(values.log().sum())


class _Codes(TorchFunctionMode):
    """While it is on, every activation of feature maps adds to `kernel` (B, B) float64 the number of its units on which two images agree."""

    def __init__(self, images: int) -> None:
        super().__init__()
        self.kernel = torch.zeros(images, images, dtype=torch.float64)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        if func in ACTIVATIONS and args[0].ndim == 4:  # inside a gate it is (B, squeezed); looked at now, as some work in place
            self._count(args[0])
        return func(*args, **(kwargs or {}))

    def _count(self, x: Tensor) -> None:
        for part in torch.split((x > 0).flatten(1), COLUMNS, 1):
            signs = part.float().mul_(2).sub_(1)
            self.kernel += (signs @ signs.T).double().add_(part.shape[1]).div_(2)  # (agreements - disagreements + all) / 2


def synflow(net: Arch | ConvNet, *, classes: int = 10, channels: int = 3, seed: int = 0) -> float:
    """The natural logarithm of the sum, over all weights of convolutions and classifier, of |w| dR/d|w|, where R is the sum of the
    logits of one image of ones, (1, C, S, S) at the network's resolution, and every weight is replaced by its absolute value.

    Without data. As Abdelfattah et al. sum Tanaka's saliency over the network: norms are passed by, weights of norms and biases
    (which start at 0) left out, dropout and drop path off. Nothing is below 0 then, where ReLU is the identity; here every
    activation is taken as that, so that R is linear in the input and in each weight: SiLU's half slope at 0 and ReLU6's ceiling would
    measure the scale of the initial weights. The gates of squeeze-excitation, which approach 1 for the large values that
    arise, are taken as 1 and their weights left out: it can't tell whether a network has them.

    float64. R itself grows as a product over the layers and soon exceeds every float, so each block's output is divided by its
    largest value, and the logarithms of the divisors are added to the result: exact, and finite at any depth. Of one chain of n
    layers the sum is n R. An Arch is built with `classes` and `channels` under `seed`; a ConvNet is copied, its own weights count.

    Known weaknesses: it grows with width, with depth and with the kernels (a fresh k x k convolution multiplies by about
    k cin / sqrt(cout)), so that it prefers the larger network and needs a target for the cost beside it. Source: Tanaka et al.
    2020, arXiv 2006.05467, equation 1; Abdelfattah et al. 2021, arXiv 2101.08134, section 3.2.
    """
    model = _linear(_model(net, classes, channels, seed).double()).eval()
    shape = (1, model.in_channels, model.arch.resolution, model.arch.resolution)
    divisors: list[float] = []

    def divide(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        largest = float(output.detach().max())
        divisors.append(largest)
        return output / largest if largest > 0 else output

    for module in model.modules():
        if isinstance(module, Residual) or module in (model.stem, model.head):
            module.register_forward_hook(divide)
    weights = [m.weight for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    with torch.enable_grad():
        flow = model(torch.ones(shape, dtype=torch.float64)).sum()
        gradients = torch.autograd.grad(flow, weights)
    total = sum(float((w.detach() * g).sum()) for w, g in zip(weights, gradients, strict=True))
    return math.log(total) + sum(map(math.log, divisors)) if total > 0 else -math.inf


def _linear(model: ConvNet) -> ConvNet:
    """The network with absolute weights, without norms, activations, gates and biases."""
    for module in list(model.modules()):
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.weight.data.abs_()
            module.bias = None
        if isinstance(module, ConvNormAct):
            module.act = None
        if isinstance(module, Residual):
            module.final_act = None
        for name, child in module.named_children():
            if isinstance(child, (BatchNorm, SqueezeExcite)):
                setattr(module, name, nn.Identity())
    return model


def _model(net: Arch | ConvNet, classes: int, channels: int, seed: int) -> ConvNet:
    """A network of its own, float32 on the CPU; torch's random numbers stay where they were."""
    if isinstance(net, ConvNet):
        model = copy.deepcopy(net).cpu().float().requires_grad_()
        model.recompute = False
        return model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build(net, classes, channels).to(memory_format=torch.channels_last)


@dataclass(frozen=True)
class ZeroCostScore:
    """Called with a network it gives the score `name`: naswot or synflow. It can be sent to other processes if `images` can.

    classes, channels: of the data. images: gives the normalised images (B, C, S, S) of a resolution; naswot needs them, and
    calls it for each network, so what it reads it should keep. seed: of the initial weights.
    """

    name: str
    classes: int
    channels: int = 3
    images: Callable[[int], Tensor] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.name not in ZERO_COST:
            raise unknown("zero-cost score", self.name, ZERO_COST)
        if self.name == "naswot" and self.images is None:
            raise ValueError("naswot: expected images, a function of the resolution, found none; synflow does without")

    def __call__(self, arch: Arch) -> float:
        if self.name == "synflow" or self.images is None:
            return synflow(arch, classes=self.classes, channels=self.channels, seed=self.seed)
        return naswot(arch, self.images(arch.resolution), classes=self.classes, seed=self.seed)
