"""The plots of a network search, in black and greys with one blue: what differs in colour differs in marker or line too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from triscale.report import BLUE
from triscale.search.record import Record, Trial, front
from triscale.search.space import FIELDS
from triscale.search_report.facts import (
    AXES,
    Network,
    amount,
    importance_grid,
    known,
    metric,
    number,
    priced,
    ranked,
    running_best,
    thinned,
    value_of,
)
from triscale.training_report.plots import DARK, RULE, THIN

CROWD = 400  # points from which on they are drawn as pixels: thousands of paths would make the page large
CURVES = 40  # curves of pruned trials
WIDE = 12.0  # ratio of the costs from which on their axis is logarithmic
# Of trials without a value, in a strip of their own: there is no height at which they would belong.
MARKS = {"pruned": "v", "failed": "x", "lost": "+", "running": ">", "waiting": "."}


def new_figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", dpi=150)


def bare(axes: Any, grid: str = "y") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)


def dots(axes: Any, x: Sequence[float], y: Sequence[float], label: str) -> None:
    crowd = len(x) > CROWD
    axes.plot(
        x, y, "o", color="#8a8a8a", markersize=2.5 if crowd else 4.5, markeredgewidth=0, alpha=0.6 if crowd else 0.9, label=label, rasterized=crowd
    )


def history(record: Record, side: Network) -> Any | None:
    """A Figure: the value of each trial by number and, where it is known when they ended, by time. None without a trial."""
    if not record.trials:
        return None
    scored, without = ranked(record), [s for s in MARKS if any(t.state == s for t in record.trials)]
    timed = sum(t.ended > 0 for t in scored) > 1
    strip = 0.2 * len(without)
    figure = new_figure(8.4, 3.9 + strip)
    grid = figure.add_gridspec(
        2 if without else 1, 2 if timed else 1, height_ratios=[3.3, strip][: 2 if without else 1], width_ratios=[3, 2] if timed else [1]
    )
    top = figure.add_subplot(grid[0, 0])
    _values(top, scored, [float(t.number) for t in scored], running_best(scored), max(t.number for t in record.trials))
    if scored and known(side.value):
        top.axhline(side.value, color=DARK, linestyle="--", linewidth=1, label=f"reference {number(side.value)}")
    top.set_title("value of each network, by trial", loc="left", fontsize=10)
    below = top
    if without:
        below = figure.add_subplot(grid[1, 0], sharex=top)
        _strip(below, record, without)
        top.tick_params(labelbottom=False)
    below.set_xlabel("trial")
    below.xaxis.get_major_locator().set_params(integer=True)
    below.set_xlim(-0.5, max(max(t.number for t in record.trials), 1) + 0.5)
    if timed:
        _by_time(figure.add_subplot(grid[:, 1]), record, scored)
    if scored:
        figure.legend(*top.get_legend_handles_labels(), loc="outside lower left", ncols=4, frameon=False, fontsize=9)
    return figure


def _values(axes: Any, scored: Sequence[Trial], x: Sequence[float], best: Sequence[tuple[float, float]], end: float) -> None:
    bare(axes)
    if not scored:
        axes.text(0.5, 0.5, "no network scored yet", transform=axes.transAxes, ha="center", color="#555555")
        axes.set_yticks([])
        return
    dots(axes, x, [t.value or 0.0 for t in scored], "a network")
    line = [*best, (max(end, best[-1][0]), best[-1][1])]
    axes.step(*zip(*line, strict=True), where="post", color=BLUE, linewidth=2, label="best so far")
    axes.plot(*best[-1], "*", color=BLUE, markersize=14, markeredgecolor="white", label=f"best {number(best[-1][1])}", zorder=5)


def _strip(axes: Any, record: Record, states: Sequence[str]) -> None:
    for i, state in enumerate(states):
        x = [t.number for t in record.trials if t.state == state]
        axes.plot(x, [-i] * len(x), MARKS[state], color=DARK, markersize=4.5, markeredgewidth=1, rasterized=len(x) > CROWD)
    counts = [f"{state} ({sum(t.state == state for t in record.trials):,})" for state in states]
    axes.set_yticks([-i for i in range(len(states))], counts, fontsize=9)
    axes.set_ylim(-len(states) + 0.4, 0.6)
    bare(axes, "x")


def _by_time(axes: Any, record: Record, scored: Sequence[Trial]) -> None:
    ended = [t for t in scored if t.ended > 0]
    start = min((t.began for t in record.trials if t.began > 0), default=min(t.ended for t in ended))
    span = max(t.ended for t in record.trials) - start
    unit, name = next((u, n) for u, n in ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds")) if span >= 2 * u or u == 1)
    best = [((x - start) / unit, y) for x, y in running_best(ended, "ended")]
    _values(axes, ended, [(t.ended - start) / unit for t in ended], best, span / unit)
    axes.set_title("by time", loc="left", fontsize=10)
    axes.set_xlabel(f"{name} since the first trial began")
    axes.set_xlim(left=0)


def pareto(record: Record, side: Network) -> Any | None:
    """A Figure: score against the cost that counts, the Pareto front, the best, the reference, T and all that is worth the best's value."""
    found = priced(record)
    if not found:
        return None
    kind, best = metric(record), found[0]
    figure = new_figure(8.4, 4.8)
    axes = figure.add_subplot()
    bare(axes, "both")
    points = [(cost, score) for _, cost, score in found]
    dots(axes, [p[0] for p in points], [p[1] for p in points], f"a network ({len(points):,})")
    line = [points[i] for i in front(points)]
    axes.plot(
        *zip(*line, strict=True),
        "-o",
        drawstyle="steps-post",
        color=DARK,
        linewidth=1.4,
        markersize=4.5,
        markerfacecolor="white",
        label=f"Pareto front ({len(line):,})",
    )
    axes.plot(*best[1:], "*", color=BLUE, markersize=17, markeredgecolor="white", zorder=6, label=f"best: trial {best[0].number}")
    _reference(axes, kind, side)
    costs = [p[0] for p in points] + ([side.cost[kind]] if kind in side.cost else []) + ([record.target[1]] if record.target else [])
    if min(costs) > 0 and max(costs) > WIDE * min(costs):
        axes.set_xscale("log")
    if record.target:
        _target(axes, record, best[0])
    axes.xaxis.set_major_formatter(lambda x, _: amount(kind, x))
    axes.xaxis.set_minor_formatter("")
    axes.set_xlabel(AXES.get(kind, kind).split(" (")[0])
    axes.set_title("score", loc="left", fontsize=10)
    figure.legend(loc="outside lower left", ncols=3, frameon=False, fontsize=9)
    return figure


