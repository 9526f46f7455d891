"""Precision-recall curves of a detector's classes as a plot. What differs in colour differs in line style, and bears its name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from triscale.detect.evaluate import Scores
from triscale.text import printable

LINES = 6  # classes up to which each has a line
EXTREMES = 3  # of more classes, those best and those worst that have one
NAME = 18  # characters of a class name
DARK, RULE = "#1a1a1a", "#dddddd"
STYLES: tuple[tuple[str, Any], ...] = (
    ("#1f5fa8", "-"),
    ("#b35900", "--"),
    (DARK, "-."),
    ("#2b7a4b", ":"),
    ("#6a51a3", (0, (6, 1.5, 1, 1.5, 1, 1.5))),
    ("#777777", (0, (1, 0.8))),
)
GAP = 0.058  # between two names, as a share of the height


class _Curve(NamedTuple):
    """precision (101,) at recall 0, 0.01 ... 1."""

    name: str
    precision: np.ndarray
    colour: str
    style: Any
    width: float


def precision_recall_plot(scores: Scores) -> Any:
    """A matplotlib Figure: on the left precision against recall at IoU 0.50, on the right precision's mean over the IoUs.

    Up to LINES classes have a line each; of more there are the mean, the range of most classes, and the best and worst. A line ends,
    in a dot, at the highest recall that is reached; the number beside its name is its average precision. Classes without boxes
    aren't drawn.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.5), dpi=150)
    there = [k for k, c in enumerate(scores.classes) if c.boxes]
    names = [_short(scores.classes[k].name) for k in there]
    at_half, over_all = scores.precision[0][:, there], scores.precision[:, :, there].mean(0)
    for left, precision, title, name in ((0.045, at_half, "IoU 0.50", "AP50"), (0.53, over_all, "mean over IoU 0.50 to 0.95", "AP")):
        axes = figure.add_axes((left, 0.21, 0.27, 0.7))
        _frame(axes)
        axes.set_title(f"{title}: {name} {scores.numbers[name]:.3f}" if there else title, loc="left", fontsize=10)
        if not there:
            axes.text(0.5, 0.5, "no boxes to find", ha="center", va="center", color="#555555")
        elif len(there) <= LINES:
            _lines(axes, [_Curve(name, precision[:, i], *STYLES[i], 1.8) for i, name in enumerate(names)])
        else:
            _spread(axes, precision, names)
    figure.axes[0].set_ylabel("precision", fontsize=9)
    figure.text(0.045, 0.02, _notes(len(there), len(scores.classes) - len(there)), fontsize=8.5, color="#444444")
    return figure


def _notes(drawn: int, absent: int) -> str:
    first = f"dark: the middle half of the {drawn} classes; light: the middle 80 %; by name: the {EXTREMES} best and the {EXTREMES} worst"
    second = ["a dot: the highest recall reached; beside a name: its average precision"] if drawn else []
    second += [f"{absent} class{'es' * (absent > 1)} without boxes not drawn"] if absent else []
    return "\n".join([first] * (drawn > LINES) + ["; ".join(second)])


def _frame(axes: Any) -> None:
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.set_xlabel("recall", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)


def _spread(axes: Any, precision: np.ndarray, names: Sequence[str]) -> None:
    recall = np.linspace(0, 1, len(precision))
    for low, high, shade in ((10, 90, "#e6e6e6"), (25, 75, "#c9c9c9")):
        axes.fill_between(recall, *np.percentile(precision, (low, high), axis=1), color=shade, linewidth=0)
    order = np.argsort(-precision.mean(0), kind="stable")
    best, worst = order[:EXTREMES], order[-EXTREMES:]
    curves = [_Curve(f"mean of {len(names)}", precision.mean(1), DARK, "-", 2.4)]
    curves += [_Curve(names[k], precision[:, k], "#1f5fa8", STYLES[i][1], 1.2) for i, k in enumerate(best)]
    curves += [_Curve(names[k], precision[:, k], "#b35900", STYLES[i][1], 1.2) for i, k in enumerate(worst)]
    _lines(axes, curves)


def _lines(axes: Any, curves: Sequence[_Curve]) -> None:
    """Each line to the highest recall it reaches, and its name beside the axes at the height of its end, none on another."""
    ends = []
    for curve in curves:
        reached = np.flatnonzero(curve.precision > 0)
        end = int(reached[-1]) if len(reached) else -1
        recall = np.linspace(0, 1, len(curve.precision))[: end + 1]
        axes.plot(recall, curve.precision[: end + 1], color=curve.colour, linestyle=curve.style, linewidth=curve.width, clip_on=False)
        axes.plot(recall[-1:], curve.precision[end : end + 1], "o", color=curve.colour, markersize=4, clip_on=False)
        ends.append((float(recall[-1]), float(curve.precision[end])) if len(reached) else (1.0, 0.0))
    order = sorted(range(len(curves)), key=lambda i: (ends[i][1], -ends[i][0]))
    for i, height in zip(order, _apart([ends[i][1] for i in order]), strict=True):
        curve, (x, y) = curves[i], ends[i]
        if y:
            axes.plot((x, 1.01, 1.07, 1.09), (y, y, height, height), color=curve.colour, linewidth=0.5, alpha=0.6, clip_on=False, zorder=1)
        text = f"{curve.name}  {curve.precision.mean():.3f}"
        weight = "bold" if curve.width > 2 else "normal"
        axes.text(1.1, height, text, va="center", fontsize=9, color=curve.colour, weight=weight, parse_math=False)


def _apart(heights: Sequence[float]) -> list[float]:
    """Ascending heights moved so that neighbours are GAP apart or more, within 0..1 where they have room: up first, then down."""
    out: list[float] = []
    for height in heights:
        out.append(max(height, out[-1] + GAP) if out else height)
    top = 1.0
    for i in reversed(range(len(out))):
        out[i] = min(out[i], top)
        top = out[i] - GAP
    return out


def _short(name: str) -> str:
    text = printable(name)
    return text if len(text) <= NAME else text[: NAME - 1] + "…"
