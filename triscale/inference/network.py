"""The public entry: a network in, the same function out, computed the fastest way that this machine has."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Literal, Protocol, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from triscale.inference.cpu import CPU, IN_BFLOAT16, bfloat16_is_native
from triscale.inference.gpu import GPU
from triscale.inference.lowering import check, hooked
from triscale.inference.notices import Once, Tell, warn
from triscale.kernels.machine import unsupported
from triscale.model import ConvNet
from triscale.naming import unknown
from triscale.text import first_line

Engine = Literal["auto", "torch", "triton"]
Precision = Literal["float32", "bfloat16", "float16"]


class Compute(Protocol):
    """An engine: (N, C, H, W) float -> logits float32, without autograd.

    takes_pixels: uint8 too, which it normalises. plain: kinds of modules that it has no faster form of. used: the ways, with their
    arithmetic, that it has taken so far.
    """

    takes_pixels: bool
    plain: list[str]

    @property
    def used(self) -> tuple[str, ...]: ...

    def __call__(self, x: Tensor) -> Tensor: ...


class Optimized(nn.Module):
    """`net` in evaluation mode, computed faster; `optimize` makes it.

    forward: (N, C, H, W) float -> logits in the type of x; or uint8 pixels -> float32, with the mean and std of `net.preprocess`.
    No gradients, and autocast is without effect. The weights are a copy, made now, after `to` and after `load_state_dict`. Where
    the images ask for a gradient or are float64, and where there is no faster way, `net` itself runs as it is then. All else (arch,
    num_classes, preprocess, stages, ...) is the network's own.
    """

    def __init__(self, net: ConvNet, engine: Engine, precision: Precision | None, compile: bool, measure: bool, tell: Tell) -> None:
        super().__init__()
        self.net = net
        self._wanted, self._precision, self._compile, self._measure, self._tell = engine, precision, compile, measure, Once(tell)
        self._engine: Compute | str | None = None
        self.training = False

    @property
    def engine(self) -> Compute | str:
        """What computes; or, in words, why the network itself does."""
        if self._engine is None:
            self._engine = self._make()
            if isinstance(self._engine, str):
                if self._wanted == "triton":
                    raise ValueError(f"optimize: engine 'triton': {self._engine}")
            elif kinds := self._engine.plain:
                self._tell(f"optimize: no faster form of {', '.join(kinds)} (changed, or with a shortcut that pools); these parts run as they are")
        return self._engine

    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        engine, pixels = self.engine, x.dtype == torch.uint8
        if pixels and (isinstance(engine, str) or not engine.takes_pixels):
            x = self._normalised(x)
        if isinstance(engine, AsItIs):
            return engine(x, pixels)
        if reason := engine if isinstance(engine, str) else _reason(x):
            self._tell(f"optimize: {reason}; the network runs as it is")
            return AsItIs(self.net)(x, pixels)
        assert not isinstance(engine, str)
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            return engine(x).to(x.dtype if x.is_floating_point() else torch.float32)

    def _check(self, x: Tensor) -> None:
        if self.net.training:
            raise ValueError("optimize: the network was put into training mode; call its eval(), and optimize it again for its new weights")
        place = next(self.net.parameters()).device
        if x.ndim != 4 or x.shape[1] != self.net.in_channels or x.device != place or not (x.is_floating_point() or x.dtype == torch.uint8):
            expected = f"float or uint8 images (N, {self.net.in_channels}, H, W) on {place}"
            raise ValueError(f"optimize: expected {expected}, found {str(x.dtype).removeprefix('torch.')} {tuple(x.shape)} on {x.device}")

    def _normalised(self, x: Tensor) -> Tensor:
        pixels = self._pixels()
        if pixels is None:
            raise ValueError("optimize: uint8 images need the network's mean and std, and it has no preprocess; give normalised float images")
        mean, std = (x.new_tensor(v, dtype=torch.float32).view(1, -1, 1, 1) for v in pixels)
        return (x.float() - mean) / std

    def _pixels(self) -> tuple[Sequence[float], Sequence[float]] | None:
        preprocess: Any = getattr(self.net, "preprocess", None)
        return (preprocess.mean, preprocess.std) if preprocess is not None else None

    def _make(self) -> Compute | str:
        net, tell = self.net, self._tell
        if self._wanted == "torch":
            return AsItIs(net)
        if reason := _unfit(net):
            return reason
        weight = next(net.parameters())
        own = weight.dtype if weight.dtype != torch.float32 else None
        wanted = getattr(torch, self._precision) if self._precision else own
        try:
            copied = copy.deepcopy(net).requires_grad_(False)
        except (RuntimeError, TypeError) as error:  # weights that are computed, as pruning's are, and whatever else a user's module holds
            return f"the network can't be copied ({first_line(error)})"
        if self._wanted == "triton" or weight.device.type == "cuda":
            if why := unsupported(weight.device):
                return why
            if wanted == torch.float32:
                return "the kernels compute in bfloat16 or float16, and float32 was asked for"
            if wanted is None:
                tell(IN_BFLOAT16)
            return GPU(copied, wanted or torch.bfloat16, tell, self._pixels(), asked=wanted is not None, measure=self._measure)
        if weight.device.type != "cpu":
            return f"{weight.device.type} has no faster way"
        return self._on_cpu(copied, wanted)

    def _on_cpu(self, net: ConvNet, wanted: torch.dtype | None) -> Compute | str:
        if wanted == torch.float16:
            if self._precision is None:
                return "float16 has no faster way on a CPU"
            raise ValueError("optimize: expected precision float32 or bfloat16 on a CPU, found float16")
        if wanted == torch.bfloat16 and not bfloat16_is_native():
            self._tell("optimize: this processor has no bfloat16 arithmetic; float32 is used")
            wanted = torch.float32
        fast = [torch.bfloat16] if bfloat16_is_native() else []
        net = net.float() if wanted != torch.bfloat16 or self._precision else net
        return CPU(net, [wanted] if wanted else [*fast, torch.float32], self._tell, compile=self._compile)

    def train(self, mode: bool = True) -> Optimized:
        if mode:
            raise ValueError("optimize: an optimised network can't be trained; train the network itself and optimise it then")
        return super().train(mode)

    def load_state_dict(self, *args: Any, **options: Any) -> Any:
        try:
            return super().load_state_dict(*args, **options)
        finally:  # not before: another thread may call meanwhile
            self._engine = None

    def _apply(self, fn: Any, recurse: bool = True) -> Optimized:
        try:
            return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        finally:
            self._engine = None

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
        self.plain: list[str] = []
        self.used = ("eager",)

    def __call__(self, x: Tensor, pixels: bool = False) -> Tensor:
        """pixels: x was some, normalised in float32, which a network in another type doesn't take."""
        return cast(Tensor, self.net(x.to(next(self.net.parameters()).dtype)).float() if pixels else self.net(x))


