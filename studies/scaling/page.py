"""docs/scaling.md and its figures, made from the results kept in the project."""

from __future__ import annotations

import re
from pathlib import Path

from triscale.files import write_text
from triscale.reproduce import Reproduction, reproduce
from triscale.reproduce.study_results import COMMAND, Study, read_study, shipped, verdict

DOCS = Path(__file__).resolve().parents[2] / "docs"
FIGURES = ("figure8", "figure3", "figure4")
FRAME = """# Compound scaling on CIFAR-10

The paper's central claim, run small: the same multiply-adds spent on depth, width, resolution, or on all three.
How, and with what choices: [studies/scaling](../studies/scaling/README.md).

<!-- scaling -->
<!-- /scaling -->
"""


def write(results: Path | None = None, docs: Path = DOCS) -> list[Path]:
    """Writes the page and the figures that there are results for; returns their paths. Raises ValueError where there are none.

    results: a folder of result lines; those kept in the project unless given.
    """
    study = read_study(results)
    if study is None:
        raise ValueError(f"no results in {shipped()}; {COMMAND} makes them, --render --out FOLDER reads others")
    figures = {name: reproduce(name, docs / f"scaling-{name}.png", results) for name in FIGURES}
    page = docs / "scaling.md"
    text = page.read_text(encoding="utf-8") if page.is_file() else FRAME
    write_text(page, between_markers(text, block(study, figures)))
    return [page, *(r.figure for r in figures.values() if r.figure)]


def between_markers(text: str, made: str) -> str:
    """`text` with what stands between its markers replaced."""
    return re.sub(r"<!-- scaling -->.*?<!-- /scaling -->", lambda _: f"<!-- scaling -->\n{made}\n<!-- /scaling -->", text, flags=re.DOTALL)


def block(study: Study, figures: dict[str, Reproduction]) -> str:
    """The generated part: the finding in a sentence, then each figure with its table and notes."""
    parts = [verdict(study.five())]
    for name, result in figures.items():
        parts.append(f"## {result.title}")
        if result.figure:
            parts.append(f"![{result.title}](scaling-{name}.png)")
        parts += [_table(result), "\n".join(f"- {note}" for note in result.notes if note != verdict(study.five()))]
    return "\n\n".join(parts)


def _table(result: Reproduction) -> str:
    lines = [result.header, tuple("---" for _ in result.header), *result.rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
