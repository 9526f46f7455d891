"""Table 7 and Figures 3, 4 and 8: the paper's beside what the scaling study trained (studies/scaling)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from math import log, log2
from pathlib import Path

from triscale import paper
from triscale.reproduce import study_figures
from triscale.reproduce.layout import NONE, NOT_RUN, Reproduction
from triscale.reproduce.study_results import COMMAND, WAYS, Study, Trained, read_study, verdict
from triscale.reproduce.tables import scaling_table

Figure = tuple[Reproduction, Callable[[], bytes] | None]
AXES = ("width", "depth", "resolution")  # in Figure 3's order
PAIRS = ((1.0, 1.0), (1.0, 1.3), (2.0, 1.0), (2.0, 1.3))  # (depth, resolution) of Figure 4
OTHER_SCALE = "The study's networks, images and trainings are far smaller than the paper's: the order is what compares, not the numbers."
NO_NUMBERS = "The paper's figure prints no accuracies, so there are none here to stand beside."
MISSING = f"The study: not run. {COMMAND} runs it in a clone of the project; --study FOLDER reads its results."


def table7(folder: Path | None) -> Reproduction:
    """The counted table with the study's five networks as further columns."""
    counted = scaling_table("Table 7: EfficientNet-B0 scaled one way and all three", paper.TABLE7)
    study = read_study(folder)
    five = {n.name: n for n in study.five()} if study else {}
    base = five.get("base")
    names = ("base", *WAYS)
    extra = []
    for name in names:
        n = five.get(name)
        times = f"{n.macs / base.macs:.2f}" if n and base else NONE
        extra.append((_multipliers(n), f"{n.px}", f"{n.macs / 1e6:.3f}", times, n.percent) if n else (NONE, NONE, NONE, NONE, NOT_RUN))
    header = ("Study's d, w, r", "Study's px", "Study's MACs (M)", "Of its base", "Study's top-1")
    rows = tuple((*row, *more) for row, more in zip(counted.rows, extra, strict=True))
    notes = (*counted.notes, *_notes(study), *((verdict(study.five()), OTHER_SCALE) if study else ()))
    return Reproduction(counted.title, (*counted.header, *header), rows, notes)


def figure8(folder: Path | None) -> Figure:
    study = read_study(folder)
    five = {n.name: n for n in study.five()} if study else {}
    rows = []
    for name, row in zip(("base", *WAYS), paper.TABLE7, strict=True):
        cells = _cells(five[name]) if name in five else (NONE, NONE, NONE, NONE, NOT_RUN, NOT_RUN)
        rows.append((name, *cells, row.macs, f"{row.top1:.1f}"))
    header = ("Scaling", *_HEADER, "Paper's MACs (B)", "Paper's top-1")
    notes = (*_notes(study), *((verdict(study.five()), OTHER_SCALE) if study else ()), "Paper's: B0 on ImageNet, of Table 7, in %.")
    result = Reproduction("Figure 8: the same multiply-adds spent in four ways", header, tuple(rows), notes)
    return result, partial(study_figures.draw_ways, study.five()) if study and len(five) > 1 and "base" in five else None


def figure3(folder: Path | None) -> Figure:
    study = read_study(folder)
    series = {axis: study.alone(axis) for axis in AXES} if study else {}
    rows = [(f"{axis} {getattr(n, axis):.2f}", *_cells(n)) for axis, points in series.items() for n in points]
    notes = [*_notes(study), *(_saturation(axis, points) for axis, points in series.items() if len(points) > 2), NO_NUMBERS]
    if study:
        notes.insert(1, OTHER_SCALE)
    result = Reproduction("Figure 3: width, depth and resolution alone", ("Scaled alone", *_HEADER), tuple(rows) or (_none(),), tuple(notes))
    drawn = {axis: points for axis, points in series.items() if len(points) > 1}
    return result, partial(study_figures.draw_alone, drawn) if drawn else None