def _unfit(net: ConvNet) -> str:
    """Why no engine can take the network; empty where one can."""
    if next(net.parameters()).dtype == torch.float64:
        return "float64 has no faster way"
    if hooked(net):
        return "the network has hooks"
    return "the network's forward was exchanged" if "forward" in vars(net) else ""


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
    measure: bool = True,
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
    a quarter of a minute or more each time. measure: False on a GPU for the kernels' likely fastest configurations where none is
    kept from before, without the minute or two that measuring takes. tell: what is called with notices; a warning unless given.
    Raises ValueError for what `triscale.build` didn't make and in training mode.
    """
    for name, value, known in (("engine", engine, get_args(Engine)), ("precision", precision or "float32", get_args(Precision))):
        if value not in known:
            raise unknown(f"optimize: {name}", value, known)
    if engine == "torch" and precision is not None:
        raise ValueError(f"optimize: precision {precision!r} goes with the engines auto and triton; torch runs the network as it is")
    out = Optimized(check(net.net if isinstance(net, Optimized) else net), engine, precision, compile, measure, tell)
    _ = out.engine  # what is wrong shows now
    if shape is not None:
        weight = next(out.net.parameters())
        out(_fields(shape).to(weight.device, weight.dtype))
    return out


def _fields(shape: tuple[int, int, int, int]) -> Tensor:
    """Smooth random fields, which networks for pictures take better than noise."""
    if len(shape) != 4 or min(shape) < 1:
        raise ValueError(f"optimize: expected a shape (N, C, H, W), found {shape}")
    own = torch.Generator("cpu").manual_seed(0)  # the caller's random numbers go on as if nothing had been
    return F.interpolate(torch.randn(*shape[:2], 7, 7, generator=own, dtype=torch.float32, device="cpu"), shape[2:], mode="bilinear")
