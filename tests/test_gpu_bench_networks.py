"""The GPU benchmarks, without a GPU: each part itself on the CPU, with tiny shapes; and the suite's own tests on a device."""

import json
import os
import subprocess
import sys
import types

import pytest
import torch
from conftest import ROOT
from gpu_bench import CPU, NETWORKS, TIMES, part, recorded
from interpreter import DEVICE, HAVE_TRITON
from torch._inductor.utils import run_and_get_code

import triscale as ts
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import (
    agreement,
    counting,
    depthwise,
    launches,
    machine,
    ours,
    page,
    peers,
    record,
    suite,
    worker,
)
from benchmarks.gpu.decode import pictures
from benchmarks.gpu.parts import BATCHES
from triscale.data.normalising import normalise
from triscale.weights.model_file import ModelCard, save_model
from triscale.weights.open import open_model

pytestmark = pytest.mark.usefixtures("no_results")

# ---- the parts themselves, on the CPU


def test_ceilings_and_depthwise_run(rehearsal, tmp_path):
    worker.carry_out(rehearsal("ceilings"))
    worker.carry_out(rehearsal("depthwise"))
    assert {r["unit"] for r in recorded(tmp_path, "ceilings")["rows"]} == {"byte/s", "FLOP/s"}
    body = recorded(tmp_path, "depthwise")
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
    body = recorded(tmp_path, f"peers-{mode}-b0")
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
    """Tiny ones in place of peers; ours are, in a rehearsal."""
    monkeypatch.setattr(ours, "make", lambda library, name: Small())


def test_ours_takes_turns_with_its_peers(rehearsal, tmp_path, small_networks):
    worker.carry_out(rehearsal("ours-b0"))
    rows = recorded(tmp_path, "ours-b0")["rows"]
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
    best = ours.best_before(again.before, "triscale", "ours")
    assert ours.batches(again, "b0") == (best, *(n for n in (2, 4, 1) if n != best))
    assert ours.best_before(rows, "timm", "frozen") is None


@pytest.mark.parametrize("name", NETWORKS)
def test_ours_meets_a_compiled_peer_first(name, rehearsal, monkeypatch, small_networks):
    """Where each step takes as long as is guessed, within what the part is given while others wait."""
    run, timed, tried = rehearsal(f"ours-{name}"), [], []
    left = [part(f"ours-{name}").least - worker.RESERVE - 10]  # what starting takes

    def attempt(what, work, *, like=None, guess=5.0, spare=0.0):
        if left[0] < guess + spare:
            return None
        left[0] -= guess
        tried.append(what)
        return work()

    def add(case, batch):
        case.calls(batch)
        run.record.add("network", **case.about, used=None, batch=batch, px=32, peak_bytes=None, **TIMES, images_per_s=float(batch))

    run.rehearsal = False
    monkeypatch.setattr(run, "attempt", attempt)
    monkeypatch.setattr(peers.Case, "add", add)
    monkeypatch.setattr(peers.Case, "best", lambda case, start: start)
    for made in ("optimized", "compiled"):
        monkeypatch.setattr(ours, made, lambda *more: None)
    monkeypatch.setattr(ours, "forward_call", lambda *more, **named: lambda: None)
    monkeypatch.setattr(ours.Turn, "time", lambda turn: (timed.append(list(turn.calls)), setattr(turn, "changed", False)))
    ours.run(run, name)
    first, start = BATCHES[name][0], peers.START["inference"][name]
    expected = [f"ours, batch {first}", "timm", "timm eager", f"timm compiled, frozen, batch {start}"]
    assert [what for what in tried if "in turn" not in what][:4] == expected
    assert timed[1] == [("triscale", "ours"), ("timm", "eager"), ("timm", "compiled, frozen")]
    left[0], tried[:] = 1e6, []
    ours.run(run, name)
    tried = [what for what in tried if "in turn" not in what]
    best = max(BATCHES[name])  # for the rate is the batch
    assert tried[:7] == [*expected, *(f"ours, batch {n}" for n in BATCHES[name][1:]), f"ours from uint8, batch {best}"]
    assert {("torchvision", "compiled"), ("timm", "compiled"), ("triscale", "ours from uint8")} <= set(timed[-1])


