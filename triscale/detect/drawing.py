"""Boxes drawn into their picture: a colour a class, names and scores where they hide nothing, else a legend below the picture.

Where labels with name and score would cover each other, or much of a box, labels have the score alone and a legend tells the classes;
a label that has no place even so is left out, and the legend's range of scores has to do.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from triscale.files import write_whole
from triscale.text import printable

Colour = tuple[int, int, int]
Rect = tuple[int, int, int, int]  # left, top, right, bottom in pixels; right and bottom lie outside

# Okabe and Ito, "Color Universal Design" (2008), without black: blue, orange, green, purple, sky blue, vermilion, yellow.
HUES: tuple[Colour, ...] = ((0, 114, 178), (230, 159, 0), (0, 158, 115), (204, 121, 167), (86, 180, 233), (213, 94, 0), (240, 228, 66))
BLACK, WHITE = (0, 0, 0), (255, 255, 255)
SMALLEST, LARGEST = 320, 4096  # pixels: a picture whose longer side is below or above is drawn larger or smaller
HIDDEN, HIDDEN_BY_SCORE = 0.06, 0.12  # shares of a box that all labels with names together, and one with a score, may cover
COMPRESSION = 3  # of zlib's 9: a tenth more bytes of a photo than at 6, in half the time


class Look(NamedTuple):
    """factor: drawn pixels for one of the picture. line: a box's width. text: the font's size."""

    factor: float
    line: int
    text: int


def class_colour(index: int) -> Colour:
    """A class's colour in every picture: one of seven hues that the colour-blind tell apart, later ones' lighter and darker shades."""
    hue, turn = HUES[index % len(HUES)], index // len(HUES)
    if not turn:
        return hue
    step, target = (turn + 1) // 2, 255 if turn % 2 else 0
    share = 0.25 + 0.45 * sum((step >> i & 1) / 2 ** (i + 1) for i in range(step.bit_length()))  # van der Corput: far from those before
    red, green, blue = (round(c + share * (target - c)) for c in hue)
    return red, green, blue


def draw_boxes(image: np.ndarray, boxes: np.ndarray, labels: np.ndarray, scores: np.ndarray, classes: Sequence[str]) -> Image.Image:
    """image (H, W, 3) uint8; boxes (n, 4) x1, y1, x2, y2 in its pixels; labels, scores (n,). Returns the RGB picture drawn on.

    A longer side below 320 pixels is enlarged by a whole number, one above 4096 reduced. A class whose name the font, DejaVu Sans,
    can't write, as one in Chinese, is called by its number from 0.
    """
    height, width = image.shape[:2]
    look = _look(width, height)
    size = max(1, round(width * look.factor)), max(1, round(height * look.factor))
    picture = Image.fromarray(image)
    if look.factor != 1:
        picture = picture.resize(size, Image.Resampling.NEAREST if look.factor > 1 else Image.Resampling.BOX)
    rects, kinds = [_rect(box, look.factor, size) for box in boxes.tolist()], labels.tolist()
    _outline(picture, rects, [class_colour(k) for k in kinds], look.line)
    names = {k: _writable(classes[k], k) for k in sorted(set(kinds))}
    points = [f"{score:.2f}" for score in scores.tolist()]
    texts, text = [f"{names[k]} {point}" for k, point in zip(kinds, points, strict=True)], look.text
    places = place(rects, [_label_size(t, text) for t in texts], size)
    if None in places or _hidden(rects, places) > HIDDEN:
        # More classes than hues: the legend numbers them, as their shades alone can hardly be told apart.
        keys = {k: f"{i}: " if len(names) > len(HUES) else "" for i, k in enumerate(names, 1)}
        texts, text = [keys[k] + point for k, point in zip(kinds, points, strict=True)], max(9, round(text * 0.8))
        places = place(rects, [_label_size(t, text) for t in texts], size, HIDDEN_BY_SCORE)
        picture = _with_legend(picture, _entries(labels, scores, names, keys), look.text)
    pen, font = ImageDraw.Draw(picture), _font(text)
    for at, told, k in zip(places, texts, kinds, strict=True):
        if at is not None:
            pen.rectangle((at[0], at[1], at[2] - 1, at[3] - 1), class_colour(k))
            pen.text(((at[0] + at[2]) / 2, (at[1] + at[3]) / 2), told, _ink(class_colour(k)), font, anchor="mm")
    return picture


def save_drawing(path: str | os.PathLike[str], picture: Image.Image) -> None:
    """As PNG, whole or not at all. Raises OSError."""
    write_whole(path, lambda temporary: picture.save(temporary, "PNG", compress_level=COMPRESSION))


def place(rects: Sequence[Rect], sizes: Sequence[tuple[int, int]], within: tuple[int, int], hidden: float = 1.0) -> list[Rect | None]:
    """Where each box's label of size (width, height) goes, one after the other: at its box, inside the picture (width, height), off
    the labels before it, and where it covers least of the boxes, each measured by its own area.

    None where there is no such place, or where it would cover more than the share `hidden` of a box.
    """
    areas = np.array(rects, float).reshape(-1, 4)
    taken: list[Rect] = []
    out: list[Rect | None] = []
    for rect, size in zip(rects, sizes, strict=True):
        best, least = None, np.inf
        for rank, at in enumerate(_candidates(rect, size, within)):
            if any(at[0] < t[2] and t[0] < at[2] and at[1] < t[3] and t[1] < at[3] for t in taken):
                continue
            shares = _shares(areas, at)
            cost = float(shares.sum()) + 1e-3 * rank
            if cost < least and shares.max() <= hidden:
                best, least = at, cost
        out.append(best)
        taken += [best] if best else []
    return out


def _candidates(rect: Rect, size: tuple[int, int], within: tuple[int, int]) -> Iterator[Rect]:
    """Above the box, below it, inside at its top and its bottom, flush left and right; moved into the picture where one sticks out."""
    (left, top, right, bottom), (wide, high) = rect, size
    if wide > within[0] or high > within[1]:
        return
    for y, x in product((top - high, bottom, top, bottom - high), (left, right - wide)):
        x, y = min(max(x, 0), within[0] - wide), min(max(y, 0), within[1] - high)
        yield x, y, x + wide, y + high


def _shares(areas: np.ndarray, at: Rect) -> np.ndarray:
    """(n,): the share of each box (n, 4) that lies under `at`."""
    sides = np.minimum(areas[:, 2:], at[2:]) - np.maximum(areas[:, :2], at[:2])
    return np.clip(sides, 0, None).prod(1) / (areas[:, 2:] - areas[:, :2]).prod(1)


def _hidden(rects: Sequence[Rect], places: Sequence[Rect | None]) -> float:
    """The largest share of a box that the labels cover together."""
    areas = np.array(rects, float).reshape(-1, 4)
    return float(np.max(sum((_shares(areas, at) for at in places if at is not None), np.zeros(len(rects))), initial=0))


def _look(width: int, height: int) -> Look:
    longer = max(width, height)
    factor = -(-SMALLEST // longer) if longer < SMALLEST else min(1.0, LARGEST / longer)
    side = (width * height) ** 0.5 * factor
    return Look(factor, max(2, round(side / 280)), max(11, round(side / 42)))


def _rect(box: Sequence[float], factor: float, size: tuple[int, int]) -> Rect:
    """A box's pixels in the picture as drawn, at least one."""
    left, top = (min(max(round(v * factor), 0), s - 1) for v, s in zip(box[:2], size, strict=True))
    right, bottom = (min(max(round(v * factor), low + 1), s) for v, low, s in zip(box[2:], (left, top), size, strict=True))
    return left, top, right, bottom


