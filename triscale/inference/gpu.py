"""The GPU engine: the steps through the Triton kernels, in bfloat16 or float16, captured in a CUDA graph for each input shape.

Dense convolutions and max pools go to cuDNN; the classifier is float32. Each kernel's configuration is measured once for each
of its shapes and kept on disk. Under Triton's interpreter the same runs on CPU tensors, without graphs and measurements.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from triscale.inference.executor import Torch, execute
from triscale.inference.lowering import lower
from triscale.inference.notices import Tell
from triscale.inference.steps import Depthwise, Expand, Head, Project, Squeeze, Stem
from triscale.inference.tuning import Choices
from triscale.kernels.machine import interpreted
from triscale.model import ConvNet

TRIED = 4  # of each kernel's configurations, the likely fastest first: each is compiled, which takes the better part of a second
LAUNCHES, REPLAYS = 10, 5  # of each configuration when it is measured
GRAPHS = 8  # input shapes whose graphs are kept, with their memory


class Tuner:
    """The fastest configuration of a kernel for given sizes: from memory, from disk, or measured now."""

    def __init__(self, device: torch.device, dtype: torch.dtype, tell: Tell, tried: int = TRIED) -> None:
        self.device, self.dtype, self.tell, self.tried = device, dtype, tell, tried
        self.choices = Choices(tell)
        self.found: dict[str, Any] = {}
        # Bytes that a program may have; Hopper's where the interpreter stands in for a GPU.
        self.shared = torch.cuda.get_device_properties(device).shared_memory_per_block_optin if device.type == "cuda" else 227 * 1024

    def __call__(self, kernel: str, sizes: Mapping[str, Any], configs: Callable[[], Sequence[Any]], run: Callable[[Any], object]) -> Any:
        """One of `configs()`, where the likely fastest come first; None for the kernel's own choice."""
        if interpreted():
            return max(configs(), key=lambda c: c.block_m * c.block_o) if kernel == "pointwise" else None  # it takes its time by the program
        key = f"{kernel} {sizes}"
        if key not in self.found:
            self.found[key] = self._find({"kernel": kernel, **sizes}, configs()[: self.tried], run)
        return self.found[key]

    def _find(self, question: Mapping[str, Any], configs: Sequence[Any], run: Callable[[Any], object]) -> Any:
        import triton

        by_name = {str(c): c for c in configs}
        if len(by_name) == 1:
            return configs[0]
        gpu = torch.cuda.get_device_name(self.device)
        question = {**question, "dtype": str(self.dtype), "gpu": gpu, "triton": triton.__version__}
        name = self.choices.get(question)
        if name not in by_name:
            self.tell(f"optimize: measuring kernels on {gpu}, a minute or two for a network; kept in {self.choices.folder}")
            seconds = {n: _seconds(partial(run, c)) for n, c in by_name.items()}
            name = min(seconds, key=seconds.__getitem__)
            self.choices.put(question, name, seconds)
        return by_name[name]


def _seconds(run: Callable[[], object]) -> float:
    """Of one launch within a graph, so that what the CPU takes doesn't count; infinite where the configuration doesn't fit."""
    from triton.runtime.errors import OutOfResources

    try:
        run()
    except OutOfResources:
        return float("inf")
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        graph.capture_begin(capture_error_mode="thread_local")  # other threads go on copying images
        for _ in range(LAUNCHES):
            run()
        graph.capture_end()
        taken = []
        for _ in range(REPLAYS):
            start.record(stream)
            graph.replay()
            end.record(stream)
            end.synchronize()
            taken.append(1e-3 * start.elapsed_time(end) / LAUNCHES)
    return min(taken)


