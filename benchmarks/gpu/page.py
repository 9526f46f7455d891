"""docs/gpu.md: what each kernel should take, by counting, beside what it took; and the peers. Made from results/*.json."""

from pathlib import Path

from benchmarks.gpu import code, counting
from benchmarks.gpu.counting import BANDWIDTH, MATRIX, SHARE
from benchmarks.gpu.parts import LIMIT, NETWORKS, PARTS
from benchmarks.gpu.record import read
from triscale.families import arch
from triscale.files import write_text

PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "gpu.md"
NOT = "not measured"


def main(results):
    write_text(PAGE, text(results))
    print(f"wrote {PAGE.relative_to(PAGE.parent.parent)}")
    return 0


def text(results):
    """The page from the records in `results`, those of rehearsals left out."""
    bodies = {part.name: read(results, part.name) for part in PARTS}
    bodies = {name: body for name, body in bodies.items() if body and not body["rehearsal"]}
    per_output = code.per_output(results)
    read_so_far = "" if per_output else " (not read yet)"
    parts = [INTRODUCTION.format(code=read_so_far), "## What was run", *measured_on(bodies), "## Whole networks", *networks(bodies, per_output)]
    for name in NETWORKS:
        parts += [f"## {name.upper()}, kernel by kernel", kernels(name, bodies, per_output)]
    return "\n\n".join([*parts, *peers(bodies), *depthwise(bodies), *decoding(bodies)]) + "\n"


INTRODUCTION = f"""# On a GPU

Made by `make gpu` (`python -m benchmarks.gpu`), which runs on a machine with an NVIDIA GPU every test and benchmark that is ready, in parts
of at most {LIMIT / 60:.0f} minutes: `make gpu PARTS="tests kernels-b0"`. The figures lie in `benchmarks/gpu/results/`. It installs nothing: what the
machine lacks travels in a folder that `python -m benchmarks.gpu carry DIR` gathers.

**Predicted** is arithmetic, for an H200 ({BANDWIDTH / 1e12:.1f} TB/s copied, {MATRIX / 1e12:.0f} TFLOP/s in bf16, both measured on such a chip): each
launch moves its inputs and outputs once, in bf16, at {SHARE:.0%} of the bandwidth; or it is bound by {SHARE:.0%} of the matrix units' rate, or by
the instructions of its machine code{{code}}, whichever takes longest. The **bound** is the same at the full rates, feature maps alone counted.
Weights, the classifier and the gaps between launches are in neither; the image counts as bf16. **Measured** stands beside it where it was."""


def table(header, rows):
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def measured_on(bodies):
    """One row a part: where, when, how it ended."""
    rows = []
    for part in PARTS:
        body = bodies.get(part.name)
        if body is None:
            rows.append([part.name, part.about, NOT, ""])
            continue
        m, v = body["machine"], body["machine"]["versions"]
        clock = m.get("smi_after", {}).get("clocks.sm") or m["smi_before"].get("clocks.sm")
        device = f"{(m['device'] or {}).get('name')}, driver {m['smi_before'].get('driver_version')}, {clock} MHz"
        where = f"{device}; torch {v['torch']}, Triton {v['triton']}"
        rows.append([part.name, part.about, f"{body['date']}, {body['ended']}", where])
    lines = [table(["part", "what", "measured", "on"], rows)]
    tests = rows_of(bodies, "tests", "test")
    if tests:
        count = {outcome: sum(r["outcome"] == outcome for r in tests) for outcome in ("passed", "failed", "error", "skipped")}
        lines.append(f"Tests on the device: {', '.join(f'{n} {outcome}' for outcome, n in count.items())}.")
        lines += (
            ["\n".join(f"- {r['name']}: {r['message']}" for r in tests if r["outcome"] in ("failed", "error"))]
            if count["failed"] + count["error"]
            else []
        )
    ceilings = rows_of(bodies, "ceilings", "ceiling")
    if ceilings:
        lines.append("Ceilings of that device: " + "; ".join(f"{r['what']} {r['rate'] / 1e12:.2f} T{r['unit']}" for r in ceilings) + ".")
    return lines


def rows_of(bodies, part, kind):
    return [r for r in bodies[part]["rows"] if r["kind"] == kind] if part in bodies else []


def networks(bodies, per_output):
    rows = []
    for name in NETWORKS:
        found = counting.steps(arch(f"efficientnet_{name}"))
        rate = 1 / counting.total(found, lambda step: counting.predicted(step, per_output)[0])
        maps, launches = counting.total(found, lambda step: step.maps), counting.total(found, lambda step: 1)
        mine = rows_of(bodies, f"ours-{name}", "in turn")
        cells = [in_turn(mine, way, "inference", lambda r: f"{r['images_per_s']:,.0f} at {r['batch']}") for way in ("ours", "compiled", "eager")]
        latency = [in_turn(mine, way, "latency", lambda r: f"{r['ms']:.2f}") for way in ("ours", "compiled", "eager")]
        against = [r for r in rows_of(bodies, f"ours-{name}", "comparison") if r["mode"] == "inference" and r["against"] == "timm compiled"]
        times = f"{against[-1]['times']:.2f} ({against[-1]['times_min']:.2f} to {against[-1]['times_max']:.2f})" if against else NOT
        px = arch(f"efficientnet_{name}").resolution
        counted = [f"{maps / 1e6:.1f}", f"{launches}", f"{counting.bound(found):,.0f}", f"{rate:,.0f}"]
        rows.append([f"{name.upper()}, {px} px", *counted, *cells, times, " / ".join(latency) if set(latency) != {NOT} else NOT])
    header = ["network", "MB an image", "launches", "bound, images/s", "predicted", "measured at batch: ours", "timm compiled", "timm eager"]
    lines = [table([*header, "ours / timm compiled", "latency ms, batch 1: ours / compiled / eager"], rows)]
    agreement = rows_of(bodies, "ours-top1", "agreement")
    lines += [f"{r['network']}: {r['different']} of {r['images']} pictures get another class than in fp32." for r in agreement]
    return lines


