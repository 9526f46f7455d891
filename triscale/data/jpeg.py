"""From an image file's bytes to a square of 8-bit pixels, fast: what a loader's worker does once per image. Imports no torch.

A JPEG's rows below the crop are not decoded (`jpeg_header.cut`), and it is decoded at 1/2, 1/4 or 1/8 of its size as long as the
crop then is no smaller than what is asked for: the inverse cosine transform does the antialiasing. simplejpeg decodes, OpenCV
resizes (`jpeg_resize`); without them (`missing`) Pillow does both. Whatever is no plain JPEG, or gives a decoder pause, is
decoded whole by `decode`, which alone says what is broken.

CPU time an image on one core, random crops of area 0.08 to 1 to 224 pixels, against PIL's decode, crop and bicubic (2.56 ms): 256
ImageNet files 1.15 ms; the same at short side 256, 4:2:0, quality 90 0.40 ms, quality 95 0.46 ms. Half of it is entropy decoding.
"""

from __future__ import annotations

import importlib
import io
import math
import threading
import warnings
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from triscale.data.decode import MAX_PIXELS, BadImage, _Jpeg, _one_line, _orientation, _recognise, decode
from triscale.data.jpeg_header import Header, cut, header
from triscale.data.jpeg_resize import opencv, resize, resize_as_pillow
from triscale.data.transform import LARGEST, Plan, check, plan, square
from triscale.recipe import Preprocess

SCALES = (8, 4, 2)
TRIES = 10
LONGEST, WIDEST = math.log(3 / 4), math.log(4 / 3)  # of a crop's width / height
KEPT_BUFFER = 1 << 23  # bytes: larger pictures get memory of their own


class RandomCrop(NamedTuple):
    """A random part of the picture: area from `low` to 1, aspect 3/4 to 4/3 evenly on a log scale, anywhere inside.

    numbers: (10, 4) float from [0, 1): area, aspect, row and column of ten tries; the first that fits is taken, else the centre as
    in evaluation with a padding of 32. Source: official preprocessing.py, `_decode_and_random_crop`; the log scale is torchvision's.
    """

    low: float
    numbers: np.ndarray


Box = RandomCrop | Preprocess


def crop_plan(shape: tuple[int, ...], crop: RandomCrop, size: int) -> Plan:
    """The geometry of a random crop of an image of this shape (height, width, ...)."""
    height, width = shape[:2]
    for row in crop.numbers[:TRIES]:
        area, aspect, y, x = row.tolist()
        area = (crop.low + (1 - crop.low) * area) * height * width
        aspect = math.exp(LONGEST + (WIDEST - LONGEST) * aspect)
        wide, high = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < wide <= width and 0 < high <= height:
            top, left = min(int(y * (height - high + 1)), height - high), min(int(x * (width - wide + 1)), width - wide)
            return Plan((top, left, high, wide), (size, size), (0, 0, size, size))
    return plan(shape, Preprocess(size))


def read_square(
    data: bytes | np.ndarray, out: np.ndarray, box: Box, *, name: str = "image", max_pixels: int = MAX_PIXELS, reference: bool = False
) -> None:
    """Writes the crop and resize of one image into `out`, (S, S, C) uint8 with C 3 (RGB) or 1 (grey, ITU-R 601 of the resized RGB).

    data: an image file's bytes, or pixels (H, W, 3) uint8. box: a random crop, resized by bicubic, or evaluation's geometry and
    filter, whose size and channels `out` has to have. name: what messages call the image. reference: the whole image by `decode`,
    Pillow's filters, several times slower; comparison is what it is for.

    Numerics. Evaluation: Pillow's pixels and filters, to a grey level here and there, but for pictures of twice the size asked for
    and more, which are decoded at 1/2, 1/4 or 1/8: V2-B0 is right on 236 of 256 ImageNet files either way. Random crops:
    `jpeg_resize.resize`, halved chroma repeated instead of interpolated, and at 1/k the edges of the crop moved to the
    nearest multiples of k; 0.9 grey levels from the reference on average.

    Raises BadImage as `decode` does, but for damage inside a JPEG's rows that the crop leaves out, which is not seen (that the
    file was cut short is). ValueError: pixels or `out` of another shape or type.
    """
    size = _check_out(out, box)
    if isinstance(data, np.ndarray):
        check(data)
        _fit(data, out, box, size, reference)
        return
    if not reference:
        tell_missing()
        head = header(data)
        small = head is not None and head.height * head.width <= max_pixels and len(data) <= 8 * max_pixels
        if head is not None and head.plain and small and _read_jpeg(data, head, out, box, size):
            return
    _fit(decode(data, name=name, max_pixels=max_pixels), out, box, size, reference)


