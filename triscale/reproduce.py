"""The paper's tables and figures, ours beside the paper's: `reproduce("table7")`, `render(...)`.

What is counted is exact (cost_model.py). What would have to be trained says "not run", and the accuracies shown are the
paper's and say so. A difference above 5 % always has a note that names its row and the reason, as far as one can be
derived: the other readings of a row are computed, not quoted.

Source: Tan & Le, ICML 2019 (arXiv 1905.11946), Tables 1, 2, 3 and 7, Figures 1 and 5; paper.py holds its numbers.
"""

from __future__ import annotations

import io
import os
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from triscale import paper
from triscale.architecture import Arch, Stage
from triscale.budget import fit_budget
from triscale.cost_model import cost
from triscale.families import arch
from triscale.naming import unknown
from triscale.scaling import Scaling, compound, scale

LIMIT = 0.05  # a difference above this has a note
NOT_RUN, NOT_BUILT, NONE = "not run", "not built yet", "-"
MACS = 'MACs are multiply-adds, in billions: what the paper calls "FLOPS".'
ACCURACY = "Accuracies are the paper's, ImageNet validation, in %."
NO_RULE = "The paper's own count differs; its counting rule is not given."


@dataclass(frozen=True)
class Reproduction:
    """A table, or the points of a figure. Every cell is text as it is to be shown; `figure` is the PNG written, if one was."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]
    figure: Path | None = None


def reproduce(name: str, out: Path | None = None) -> Reproduction:
    """`name`: one of NAMES. `out`: where a figure is written, a `.png` file or a folder; without it, and for tables, nothing is.

    Raises UnknownNameError (a ValueError) that gives the nearest name.
    """
    if name in _TABLES:
        return _TABLES[name]()
    if name not in _FIGURES:
        raise unknown("table or figure", name, NAMES)
    result, draw = _FIGURES[name]()
    if out is None:
        return result
    file = out if out.suffix.lower() == ".png" else out / f"{name}.png"
    _write(file, draw())
    return replace(result, figure=file)


def render(reproduction: Reproduction, width: int = 100) -> str:
    """Plain text for `width` columns: an aligned table where it fits, else one block per row; then the notes, wrapped."""
    r = reproduction
    table = _table(r.header, r.rows)
    if max(map(len, table)) > width:
        pairs = ("; ".join(f"{h} {c}" for h, c in zip(r.header[1:], row[1:], strict=True) if c) for row in r.rows)
        table = [line for row, text in zip(r.rows, pairs, strict=True) for line in (row[0], *_wrap(text, width, "  ", "  "))]
    notes = [line for note in r.notes for line in _wrap(note, width, "- ", "  ")]
    figure = [f"figure: {r.figure}"] if r.figure else []
    return "\n".join([*_wrap(r.title, width), *table, *notes, *figure])


def _wrap(text: str, width: int, first: str = "", rest: str = "") -> list[str]:
    return textwrap.wrap(text, max(width, 20), initial_indent=first, subsequent_indent=rest, break_on_hyphens=False)


def _table(header: tuple[str, ...], rows: tuple[tuple[str, ...], ...]) -> list[str]:
    """Columns as wide as their cells; a header breaks between words. Columns that hold a number stand to the right."""
    columns = list(zip(*rows, strict=True))
    widths = [max(*map(len, column), *map(len, head.split())) for head, column in zip(header, columns, strict=True)]
    heads = [textwrap.wrap(head, w, break_on_hyphens=False) for head, w in zip(header, widths, strict=True)]
    tall = max(map(len, heads))
    right = [any(cell[:1].isdigit() or cell[:1] in ("+", "-") for cell in column) for column in columns]

    def line(cells: Iterable[str]) -> str:
        return "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(cells, widths, right, strict=True)).rstrip()

    top = [line((["" for _ in range(tall - len(h))] + h)[i] for h in heads) for i in range(tall)]
    return [*top, "-" * (sum(widths) + 2 * len(widths) - 2), *map(line, rows)]


def _billions(network: Arch) -> float:
    return cost(network).macs / 1e9


def _as_printed(ours: float, printed: str) -> str:
    """`ours` to the digits that the paper keeps: 10.266 beside "9.9" is 10.3."""
    return f"{ours:.{len(printed.partition('.')[2])}f}"


def _difference(ours: float, printed: str) -> float:
    return ours / float(printed) - 1


def _note(row: str, ours: float, printed: str) -> tuple[str, ...]:
    """Why `ours` differs by more than LIMIT; nothing where it doesn't."""
    if abs(_difference(ours, printed)) <= LIMIT:
        return ()
    if _as_printed(ours, printed) == printed:
        return (f"{row}: rounding alone; {ours:.3f} to the paper's digits is {printed}.",)
    return (f"{row}: {_REASONS[row]() if row in _REASONS else NO_RULE}",)


