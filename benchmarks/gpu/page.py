"""docs/gpu.md: what each kernel should take, by counting, beside what it took; and the peers. Made from results/*.json."""

import json
from pathlib import Path

from benchmarks.gpu import code, counting
from benchmarks.gpu.counting import BANDWIDTH, CACHE, LAUNCH, MATRIX, SHARE
from benchmarks.gpu.goals import goals
from benchmarks.gpu.measured import by_device, copied, fastest, last, on_one_device, plain, rates_of, rows_of
from benchmarks.gpu.parts import BATCHES, LIMIT, NETWORKS, PARTS
from benchmarks.gpu.record import device_of, outcomes
from triscale.families import arch
from triscale.files import write_text

PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "gpu.md"
NOT = "not measured"
NOTES = 8  # of a part, at most
UNITS = {"byte/s": "TB/s", "FLOP/s": "TFLOP/s"}
LIBRARIES = ("timm", "torchvision")


def main(results):
    write_text(PAGE, text(results))
    print(f"wrote {PAGE.relative_to(PAGE.parent.parent)}")
    return 0


def text(results):
    """The page from the records in `results`, those of rehearsals left out."""
    found = by_device(results)
    per_output = code.per_output(results)
    compiler = compiled_by(results)
    read_so_far = f"(compiled by Triton {compiler}; another version's may differ)" if per_output else "(not read yet)"
    parts = [INTRODUCTION.format(code=read_so_far), BARE, "## What was to be reached", *reached(found), "## What was run", *measured_on(found)]
    parts += ["## Whole networks", *networks(found, per_output)]
    for name in NETWORKS:
        parts += [f"## {name.upper()}, kernel by kernel", *kernels(name, found, per_output)]
    return "\n\n".join([*parts, *peers(found), *depthwise(found), *decoding(found)]) + "\n"


INTRODUCTION = f"""# On a GPU

Made by `make gpu` (`python -m benchmarks.gpu`), which runs on a machine with an NVIDIA GPU every test and benchmark that is ready, in parts
of at most {LIMIT / 60:.0f} minutes, what matters most first: `make gpu PARTS="tests kernels-b0"`, `make gpu MINUTES=25`. The figures lie in
`benchmarks/gpu/results/`. It installs nothing: what the machine lacks travels in a folder that `python -m benchmarks.gpu carry DIR` gathers.

**Predicted** is arithmetic, for an H200 ({BANDWIDTH / 1e12:.1f} TB/s copied, {MATRIX / 1e12:.0f} TFLOP/s in bf16, both measured on such a chip;
{CACHE / 1e12:.1f} TB/s from the second-level cache, assumed): each launch moves its inputs and outputs once, in bf16, at {SHARE:.0%} of the
bandwidth; or it is bound by {SHARE:.0%} of the cache's, of the matrix units' rate, or of the instructions' by its machine code
{{code}}, whichever takes longest. Whole networks also take {1e6 * LAUNCH:.1f} µs a launch, assumed.
Beside the figures of a device whose own copy and product were measured, the predictions count on these; the table's head says so.
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

`--remaining` leaves out what is done on such a device by the records in the tree, so that the same line goes on where the last one ended.
The archive also holds what tuning the kernels found, `tuned.json`, with which the next machine begins. A record is replaced only by a better
one of the same device: one that is done, has a comparison that was lacking, or more rows. What was to be reached, and what was, is printed
at the end."""


def compiled_by(results):
    """The Triton that the machine code was read from; None before it was."""
    path = results / code.FILE
    return json.loads(path.read_text(encoding="utf-8")).get("triton") if path.is_file() else None


def table(header, rows):
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def noted(note, *parts):
    return [*([note] if note else []), *parts]


def reached(found):
    """One list a device."""
    if not found:
        return [f"{NOT.capitalize()}.", "\n".join(f"- {line}" for line in goals({}))]
    return [text for device, bodies in found.items() for text in (f"{device}:", "\n".join(f"- {line}" for line in goals(bodies)))]


