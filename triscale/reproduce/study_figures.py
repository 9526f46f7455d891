"""The drawings of Figures 3, 4 and 8 of the scaling study. Each series has a marker, a dash and a colour of its own, told
apart by the colour-blind and in grey print (Okabe and Ito's palette)."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from triscale.reproduce.study_results import Trained

ACCURACY = "CIFAR-10 test accuracy (%)"
STYLE = {  # marker, dash, colour
    "depth": ("s", "--", "#0072B2"),
    "width": ("^", "-.", "#C46A00"),
    "resolution": ("D", ":", "#00805C"),
    "compound": ("o", "-", "#B2182B"),
}
PAIR_STYLES = (("o", ":", "#000000"), ("^", "-.", "#00805C"), ("s", "--", "#0072B2"), ("D", "-", "#B2182B"))


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    return buffer.getvalue()


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)


def _curve(axes: Any, points: Sequence[Trained], style: tuple[str, str, str], label: str = "") -> None:
    """The points joined; a bar of one standard deviation where there are several seeds."""
    marker, dash, colour = style
    axes.plot([n.macs / 1e6 for n in points], [100 * n.mean for n in points], marker + dash, color=colour, markersize=7, linewidth=1.8, label=label)
    for n in points:
        if n.spread is not None:
            axes.errorbar(n.macs / 1e6, 100 * n.mean, 100 * n.spread, color=colour, capsize=4, linewidth=1.2)


def draw_ways(five: Sequence[Trained]) -> bytes:
    """Lines from the base to each way, labelled with their accuracies from the highest down, one standard deviation as bars."""
    base, others = five[0], sorted(five[1:], key=lambda n: n.mean)
    figure = _figure(7.2, 4.4)
    axes = figure.subplots()
    x0, right = base.macs / 1e6, max(n.macs for n in others) / 1e6
    ends = [100 * n.mean for n in others]
    edges = [100 * (n.mean + sign * (n.spread or 0)) for n in five for sign in (-1, 1)]
    low, high = min(edges), max(edges)
    labels = _apart(ends, max(0.075 * (high - low), 1e-6))
    for i, (n, y, at) in enumerate(zip(others, ends, labels, strict=True)):
        marker, dash, colour = STYLE[n.name]
        # The ways cost nearly the same: drawn a little apart, so that no bar hides another.
        x, bold = n.macs / 1e6 + (i - (len(others) - 1) / 2) * 0.045 * right, n.name == "compound"
        axes.plot([x0, x], [100 * base.mean, y], dash, color=colour, linewidth=2.6 if bold else 1.6)
        axes.errorbar(x, y, 100 * (n.spread or 0), fmt=marker, color=colour, markersize=7, capsize=4, linewidth=1.2)
        place = axes.annotate(
            f"{n.name}  {n.percent}", (x, y), (right * 1.24, at), color="#222222", va="center", weight="bold" if bold else "normal",
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.8, "relpos": (0, 0.5), "shrinkA": 2, "shrinkB": 5},
        )  # fmt: skip
        place.set_in_layout(False)
    axes.errorbar(x0, 100 * base.mean, 100 * (base.spread or 0), fmt="*", color="black", markersize=12, capsize=4)
    axes.annotate(f"base\n{base.percent}", (x0, 100 * base.mean), (-8, 0), textcoords="offset points", ha="right", va="center")
    axes.set_xlim(-0.15 * right, right * 1.9)
    axes.set_ylim(min(low, *labels) - 0.06 * (high - low), max(high, *labels) + 0.06 * (high - low))
    axes.set_xticks([t for t in axes.get_xticks() if 0 <= t <= right * 1.15])
    within = max(n.macs for n in others) / min(n.macs for n in others) - 1
    axes.set_xlabel(f"multiply-adds per image (millions)\nThe four ways cost the same within {within:.1%}; they are drawn apart.", loc="left")
    axes.set_ylabel(ACCURACY)
    axes.set_title(f"Figure 8: {sum(n.macs for n in others) / len(others) / base.macs:.1f} times the multiply-adds, spent in four ways", fontsize=11)
    _plain(axes)
    return _png(figure)


def _apart(values: Sequence[float], gap: float) -> list[float]:
    """Label positions in the same order, at least `gap` apart, as near to `values` (ascending) as a sweep makes them."""
    out: list[float] = []
    for v in values:
        out.append(max(v, out[-1] + gap) if out else v)
    shift = sum(o - v for o, v in zip(out, values, strict=True)) / max(len(out), 1)
    return [o - shift for o in out]


def draw_alone(series: Mapping[str, Sequence[Trained]]) -> bytes:
    """One panel a dimension, on one scale of accuracies, each point with its multiplier."""
    figure = _figure(9.6, 3.8)
    panels = figure.subplots(1, len(series), sharey=True, squeeze=False)[0]
    most = max(n.macs for points in series.values() for n in points) / 1e6
    for axes, (axis, points) in zip(panels, series.items(), strict=True):
        _curve(axes, points, STYLE[axis])
        for n, following in zip(points, [*points[1:], None], strict=True):
            falls = following is not None and following.mean < n.mean  # the label goes where the line doesn't
            place = {"xytext": (7, 4), "va": "bottom"} if falls else {"xytext": (7, -4), "va": "top"}
            text = f"{axis[0]}={getattr(n, axis):.3g}"
            axes.annotate(text, (n.macs / 1e6, 100 * n.mean), textcoords="offset points", ha="left", fontsize=9, **place)
        axes.set_title(f"{axis} alone", color=STYLE[axis][2], weight="bold", fontsize=11)
        axes.set_xlim(-0.06 * most, 1.25 * most)
        axes.margins(y=0.14)
        _plain(axes)
    figure.supxlabel("multiply-adds per image (millions)", fontsize=10)
    panels[0].set_ylabel(ACCURACY)
    return _png(figure)


def draw_pairs(series: Mapping[tuple[float, float], Sequence[Trained]]) -> bytes:
    """A curve a pair; the points of a curve are its widths, told in the legend."""
    figure = _figure(7.2, 4.4)
    axes = figure.subplots()
    for style, ((d, r), points) in zip(PAIR_STYLES, series.items(), strict=False):
        _curve(axes, points, style, f"d={d:.1f}, r={r:.1f}, w = {', '.join(f'{n.width:.3g}' for n in points)}")
    axes.set_xlabel("multiply-adds per image (millions)")
    axes.set_ylabel(ACCURACY)
    axes.set_title("Figure 4: width scaling at four pairs of depth and resolution", fontsize=11)
    handles, names = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], names[::-1], loc="lower right", handlelength=4, fontsize=9)
    _plain(axes)
    return _png(figure)
