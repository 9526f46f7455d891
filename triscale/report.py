"""One self-contained HTML page from a run folder's own files: tables, plots, what was run on what.

The demo's page is made here, a training's in training_report.
"""

from __future__ import annotations

import base64
import io
import json
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from triscale.files import write_text
from triscale.quantities import short
from triscale.text import first_line

BLUE, GREY = "#1f5fa8", "#777777"
# Distinct in grey print too: each way has a marker and a line style of its own.
STYLE = {"depth": ("s", "--", "#b35900"), "width": ("^", ":", "#6a51a3"), "resolution": ("D", "-.", "#2b7a4b"), "compound": ("o", "-", BLUE)}


class ReportError(ValueError):
    """A folder that is no run folder."""


def render(folder: Path) -> Path:
    """Writes report.html into the run folder and returns its path. Raises ReportError where there is nothing to report."""
    if (folder / "log.jsonl").is_file():  # an evaluation may lie in a training's folder, but nothing else brings a log
        from triscale.training_report import training_page

        page = training_page(folder)
    elif (folder / "results.json").is_file():
        page = _results_page(folder / "results.json")
    else:
        raise ReportError(f"{folder}: no run folder; expected results.json or log.jsonl in it")
    from jinja2 import Environment, PackageLoader

    template = Environment(loader=PackageLoader("triscale", "."), autoescape=True).get_template("report.html")
    write_text(folder / "report.html", template.render(**page))
    return folder / "report.html"


