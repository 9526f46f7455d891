"""The GPU benchmarks, on a machine without one: counts, the parts' own logic, what travels, what is written."""

import importlib
import itertools
import json
import os
import subprocess
import sys
import tarfile
import time
import types
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from interpreter import DEVICE, HAVE_TRITON
from PIL import Image
from torch._inductor.utils import run_and_get_code

import triscale as ts
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import carrying, clocks, code, counting, depthwise, machine, ours, page, peers, record, suite, timing, worker
from benchmarks.gpu.decode import pictures
from benchmarks.gpu.parts import NEEDS, PARTS, chosen, missing, remaining
from benchmarks.gpu.sweep import best_batch, sweep
from triscale.data.normalising import normalise
from triscale.kernels.machine import Variant
from triscale.weights.model_file import ModelCard, save_model
from triscale.weights.open import open_model

CPU = torch.device("cpu")
NETWORKS = ("b0", "b4", "b7")
TIMES = {"ms": 1.0, "ms_min": 0.9, "ms_max": 1.1, "runs": 3}


def steps(name):
    return counting.steps(ts.arch(f"efficientnet_{name}"))


def part(name):
    return next(p for p in PARTS if p.name == name)


@pytest.fixture
def rehearsal(tmp_path, monkeypatch):
    """name -> a run of that part on the CPU."""
    monkeypatch.setattr(timing, "GROUP_MS", 0.01)
    return lambda name, found=None: worker.Run(part(name), 60.0, tmp_path, found or machine.Carried(), rehearsal=True)


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


# ---- parts


def test_parts_by_name_or_beginning():
    assert chosen([]) == list(PARTS)
    assert [p.name for p in chosen(["decode", "tests"])] == ["tests", "decode"]
    assert [p.name for p in chosen([])][:3] == ["ceilings", "latency-b0", "ours-b0"]
    assert [p.name for p in chosen(["peers-inference"])] == [f"peers-inference-{n}" for n in NETWORKS]
    assert len(chosen(["peers", "peers-training-b0"])) == 6
    with pytest.raises(ValueError, match=r"no part 'peer'; there are ceilings, latency-b0, ours-b0"):
        chosen(["peer"])
    for found in PARTS:
        module, function = found.runs.split(":")
        assert callable(getattr(importlib.import_module(f"benchmarks.gpu.{module}"), function))


def test_what_a_part_lacks():
    fine = dict.fromkeys(machine.MODULES, "")
    assert missing(part("decode"), machine.Carried(), fine) == ["a pack"]
    assert missing(part("decode"), machine.Carried(packs=(Path("x"),)), fine) == []
    assert missing(part("ours-top1"), machine.Carried(), fine) == ["a pack", "weights"]
    broken = fine | {"timm": "ModuleNotFoundError: No module named 'torchvision'", "hypothesis": "x"}
    assert missing(part("peers-training-b0"), machine.Carried(), broken) == []  # torchvision's are there
    assert missing(part("peers-training-b0"), machine.Carried(), broken | {"torchvision": "y"}) == [
        "timm or torchvision (ModuleNotFoundError: No module named 'torchvision'; y)"
    ]
    assert missing(part("tests"), machine.Carried(), broken) == ["hypothesis (x)"]
    assert all(module in machine.MODULES for need in itertools.chain.from_iterable(p.needs for p in PARTS) for module in NEEDS[need])


