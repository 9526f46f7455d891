"""The confusion matrix of an evaluation as a plot, in greys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from triscale.evaluate import UNLABELLED, Scores
from triscale.text import printable

LABELLED = 40  # classes up to which the matrix is drawn with names and counts
BINS = 100  # cells a side of a larger matrix: a single image in 1000 x 1000 cells would not be seen
BARS = 15  # most confused pairs drawn beside it
NAME = 26  # characters of a class name in the plot


def confusion_plot(scores: Scores, classes: Sequence[str]) -> Any:
    """A matplotlib Figure, in greys: a matrix with names and counts of the classes that occur, where they are LABELLED at most.

    Else the matrix as shades, classes in the order of their indices, beside bars of the most confused pairs.
    """
    from matplotlib.figure import Figure

    pairs = scores.pairs()
    seen = sorted({c for pair in pairs for c in pair} | {row.label for row in scores.rows.values() if row.label != UNLABELLED})
    title = f"{scores.right(1):,} of {scores.labelled:,} images right, {100 * scores.accuracy(1):.2f} %"
    if len(seen) <= LABELLED:
        side = max(3.2, 0.34 * len(seen) + 1.0)
        figure = Figure(figsize=(side, side))
        _matrix(figure.add_subplot(), pairs, seen, classes, title)
        return figure
    figure = Figure(figsize=(12, 5.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    _shades(figure, left, pairs, len(classes), title)
    _bars(right, scores, classes)
    return figure


def _matrix(axes: Any, pairs: dict[tuple[int, int], int], seen: Sequence[int], classes: Sequence[str], title: str) -> None:
    place = {c: i for i, c in enumerate(seen)}
    counts = np.zeros((len(seen), len(seen)), dtype=np.int64)
    for (true, said), count in pairs.items():
        counts[place[true], place[said]] = count
    # Shades by share of the row's images: a class with few images is as readable as one with many.
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    axes.imshow(shares, cmap="Greys", vmin=0, vmax=1.25)
    for i, j in zip(*counts.nonzero(), strict=True):
        colour = "white" if shares[i, j] > 0.6 else "black"
        axes.text(j, i, str(counts[i, j]), ha="center", va="center", color=colour, fontsize=8 if counts.max() < 1000 else 6)
    labels = [_short(classes[c]) for c in seen]
    axes.set_xticks(range(len(seen)), labels, rotation=90, fontsize=8, parse_math=False)
    axes.set_yticks(range(len(seen)), labels, fontsize=8, parse_math=False)
    axes.set_xticks(np.arange(-0.5, len(seen)), minor=True)
    axes.set_yticks(np.arange(-0.5, len(seen)), minor=True)
    axes.grid(which="minor", color="#cccccc", linewidth=0.5)
    axes.tick_params(which="minor", length=0)
    axes.set_xlabel("the network says")
    axes.set_ylabel("right class")
    axes.set_title(title, fontsize=10)


def _shades(figure: Any, axes: Any, pairs: dict[tuple[int, int], int], classes: int, title: str) -> None:
    from matplotlib.colors import LogNorm

    per_bin = -(-classes // BINS)
    bins = -(-classes // per_bin)
    counts = np.zeros((bins, bins), dtype=np.int64)
    for (true, said), count in pairs.items():
        counts[true // per_bin, said // per_bin] += count
    shown = np.ma.masked_equal(counts, 0)
    image = axes.imshow(
        shown, cmap="Greys", norm=LogNorm(0.4, max(2, counts.max())), extent=(0, bins * per_bin, bins * per_bin, 0), interpolation="nearest"
    )
    axes.set_xlabel("class the network says, by index")
    axes.set_ylabel("right class, by index")
    axes.set_title(title, fontsize=10)
    cell = f"images a cell ({per_bin} x {per_bin} classes)" if per_bin > 1 else "images"
    bar = figure.colorbar(image, ax=axes, label=cell, shrink=0.8)
    most = int(counts.max())
    ticks = [d * 10**k for k in range(len(str(most))) for d in ((1,) if most >= 100 else (1, 2, 5)) if d * 10**k <= most]
    bar.set_ticks(ticks, labels=[f"{t:,}" for t in ticks])
    bar.minorticks_off()
    bar.ax.set_ylim(1 if most > 1 else 0.4, max(2, most))


def _bars(axes: Any, scores: Scores, classes: Sequence[str]) -> None:
    pairs = scores.confused(BARS)
    axes.set_title("most confused pairs" if pairs else "no two classes were confused", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    if not pairs:
        axes.set_axis_off()
        return
    counts = [count for _, _, count in pairs]
    axes.barh(range(len(pairs)), counts, color="#999999", edgecolor="black", linewidth=0.5)
    for i, count in enumerate(counts):
        axes.text(count, i, f" {count}", va="center", fontsize=8)
    labels = [f"{_short(classes[true])} → {_short(classes[said])}" for true, said, _ in pairs]
    axes.set_yticks(range(len(pairs)), labels, fontsize=8, parse_math=False)
    axes.set_ylim(BARS - 0.5, -0.5)
    axes.set_xlim(0, 1.12 * max(counts))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("images (right class → what the network says)")


def _short(name: str) -> str:
    text = printable(name)
    return text if len(text) <= NAME else text[: NAME - 1] + "…"
