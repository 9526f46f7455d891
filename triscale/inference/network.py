"""The public entry: a network in, the same function out, computed the fastest way that this machine has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from triscale.inference.cpu import CPU, IN_BFLOAT16, bfloat16_is_native
from triscale.inference.gpu import GPU
from triscale.inference.lowering import check, plain_kinds
from triscale.inference.notices import Once, Tell, warn
from triscale.inference.steps import Step
from triscale.kernels.machine import unsupported
from triscale.model import ConvNet
from triscale.naming import unknown

Engine = Literal["auto", "torch", "triton"]
Precision = Literal["float32", "bfloat16", "float16"]


class Compute(Protocol):
    """An engine: (N, C, H, W) float -> logits float32, without autograd. takes_pixels: uint8 too, which it normalises.

    used: the ways, with their arithmetic, that it has taken so far.
    """

    takes_pixels: bool
    steps: tuple[Step, ...]

    @property
    def used(self) -> tuple[str, ...]: ...

    def __call__(self, x: Tensor) -> Tensor: ...


class Optimized(nn.Module):
    """`net` in evaluation mode, computed faster; `optimize` makes it.

    forward: (N, C, H, W) float -> logits in the type of x; or uint8 pixels -> float32, with the mean and std of `net.preprocess`.
    No gradients: where one is asked for, and in float64, the network itself runs. All else (arch, num_classes, preprocess,
    stages, ...) is the network's own. Its weights are read when this is made, and after `to`.
    """

    def __init__(self, net: ConvNet, engine: Engine, precision: Precision | None, compile: bool, tell: Tell) -> None:
        super().__init__()
        self.net = net
        self._wanted, self._precision, self._compile, self._tell = engine, precision, compile, Once(tell)
        self._engine: Compute | str | None = None
        self.training = False

    @property
    def engine(self) -> Compute | str:
        """What computes; or, in words, why the network itself does."""
        if self._engine is None:
            self._engine = self._make()
            if not isinstance(self._engine, str) and (kinds := plain_kinds(self._engine.steps)):
                self._tell(f"optimize: no faster form of {', '.join(kinds)} (changed, or with a shortcut that pools); these parts run as they are")
        return self._engine

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != self.net.in_channels or x.device != next(self.net.parameters()).device:
            where = f"(N, {self.net.in_channels}, H, W) on {next(self.net.parameters()).device}"
            raise ValueError(f"optimize: expected images {where}, found {tuple(x.shape)} on {x.device}")
        engine = self.engine
        if x.dtype == torch.uint8 and (isinstance(engine, str) or not engine.takes_pixels):
            x = self._normalised(x)
        reason = engine if isinstance(engine, str) else _reason(x)
        if isinstance(engine, str) or reason:
            self._tell(f"optimize: {reason}; the network runs as it is")
            return cast(Tensor, self.net(x))
        with torch.no_grad():
            return engine(x).to(x.dtype if x.is_floating_point() else torch.float32)

    def _normalised(self, x: Tensor) -> Tensor:
        mean, std = (x.new_tensor(v, dtype=torch.float32).view(1, -1, 1, 1) for v in self._pixels())
        return (x.float() - mean) / std

    def _pixels(self) -> tuple[Sequence[float], Sequence[float]]:
        preprocess: Any = getattr(self.net, "preprocess", None)
        if preprocess is None:
            raise ValueError("optimize: uint8 images need the network's mean and std, and it has no preprocess; give normalised float images")
        return preprocess.mean, preprocess.std

    def _make(self) -> Compute | str:
        net, tell = self.net, self._tell
        weight = next(net.parameters())
        if self._wanted == "torch":
            return AsItIs(net)
        if weight.dtype == torch.float64:
            return "float64 has no faster way"
        if net._forward_hooks or net._forward_pre_hooks:
            return "the network has hooks"
        own = weight.dtype if weight.dtype != torch.float32 else None
        wanted = getattr(torch, self._precision) if self._precision else own
        if self._wanted == "triton" or weight.device.type == "cuda":
            why = unsupported(weight.device)
            if why and self._wanted == "triton":
                raise ValueError(f"optimize: {why}")
            if why or wanted == torch.float32:
                return why or "the kernels compute in bfloat16 or float16, and float32 was asked for"
            if wanted is None:
                tell(IN_BFLOAT16)
            return GPU(net, wanted or torch.bfloat16, tell, self._pixels() if hasattr(net, "preprocess") else None)
        if weight.device.type != "cpu":
            return f"{weight.device.type} has no faster way"
        if wanted == torch.float16:
            raise ValueError("optimize: expected precision float32 or bfloat16 on a CPU, found float16")
        if wanted == torch.bfloat16 and not bfloat16_is_native():
            tell("optimize: this processor has no bfloat16 arithmetic; float32 is used")
            wanted = torch.float32
        fast = [torch.bfloat16] if bfloat16_is_native() else []
        return CPU(net, [wanted] if wanted else [*fast, torch.float32], tell, compile=self._compile)

    def train(self, mode: bool = True) -> Optimized:
        if mode:
            raise ValueError("optimize: an optimised network can't be trained; train the network itself and optimise it then")
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> Optimized:
        self._engine = None
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "net":
                raise
            return getattr(super().__getattr__("net"), name)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_engine": None}  # packed weights, locks and graphs have no copy


class AsItIs:
    """The network itself."""

    takes_pixels = False

    def __init__(self, net: ConvNet) -> None:
        self.net = net
        self.steps: tuple[Step, ...] = ()
        self.used = ("eager",)

    def __call__(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.net(x))


def _reason(x: Tensor) -> str:
    """Why an engine can't take x; empty where it can."""
    if x.requires_grad and torch.is_grad_enabled():
        return "a gradient is asked for"
    if x.dtype == torch.float64:
        return "the images are float64"
    return "there are no images" if not x.numel() else ""


