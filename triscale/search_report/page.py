"""The page of a search and its plots as files."""

from __future__ import annotations

from pathlib import Path

from triscale.files import write_text, write_whole
from triscale.search.record import Record
from triscale.search_report import coefficients, network

DPI = 150


def render(record: Record, out: Path, classes: int = 1000, channels: int = 3) -> Path:
    """Writes out/report.html and returns its path; at any time of the search, with as much as is known.

    classes, channels: of the networks, for the reference's cost and the tables of stages. Raises OSError as it comes.
    """
    from jinja2 import Environment, PackageLoader

    page = (network.network_page if record.kind == "network" else coefficients.coefficient_page)(record, classes, channels)
    template = Environment(loader=PackageLoader("triscale", "search_report"), autoescape=True).get_template("page.html")
    write_text(out / "report.html", template.render(**page))
    return out / "report.html"


def plots(record: Record, folder: Path, classes: int = 1000, channels: int = 3) -> list[Path]:
    """The main plots as PNG files at 150 dpi, those that there is something to draw for: history, pareto and importance of a network
    search; surface, ranking and growth of a coefficient search. Makes the folder. Raises OSError as it comes."""
    figures = (network.figures if record.kind == "network" else coefficients.figures)(record, classes, channels)
    paths = []
    for name, figure in figures.items():
        if figure is not None:
            path = folder / f"{name}.png"
            write_whole(path, lambda temporary, f=figure: f.savefig(temporary, format="png", dpi=DPI, bbox_inches="tight"))  # type: ignore[misc]
            paths.append(path)
    return paths
