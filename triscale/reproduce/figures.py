"""Figures 1 and 5: the paper's accuracies against our counts."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from triscale import paper
from triscale.architecture import Arch
from triscale.cost_model import cost
from triscale.families import arch
from triscale.files import write_whole
from triscale.reproduce.layout import ACCURACY, MACS, Reproduction, billions, difference
from triscale.reproduce.reasons import why
from triscale.reproduce.tables import fitted, scaled


@dataclass(frozen=True)
class Point:
    """One network in a figure: the paper's `macs` and `top1`, and the Arch that x is counted on."""

    name: str
    arch: Arch
    macs: str
    top1: float

    @property
    def series(self) -> str:
        return self.name.split()[0].split("-B")[0]

    @property
    def label(self) -> str:
        return self.name[-2:] if self.series == "EfficientNet" else self.series if self.name.endswith("base") else ""


def _points(ends: tuple[str, ...]) -> list[Point]:
    """B0 to B7, and the rows of Table 3 whose names end so. The rest of Table 2 has no accuracy in paper.py."""
    family = [Point(row.name, arch(row.arch), row.macs or "", row.top1 or 0.0) for row in paper.TABLE2 if row.arch and row.top5]
    return family + [Point(row.name, scaled(row)[1], row.macs, row.top1) for row in paper.TABLE3 if row.name.endswith(ends)]


def figure1() -> tuple[Reproduction, Callable[[], bytes]]:
    points = _points(("base",))
    params = [cost(p.arch).params for p in points]
    rows = tuple((p.name, f"{n:,}", f"{p.top1:.1f}") for p, n in zip(points, params, strict=True))
    result = Reproduction("Figure 1: parameters against ImageNet top-1", ("Network", "Params", "Paper's top-1"), rows, (ACCURACY,))
    return result, partial(_draw, points, [n / 1e6 for n in params], "Parameters (millions, logarithmic)", (3, 5, 10, 20, 30, 50, 80))


def figure5() -> tuple[Reproduction, Callable[[], bytes]]:
    points = _points(("base", "compound"))
    macs = [billions(p.arch) for p in points]
    both = list(zip(points, macs, strict=True))
    rows = tuple((p.name, f"{x:.3f}", p.macs, f"{difference(x, p.macs):+.1%}", f"{p.top1:.1f}") for p, x in both)
    notes = [MACS, ACCURACY, *(n for p, x in both for n in why(p.name, x, p.macs))]
    notes += [fitted(row, scaled(row)[0]) for row in paper.TABLE3 if row.scaling is None]
    header = ("Network", "MACs (B)", "Paper's MACs", "Differs by", "Paper's top-1")
    result = Reproduction("Figure 5: MACs against ImageNet top-1", header, rows, tuple(notes))
    return result, partial(_draw, points, macs, "MACs (billions of multiply-adds, logarithmic)", (0.3, 1, 3, 10, 30))


_STYLES = {  # marker and line, colour, label's offset in points, its alignment: told apart in grey print too
    "EfficientNet": ("o-", "#b2182b", (-5, 5), "right"),
    "MobileNetV1": ("^:", "#1b7837", (7, -9), "left"),
    "MobileNetV2": ("D-.", "#762a83", (7, -9), "left"),
    "ResNet-50": ("s--", "#2166ac", (7, -9), "left"),
}


def _draw(points: list[Point], xs: list[float], x_label: str, ticks: tuple[float, ...]) -> bytes:
    """A PNG of 1080 x 750 pixels. x is logarithmic: on the paper's linear axis B0 to B3 lie on one another."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    figure = Figure(figsize=(7.2, 5.0), dpi=150, layout="constrained")
    axes = figure.subplots()
    for series, (style, color, offset, align) in _STYLES.items():
        of = [(p, x) for p, x in zip(points, xs, strict=True) if p.series == series]
        name = series + {1: "", 2: ", to its compound scaling"}.get(len(of), " B0 to B7")
        style = style if len(of) > 1 else style[0]
        axes.plot([x for _, x in of], [p.top1 for p, _ in of], style, color=color, label=name, markersize=6, linewidth=1.6)
        for p, x in of:
            axes.annotate(p.label, (x, p.top1), offset, textcoords="offset points", ha=align, fontsize=9)
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.margins(0.1, 0.08)
    axes.set_xlabel(x_label)
    axes.set_ylabel("ImageNet top-1 accuracy (%)")
    axes.grid(alpha=0.3)
    axes.legend(title="accuracy: the paper's; x: counted by triscale", loc="lower right", fontsize=9, title_fontsize=9, handlelength=4)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    return buffer.getvalue()


def write_png(file: Path, data: bytes) -> None:
    """The whole file or none of it. Raises ValueError where its folder is a file."""
    if file.parent.exists() and not file.parent.is_dir():
        raise ValueError(f"{file.parent}: expected a folder or a .png file to write the figure to, found another file")
    write_whole(file, lambda temporary: temporary.write_bytes(data))
