"""The GPU benchmarks, without a GPU: counts and predictions, how time is taken, which batch sizes are tried."""

import itertools
import os
import time
from functools import partial

import pytest
import torch
from gpu_bench import CPU, NETWORKS, steps
from hypothesis import given
from hypothesis import strategies as st

import triscale as ts
from benchmarks.gpu import (
    clocks,
    counting,
    depthwise,
    machine,
    timing,
)
from benchmarks.gpu.sweep import best_batch, sweep

# ---- counts


@pytest.mark.parametrize(
    ("name", "megabytes", "bound"),
    # What was counted from timm's modules before ours existed: B0 27.4 MB; 146k, 19.0k and 3.07k images/s.
    [("b0", 27.4, 146311), ("b4", 204.2, 18976), ("b7", 1208.3, 3067)],
)
def test_bytes_and_bounds_are_those_counted_before(name, megabytes, bound):
    assert counting.total(steps(name), lambda s: s.maps) / 1e6 == pytest.approx(megabytes, abs=0.05)
    assert counting.bound(steps(name)) == pytest.approx(bound, abs=0.5)


@pytest.mark.parametrize("name", [*NETWORKS, "b1"])
def test_multiply_adds_are_the_cost_models(name):
    arch = ts.arch(f"efficientnet_{name}")
    classifier = arch.out_channels * 1000
    assert counting.total(steps(name), lambda s: s.matrix + s.vector) == ts.cost(arch).macs - classifier


@pytest.mark.parametrize("name", NETWORKS)
def test_each_step_takes_what_the_one_before_left(name):
    maps = [s for s in steps(name) if s.maps]
    assert all(a.out == b.source for a, b in itertools.pairwise(maps))
    assert len({s.key for s in steps(name)}) == len(steps(name))
    arch = ts.arch(f"efficientnet_{name}")
    kinds = {kind: counting.total([s for s in steps(name) if s.kind == kind], lambda s: 1) for kind in ("depthwise", "squeeze", "project", "expand")}
    blocks = list(arch.blocks())
    assert kinds == {k: len(blocks) for k in ("depthwise", "squeeze", "project")} | {"expand": sum(b.stage.expand != 1 for b in blocks)}
    assert sum(s.times for s in steps(name) if s.residual) == sum(b.shortcut == "identity" for b in blocks)


def test_one_block_by_hand():
    """B0's first block of stage 3: 112 px, 16 channels -> 96 -> 56 px -> 24."""
    found = {s.key: s for s in steps("b0")}
    assert found["3.1 expand"].maps == 2 * 112 * 112 * (16 + 96)
    assert found["3.1 depthwise"].maps == 2 * 96 * (112 * 112 + 56 * 56)
    assert found["3.1 depthwise"].vectors == 4 * 96
    assert (found["3.1 squeeze"].bytes, found["3.1 squeeze"].squeezed) == (2 * 4 * 96, 4)
    assert (found["3.1 project"].maps, found["3.1 project"].residual) == (2 * 56 * 56 * (96 + 24), False)
    assert found["3.2 project"].maps == 2 * 56 * 56 * (144 + 24 + 24)


def test_an_images_bytes_are_its_types():
    stem, *rest = (counting.steps(ts.arch("efficientnet_b0"), pixel=n)[0].maps for n in (1, 2))
    assert [rest[0] - stem, stem] == [224 * 224 * 3, 224 * 224 * 3 + 2 * 112 * 112 * 32]


def test_launches_and_the_squeezes_weights_take_time():
    found = steps("b0")
    assert counting.launches(found) == 65 + 6
    squeezes = [s for s in found if s.kind == "squeeze"]
    weights = sum(2 * 4 * b.inner * b.squeezed for b in ts.arch("efficientnet_b0").blocks())  # two matrices in fp32
    assert counting.total(squeezes, lambda s: s.cached) == weights == pytest.approx(2.5e6, rel=0.01)
    assert {counting.predicted(s, {})[1] for s in squeezes} == {"cache"}
    whole = counting.total(found, lambda s: counting.predicted(s, {})[0])
    assert counting.rate(found, {}, 10) == pytest.approx(10 / (10 * whole + 71 * 1.5e-6))


