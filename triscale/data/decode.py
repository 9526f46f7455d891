"""An image file, or its bytes, as upright 8-bit RGB. Untrusted input: it gives an array or BadImage, nothing else.

Pillow alone decodes. torchvision takes 2 s to import, and its PNG decoder (0.29) dies of SIGSEGV on a wrong checksum.
"""

from __future__ import annotations

import io
import os
import re
import stat
import struct
import threading
from contextlib import nullcontext
from typing import BinaryIO

import numpy as np
from PIL import BmpImagePlugin, GifImagePlugin, Image, ImageFile, JpegImagePlugin, PngImagePlugin, PpmImagePlugin, TiffImagePlugin, WebPImagePlugin

MAX_PIXELS = 89_478_485  # Pillow's own warning level: 256 MiB of RGB
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm"})  # of a lower-case name

ORIENTATION, PHOTOMETRIC, BITS_PER_SAMPLE = 0x0112, 0x0106, 0x0102  # TIFF 6.0 tags; EXIF uses the same


class BadImage(ValueError):  # noqa: N818 - public name, reads as what it says
    """No image that can be read. The message is one line: the name, then what was expected and what was found."""


class _Jpeg(JpegImagePlugin.JpegImageFile):
    def _read_dpi_from_exif(self) -> None:
        """Left out: dots per inch are of no use here, and looking for them warns of every odd EXIF block (ImageNet has some)."""


# By content. Image.open would do, but for its check against Pillow's process-wide pixel limit: that warns before ours is
# asked, and refuses what max_pixels allows. An MPO (two JPEGs in a row) is read as its first JPEG.
_KINDS: tuple[tuple[str, re.Pattern[bytes], type[ImageFile.ImageFile]], ...] = (
    ("JPEG", re.compile(rb"\xff\xd8\xff"), _Jpeg),
    ("PNG", re.compile(rb"\x89PNG\r\n\x1a\n"), PngImagePlugin.PngImageFile),
    ("WebP", re.compile(rb"RIFF....WEBP", re.DOTALL), WebPImagePlugin.WebPImageFile),
    ("GIF", re.compile(rb"GIF8[79]a"), GifImagePlugin.GifImageFile),
    ("BMP", re.compile(rb"BM"), BmpImagePlugin.BmpImageFile),
    ("TIFF", re.compile(rb"II[*+]\0|MM\0[*+]"), TiffImagePlugin.TiffImageFile),
    ("PPM", re.compile(rb"P[1-6][\s#]"), PpmImagePlugin.PpmImageFile),
)


class _PillowLimitLifted:
    """Takes Pillow's process-wide pixel limit away while some thread is inside, and puts it back after the last one."""

    def __init__(self) -> None:
        self._lock, self._inside, self._limit = threading.Lock(), 0, Image.MAX_IMAGE_PIXELS

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                Image.MAX_IMAGE_PIXELS = self._limit


_pillow_limit_lifted = _PillowLimitLifted()