def in_turn(rows, way, mode, shown):
    return next((shown(r) for r in rows if (r["way"], r["mode"]) == (way, mode)), NOT)


def kernels(name, bodies, per_output):
    """Each distinct launch, a repeated one once with its number; measured by the fastest configuration tried."""
    took = {}
    for row in rows_of(bodies, f"kernels-{name}", "kernel"):
        took[row["key"]] = min(row, took.get(row["key"], row), key=lambda r: r["ms"])
    rows, sums = [], [0.0, 0.0]
    found = counting.steps(arch(f"efficientnet_{name}"))
    for step in found:
        seconds, limit = counting.predicted(step, per_output)
        row = took.get(step.key)
        measured = [short(1e3 * row["ms"] / row["batch"]), f"{row['bytes_per_s'] / 1e12:.2f}"] if row else [NOT, NOT]
        sums = [sums[0] + 1e6 * step.times * seconds, sums[1] + (1e3 * step.times * row["ms"] / row["batch"] if row else 0.0)]
        shape = "x".join(map(str, step.source)) + (f" -> {'x'.join(map(str, step.out))}" if step.kind != "squeeze" else f" by {step.squeezed}")
        kind = f"{step.kind} {step.kernel}x{step.kernel}" if step.kernel > 1 else step.kind
        rows.append([step.place, kind, f"{step.times}", shape, short(step.bytes / 1e6), short(1e6 * seconds), limit, *measured])
    complete = all(step.key in took for step in found)
    rows.append(["all", "", f"{counting.total(found, lambda step: 1)}", "", f"{counting.total(found, lambda step: step.bytes) / 1e6:.1f}"])
    rows[-1] += [f"{sums[0]:.2f}", "", f"{sums[1]:.2f}" if complete else NOT, ""]
    return table(
        ["stage", "kernel", "times", "one image", "MB", "predicted µs an image", "limited by", "measured µs an image", "measured TB/s"], rows
    )


def short(value):
    return f"{value:.3f}" if value >= 0.001 else "< 0.001"


def peers(bodies):
    parts = []
    for mode, title in (("inference", "inference"), ("training", "training steps")):
        rows = []
        for name in NETWORKS:
            found = rows_of(bodies, f"peers-{mode}-{name}", "network")
            found += [r for r in rows_of(bodies, f"ours-{name}", "network") if r["library"] == "triscale" and mode == "inference"]
            for library, way in dict.fromkeys((r["library"], r["way"]) for r in found):
                mine = [r for r in found if (r["library"], r["way"]) == (library, way)]
                rates, waits = ([r for r in mine if r["mode"] == m] for m in (mode, "latency"))
                top = max(rates, key=lambda r: r["images_per_s"], default=None)
                cells = [f"{top['batch']}", f"{top['images_per_s']:,.0f}", f"{(top['peak_bytes'] or 0) / 1e9:.1f}"] if top else ["", NOT, ""]
                rows.append([name.upper(), library, way, *cells, f"{waits[-1]['ms']:.2f}" if waits else "—"])
        header = ["network", "library", "way", "best batch", "images/s", "peak GB", "latency ms, batch 1"]
        parts += [f"## Each alone, every batch size tried: {title}", table(header, rows) if rows else f"{NOT.capitalize()}."]
    return parts


def depthwise(bodies):
    rows = {}
    for r in rows_of(bodies, "depthwise", "depthwise"):
        rows.setdefault((r["channels"], r["side"], r["kernel"], r["stride"], r["batch"]), {})[r["way"], r["pass"]] = r["bytes_per_s"] / 1e12
    title = "## torch's depthwise convolution, TB/s of the bytes counted"
    if not rows:
        return [title, f"{NOT.capitalize()}."]
    columns = list(dict.fromkeys(key for found in rows.values() for key in found))
    header = ["channels", "side", "kernel", "stride", "batch", *(f"{way}: {name}" for way, name in columns)]
    cells = [[*map(str, shape), *(f"{found[key]:.2f}" if key in found else "—" for key in columns)] for shape, found in rows.items()]
    return [title, table(header, cells)]


def decoding(bodies):
    rows = [[r["data"], r["way"], f"{r['batch']}", f"{r['images_per_s']:,.0f}", f"{r['on_cpu']}"] for r in rows_of(bodies, "decode", "decode")]
    shown = table(["pictures", "way", "batch", "images/s", "of them on the CPU"], rows) if rows else f"{NOT.capitalize()}."
    return ["## JPEG decoding", shown]