def measured_on(found):
    """One row a part and device: where, when, how it ended; and what its run noted."""
    rows, notes, lines = [], [], []
    for part in PARTS:
        here = [(device, bodies[part.name]) for device, bodies in found.items() if part.name in bodies]
        if not here:
            rows.append([part.name, part.about, NOT, "", ""])
        for device, body in here:
            v = body["machine"]["versions"]
            where = f"{device}, driver {body['machine']['smi_before'].get('driver_version')}; torch {v['torch']}, Triton {v['triton']}"
            rows.append([part.name, part.about, f"{body['date']}, {body['ended']}", where, clock(body["machine"].get("clocks_timed"))])
            notes += told(f"{part.name}, {device}" if len(found) > 1 else part.name, body["notes"])
    for device, bodies in found.items():
        if tests := rows_of(bodies, "tests", "test"):
            lines.append(f"Tests on {device}: {', '.join(f'{n} {outcome}' for outcome, n in outcomes(tests).items())}.")
            failed = [f"- {r['name']}: {r['message']}" for r in tests if r["outcome"] in ("failed", "error")]
            lines += ["\n".join(failed)] if failed else []
        if ceilings := rows_of(bodies, "ceilings", "ceiling"):
            rates = "; ".join(f"{r['what']} {r['rate'] / 1e12:.2f} {UNITS[r['unit']]}" for r in ceilings)
            lines.append(f"Ceilings of {device}: {rates}.")
    return [table(["part", "what", "measured", "on", "clock while timed"], rows), *lines, *(["Noted on the way:", "\n".join(notes)] if notes else [])]


def told(name, notes):
    """A part's notes, the first NOTES of them."""
    more = [f"- {name}: {len(notes) - NOTES} more, in its record"] if len(notes) > NOTES else []
    return [f"- {name}: {note}" for note in notes[:NOTES]] + more


def clock(found):
    """Of clocks.summary: the median, the range, and what lowered it."""
    if not found:
        return "not read"
    lowered = "".join(f", {name} in {share:.0%}" for name, share in found["lowered"].items())
    return f"{found['sm_mhz']:.0f} MHz ({found['sm_mhz_min']:.0f} to {found['sm_mhz_max']:.0f}){lowered}"


def networks(found, per_output):
    names = [f"{kind}-{name}" for kind in ("ours", "latency") for name in NETWORKS] + ["ours-top1"]
    bodies, note = on_one_device(found, names, also=["ceilings"])
    rates, device = rates_of(bodies), by_what(bodies)
    rows = []
    for name in NETWORKS:
        steps, batch = counting.steps(arch(f"efficientnet_{name}")), BATCHES[name][0]
        counted = [f"{counting.total(steps, lambda step: step.maps) / 1e6:.1f}", f"{counting.launches(steps)}", f"{counting.bound(steps):,.0f}"]
        counted.append(f"{counting.rate(steps, per_output, batch, rates):,.0f} at {batch}")
        px = arch(f"efficientnet_{name}").resolution
        measured = [*in_turn(bodies, f"ours-{name}", "inference"), *in_turn(bodies, f"latency-{name}", "latency")]
        rows.append([f"{name.upper()}, {px} px", *counted, *measured])
    header = ["network", "MB an image", "launches", "bound, images/s", f"predicted for {device}", "ours at batch", "from uint8"]
    header += [f"{library}'s best" for library in LIBRARIES] + [f"ours / {library}'s best" for library in LIBRARIES]
    header += ["batch 1, ms: ours", *(f"{library}'s best" for library in LIBRARIES), *(f"{library}'s best / ours" for library in LIBRARIES)]
    lines = noted(note, table(header, rows))
    for r in rows_of(bodies, "ours-top1", "agreement"):
        right = f"; right are {r['right']}, in fp32 {r['right_plain']}" if r["right"] is not None else ""
        lines.append(f"{r['network']}{by(r)}: {r['different']} of {r['images']} pictures get another class than in fp32{right}.")
    return lines


def by_what(bodies):
    """For which device predictions are: the one measured where its ceilings are there, else an H200."""
    if not rows_of(bodies, "ceilings", "ceiling"):
        return "an H200"
    rates = rates_of(bodies)
    return f"{device_of(bodies['ceilings'])} by its own {rates.bandwidth / 1e12:.2f} TB/s and {rates.matrix / 1e12:.0f} TFLOP/s"


def in_turn(bodies, part, mode):
    """Cells: ours, from uint8 (rates alone), each library's best with its way, and how ours compares with each library's best."""
    rows, compared = last(bodies, part, "in turn"), last(bodies, part, "comparison")
    latency = mode == "latency"

    def cell(row, way=""):
        return NOT if row is None else f"{row['ms']:.2f}{way}" if latency else f"{row['images_per_s']:,.0f} at {row['batch']}{way}"

    ours, pixels = (rows.get(("triscale", way)) for way in ("ours", "ours from uint8"))
    cells = [cell(ours, by(ours))] + ([] if latency else [cell(pixels, by(pixels))])
    best = {}
    for (library, _), row in rows.items():
        best[library] = min(row, best.get(library, row), key=lambda r: r["ms"] / r["batch"])
    cells += [cell(best.get(library), f" ({best[library]['way']})" if library in best else "") for library in LIBRARIES]
    against = [compared.get((library, best[library]["way"])) if library in best else None for library in LIBRARIES]
    return [*cells, *(f"{r['times']:.2f} ({r['times_min']:.2f} to {r['times_max']:.2f})" if r else NOT for r in against)]


