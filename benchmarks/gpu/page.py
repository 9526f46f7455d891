"""docs/gpu.md: what each kernel should take, by counting, beside what it took; and the peers. Made from results/*.json."""

import json
from collections import Counter
from pathlib import Path

from benchmarks.gpu import code, counting
from benchmarks.gpu.counting import BANDWIDTH, CACHE, LAUNCH, MATRIX, SHARE
from benchmarks.gpu.parts import BATCHES, LIMIT, NETWORKS, PARTS
from benchmarks.gpu.record import outcomes, read
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
    compiler = compiled_by(results)
    read_so_far = f"(compiled by Triton {compiler}; another version's may differ)" if per_output else "(not read yet)"
    parts = [INTRODUCTION.format(code=read_so_far), BARE, "## What was run", *measured_on(bodies), "## Whole networks", *networks(bodies, per_output)]
    for name in NETWORKS:
        parts += [f"## {name.upper()}, kernel by kernel", *kernels(name, bodies, per_output)]
    return "\n\n".join([*parts, *peers(bodies), *depthwise(bodies), *decoding(bodies)]) + "\n"


INTRODUCTION = f"""# On a GPU

Made by `make gpu` (`python -m benchmarks.gpu`), which runs on a machine with an NVIDIA GPU every test and benchmark that is ready, in parts
of at most {LIMIT / 60:.0f} minutes, what matters most first: `make gpu PARTS="tests kernels-b0"`, `make gpu MINUTES=25`. The figures lie in
`benchmarks/gpu/results/`. It installs nothing: what the machine lacks travels in a folder that `python -m benchmarks.gpu carry DIR` gathers.

**Predicted** is arithmetic, for an H200 ({BANDWIDTH / 1e12:.1f} TB/s copied, {MATRIX / 1e12:.0f} TFLOP/s in bf16, both measured on such a chip;
{CACHE / 1e12:.1f} TB/s from the second-level cache, assumed): each launch moves its inputs and outputs once, in bf16, at {SHARE:.0%} of the
bandwidth; or it is bound by {SHARE:.0%} of the cache's, of the matrix units' rate, or of the instructions' by its machine code
{{code}}, whichever takes longest. Whole networks also take {1e6 * LAUNCH:.1f} µs a launch, assumed.
The **bound** is bytes and arithmetic at the full rates, feature maps alone counted. The image counts as bf16 for whole networks, as
uint8 for the stem's kernel, as each is measured. **Measured** stands beside it where it was, each table on one device, which it
names."""

BARE = """## On a machine that starts bare

Where each command meets a machine that may be a new one, which a copy of this tree reaches and of which one folder, $RESULTS, comes
back: the first line here, once, into a folder inside the tree that git ignores and that is told to travel with it; the second
there, as often as there is time; the third here, after each.

```
python -m benchmarks.gpu carry runs/carried --packs PACK --weights FILE.safetensors
python3 -m benchmarks.gpu --carried runs/carried --remaining --minutes 9 --archive $RESULTS/results.tgz
tar xzf results.tgz -C benchmarks/gpu/results && python -m benchmarks.gpu page
```

`--remaining` leaves out what is done on such a device by the records in the tree, so that the same line goes on where the last one ended."""


def compiled_by(results):
    """The Triton that the machine code was read from; None before it was."""
    path = results / code.FILE
    return json.loads(path.read_text(encoding="utf-8")).get("triton") if path.is_file() else None


def table(header, rows):
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def device_of(body):
    return (body["machine"]["device"] or {}).get("name", "no device")


def on_one_device(bodies, names):
    """(bodies of the parts `names` from the device that most of them ran on, a line that names it and what is left out; "" where none ran)."""
    found = {name: bodies[name] for name in names if name in bodies}
    if not found:
        return {}, ""
    device = Counter(map(device_of, found.values())).most_common(1)[0][0]
    others = [f"{name} ({device_of(body)})" for name, body in found.items() if device_of(body) != device]
    kept = {name: body for name, body in found.items() if device_of(body) == device}
    return kept, f"Measured on: {device}." + (f" Left out, as measured elsewhere: {', '.join(others)}." if others else "")


def noted(note, *parts):
    return [*([note] if note else []), *parts]