def _reference(axes: Any, kind: str, side: Network) -> None:
    if kind not in side.cost:
        return
    style = {"color": "white", "markeredgecolor": DARK, "markeredgewidth": 1.6, "zorder": 5}
    if known(side.score):
        axes.plot(side.cost[kind], side.score, "D", markersize=9, label="reference", **style)
    else:
        axes.plot(
            side.cost[kind], 0, "^", markersize=10, transform=axes.get_xaxis_transform(), clip_on=False, label="reference (score not known)", **style
        )


def _target(axes: Any, record: Record, best: Trial) -> None:
    kind, target = record.target or ("", 0.0)
    axes.axvline(target, color=DARK, linestyle=":", linewidth=1.4)
    axes.annotate(
        f"target {amount(kind, target)}", (target, 0), (4, 4), xycoords=("data", "axes fraction"), textcoords="offset points", ha="left", fontsize=9
    )
    (low, high), (bottom, top) = map(float, axes.get_xlim()), axes.get_ylim()
    if known(best.value) and low > 0:  # on a logarithmic axis it always is
        x = [low + (high - low) * i / 400 for i in range(401)]
        # The value of score 1 is what a score is multiplied by.
        factors = [value_of(record, 1.0, {kind: c}) or 1.0 for c in x]
        axes.plot(x, [(best.value or 0.0) / f for f in factors], "--", color=BLUE, linewidth=1, label="as much worth as the best", zorder=1)
    axes.set_xlim(low, high)
    axes.set_ylim(bottom, top)


