"""The page of a training, during it and after: result, curves, what the network saw, what it gets wrong, where the time went."""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from triscale.commands.confusion import confusion_plot
from triscale.cost_model import cost, table
from triscale.evaluate import Row, Scores, wilson
from triscale.quantities import short
from triscale.report import svg
from triscale.run_log import Log, StepLine
from triscale.text import printable
from triscale.training_report.folder import Run, read_run
from triscale.training_report.plots import PARTS, curves, has_windows, time_bar

SHOWN = 24  # augmented samples
SHARP = 64  # pixels: pictures up to this side are drawn with their pixels as squares
SLOW = 0.2  # share of the time spent waiting for data from which on the page says so


def training_page(folder: Path) -> dict[str, Any]:
    """What report.html is filled with. Files that are not there yet leave their part out. Raises ReportError."""
    run = read_run(folder)
    parts = [_curves(run), _samples(run), _confusion(run), _mistakes(run), _time(run), _notes(run), _settings(run), _network(run)]
    data = run.card.provenance.get("data") if run.card else None
    name = (run.arch.name if run.arch else None) or "network"
    title = f"{name} on {Path(str(data)).name or data}" if data else f"{name}: training"
    return {"title": printable(title), "lead": _lead(run), "sections": [part for part in parts if part]}


def _lead(run: Run) -> str:
    rate, planned = _rate(run.log), f" of {run.planned}" if run.planned else ""
    speed = f" at {short(rate)} images/s" if rate else ""
    network = "The network"
    if run.arch:
        c = cost(run.arch, max(1, len(run.classes)), _channels(run))
        network = f"{run.arch.name or network} at {run.arch.resolution} px ({short(c.macs)} MACs, {short(c.params)} parameters)"
    if not run.epochs:
        last = run.log.steps[-1]
        return printable(f"Still in its first epoch{planned}, step {last.step:,} of {last.steps:,}, loss {last.loss:.3f}. {network} trains{speed}.")
    trained = f"{network} trained for {run.epochs} epoch{'s' * (run.epochs != 1)}, {duration(run.log.epochs[-1].seconds)}{speed}."
    if run.finished:
        return printable(f"{_accuracy(run)}. {trained}")
    return printable(f"Not finished, {run.epochs}{planned} epochs done. So far {_accuracy(run)}. {trained}")


def _accuracy(run: Run) -> str:
    if run.held_out is not None and len(run.held_out.labels):
        right, n = int((run.held_out.top[:, 0] == run.held_out.labels).sum()), len(run.held_out.labels)
        low, high = wilson(right, n)
        return f"{100 * right / n:.2f} % of {n:,} held-out images right (95 % interval {100 * low:.1f} to {100 * high:.1f})"
    measured = [e.top1 for e in run.log.epochs if e.top1 is not None]
    if measured:
        return f"{100 * measured[-1]:.2f} % of the {run.measured_on} images right"
    return f"training loss {run.log.epochs[-1].loss:.3f}, held-out accuracy not measured"


def duration(seconds: float) -> str:
    """221 -> 3 min 41 s."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _channels(run: Run) -> int:
    if run.card:
        return run.card.preprocess.channels
    return int(run.samples.images.shape[3]) if run.samples else 3


def _per_epoch(run: Run) -> float | None:
    """Steps in an epoch: from a finished one, else from the plan."""
    for epoch in reversed(run.log.epochs):
        if epoch.step and epoch.epoch > 0:
            return epoch.step / epoch.epoch
    if run.log.steps and run.planned:
        return run.log.steps[-1].steps / run.planned
    return None


def _measured(log: Log) -> Sequence[StepLine]:
    """The windows whose times count. The first holds what happens once: compilation, full caches, the loader's start."""
    timed = [s for s in log.steps if s.seconds > 0]
    return timed[1:] if len(timed) > 3 else timed


def _rate(log: Log) -> float | None:
    seconds = sum(s.seconds for s in _measured(log))
    return sum(s.images for s in _measured(log)) / seconds if seconds else None


def _curves(run: Run) -> dict[str, Any]:
    many = len(run.classes) > 20  # of few classes the right one is nearly always among five
    figure = curves(run.log, _per_epoch(run), top5=many, on=run.measured_on)
    texts = []
    if has_windows(run.log) and run.log.epochs:
        texts.append("Training loss: thick, the mean of each epoch; thin, the mean of each window of steps. Its images are augmented.")
    if run.recipe.get("label_smoothing"):
        texts.append(f"With label smoothing {_text(run.recipe['label_smoothing'])} the loss of a perfect network is not 0.")
    return {"title": "How it went", "plot": svg(figure), "texts": texts}