def measured_on(bodies):
    """One row a part: where, when, how it ended."""
    rows = []
    for part in PARTS:
        body = bodies.get(part.name)
        if body is None:
            rows.append([part.name, part.about, NOT, "", ""])
            continue
        v = body["machine"]["versions"]
        where = f"{device_of(body)}, driver {body['machine']['smi_before'].get('driver_version')}; torch {v['torch']}, Triton {v['triton']}"
        rows.append([part.name, part.about, f"{body['date']}, {body['ended']}", where, clock(body["machine"].get("clocks_timed"))])
    lines = [table(["part", "what", "measured", "on", "clock while timed"], rows)]
    tests = rows_of(bodies, "tests", "test")
    if tests:
        lines.append(f"Tests on the device: {', '.join(f'{n} {outcome}' for outcome, n in outcomes(tests).items())}.")
        failed = [f"- {r['name']}: {r['message']}" for r in tests if r["outcome"] in ("failed", "error")]
        lines += ["\n".join(failed)] if failed else []
    ceilings = rows_of(bodies, "ceilings", "ceiling")
    if ceilings:
        rates = "; ".join(f"{r['what']} {r['rate'] / 1e12:.2f} T{r['unit']}" for r in ceilings)
        lines.append(f"Ceilings of {device_of(bodies['ceilings'])}: {rates}.")
    return lines


def clock(found):
    """Of clocks.summary: the median, the range, and what lowered it."""
    if not found:
        return "not read"
    lowered = "".join(f", {name} in {share:.0%}" for name, share in found["lowered"].items())
    return f"{found['sm_mhz']:.0f} MHz ({found['sm_mhz_min']:.0f} to {found['sm_mhz_max']:.0f}){lowered}"


def rows_of(bodies, part, kind):
    return [r for r in bodies[part]["rows"] if r["kind"] == kind] if part in bodies else []


def networks(bodies, per_output):
    bodies, note = on_one_device(bodies, [f"{kind}-{name}" for kind in ("ours", "latency") for name in NETWORKS] + ["ours-top1"])
    rows = []
    for name in NETWORKS:
        found, batch = counting.steps(arch(f"efficientnet_{name}")), BATCHES[name][0]
        counted = [f"{counting.total(found, lambda step: step.maps) / 1e6:.1f}", f"{counting.launches(found)}", f"{counting.bound(found):,.0f}"]
        counted.append(f"{counting.rate(found, per_output, batch):,.0f} at {batch}")
        px = arch(f"efficientnet_{name}").resolution
        measured = [*in_turn(bodies, f"ours-{name}", "inference"), *in_turn(bodies, f"latency-{name}", "latency")]
        rows.append([f"{name.upper()}, {px} px", *counted, *measured])
    header = [
        "network",
        "MB an image",
        "launches",
        "bound, images/s",
        "predicted for an H200",
        "ours at batch",
        "from uint8",
        "timm's best",
        "torchvision's best",
    ]
    header += ["ours / timm's best", "batch 1, ms: ours", "timm's best", "torchvision's best", "timm's best / ours"]
    lines = noted(note, table(header, rows))
    for r in rows_of(bodies, "ours-top1", "agreement"):
        right = f"; right are {r['right']}, in fp32 {r['right_plain']}" if r["right"] is not None else ""
        lines.append(f"{r['network']}{by(r)}: {r['different']} of {r['images']} pictures get another class than in fp32{right}.")
    return lines


def in_turn(bodies, part, mode):
    """Cells: ours, from uint8 (rates alone), each library's best with its way, and how ours compares with timm's best."""
    rows = rows_of(bodies, part, "in turn")
    last = {(r["library"], r["way"]): r for r in rows}
    latency = mode == "latency"

    def cell(row, way=""):
        return NOT if row is None else f"{row['ms']:.2f}{way}" if latency else f"{row['images_per_s']:,.0f} at {row['batch']}{way}"

    ours, pixels = (last.get(("triscale", way)) for way in ("ours", "ours from uint8"))
    cells = [cell(ours, by(ours))] + ([] if latency else [cell(pixels, by(pixels))])
    best = {}
    for (library, _), row in last.items():
        best[library] = min(row, best.get(library, row), key=lambda r: r["ms"] / r["batch"])
    cells += [cell(best.get(library), f" ({best[library]['way']})" if library in best else "") for library in ("timm", "torchvision")]
    top = best.get("timm")
    against = [r for r in rows_of(bodies, part, "comparison") if top and (r["library"], r["way"]) == ("timm", top["way"])]
    return [*cells, f"{against[-1]['times']:.2f} ({against[-1]['times_min']:.2f} to {against[-1]['times_max']:.2f})" if against else NOT]


def by(row):
    """A warning where the row isn't the kernels' at all."""
    return " (**not the kernels: the network itself ran**)" if row and (row["used"] or "").startswith("plain") else ""


