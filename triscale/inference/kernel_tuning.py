"""The fastest configuration of each kernel for each of its sizes, measured on the GPU once and kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch

from triscale.inference.notices import Tell
from triscale.inference.tuning import Choices
from triscale.kernels.machine import interpreted, shared_memory
from triscale.text import first_line

TRIED = 4  # of each kernel's configurations, the likely fastest first: each is compiled, which takes the better part of a second
T = TypeVar("T")
LAUNCHES, REPLAYS = 10, 5  # of each configuration when it is measured


class NoConfigurationError(RuntimeError):
    """No configuration of a kernel compiles and runs for these sizes here."""


class Tuner:
    """Runs a kernel in its fastest configuration: known from memory or disk, measured now, or, where `measures` is False or the
    stream is being captured, the likely fastest that runs."""

    def __init__(self, device: torch.device, dtype: torch.dtype, tell: Tell) -> None:
        self.device, self.dtype, self.tell = device, dtype, tell
        self.measures = True
        self.choices = Choices(tell)
        self.found: dict[str, Any] = {}
        self.likely: dict[str, Any] = {}
        self.shared = shared_memory(device)

    def __call__(self, kernel: str, sizes: Mapping[str, Any], configs: Callable[[], Sequence[Any]], run: Callable[[Any], T]) -> T:
        """What `run` gives for one of `configs()`, where the likely fastest come first. Raises NoConfigurationError."""
        if interpreted():
            return self._first([_fewest_programs(kernel, sizes, configs)], run)[1]
        key = f"{kernel} {sizes}"
        if key in self.found or (key in self.likely and not self.measures):
            return run(self.found[key] if key in self.found else self.likely[key])
        tried = configs()[:TRIED]
        name = self.choices.get(question := self._question(kernel, sizes)) if len(tried) > 1 else None
        by_name = {str(c): c for c in tried}
        capturing = self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if name in by_name or len(tried) < 2 or not self.measures or capturing:
            ahead = [by_name[name]] if name in by_name else []
            config, result = self._first([*ahead, *tried], run)
            (self.found if ahead or len(tried) < 2 else self.likely)[key] = config
            return result
        self.found[key] = by_name[self._fastest(question, by_name, run)]
        return run(self.found[key])

    def _question(self, kernel: str, sizes: Mapping[str, Any]) -> dict[str, Any]:
        import triton

        gpu = torch.cuda.get_device_name(self.device)
        return {"kernel": kernel, **sizes, "dtype": str(self.dtype), "gpu": gpu, "triton": triton.__version__}

    def _first(self, configs: Sequence[Any], run: Callable[[Any], T]) -> tuple[Any, T]:
        """The first that runs, and what it gives."""
        failure: Exception | None = None
        for config in configs:
            try:
                return config, run(config)
            except (torch.OutOfMemoryError, Warning):
                raise
            except Exception as error:  # the compiler's, the assembler's, the launcher's
                failure = error
        raise NoConfigurationError(first_line(failure) if failure else "no way to cut it that fits") from failure

    def _fastest(self, question: Mapping[str, Any], configs: Mapping[str, Any], run: Callable[[Any], object]) -> str:
        self.tell(f"optimize: measuring kernels on {question['gpu']}, a minute or two for each new shape of images; kept in {self.choices.folder}")
        failures = self._compiled(configs, run)
        seconds: dict[str, float] = {}
        for name, config in configs.items():
            if name not in failures:
                try:
                    seconds[name] = _seconds(partial(run, config))
                except torch.OutOfMemoryError:  # its graph needs more than a launch
                    torch.cuda.empty_cache()
        if len(failures) == len(configs):
            error = next(iter(failures.values()))
            raise NoConfigurationError(first_line(error)) from error
        if not seconds:
            return next(name for name in configs if name not in failures)
        name = min(seconds, key=seconds.__getitem__)
        self.choices.put(question, name, seconds)
        return name

    def _compiled(self, configs: Mapping[str, Any], run: Callable[[Any], object]) -> dict[str, Exception]:
        """Compiles all at once, each in a thread, as Triton's compiler leaves Python alone; what didn't run, by name."""

        def launch(config: Any) -> Exception | None:
            with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
                try:
                    run(config)
                except Warning:
                    raise
                except Exception as error:
                    return error
            return None

        with ThreadPoolExecutor(len(configs)) as pool:
            errors = dict(zip(configs, pool.map(launch, configs.values()), strict=True))
        for name, error in errors.items():
            if isinstance(error, torch.OutOfMemoryError):  # four outputs at once were too many
                torch.cuda.empty_cache()
                run(configs[name])
                errors[name] = None
        return {name: error for name, error in errors.items() if error is not None}


def _fewest_programs(kernel: str, sizes: Mapping[str, Any], configs: Callable[[], Sequence[Any]]) -> Any:
    """For the interpreter, which takes its time by the program; None for the kernel's own choice."""
    if kernel == "pointwise":
        return max(configs(), key=lambda c: c.block_m * c.block_o)
    return replace(configs()[0], rows=sizes["height"], vector=4, warps=32) if kernel == "depthwise" else None


def _seconds(run: Callable[[], object]) -> float:
    """Of one launch within a graph, so that what the CPU takes doesn't count. No other capture may be under way in the process."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # within a capture the allocator may not
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