# --- Tables 1 and 2 ---------------------------------------------------------------------------------------------------


def _operator(stage: Stage) -> str:
    return f"MBConv{stage.expand:g} k{stage.kernel}" if stage.block == "mbconv" else stage.operator


def _table1() -> Reproduction:
    b0 = arch("efficientnet_b0")
    c = cost(b0)
    operators = [f"Conv {b0.stem.kernel}x{b0.stem.kernel}", *map(_operator, b0.stages), "Conv 1x1, pooling, FC"]
    strides = [b0.stem.stride, *(s.stride for s in b0.stages), 1]
    rows = []
    for i, (row, operator, stride, theirs) in enumerate(zip(c.per_stage, operators, strides, paper.TABLE1, strict=True), 1):
        ours = paper.StageRow(operator, row.resolution[0], row.channels, row.layers, stride)
        differs = [f"{key} {value}" for key, value in vars(theirs).items() if getattr(ours, key) != value]
        same = "; ".join(differs) or "the same"
        rows.append((f"{i}", operator, *(f"{n}" for n in list(vars(ours).values())[1:]), same, f"{row.params:,}", f"{row.macs / 1e9:.4f}"))
    layers = sum(row.layers for row in c.per_stage)
    rows.append(("total", "", "", "", f"{layers}", "", "", f"{c.params:,}", f"{c.macs / 1e9:.4f}"))
    header = ("Stage", "Operator", "Resolution", "Channels", "Layers", "Stride", "Paper's row", "Params", "MACs (B)")
    notes = (MACS, "Resolution is the stage's input; the stride is its first layer's. Squeeze-excitation 0.25 in every MBConv.")
    return Reproduction("Table 1: EfficientNet-B0, ours beside the paper's", header, tuple(rows), notes)


def _table2() -> Reproduction:
    rows, notes, off = [], [MACS, ACCURACY], []
    for row in paper.TABLE2:
        accuracy = " / ".join(f"{a:.1f}" for a in (row.top1, row.top5) if a is not None) or NONE
        theirs = row.macs or NONE
        if row.arch is None:
            rows.append((row.name, NOT_BUILT, f"{row.params}M", NONE, theirs, NONE, NOT_RUN, accuracy))
            continue
        c = cost(arch(row.arch))
        ours = c.macs / 1e9
        rows.append((row.name, f"{c.params:,}", f"{row.params}M", f"{ours:.3f}", theirs, f"{_difference(ours, theirs):+.1%}", NOT_RUN, accuracy))
        notes += _note(row.name, ours, theirs)
        for value, printed, unit in ((c.params / 1e6, row.params, "M parameters"), (ours, theirs, "B MACs")):
            if _as_printed(value, printed) != printed:
                off.append(f"{row.name} {_as_printed(value, printed)} for {printed} {unit}")
    notes.append(f"Within {LIMIT:.0%}, but not the paper's digits: {', '.join(off)}. {NO_RULE}")
    notes.append(f'"{NONE}": not counted here, not printed by the paper, or an accuracy that isn\'t kept here. One accuracy is the top-1 alone.')
    header = ("Network", "Params", "Paper's params", "MACs (B)", "Paper's MACs", "Differs by", "Top-1 / top-5 here", "Paper's top-1 / top-5")
    return Reproduction("Table 2: the family and the networks it is compared with", header, tuple(rows), tuple(notes))


# --- Tables 3 and 7 ---------------------------------------------------------------------------------------------------


def _scaled(row: paper.ScaledRow) -> tuple[Scaling, Arch]:
    """The row's network; where the paper gives no multipliers, the largest of the compound line within the row's MACs."""
    base = arch(row.arch)
    if row.scaling is None:
        fit = fit_budget(base, macs=float(row.macs) * 1e9)
        return compound(fit.phi), fit.arch
    s = Scaling(*row.scaling)
    return s, scale(base, s)


