"""What the pages of both kinds of search share: progress, the table of trials, why some gave nothing, settings, curves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from triscale.report import svg
from triscale.search.record import Record, Trial
from triscale.search_report.facts import amount, metric, number, phrase, ranked
from triscale.search_report.network_plots import CURVES, curves
from triscale.text import printable
from triscale.training_report.page import duration

BEST, NEWEST = 50, 20  # rows of a long table
LONG = 160  # characters of a reason
ORDER = ("complete", "running", "waiting", "pruned", "failed", "lost")


def cell(text: str, style: str = "") -> dict[str, str]:
    return {"text": printable(text), "style": style}


def row(texts: Sequence[str | dict[str, str]], style: str = "") -> dict[str, Any]:
    return {"cells": [cell(t) if isinstance(t, str) else t for t in texts], "style": style}


def table(header: Sequence[str], rows: Sequence[dict[str, Any]], style: str = "", left: Sequence[str] = ()) -> dict[str, Any]:
    return {"header": header, "rows": rows, "style": style, "left": left}


def drawn(figure: Any | None, alt: str) -> dict[str, str]:
    """A section's plot; nothing where there is none."""
    return {"plot": svg(figure), "alt": alt} if figure is not None else {}


def progress(record: Record) -> str:
    """How far the search is: 24 of 24 trials, 20 complete ..., how long it took."""
    counts = Counter[str](t.state for t in record.trials)
    finished = sum(counts[s] for s in ("complete", "pruned", "failed"))
    of = f" of {record.wanted:,}" if record.wanted else ""
    parts = ", ".join(f"{counts[s]:,} {s}" for s in ORDER if counts[s])
    text = f"{finished:,}{of} trials done" + (f": {parts}." if parts else ".")
    ended = [t.ended for t in record.trials if t.ended > 0]
    began = [t.began for t in record.trials if t.began > 0]
    if not ended or not began or max(ended) <= min(began):
        return text
    span = max(ended) - min(began)
    return f"{text} {duration(span)} from the first start to the last end, {number_of(3600 * len(ended) / span)} trials an hour."


def number_of(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.1f}"


def selected(record: Record, first: Sequence[Trial]) -> tuple[list[Trial], int]:
    """The trials of a table, `first` (ranked) before the rest by state, and how many are left out: of many the best and the newest stay."""
    placed = {t.number for t in first}
    rest = sorted((t for t in record.trials if t.number not in placed), key=lambda t: (ORDER.index(t.state), t.number))
    every = [*first, *rest]
    if len(every) <= BEST + NEWEST:
        return every, 0
    kept = {t.number for t in first[:BEST]} | {t.number for t in sorted(record.trials, key=lambda t: -t.number)[:NEWEST]}
    shown = [t for t in every if t.number in kept]
    return shown, len(every) - len(shown)


def left_out(count: int) -> list[str]:
    return [f"Shown are the best {BEST} and the newest {NEWEST}; {count:,} more trials are in the record."] if count else []


def reason(trial: Trial) -> str:
    text = " ".join(trial.why.split())
    return text if len(text) <= LONG else f"{text[: LONG - 1]}…"


def took(trial: Trial) -> str:
    return "cached" if trial.cached else f"{trial.seconds:.1f}" if trial.seconds else "–"


def trials(record: Record) -> dict[str, Any]:
    """The table of a network search, best first."""
    first, kind = ranked(record), metric(record)
    shown, hidden = selected(record, first)
    ranks = {t.number: i for i, t in enumerate(first, 1)}
    extra = [kind] if kind not in ("macs", "params") else []
    rows = []
    for t in shown:
        costs = [amount(k, t.cost.get(k)) for k in (*extra, "macs", "params")]
        texts: list[str | dict[str, str]] = [
            f"{ranks.get(t.number, '–')}",
            f"{t.number}",
            number(t.score),
            number(t.value),
            *costs,
            took(t),
            cell(t.state, "left"),
            cell(reason(t), "text"),
        ]
        rows.append(row(texts, "best" if ranks.get(t.number) == 1 else "" if t.number in ranks else "faint"))
    header = ("rank", "trial", "score", "value", *extra, "MACs", "parameters", "seconds", "state", "why")
    content = {"tables": [table(header, rows, "small", ("state", "why"))]} if rows else {"intro": ["There is no trial yet."]}
    return {"title": "The trials", **content, "texts": left_out(hidden)}


def why_none(record: Record) -> str:
    """What to say after "nothing was scored" where trials failed."""
    counts = Counter(reason(t) or "no reason given" for t in record.trials if t.state == "failed")
    if not counts:
        return ""
    why, times = counts.most_common(1)[0]
    return printable(f": {counts.total():,} of {len(record.trials):,} trials failed, {times:,} of them with “{why}”")


def reasons(record: Record) -> dict[str, Any] | None:
    """Why trials failed, were lost or stopped, the most frequent reason first."""
    counts = Counter((t.state, reason(t) or "no reason given") for t in record.trials if t.state in ("failed", "lost"))
    if not counts:
        return None
    rows = [row([f"{n:,}", cell(state, "left"), cell(why, "text")]) for (state, why), n in counts.most_common(10)]
    more = len(counts) - len(rows)
    texts = [f"{more:,} rarer reasons aren't shown."] if more else []
    return {"title": "What went wrong", "tables": [table(("trials", "state", "why"), rows, "small", ("state", "why"))], "texts": texts}


def learning_curves(record: Record) -> dict[str, Any] | None:
    figure = curves(record)
    if figure is None:
        return None
    pruned = sum(t.state == "pruned" and bool(t.reported) for t in record.trials)
    texts = [f"Of {pruned:,} pruned trials {CURVES} are drawn, evenly spread over the search."] if pruned > CURVES else []
    alt = "score against epoch for the best, the median and the pruned trials"
    return {"title": "Learning curves of the proxy training", **drawn(figure, alt), "texts": texts}


def settings(record: Record) -> dict[str, Any]:
    """Everything that was asked for, in two columns."""
    rows = [
        ("kind of search", record.kind),
        ("reference", record.reference.name or "unnamed"),
        ("reference's input", f"{record.reference.resolution} px"),
    ]
    if record.wanted:
        rows.append(("trials wanted", f"{record.wanted:,}"))
    if record.target:
        rows += [("target", phrase(*record.target)), ("w at or below the target", f"{record.exponents[0]:g}")]
        rows.append(("w above the target", f"{record.exponents[1]:g}"))
    rows += list(record.settings.items())
    safe = [(printable(str(k)), printable(str(v))) for k, v in rows]
    half = -(-len(safe) // 2)
    return {"title": "Settings", "side": [safe[:half], safe[half:]]}
