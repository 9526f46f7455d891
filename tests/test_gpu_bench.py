"""The GPU benchmarks, on a machine without one: counts, the parts' own logic, what travels, what is written."""

import importlib
import itertools
import json
import os
import subprocess
import sys
import time
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from interpreter import DEVICE
from PIL import Image

import triscale as ts
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import carrying, code, counting, depthwise, machine, ours, page, peers, record, suite, timing, worker
from benchmarks.gpu.parts import PARTS, chosen, missing
from benchmarks.gpu.sweep import best_batch, sweep
from triscale.kernels.machine import Variant
from triscale.weights.model_file import ModelCard, save_model

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


def test_a_prediction_is_the_longest_of_its_limits():
    found = {s.key: s for s in steps("b0")}
    step = found["3.2 depthwise"]
    assert counting.predicted(step, {}) == (step.bytes / (0.7 * 4.3e12), "bytes")
    seconds, limit = counting.predicted(step, {"depthwise 3x3 s1": 100.0})
    assert limit == "instructions"
    assert seconds == pytest.approx(56 * 56 * 144 * 100 / (132 * 128 * 1.755e9))
    assert counting.predicted(step, {"depthwise 3x3 s1": 1.0})[1] == "bytes"
    assert {counting.predicted(s, {})[1] for s in steps("b7")} == {"bytes", "matrix"}


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
    assert [p.name for p in chosen(["peers-inference"])] == [f"peers-inference-{n}" for n in NETWORKS]
    assert len(chosen(["peers", "peers-training-b0"])) == 6
    with pytest.raises(ValueError, match=r"no part 'peer'; there are tests, ceilings"):
        chosen(["peer"])
    for found in PARTS:
        module, function = found.runs.split(":")
        assert callable(getattr(importlib.import_module(f"benchmarks.gpu.{module}"), function))


def test_what_a_part_lacks():
    assert missing(part("decode"), machine.Carried()) == ["a pack"]
    assert missing(part("decode"), machine.Carried(packs=(Path("x"),))) == []
    assert "weights" in missing(part("ours-top1"), machine.Carried())


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


def test_a_case_that_fails_is_noted_and_the_next_goes_on(rehearsal):
    run = rehearsal("depthwise")
    assert run.attempt("one", lambda: 1 / 0) is None
    assert run.attempt("two", lambda: 2) == 2
    run.end = time.monotonic() + 5
    run.longest["slow"] = 30.0
    assert run.attempt("three", lambda: pytest.fail("begun"), like="slow") is None
    assert run.cut
    assert run.record.body["notes"] == ["one: ZeroDivisionError: division by zero", "three: not begun, 5 s left, 30 s expected"]


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
    ways = [("eager", mode, 2), *(("compiled", mode, n) for n in (1, 2, 4))]
    if mode == "inference":
        ways += [("eager", "latency", 1), ("compiled", "latency", 1), ("frozen", mode, 2)]
    assert sorted(found) == sorted(("timm", *way) for way in ways)
    assert all(r["images_per_s"] == pytest.approx(1e3 * r["batch"] / r["ms"]) and r["peak_bytes"] is None for r in body["rows"])
    assert body["ended"] == "done"


def test_ours_takes_turns_with_its_peer(rehearsal, tmp_path, monkeypatch):
    tiny = ts.Arch(ts.Stem(8), (ts.Stage("mbconv", 3, 2, 2, 0.25, "identity", 8, 2),), ts.Head(16), 32)
    monkeypatch.setattr(ours, "make", lambda library, name: Small())
    monkeypatch.setattr(ours, "arch", lambda name: tiny)
    worker.carry_out(rehearsal("ours-b0"))
    rows = record.read(tmp_path, "ours-b0")["rows"]
    names = [("triscale", "ours"), ("timm", "eager"), ("timm", "compiled")]
    for mode, batch in (("inference", 2), ("latency", 1)):
        found = {(r["library"], r["way"]): r for r in rows if r["kind"] == "in turn" and r["mode"] == mode}
        assert set(found) == set(names)
        assert found["triscale", "ours"]["batch"] == batch
        assert {r["against"] for r in rows if r["kind"] == "comparison" and r["mode"] == mode} == {"timm eager", "timm compiled"}
    assert sorted(r["batch"] for r in rows if r["kind"] == "network" and r["library"] == "triscale") == [1, 2, 4]
    assert all(r["times_min"] <= r["times"] <= r["times_max"] for r in rows if r["kind"] == "comparison")
    again = rehearsal("ours-b0")
    assert again.before == rows
    assert ours.best_before(again.before, "triscale", "ours") in (1, 2, 4)
    assert ours.best_before(rows, "timm", "frozen") is None


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
    assert (row["network"], row["images"], row["different"]) == ("tiny", 4, 0)
    assert row["largest_change"] < 1e-4


