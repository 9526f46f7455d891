"""How long a callable takes, measured so that it can be quoted.

The protocol of the paper's Table 4: batch 1, one CPU thread, the average of 20 runs. Quote the median where the machine
is shared; mean and spread are given beside it.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from triscale.architecture import Arch
from triscale.model import build


@dataclass(frozen=True)
class Timing:
    """Seconds of each run, in order."""

    runs: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.runs)

    @property
    def spread(self) -> float:
        """Sample standard deviation; 0 for one run."""
        return statistics.stdev(self.runs) if len(self.runs) > 1 else 0.0

    @property
    def median(self) -> float:
        return statistics.median(self.runs)

    def percentile(self, p: float) -> float:
        """The run below which p percent lie (nearest rank)."""
        ordered = sorted(self.runs)
        return ordered[max(0, math.ceil(p / 100 * len(ordered)) - 1)]


def set_threads(count: int | None) -> None:
    """torch's intra-operator threads; None leaves them. Raises ValueError below 1 or above the machine's cores."""
    cores = os.cpu_count() or 1
    if count is None:
        return
    if not 1 <= count <= cores:
        raise ValueError(f"threads: expected 1 to {cores}, this machine's cores, found {count}")
    torch.set_num_threads(count)


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """torch's intra-operator threads set to `count` inside, put back after; None leaves them."""
    before = torch.get_num_threads()
    set_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _synchronise(device: str | None) -> None:
    """Waits for the device; None for the accelerator that is current, where there is one. A CPU has nothing to wait for."""
    if device is None and torch.accelerator.is_available():
        torch.accelerator.synchronize()
    elif device is not None and torch.device(device).type != "cpu":
        torch.accelerator.synchronize(torch.device(device))


def time_callable(
    run: Callable[[], object], *, runs: int = 20, warmup: int = 3, threads_used: int | None = None, device: str | None = None
) -> Timing:
    """`runs` timed calls after `warmup` untimed ones, with `device`, else the current accelerator, synchronised around each."""
    return time_in_turn({"": run}, runs=runs, warmup=warmup, threads_used=threads_used, device=device)[""]


def time_in_turn(
    calls: Mapping[str, Callable[[], object]], *, runs: int = 20, warmup: int = 3, threads_used: int | None = None, device: str | None = None
) -> dict[str, Timing]:
    """Several callables in turn, A B C A B C ..., so that a machine whose speed drifts treats them alike."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    with threads(threads_used):
        for call in calls.values():
            for _ in range(warmup):
                call()
        for _ in range(runs):
            for name, call in calls.items():
                _synchronise(device)
                start = time.perf_counter()
                call()
                _synchronise(device)
                taken[name].append(time.perf_counter() - start)
    return {name: Timing(tuple(values)) for name, values in taken.items()}


def forward_call(net: nn.Module, x: Tensor) -> Callable[[], object]:
    """A call of `net` on `x` in evaluation mode, channels-last, without autograd."""
    net = net.eval().to(memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last)

    def call() -> object:
        with torch.inference_mode():
            return net(x)

    return call


def measure_arch(arch: Arch, *, batch: int = 1, runs: int = 20, threads_used: int = 1, num_classes: int = 1000) -> float:
    """Median seconds of one forward pass of the Arch on the CPU: what `fit_budget(..., measure=measure_arch)` takes."""
    call = forward_call(build(arch, num_classes), torch.randn(batch, 3, arch.resolution, arch.resolution))
    return time_callable(call, runs=runs, threads_used=threads_used).median
