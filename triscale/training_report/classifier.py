"""A classifier's page: accuracy, curves, what the network saw, what it confuses, its worst mistakes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from triscale.commands.confusion import confusion_plot
from triscale.cost_model import cost, table
from triscale.evaluate import Row, Scores, wilson
from triscale.quantities import short
from triscale.text import printable
from triscale.training_report.folder import ClassifierRun, read_run
from triscale.training_report.page import curves_part, lead, notes_part, settings_part, small_picture, time_part, title, with_names
from triscale.training_report.plots import Line, Panel

SHOWN = 24  # augmented samples
MANY = 20  # classes; of fewer the right one is nearly always among five


def classifier_page(folder: Path) -> dict[str, Any]:
    """What report.html is filled with. Raises ReportError."""
    run = read_run(folder)
    parts = [
        curves_part(run, _measured(run)),
        _samples(run),
        _confusion(run),
        _mistakes(run),
        time_part(run),
        notes_part(run),
        settings_part(run, _facts(run)),
        _network(run),
    ]
    name = (run.arch.name if run.arch else None) or "network"
    data = run.card.provenance.get("data") if run.card else None
    return {"title": title(name, data), "lead": lead(run, _cost(run), _accuracy(run)), "sections": [part for part in parts if part]}


def _cost(run: ClassifierRun) -> str:
    if run.arch is None:
        return "The network"
    c = cost(run.arch, max(1, len(run.classes)), _channels(run))
    return f"{run.arch.name or 'The network'} at {run.arch.resolution} px ({short(c.macs)} MACs, {short(c.params)} parameters)"


def _accuracy(run: ClassifierRun) -> str:
    if run.held_out is not None and len(run.held_out.labels):
        right, n = int((run.held_out.top[:, 0] == run.held_out.labels).sum()), len(run.held_out.labels)
        low, high = wilson(right, n)
        return f"{100 * right / n:.2f} % of {n:,} held-out images right (95 % interval {100 * low:.1f} to {100 * high:.1f})"
    measured = [e.top1 for e in run.log.epochs if e.top1 is not None]
    if measured:
        return f"{100 * measured[-1]:.2f} % of the {run.measured_on} images right"
    if run.log.epochs:
        return f"training loss {run.log.epochs[-1].loss:.3f}, held-out accuracy not measured"
    return "held-out accuracy not measured"


def _channels(run: ClassifierRun) -> int:
    if run.card:
        return run.card.preprocess.channels
    return int(run.samples.images.shape[3]) if run.samples else 3


def _measured(run: ClassifierRun) -> Panel | None:
    first = [(e.epoch, 100 * e.top1) for e in run.log.epochs if e.top1 is not None]
    five = [(e.epoch, 100 * e.top5) for e in run.log.epochs if e.top5 is not None]
    if not first:
        return None
    both = len(run.classes) > MANY and bool(five)
    lines = [Line(f"{'top-1 ' * both}{first[-1][1]:.2f}", first)] + [Line(f"top-5 {y:.2f}", five) for _, y in five[-1:] if both]
    return Panel(f"{run.measured_on} accuracy, %", lines)


def _samples(run: ClassifierRun) -> dict[str, Any] | None:
    if run.samples is None or not len(run.samples.images):
        return None
    cards = []
    for image, label in list(zip(run.samples.images, run.samples.labels, strict=True))[:SHOWN]:
        name = run.name(int(label))
        cards.append({**small_picture(image), "alt": f"a training image of class {name}", "text": name})
    return {"title": "What the network sees", "texts": ["Training images after augmentation, as the network gets them."], "cards": cards}


def _confusion(run: ClassifierRun) -> dict[str, Any] | None:
    held = run.held_out
    if held is None or not len(held.labels):
        return None
    count = max(len(run.classes), int(held.labels.max()) + 1, int(held.top.max()) + 1)
    scores = Scores(count)
    for i, (label, top, probability) in enumerate(zip(held.labels.tolist(), held.top.tolist(), held.probability[:, 0].tolist(), strict=True)):
        kept = tuple(c for c in top if c >= 0)
        scores.rows[i] = Row(label, kept, probability if kept else 0.0)
    names = [run.name(c) for c in range(count)]
    pairs = [f"{names[a]} taken for {names[b]}: {n}" for a, b, n in scores.confused(3) if n > 1]
    texts = [f"Most often {'; '.join(pairs)}."] if pairs else []
    if scores.broken:
        texts.append(f"{scores.broken} images gave outputs that are not finite; they count as wrong and are in no cell.")
    return {"title": "Which classes it confuses", "natural": with_names(confusion_plot(scores, names)), "texts": texts}


def _mistakes(run: ClassifierRun) -> dict[str, Any] | None:
    held = run.held_out
    if held is None or not len(held.thumbnails):
        return None
    cards = []
    for image, i in zip(held.thumbnails, held.thumbnail_of.tolist(), strict=True):
        said = f"is {run.name(int(held.labels[i]))},\nsaid {run.name(int(held.top[i, 0]))}, {100 * held.probability[i, 0]:.0f}\N{NO-BREAK SPACE}%"
        cards.append({**small_picture(image), "alt": printable(str(held.names[i])), "text": said})
    text = "Held-out images that it is wrong about, the most certain first, with the probability of what it said."
    return {"title": "Its worst mistakes", "cards": cards, "texts": [text]}


def _facts(run: ClassifierRun) -> dict[str, Any]:
    facts = {k: v for k, v in (run.card.provenance if run.card else {}).items() if k != "recipe"}
    if run.classes:
        facts["classes"] = len(run.classes)
    if run.held_out is not None:
        facts["held_out images"] = len(run.held_out.labels)
    if run.card:
        facts |= {f"preprocess {k}": v for k, v in run.card.preprocess.to_dict().items() if k != "format"}
    return facts


def _network(run: ClassifierRun) -> dict[str, Any] | None:
    if run.arch is None:
        return None
    text = table(run.arch, max(1, len(run.classes)), _channels(run))
    return {"title": "The network", "summary": "Table 1: every stage, with its cost", "details": [text]}