def size_of(data: bytes, *, name: str = "image", max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(height, width) of an image file, upright, from its header alone. Raises BadImage where that is unreadable, not for later damage."""
    head = header(data)
    if head is not None and head.plain:
        return head.height, head.width
    label = _one_line(name)
    try:
        kind, plugin = _recognise(io.BytesIO(data), label, max_pixels)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with plugin(io.BytesIO(data)) as image:
                turned = kind != "TIFF" and _orientation(image.info.get("exif")) >= 5
                return (image.width, image.height) if turned else (image.height, image.width)
    except (BadImage, MemoryError):
        raise
    except Exception as error:  # a parser on garbage may raise anything
        raise BadImage(f"{label}: corrupt or truncated header ({_one_line(str(error))[:120]})") from None


@lru_cache(1)
def simplejpeg() -> Any:
    """The module, or None where it is not installed."""
    try:
        return importlib.import_module("simplejpeg")
    except ImportError:
        return None


def missing() -> str | None:
    """What is not installed and what that costs, in one line; None where all is there."""
    absent = [n for n, module in (("simplejpeg", simplejpeg()), ("opencv-python-headless", opencv())) if module is None]
    if not absent:
        return None
    return f"without {' and '.join(absent)} images are read two to three times slower, by Pillow; pip install 'triscale[data]'"


@lru_cache(1)
def tell_missing() -> None:
    """Warns of `missing`, once a process."""
    if said := missing():
        warnings.warn(said, RuntimeWarning, stacklevel=3)


def _check_out(out: np.ndarray, box: Box) -> int:
    size = box.size if isinstance(box, Preprocess) else out.shape[0]
    channels = (box.channels,) if isinstance(box, Preprocess) else (1, 3)
    if out.dtype != np.uint8 or out.ndim != 3 or out.shape[:2] != (size, size) or out.shape[2] not in channels or not size:
        raise ValueError(f"read_square: expected room for ({size}, {size}, {channels[-1]}) uint8, found {out.shape} {out.dtype}")
    return size


def geometry_of(shape: tuple[int, ...], box: Box, size: int) -> Plan:
    """What is cut out of an image of this shape (height, width, ...), resized and kept. size: of a random crop's square."""
    return plan(shape, box) if isinstance(box, Preprocess) else crop_plan(shape, box, size)


def needs_reference(box: Box, geometry: Plan) -> bool:
    """Whether only `transform.square` does it: filters without a fast form, and shapes so thin that the resized whole would be huge."""
    return isinstance(box, Preprocess) and (box.interpolation not in ("bicubic", "bilinear") or math.prod(geometry.resized) > LARGEST)


def _fit(pixels: np.ndarray, out: np.ndarray, box: Box, size: int, reference: bool) -> None:
    """A whole image's crop and resize."""
    geometry = geometry_of(pixels.shape, box, size)
    if isinstance(box, Preprocess) and (reference or needs_reference(box, geometry)):
        out[...] = square(pixels, box)
        return
    top, left, height, width = geometry.cut
    part = pixels[top : top + height, left : left + width]
    if reference:
        part = np.array(Image.fromarray(np.ascontiguousarray(part)).resize((size, size), Image.Resampling.BICUBIC))
    _finish(part, geometry, out, box)


def _finish(part: np.ndarray, geometry: Plan, out: np.ndarray, box: Box) -> None:
    """Resizes the cut part and keeps the square of it."""
    if isinstance(box, Preprocess):
        picture = resize_as_pillow(part, geometry, box.interpolation)
    elif out.shape[2] == 3:
        resize(part, *geometry.resized, out=out)
        return
    else:
        picture = Image.fromarray(resize(part, *geometry.resized))
    out[...] = np.asarray(picture.convert("L"))[:, :, None] if out.shape[2] == 1 else np.asarray(picture)


def _read_jpeg(data: bytes, head: Header, out: np.ndarray, box: Box, size: int) -> bool:
    """`read_square` of a plain JPEG; False where its decoder objects, with nothing said."""
    geometry = geometry_of((head.height, head.width), box, size)
    if needs_reference(box, geometry):
        pixels = _decoded(data, head.height, head.width)
        if pixels is not None:
            _fit(pixels, out, box, size, False)
        return pixels is not None
    (top, left, height, width), (high, wide) = geometry.cut, geometry.resized
    scale = next((k for k in SCALES if height >= k * high and width >= k * wide), 1)
    upper, rows = cut(data, head, top + height)
    pixels = _decoded(upper, rows, head.width, scale, isinstance(box, RandomCrop))
    if pixels is None:
        return False
    first, begin = (top + scale // 2) // scale, (left + scale // 2) // scale
    last = max(first + min(high, height), (top + height + scale // 2) // scale)
    end = max(begin + min(wide, width), (left + width + scale // 2) // scale)
    _finish(pixels[first:last, begin:end], geometry, out, box)
    return True


_memory = threading.local()  # a picture's memory is used again: fresh pages cost as much as a tenth of the decoding


def _decoded(data: bytes, height: int, width: int, scale: int = 1, roughly: bool = False) -> np.ndarray | None:
    """A JPEG at 1/scale, (ceil(height / scale), ceil(width / scale), 3) RGB, until the next call; None where the decoder objects.

    roughly: halved chroma is repeated.
    """
    shape = -(-height // scale), -(-width // scale), 3
    library = simplejpeg()
    try:
        if library is None:
            with _Jpeg(io.BytesIO(data)) as image:
                image.draft(None, (width // scale, height // scale))
                pixels = np.array(image if image.mode == "RGB" else image.convert("RGB"))
            return pixels if pixels.shape == shape else None
        buffer = None
        if math.prod(shape) <= KEPT_BUFFER:
            buffer = getattr(_memory, "buffer", None)
            if buffer is None:
                buffer = _memory.buffer = np.empty(KEPT_BUFFER, np.uint8)
        # strict would object to the bytes of the rows that were cut off. Pillow, the reference, is no stricter.
        at_least = {"min_height": shape[0], "min_width": shape[1], "min_factor": 2} if scale > 1 else {}
        pixels = library.decode_jpeg(data, "RGB", fastupsample=roughly, buffer=buffer, strict=False, **at_least)
    except (ValueError, RuntimeError, OSError, SyntaxError):  # Pillow's plugins raise SyntaxError for files that are not theirs
        return None
    return pixels if pixels.shape == shape else None