def _outline(picture: Image.Image, rects: Sequence[Rect], colours: Sequence[Colour], width: int) -> None:
    """Lines inside the boxes' edges, small boxes over large ones, on a dark seam that shows them on any ground."""
    pen, seam = ImageDraw.Draw(picture), width // 2
    for left, top, right, bottom in rects:
        pen.rectangle((left - seam, top - seam, right - 1 + seam, bottom - 1 + seam), None, BLACK, seam)
    for (left, top, right, bottom), colour in sorted(zip(rects, colours, strict=True), key=lambda box: -_area(box[0])):
        pen.rectangle((left, top, right - 1, bottom - 1), None, colour, max(1, min(width, (right - left) // 4, (bottom - top) // 4)))


def _area(rect: Rect) -> int:
    return (rect[2] - rect[0]) * (rect[3] - rect[1])


def _entries(labels: np.ndarray, scores: np.ndarray, names: dict[int, str], keys: dict[int, str]) -> list[tuple[Colour, str, str]]:
    """The legend's: of each class in the picture its colour, key and name, and how many boxes with which scores."""
    out = []
    for k, name in names.items():
        mine = scores[labels == k]
        low, high = f"{mine.min():.2f}", f"{mine.max():.2f}"
        out.append((class_colour(k), keys[k] + name, f" × {len(mine)}, {high if low == high else f'{low}–{high}'}"))
    return out


def _with_legend(picture: Image.Image, entries: Sequence[tuple[Colour, str, str]], text: int) -> Image.Image:
    """The picture with a legend on white below, in as many lines as that takes. Names longer than a line are cut."""
    font, gap, side, line = _font(text), round(text * 0.6), round(text * 0.9), round(text * 1.5)
    width = max(picture.width, 20 * text)
    room = width - 2 * gap - side - gap // 2
    told = [_cut(name, rest, room, text) for _, name, rest in entries]
    spots, x, y = [], gap, picture.height + gap // 2
    for words in told:
        wide = side + gap // 2 + int(font.getlength(words)) + 1
        if x > gap and x + wide + gap > width:
            x, y = gap, y + line
        spots.append((x, y))
        x += wide + 2 * gap
    out = Image.new("RGB", (width, y + line + gap // 2), WHITE)
    out.paste(picture, (0, 0))
    pen = ImageDraw.Draw(out)
    for (x, y), words, (colour, _, _) in zip(spots, told, entries, strict=True):
        top = y + (line - side) // 2
        pen.rectangle((x, top, x + side - 1, top + side - 1), colour, BLACK)
        pen.text((x + side + gap // 2, y + line / 2), words, BLACK, font, anchor="lm")
    return out


def _cut(name: str, rest: str, room: int, text: int) -> str:
    font = _font(text)
    if font.getlength(name + rest) > room:
        while name and font.getlength(f"{name}…{rest}") > room:
            name = name[:-1]
        name = f"{name.rstrip()}…"
    return name + rest


def _label_size(label: str, text: int) -> tuple[int, int]:
    """Width and height."""
    return int(_font(text).getlength(label)) + 1 + 2 * max(2, text // 4), round(text * 1.3)


def _ink(ground: Colour) -> Colour:
    """Black or white, whichever contrasts more with `ground`: WCAG 2's ratio, of which 0.179 is the middle."""
    red, green, blue = ((c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4) for c in (v / 255 for v in ground))
    return BLACK if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.179 else WHITE


@lru_cache(maxsize=1024)
def _writable(name: str, index: int) -> str:
    """`name`, or `class INDEX` where the font lacks one of its characters and would draw an empty frame."""
    font, name = _font(16), printable(name)
    absent = bytes(font.getmask("\U0010fffd"))
    return f"class {index}" if any(bytes(font.getmask(c)) == absent for c in set(name)) else name


@lru_cache(maxsize=16)
def _font(size: int) -> ImageFont.FreeTypeFont:
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size)