def _fitted(row: paper.ScaledRow, s: Scaling) -> str:
    plain = _billions(scale(arch(row.arch), depth=1.4, width=1.2, resolution=1.3))
    return (
        f"{row.name}: the paper gives no multipliers. fit_budget to its {row.macs} B with alpha 1.2, beta 1.1, gamma 1.15 "
        f"finds phi {s.phi:g}: d={s.depth:.3f}, w={s.width:.3f}, r={s.resolution:.3f}. (d=1.4, w=1.2, r=1.3 cost {plain:.3f} B.)"
    )


def _scaling_table(title: str, table: tuple[paper.ScaledRow, ...]) -> Reproduction:
    rows, notes = [], [MACS, ACCURACY]
    for row in table:
        s, network = _scaled(row)
        ours = _billions(network)
        multipliers = (f"{m:g}" if row.scaling else f"{m:.3f}" for m in (s.depth, s.width, s.resolution))
        difference = f"{_difference(ours, row.macs):+.1%}"
        rows.append((row.name, *multipliers, f"{network.resolution}", f"{ours:.3f}", row.macs, difference, NOT_RUN, f"{row.top1:.1f}"))
        if row.scaling is None:
            notes.append(_fitted(row, s))
        notes += _note(row.name, ours, row.macs)
    header = ("Network", "d", "w", "r", "px", "MACs (B)", "Paper's MACs", "Differs by", "Top-1 here", "Paper's top-1")
    return Reproduction(title, header, tuple(rows), tuple(notes))


def _with_layers(network: Arch, layers: Iterable[int]) -> Arch:
    return replace(network, stages=tuple(replace(s, layers=n) for s, n in zip(network.stages, layers, strict=True)))


def _no_projection(network: Arch) -> Arch:
    return replace(network, stages=tuple(replace(s, skip="none") for s in network.stages))


def _mobilenet_v1_compound() -> str:
    base = arch("mobilenet_v1")
    ours = scale(base, depth=1.4, width=1.2, resolution=1.3)
    layers = [s.layers for s in ours.stages]
    other = _with_layers(ours, [base.stages[0].layers, *layers[1:]])
    nearest = _with_layers(ours, [round(1.4 * s.layers) for s in base.stages])
    return (
        f"likely the rounding of depth: ceil(1.4 x layers) turns 13 blocks into {sum(layers)}. With the first stage's only block left "
        f"single it is {_billions(other):.3f}, which prints as 2.3; layers rounded to the nearest give {_billions(nearest):.3f}, which prints as 2.2."
    )


def _resnet_deep() -> str:
    base = arch("resnet50")
    ours = scale(base, depth=4)
    first, second, third, last = (s.layers for s in ours.stages)
    more = [_billions(_with_layers(ours, (first, second, third + n, last))) for n in (1, 7, 8)]
    blocks = first + second + third + last
    return (
        f"d=4 is {first}-{second}-{third}-{last} blocks. A further block costs {more[0] - _billions(ours):.3f} B in any stage, so no number of "
        f"blocks prints 16.2: {blocks + 7} give {more[1]:.2f}, {blocks + 8} give {more[2]:.2f}. "
        f"4 x the whole base is {4 * _billions(base):.2f}. {NO_RULE}"
    )


def _resnet_wide() -> str:
    base = arch("resnet50")
    ours = scale(base, width=2)
    doubled = replace(ours, stem=replace(base.stem, channels=128))
    inner = replace(base, stages=tuple(replace(s, expand=2 * s.expand) for s in base.stages))
    return (
        f"the stem stays at 64 channels; doubled too it is {_billions(doubled):.3f}; with the inner channels alone doubled {_billions(inner):.3f}. "
        f"With the stem doubled and without the 1x1 projections {_billions(_no_projection(doubled)):.3f}, which prints as 14.7, but then the "
        f"base is {_billions(_no_projection(base)):.2f} and not 4.1. {NO_RULE}"
    )


