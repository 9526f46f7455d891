"""samples.npz, what the network saw, and held_out.npz, what it says of the held-out images at the end."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from triscale.files import write_whole
from triscale.run_log.lines import LogError
from triscale.text import first_line

SAMPLES, HELD_OUT = "samples.npz", "held_out.npz"
TOP = 5  # classes kept of each held-out image
MISTAKES = 24  # of which pictures are kept
SMALLEST, LARGEST = 64, 96  # pixels: the side of such a picture
ROWS = 4096  # logits turned into probabilities at a time: 50,000 x 1000 in float64 at once would be 400 MB


@dataclass(frozen=True)
class Samples:
    """images (n, S, S, C) uint8 as the network saw them, labels (n,); classes: the names that these index, where known."""

    images: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]


@dataclass(frozen=True)
class HeldOut:
    """What a network says of each held-out image.

    labels (n,); top (n, 5): classes from the best down, -1 where there are no more, or where an output is not finite;
    probability (n, 5) float32, 0 there; names (n,); thumbnails (k, s, s, C) uint8 of the worst mistakes, thumbnail_of (k,).
    """

    labels: np.ndarray
    top: np.ndarray
    probability: np.ndarray
    names: np.ndarray
    thumbnails: np.ndarray
    thumbnail_of: np.ndarray


def write_samples(folder: Path, images: np.ndarray, labels: Any, classes: Sequence[str] = ()) -> None:
    """images (n, S, S, C) uint8, labels (n,). classes: so that the report has names while there is no model file yet.

    Raises ValueError for another shape, OSError.
    """
    labels = np.asarray(labels, dtype=np.int64)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3) or labels.shape != images.shape[:1]:
        raise ValueError(f"samples: expected (n, S, S, 1 or 3) uint8 and n labels, found {images.shape} {images.dtype} and {labels.shape}")
    save_arrays(folder / SAMPLES, {"images": images, "labels": labels, "classes": np.array(list(classes), dtype=np.str_)})


def write_held_out(folder: Path, logits: np.ndarray, labels: Any, names: Sequence[str], images_of: Callable[[list[int]], list[np.ndarray]]) -> None:
    """logits (n, classes) floating point, labels (n,), names (n,) of the files.

    images_of: the pictures (H, W, C) uint8 of these rows; it is asked once, for the worst mistakes: those with the highest
    probability of a wrong class, MISTAKES at most. Raises ValueError for another shape, OSError.
    """
    labels = np.asarray(labels, dtype=np.int64)
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or len(names) != len(logits):
        raise ValueError(f"held-out: expected (n, classes) logits, n labels and n names, found {logits.shape}, {labels.shape} and {len(names)}")
    parts = [_best(logits[i : i + ROWS]) for i in range(0, len(logits), ROWS)]
    top = np.concatenate([np.empty((0, TOP), np.int64), *(p[0] for p in parts)])
    probability = np.concatenate([np.empty((0, TOP), np.float32), *(p[1] for p in parts)])
    worst = worst_mistakes(labels, top, probability)[:MISTAKES]
    pictures = images_of(worst) if worst else []
    body = {"labels": labels, "top": top, "probability": probability, "names": np.array(list(names), dtype=np.str_)}
    save_arrays(folder / HELD_OUT, body | {"thumbnails": _thumbnails(pictures), "thumbnail_of": np.array(worst, dtype=np.int64)})


def worst_mistakes(labels: np.ndarray, top: np.ndarray, probability: np.ndarray) -> list[int]:
    """Rows whose best class is wrong, the most certain first, then in order. A row without a best class is in none."""
    wrong = np.flatnonzero((top[:, 0] != labels) & (top[:, 0] >= 0))
    return [int(i) for i in wrong[np.argsort(-probability[wrong, 0], kind="stable")]]


def read_samples(folder: Path) -> Samples | None:
    """None where there is no samples.npz. Raises LogError."""
    body = load_arrays(folder / SAMPLES, ("images", "labels"))
    if body is not None and (body["images"].ndim != 4 or len(body["labels"]) != len(body["images"])):
        raise LogError(f"{folder / SAMPLES}: expected as many labels as images (n, S, S, C)")
    return None if body is None else Samples(body["images"], body["labels"], tuple(str(c) for c in body.get("classes", ())))


def read_held_out(folder: Path) -> HeldOut | None:
    """None where there is no held_out.npz, as while a training runs. Raises LogError."""
    names = ("labels", "top", "probability", "names", "thumbnails", "thumbnail_of")
    body = load_arrays(folder / HELD_OUT, names)
    if body is None:
        return None
    found = HeldOut(*(body[name] for name in names))
    n = len(found.labels)
    whole = found.top.shape == found.probability.shape == (n, TOP) and len(found.names) == n and len(found.thumbnails) == len(found.thumbnail_of)
    if not whole or not all(0 <= i < n for i in found.thumbnail_of.tolist()):
        raise LogError(f"{folder / HELD_OUT}: its arrays don't go together")
    return found


def _best(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The TOP best classes of each row and their softmax, from the top; equal ones by their number."""
    exact = logits.astype(np.float64)
    finite = np.isfinite(exact).all(1)
    exact[~finite] = 0
    kept = min(TOP, logits.shape[1])
    order = np.argsort(-exact, axis=1, kind="stable")[:, :kept]
    exact = np.exp(exact - exact.max(1, keepdims=True))
    exact /= exact.sum(1, keepdims=True)
    top = np.full((len(logits), TOP), -1, dtype=np.int64)
    probability = np.zeros((len(logits), TOP), dtype=np.float32)
    top[:, :kept], probability[:, :kept] = order, np.take_along_axis(exact, order, 1)
    top[~finite], probability[~finite] = -1, 0
    return top, probability


def _thumbnails(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """All at one side and number of channels, whole, on white where they are not square. Small ones grow in whole pixels."""
    if not pictures:
        return np.empty((0, SMALLEST, SMALLEST, 3), np.uint8)
    channels = max(p.shape[2] for p in pictures)
    longest = max(max(p.shape[:2]) for p in pictures)
    side = longest * (LARGEST // longest)  # no multiple of 49 to 63 pixels, or of more than LARGEST, lies between the two
    side = side if side >= SMALLEST else LARGEST
    out = []
    for picture in pictures:
        image = Image.fromarray(picture[:, :, 0] if picture.shape[2] == 1 else picture).convert("L" if channels == 1 else "RGB")
        how = Image.Resampling.NEAREST if side % longest == 0 else Image.Resampling.BICUBIC
        out.append(np.asarray(ImageOps.pad(image, (side, side), how, color="white")).reshape(side, side, channels))
    return np.stack(out)


def save_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:  # given a name, numpy would add .npz to it
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]

    write_whole(path, write)


def load_arrays(path: Path, wanted: Sequence[str]) -> dict[str, np.ndarray] | None:
    """All arrays of the file, `wanted` among them; None where there is no such file."""
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            body = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise LogError(f"{path}: can't be read ({first_line(error)})"[:300]) from None
    missing = [name for name in wanted if name not in body]
    if missing:
        raise LogError(f"{path}: expected the arrays {', '.join(wanted)}; missing: {', '.join(missing)}")
    return body
