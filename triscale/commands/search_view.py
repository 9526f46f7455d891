"""A search as it goes on: a live table on a terminal, a line a trial elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from triscale.quantities import short
from triscale.search.events import Began, Ended, Event, Reported, Told
from triscale.search.record import Trial
from triscale.search.study import Search

SHOWN = 5  # of the best, in the live table
REPORT_EVERY = 60.0  # seconds between reports that are written as the search goes on


def follow(search: Search, again: str, report: Callable[[], object]) -> None:
    """Carries the search out and shows it. again: what an interrupted user is told. report: writes the page as it stands."""
    console = Console(stderr=True)
    view = _View(search)
    next_report = time.monotonic() + REPORT_EVERY
    events = search.events()
    try:
        with Live(view, console=console, refresh_per_second=2, transient=True) if console.is_terminal else _Lines() as live:
            for event in events:
                view.heed(event)
                line = view.line(event)
                if line and isinstance(live, Live):
                    live.console.print(line, highlight=False, markup=False)
                elif line:
                    console.print(line, highlight=False, markup=False, soft_wrap=True)
                if isinstance(event, Ended) and time.monotonic() > next_report:
                    next_report = _report(report, console)
    except KeyboardInterrupt:
        events.close()  # type: ignore[attr-defined]
        raise KeyboardInterrupt(f"{view.done} of {search.wanted} trials are done; {again}") from None


def _report(report: Callable[[], object], console: Console) -> float:
    """Writes the page as it stands; returns when to do so next: a twentieth of the time at most goes into that."""
    began = time.monotonic()
    try:
        report()
    except OSError as error:
        console.print(f"the report can't be written now: {error}", highlight=False, markup=False)
    return time.monotonic() + max(REPORT_EVERY, 20 * (time.monotonic() - began))


class _Lines:
    """In place of a live table."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, *error: object) -> None:
        return None


class _View:
    """What has happened so far, by all workers."""

    def __init__(self, search: Search) -> None:
        self.search, self.wanted, self.here = search, search.wanted, 0
        self.done, self.best = search.standing(SHOWN)
        self.open: dict[int, tuple[Trial, float | None, int]] = {}
        self.began = time.monotonic()

    def heed(self, event: Event) -> None:
        if isinstance(event, Began):
            self.open[event.trial.number] = event.trial, None, 0
        elif isinstance(event, Reported) and event.number in self.open:
            self.open[event.number] = self.open[event.number][0], event.score, event.step
        elif isinstance(event, Told) and event.number is not None:
            self.open.pop(event.number, None)
        elif isinstance(event, Ended):
            self.open.pop(event.trial.number, None)
            self.here += not event.trial.cached
            self.done, self.best = self.search.standing(SHOWN)

    def line(self, event: Event) -> str:
        """What is printed for good."""
        if isinstance(event, Told):
            return event.text
        if not isinstance(event, Ended):
            return ""
        t = event.trial
        place = f"{self.done} of {self.wanted}"
        if t.state == "failed":
            return f"trial {t.number} ({place}): failed: {t.why}"
        score = f"{t.reported[-1]:.4f}" if t.reported else "none"
        more = f", {t.why}" if t.state == "pruned" else f", value {t.value:.4f}" if t.value is not None and t.value != t.score else ""
        how = "known" if t.cached else f"{t.seconds:.0f} s"
        first = "  best so far" if [b.number for b in self.best[:1]] == [t.number] else ""
        return f"trial {t.number} ({place}): {t.state}, score {score}{more}, {_cost(t)}, {how}{first}"

    def pace(self) -> str:
        hours = (time.monotonic() - self.began) / 3600
        if not self.here:
            return "no trial has ended yet"
        rate = self.here / hours
        left = max(0, self.wanted - self.done) / rate * 3600
        return f"{rate:.0f} trials an hour here, about {_span(left)} left"

    def __rich__(self) -> Group:
        table = Table(title=f"{self.done} of {self.wanted} trials; {self.pace()}", title_justify="left", title_style="bold")
        for name in ("", "trial", "score", "value", "cost", "epoch", "choices"):
            table.add_column(name, justify="left" if name in ("", "choices") else "right", no_wrap=True, overflow="ellipsis")
        for i, t in enumerate(self.best):
            value = "" if t.value is None else f"{t.value:.4f}"
            table.add_row("best" if not i else f"{i + 1}.", f"{t.number}", f"{t.score:.4f}", value, _cost(t), f"{len(t.reported)}", _choices(t))
        for t, score, step in list(self.open.values()):
            table.add_row("at work", f"{t.number}", "" if score is None else f"{score:.4f}", "", _cost(t), f"{step}" if step else "", _choices(t))
        return Group(table, Text("Ctrl-C stops; the study can be gone on with"))


def _cost(t: Trial) -> str:
    parts = [f"{short(t.cost['macs'])} MACs"] if "macs" in t.cost else []
    if "latency" in t.cost:
        parts.append(f"{1e3 * t.cost['latency']:.2f} ms")
    if "memory" in t.cost:
        parts.append(f"{short(t.cost['memory'])}B")
    return ", ".join(parts)


def _choices(t: Trial) -> str:
    """The triple, or of a network its operators in order."""
    if "alpha" in t.choices:
        return ", ".join(f"{k} {v}" for k, v in t.choices.items())
    return " ".join(v for k, v in t.choices.items() if k.endswith(" op"))


def _span(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