@pytest.mark.parametrize(("name", "batch"), [("b0", 1024), ("b4", 256), ("b7", 64)])
def test_a_largest_map_has_no_more_than_2_31_elements(name, batch):
    assert counting.largest_batch(steps(name)) == batch
    most = max(counting.elements(s.out) for s in steps(name))
    assert batch * most <= 2**31 < 2 * batch * most


def test_a_prediction_is_the_longest_of_its_limits():
    found = {s.key: s for s in steps("b0")}
    step = found["3.2 depthwise"]
    assert counting.predicted(step, {}) == (pytest.approx(step.bytes / (0.7 * 4.3e12)), "bytes")
    seconds, limit = counting.predicted(step, {"depthwise 3x3 s1": 100.0})
    assert limit == "instructions"
    assert seconds == pytest.approx(56 * 56 * 144 * 100 / (0.7 * 132 * 128 * 1.755e9))
    assert counting.predicted(step, {"depthwise 3x3 s1": 1.0})[1] == "bytes"
    assert {counting.predicted(s, {})[1] for s in steps("b7")} == {"bytes", "matrix", "cache"}


def test_other_networks_are_refused():
    with pytest.raises(ValueError, match="resnet50: expected"):
        counting.steps(ts.arch("resnet50"))
    with pytest.raises(ValueError, match="expected mbconv blocks, found separable"):
        counting.steps(ts.Arch(ts.Stem(), (ts.Stage("separable", 3, 1, 1, 0, "none", 8, 1),), ts.Head(), 32))


def test_depthwise_shapes_are_the_familys():
    found = depthwise.shapes()
    assert len(set(found)) == len(found)
    assert {(32, 112, 3, 1), (1152, 7, 5, 1), (3840, 19, 3, 1)} <= set(found)
    assert depthwise.counted(96, 9, 2) == 2 * 96 * (81 + 25)


# ---- time and batch sizes


def test_time_is_the_calls_own():
    assert 30 <= timing.timed(partial(time.sleep, 0.01), CPU, 3) < 60
    assert 10 <= timing.waited(partial(time.sleep, 0.01), CPU) < 40
    assert timing.columns([3.0, 1.0, 2.0]) == {"ms": 2.0, "ms_min": 1.0, "ms_max": 3.0, "runs": 3}


def test_calls_take_turns(monkeypatch):
    order = []
    calls = {name: partial(order.append, name) for name in "ab"}
    found = timing.in_turn(calls, CPU, runs=5, latency=True)
    assert order == ["a"] * timing.WARM_UP + ["b"] * timing.WARM_UP + ["a", "b"] * 5
    assert {name: len(runs) for name, runs in found.items()} == {"a": 5, "b": 5}
    assert len(timing.in_turn(calls, CPU, runs=50, least_runs=3, seconds=0)["a"]) == 3
    monkeypatch.setattr(timing, "GROUP_MS", 30.0)
    order.clear()
    found = timing.in_turn({"": lambda: (order.append(""), time.sleep(0.01))}, CPU, runs=2)[""]
    assert all(10 <= ms < 30 for ms in found)  # of one call, though three were timed together
    assert len(order) >= timing.WARM_UP + 1 + 2 * 2


class Clock:
    """Stands in for a GPU's time: a call takes 30 ms of it."""

    def __init__(self, monkeypatch):
        self.now, self.calls = 0.0, 0
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(timing, "synchronise", lambda device: None)

    def __call__(self):
        self.now, self.calls = self.now + (5.0 if self.calls == 0 else 0.03), self.calls + 1


def test_a_gpu_is_warmed_up_by_time(monkeypatch):
    """The first call, which compiles for seconds, doesn't count."""
    clock = Clock(monkeypatch)
    timing.warm_up(clock, torch.device("cuda"))
    assert clock.calls == 1 + 7
    timing.warm_up(clock, CPU)
    assert clock.calls == 8 + timing.WARM_UP


