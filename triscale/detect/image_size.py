"""The size of an image file, from its header: what boxes are held to before training begins."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from triscale.data.decode import MAX_PIXELS, BadImage
from triscale.text import printable

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # those of `decode`
ORIENTATION = 0x0112  # EXIF's tag; from 5 on width and height change places


class Size(NamedTuple):
    """As `decode` gives the image, upright. turned: the file stores it with the two exchanged."""

    height: int
    width: int
    turned: bool


def image_size(path: Path) -> Size:
    """Reads the header alone. Raises BadImage where there is none, or where it tells more pixels than `decode` takes."""
    if not path.is_file():  # asked before opening: to open a pipe that nobody writes to would wait for ever
        raise BadImage("no such file" if not path.exists() else "not a file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd EXIF blocks, and of many pixels, which are refused below
            with Image.open(path, formats=FORMATS) as image:
                width, height = image.size
                turned = _orientation(image) >= 5
    except Exception as error:  # a parser on garbage may raise anything
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "not an image that can be read"
        raise BadImage(printable(reason)) from None
    if width * height > MAX_PIXELS:
        raise BadImage(f"{width}x{height} pixels, more than the limit of {MAX_PIXELS}")
    return Size(width, height, True) if turned else Size(height, width, False)


def _orientation(image: Image.Image) -> int:
    """EXIF's, 1..8. Not by getexif, which looks into XMP too, as `decode` doesn't; of a TIFF Pillow itself applies what getexif tells."""
    exif = image.getexif() if image.format == "TIFF" else Image.Exif()
    if image.format != "TIFF":
        exif.load(image.info.get("exif") or b"")
    value = exif.get(ORIENTATION, 1)
    return value if type(value) is int and 1 <= value <= 8 else 1