def importance(record: Record) -> Any | None:
    """A Figure: shares of the importance, decisions of each block as shades, sums by kind above and by block beside. None where not known."""
    rows, _ = importance_grid(record)
    if not any(any(row) for row in rows):
        return None
    kinds, blocks = [sum(column) for column in zip(*rows, strict=True)], [sum(row) for row in rows]
    figure = new_figure(8.4, 1.9 + 0.38 * len(rows))
    grid = figure.add_gridspec(2, 2, width_ratios=[3, 1], height_ratios=[1.1, 0.38 * len(rows)])
    axes = figure.add_subplot(grid[1, 0])
    most = max(max(row) for row in rows) or 1.0
    axes.imshow(rows, cmap="Greys", vmin=0, vmax=most, aspect="auto")
    for i, row in enumerate(rows):
        for j, share in enumerate(row):
            axes.text(j, i, _percent(share), ha="center", va="center", fontsize=9, color=_ink(share, most))
    axes.set_xticks(range(len(FIELDS)), FIELDS, fontsize=9)
    axes.set_yticks(range(len(rows)), [f"block {i}" for i in range(1, len(rows) + 1)], fontsize=9)
    axes.tick_params(length=0)
    above, beside = figure.add_subplot(grid[0, 0], sharex=axes), figure.add_subplot(grid[1, 1], sharey=axes)
    for j, share in enumerate(kinds):
        above.text(j, share, _percent(share), ha="center", va="bottom", fontsize=9)
    for i, share in enumerate(blocks):
        beside.text(share, i, f" {_percent(share)}", va="center", fontsize=9)
    above.bar(range(len(kinds)), kinds, color="#8a8a8a", width=0.6)
    beside.barh(range(len(blocks)), blocks, color="#8a8a8a", height=0.6)
    above.set_title("share of what sets the best tenth apart, %: by kind of decision", loc="left", fontsize=10)
    beside.set_title("by block", loc="left", fontsize=10)
    above.set_ylim(0, 1.3 * max(kinds))
    beside.set_xlim(0, 1.3 * max(blocks))
    for side in (above, beside):
        side.set_axis_off()
    return figure


def _ink(share: float, most: float) -> str:
    return "white" if share > 0.55 * most else "#777777" if share < 0.005 else "black"


def _percent(share: float) -> str:
    return "0" if share == 0 else "<1" if share < 0.005 else f"{100 * share:.0f}"


def curves(record: Record) -> Any | None:
    """A Figure: what the best, the median and pruned trials reported epoch by epoch. None where nothing was reported."""
    told = [t for t in ranked(record) if t.reported]
    pruned = thinned([t for t in record.trials if t.state == "pruned" and t.reported], CURVES)
    if not told and not pruned:
        return None
    figure = new_figure(8.4, 3.9)
    axes = figure.add_subplot()
    bare(axes)
    for i, t in enumerate(pruned):
        label = f"pruned ({len(pruned)} shown), × where stopped" if i == 0 else None
        axes.plot(range(1, len(t.reported) + 1), t.reported, "-", color=THIN, linewidth=0.9, label=label)
        axes.plot(len(t.reported), t.reported[-1], "x", color="#555555", markersize=5)
    if len(told) > 2:
        _curve(axes, told[len(told) // 2], "median", "--s", DARK)
    if told:
        _curve(axes, told[0], "best" if told[0] == ranked(record)[0] else "best of those that reported", "-o", BLUE)
    axes.set_title("score during the proxy training", loc="left", fontsize=10)
    axes.set_xlabel("epoch")
    axes.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(loc="outside lower left", ncols=3, frameon=False, fontsize=9)
    return figure


def _curve(axes: Any, trial: Trial, name: str, style: str, colour: str) -> None:
    label = f"{name}: trial {trial.number}, {number(trial.reported[-1])}"
    axes.plot(range(1, len(trial.reported) + 1), trial.reported, style, color=colour, linewidth=2, markersize=5, label=label)
