"""The fastest configuration of each kernel for each of its sizes, measured on the GPU once and kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from triscale.inference.notices import Tell
from triscale.inference.tuning import Choices
from triscale.kernels.machine import interpreted, shared_memory

TRIED = 4  # of each kernel's configurations, the likely fastest first: each is compiled, which takes the better part of a second
LAUNCHES, REPLAYS = 10, 5  # of each configuration when it is measured


def not_compiled() -> tuple[type[BaseException], ...]:
    """What Triton raises where a kernel doesn't compile or needs more than the GPU has."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    return CompilationError, OutOfResources, PTXASError


class Tuner:
    """The configuration of a kernel for given sizes: from memory, from disk, measured now, or, where `measures` is False or the
    stream is being captured, the likely fastest."""

    def __init__(self, device: torch.device, dtype: torch.dtype, tell: Tell) -> None:
        self.device, self.dtype, self.tell = device, dtype, tell
        self.measures = True
        self.choices = Choices(tell)
        self.found: dict[str, Any] = {}
        self.shared = shared_memory(device)

    def __call__(self, kernel: str, sizes: Mapping[str, Any], configs: Callable[[], Sequence[Any]], run: Callable[[Any], object]) -> Any:
        """One of `configs()`, where the likely fastest come first; None for the kernel's own choice. Raises one of `not_compiled`
        where none compiles."""
        if interpreted():
            return _fewest_programs(kernel, sizes, configs)
        key = f"{kernel} {sizes}"
        if key not in self.found:
            config, certain = self._find({"kernel": kernel, **sizes}, configs()[:TRIED], run)
            if not certain:
                return config
            self.found[key] = config
        return self.found[key]

    def _find(self, question: Mapping[str, Any], configs: Sequence[Any], run: Callable[[Any], object]) -> tuple[Any, bool]:
        """The configuration, and whether it is the fastest as far as is known."""
        import triton

        by_name = {str(c): c for c in configs}
        if len(by_name) == 1:
            return configs[0], True
        gpu = torch.cuda.get_device_name(self.device)
        question = {**question, "dtype": str(self.dtype), "gpu": gpu, "triton": triton.__version__}
        name = self.choices.get(question)
        if name in by_name:
            return by_name[name], True
        if not self.measures or (self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            return configs[0], False
        self.tell(f"optimize: measuring kernels on {gpu}, a minute or two for each new shape of images; kept in {self.choices.folder}")
        failures = self._compiled(by_name, run)
        if len(failures) == len(by_name):
            raise next(iter(failures.values()))
        seconds = {name: _seconds(partial(run, config)) for name, config in by_name.items() if name not in failures}
        name = min(seconds, key=seconds.__getitem__)
        self.choices.put(question, name, seconds)
        return by_name[name], True

    def _compiled(self, configs: Mapping[str, Any], run: Callable[[Any], object]) -> dict[str, BaseException]:
        """Compiles all at once, each in a thread, as Triton's compiler leaves Python alone; what didn't compile, by name."""

        def launch(config: Any) -> BaseException | None:
            with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
                try:
                    run(config)
                except not_compiled() as error:
                    return error
            return None

        with ThreadPoolExecutor(len(configs)) as pool:
            errors = dict(zip(configs, pool.map(launch, configs.values()), strict=True))
        return {name: error for name, error in errors.items() if error is not None}


def _fewest_programs(kernel: str, sizes: Mapping[str, Any], configs: Callable[[], Sequence[Any]]) -> Any:
    """For the interpreter, which takes its time by the program; None for the kernel's own choice."""
    if kernel == "pointwise":
        return max(configs(), key=lambda c: c.block_m * c.block_o)
    return replace(configs()[0], rows=sizes["height"], vector=4, warps=32) if kernel == "depthwise" else None


def _seconds(run: Callable[[], object]) -> float:
    """Of one launch within a graph, so that what the CPU takes doesn't count. No other capture may be under way in the process."""
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    graph = torch.cuda.CUDAGraph()
    taken = []
    with torch.cuda.stream(stream):
        graph.capture_begin(capture_error_mode="thread_local")  # other threads go on copying images
        try:
            for _ in range(LAUNCHES):
                run()
        finally:
            graph.capture_end()  # else the stream would go on capturing, and nothing could free memory
        for _ in range(REPLAYS):
            start.record(stream)
            graph.replay()
            end.record(stream)
            end.synchronize()
            taken.append(1e-3 * start.elapsed_time(end) / LAUNCHES)
    graph.reset()
    torch.cuda.empty_cache()  # the graph's own pool, which a later capture couldn't take back
    return min(taken)