OURS = """
import sys
sys.path.append({root!r})
from benchmarks.gpu import interpreter, machine, ours, peers, worker
from benchmarks.gpu.parts import PARTS

interpreter.mend()
ours.libraries, ours.batches = lambda: [], lambda run, name: (1,)
peers.pixels = ours.pixels = lambda run, name: 8
worker.carry_out(worker.Run(next(p for p in PARTS if p.name == "ours-b0"), 60.0, {out!r}, machine.Carried(), rehearsal=True))
"""


def test_a_rehearsal_of_ours_runs_the_kernels(tmp_path):
    pytest.importorskip("triton")
    script = OURS.format(root=str(ROOT), out=str(tmp_path))
    env = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stderr
    rows = recorded(tmp_path, "ours-b0")["rows"]
    assert {row["used"] for row in rows} == {"kernels bfloat16"}
    assert {(row["kind"], row["way"]) for row in rows} == {(kind, way) for kind in ("network", "in turn") for way in ("ours", "ours from uint8")}


def test_latency_is_timed_in_turn(rehearsal, tmp_path, small_networks):
    worker.carry_out(rehearsal("latency-b0"))
    rows = recorded(tmp_path, "latency-b0")["rows"]
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
    record.write(run.record.path, run.record.body | {"machine": {"device": {"name": "another"}}})
    assert run.earlier("ceilings") == []
    assert run.earlier("decode") == []
    (tmp_path / "tests.cpu.json").write_text("{}")
    assert run.earlier("tests") == []


def test_classes_are_compared_on_a_carried_pack(small_pack, rehearsal, tmp_path):
    torch.manual_seed(0)
    arch = ts.Arch(ts.Stem(8), (ts.Stage("mbconv", 3, 2, 2, 0.25, "identity", 8, 2),), ts.Head(16), 32, name="tiny")
    save_model(tmp_path / "tiny.safetensors", ts.build(arch, 3), ModelCard(arch, ts.Preprocess(32), ("a", "b", "c")))
    found = machine.Carried(packs=(small_pack,), weights=(tmp_path / "tiny.safetensors",))
    worker.carry_out(rehearsal("ours-top1", found))
    (row,) = recorded(tmp_path, "ours-top1")["rows"]
    assert (row["network"], row["pack"], row["images"], row["different"]) == ("tiny", "small", 4, 0)
    assert row["largest_change"] < 1e-2  # in bfloat16, where the processor has it
    net = open_model(tmp_path / "tiny.safetensors")[0].eval()
    datas, labels = pictures(small_pack, labels=True)
    inputs = normalise(agreement.squares(datas, ts.Preprocess(32)), ts.Preprocess(32))
    assert sorted(labels) == [0, 0, 1, 1]
    assert row["right"] == row["right_plain"] == int((net(inputs).argmax(1) == torch.tensor(labels)).sum())


def test_a_pack_is_chosen_by_its_classes(small_pack):
    assert agreement.fitting((small_pack,), ("c", "b", "a")) == (small_pack, [2, 1])
    assert agreement.fitting((small_pack,), ("a", "c")) == (small_pack, None)
    listed = {"first": ("x",), "second": ("n01443537", "n01440764")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agreement, "listing", lambda pack: types.SimpleNamespace(classes=listed[pack]))
        assert agreement.fitting(("first", "second"), tuple(map(str, range(1000)))) == ("second", [1, 0])


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


def test_a_squeeze_waits_for_its_depthwise_step(rehearsal, monkeypatch):
    """Where none of the depthwise choices runs there is no row of the squeeze that would add up a number of sums that no one found."""
    monkeypatch.setattr("triscale.kernels.machine.unsupported", lambda device: None)
    for fails in (True, False):
        run, done = rehearsal("kernels-b0"), []

        def add(run, name, step, rank, act, parts, done=done, fails=fails):
            if step.kind == "depthwise":
                if fails:
                    raise RuntimeError("OutOfResources")
                parts[step.place] = 3
            done.append(step.kind)

        monkeypatch.setattr(launches, "_add", add)
        launches.run(run, "b0")
        assert ("squeeze" in done) is not fails
        assert any("2.1 squeeze: left out" in note for note in run.record.body["notes"]) is fails


# ---- the suite's own tests on a device


def test_files_with_gpu_tests_are_found():
    found = {p.name for p in suite.files()}
    assert {"test_augment.py", "test_proxy_score.py", "test_kernels_pointwise.py"} <= found
    assert not {"test_gpu_bench_networks.py", "test_cost.py"} & found


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
    body = recorded(tmp_path, "tests")
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