def kernels(name, bodies, per_output):
    """Each distinct launch, a repeated one once with its number; measured by the fastest configuration tried."""
    bodies, note = on_one_device(bodies, [f"kernels-{name}", "ceilings"] if f"kernels-{name}" in bodies else [])
    copied = next((r["rate"] for r in rows_of(bodies, "ceilings", "ceiling") if r["unit"] == "byte/s"), None)
    took = {}
    for row in rows_of(bodies, f"kernels-{name}", "kernel"):
        took[row["key"]] = min(row, took.get(row["key"], row), key=lambda r: r["ms"])
    rows, sums = [], [0.0, 0.0]
    found = counting.steps(arch(f"efficientnet_{name}"), pixel=1)
    for step in found:
        seconds, limit = counting.predicted(step, per_output)
        row = took.get(step.key)
        measured = [short(1e3 * row["ms"] / row["batch"]), rate(row["bytes_per_s"], copied)] if row else [NOT, NOT]
        sums = [sums[0] + 1e6 * step.times * seconds, sums[1] + (1e3 * step.times * row["ms"] / row["batch"] if row else 0.0)]
        shape = "x".join(map(str, step.source)) + (f" -> {'x'.join(map(str, step.out))}" if step.kind != "squeeze" else f" by {step.squeezed}")
        kind = f"{step.kind} {step.kernel}x{step.kernel}" if step.kernel > 1 else step.kind
        rows.append([step.place, kind, f"{step.times}", shape, short(step.bytes / 1e6), short(1e6 * seconds), limit, *measured])
    complete = all(step.key in took for step in found)
    rows.append(["all", "", f"{counting.total(found, lambda step: 1)}", "", f"{counting.total(found, lambda step: step.bytes) / 1e6:.1f}"])
    rows[-1] += [f"{sums[0]:.2f}", "", f"{sums[1]:.2f}" if complete else NOT, ""]
    header = ["stage", "kernel", "times", "one image", "MB", "predicted for an H200, µs an image", "limited by", "measured µs an image"]
    return noted(note, table([*header, "measured TB/s (of this device's copy)"], rows))


def short(value):
    return f"{value:.3f}" if value >= 0.001 else "< 0.001"


def rate(bytes_per_s, copied):
    """TB/s, and its share of what the device copies where that was measured."""
    return f"{bytes_per_s / 1e12:.2f}{f' ({bytes_per_s / copied:.0%})' if copied else ''}"


def peers(bodies):
    parts = []
    for mode, title in (("inference", "inference"), ("training", "training steps")):
        with_ours = [f"ours-{name}" for name in NETWORKS] if mode == "inference" else []
        here, note = on_one_device(bodies, [f"peers-{mode}-{name}" for name in NETWORKS] + with_ours)
        rows = []
        for name in NETWORKS:
            found = rows_of(here, f"peers-{mode}-{name}", "network")
            found += [r for r in rows_of(here, f"ours-{name}", "network") if r["library"] == "triscale"] if with_ours else []
            for library, way in dict.fromkeys((r["library"], r["way"]) for r in found):
                mine = [r for r in found if (r["library"], r["way"]) == (library, way)]
                rates, waits = ([r for r in mine if r["mode"] == m] for m in (mode, "latency"))
                top = max(rates, key=lambda r: r["images_per_s"], default=None)
                cells = [f"{top['batch']}", f"{top['images_per_s']:,.0f}{by(top)}", f"{(top['peak_bytes'] or 0) / 1e9:.1f}"] if top else ["", NOT, ""]
                rows.append([name.upper(), library, way, *cells, f"{waits[-1]['ms']:.2f}" if waits else "—"])
        header = ["network", "library", "way", "best batch", "images/s", "peak GB reserved", "latency ms, batch 1"]
        parts += [f"## Each alone, every batch size tried: {title}", *noted(note, table(header, rows) if rows else f"{NOT.capitalize()}.")]
    return parts


def depthwise(bodies):
    here, note = on_one_device(bodies, ["depthwise", "ceilings"] if "depthwise" in bodies else [])
    copied = next((r["rate"] for r in rows_of(here, "ceilings", "ceiling") if r["unit"] == "byte/s"), None)
    rows = {}
    for r in rows_of(here, "depthwise", "depthwise"):
        key = f"{r['way']} [{r['backend']}]: {r['pass']}"
        rows.setdefault((r["channels"], r["side"], r["kernel"], r["stride"], r["batch"]), {})[key] = r["bytes_per_s"]
    title = "## torch's depthwise convolution, TB/s of the bytes counted (of this device's copy)"
    if not rows:
        return [title, f"{NOT.capitalize()}."]
    columns = list(dict.fromkeys(key for found in rows.values() for key in found))
    header = ["channels", "side", "kernel", "stride", "batch", *columns]
    cells = [[*map(str, shape), *(rate(found[key], copied) if key in found else "—" for key in columns)] for shape, found in rows.items()]
    return [title, *noted(note, table(header, cells))]


def decoding(bodies):
    here, note = on_one_device(bodies, ["decode"])
    rows = [[r["data"], r["way"], f"{r['batch']}", f"{r['images_per_s']:,.0f}", f"{r['on_cpu']}"] for r in rows_of(here, "decode", "decode")]
    shown = table(["pictures", "way", "batch", "images/s", "of them on the CPU"], rows) if rows else f"{NOT.capitalize()}."
    return ["## JPEG decoding", *noted(note, shown)]