def decode(source: str | os.PathLike | bytes, *, name: str | None = None, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """An image as (H, W, 3) uint8, RGB, upright, C-contiguous and writable: the first frame of JPEG, PNG, WebP, GIF, BMP, TIFF or PPM.

    source: a path, or a file's bytes. The content decides the format, not the suffix. name: what messages call it
    (default: the path as given; "image" for bytes).

    EXIF orientation is applied; one outside 1..8 counts as upright. Alpha is dropped, not blended: the colours are those
    stored under it. Grey of 16 (TIFF: also 12) bits becomes round(value / 257), the high byte for 16-bit colour, which is
    what Pillow gives. CMYK is converted without colour profile, Adobe's inverted JPEGs with the right polarity.

    Raises BadImage for everything else: no regular file, empty, of no such format, truncated, corrupt, more than max_pixels
    (told from the header, before pixels are allocated) or 8 bytes per allowed pixel + 64 MiB on disk, pixels without a
    known range (float, integers outside 16 bits).
    """
    if isinstance(source, bytes):
        return _decode(io.BytesIO(source), _one_line("image" if name is None else name), max_pixels)
    label = _one_line(os.fsdecode(source) if name is None else name)
    try:
        mode = os.stat(source).st_mode
        if not stat.S_ISREG(mode):  # asked before opening: to open a pipe that nobody writes to would wait for ever
            raise BadImage(f"{label}: expected an image file, found a {'folder' if stat.S_ISDIR(mode) else 'device, pipe or socket'}")
        with open(source, "rb") as file:
            return _decode(file, label, max_pixels)
    except BadImage:
        raise
    except (OSError, ValueError) as error:  # ValueError: a path with a zero byte
        raise BadImage(f"{label}: cannot be opened ({_reason(error)})") from None


def _decode(file: BinaryIO, label: str, max_pixels: int) -> np.ndarray:
    kind = "image"
    try:
        kind, plugin = _recognise(file, label, max_pixels)
        # A GIF's first frame may be larger than its header says: its plugin then asks Pillow's limit itself.
        with _pillow_limit_lifted if max_pixels > MAX_PIXELS or kind == "GIF" else nullcontext(), plugin(file) as image:
            if image.width * image.height > max_pixels:
                size = f"{image.width}x{image.height} pixels"
                raise BadImage(f"{label}: {size}, more than the limit of {max_pixels} (raise max_pixels to allow it)")
            image.load()
            rgb = _rgb(image, label)
            # TIFF's orientation is applied by Pillow as it loads.
            return rgb if kind == "TIFF" else _upright(rgb, _orientation(image.info.get("exif")))
    except (BadImage, MemoryError):
        raise
    except Image.DecompressionBombError:  # WebP's plugin asks Pillow's limit, twice ours, before it allocates a canvas
        raise BadImage(f"{label}: more than the limit of {max_pixels} pixels (raise max_pixels to allow it)") from None
    except Exception as error:  # a parser on garbage may raise anything; what it says goes into our message
        reason = _reason(error)
        if "truncat" in reason.lower():
            raise BadImage(f"{label}: truncated, the {kind} data ends early") from None
        raise BadImage(f"{label}: corrupt or truncated {kind} ({reason})") from None


def _recognise(file: BinaryIO, label: str, max_pixels: int) -> tuple[str, type[ImageFile.ImageFile]]:
    """The format's name and its parser, by the first bytes; leaves `file` at its start."""
    start = file.read(16)
    if not start:
        raise BadImage(f"{label}: empty file")
    found = next(((kind, plugin) for kind, signature, plugin in _KINDS if signature.match(start)), None)
    if found is None:
        raise BadImage(f"{label}: not an image that can be read (JPEG, PNG, WebP, GIF, BMP, TIFF)")
    # Some parsers hold the whole file in memory. 8 bytes a pixel is 16-bit RGBA as it is; the rest is for profiles and frames.
    size, limit = file.seek(0, os.SEEK_END), 8 * max_pixels + (64 << 20)
    if size > limit:
        raise BadImage(f"{label}: {size} bytes, more than the limit of {limit} (raise max_pixels to allow it)")
    file.seek(0)
    return found


def _rgb(image: ImageFile.ImageFile, label: str) -> np.ndarray:
    """A loaded image's pixels as stored, (H, W, 3) uint8."""
    image.info.pop("transparency", None)  # Pillow warns where a palette has it, and it is dropped anyway
    if image.mode == "F":
        raise BadImage(f"{label}: expected pixels of 8 or 16 bits, found floating point, whose range is unknown")
    if image.mode.startswith("I"):  # convert("RGB") would clip these to white
        return np.repeat(_eight_bits(image, label)[:, :, None], 3, axis=2)
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def _eight_bits(image: ImageFile.ImageFile, label: str) -> np.ndarray:
    """Grey of more than 8 bits as (H, W) uint8."""
    values, top = np.array(image), 65535
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > top:
        raise BadImage(f"{label}: expected pixels of 8 or 16 bits, found integers from {low} to {high}")
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        if image.tag_v2.get(BITS_PER_SAMPLE) == (12,):  # Pillow leaves these at 0..4095
            top = 4095
        if image.tag_v2.get(PHOTOMETRIC) == 0:  # white is zero: Pillow inverts 8 bits, but not 16
            values = top - values
    return ((values.astype(np.uint32) * 255 + top // 2) // top).astype(np.uint8)


def _orientation(exif: bytes | None) -> int:
    """The EXIF orientation, 1..8; 1 where there is none or nonsense. Pillow's reader would warn of odd blocks, and raise."""
    data = (exif or b"").removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}.get(data[:2])
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(f"{order}I", data, 4)
        (entries,) = struct.unpack_from(f"{order}H", data, start)
        for at in range(start + 2, start + 2 + 12 * entries, 12):
            tag, kind, _, value = struct.unpack_from(f"{order}HHIH", data, at)
            if tag == ORIENTATION:
                return value if kind == 3 and 1 <= value <= 8 else 1  # kind 3: a 16-bit number
    except struct.error:
        pass
    return 1


def _upright(rgb: np.ndarray, orientation: int) -> np.ndarray:
    """Undo an EXIF orientation (1..8): swap the axes from 5 on, then mirror what the standard's table says."""
    if orientation >= 5:
        rgb = rgb.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        rgb = rgb[::-1]
    if orientation in (2, 3, 6, 7):
        rgb = rgb[:, ::-1]
    return np.ascontiguousarray(rgb)


def _reason(error: Exception) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return _one_line(text)[:120] or type(error).__name__


def _one_line(text: str) -> str:
    """`text` with what would break a line, a terminal or an encoder written as an escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
