"""A run watched from the command line: a bar, a line an epoch, and an end on request."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from triscale.commands.bars import bars
from triscale.commands.run_folder import undo

# Of the processes that torchrun has started, if it has; the first one speaks.
PROCESSES, FIRST = int(os.environ.get("WORLD_SIZE", "1")), os.environ.get("RANK", "0") == "0"


def named_recipe(args: Sequence[str]) -> str | None:
    """The last --recipe among the arguments: its settings are the defaults of the other options, so it is looked for first."""
    name = None
    for word, following in zip(args, [*args[1:], ""], strict=True):
        if word == "--recipe":
            name = following
        elif word.startswith("--recipe="):
            name = word.split("=", 1)[1]
    return name


def available_cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class StopSignal:
    """Whether SIGINT or SIGTERM has come: the step then ends, the state is saved. A second one stops at once."""

    def __init__(self) -> None:
        self.asked = False
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), self._ask)

    def _ask(self, number: int, frame: object) -> None:
        if self.asked:
            raise KeyboardInterrupt("at once; the last checkpoint that was whole is what is left")
        self.asked = True

    def __call__(self) -> bool:
        return self.asked


def follow(events: Iterator[Any], out: Path, epochs: int, batch_size: int, line: Callable[[Any], str | None]) -> None:
    """Carries a run's events out, with a bar of its steps. line: of the events that only this kind of run has, what is printed.

    Where the run stops before its first whole epoch and has saved nothing, its folder goes, if it made it. Raises
    KeyboardInterrupt, with how to go on, where it was asked to stop.
    """
    from triscale.train.events import Resumed, Saved, Stopped
    from triscale.train.loop import Note, Step

    saved, made = 0, not out.exists()
    with bars() as bar:
        task = bar.add_task("epoch 1", total=None, unit="images", per=batch_size, visible=FIRST)
        try:
            waited = taken = 0.0
            for event in events:
                text = None
                if isinstance(event, Step):
                    taken = 0.98 * taken + event.data + event.forward + event.backward + event.optimizer
                    waited = 0.98 * waited + event.data
                    description = f"epoch {event.epoch + 1} of {epochs}, loss {event.loss:.3f}, waiting for data {waited / taken:.0%}"
                    bar.update(task, completed=event.step, total=event.steps, description=description)
                elif isinstance(event, Saved):
                    saved = event.epoch
                elif isinstance(event, Resumed):
                    saved, text = event.epoch - 1, f"going on from step {event.step}, in epoch {event.epoch}"
                    if event.epoch > epochs:
                        text = f"trained already, {event.step} steps; judged once more"
                elif isinstance(event, Note):
                    text = event.text
                else:
                    text = line(event)
                if text is not None:
                    bar.console.print(text, highlight=False)
        except Stopped as stop:
            raise KeyboardInterrupt(f"after step {stop.step}; the same command with --out {out} --resume goes on") from None
        except (Exception, KeyboardInterrupt):
            if FIRST and made and not saved:
                undo(out)
            raise
