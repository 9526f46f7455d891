"""The plots of a training's page, in black and greys with one blue: lines differ in width, areas in shade and hatching."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from triscale.report import BLUE
from triscale.run_log import Log, StepLine

THIN, DARK, RULE = "#999999", "#1a1a1a", "#dddddd"
MARKED = 15  # epochs up to which each has a marker
# Name, field, shade, hatching: the wait for data is the one that should not be there, so it is the one that is hatched.
PARTS = (
    ("waiting for data", "data_s", "white", "/////"),
    ("forward", "forward_s", "#333333", ""),
    ("backward", "backward_s", "#8a8a8a", ""),
    ("optimiser", "optimiser_s", "#d5d5d5", ""),
)


class Line(NamedTuple):
    """label: what stands at its end. points: (epoch, value)."""

    label: str
    points: Sequence[tuple[int, float]]


class Panel(NamedTuple):
    """What was measured after the epochs: the first line is drawn thick, a second one, which lies above it, dashed. whole: from 0 up."""

    title: str
    lines: Sequence[Line]
    whole: bool = False


def curves(log: Log, per_epoch: float | None, measured: Panel | None) -> Any:
    """A Figure: what was measured, training loss, learning rate, one below the other against epochs.

    per_epoch: steps in an epoch, to place the lines of steps; None leaves those out.
    """
    from matplotlib.figure import Figure

    lines = [(s.step / per_epoch, s) for s in log.steps] if per_epoch else []
    resumed = [step / per_epoch for step in log.resumed] if per_epoch else []
    rates = [(x, s.lr) for x, s in lines] or [(float(e.epoch), e.lr) for e in log.epochs if e.lr is not None]
    heights = [2.0 if measured else 0, 2.0, 1.1 if rates else 0]
    shown = [h for h in heights if h]
    figure = Figure(figsize=(8.4, sum(shown) + 0.6 * len(shown)), layout="constrained")
    all_axes = list(figure.subplots(len(shown), 1, sharex=True, squeeze=False, height_ratios=shown)[:, 0])
    left = list(all_axes)
    if measured:
        _measured(left.pop(0), measured)
    _loss(left.pop(0), log, lines)
    if rates:
        axes = left.pop(0)
        axes.plot(*zip(*rates, strict=True), color=DARK, linewidth=1.4)
        axes.set_title("learning rate", loc="left", fontsize=10)
        axes.set_ylim(0, 1.1 * max(rate for _, rate in rates) or 1)
    for axes in all_axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color=RULE, linewidth=0.6)
        for x in resumed:
            axes.axvline(x, color=THIN, linestyle=":", linewidth=1)
    last = max([float(e.epoch) for e in log.epochs] + [x for x, _ in lines])
    all_axes[-1].set_xlim(0, last)
    all_axes[-1].set_xlabel("epoch")
    all_axes[-1].xaxis.get_major_locator().set_params(integer=last >= 2)
    if resumed:
        all_axes[0].annotate(
            "resumed", (resumed[0], 1), (3, -2), xycoords=("data", "axes fraction"), textcoords="offset points",
            ha="left", va="top", fontsize=8, color="#555555",
        )  # fmt: skip
    return figure


def has_windows(log: Log) -> bool:
    """Whether the lines of steps say more than those of epochs."""
    return len(log.steps) > 2 * len(log.epochs)


def _measured(axes: Any, panel: Panel) -> None:
    first, *others = panel.lines
    marker = "o" if len(first.points) <= MARKED else None
    axes.plot(*zip(*first.points, strict=True), color=BLUE, linewidth=2, marker=marker, markersize=4, clip_on=False)
    for line in others:
        axes.plot(*zip(*line.points, strict=True), "--", color=DARK, linewidth=1.2, marker=marker, markersize=3, clip_on=False)
    if panel.whole:
        axes.set_ylim(bottom=0)
    (low, high), apart = axes.get_ylim(), 0
    for line in others:
        apart = 6 if line.points[-1][1] - first.points[-1][1] < 0.15 * (high - low) else 0
        _end(axes, *line.points[-1], line.label, DARK, apart)
    _end(axes, *first.points[-1], first.label, BLUE, -apart)
    axes.set_title(panel.title, loc="left", fontsize=10)


def _loss(axes: Any, log: Log, lines: Sequence[tuple[float, StepLine]]) -> None:
    if lines and has_windows(log):
        axes.plot([x for x, _ in lines], [s.loss for _, s in lines], color=THIN if log.epochs else DARK, linewidth=0.8)
    if log.epochs:
        marker = "o" if len(log.epochs) <= MARKED else None
        axes.plot([e.epoch for e in log.epochs], [e.loss for e in log.epochs], color=DARK, linewidth=2, marker=marker, markersize=4, clip_on=False)
        _end(axes, log.epochs[-1].epoch, log.epochs[-1].loss, f"{log.epochs[-1].loss:.3f}", DARK)
    axes.set_title("training loss", loc="left", fontsize=10)


def _end(axes: Any, x: float, y: float, text: str, colour: str, up: float = 0) -> None:
    """The last value beside the end of a line; up: points, so that two that end together don't cover each other."""
    axes.annotate(text, (x, y), (7, up), textcoords="offset points", va="center", fontsize=9, weight="bold", color=colour, annotation_clip=False)


def brief(seconds: float) -> str:
    """0.0123 -> 12.3 ms."""
    return f"{seconds:.3g} s" if seconds >= 0.9995 else f"{1000 * seconds:.3g} ms"


def time_bar(shares: Sequence[tuple[float, float]]) -> Any:
    """A Figure: one bar of the four PARTS. shares: of each, its share of the time, 0 to 1, and its seconds a step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 0.9))
    axes = figure.add_axes((0, 0.4, 1, 0.6))
    left = 0.0
    for (name, _, shade, hatch), (share, seconds) in zip(PARTS, shares, strict=True):
        label = f"{name} {100 * share:.0f} %, {brief(seconds)}"
        axes.barh(0, share, left=left, color=shade, hatch=hatch, edgecolor=DARK, linewidth=0.8, label=label)
        left += share
    axes.set_xlim(0, 1)
    axes.set_axis_off()
    axes.legend(
        ncols=4,
        loc="upper left",
        bbox_to_anchor=(0, 0),
        frameon=False,
        fontsize=9.5,
        handlelength=1.4,
        columnspacing=1.8,
        borderpad=0.4,
        borderaxespad=0,
    )
    return figure
