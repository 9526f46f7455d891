"""The GPU benchmarks, without a GPU: the parts' order and time, what they leave behind, what travels."""

import importlib
import itertools
import json
import os
import subprocess
import sys
import tarfile
import time
import zipfile
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from gpu_bench import NETWORKS, TIMES, add_row, part, recorded

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import (
    carrying,
    machine,
    peers,
    record,
    tuned,
    worker,
)
from benchmarks.gpu.parts import NEEDS, PARTS, chosen, missing, remaining
from triscale.inference.tuning import Choices

pytestmark = pytest.mark.usefixtures("no_results")

# ---- parts


def test_parts_by_name_or_beginning():
    assert chosen([]) == list(PARTS)
    assert [p.name for p in chosen(["decode", "tests"])] == ["tests", "decode"]
    assert [p.name for p in chosen([])][:3] == ["ceilings", "ours-b0", "latency-b0"]
    assert [p.name for p in chosen(["peers-inference"])] == [f"peers-inference-{n}" for n in NETWORKS]
    assert len(chosen(["peers", "peers-training-b0"])) == 6
    with pytest.raises(ValueError, match=r"no part 'peer'; there are ceilings, ours-b0, latency-b0"):
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


def test_what_remains_in_which_order(tmp_path):
    """Never begun; out of time before the comparison, yet before the peers' training; out of time; and last what crashed or hung."""
    here = {"name": "NVIDIA H200"}
    for name, ended, rows in (
        ("ceilings", "done", ["ceiling"]),
        ("ours-b0", "out of time", ["ceiling", "eager"]),
        ("latency-b0", "killed at the limit", []),  # hung at its first network
        ("kernels-b0", "crashed", ["ceiling"]),
        ("ours-b4", "out of time", ["ceiling", "compiled, frozen"]),
    ):
        kept = record.Record(tmp_path, name, {"device": here}, 60.0)
        for row in rows:
            add_row(kept, *([row] if row == "ceiling" else ["comparison"]), **({} if row == "ceiling" else {"way": row}))
        kept.end(ended)
    record.Record(tmp_path, "tests", {"device": {"name": "NVIDIA H100"}}, 60.0).end("done")
    parts = [part(n) for n in ("ceilings", "ours-b0", "latency-b0", "kernels-b0", "ours-b4", "tests", "peers-training-b0", "decode")]
    order = ["tests", "ours-b0", "peers-training-b0", "decode", "ours-b4", "latency-b0", "kernels-b0"]
    assert [p.name for p in remaining(parts, tmp_path, here)] == order
    assert remaining(parts, tmp_path, None, rehearsal=True) == parts


def test_time_for_all_parts_is_limited(tmp_path, monkeypatch):
    """A part that doesn't fit any more isn't begun; a shorter one is. What was begun before gets all the time there is. The archive holds
    every record."""
    now, given = [0.0], []
    monkeypatch.setattr(gpu.time, "monotonic", lambda: now[0])

    def run(part, options, seconds):
        given.append((part.name, seconds))
        record.Record(tmp_path, part.name, {}, seconds).end("done")
        (tuned.home(tmp_path)).mkdir(parents=True, exist_ok=True)
        (tuned.home(tmp_path) / f"{part.name}.json").write_text("{}")
        now[0] += 120
        return part.name != "kernels-b0"

    monkeypatch.setattr(gpu, "run", run)
    record.Record(tmp_path, "tests", {}, 480.0).end("out of time")
    options = gpu.parsed(["--rehearse", "--minutes", "9", "--out", str(tmp_path), "--archive", str(tmp_path / "a" / "r.tgz")])
    options.rehearse = False
    parts = [part(n) for n in ("ceilings", "tests", "kernels-b0", "ours-b4", "kernels-b4", "decode")]
    assert gpu.run_all(parts, options) == (["kernels-b0"], [part("ours-b4"), part("decode")])
    assert given == [("ceilings", 60.0), ("tests", 415.0), ("kernels-b0", 150.0), ("kernels-b4", 150.0)]
    with tarfile.open(tmp_path / "a" / "r.tgz") as tar:
        assert tar.getnames() == ["ceilings.cpu.json", "kernels-b0.cpu.json", "tests.cpu.json", "kernels-b4.cpu.json", "tuned.json"]
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["r.tgz"]
    gpu.run_all([part("ceilings"), part("decode")], gpu.parsed(["--out", str(tmp_path / "b")]))
    assert given[4:] == [("ceilings", 480.0), ("decode", 480.0)]  # where time isn't limited each has all that a part may take


