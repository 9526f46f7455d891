"""The paper's tables and figures, ours beside the paper's: `reproduce("table7")`, `render(...)`.

What is counted is exact (cost_model.py). What has to be trained is read from the result lines of `studies/`, or says "not
run"; accuracies that are the paper's say so. A difference above 5 % always has a note that names its row and the reason, as
far as one can be derived: the other readings of a row are computed, not quoted.

Source: Tan & Le, ICML 2019 (arXiv 1905.11946), Tables 1, 2, 3, 5 and 7, Figures 1, 3, 4, 5 and 8; paper.py holds its numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from triscale import paper
from triscale.naming import unknown
from triscale.reproduce.figures import figure1, figure5, write_png
from triscale.reproduce.layout import Reproduction, render
from triscale.reproduce.studies import figure3, figure4, figure8, table7
from triscale.reproduce.tables import scaling_table, table1, table2
from triscale.reproduce.transfer import table5

__all__ = ["NAMES", "Reproduction", "render", "reproduce"]


def reproduce(name: str, out: Path | None = None, study: Path | None = None) -> Reproduction:
    """`name`: one of NAMES. `out`: where a figure is written, a `.png` file or a folder; without it, and for tables, nothing is.

    study: the folder (or file) of a study's result lines; without it the results that a clone has in studies/. A figure that
    has no results is not written. Raises UnknownNameError (a ValueError) that gives the nearest name, ResultsError for
    results that can't be read.
    """
    if name in _TABLES:
        return _TABLES[name]()
    if name in _STUDY_TABLES:
        return _STUDY_TABLES[name](study)
    if name not in NAMES:
        raise unknown("table or figure", name, NAMES)
    result, draw = _STUDY_FIGURES[name](study) if name in _STUDY_FIGURES else _FIGURES[name]()
    if out is None or draw is None:
        return result
    file = out if out.suffix.lower() == ".png" else out / f"{name}.png"
    write_png(file, draw())
    return replace(result, figure=file)


Figure = tuple[Reproduction, Callable[[], bytes] | None]
_TABLES: dict[str, Callable[[], Reproduction]] = {
    "table1": table1,
    "table2": table2,
    "table3": partial(scaling_table, "Table 3: scaling MobileNets and ResNet", paper.TABLE3),
}
_STUDY_TABLES: dict[str, Callable[[Path | None], Reproduction]] = {"table5": table5, "table7": table7}
_FIGURES: dict[str, Callable[[], Figure]] = {"figure1": figure1, "figure5": figure5}
_STUDY_FIGURES: dict[str, Callable[[Path | None], Figure]] = {"figure3": figure3, "figure4": figure4, "figure8": figure8}
NAMES = (*_TABLES, *_STUDY_TABLES, *_FIGURES, *_STUDY_FIGURES)