def by(row):
    """A warning where the row isn't the kernels' at all."""
    return " (**not the kernels: the network itself ran**)" if row and plain(row) else ""


def kernels(name, found, per_output):
    """Each distinct launch, a repeated one once with its number; measured by the fastest configuration tried."""
    bodies, note = on_one_device(found, [f"kernels-{name}"], also=["ceilings"])
    copy, rates, took = copied(bodies), rates_of(bodies), fastest(bodies, f"kernels-{name}")
    rows, sums = [], [0.0, 0.0]
    steps = counting.steps(arch(f"efficientnet_{name}"), pixel=1)
    for step in steps:
        seconds, limit = counting.predicted(step, per_output, rates)
        row = took.get(step.key)
        measured = [short(1e3 * row["ms"] / row["batch"]), rate(row["bytes_per_s"], copy)] if row else [NOT, NOT]
        sums = [sums[0] + 1e6 * step.times * seconds, sums[1] + (1e3 * step.times * row["ms"] / row["batch"] if row else 0.0)]
        shape = "x".join(map(str, step.source)) + (f" -> {'x'.join(map(str, step.out))}" if step.kind != "squeeze" else f" by {step.squeezed}")
        kind = f"{step.kind} {step.kernel}x{step.kernel}" if step.kernel > 1 else step.kind
        rows.append([step.place, kind, f"{step.times}", shape, short(step.bytes / 1e6), short(1e6 * seconds), limit, *measured])
    complete = all(step.key in took for step in steps)
    rows.append(["all", "", f"{counting.total(steps, lambda step: 1)}", "", f"{counting.total(steps, lambda step: step.bytes) / 1e6:.1f}"])
    rows[-1] += [f"{sums[0]:.2f}", "", f"{sums[1]:.2f}" if complete else NOT, ""]
    header = ["stage", "kernel", "times", "one image", "MB", f"predicted for {by_what(bodies)}, µs an image", "limited by", "measured µs an image"]
    return noted(note, table([*header, "measured TB/s (of this device's copy)"], rows))


def short(value):
    return f"{value:.3f}" if value >= 0.001 else "< 0.001"


def rate(bytes_per_s, copy):
    """TB/s, and its share of what the device copies where that was measured."""
    return f"{bytes_per_s / 1e12:.2f}{f' ({bytes_per_s / copy:.0%})' if copy else ''}"


def peers(devices):
    parts = []
    for mode, title in (("inference", "inference"), ("training", "training steps")):
        with_ours = [f"ours-{name}" for name in NETWORKS] if mode == "inference" else []
        here, note = on_one_device(devices, [f"peers-{mode}-{name}" for name in NETWORKS] + with_ours)
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


def depthwise(devices):
    here, note = on_one_device(devices, ["depthwise"], also=["ceilings"])
    copy = copied(here)
    rows = {}
    for r in rows_of(here, "depthwise", "depthwise"):
        key = f"{r['way']} [{r['backend']}]: {r['pass']}"
        rows.setdefault((r["channels"], r["side"], r["kernel"], r["stride"], r["batch"]), {})[key] = r["bytes_per_s"]
    title = "## torch's depthwise convolution, TB/s of the bytes counted (of this device's copy)"
    if not rows:
        return [title, f"{NOT.capitalize()}."]
    columns = list(dict.fromkeys(key for found in rows.values() for key in found))
    header = ["channels", "side", "kernel", "stride", "batch", *columns]
    cells = [[*map(str, shape), *(rate(found[key], copy) if key in found else "—" for key in columns)] for shape, found in rows.items()]
    return [title, *noted(note, table(header, cells))]


def decoding(devices):
    here, note = on_one_device(devices, ["decode"])
    rows = [[r["data"], r["way"], f"{r['batch']}", f"{r['images_per_s']:,.0f}", f"{r['on_cpu']}"] for r in rows_of(here, "decode", "decode")]
    shown = table(["pictures", "way", "batch", "images/s", "of them on the CPU"], rows) if rows else f"{NOT.capitalize()}."
    return ["## JPEG decoding", *noted(note, shown)]
