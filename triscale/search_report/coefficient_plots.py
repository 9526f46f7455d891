"""The plots of a coefficient search: scores over the constraint surface, scores with their uncertainty, growth of the cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from triscale.quantities import short
from triscale.report import BLUE
from triscale.scaling import Coefficients
from triscale.search.record import Record
from triscale.search_report.facts import CERTAIN, Triple, budget, images, known, number, standard_error, told_apart, triples
from triscale.search_report.network_plots import bare, new_figure
from triscale.training_report.plots import DARK, THIN

VALUED = 45  # places up to which each has its score written beside it
BARS = 30  # triples in the ranking
PAPER = {"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.85}  # behind texts that cross lines
ALPHAS = (1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8, 1.9, 2.0, 2.25, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0, 12.0, 16.0, 32.0, 64.0)


def surface(record: Record) -> Any | None:
    """A Figure: gamma against beta, shaded by score; alpha follows from both, as lines. Of equal places the best is drawn. None without a triple."""
    found = triples(record)
    if not found:
        return None
    figure = new_figure(8.4, 5.6)
    axes = figure.add_subplot()
    bare(axes, "both")
    scored = [t for t in found if t.trial.state == "complete" and known(t.trial.value) and known(t.trial.score)]
    unscored = {_place(t) for t in found} - {_place(t) for t in scored}
    places: dict[tuple[float, float], Triple] = {}
    for t in scored:  # best first
        places.setdefault(_place(t), t)
    _limits(axes, [_place(t) for t in found])
    alphas = _alpha_lines(axes, record)
    if unscored:
        axes.plot(*zip(*sorted(unscored), strict=True), "x", color=DARK, markersize=7, label="not scored")
    if places:
        _scores(figure, axes, list(places.values()))
    axes.set_xlabel("beta (width)")
    axes.set_title("gamma (resolution)", loc="left", fontsize=10)
    if alphas:
        axes.plot([], [], ":", color=THIN, label=f"alpha (depth), for alpha·beta²·gamma² = {budget(record):g}")
    figure.legend(loc="outside lower left", ncols=3, frameon=False, fontsize=9)
    return figure


def _place(t: Triple) -> tuple[float, float]:
    return t.coefficients.beta, t.coefficients.gamma


def _limits(axes: Any, places: Sequence[tuple[float, float]]) -> None:
    """Around the places, with room for alpha's labels at the left and the top."""
    betas, gammas = zip(*places, strict=True)
    x, y = (0.09 * (max(values) - min(values)) or 0.05 for values in (betas, gammas))
    axes.set_xlim(min(betas) - 1.6 * x, max(betas) + x)
    axes.set_ylim(min(gammas) - y, max(gammas) + 1.8 * y)


def _alpha_lines(axes: Any, record: Record) -> bool:
    """Lines of equal alpha, each labelled where it enters the picture, so that labels and scores keep apart."""
    total = budget(record)
    if total is None:
        return False
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    drawn = False
    for alpha in (a for a in ALPHAS if a <= total):
        edge = math.sqrt(total / alpha)  # beta x gamma on the line
        x = [left + (right - left) * i / 300 for i in range(301)]
        inside = [(b, edge / b) for b in x if b > 0 and bottom <= edge / b <= top]
        if not inside:
            continue
        axes.plot(*zip(*inside, strict=True), ":", color=THIN, linewidth=1.2, zorder=1)
        (b, g), drawn = inside[0], True
        at_top = b > left
        axes.annotate(
            f"α {alpha:g}", (b, g), (3, -3 if at_top else 0), textcoords="offset points", va="top" if at_top else "center", bbox=PAPER,
            fontsize=8, color="#444444", zorder=2,
        )  # fmt: skip
    return drawn


