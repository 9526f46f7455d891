"""One image as a pack keeps it: smaller where it is large, else as it is.

Imports no torch: worker processes start with this file.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from triscale.data.decode import MAX_PIXELS, BadImage, _Jpeg, _orientation, _upright, decode
from triscale.data.samples import Samples
from triscale.text import printable

# Measured on 256 ImageNet pictures, shorter side 256, and EfficientNetV2-B0, which gets 92.19 % of the originals right (one picture
# is 0.39 points):
#                         size    one decode    right      same class as for the original
#   Lanczos 4:2:0, 95    43 kB    0.61 ms       92.19 %    98.4 %
#   Lanczos 4:2:0, 90    31 kB    0.53 ms       91.80 %    98.4 %
#   bicubic 4:2:0, 95    42 kB    0.63 ms       92.97 %    98.4 %
#   bicubic 4:4:4, 95    54 kB    0.80 ms       91.80 %    99.6 %
# So half the colour resolution, and 90 unless asked otherwise, as a pack is read many times. Huffman tables of its own make each
# picture 3 % smaller and 4 % faster to decode, and take twice as long to encode, once.
SUBSAMPLING = "4:2:0"
JPEG_SIDE = 65_500  # pixels, of libjpeg
_KINDS = ((b"\xff\xd8\xff", "jpg"), (b"\x89PNG", "png"), (b"GIF8", "gif"), (b"BM", "bmp"), (b"II", "tif"), (b"MM", "tif"), (b"RIFF", "webp"))


def suffix(data: bytes) -> str:
    """Of an image file, by its first bytes."""
    return next((name for start, name in _KINDS if data.startswith(start)), "ppm")


def encoded_as(short_side: int) -> str:
    """What the bytes of a pack depend on here."""
    return f"JPEG {SUBSAMPLING} after Lanczos" if short_side else "as they were"


def encoded(samples: Samples, number: int, short_side: int, quality: int) -> bytes:
    """The image file that a pack holds for this sample. Raises BadImage.

    Every image is decoded, so that a broken one is found now. One whose shorter side exceeds short_side is resized to it
    (Lanczos, antialiased) and becomes a JPEG of this quality, upright and without metadata; a PNG where its longer side exceeds
    JPEG_SIDE. Other JPEG and PNG files stay byte for byte: to encode small images again would blur them, and save nothing. What
    most readers of shards don't know (GIF, BMP, TIFF, PPM, WebP), and pixels, become PNG without loss. short_side 0: every file
    stays byte for byte, whatever it is.
    """
    name = samples.name(number)
    try:
        data = samples.read(number)
    except OSError as error:
        raise BadImage(f"{name}: cannot be opened ({printable(error.strerror or str(error))})") from None
    small = _from_large_jpeg(data, short_side) if isinstance(data, bytes) and short_side else None
    if small is not None:
        return _jpeg(Image.fromarray(small), quality, name)
    pixels = data if isinstance(data, np.ndarray) else decode(data, name=name)
    size = _smaller(pixels.shape[1], pixels.shape[0], short_side)
    if short_side and min(pixels.shape[:2]) > short_side:
        picture = Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS)
        return _jpeg(picture, quality, name) if max(size) <= JPEG_SIDE else _png(picture, name)
    if isinstance(data, bytes) and (not short_side or suffix(data) in ("jpg", "png")):
        return data
    return _png(Image.fromarray(pixels), name)


def _smaller(width: int, height: int, short_side: int) -> tuple[int, int]:
    """The shorter side as asked, the longer one to the nearest pixel."""
    scale = short_side / min(height, width)
    return max(short_side, round(width * scale)), max(short_side, round(height * scale))


def _from_large_jpeg(data: bytes, short_side: int) -> np.ndarray | None:
    """A plain JPEG at least four times as large, decoded at 1/2, 1/4 or 1/8, still twice as large, and resized: (H, W, 3) uint8.

    None for anything else, and for a broken one, of which `decode` tells what is wrong. A picture of 12 megapixels takes 39 ms
    instead of 261; the pixels differ by 0.4 levels on average, by 8 at most.
    """
    if not data.startswith(b"\xff\xd8\xff"):
        return None
    try:
        with _Jpeg(io.BytesIO(data)) as image:
            width, height = image.size
            if image.mode not in ("RGB", "L") or min(width, height) < 4 * short_side or width * height > MAX_PIXELS:
                return None
            image.draft(image.mode, (2 * short_side, 2 * short_side))
            factor = round(width / image.width)
            image.load()
            size, box = _smaller(width, height, short_side), (0.0, 0.0, width / factor, height / factor)
            pixels = np.asarray(image.convert("RGB").resize(size, Image.Resampling.LANCZOS, box))
            return _upright(pixels, _orientation(image.info.get("exif")))
    except Exception:  # a parser on garbage may raise anything
        return None


def _jpeg(picture: Image.Image, quality: int, name: str) -> bytes:
    out = io.BytesIO()
    try:
        picture.save(out, "JPEG", quality=quality, subsampling=SUBSAMPLING, optimize=True)
    except OSError as error:  # of the encoder: nothing is written to a disk here
        raise BadImage(f"{name}: cannot be encoded as JPEG ({error})") from None
    return out.getvalue()


def _png(picture: Image.Image, name: str) -> bytes:
    out = io.BytesIO()
    try:
        picture.save(out, "PNG")
    except OSError as error:
        raise BadImage(f"{name}: cannot be encoded as PNG ({error})") from None
    return out.getvalue()