def _b0_deep() -> str:
    base = arch("efficientnet_b0")
    ours = scale(base, depth=4)
    more = _with_layers(ours, [s.layers + 1 for s in ours.stages])
    ends = _with_layers(ours, [base.stages[0].layers, *(s.layers for s in ours.stages[1:-1]), base.stages[-1].layers])
    return (
        f"one block more in every stage (what ceil gives for d from just above 4) is {_billions(more):.3f}, which prints as 1.8; the first and "
        f"last stage left single give {_billions(ends):.3f}, 4 x the whole B0 {4 * _billions(base):.3f}. {NO_RULE}"
    )


def _b0_twice(axis: str, bound: str, printed: str) -> str:
    other = scale(arch("efficientnet_b0"), Scaling(**{axis: 2.2}))
    return (
        f"doubling the {axis} multiplies no layer's MACs by more than 4. {bound} A {axis} factor of 2.2 ({other.resolution} px) "
        f"gives {_billions(other):.3f}, which prints as {printed}."
    )


def _b0_wide() -> str:
    base = arch("efficientnet_b0")
    fixed = replace(scale(base, width=2), stem=base.stem, head=base.head)
    bound = "From the B0 of Table 2, 0.39, that is 4 x 0.395 = 1.58 at most, however MACs are counted: 1.8 takes another network or factor."
    return _b0_twice("width", bound, "1.8") + f" Stem and head left unscaled only lower it, to {_billions(fixed):.3f}."


def _b0_fine() -> str:
    bound = "The paper's own base row prints as 0.4, so is below 0.45, and twice the resolution below 1.80: 1.9 can't be this row's r=2."
    return _b0_twice("resolution", bound, "1.9")


_REASONS: dict[str, Callable[[], str]] = {
    "MobileNetV1 compound": _mobilenet_v1_compound,
    "ResNet-50 d=4": _resnet_deep,
    "ResNet-50 w=2": _resnet_wide,
    "EfficientNet-B0 d=4": _b0_deep,
    "EfficientNet-B0 w=2": _b0_wide,
    "EfficientNet-B0 r=2": _b0_fine,
}


# --- Figures 1 and 5 --------------------------------------------------------------------------------------------------


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
    return family + [Point(row.name, _scaled(row)[1], row.macs, row.top1) for row in paper.TABLE3 if row.name.endswith(ends)]


def _figure1() -> tuple[Reproduction, Callable[[], bytes]]:
    points = _points(("base",))
    params = [cost(p.arch).params for p in points]
    rows = tuple((p.name, f"{n:,}", f"{p.top1:.1f}") for p, n in zip(points, params, strict=True))
    result = Reproduction("Figure 1: parameters against ImageNet top-1", ("Network", "Params", "Paper's top-1"), rows, (ACCURACY,))
    return result, partial(_draw, points, [n / 1e6 for n in params], "Parameters (millions, logarithmic)", (3, 5, 10, 20, 30, 50, 80))


def _figure5() -> tuple[Reproduction, Callable[[], bytes]]:
    points = _points(("base", "compound"))
    macs = [_billions(p.arch) for p in points]
    both = list(zip(points, macs, strict=True))
    rows = tuple((p.name, f"{x:.3f}", p.macs, f"{_difference(x, p.macs):+.1%}", f"{p.top1:.1f}") for p, x in both)
    notes = [MACS, ACCURACY, *(note for p, x in both for note in _note(p.name, x, p.macs))]
    notes += [_fitted(row, _scaled(row)[0]) for row in paper.TABLE3 if row.scaling is None]
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


def _write(file: Path, data: bytes) -> None:
    """The whole file or none of it."""
    if file.parent.exists() and not file.parent.is_dir():
        raise ValueError(f"{file.parent}: expected a folder or a .png file to write the figure to, found another file")
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


_TABLES: dict[str, Callable[[], Reproduction]] = {
    "table1": _table1,
    "table2": _table2,
    "table3": partial(_scaling_table, "Table 3: scaling MobileNets and ResNet", paper.TABLE3),
    "table7": partial(_scaling_table, "Table 7: EfficientNet-B0 scaled one way and all three", paper.TABLE7),
}
_FIGURES: dict[str, Callable[[], tuple[Reproduction, Callable[[], bytes]]]] = {"figure1": _figure1, "figure5": _figure5}
NAMES = (*_TABLES, *_FIGURES)