def _scores(figure: Any, axes: Any, best_first: Sequence[Triple]) -> None:
    x, y = zip(*(_place(t) for t in best_first), strict=True)
    scores = [t.trial.score or 0.0 for t in best_first]
    drawn = axes.scatter(x, y, c=scores, cmap="cividis", s=110, edgecolors=DARK, linewidths=0.6, zorder=3)
    figure.colorbar(drawn, ax=axes, label="score", shrink=0.85, aspect=30)
    for t in best_first if len(best_first) <= VALUED else best_first[:5]:
        bold = t is best_first[0]
        axes.annotate(
            number(t.trial.score), _place(t), (0, 9 if not bold else 13), textcoords="offset points", ha="center", fontsize=8, zorder=4,
            weight="bold" if bold else "normal", bbox=PAPER,
        )  # fmt: skip
    c = best_first[0].coefficients
    label = f"best: {c.alpha:g}, {c.beta:g}, {c.gamma:g}"
    axes.plot(c.beta, c.gamma, "*", color=DARK, markeredgecolor="white", markersize=20, zorder=5, label=label)


def ranking(record: Record) -> Any | None:
    """A Figure: the best triples' scores, bars of two standard errors where the number of images is known; hollow: not told from the best."""
    scored = [t for t in triples(record) if t.trial.state == "complete" and known(t.trial.score) and known(t.trial.value)]
    if not scored:
        return None
    shown, n = scored[:BARS], images(record)
    best = shown[0].trial.score
    figure = new_figure(8.4, 1.3 + 0.2 * len(shown))
    axes = figure.add_subplot()
    bare(axes, "x")
    for i, t in enumerate(shown):
        spread, apart = standard_error(t.trial.score, n), told_apart(best, t.trial.score, n)
        colour = BLUE if i == 0 else DARK
        face = "white" if i and apart is False else colour
        error = CERTAIN * spread if spread is not None else None
        axes.errorbar(
            t.trial.score, -i, xerr=error, fmt="*" if i == 0 else "o", color=colour, markerfacecolor=face, markersize=13 if i == 0 else 6,
            capsize=3, linewidth=1,
        )  # fmt: skip
    if known(record.reference_score):
        axes.axvline(record.reference_score, color=DARK, linestyle="--", linewidth=1, label=f"not scaled: {number(record.reference_score)}")
    axes.set_yticks([-i for i in range(len(shown))], [_label(t.coefficients) for t in shown], fontsize=8.5)
    axes.set_ylim(-len(shown) + 0.3, 0.7)
    axes.set_title("alpha · beta · gamma, best first", loc="left", fontsize=10)
    axes.set_xlabel("score" + (f", with two standard errors of {n:,} images" if standard_error(best, n) is not None else ""))
    _ranking_legend(figure, axes, len(shown) > 1 and standard_error(best, n) is not None)
    return figure


def _label(c: Coefficients) -> str:
    return f"{c.alpha:.2f} · {c.beta:.2f} · {c.gamma:.2f}"


def _ranking_legend(figure: Any, axes: Any, certain: bool) -> None:
    axes.plot([], [], "*", color=BLUE, markersize=13, label="best")
    if certain:
        axes.plot([], [], "o", color=DARK, markerfacecolor="white", label="can't be told from the best")
        axes.plot([], [], "o", color=DARK, label="worse than the best")
    figure.legend(loc="outside lower left", ncols=4, frameon=False, fontsize=9)


def growth(lines: Sequence[tuple[str, Sequence[tuple[int, int]]]]) -> Any | None:
    """A Figure: MACs against phi, the first line the chosen coefficients'. lines: name, (phi, MACs)."""
    if not any(points for _, points in lines):
        return None
    figure = new_figure(8.4, 3.6)
    axes = figure.add_subplot()
    bare(axes, "both")
    for (name, points), (style, colour, width) in zip(lines, (("-o", BLUE, 2.2), ("--s", DARK, 1.2)), strict=False):
        if points:
            axes.plot(*zip(*points, strict=True), style, color=colour, linewidth=width, markersize=6, label=name)
    axes.set_yscale("log")
    axes.yaxis.get_major_locator().set_params(subs=(1, 2, 5))
    axes.yaxis.set_major_formatter(lambda y, _: short(y))
    axes.yaxis.set_minor_formatter("")
    axes.set_title("multiply-adds per image", loc="left", fontsize=10)
    axes.set_xlabel("phi")
    figure.legend(loc="outside lower left", ncols=2, frameon=False, fontsize=9)
    return figure
