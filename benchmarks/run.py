"""Runs every benchmark with pinned cores; writes results/*.json with versions and machine, and docs/benchmarks.md from them.

python -m benchmarks.run [startup] [forward_b0] [training_step] [predict] [detection] [memory] [loader] [search_overhead]
[search_sharing] [optimized]
"""

import importlib
import json
import os
import platform
import re
import sys
import time
from pathlib import Path

from benchmarks import detection, loader, optimized, search_overhead, search_sharing
from benchmarks.forward_b0 import ratios
from triscale.report import DEMO_HEADER, demo_plot, demo_rows, verdict

HERE = Path(__file__).parent
RESULTS, PAGE, README = HERE / "results", HERE.parent / "docs" / "benchmarks.md", HERE.parent / "README.md"
DEMO = HERE.parent / "studies" / "demo" / "results.json"
CORES = {
    **{"startup": 2, "forward_b0": 1, "training_step": 2, "predict": 2, "detection": 2},
    **{"memory": 2, "loader": 2, "search_overhead": 1, "search_sharing": 2, "optimized": 1},
}


def machine(cores):
    import timm
    import torch
    import torchvision

    from triscale.demo import processor

    versions = {"python": platform.python_version(), "torch": torch.__version__, "timm": timm.__version__, "torchvision": torchvision.__version__}
    return {"processor": processor(), "cores": cores, "date": time.strftime("%Y-%m-%d"), "load_before": os.getloadavg()[0], **versions}


def main(names):
    RESULTS.mkdir(exist_ok=True)
    available = sorted(os.sched_getaffinity(0))
    for name in names or CORES:
        if name == "pages":
            continue
        os.sched_setaffinity(0, available[: CORES[name]])
        about = machine(CORES[name])
        print(f"{name} ...", flush=True)
        rows = importlib.import_module(f"benchmarks.{name}").main()
        body = {"benchmark": name, "machine": about, "rows": rows}
        (RESULTS / f"{name}.json").write_text(json.dumps(body, indent=1) + "\n")
        os.sched_setaffinity(0, available)
    PAGE.write_text(page())
    README.write_text(readme(README.read_text()))
    demo_plot(json.loads(DEMO.read_text())["networks"], PAGE.parent / "demo.png")
    if (RESULTS / "search_overhead.json").is_file():
        search_overhead.plot(json.loads((RESULTS / "search_overhead.json").read_text())["rows"], PAGE.parent / "search-overhead.png")
    print(PAGE.read_text())


def readme(text):
    """The README with its measured blocks filled in from the results."""
    demo = json.loads(DEMO.read_text())
    m = demo["machine"]
    rows = [[f"**{cell}**" if row[0] == demo["best"] else cell for cell in row] for row in demo_rows(demo["networks"])]
    where = f"{m['workers']} processes on {m['processor']}, torch {m['torch']}: {demo['seconds']:.0f} s"
    blocks = {"demo": f"{table(DEMO_HEADER, rows)}\n\n{verdict(demo['networks'], demo['budget'])} ({where}.)", "measured": measured()}
    for name, block in blocks.items():
        text = re.sub(rf"<!-- {name} -->.*?<!-- /{name} -->", lambda _, n=name, b=block: f"<!-- {n} -->\n{b}\n<!-- /{n} -->", text, flags=re.DOTALL)
    return text


def measured():
    rows = []
    for name, what in (("forward_b0", "B0 forward, batch 1, one thread"), ("training_step", "B0 training step, batch 32 at 64 px, two threads")):
        body = json.loads((RESULTS / f"{name}.json").read_text())
        best = {}
        for r in body["rows"]:
            key = (r["padding"], r["library"])
            if "bfloat16" not in r["format"]:
                best[key] = min(best.get(key, float("inf")), r["median_ms"])
        for r in ratios(body["rows"]):
            ours, theirs = best[r["padding"], "triscale"], best[r["padding"], r["against"]]
            rows.append([what, f"{r['padding']} padding", r["against"], f"{ours:.1f} ms", f"{theirs:.1f} ms", f"{r['ratio']:.2f}"])
        if name == "training_step":
            plain = next(r["median_ms"] for r in body["rows"] if (r["library"], r["padding"], r["format"]) == ("timm", "same", "NCHW"))
            ours = best["same", "triscale"]
            rows.append([what, "same padding", "timm, plain loop (NCHW)", f"{ours:.1f} ms", f"{plain:.1f} ms", f"{ours / plain:.2f}"])
    body = json.loads((RESULTS / "predict.json").read_text())
    what = "B0, JPEG files to classes, two cores"
    first = body["rows"][0]["images_per_s"]
    for peer, name in (("documented", "timm, documented recipe"), ("two workers", "timm at its best")):
        ratio = predict_ratio(body["rows"], peer)
        rows.append([what, "same padding", name, f"{first:.1f} images/s", f"{first / ratio:.1f} images/s", f"{ratio:.2f}"])
    rows += loading()
    head = table(["CPU, eager, float32", "", "against", "triscale", "peer", "ratio"], rows)
    how = (
        "Medians, in turn in one run, on as many pinned cores as threads; times with each library in its better memory format. "
        "Times below 1 and rates above 1: ours is faster."
    )
    return f"{head}\n\n{how} {about(body, cores=False)}"


