"""The GPU engine: the steps through the Triton kernels, in bfloat16 or float16, captured in a CUDA graph for each input shape.

Dense convolutions and max pools go to cuDNN; the classifier is float32. Each kernel's configuration is measured once for each
of its shapes and kept on disk. The logits of each shape's first images are held to the network's own (relative L2 error 5e-2, or
twice its own error in this arithmetic where that was asked for); the network itself runs where they differ. Under Triton's
interpreter the same runs on CPU tensors, without graphs and measurements.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from triscale.inference.agreement import agree, comparable, no_worse
from triscale.inference.executor import execute
from triscale.inference.kernel_steps import Triton
from triscale.inference.kernel_tuning import Tuner
from triscale.inference.lowering import lower, plain_kinds
from triscale.inference.notices import Tell
from triscale.inference.steps import Plain
from triscale.model import ConvNet
from triscale.text import first_line

GRAPHS = 8  # input shapes whose graphs are kept, with their memory
SHAPES = 4  # whose kernels are measured; those of others take the likely fastest configuration, or one that is known
COMPARED = 8  # images of a first batch
_CAPTURES = threading.Lock()  # torch allows one capture at a time in a process, and measuring captures too


@dataclass(frozen=True)
class Captured:
    """A graph that computes `out` from `x`, both of which stay where they are."""

    graph: torch.cuda.CUDAGraph
    x: Tensor
    out: Tensor


class GPU:
    """Computes `net`, in evaluation mode: (N, C, H, W) float, or uint8 pixels, -> logits float32. dtype: bfloat16 or float16.

    net: nobody else's. pixels: mean and std of uint8 pixels. asked: the user wants this dtype, so the network's own error in it
    passes. measure: False for likely configurations, where no better are known. Several threads and streams may call at once; their
    work is done in turn. Within a capture of the caller's nothing is measured or compared.
    """

    def __init__(
        self,
        net: ConvNet,
        dtype: torch.dtype,
        tell: Tell,
        pixels: tuple[Sequence[float], Sequence[float]] | None = None,
        *,
        asked: bool = False,
        measure: bool = True,
    ) -> None:
        weight = next(net.parameters())
        self.net, self.dtype, self.tell, self.given, self.device = net, dtype, tell, weight.dtype, weight.device
        self.asked, self.measure = asked, measure
        self.steps = lower(net, dtype)
        self.plain = plain_kinds(self.steps)
        self.used: tuple[str, ...] = (f"kernels {str(dtype).removeprefix('torch.')}",)
        self.takes_pixels = pixels is not None and net.in_channels == 3 and dtype == torch.bfloat16  # as the stem's kernel does
        self.mean, std = (torch.tensor(v, dtype=torch.float32, device=self.device) for v in pixels or ((0.0,) * 3, (1.0,) * 3))
        self.engine = Triton(Tuner(self.device, dtype, tell), self.mean, 1 / std)
        self.capturable = all(_ours(step) for step in self.steps)
        self.failed = False
        self.seen, self.too_large = set[tuple[object, ...]](), set[tuple[object, ...]]()
        self.graphs: OrderedDict[tuple[object, ...], Captured] = OrderedDict()
        self.lock = threading.Lock()
        self.done: torch.cuda.Event | None = None
        self.streams: tuple[torch.cuda.Stream, torch.cuda.Stream] | None = None  # to warm up and to capture on

    def __call__(self, x: Tensor) -> Tensor:
        if self.failed:
            return self._by_network(x)
        if not x.is_cuda:
            return self._first(x) if self._key(x) not in self.seen else self._run(x)
        if torch.cuda.is_current_stream_capturing():
            return self._run(x)
        with self.lock, torch.cuda.device(self.device):
            return self._replayed(x)

    def _replayed(self, x: Tensor) -> Tensor:
        if self.failed:  # while this call waited
            return self._by_network(x)
        stream = torch.cuda.current_stream()
        if self.done is not None:
            stream.wait_event(self.done)  # another stream may still work in the graphs' memory
        if self._key(x) not in self.seen:
            with _CAPTURES:
                out = self._first(x)
            if self.failed or not self.capturable:
                return out
        if not self.capturable or self._key(x) in self.too_large:
            return self._run(x)
        try:
            captured = self._captured(x)
        except torch.OutOfMemoryError:
            self.graphs.clear()
            self.too_large.add(self._key(x))
            torch.cuda.empty_cache()
            self.tell(f"optimize: no memory for a CUDA graph of {tuple(x.shape)}; such batches run without one")
            return self._run(x)
        captured.x.copy_(x)
        captured.graph.replay()
        out = captured.out.clone()
        self.done = stream.record_event()
        return out

    def _first(self, x: Tensor) -> Tensor:
        """A shape's first batch: compiles, measures, and compares with the network, which runs from now on if they differ."""
        self.engine.tune.measures = self.measure and len(self.seen) < SHAPES
        try:
            out = self._run(x)
        except (torch.OutOfMemoryError, Warning):
            raise
        except Exception as error:  # of Triton, its compiler or the driver, of many kinds
            return self._give_up(x, f"the kernels don't run here ({first_line(error)})")
        finally:
            self.engine.tune.measures = False
        expected = self._by_network(x[:COMPARED])
        if not self._holds(out[:COMPARED], expected, x[:COMPARED]):
            return self._give_up(x, f"in {str(self.dtype).removeprefix('torch.')} the kernels give other logits than the network")
        if bool(comparable(expected).any()):
            self.seen.add(self._key(x))
        return out

    def _holds(self, logits: Tensor, expected: Tensor, x: Tensor) -> bool:
        return agree(logits, expected, self.dtype) or (self.asked and no_worse(logits, expected, self.net, self._floats(x), self.dtype))

    def _give_up(self, x: Tensor, why: str) -> Tensor:
        self.failed, self.used = True, ("plain",)
        self.graphs.clear()
        self.tell(f"optimize: {why}; the network runs as it is")
        return self._by_network(x)

    def _by_network(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.net(self._floats(x).to(self.given))).float()

    def _floats(self, x: Tensor) -> Tensor:
        return self.engine.normalised(x) if x.dtype == torch.uint8 else x

    def _run(self, x: Tensor) -> Tensor:
        return execute(self.engine, self.steps, x if x.dtype == torch.uint8 else x.to(self.dtype))

    def _key(self, x: Tensor) -> tuple[object, ...]:
        return (*x.shape, x.dtype == torch.uint8)

    def _captured(self, x: Tensor) -> Captured:
        key = self._key(x)
        if key in self.graphs:
            self.graphs.move_to_end(key)
            return self.graphs[key]
        if len(self.graphs) >= GRAPHS and self.done is not None:
            self.done.synchronize()  # its memory may be read yet, on a stream that it doesn't belong to
            self.graphs.popitem(last=False)
        # Not inference tensors, or they couldn't be written to outside inference mode.
        with _CAPTURES, torch.inference_mode(False), torch.no_grad():
            static = torch.empty_like(x, dtype=torch.uint8 if x.dtype == torch.uint8 else self.dtype, memory_format=torch.channels_last)
            static.copy_(x)
            # Of this device, where torch's own is of whichever came first. The same for all shapes, or their graphs couldn't share a
            # pool; and another than the one to warm up on, or cuBLAS's workspace would lie outside it, for others to free.
            self.streams = self.streams or (torch.cuda.Stream(self.device), torch.cuda.Stream(self.device))  # type: ignore[no-untyped-call]
            side, own = self.streams
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self._run(static)
            torch.cuda.current_stream().wait_stream(side)
            pool = next((captured.graph.pool() for captured in self.graphs.values()), None)  # a pool lives as long as a graph has it
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=own, capture_error_mode="thread_local"):
                out = self._run(static)
        self.graphs[key] = Captured(graph, static, out)
        return self.graphs[key]


def _ours(step: object) -> bool:
    """Whether a graph may capture the step: a module that somebody else wrote may do anything, once only."""
    modules = step.module.modules() if isinstance(step, Plain) else ()
    return all(type(m).__module__.startswith(("triscale.", "torch.nn.")) for m in modules)