def test_three_commands_of_nine_minutes_reach_what_decides(tmp_path, monkeypatch):
    """Where every part takes all that it is given; the first command with a start of 20 s."""
    now, here, order = [0.0], {"name": "NVIDIA H100"}, []
    monkeypatch.setattr(gpu.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(gpu.tuned, "gather", lambda out: False)

    def run(part, options, seconds):
        kept = record.Record(tmp_path, part.name, {"device": here}, seconds)
        add_row(kept)
        kept.end("out of time" if part.name != "ceilings" else "done")
        now[0] += 25 if part.name == "ceilings" else seconds - 10
        order.append(part.name)
        return True

    monkeypatch.setattr(gpu, "run", run)
    for _ in range(3):
        options = gpu.parsed(["--minutes", "9", "--out", str(tmp_path), "--remaining"])
        options.device = here
        now[0] += 20
        gpu.run_all(remaining(list(PARTS), tmp_path, here), options)
    assert set(order) >= {"ceilings", "latency-b0", "kernels-b0", "ours-top1", "tests", *(f"ours-{n}" for n in NETWORKS)}
    assert len(order) == len(set(order))


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
    assert gpu.closed(run.record.path, None)["ended"] == "killed at the limit"
    assert len(recorded(tmp_path, "ceilings")["rows"]) == 1
    run.record.end("done")
    assert gpu.closed(run.record.path, 0)["ended"] == "done"


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
    assert recorded(tmp_path, "ceilings")["ended"] == "running"
    kept.add("ceiling", what="copy", rate=3e12, unit="byte/s", **TIMES)
    (row,) = recorded(tmp_path, "ceilings")["rows"]
    assert (row["kind"], row["rate"]) == ("ceiling", 3e12)
    kept.end("done", {"smi_after": {}})
    assert recorded(tmp_path, "ceilings")["machine"] == {"versions": {}, "smi_after": {}}
    assert recorded(tmp_path, "tests") is None


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
        for path in gpu.RESULTS.glob(f"{found.name}.*.json"):
            body = record.read(path)
            assert body["part"] == found.name
            assert not body["rehearsal"]
            assert path == record.path_of(gpu.RESULTS, found.name, record.device_of(body))


def test_a_worse_attempt_leaves_the_record_alone(tmp_path):
    """Killed early, or short of time again; one with a comparison that was lacking takes its place at once, and so does one that is done."""

    def attempt(rows, ended, comparison=None, device="NVIDIA H100"):
        kept = record.Record(tmp_path, "ours-b0", {"device": {"name": device}}, 60.0)
        for _ in range(rows):
            add_row(kept)
        if comparison:
            add_row(kept, "comparison", way=comparison)
        kept.end(ended)
        return len(recorded(tmp_path, "ours-b0", "NVIDIA H100")["rows"])

    assert attempt(5, "out of time") == 5
    assert attempt(3, "killed at the limit") == 5
    assert gpu.closed(record.path_of(tmp_path, "ours-b0", "NVIDIA H100"), None)["rows"][2:] != []  # the attempt's own, for what is printed
    assert attempt(3, "out of time", "compiled") == 4
    assert attempt(9, "out of time", "compiled") == 10
    assert attempt(2, "done") == 2
    assert attempt(20, "out of time", "compiled") == 2
    assert attempt(1, "done", device="NVIDIA H200") == 2
    assert len(recorded(tmp_path, "ours-b0", "NVIDIA H200")["rows"]) == 1
    assert not list(tmp_path.glob("*h200*.new"))


def test_a_killed_attempt_is_told_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    options = gpu.parsed(["--out", str(tmp_path)])
    for rows, ended in ((3, "out of time"), (1, "running")):

        def part_of(command, seconds, rows=rows, ended=ended):
            kept = record.Record(tmp_path, "ceilings", {}, seconds)
            for _ in range(rows):
                add_row(kept)
            kept.end(ended)

        monkeypatch.setattr(gpu, "supervised", part_of)
        assert gpu.run(part("ceilings"), options, 60.0) is (ended == "out of time")
    assert "killed at the limit, 1 rows, 0 s; the earlier record has more, and stays" in capsys.readouterr().out
    assert [p.name for p in tmp_path.iterdir()] == ["ceilings.cpu.json"]
    assert len(recorded(tmp_path, "ceilings")["rows"]) == 3


def test_what_tuning_found_comes_back(tmp_path, monkeypatch):
    """From one machine's folder through the archive's file into the next one's; of other versions of torch nothing."""
    monkeypatch.setenv("TRISCALE_HOME", str(tmp_path / "own"))
    question = {"kernel": "squeeze", "gpu": "NVIDIA H100"}
    tuned.use(tmp_path / "one")
    Choices(print).put(question, "c2", {"c2": 1.0})
    assert tuned.gather(tmp_path / "one")
    stale = json.loads((tmp_path / "one" / tuned.FILE).read_text())
    stale["0.json"] = json.dumps({"versions": {"torch": "1.0"}})
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / tuned.FILE).write_text(json.dumps(stale))
    monkeypatch.setattr(tuned, "RESULTS", tmp_path / "tree")
    assert not tuned.gather(tmp_path / "two")
    tuned.use(tmp_path / "two")
    assert Choices(print).get(question) == "c2"
    assert not (tuned.home(tmp_path / "two") / "0.json").exists()
    assert not (tmp_path / "own").exists()


# ---- what travels


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
    rows = recorded(tmp_path, "decode")["rows"]
    assert [(r["way"], r["on_cpu"]) for r in rows] == [
        ("torchvision, device", 0),
        ("triscale, device, to 224 px", 0),
        ("torchvision, CPU, 1 thread", 2),
        ("triscale, CPU, 1 thread, to 224 px", 2),
    ]
    assert all(r["data"] == "small" and r["batch"] == 2 and r["images_per_s"] > 0 for r in rows)