def loading():
    """uint8 training batches of 224 px, in images a second of CPU time."""
    rates = {
        (r["library"], r["source"], r["augment"]): r for r in json.loads((RESULTS / "loader.json").read_text())["rows"] if r.get("product") == "uint8"
    }
    out = []
    for source in ("original files", "pack"):
        for augment, more in (("none", ""), ("autoaugment", ", AutoAugment")):
            ours, theirs = rates["triscale", source, augment], rates["timm", "original files", augment]
            cells = [f"{r['images_per_cpu_s']:.0f} images/s" for r in (ours, theirs)]
            out.append(
                [f"JPEG files to training batches, a core{more}", f"from {source}", "timm, original files", *cells, f"{ours['times_timm']:.2f}"]
            )
    return out


def table(header, rows):
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def about(body, cores=True):
    m = body["machine"]
    pinned = f", {m['cores']} core{'s' * (m['cores'] > 1)} pinned" if cores else ""
    versions = f"Python {m['python']}, torch {m['torch']}, timm {m['timm']}, torchvision {m['torchvision']}"
    return f"{m['processor']}{pinned}; {versions}; {m['date']}."


def page():
    """docs/benchmarks.md, from whatever results there are."""
    bodies = {name: json.loads((RESULTS / f"{name}.json").read_text()) for name in CORES if (RESULTS / f"{name}.json").is_file()}
    parts = [
        "# Benchmarks\n\nMade by `make bench` (`python -m benchmarks.run`); the figures lie in `benchmarks/results/`. Medians; "
        "peers take turns with us in one run."
    ]
    if "startup" in bodies:
        rows = [
            [r["what"], f"{r['median_ms']:.2f}", f"{r['min_ms']:.2f} to {r['max_ms']:.2f}", f"{r['limit_ms'] or '—'}"]
            for r in bodies["startup"]["rows"]
        ]
        parts += ["## Before anything is computed", about(bodies["startup"]), table(["what", "median ms", "range ms", "limit ms"], rows)]
    titles = {
        "forward_b0": "EfficientNet-B0, forward, batch 1 at 224 px, one thread, eager float32",
        "training_step": "EfficientNet-B0, training step with SGD, batch 32 at 64 px, two threads, eager float32",
    }
    for name, title in titles.items():
        if name not in bodies:
            continue
        rows = bodies[name]["rows"]
        cells = [[r["library"], r["padding"], r["format"], f"{r['median_ms']:.2f}", f"{r['min_ms']:.2f}", f"{r['sd_ms']:.2f}"] for r in rows]
        parts += [f"## {title}", about(bodies[name]), table(["library", "padding", "format", "median ms", "fastest ms", "sd ms"], cells)]
        lines = [f"- {r['padding']} padding: {r['ratio']:.3f} of {r['against']}'s time" for r in ratios(rows)]
        if name == "training_step":
            lines += [
                f"- {r['padding']} padding, bfloat16: {r['ratio']:.3f} of {r['against']}'s time" for r in ratios(rows, ("channels-last, bfloat16",))
            ]
        parts.append("triscale against each peer with the same padding, each in its better format (below 1: faster):\n\n" + "\n".join(lines))
    if "optimized" in bodies:
        parts += ["## EfficientNet-B0 optimised, forward, batch 1 at 224 px, one thread", about(bodies["optimized"])]
        parts += [p if isinstance(p, str) else table(*p) for p in optimized.described(bodies["optimized"]["rows"])]
    if "predict" in bodies:
        rows = bodies["predict"]["rows"]
        cells = [[r["what"], f"{r['images_per_s']:.1f}", f"{r['min']:.1f} to {r['max']:.1f}" if r["min"] else "—"] for r in rows]
        parts += [
            "## From JPEG files to classes: 256 ImageNet pictures through B0, two cores",
            about(bodies["predict"]),
            table(["what", "images/s, median", "range"], cells),
            "Decoding, preprocessing and the network, timed together; the same weights in all. triscale against timm: "
            f"{predict_ratio(rows, 'documented'):.2f} times the documented recipe's rate, {predict_ratio(rows, 'two workers'):.2f} times its best.",
        ]
    if "detection" in bodies:
        parts += ["## Detection: RetinaNet at 512 px, batch 1, two threads", about(bodies["detection"])]
        parts += [p if isinstance(p, str) else table(*p) for p in detection.described(bodies["detection"]["rows"])]
    if "memory" in bodies:
        cells = [[r["format"], r["way"], f"{r['peak'] / 1e9:.2f}", f"{r['ratio']:.2f}", f"{r['limit']}"] for r in bodies["memory"]["rows"]]
        parts += [
            "## Memory of reading a checkpoint of EfficientNet-L2 (480 M parameters, 1.93 GB)",
            about(bodies["memory"]),
            table(["file", "by", "peak GB", "of the tensors' size", "limit"], cells),
            "Resident memory above that of the same process before, the network itself included.",
        ]
    if "loader" in bodies:
        title = "## From JPEG bytes to 224-px training batches: images a second of CPU time"
        parts += [title, about(bodies["loader"]), *(p if isinstance(p, str) else table(*p) for p in loader.described(bodies["loader"]["rows"]))]
    if "search_overhead" in bodies:
        rows = bodies["search_overhead"]["rows"]
        parts += ["## What a search costs beside the score", about(bodies["search_overhead"])]
        parts += [p if isinstance(p, str) else table(*p) for p in search_overhead.described(rows)]
    if "search_sharing" in bodies:
        parts += ["## What sharing a study costs", about(bodies["search_sharing"])]
        parts += [p if isinstance(p, str) else table(*p) for p in search_sharing.described(bodies["search_sharing"]["rows"])]
    return "\n\n".join(parts) + "\n"


def predict_ratio(rows, peer):
    """Our rate over the peer's."""
    return rows[0]["images_per_s"] / next(r["images_per_s"] for r in rows if peer in r["what"])


if __name__ == "__main__":
    main(sys.argv[1:])