def _samples(run: Run) -> dict[str, Any] | None:
    if run.samples is None or not len(run.samples.images):
        return None
    cards = []
    for image, label in list(zip(run.samples.images, run.samples.labels, strict=True))[:SHOWN]:
        name = run.name(int(label))
        cards.append({**_picture(image), "alt": f"a training image of class {name}", "text": name})
    return {"title": "What the network sees", "texts": ["Training images after augmentation, as the network gets them."], "cards": cards}


def _confusion(run: Run) -> dict[str, Any] | None:
    held = run.held_out
    if held is None or not len(held.labels):
        return None
    count = max(len(run.classes), int(held.labels.max()) + 1, int(held.top.max()) + 1)
    scores = Scores(count)
    for i, (label, top, probability) in enumerate(zip(held.labels.tolist(), held.top.tolist(), held.probability[:, 0].tolist(), strict=True)):
        kept = tuple(c for c in top if c >= 0)
        scores.rows[i] = Row(label, kept, probability if kept else 0.0)
    names = [run.name(c) for c in range(count)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a name in a script that the font lacks
        picture = svg(confusion_plot(scores, names))
    pairs = [f"{names[a]} taken for {names[b]}: {n}" for a, b, n in scores.confused(3) if n > 1]
    texts = [f"Most often {'; '.join(pairs)}."] if pairs else []
    if scores.broken:
        texts.append(f"{scores.broken} images gave outputs that are not finite; they count as wrong and are in no cell.")
    return {"title": "Which classes it confuses", "natural": picture, "texts": texts}


def _mistakes(run: Run) -> dict[str, Any] | None:
    held = run.held_out
    if held is None or not len(held.thumbnails):
        return None
    cards = []
    for image, i in zip(held.thumbnails, held.thumbnail_of.tolist(), strict=True):
        said = f"is {run.name(int(held.labels[i]))},\nsaid {run.name(int(held.top[i, 0]))}, {100 * held.probability[i, 0]:.0f}\N{NO-BREAK SPACE}%"
        cards.append({**_picture(image), "alt": printable(str(held.names[i])), "text": said})
    text = "Held-out images that it is wrong about, the most certain first, with the probability of what it said."
    return {"title": "Its worst mistakes", "cards": cards, "texts": [text]}


def _picture(image: np.ndarray) -> dict[str, Any]:
    """A picture's data for the page. Small ones are kept exactly."""
    pixels = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
    small = max(pixels.size) <= SHARP
    if max(pixels.size) > 2 * SHARP:
        pixels.thumbnail((2 * SHARP, 2 * SHARP), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    if max(image.shape[:2]) <= 2 * SHARP:
        pixels.save(buffer, "PNG")
        kind = "png"
    else:
        pixels.save(buffer, "JPEG", quality=90)
        kind = "jpeg"
    return {"image": f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode(), "small": small}


def _time(run: Run) -> dict[str, Any] | None:
    windows, rate = _measured(run.log), _rate(run.log)
    if rate is None:
        return None
    steps, total = sum(s.window for s in windows), sum(s.seconds for s in windows)
    sums = [sum(getattr(s, field) * s.window for s in windows) for _, field, _, _ in PARTS]
    bar = svg(time_bar([(part / total, part / steps) for part in sums]))
    wait = sums[0] / total
    advice = " It waits for its images: a faster loader would speed it up." if wait > SLOW else ""
    first = " without the first window, which holds the start" if len(windows) < sum(s.seconds > 0 for s in run.log.steps) else ""
    text = f"A step takes {1000 * total / steps:.3g} ms; {100 * wait:.0f} % of it is waiting for data.{advice} Mean over {steps:,} steps{first}."
    return {"title": f"Where the time goes: {short(rate)} images/s", "plot": bar, "texts": [text]}


def _notes(run: Run) -> dict[str, Any] | None:
    per = _per_epoch(run)
    again = [f"Resumed after step {step:,}{f', epoch {step / per:.1f}' if per else ''}." for step in run.log.resumed]
    notes = [printable(text) for text in run.log.notes]
    return {"title": "Notes", "list": notes + again} if notes or again else None


def _settings(run: Run) -> dict[str, Any]:
    facts = {k: v for k, v in (run.card.provenance if run.card else {}).items() if k != "recipe"}
    if run.classes:
        facts["classes"] = len(run.classes)
    if run.held_out is not None:
        facts["held_out images"] = len(run.held_out.labels)
    if run.card:
        facts |= {f"preprocess {k}": v for k, v in run.card.preprocess.to_dict().items() if k != "format"}
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


def _network(run: Run) -> dict[str, Any] | None:
    if run.arch is None:
        return None
    text = table(run.arch, max(1, len(run.classes)), _channels(run))
    return {"title": "The network", "summary": "Table 1: every stage, with its cost", "details": [text]}