def test_present_is_not_importable(tmp_path, monkeypatch):
    (tmp_path / "half_there.py").write_text("raise OSError('built for another torch\\nand more')\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert machine.have("half_there")
    assert machine.import_error("half_there") == "OSError: built for another torch"
    assert machine.import_error("json") == ""


def test_done_parts_are_left_out_and_begun_ones_come_last(tmp_path):
    here, parts = {"name": "NVIDIA H200"}, [part(n) for n in ("ceilings", "latency-b0", "ours-b0", "tests", "decode")]
    for name, ended, device in (
        ("ceilings", "done", here),
        ("ours-b0", "out of time", here),
        ("latency-b0", "out of time", here),
        ("tests", "done", {"name": "NVIDIA H100"}),
    ):
        kept = record.Record(tmp_path, name, {"device": device}, 60.0)
        kept.end(ended)
        if name != "latency-b0":
            kept.add("ceiling", what="copy", rate=1.0, unit="byte/s", **TIMES)
    assert [p.name for p in remaining(parts, tmp_path, here)] == ["latency-b0", "tests", "decode", "ours-b0"]
    assert remaining(parts, tmp_path, here, rehearsal=True) == parts


def test_time_for_all_parts_is_limited(tmp_path, monkeypatch):
    """A part that doesn't fit any more isn't begun; a shorter one is. The archive holds every record."""
    now, given = [0.0], []
    monkeypatch.setattr(gpu.time, "monotonic", lambda: now[0])

    def run(part, options, seconds):
        given.append((part.name, seconds))
        record.Record(tmp_path, part.name, {}, seconds).end("done")
        now[0] += 200
        return part.name != "ours-b0"

    monkeypatch.setattr(gpu, "run", run)
    options = gpu.parsed(["--minutes", "9", "--out", str(tmp_path), "--archive", str(tmp_path / "a" / "r.tgz")])
    parts = [part(n) for n in ("ceilings", "ours-b0", "ours-b4", "tests", "decode")]
    assert gpu.run_all(parts, options) == (["ours-b0"], [part("ours-b4"), part("decode")])
    assert given == [("ceilings", 480.0), ("ours-b0", 335.0), ("tests", 135.0)]
    with tarfile.open(tmp_path / "a" / "r.tgz") as tar:
        assert tar.getnames() == ["ceilings.json", "ours-b0.json", "tests.json"]
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["r.tgz"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["no-such-part"], "no part 'no-such-part'"),
        (["--limit", "500"], "expected 30 to 480 seconds, found 500"),
        (["--rehearse"], "give --out too"),
        (["--carried", "/no/such/folder"], "/no/such/folder: no folder"),
    ],
)
def test_wrong_arguments(arguments, told, capsys):
    with pytest.raises(SystemExit) as ended:
        gpu.main(arguments)
    assert ended.value.code == 2
    assert told in capsys.readouterr().err


def test_without_a_gpu_there_is_a_message_and_status_0(tmp_path):
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    for name in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL"):  # under `make test` it would take itself for a make within a make, and print folders
        env.pop(name, None)
    run = subprocess.run(
        ["make", "gpu", "PARTS=tests decode", f"VENV={Path(sys.executable).parent.parent}"], capture_output=True, text=True, cwd=ROOT, env=env
    )
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert lines[0] == "device: none"
    assert f"torch {torch.__version__}" in lines[1]
    assert lines[-1].startswith("no NVIDIA GPU that torch can use: nothing to run")


def test_a_part_that_hangs_is_killed_with_its_children(tmp_path):
    child = "import time; time.sleep(60)"
    script = f"import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', '{child}']); print(p.pid, flush=True); time.sleep(60)"
    start = time.monotonic()
    out = tmp_path / "pid"
    assert gpu.supervised(["sh", "-c", f'exec "{sys.executable}" -c "{script}" > "{out}"'], 2.0) is None
    assert time.monotonic() - start < 10
    pid = int(out.read_text())
    for _ in range(50):  # a zombie until its new parent has seen it
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or state.read_text().split(") ")[1][0] == "Z":
            break
        time.sleep(0.1)
    else:
        pytest.fail("the child lives")
    assert gpu.supervised([sys.executable, "-c", "raise SystemExit(7)"], 60) == 7


def test_what_a_killed_part_had_found_stays(rehearsal, tmp_path):
    run = rehearsal("ceilings")
    run.record.add("ceiling", what="copy", rate=1.0, unit="byte/s", **TIMES)
    assert gpu.closed(tmp_path, run.part, None)["ended"] == "killed at the limit"
    assert len(record.read(tmp_path, "ceilings")["rows"]) == 1
    run.record.end("done")
    assert gpu.closed(tmp_path, run.part, 0)["ended"] == "done"


def test_a_device_that_is_lost_ends_the_part(rehearsal, monkeypatch):
    """As after a kernel's access beyond its memory: each later call would fail, and its case be noted as the library's fault."""
    run = rehearsal("ours-b0")
    monkeypatch.setattr(run, "sound", lambda: (_ for _ in ()).throw(worker.DeviceLostError("illegal address")))
    with pytest.raises(worker.DeviceLostError):
        run.attempt("one", lambda: 1 / 0)
    case = peers.Case(run, "b0", "timm", "eager", "inference", lambda batch: (_ for _ in ()).throw(RuntimeError("CUDA error")))
    with pytest.raises(worker.DeviceLostError, match="illegal address"):
        run.attempt("two", partial(case.best, 2))
    assert run.attempt("three", lambda: 3) == 3


def test_a_case_that_fails_is_noted_and_the_next_goes_on(rehearsal):
    run = rehearsal("depthwise")
    assert run.attempt("one", lambda: 1 / 0) is None
    assert run.attempt("two", lambda: 2) == 2
    run.end = time.monotonic() + 5
    run.longest["slow"] = 30.0
    assert run.attempt("three", lambda: pytest.fail("begun"), like="slow") is None
    assert run.cut
    assert run.record.body["notes"] == ["one: ZeroDivisionError: division by zero", "three: not begun, 5 s left, 30 s expected"]
    run.rehearsal = False
    assert run.attempt("four", lambda: pytest.fail("begun"), guess=3, spare=4) is None