class Triton(Torch):
    """Each step by its kernel; tensors between steps are (N, C, H, W) views of (N, H, W, C) ones."""

    def __init__(self, tune: Tuner, mean: Tensor, inv_std: Tensor) -> None:
        """mean, inv_std: (3,) float32, of uint8 pixels."""
        self.tune, self.mean, self.inv_std = tune, mean, inv_std

    def stem(self, step: Stem, x: Tensor) -> Tensor:
        from triscale.kernels.stem import configs, stem

        n, channels, height, width = x.shape
        if channels != 3:
            return super().stem(step, x)
        as_is = x.is_floating_point()  # normalised already
        mean, inv_std = (torch.zeros_like(self.mean), torch.ones_like(self.inv_std)) if as_is else (self.mean, self.inv_std)
        window, rows = step.window, _nhwc(x)

        def run(config: Any) -> Tensor:
            pad = window.pad(height, width)
            return stem(rows, step.weight, step.bias, mean, inv_std, stride=window.stride, pad=pad, act=step.act, config=config)

        sizes = {"n": n, "height": height, "width": width, "weight": list(step.weight.shape), "stride": window.stride, "uint8": not as_is}
        return _nchw(run(self.tune("stem", sizes, lambda: configs(*window.out(height, width)), run)))

    def depthwise(self, step: Depthwise, x: Tensor) -> tuple[Tensor, Tensor | None]:
        from triscale.kernels.depthwise import SIZES, depthwise
        from triscale.kernels.tiling import Shape, configs

        window, rows = step.window, _nhwc(x)
        if window.kernel not in SIZES:
            return super().depthwise(step, x)
        n, height, width, channels = rows.shape
        pad = window.pad(height, width)
        shape = Shape(n, height, width, channels, window.kernel, window.stride, pad)

        def run(config: Any) -> tuple[Tensor, Tensor | None]:
            return depthwise(rows, step.weight, step.bias, stride=window.stride, pad=pad, act=step.act, pool=step.pool, config=config)

        sizes = {"n": n, "height": height, "width": width, "weight": list(step.weight.shape), "stride": window.stride, "pool": step.pool}
        y, sums = run(self.tune("depthwise", sizes, lambda: configs(shape), run))
        return _nchw(y), sums

    def squeeze(self, step: Squeeze, sums: Tensor, places: int) -> Tensor:
        from triscale.kernels.squeeze import configs, squeeze

        n, parts, channels = sums.shape
        squeezed = step.w1.shape[0]

        def run(config: Any) -> Tensor:
            return squeeze(sums, places, step.w1, step.b1, step.w2, step.b2, act=step.act, config=config)

        sizes = {"n": n, "parts": parts, "channels": channels, "squeezed": squeezed}
        return run(self.tune("squeeze", sizes, lambda: configs(n, parts, channels, squeezed), run))

    def pointwise(self, x: Tensor, step: Expand | Project | Head, gate: Tensor | None, residual: Tensor | None) -> Tensor:
        return _nchw(self._product(x, step, gate, residual))

    def head(self, step: Head, x: Tensor) -> Tensor:
        if step.weight is None:
            return x.float().mean((2, 3))
        return self._product(x, step, None, None, pool=True).sum(1) / (x.shape[2] * x.shape[3])

    def _product(self, x: Tensor, step: Expand | Project | Head, gate: Tensor | None, residual: Tensor | None, *, pool: bool = False) -> Tensor:
        from triscale.kernels.pointwise import pointwise
        from triscale.kernels.pointwise_tiles import configs

        weight, bias, rows = step.weight, step.bias, _nhwc(x)
        assert weight is not None
        assert bias is not None
        n, height, width, cin = rows.shape
        other = None if residual is None else _nhwc(residual)

        def run(config: Any) -> Tensor:
            return pointwise(rows, weight, bias, act=step.act, gate=gate, residual=other, pool=pool, config=config)

        cout, gated = weight.shape[1], gate is not None
        options = partial(configs, n * height * width, height * width, cin, cout, gated=gated, pool=pool, shared=self.tune.shared)
        sizes = {"n": n, "height": height, "width": width, "cin": cin, "cout": cout, "gated": gated, "residual": other is not None, "pool": pool}
        return run(self.tune("pointwise", sizes, options, run))


def _nhwc(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).contiguous()


def _nchw(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


@dataclass(frozen=True)
class Captured:
    """A graph that computes `out` from `x`, both of which stay where they are."""

    graph: torch.cuda.CUDAGraph
    x: Tensor
    out: Tensor


class GPU:
    """Computes `net`, in evaluation mode: (N, C, H, W) float, or uint8 pixels, -> logits float32. dtype: bfloat16 or float16.

    pixels: mean and std of uint8 pixels. Several threads and streams may call at once; their work is done in turn.
    """

    def __init__(self, net: ConvNet, dtype: torch.dtype, tell: Tell, pixels: tuple[Sequence[float], Sequence[float]] | None = None) -> None:
        self.dtype, self.device = dtype, next(net.parameters()).device
        self.steps = lower(net, dtype)
        self.used = (f"kernels {str(dtype).removeprefix('torch.')}",)
        self.takes_pixels = pixels is not None and net.in_channels == 3 and dtype == torch.bfloat16  # as the stem's kernel does
        mean, std = (torch.tensor(v, device=self.device) for v in pixels or ((0.0,) * 3, (1.0,) * 3))
        self.engine = Triton(Tuner(self.device, dtype, tell), mean, 1 / std)
        self.graphs: OrderedDict[tuple[object, ...], Captured] = OrderedDict()
        self.lock = threading.Lock()
        self.done: torch.cuda.Event | None = None
        self.pool: Any = None

    def __call__(self, x: Tensor) -> Tensor:
        if not x.is_cuda:
            return self._run(x if x.dtype == torch.uint8 else x.to(self.dtype))
        with self.lock, torch.cuda.device(self.device):
            stream = torch.cuda.current_stream()
            if self.done is not None:
                stream.wait_event(self.done)  # another stream may still work in the graphs' memory
            captured = self._captured(x)
            captured.x.copy_(x)
            captured.graph.replay()
            out = captured.out.clone()
            self.done = stream.record_event()
            return out

    def _run(self, x: Tensor) -> Tensor:
        return execute(self.engine, self.steps, x)

    def _captured(self, x: Tensor) -> Captured:
        key = (*x.shape, x.dtype == torch.uint8)
        if key in self.graphs:
            self.graphs.move_to_end(key)
            return self.graphs[key]
        while len(self.graphs) >= GRAPHS:
            self.graphs.popitem(last=False)
        # Not inference tensors, or they couldn't be written to outside inference mode.
        with torch.inference_mode(False), torch.no_grad():
            static = torch.empty_like(x, dtype=torch.uint8 if x.dtype == torch.uint8 else self.dtype, memory_format=torch.channels_last)
            static.copy_(x)
            self._run(static)  # measures and compiles
            side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self._run(static)  # cuDNN and cuBLAS take their workspaces
            torch.cuda.current_stream().wait_stream(side)
            self.pool = self.pool or torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                out = self._run(static)
        self.graphs[key] = Captured(graph, static, out)
        return self.graphs[key]
