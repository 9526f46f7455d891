"""Time of calls on a device: CUDA events on a GPU, the host's clock on a CPU; in turn, after a warm-up, in groups long enough to time."""

import gc
import statistics
import time

import torch

GROUP_MS = 5.0  # a sample is that long at least: an event's own time is a microsecond
NETWORK_MS = 50.0  # of whole networks, whose clocks differ from one call to the next
WARM_UP = 3  # calls at least
WARM_MS = 200.0  # on a GPU: its clock rises from idle while it works, and falls while the host compiles
WINDOWS = []  # (start, end) of what was timed, in seconds of time.time(): clocks.py reads the GPU's clocks of them


def synchronise(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(call, device, times=1):
    """Milliseconds from the first to the last of `times` calls: on the device's own clock, so that the host's delays beyond them stay out."""
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(times):
            call()
        return 1e3 * (time.perf_counter() - start)
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(times):
        call()
    last.record()
    last.synchronize()
    return first.elapsed_time(last)


def waited(call, device):
    """Milliseconds on the host's clock until the result of one call is there: what a caller waits."""
    synchronise(device)
    start = time.perf_counter()
    call()
    synchronise(device)
    return 1e3 * (time.perf_counter() - start)


def warm_up(call, device):
    """WARM_UP calls, and on a GPU as many more as take WARM_MS. The first may compile: its time doesn't count."""
    call()
    synchronise(device)
    start, made = time.perf_counter(), 1
    while made < WARM_UP or (device.type == "cuda" and 1e3 * (time.perf_counter() - start) < WARM_MS):
        call()
        made += 1
        if made % WARM_UP == 0:
            synchronise(device)
    synchronise(device)


def in_turn(calls, device, *, runs=10, least_runs=3, seconds=float("inf"), latency=False, group_ms=None):
    """{name: ms of each run} of the calls, A B C A B C ..., each warmed up first; a run is the mean of a group of calls.

    seconds: no round is begun after that, but `least_runs` are made. latency: each run is one call, waited for. group_ms: how long a
    group is at least, GROUP_MS unless given.
    """
    groups = {}
    for name, call in calls.items():
        warm_up(call, device)
        groups[name] = 1 if latency else max(1, round((group_ms or GROUP_MS) / max(timed(call, device), 1e-3)))
    found = {name: [] for name in calls}
    start, began = time.perf_counter(), time.time()
    for i in range(runs):
        if i >= least_runs and time.perf_counter() - start > seconds:
            break
        for name, call in calls.items():
            found[name].append(waited(call, device) if latency else timed(call, device, groups[name]) / groups[name])
    WINDOWS.append((began, time.time()))
    return found


def columns(runs_ms):
    """The columns record.TIMES of one call's runs."""
    return {"ms": statistics.median(runs_ms), "ms_min": min(runs_ms), "ms_max": max(runs_ms), "runs": len(runs_ms)}


def together(calls, device):
    """One call that makes all of `calls`: on a GPU a CUDA graph of them, so that launches leave no gaps. They must be warm."""
    if device.type != "cuda":
        return lambda: [call() for call in calls]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for call in calls]
    return lambda: (graph.replay(), kept)[0]  # kept: the results would otherwise share memory, and stay in the cache


def forget(device):
    """Gives memory of a GPU back that nothing holds any more."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def held(device):
    """Bytes that torch has of the device's memory now, after what nothing holds was given back; 0 on a CPU."""
    forget(device)
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else 0


def peak_of(call, device):
    """(result, bytes that torch had of the device's memory at most during the call, graphs' pools included; None on a CPU).

    Of what was reserved, since a graph's replay allocates nothing.
    """
    if device.type != "cuda":
        return call(), None
    torch.cuda.synchronize(device)
    forget(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = call()
    torch.cuda.synchronize(device)
    return result, torch.cuda.max_memory_reserved(device)