# ---- records


def test_a_record_is_whole_after_each_row(tmp_path):
    kept = record.Record(tmp_path, "ceilings", {"versions": {}}, 60.0)
    assert record.read(tmp_path, "ceilings")["ended"] == "running"
    kept.add("ceiling", what="copy", rate=3e12, unit="byte/s", **TIMES)
    (row,) = record.read(tmp_path, "ceilings")["rows"]
    assert (row["kind"], row["rate"]) == ("ceiling", 3e12)
    kept.end("done", {"smi_after": {}})
    assert record.read(tmp_path, "ceilings")["machine"] == {"versions": {}, "smi_after": {}}
    assert record.read(tmp_path, "tests") is None


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"rate": "fast"}, "rate is 'fast', a str"),
        ({"rate": True}, "rate is True"),
        ({"more": 1}, r"unknown \['more'\]"),
        ({"kind": "floor"}, "expected a kind of test, network"),
    ],
)
def test_rows_of_another_shape_are_refused(change, told, tmp_path):
    kept = record.Record(tmp_path, "ceilings", {}, 60.0)
    columns = {"kind": "ceiling", "what": "copy", "rate": 1.0, "unit": "byte/s", **TIMES} | change
    with pytest.raises(ValueError, match=told):
        kept.add(**columns)


def test_a_record_without_a_key_is_refused(tmp_path):
    body = record.Record(tmp_path, "ceilings", {}, 60.0).body
    with pytest.raises(ValueError, match=r"missing \['notes'\]"):
        record.check({k: v for k, v in body.items() if k != "notes"})
    with pytest.raises(ValueError, match="found 2, 'running'"):
        record.check(body | {"format": 2})


def test_what_lies_among_the_results_is_sound():
    for found in chosen([]):
        body = record.read(gpu.RESULTS, found.name)
        assert body is None or (body["part"] == found.name and not body["rehearsal"])


# ---- the parts themselves, on the CPU


def test_ceilings_and_depthwise_run(rehearsal, tmp_path):
    worker.carry_out(rehearsal("ceilings"))
    worker.carry_out(rehearsal("depthwise"))
    assert {r["unit"] for r in record.read(tmp_path, "ceilings")["rows"]} == {"byte/s", "FLOP/s"}
    body = record.read(tmp_path, "depthwise")
    assert body["ended"] == "done"
    assert [(r["way"], r["pass"]) for r in body["rows"]] == [(way, name) for way in depthwise.WAYS for name in depthwise.PASSES]
    assert {r["backend"] for r in body["rows"]} <= {"Mkldnn", "SlowNd", "Slow2d"}  # of a CPU; a GPU's are Cudnn and CudaDepthwise2d
    assert all(r["bytes"] == 2 * 2 * 8 * (81 + 25) and r["bytes_per_s"] == pytest.approx(1e3 * r["bytes"] / r["ms"]) for r in body["rows"])