def _results_page(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        kind = data.get("kind")
    except (ValueError, AttributeError, OSError) as error:
        raise ReportError(f"{path}: can't be read ({first_line(error)})") from None
    if kind == "evaluation":
        raise ReportError(f"{path.parent}: an evaluation, which has no page; its findings are in results.json, its picture in confusion.png")
    if kind not in ("demo", None):
        raise ReportError(f"{path}: expected a demo's results, found kind {kind!r}"[:200])
    return _demo(data)


def accuracy(values: Sequence[float]) -> str:
    """Mean and sample standard deviation in percent: 98.06 ± 0.28."""
    spread = f" ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{100 * statistics.fmean(values):.2f}{spread}"


def verdict(networks: Sequence[dict[str, Any]], budget: int) -> str:
    """What the demo found, in one sentence, whichever way it went."""
    means = {n["name"]: statistics.fmean(n["top1"]) for n in networks}
    ways = sorted((name for name in means if name != "base"), key=lambda name: -means[name])
    base, best, second = f"{100 * means['base']:.2f} %", ways[0], ways[1]
    start = f"At {budget} times the MACs of a network of {base} accuracy, "
    spread = max((statistics.stdev(n["top1"]) for n in networks if n["name"] in (best, second) and len(n["top1"]) > 1), default=0.0)
    lead = means[best] - means[second]
    names = f"{best} scaling came out first with {100 * means[best]:.2f} %"
    rest = f", {second} second with {100 * means[second]:.2f} %"
    if lead <= spread:
        return f"{start}{names}{rest}: a lead of {100 * lead:.2f} points, within the spread over seeds, so no winner on these images."
    end = "as in the paper." if best == "compound" else f"not compound ({100 * means['compound']:.2f} %), unlike the paper."
    return f"{start}{names}{rest}: {end}"


def demo_rows(networks: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """The demo's table: name, multipliers, input, MACs, against the base, parameters, accuracy."""
    base = networks[0]["macs"]
    return [
        (
            n["name"], f"{n['depth']:.2f}", f"{n['width']:.2f}", f"{n['resolution']:.2f}", f"{n['px']} px", short(n["macs"]),
            f"{n['macs'] / base:.2f}×", short(n["params"]), accuracy(n["top1"]),
        )
        for n in networks
    ]  # fmt: skip


DEMO_HEADER = ("scaling", "depth ×", "width ×", "resolution ×", "input", "MACs", "of base", "parameters", "accuracy %, mean ± sd")


def _demo(data: dict[str, Any]) -> dict[str, Any]:
    networks = data["networks"]
    rows = [{"cells": cells, "best": cells[0] == data["best"]} for cells in demo_rows(networks)]
    seeds, m = len(networks[0]["top1"]), data["machine"]
    tested = f"{data['train_images']} scans, tested on {data['held_out_images']} others that took no part in training"
    how = (
        f"{seeds} seeds each, {data['recipe']['epochs']} epochs on {tested}. MACs are multiply-adds for one image. "
        "sd: sample standard deviation over the seeds. Multipliers are before rounding."
    )
    ran = f"{data['seconds']:.0f} s with {m['workers']} processes on {m['processor']}"
    where = f"{ran}; Python {m['python']}, torch {m['torch']}, triscale {m['triscale']}."
    scans = [_scan(s) for s in data["samples"]]
    half = len(scans) // 2
    return {
        "title": "One budget, four ways to scale",
        "lead": verdict(networks, data["budget"]),
        "sections": [
            {"title": "Accuracy against cost", "plot": demo_plot(networks)},
            {"title": "The five networks", "table": {"header": DEMO_HEADER, "rows": rows}, "texts": [how, where]},
            {
                "title": f"What the {data['best']} network says to scans it never saw",
                "scans": scans,
                "texts": [
                    f"The first {half} are those of all held-out scans that it is least certain of; the others are drawn evenly. Wrong: red frame."
                ],
            },
            {
                "title": "The networks in full",
                "summary": "Table 1 of each",
                "details": [n["table"] for n in networks],
            },
        ],
    }


def _scan(s: dict[str, Any]) -> dict[str, Any]:
    return {"image": _png(s["pixels"]), "label": s["label"], "wrong": s["says"] != s["label"], "text": _caption(s)}


def _caption(s: dict[str, Any]) -> str:
    text = f"{s['says']} ({100 * s['probability']:.0f} %)"
    return text if s["says"] == s["label"] else f"{text}, is {s['label']}"


def _png(pixels: list[list[int]]) -> str:
    buffer = io.BytesIO()
    Image.fromarray(255 - np.asarray(pixels, dtype=np.uint8)).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def svg(figure: Any) -> str:
    """A matplotlib Figure as text for a page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    text = buffer.getvalue()
    # matplotlib's own description goes: it is of no use to a reader, and names addresses.
    return re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)


def demo_plot(networks: Sequence[dict[str, Any]], path: Path | None = None) -> str:
    """Accuracy against MACs, a line from the base to each way, one standard deviation as bars. SVG text; also a PNG at `path`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.2))
    axes = figure.add_subplot()
    base, others = networks[0], sorted(networks[1:], key=lambda n: statistics.fmean(n["top1"]))
    x0, y0 = base["macs"] / 1e6, 100 * statistics.fmean(base["top1"])
    ends = [100 * statistics.fmean(n["top1"]) for n in others]
    gap = max(0.055 * (max([*ends, y0]) - min([*ends, y0])), 0.02)
    labels = _apart(ends, 1.6 * gap)
    right = max(n["macs"] for n in others) / 1e6
    for i, (n, y, at) in enumerate(zip(others, ends, labels, strict=True)):
        marker, line, colour = STYLE[n["name"]]
        # The ways cost nearly the same: drawn a little apart, so that no bar hides another.
        x, spread = n["macs"] / 1e6 + (i - 1.5) * 0.02 * right, 100 * (statistics.stdev(n["top1"]) if len(n["top1"]) > 1 else 0)
        axes.plot([x0, x], [y0, y], line, color=colour, linewidth=2.6 if n["name"] == "compound" else 1.4)
        axes.errorbar(x, y, spread, fmt=marker, color=colour, markersize=7, capsize=4, linewidth=1)
        text = f"{n['name']}  {y:.2f} %"
        weight = "bold" if n["name"] == "compound" else "normal"
        axes.annotate(
            text, (x, y), (right * 1.06, at), color=colour, va="center", weight=weight, arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.6}
        )
    axes.plot(x0, y0, "*", color="black", markersize=13)
    axes.annotate(f"base\n{y0:.2f} %", (x0, y0), (-12, 0), textcoords="offset points", ha="right", va="center")
    axes.set_xlim(0, right * 1.4)
    low, high = axes.get_ylim()
    axes.set_ylim(low - 0.08 * (high - low), max(high, max(labels) + gap))
    axes.set_xlabel("multiply-adds per image (millions)")
    axes.set_ylabel("accuracy on held-out scans (%)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    if path:
        figure.savefig(path, dpi=150, bbox_inches="tight")
    return svg(figure)


def _apart(values: list[float], gap: float) -> list[float]:
    """Label positions in the same order, at least `gap` apart, as near to `values` (ascending) as a sweep makes them."""
    out: list[float] = []
    for v in values:
        out.append(max(v, out[-1] + gap) if out else v)
    shift = sum(o - v for o, v in zip(out, values, strict=True)) / max(len(out), 1)
    return [o - shift for o in out]