def test_peers_are_b0():
    for library in peers.libraries():
        assert sum(p.numel() for p in peers.make(library, "b0").parameters()) == 5_288_548


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
from benchmarks.gpu import launches
from benchmarks.gpu.counting import steps

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
    assert [r["way"] for r in rows] == ["torchvision, device", "triscale, device, to 224 px", "torchvision, CPU", "triscale, CPU, to 224 px"]
    assert all(r["data"] == "small" and r["batch"] == 2 and r["images_per_s"] > 0 for r in rows)


# ---- the suite's own tests on a device


def test_files_with_gpu_tests_are_found():
    found = {p.name for p in suite.files()}
    assert {"test_augment.py", "test_proxy_score.py", "test_kernels_pointwise.py"} <= found
    assert not {"test_gpu_bench.py", "test_cost.py"} & found


SUITE = """
import sys
sys.path.append({root!r})
from pathlib import Path
from benchmarks.gpu import machine, suite, worker
from benchmarks.gpu.parts import PARTS

suite.files = lambda: [Path({file!r})]
worker.carry_out(worker.Run(next(p for p in PARTS if p.name == "tests"), 60.0, {out!r}, machine.Carried(), rehearsal=True))
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

def test_of_the_cpu():
    pass
"""


def test_the_suites_gpu_tests_are_recorded(tmp_path):
    file = tmp_path / "test_some.py"
    file.write_text(TESTS)
    script = SUITE.format(root=str(ROOT), file=str(file), out=str(tmp_path))
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    body = record.read(tmp_path, "tests")
    assert [(r["name"].split("::")[1], r["outcome"]) for r in body["rows"]] == [
        ("test_skipped", "skipped"),
        ("test_that_fails", "failed"),
        ("test_that_passes", "passed"),
    ]
    assert [r["message"] for r in body["rows"]] == ["Skipped: no CUDA device here", "E       assert (1 + 1) == 3", ""]
    assert body["ended"] == "done"


# ---- the page


def test_the_page_is_made_from_the_results():
    assert page.text(gpu.RESULTS) == page.PAGE.read_text(encoding="utf-8")


def test_measurements_take_their_place(tmp_path):
    smi = {"driver_version": "580.1", "clocks.sm": "1980"}
    about = {"versions": {"torch": "2.11.0", "triton": "3.6.0"}, "device": {"name": "NVIDIA H200"}, "smi_before": smi}
    kept = record.Record(tmp_path, "kernels-b0", about, 480.0)
    for i, step in enumerate(steps("b0")):
        columns = {"network": "b0", "key": step.key, "batch": 256, "bytes": 256 * step.bytes, "bytes_per_s": 1.25e12}
        for rank, ms in enumerate((2.56, 0.256 * (i + 1))):
            kept.add("kernel", **columns, config="c", rank=rank, **TIMES | {"ms": ms})
    kept.end("done")
    kept = record.Record(tmp_path, "ours-b0", about, 480.0)
    for way, rate in (("ours", 90000.0), ("compiled", 30000.0)):
        kept.add("in turn", library="x", network="b0", way=way, mode="inference", batch=512, px=224, images_per_s=rate, **TIMES)
    kept.add("comparison", network="b0", mode="inference", against="timm compiled", times=3.0, times_min=2.9, times_max=3.1)
    kept.end("out of time")
    text = page.text(tmp_path)
    assert "| kernels-b0 | each kernel at each shape of b0 | " in text
    assert "NVIDIA H200, driver 580.1, 1980 MHz; torch 2.11.0, Triton 3.6.0 |" in text
    (stem,) = [line for line in text.splitlines() if line.startswith("| stem | stem 3x3 |")][:1]
    assert stem.endswith("| bytes | 1.000 | 1.25 |")
    whole = sum(s.times * min(i + 1, 10) for i, s in enumerate(steps("b0")))
    assert f"| {whole:.2f} |  |" in text
    assert "| 90,000 at 512 | 30,000 at 512 | not measured | 3.00 (2.90 to 3.10) | not measured |" in text


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


def test_every_depthwise_step_has_its_machine_code_read():
    found = code.per_output(gpu.RESULTS)
    assert {counting.code_key(s) for name in NETWORKS for s in steps(name) if s.kind == "depthwise"} <= found.keys()
    assert all(5 < n < 200 for n in found.values())