@pytest.mark.parametrize("shape", [(6, 9, 5, 2), (4, 8, 3, 1)])
def test_depthwise_calls_are_the_convolution_and_its_gradients(shape):
    torch.manual_seed(0)
    channels, side, kernel, stride = shape
    x, w, g = depthwise.tensors(shape, 2, torch.channels_last, CPU)
    found = {name: call() for name, call in depthwise.calls(x, w, g, stride).items()}
    exact = [t.double().requires_grad_() for t in (x, w)]
    y = torch.nn.functional.conv2d(*exact, stride=stride, padding=kernel // 2, groups=channels)
    y.backward(g.double())
    pairs = [(found["forward"], y), (found["data gradient"][0], exact[0].grad), (found["weight gradient"][1], exact[1].grad)]
    assert x.numel() + g.numel() == 2 * depthwise.counted(channels, side, stride) / counting.BYTES
    for one, other in pairs:
        assert one.shape == other.shape
        assert (one - other).norm() < 1e-2 * other.norm()


class Small(torch.nn.Module):
    """Stands in for a peer, which takes too long to compile here."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.last = torch.nn.Conv2d(3, 8, 3, 2, 1), torch.nn.BatchNorm2d(8), torch.nn.Linear(8, 1000)

    def forward(self, x):
        return self.last(self.norm(self.conv(x)).relu().mean((2, 3)))


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_peers_run_every_way(mode, rehearsal, tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "make", lambda library, name: Small())
    monkeypatch.setattr(peers, "libraries", lambda: ["timm"])
    worker.carry_out(rehearsal(f"peers-{mode}-b0"))
    body = record.read(tmp_path, f"peers-{mode}-b0")
    found = [(r["library"], r["way"], r["mode"], r["batch"]) for r in body["rows"]]
    ways = [("eager", mode, 2), ("compiled", mode, 2)]
    if mode == "inference":
        ways += [("eager", "latency", 1), ("compiled, frozen, reduce-overhead", "latency", 1), ("compiled, frozen, max-autotune", mode, 2)]
    ways += [(("compiled, frozen" if mode == "inference" else "compiled"), mode, n) for n in ((1, 2, 4) if mode == "inference" else (1, 4))]
    assert sorted(found) == sorted(("timm", *way) for way in ways)
    assert all(r["images_per_s"] == pytest.approx(1e3 * r["batch"] / r["ms"]) and r["peak_bytes"] is None for r in body["rows"])
    assert body["ended"] == "done"


def test_freezing_freezes_and_each_way_has_code_of_its_own():
    """Of one network: with the norms folded there is no root left in the code; without, there is."""
    torch.manual_seed(0)
    net, x, run = Small().eval(), torch.randn(2, 3, 16, 16), types.SimpleNamespace(rehearsal=False)
    net.norm.running_var.uniform_(0.5, 2)
    roots = {}
    for way in ("compiled, frozen", "compiled"):
        with torch.inference_mode():
            out, made = run_and_get_code(peers.compiled(run, net, way), x)
        assert torch.allclose(out, net(x), atol=1e-5)
        roots[way] = ["sqrt" in text for text in made]
    assert roots == {"compiled, frozen": [False], "compiled": [True]}


@pytest.fixture
def small_networks(monkeypatch):
    """Tiny ones in place of ours and its peers'."""
    tiny = ts.Arch(ts.Stem(8), (ts.Stage("mbconv", 3, 2, 2, 0.25, "identity", 8, 2),), ts.Head(16), 32)
    monkeypatch.setattr(ours, "make", lambda library, name: Small())
    monkeypatch.setattr(ours, "arch", lambda name: tiny)


def test_ours_takes_turns_with_its_peers(rehearsal, tmp_path, small_networks):
    worker.carry_out(rehearsal("ours-b0"))
    rows = record.read(tmp_path, "ours-b0")["rows"]
    peers_ways = {("timm", way) for way in ("eager", "compiled", "compiled, frozen", "compiled, frozen, max-autotune")}
    peers_ways |= {("torchvision", way) for way in ("eager", "compiled", "compiled, frozen")}
    last = {(r["library"], r["way"]): r for r in rows if r["kind"] == "in turn"}
    assert set(last) == peers_ways | {("triscale", "ours"), ("triscale", "ours from uint8")}
    assert {(r["library"], r["way"]) for r in rows if r["kind"] == "comparison"} == peers_ways
    tried = {key: {r["batch"]: r["images_per_s"] for r in rows if r["kind"] == "network" and (r["library"], r["way"]) == key} for key in last}
    assert set(tried["triscale", "ours"]) == {1, 2, 4}
    assert set(tried["timm", "compiled, frozen"]) == {2, 4}
    assert all(r["batch"] == ours.best_batch(tried[key]) for key, r in last.items() if key[1] != "ours from uint8")  # each at its best
    assert last["triscale", "ours from uint8"]["batch"] == last["triscale", "ours"]["batch"]
    assert all(r["times_min"] <= r["times"] <= r["times_max"] for r in rows if r["kind"] == "comparison")
    assert all((r["used"] is not None) == (r["library"] == "triscale") for r in rows if r["kind"] in ("network", "in turn"))
    again = rehearsal("ours-b0")
    assert again.before == rows
    assert ours.best_before(again.before, "triscale", "ours") in (1, 2, 4)
    assert ours.best_before(rows, "timm", "frozen") is None


def test_latency_is_timed_in_turn(rehearsal, tmp_path, small_networks):
    worker.carry_out(rehearsal("latency-b0"))
    rows = record.read(tmp_path, "latency-b0")["rows"]
    found = {(r["library"], r["way"]) for r in rows if r["kind"] == "in turn" and r["mode"] == "latency" and r["batch"] == 1}
    assert found == {("triscale", "ours"), *((library, way) for library in ("timm", "torchvision") for way in ("eager", *ours.GRAPHED))}


def test_a_row_tells_what_ours_ran_by():
    def net(engine):
        return types.SimpleNamespace(engine=engine)

    assert ours.used_by(net(types.SimpleNamespace(used=("kernels bfloat16",)))) == "kernels bfloat16"
    assert ours.used_by(net("float64 has no faster way")) == "plain: float64 has no faster way"
    assert page.by({"used": "plain"}) == " (**not the kernels: the network itself ran**)"
    assert page.by({"used": "kernels bfloat16"}) == page.by({"used": None}) == ""


def test_rows_of_another_device_are_not_built_on(rehearsal, tmp_path):
    run = rehearsal("ceilings")
    run.record.add("ceiling", what="copy", rate=1.0, unit="byte/s", **TIMES)
    assert len(run.earlier("ceilings")) == 1
    record.write(tmp_path, run.record.body | {"machine": {"device": {"name": "another"}}})
    assert run.earlier("ceilings") == []
    assert run.earlier("decode") == []
    (tmp_path / "tests.json").write_text("{}")
    assert run.earlier("tests") == []


def test_classes_are_compared_on_a_carried_pack(small_pack, rehearsal, tmp_path):
    torch.manual_seed(0)
    arch = ts.Arch(ts.Stem(8), (ts.Stage("mbconv", 3, 2, 2, 0.25, "identity", 8, 2),), ts.Head(16), 32, name="tiny")
    save_model(tmp_path / "tiny.safetensors", ts.build(arch, 3), ModelCard(arch, ts.Preprocess(32), ("a", "b", "c")))
    found = machine.Carried(packs=(small_pack,), weights=(tmp_path / "tiny.safetensors",))
    worker.carry_out(rehearsal("ours-top1", found))
    (row,) = record.read(tmp_path, "ours-top1")["rows"]
    assert (row["network"], row["pack"], row["images"], row["different"]) == ("tiny", "small", 4, 0)
    assert row["largest_change"] < 1e-2  # in bfloat16, where the processor has it
    net = open_model(tmp_path / "tiny.safetensors")[0].eval()
    datas, labels = pictures(small_pack, labels=True)
    inputs = normalise(ours.squares(datas, ts.Preprocess(32)), ts.Preprocess(32))
    assert sorted(labels) == [0, 0, 1, 1]
    assert row["right"] == row["right_plain"] == int((net(inputs).argmax(1) == torch.tensor(labels)).sum())


def test_a_pack_is_chosen_by_its_classes(small_pack):
    assert ours.fitting((small_pack,), ("c", "b", "a")) == (small_pack, [2, 1])
    assert ours.fitting((small_pack,), ("a", "c")) == (small_pack, None)
    listed = {"first": ("x",), "second": ("n01443537", "n01440764")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ours, "listing", lambda pack: types.SimpleNamespace(classes=listed[pack]))
        assert ours.fitting(("first", "second"), tuple(map(str, range(1000)))) == ("second", [1, 0])


# Rates of dropout and of the last block's drop-path, each library's own way.
DROPS = {
    "timm": lambda net: (net.drop_rate, net.blocks[-1][-1].drop_path.drop_prob),
    "torchvision": lambda net: (net.classifier[0].p, net.features[-2][-1].stochastic_depth.p),
}


def test_peers_are_b0():
    for library in peers.libraries():
        net = peers.make(library, "b0")
        assert sum(p.numel() for p in net.parameters()) == 5_288_548
        assert DROPS[library](net) == (0.2, pytest.approx(0.2 * 15 / 16))


def test_a_step_trains():
    torch.manual_seed(0)
    net = Small()
    before = net.conv.weight.clone()
    peers.step_call(net, torch.optim.SGD(net.parameters(), lr=0.1), 2, 8, CPU)()
    assert not torch.equal(before, net.conv.weight)
    assert net.conv.weight.dtype == torch.float32


LAUNCHES = """
import json, sys
sys.path.append({root!r})
import torch
import triscale as ts
from benchmarks.gpu import interpreter, launches
from benchmarks.gpu.counting import steps

interpreter.mend()
torch.manual_seed(0)
arch = ts.Arch(ts.Stem(8), (ts.Stage("mbconv", 3, 2, 2, 0.25, "identity", 8, 2),), ts.Head(16), 8)
for step in steps(arch):
    choices = launches.configurations(step, 2, 3)
    positional, named = launches.arguments(step, "silu", 2, 3, torch.device({device!r}))
    out = launches.launcher(step.kind)(*positional, **named, config=choices[0])
    out = out if isinstance(out, tuple) else (out,)
    print(json.dumps([step.key, len(choices), *([list(t.shape), bool(t.isfinite().all() and t.float().std() > 0)] for t in out)]))
"""


def test_the_kernels_take_what_they_are_given():
    """Each launcher on the tensors made for it, on the GPU or under the interpreter."""
    pytest.importorskip("triton")
    env = {**os.environ} if DEVICE.type == "cuda" else {**os.environ, "TRITON_INTERPRET": "1"}
    script = LAUNCHES.format(root=str(ROOT), device=DEVICE.type)
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stderr
    found = {key: (choices, *outputs) for key, choices, *outputs in map(json.loads, run.stdout.splitlines())}
    assert all(choices >= 1 and all(fine for _, fine in outputs) for choices, *outputs in found.values())
    shapes = {key: [shape for shape, _ in outputs] for key, (_, *outputs) in found.items()}
    assert {key: shape[0] for key, shape in shapes.items() if "depthwise" not in key and key != "head"} == {
        "stem": [2, 4, 4, 8],
        **{f"2.{i} {kind}": shape for i in (1, 2) for kind, shape in (("squeeze", [2, 16]), ("project", [2, 2, 2, 8]))},
        **{"2.1 expand": [2, 4, 4, 16], "2.2 expand": [2, 2, 2, 16]},
    }
    for i in (1, 2):
        assert shapes[f"2.{i} depthwise"][0] == [2, 2, 2, 16]
        assert shapes[f"2.{i} depthwise"][1][::2] == [2, 16]
    assert shapes["head"][0][::2] == [2, 16]


# ---- what travels


@pytest.fixture(scope="module")
def small_pack(tmp_path_factory):
    from triscale.data.datasets import find
    from triscale.data.pack import Packing, pack

    folder = tmp_path_factory.mktemp("pictures")
    noise = np.random.default_rng(0)
    for i in range(4):
        (folder / "data" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise.integers(0, 256, (40, 50, 3), np.uint8)).save(folder / "data" / "ab"[i % 2] / f"{i}.jpg")
    pack(find(str(folder / "data"), draw=False), folder / "small", Packing(32))
    return folder / "small"


def test_carry_gathers_and_tells_the_sizes(small_pack, tmp_path, capsys):
    weights = tmp_path / "net.safetensors"
    weights.write_bytes(b"x" * 5000)
    assert gpu.main(["carry", str(tmp_path / "out"), "--packs", str(small_pack), "--weights", str(weights), "--wheels"]) == 0
    said = capsys.readouterr().out
    assert "5 kB  weights/net.safetensors" in said
    assert "the repository's own files" in said
    assert "lies outside the repository" in said
    assert carrying.ignored(ROOT / "runs" / "carried") in (True, None)
    assert carrying.ignored(ROOT / "docs") in (False, None)
    assert "packs/small/index.json" in said
    found = machine.carried(tmp_path / "out")
    assert (found.wheels, [p.name for p in found.packs], [p.name for p in found.weights]) == ((), ["small"], ["net.safetensors"])
    for file in small_pack.iterdir():
        assert (found.packs[0] / file.name).read_bytes() == file.read_bytes()


def test_carry_refuses_what_is_no_pack_and_tells_of_too_much(small_pack, tmp_path, capsys, monkeypatch):
    assert gpu.main(["carry", str(tmp_path / "out"), "--packs", str(tmp_path), "--wheels"]) == 2
    assert f"{tmp_path}: no pack" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(carrying, "LIMIT", 1000)
    assert gpu.main(["carry", str(tmp_path / "out"), "--packs", str(small_pack), "--wheels"]) == 1
    assert "of 1 kB at most: too much" in capsys.readouterr().out
    monkeypatch.setattr(carrying, "LIMIT", carrying.total(tmp_path / "out") + 100)
    monkeypatch.setattr(carrying, "repository", lambda folder: 101)  # travels too
    assert gpu.main(["carry", str(tmp_path / "out"), "--packs", str(small_pack), "--wheels"]) == 1


def test_what_travels_is_of_python_alone_and_not_torchs():
    import timm

    pure, compiled, absent = carrying.travelling(["timm", "no-such-package"])
    assert pure["timm"] == timm.__version__
    assert "safetensors" in compiled
    assert absent == ["no-such-package"]
    assert not {"torch", "torchvision", "numpy", "sympy"} & {*pure, *compiled}


def test_a_carried_wheel_is_imported_from_its_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", list(sys.path))
    pure, compiled = tmp_path / "carried_thing-1.5-py3-none-any.whl", tmp_path / "other-1-cp312-cp312-manylinux_2_28_x86_64.whl"
    with zipfile.ZipFile(pure, "w") as file:
        file.writestr("carried_thing/__init__.py", "answer = 42\n")
        file.writestr("carried_thing-1.5.dist-info/METADATA", "Metadata-Version: 2.1\nName: carried-thing\nVersion: 1.5\n")
    zipfile.ZipFile(compiled, "w").close()
    found = machine.carried(tmp_path)
    machine.add_wheels(found)
    machine.add_wheels(found)
    import carried_thing

    assert (carried_thing.answer, machine.version("carried-thing"), machine.have("carried_thing.no"), machine.have("no.thing")) == (
        42,
        "1.5",
        False,
        False,
    )
    assert sys.path.count(str(pure)) == 1
    assert any(compiled.name in line for line in machine.inventory(found, machine.described("cpu")))


def test_decoding_runs_on_a_carried_pack(small_pack, rehearsal, tmp_path):
    worker.carry_out(rehearsal("decode", found=machine.carried(small_pack.parent)))
    rows = record.read(tmp_path, "decode")["rows"]
    assert [(r["way"], r["on_cpu"]) for r in rows] == [
        ("torchvision, device", 0),
        ("triscale, device, to 224 px", 0),
        ("torchvision, CPU, 1 thread", 2),
        ("triscale, CPU, 1 thread, to 224 px", 2),
    ]
    assert all(r["data"] == "small" and r["batch"] == 2 and r["images_per_s"] > 0 for r in rows)


# ---- the suite's own tests on a device


def test_files_with_gpu_tests_are_found():
    found = {p.name for p in suite.files()}
    assert {"test_augment.py", "test_proxy_score.py", "test_kernels_pointwise.py"} <= found
    assert not {"test_gpu_bench.py", "test_cost.py"} & found


SUITE = """
import os, sys
os.environ["TRITON_INTERPRET"] = "1"
sys.path.append({root!r})
import pytest
from pathlib import Path
from benchmarks.gpu import machine, suite, worker
from benchmarks.gpu.parts import PARTS

class Listed:
    def pytest_collection_finish(self, session):
        print("kept:", *(item.name for item in session.items))

suite.files = lambda: [Path({file!r})]
worker.carry_out(worker.Run(next(p for p in PARTS if p.name == "tests"), 60.0, {out!r}, machine.Carried(), rehearsal=True))
pytest.main(["-q", "--collect-only", "-p", "no:cacheprovider", {whole!r}], plugins=[suite.Watch(None), Listed()])
"""
TESTS = """
import pytest

@pytest.mark.skipif(True, reason="no CUDA device here")
def test_skipped():
    pass

@pytest.mark.skipif(False, reason="no CUDA device here")
def test_that_fails():
    assert 1 + 1 == 3

@pytest.mark.skipif(False, reason="no CUDA device here")
def test_that_passes():
    pass

@pytest.mark.gpu
def test_that_is_marked():
    pass

def test_of_the_cpu():
    pass
"""


def test_the_suites_gpu_tests_are_recorded(tmp_path):
    file = tmp_path / "test_some.py"
    file.write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    script = SUITE.format(root=str(ROOT), file=str(file), out=str(tmp_path), whole=str(ROOT / "tests/test_inference.py"))
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    body = record.read(tmp_path, "tests")
    assert [(r["name"].split("::")[1], r["outcome"]) for r in body["rows"]] == [
        ("test_skipped", "skipped"),
        ("test_that_fails", "failed"),
        ("test_that_passes", "passed"),
        ("test_that_is_marked", "passed"),
    ]
    assert [r["message"] for r in body["rows"]] == ["Skipped: no CUDA device here", "E       assert (1 + 1) == 3", "", ""]
    assert body["ended"] == "done"
    assert record.outcomes(body["rows"]) == {"passed": 2, "failed": 1, "error": 0, "skipped": 1}
    if HAVE_TRITON:  # whole networks through the kernels
        kept = run.stdout.split("kept:")[1].splitlines()[0].split()
        assert {"test_networks_through_the_kernels[efficientnet_b0]", "test_pixels_through_the_kernels"} <= set(kept)
        assert "test_steps_are_data" not in kept


@pytest.mark.parametrize(("outcome", "fine"), [("passed", True), ("failed", False), ("error", False)])
def test_a_failing_test_is_a_failing_part(outcome, fine, tmp_path, monkeypatch, capsys):
    def part_of(command, seconds):
        kept = record.Record(tmp_path, "tests", {}, seconds)
        for o in ("passed", "skipped", outcome):
            kept.add("test", name="a", outcome=o, seconds=0.1, message="")
        kept.end("done")
        return 0

    monkeypatch.setattr(gpu, "supervised", part_of)
    assert gpu.run(part("tests"), gpu.parsed(["--out", str(tmp_path)]), 60.0) is fine
    assert (
        f"{2 if fine else 1} passed, {1 - fine - (outcome == 'error')} failed, {int(outcome == 'error')} error, 1 skipped" in capsys.readouterr().out
    )


# ---- the page


def test_the_page_is_made_from_the_results():
    assert page.text(gpu.RESULTS) == page.PAGE.read_text(encoding="utf-8")


def measured(folder, name, ended="done", device="NVIDIA H200", clocks_timed=None):
    """A record of a part, to be filled."""
    about = {"versions": {"torch": "2.11.0", "triton": "3.6.0"}, "device": {"name": device}, "smi_before": {"driver_version": "580.1"}}
    kept = record.Record(folder, name, about, 480.0)
    kept.end(ended, {"clocks_timed": clocks_timed or {}})
    return kept


def line_of(text, start):
    (found,) = [line for line in text.splitlines() if line.startswith(start)][:1]
    return found


def test_measured_kernels_take_their_place(tmp_path):
    lowered = {"sm_mhz": 1755.0, "sm_mhz_min": 1500.0, "sm_mhz_max": 1980.0, "lowered": {"power limit": 0.25}}
    kept = measured(tmp_path, "kernels-b0", clocks_timed=lowered)
    for i, step in enumerate(steps("b0")):
        columns = {"network": "b0", "key": step.key, "batch": 256, "bytes": 256 * step.bytes, "bytes_per_s": 1.25e12}
        for rank, ms in enumerate((2.56, 0.256 * (i + 1))):
            kept.add("kernel", **columns, config="c", rank=rank, **TIMES | {"ms": ms})
    text = page.text(tmp_path)
    assert line_of(text, "| kernels-b0 | ").endswith(
        "NVIDIA H200, driver 580.1; torch 2.11.0, Triton 3.6.0 | 1755 MHz (1500 to 1980), power limit in 25% |"
    )
    assert line_of(text, "| stem | stem 3x3 |").endswith("| bytes | 1.000 | 1.25 |")
    whole = sum(s.times * min(i + 1, 10) for i, s in enumerate(steps("b0")))
    assert f"| {whole:.2f} |  |" in text
    ceiling = {"what": "copy", "rate": 2.5e12, "unit": "byte/s", **TIMES}
    measured(tmp_path, "ceilings").add("ceiling", **ceiling)
    assert line_of(page.text(tmp_path), "| stem | stem 3x3 |").endswith("| bytes | 1.000 | 1.25 (50%) |")
    measured(tmp_path, "ceilings", device="NVIDIA H100").add("ceiling", **ceiling)
    text = page.text(tmp_path)
    assert line_of(text, "| stem | stem 3x3 |").endswith("| bytes | 1.000 | 1.25 |")
    assert "Measured on: NVIDIA H200. Left out, as measured elsewhere: ceilings (NVIDIA H100)." in text


def test_measured_networks_take_their_place(tmp_path):
    kept = measured(tmp_path, "ours-b0", "out of time")
    about = {"network": "b0", "mode": "inference", "px": 224, **TIMES}

    def add(library, way, batch, images_per_s, used=None):
        ms = 1e3 * batch / images_per_s
        kept.add("in turn", library=library, way=way, batch=batch, used=used, images_per_s=images_per_s, **about | {"ms": ms})

    add("triscale", "ours", 512, 80000.0, "kernels bfloat16")
    add("triscale", "ours", 512, 90000.0, "kernels bfloat16")  # the later one counts
    add("triscale", "ours from uint8", 512, 91000.0, "plain")
    for way, value in (("eager", 10000.0), ("compiled", 20000.0), ("compiled, frozen", 30000.0)):
        add("timm", way, 256, value)
        times = {"times": 90000 / value, "times_min": 2.9, "times_max": 3.1}
        kept.add("comparison", network="b0", mode="inference", library="timm", way=way, used=None, **times)
    text = page.text(tmp_path)
    mine = "| 90,000 at 512 | 91,000 at 512 (**not the kernels: the network itself ran**) |"
    assert f"{mine} 30,000 at 256 (compiled, frozen) | not measured | 3.00 (2.90 to 3.10) | not measured |" in text
    other = measured(tmp_path, "ours-b4", device="NVIDIA H100")
    columns = about | {"network": "b4", "px": 380}
    other.add("in turn", library="triscale", way="ours", batch=128, used="kernels bfloat16", images_per_s=12345.0, **columns)
    measured(tmp_path, "latency-b0")
    text = page.text(tmp_path)
    assert "Measured on: NVIDIA H200. Left out, as measured elsewhere: ours-b4 (NVIDIA H100)." in text
    assert "12,345" not in text


def test_a_rehearsal_is_no_measurement(rehearsal, tmp_path):
    worker.carry_out(rehearsal("ceilings"))
    assert "Ceilings" not in page.text(tmp_path)
    assert page.text(tmp_path).count("not measured") > 100


def test_instructions_an_output_are_read_by_key(tmp_path):
    variant = Variant("", None, {}, {"size": 5, "stride": 2, "act": "silu"})
    assert code.key_of("depthwise", variant) == "depthwise 5x5 s2"
    assert code.key_of("pointwise", variant) is None
    assert code.per_output(tmp_path) == {}
    (tmp_path / code.FILE).write_text(json.dumps({"per_output": {"depthwise 5x5 s1": 400.0}}))
    assert "| instructions |" in page.text(tmp_path)
    assert f"compiled by Triton {json.loads((gpu.RESULTS / code.FILE).read_text())['triton']}" in page.text(gpu.RESULTS)


def test_every_depthwise_step_has_its_machine_code_read():
    found = code.per_output(gpu.RESULTS)
    assert {counting.code_key(s) for name in NETWORKS for s in steps(name) if s.kind == "depthwise"} <= found.keys()
    assert all(5 < n < 200 for n in found.values())
