"""What the pages of all trainings have: the first sentences, where the time went, notes, settings, pictures."""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from triscale.quantities import short
from triscale.report import svg
from triscale.run_log import Log, StepLine
from triscale.text import printable
from triscale.training_report.folder import Run
from triscale.training_report.plots import PARTS, Panel, brief, curves, has_windows, time_bar

SHARP = 64  # pixels: pictures up to this side are drawn with their pixels as squares
PNG = b"\x89PNG"
SLOW = 0.2  # share of the time spent waiting for data from which on the page says so


def title(name: str, data: Any) -> str:
    """data: what the run calls its data, None where it isn't known."""
    return printable(f"{name} on {Path(str(data)).name or data}" if data else f"{name}: training")


def lead(run: Run, network: str, result: str) -> str:
    """The first sentences. network: what is trained, with its size and cost; result: how good it is, as far as it is known."""
    speed, planned = rate(run.log), f" of {run.planned}" if run.planned else ""
    at = f" at {short(speed)} images/s" if speed else ""
    if not run.epochs:
        last = run.log.steps[-1]
        return printable(f"Still in its first epoch{planned}, step {last.step:,} of {last.steps:,}, loss {last.loss:.3f}. {network} trains{at}.")
    trained = f"{network} trained for {run.epochs} epoch{'s' * (run.epochs != 1)}, {duration(run.log.epochs[-1].seconds)}{at}."
    if run.finished:
        return printable(f"{result}. {trained}")
    return printable(f"Not finished, {run.epochs}{planned} epochs done. So far {result}. {trained}")


def duration(seconds: float) -> str:
    """221 -> 3 min 41 s."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def per_epoch(run: Run) -> float | None:
    """Steps in an epoch: from a finished one, else from the plan."""
    for epoch in reversed(run.log.epochs):
        if epoch.step and epoch.epoch > 0:
            return epoch.step / epoch.epoch
    if run.log.steps and run.planned:
        return run.log.steps[-1].steps / run.planned
    return None


def rate(log: Log) -> float | None:
    """Images a second in training, where it was measured."""
    seconds = sum(s.seconds for s in _measured(log))
    return sum(s.images for s in _measured(log)) / seconds if seconds else None


def _measured(log: Log) -> Sequence[StepLine]:
    """The windows whose times count. The first holds what happens once: compilation, full caches, the loader's start."""
    timed = [s for s in log.steps if s.seconds > 0]
    return timed[1:] if len(timed) > 3 else timed


def curves_part(run: Run, measured: Panel | None) -> dict[str, Any]:
    """measured: what was measured after the epochs, None where nothing was."""
    texts = []
    if has_windows(run.log) and run.log.epochs:
        texts.append("Training loss: thick, the mean of each epoch; thin, the mean of each window of steps. Its images are augmented.")
    if run.recipe.get("label_smoothing"):
        texts.append(f"With label smoothing {_text(run.recipe['label_smoothing'])} the loss of a perfect network is not 0.")
    return {"title": "How it went", "plot": svg(curves(run.log, per_epoch(run), measured)), "texts": texts}


def time_part(run: Run) -> dict[str, Any] | None:
    windows, speed = _measured(run.log), rate(run.log)
    if speed is None:
        return None
    steps, total = sum(s.window for s in windows), sum(s.seconds for s in windows)
    sums = [sum(getattr(s, field) * s.window for s in windows) for _, field, _, _ in PARTS]
    bar = svg(time_bar([(part / total, part / steps) for part in sums]))
    wait = sums[0] / total
    advice = " It waits for its images: a faster loader would speed it up." if wait > SLOW else ""
    first = " without the first window, which holds the start" if len(windows) < sum(s.seconds > 0 for s in run.log.steps) else ""
    text = f"A step takes {brief(total / steps)}; {100 * wait:.0f} % of it is waiting for data.{advice} Mean over {steps:,} steps{first}."
    return {"title": f"Where the time goes: {short(speed)} images/s", "plot": bar, "texts": [text]}


def notes_part(run: Run) -> dict[str, Any] | None:
    per = per_epoch(run)
    again = [f"Resumed after step {step:,}{f', epoch {step / per:.1f}' if per else ''}." for step in run.log.resumed]
    notes = [printable(text) for text in run.log.notes]
    return {"title": "Notes", "list": notes + again} if notes or again else None


def settings_part(run: Run, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe, and facts about what was trained on what."""
    recipe = {k: v for k, v in run.recipe.items() if k != "format"}
    return {"title": "Recipe, and what it was run on", "side": [_rows(recipe), _rows(facts)]}


def _rows(data: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Names and values as text; what lies inside another has both names."""
    rows = []
    for key, value in data.items():
        name = f"{prefix}{printable(str(key))}"
        if isinstance(value, Mapping):
            rows += _rows(value, f"{name}.")
        else:
            rows.append((name.replace("_", " "), _text(value)))
    return rows


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(_text(v) for v in value)
    return printable(str(value))


def with_names(figure: Any) -> str:
    """A figure that has names of classes in it, as SVG: one in a script that the font lacks is no reason for a warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        return svg(figure)


def small_picture(image: np.ndarray) -> dict[str, Any]:
    """A card's picture (H, W, 1 or 3) uint8, at most 2 SHARP pixels a side. Small ones are kept exactly."""
    pixels = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
    small = max(pixels.size) <= SHARP
    exact = max(pixels.size) <= 2 * SHARP
    pixels.thumbnail((2 * SHARP, 2 * SHARP), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    if exact:
        pixels.save(buffer, "PNG")
    else:
        pixels.save(buffer, "JPEG", quality=90)
    return {"image": address(buffer.getvalue()), "small": small}


def address(file: bytes) -> str:
    """A PNG's or a JPEG's bytes as the address of a picture."""
    return f"data:image/{'png' if file.startswith(PNG) else 'jpeg'};base64," + base64.b64encode(file).decode()
