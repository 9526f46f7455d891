"""What explain found, drawn: a PNG a picture, and one HTML page that needs nothing beside it."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from triscale.explain import palette
from triscale.files import write_text, write_whole
from triscale.text import printable

SHEET = "explain.html"
MARK = '<meta name="generator" content="triscale explain">'  # is in every sheet: a folder that holds one is ours to write into
SMALLEST, LARGEST, MARGIN, LINE = 288, 480, 16, 22  # pixels: a picture's side, the space between two, a line of text
BLACK, GREY = "#1a1a1a", "#555555"


@dataclass(frozen=True)
class Heading:
    """What stands above a network's column."""

    name: str
    note: str


@dataclass(frozen=True)
class Panel:
    """One overlay. pixels: (S, S, 3) uint8. at: row and column of the map's maximum, 0 to 1; None for a constant map."""

    pixels: np.ndarray
    label: str
    probability: float
    at: tuple[float, float] | None

    @property
    def place(self) -> tuple[str, str]:
        """Row and column in percent."""
        return ("-", "-") if self.at is None else (f"{100 * self.at[0]:.0f} %", f"{100 * self.at[1]:.0f} %")

    @property
    def percent(self) -> str:
        return f"{100 * self.probability:.1f} %"


@dataclass(frozen=True)
class Explained:
    """One file. seen: the first network's input as pixels. rows: for each class explained, a panel a network."""

    file: str
    note: str
    seen: np.ndarray
    rows: tuple[tuple[Panel, ...], ...]


def picture_size(sides: Sequence[int], rows: int) -> tuple[int, int]:
    """Width and height of the PNG for networks of these input sizes."""
    side = _side(sides)
    return MARGIN + (len(sides) + 1) * (side + MARGIN), 2 * MARGIN + 3 * LINE + rows * (LINE + side + MARGIN) + LINE


def save_picture(path: Path, found: Explained, headings: Sequence[Heading]) -> None:
    """The PNG of one file: its name, then the input and the networks' overlays side by side, a row for each class."""
    sides = [panel.pixels.shape[0] for panel in found.rows[0]]
    side, (width, height) = _side(sides), picture_size(sides, len(found.rows))
    canvas = Image.new("RGB", (width, height), "white")
    pen = _Pen(canvas)
    lefts = [MARGIN + i * (side + MARGIN) for i in range(len(sides) + 1)]
    y = MARGIN
    pen.text(MARGIN, y, Path(found.file).name, width - 2 * MARGIN, 17, bold=True)
    y += LINE + 4
    for left, heading in zip(lefts, [Heading("input", found.note), *headings], strict=True):
        pen.text(left, y, heading.name, side, 14, bold=True)
        pen.text(left, y + LINE - 2, heading.note, side, 12, colour=GREY)
    y += 2 * LINE
    for i, row in enumerate(found.rows):
        if i == 0:
            canvas.paste(_fit(found.seen, side), (lefts[0], y + LINE))
        for left, panel in zip(lefts[1:], row, strict=True):
            taken = pen.text(left + side, y, panel.percent, side, 14, right=True)
            pen.text(left, y, panel.label, side - taken - 8, 14)
            canvas.paste(_fit(panel.pixels, side), (left, y + LINE))
        y += LINE + side + MARGIN
    x = MARGIN + pen.text(MARGIN, y, "evidence for the class: least", width, 12, colour=GREY) + 8
    canvas.paste(Image.fromarray(scale_bar(90, 12)), (x, y + 2))
    pen.text(x + 98, y, "most, on each map's own scale", width - x - 98 - MARGIN, 12, colour=GREY)
    write_whole(path, lambda temporary: canvas.save(temporary, "PNG"))


def scale_bar(width: int, height: int) -> np.ndarray:
    """The map's colours from least to most: (height, width, 3) uint8."""
    return np.repeat(np.rint(palette(np.linspace(0, 1, width)))[None], height, axis=0).astype(np.uint8)


def sheet_entry(found: Explained, picture: str) -> dict[str, Any]:
    """One file's part of the page. Its images are compressed at once, so that a thousand files stay in memory."""
    rows = [[_cell(panel) for panel in row] for row in found.rows]
    return {"file": printable(found.file), "note": found.note, "picture": printable(picture), "image": _jpeg(found.seen), "rows": rows}


def _cell(panel: Panel) -> dict[str, Any]:
    row, column = panel.place
    text = {"label": printable(panel.label), "percent": panel.percent, "row": row, "column": column}
    return {"image": _jpeg(panel.pixels), "found": panel.at is not None, **text}


def write_sheet(folder: Path, headings: Sequence[Heading], entries: Sequence[dict[str, Any]], methods: Sequence[str]) -> None:
    """explain.html: all files, a column a network. methods: which of cam and gradcam were used."""
    from jinja2 import Environment, PackageLoader

    buffer = io.BytesIO()
    Image.fromarray(scale_bar(160, 12)).save(buffer, "PNG")
    template = Environment(loader=PackageLoader("triscale", "."), autoescape=True).get_template("explain.html")
    bar = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    columns = [{"name": printable(h.name), "note": h.note} for h in headings]
    write_text(folder / SHEET, template.render(columns=columns, entries=entries, bar=bar, methods=methods))


def _side(sides: Sequence[int]) -> int:
    return min(max(SMALLEST, *sides), LARGEST)


def _fit(pixels: np.ndarray, side: int) -> Image.Image:
    return Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC)


def _jpeg(pixels: np.ndarray) -> str:
    image = Image.fromarray(pixels)
    if image.width > LARGEST:
        image = image.resize((LARGEST, LARGEST), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


class _Pen:
    """Text on an image, cut to a width, in the font that comes with matplotlib."""

    def __init__(self, canvas: Image.Image) -> None:
        self.draw = ImageDraw.Draw(canvas)

    def text(self, x: int, y: int, text: str, width: int, size: int, *, bold: bool = False, right: bool = False, colour: str = BLACK) -> int:
        """Draws from x, or with `right` up to x, and returns the width drawn."""
        font = ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", f"DejaVuSans{'-Bold' if bold else ''}.ttf"), size)
        text = printable(text)
        if font.getlength(text) > width:
            while text and font.getlength(text + "…") > width:
                text = text[:-1]
            text = text.rstrip(" ,") + "…"
        self.draw.text((x, y), text, colour, font, anchor="ra" if right else "la")
        return int(font.getlength(text)) + 1
