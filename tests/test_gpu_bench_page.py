"""The page of GPU measurements, and the goals, made from records."""

import json

import pytest
from gpu_bench import NETWORKS, TIMES, steps

import triscale as ts
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import (
    code,
    counting,
    page,
    record,
    worker,
)
from benchmarks.gpu.goals import goals
from benchmarks.gpu.measured import by_device
from triscale.kernels.machine import Variant

pytestmark = pytest.mark.usefixtures("no_results")


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
    for i in range(10):
        kept.note(f"choice {i}: OutOfResources")
    text = page.text(tmp_path)
    assert line_of(text, "| kernels-b0 | ").endswith(
        "NVIDIA H200, driver 580.1; torch 2.11.0, Triton 3.6.0 | 1755 MHz (1500 to 1980), power limit in 25% |"
    )
    assert "\n- kernels-b0: choice 0: OutOfResources\n" in text
    assert "\n- kernels-b0: choice 7: OutOfResources\n- kernels-b0: 2 more, in its record\n" in text
    assert line_of(text, "| stem | stem 3x3 |").endswith("| bytes | 1.000 | 1.25 |")
    whole = sum(s.times * min(i + 1, 10) for i, s in enumerate(steps("b0")))
    assert f"| {whole:.2f} |  |" in text
    ceiling = {"what": "copy", "rate": 2.5e12, "unit": "byte/s", **TIMES}
    measured(tmp_path, "ceilings", device="NVIDIA H100").add("ceiling", **ceiling | {"rate": 3e12})
    assert page.text(tmp_path).count("predicted for an H200, µs an image") == 3
    assert line_of(page.text(tmp_path), "| stem | stem 3x3 |").endswith("| bytes | 1.000 | 1.25 |")
    ceilings = measured(tmp_path, "ceilings")
    ceilings.add("ceiling", **ceiling)
    text = page.text(tmp_path)
    stem = counting.steps(ts.arch("efficientnet_b0"), pixel=1)[0]
    assert line_of(text, "| stem | stem 3x3 |").endswith(f"| {stem.bytes / (0.7 * 2.5e6):.3f} | bytes | 1.000 | 1.25 (50%) |")
    assert "Ceilings of NVIDIA H200: copy 2.50 TB/s." in text
    assert "predicted for NVIDIA H200 by its own 2.50 TB/s and 790 TFLOP/s, µs an image" in text
    moved, took = (sum(s.times * value for s, value in zip(steps("b0"), values, strict=True)) for values in kernel_sums())
    lines = goals(by_device(tmp_path)["NVIDIA H200"])
    assert lines[-1].startswith(f"B0's kernels: {moved / (took * 2.5e6):.0%} of the copy's bandwidth (goal 70%): ")
    assert f"stem {steps('b0')[0].bytes / 2.5e6:.0%}" in lines[-1]


def kernel_sums():
    """Bytes and µs an image of each step, as the test above has them."""
    return [s.bytes for s in steps("b0")], [min(10.0, i + 1.0) for i, _ in enumerate(steps("b0"))]


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
    assert "\n- B0: 90,000 images/s at batch 512, 3.00 times timm compiled, frozen (goal 2.5): reached\n" in text
    add("torchvision", "compiled", 256, 37500.0)
    kept.add("comparison", network="b0", mode="inference", library="torchvision", way="compiled", used=None, times=2.4, times_min=2.3, times_max=2.5)
    text = page.text(tmp_path)
    both = "30,000 at 256 (compiled, frozen) | 37,500 at 256 (compiled) | 3.00 (2.90 to 3.10) | 2.40 (2.30 to 2.50) | not measured |"
    assert f"{mine} {both}" in text
    assert "\n- B0: 90,000 images/s at batch 512, 2.40 times torchvision compiled (goal 2.5): not reached\n" in text
    other = measured(tmp_path, "ours-b4", device="NVIDIA H100")
    columns = about | {"network": "b4", "px": 380}
    other.add("in turn", library="triscale", way="ours", batch=128, used="kernels bfloat16", images_per_s=12345.0, **columns)
    measured(tmp_path, "latency-b0")
    text = page.text(tmp_path)
    assert "Measured on: NVIDIA H200. Left out, as measured elsewhere: ours-b4 (NVIDIA H100)." in text
    assert "12,345 at 128" not in text
    assert "\n- B4: 12,345 images/s at batch 128, not compared with a compiled peer yet (goal 2 times the best compiled peer)\n" in text


def test_what_was_reached():
    def body(*rows):
        return {"rows": [{"library": "triscale", "way": "ours", "used": "kernels bfloat16", **row} for row in rows]}

    def line(part, *rows):
        return next(x for x in goals({part: body(*rows)}) if "not measured" not in x)

    ours, beside = {"kind": "in turn", "ms": 0.4, "images_per_s": 2500.0, "batch": 1}, {"kind": "comparison", "library": "timm", "times": 3.0}
    latency = [ours, beside | {"way": "eager", "times": 9.0}, beside | {"way": "compiled, reduce-overhead"}]
    assert line("latency-b0", *latency) == "B0, batch 1: 0.400 ms, 3.00 times as fast as timm compiled, reduce-overhead (goal 0.5): reached"
    assert line("latency-b0", ours | {"ms": 0.6}) == "B0, batch 1: 0.600 ms (goal 0.5): not reached"
    plain = ours | {"used": "plain: no Triton"}
    assert line("latency-b0", plain) == "B0, batch 1: 0.400 ms, not by the kernels (plain: no Triton) (goal 0.5): not reached"
    assert line("ours-b7", plain, beside | {"way": "compiled"}).endswith("(goal 2 times the best compiled peer): not reached")
    pictures = {"kind": "agreement", "network": "b0", "images": 256}
    assert line("ours-top1", pictures | {"different": 1}) == "b0: 1 of 256 classes change (goal at most 1 of 256): reached"
    assert line("ours-top1", pictures | {"different": 2}).endswith("not reached")
    assert line("ours-top1", pictures | {"different": 1, "images": 200}).endswith("not reached")
    assert all("not measured" in x for x in goals({}))
    assert len(goals({})) == 5


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
