"""From JPEG bytes to squares of 8-bit pixels on a GPU: nvJPEG decodes a batch, torch crops and resizes. Speed on a GPU: not run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from triscale.data.decode import MAX_PIXELS, BadImage
from triscale.data.jpeg import Box, geometry_of, needs_reference, read_square
from triscale.data.jpeg_header import header
from triscale.recipe import Preprocess


class Squares(NamedTuple):
    """images: (B, 3, S, S) uint8, channels-last, on the device; zeros where an image is bad. bad: why, by its place in the batch.

    on_cpu: the places that the GPU's decoder can't do, or was not asked to, which the CPU did.
    """

    images: Tensor
    on_cpu: tuple[int, ...]
    bad: dict[int, BadImage]


def decode_on_gpu(
    datas: Sequence[bytes],
    boxes: Sequence[Box],
    size: int,
    device: torch.device | str,
    *,
    names: Sequence[str] = (),
    max_pixels: int = MAX_PIXELS,
) -> Squares:
    """The crop and resize of each image file of a batch. boxes: as for `read_square`, of `size` and 3 channels.

    Plain JPEGs are decoded whole on the device, one batched call (torchvision.io.decode_jpeg, nvJPEG), then cropped and resized by
    torch's antialiased bicubic or bilinear in float32, rounded: within 2 grey levels of Pillow's filters on equal pixels; nvJPEG's
    pixels differ from libjpeg's by its own chroma upsampling. The rest takes `read_square` on the CPU. A device without nvJPEG
    (the CPU) decodes by torchvision's libjpeg. Bad images are reported, not raised.
    """
    labels = list(names) or [f"#{i}" for i in range(len(datas))]
    images = torch.zeros(len(datas), size, size, 3, dtype=torch.uint8, device=device).permute(0, 3, 1, 2)
    on_cpu: list[int] = []
    bad: dict[int, BadImage] = {}
    pixels = _decoded(datas, [i for i, (data, box) in enumerate(zip(datas, boxes, strict=True)) if _fits(data, box, max_pixels)], device)
    for i, (data, box) in enumerate(zip(datas, boxes, strict=True)):
        if i in pixels:
            images[i] = _square(pixels.pop(i), box, size)
            continue
        on_cpu.append(i)
        out = np.empty((size, size, 3), np.uint8)
        try:
            read_square(data, out, box, name=labels[i], max_pixels=max_pixels)
        except BadImage as error:
            bad[i] = error
        else:
            images[i] = torch.from_numpy(out).to(device).permute(2, 0, 1)
    return Squares(images, tuple(on_cpu), bad)


def _fits(data: bytes, box: Box, max_pixels: int) -> bool:
    head = header(data)
    if head is None or not head.plain or head.height * head.width > max_pixels:
        return False
    return not needs_reference(box, geometry_of((head.height, head.width), box, 1))


def _decoded(datas: Sequence[bytes], places: list[int], device: torch.device | str) -> dict[int, Tensor]:
    """Pixels (3, H, W) uint8 on the device, by place; those that its decoder refuses are left out."""
    from torchvision.io import ImageReadMode, decode_jpeg  # 2 s to import

    def run(some: list[int]) -> list[Any]:
        encoded = [torch.frombuffer(bytearray(datas[i]), dtype=torch.uint8) for i in some]
        return decode_jpeg(encoded, mode=ImageReadMode.RGB, device=str(device)) if some else []

    try:
        return dict(zip(places, run(places), strict=True))
    except RuntimeError:  # one image fails the batch
        found = {}
        for i in places:
            try:
                found[i] = run([i])[0]
            except RuntimeError:
                continue
        return found


def _square(pixels: Tensor, box: Box, size: int) -> Tensor:
    """(3, H, W) uint8 -> (3, size, size) uint8."""
    (top, left, height, width), resized, (row, column, tall, broad) = geometry_of(pixels.shape[1:], box, size)
    mode = box.interpolation if isinstance(box, Preprocess) else "bicubic"
    part = pixels[None, :, top : top + height, left : left + width].float()
    part = F.interpolate(part, resized, mode=mode, antialias=True)[0, :, row : row + tall, column : column + broad]
    return part.round_().clamp_(0, 255).to(torch.uint8)