def optimize(
    net: nn.Module,
    shape: tuple[int, int, int, int] | None = None,
    *,
    engine: Engine = "auto",
    precision: Precision | None = None,
    compile: bool = False,
    tell: Tell = warn,
) -> Optimized:
    """A built network in evaluation mode -> a module that computes the same logits faster where the network's weights are.

    On a CPU by the way that measures fastest, the network's own among them (cpu.py). On an NVIDIA GPU from compute capability
    8.0 through the kernels, in a CUDA graph for each shape (gpu.py). In the type of the weights; float32 ones in bfloat16, which
    is said once, where the device multiplies it and is faster so. What was measured is kept in the cache. Elsewhere the network
    runs as it is, which is said once.

    shape: (N, C, H, W) of the images to come, to be measured now, not at the first call. engine: `torch` for the network as it is,
    `triton` for the kernels or an error. precision: bfloat16 (on a CPU only where the processor has it), float16 (GPU), or
    float32: on a CPU logits within 1e-4, on a GPU the network as it is. compile: on a CPU, torch.compile is tried too, which takes
    a minute or more each time. tell: what is called with notices; a warning unless given. Raises ValueError for what
    `triscale.build` didn't make and in training mode.
    """
    for name, value, known in (("engine", engine, get_args(Engine)), ("precision", precision or "float32", get_args(Precision))):
        if value not in known:
            raise unknown(f"optimize: {name}", value, known)
    out = Optimized(check(net.net if isinstance(net, Optimized) else net), engine, precision, compile, tell)
    _ = out.engine  # what is wrong shows now
    if shape is not None:
        weight = next(out.net.parameters())
        out(_fields(shape).to(weight.device, weight.dtype))
    return out


def _fields(shape: tuple[int, int, int, int]) -> Tensor:
    """Smooth random fields, which networks for pictures take better than noise."""
    if len(shape) != 4 or min(shape) < 1:
        raise ValueError(f"optimize: expected a shape (N, C, H, W), found {shape}")
    own = torch.Generator().manual_seed(0)  # the caller's random numbers go on as if nothing had been
    return F.interpolate(torch.randn(*shape[:2], 7, 7, generator=own, dtype=torch.float32), shape[2:], mode="bilinear")