def figure4(folder: Path | None) -> Figure:
    study = read_study(folder)
    series = {pair: study.widths(*pair) for pair in PAIRS} if study else {}
    rows = [(f"d={d:.1f}, r={r:.1f}, w={n.width:.2f}", *_cells(n)) for (d, r), points in series.items() for n in points]
    notes = [*_notes(study), NO_NUMBERS]
    if study:
        notes[1:1] = [_best_pair(series), OTHER_SCALE]
    title = "Figure 4: width scaling at four pairs of depth and resolution"
    result = Reproduction(title, ("Network", *_HEADER), tuple(rows) or (_none(),), tuple(filter(None, notes)))
    drawn = {pair: points for pair, points in series.items() if points}
    return result, partial(study_figures.draw_pairs, drawn) if any(len(p) > 1 for p in drawn.values()) else None


_HEADER = ("d, w, r", "px", "MACs (M)", "Params", "Study's top-1", "Study's top-5")


def _cells(n: Trained) -> tuple[str, ...]:
    top5 = f"{100 * sum(n.top5) / len(n.top5):.2f}"
    return _multipliers(n), f"{n.px}", f"{n.macs / 1e6:.3f}", f"{n.params:,}", n.percent, top5


def _none() -> tuple[str, ...]:
    return ("study", NONE, NONE, NONE, NONE, NOT_RUN, NOT_RUN)


def _multipliers(n: Trained | None) -> str:
    return f"{n.depth:.2f}, {n.width:.2f}, {n.resolution:.2f}" if n else NONE


def _notes(study: Study | None) -> tuple[str, ...]:
    if study is None:
        return (MISSING,)
    trial = ("This is a trial of the study (--scale tiny): its accuracies mean nothing.",) if study.scale == "tiny" else ()
    return (f"Study: {study.about} Top-1 in %, mean ± standard deviation over the seeds where there are several.", *trial, *study.notes)


def _saturation(axis: str, points: list[Trained]) -> str:
    """What the last step of a range brought, beside the first, for twice the MACs each."""
    first, last = ((b.mean - a.mean) / log2(b.macs / a.macs) for a, b in (points[:2], points[-2:]))
    top = max(points, key=lambda n: n.mean)
    gains = f"{100 * first:+.2f} points for each doubling of the multiply-adds from its first step, {100 * last:+.2f} from its last"
    return f"{axis.capitalize()} alone: {gains}; highest at {getattr(top, axis):.2f} with {top.percent} %."


def _best_pair(series: dict[tuple[float, float], list[Trained]]) -> str:
    """The curves at the largest cost that all four reach, read off between their points, straight in the logarithm of the cost."""
    if any(len(points) < 2 for points in series.values()):
        return ""
    at = min(max(n.macs for n in points) for points in series.values())
    if any(min(n.macs for n in points) > at for points in series.values()):
        return ""
    heights = {pair: _between(points, at) for pair, points in series.items()}
    best = max(heights, key=lambda pair: heights[pair])
    said = ", ".join(f"d={d:.1f} r={r:.1f} {100 * heights[d, r]:.2f} %" for d, r in PAIRS)
    agrees = "as in the paper" if best == PAIRS[-1] else "in the paper d=2.0 r=1.3 is"
    return (
        f"At {at / 1e6:.2f} M multiply-adds, the most that all four curves reach, they are at {said}: highest d={best[0]:.1f} r={best[1]:.1f}, "
        f"{agrees}. Most points are of one seed, so differences as small as the spreads of Figure 8 mean nothing."
    )


def _between(points: list[Trained], at: int) -> float:
    """Accuracy at this cost."""
    ordered = sorted(points, key=lambda n: n.macs)
    for low, high in pairwise(ordered):
        if low.macs <= at <= high.macs and low.macs < high.macs:
            return low.mean + (high.mean - low.mean) * log(at / low.macs) / log(high.macs / low.macs)
    return ordered[-1].mean
