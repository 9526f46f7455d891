"""What every table and figure is made of: rows of text, their layout for a terminal, and numbers as the paper prints them."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from triscale.architecture import Arch
from triscale.cost_model import cost

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


def billions(network: Arch) -> float:
    return cost(network).macs / 1e9


def as_printed(ours: float, printed: str) -> str:
    """`ours` to the digits that the paper keeps: 10.266 beside "9.9" is 10.3."""
    return f"{ours:.{len(printed.partition('.')[2])}f}"


def difference(ours: float, printed: str) -> float:
    return ours / float(printed) - 1