LINES = """2026/11/21 18:00:00.100, 345, 3201, 80.50, 31, 0x0000000000000001
2026/11/21 18:00:01.000, 1980, 3201, 500.00, 60, 0x0000000000000000
2026/11/21 18:00:01.200, 1500, 3201, 700.00, 64, 0x0000000000000004
2026/11/21 18:00:01.400, [N/A], 3201, 700.00, 64, 0x0000000000000004
no line of its own
2026/11/21 18:00:01.600, 1700, 3201, 690.00, 63, 0x0000000000000024
""".splitlines()


def test_clocks_are_those_while_something_was_timed():
    start = time.mktime((2026, 11, 21, 18, 0, 1, 0, 0, -1))
    assert clocks.summary(LINES, [(start, start + 0.7)]) == {
        **{"samples": 3, "sm_mhz": 1700.0, "sm_mhz_min": 1500.0, "sm_mhz_max": 1980.0, "memory_mhz": 3201.0, "watts_max": 700.0, "degrees_max": 64.0},
        "lowered": {"power limit": 0.667, "software thermal slowdown": 0.333},
    }
    assert clocks.summary(LINES, [(start + 60, start + 61)]) == {}
    sampler = clocks.Sampler(["sh", "-c", f"echo '{LINES[1]}'; exec sleep 60"]).start()
    for _ in range(50):
        if sampler.summary([(start, start + 1)]):
            break
        time.sleep(0.1)
    sampler.stop()
    assert sampler.summary([(start, start + 1)])["sm_mhz"] == 1980
    assert clocks.Sampler(["no-such-program"]).start().summary([(start, start + 1)]) == {}


def test_an_smi_that_hangs_says_nothing(tmp_path, monkeypatch):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexec sleep 60\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(machine, "SMI_S", 0.3)
    assert machine.smi() == {}


def test_together_makes_all_calls():
    made = []
    timing.together([partial(made.append, i) for i in range(3)], CPU)()
    assert made == [0, 1, 2]


def rates(table, memory=None, refused=None):
    def measure(batch):
        if memory is not None and batch >= memory:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        if refused is not None and batch >= refused:
            raise RuntimeError("cuDNN error: NOT_SUPPORTED\nmore")
        return table(batch)

    return measure


def test_a_sweep_ends_where_memory_does():
    found, ended = sweep(rates(float, memory=64), 8)
    assert found == {8: 8.0, 16: 16.0, 32: 32.0}
    assert ended == "out of memory at batch 64"
    assert best_batch(found) == 32
    assert sweep(rates(float, memory=8), 8) == ({}, "out of memory at batch 8")


def test_a_sweep_ends_without_gain():
    found, ended = sweep(rates(lambda n: min(n, 32) * (1 + n / 1e6)), 4)
    assert list(found) == [4, 8, 16, 32, 64, 128]
    assert ended == "no gain above batch 32"
    assert best_batch(found) == 32
    dip = {4: 10.0, 8: 9.0, 16: 20.0, 32: 20.1, 64: 20.2}
    assert sweep(rates(dip.__getitem__), 4) == (dip, "no gain above batch 16")  # one dip is not the end


def test_a_sweep_ends_where_a_library_refuses():
    assert sweep(rates(float, refused=32), 8)[1] == "refused at batch 32: RuntimeError: cuDNN error: NOT_SUPPORTED"
    with pytest.raises(RuntimeError, match="cuDNN"):
        sweep(rates(float, refused=8), 8)
    assert sweep(float, 8, most=16) == ({8: 8.0, 16: 16.0}, "largest batch 16")
    times = iter([True, False])
    assert sweep(float, 8, left=lambda: next(times)) == ({8: 8.0}, "no time for batch 16")


@given(st.lists(st.floats(1, 1e5), min_size=1, max_size=8), st.integers(1, 3))
def test_the_best_batch_is_within_the_noise_of_the_best_rate(table, patience):
    found, _ = sweep(lambda n: table[n.bit_length() - 1], 1, most=1 << (len(table) - 1), patience=patience)
    assert list(found) == [1 << i for i in range(len(found))]
    best = best_batch(found)
    assert found[best] * 1.02 >= max(found.values())
    assert all(found[n] * 1.02 < max(found.values()) for n in found if n < best)
