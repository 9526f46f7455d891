"""log.jsonl, what a training writes into its run folder while it runs, and how it is read back.

One JSON object a line, told apart by "kind":

    step     means over a window of `window` steps that ends with `step`; images: those of the whole window; lr: the last one
    epoch    an epoch counted from 1, its mean training loss, the held-out accuracy where it was measured
    saved    a file that stands whole;  resumed: training went on after this step;  note: anything a reader should know

Lines without "kind" are epochs of older versions. The log is append-only: what was done after the state that a run resumed
from is done again, so `read_log` drops the lines of steps beyond the resumed one.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

LOG = "log.jsonl"
TIMES = ("data_s", "forward_s", "backward_s", "optimiser_s")


class LogError(ValueError):
    """A log that can't be read. The message names the file."""


@dataclass(frozen=True)
class StepLine:
    """One step, or the means over `window` steps up to and with `step`. epoch: from 0; the times: seconds a step."""

    epoch: int
    step: int
    steps: int
    loss: float
    lr: float
    images: float
    data_s: float = 0.0
    forward_s: float = 0.0
    backward_s: float = 0.0
    optimiser_s: float = 0.0
    window: int = 1

    @property
    def seconds(self) -> float:
        """Of the whole window; 0 where the times were not measured."""
        return self.window * sum(getattr(self, name) for name in TIMES)


@dataclass(frozen=True)
class EpochLine:
    """One finished epoch, counted from 1. seconds: since the training's start. step: None in logs of older versions. ap, ap50: of a
    detector's boxes."""

    epoch: int
    loss: float
    seconds: float
    step: int | None = None
    top1: float | None = None
    top5: float | None = None
    lr: float | None = None
    mean_per_class: float | None = None
    ap: float | None = None
    ap50: float | None = None


@dataclass(frozen=True)
class Log:
    """A log as it stands, in the order of the steps, without what a resumed run did again. saved: (step, file name)."""

    steps: tuple[StepLine, ...] = ()
    epochs: tuple[EpochLine, ...] = ()
    saved: tuple[tuple[int, str], ...] = ()
    resumed: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()


def read_log(folder: Path) -> Log:
    """The log of a run folder, also while it is being written: a last line that is not whole is left out. Raises LogError."""
    path = folder / LOG
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise LogError(f"{path}: {error.strerror or error}") from None
    steps: dict[int, StepLine] = {}
    epochs: dict[int, EpochLine] = {}
    saved: list[tuple[int, str]] = []
    resumed: list[int] = []
    notes: dict[str, None] = {}  # a resumed run says the same again
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            body = json.loads(line)
            kind = body.get("kind", "epoch")
            if kind == "step":
                steps[body["step"]] = _line(StepLine, body)
            elif kind == "epoch":
                epochs[body["epoch"]] = _line(EpochLine, body)
            elif kind == "saved":
                saved.append((int(body["step"]), str(body["path"])))
            elif kind == "note":
                notes[str(body["text"])] = None
            elif kind == "resumed":
                step = int(body["step"])
                steps = {k: v for k, v in steps.items() if k <= step}
                epochs = {k: v for k, v in epochs.items() if v.step is None or v.step <= step}
                saved = [s for s in saved if s[0] <= step]
                resumed.append(step)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            if number == len(lines):  # without its end of line: cut by a kill, or not yet written
                break
            raise LogError(f"{path}: line {number} is no line of a training's log ({type(error).__name__}: {error})"[:300]) from None
    ordered = tuple(steps[k] for k in sorted(steps)), tuple(epochs[k] for k in sorted(epochs))
    return Log(*ordered, tuple(dict.fromkeys(saved)), tuple(resumed), tuple(notes))


def _line(kind: Any, body: dict[str, Any]) -> Any:
    """A StepLine or EpochLine of what `body` has; a null in the place of a number is NaN. Keys of later versions are passed over."""
    values = {}
    for f in fields(kind):
        if f.name not in body:
            continue
        value, declared = body[f.name], str(f.type)  # "int", "float", "int | None" or "float | None"
        if value is None and declared == "float":
            value = math.nan
        missing = value is None and declared.endswith("None")
        if not missing and (isinstance(value, bool) or not isinstance(value, int if declared.startswith("int") else (int, float))):
            raise ValueError(f"{f.name}: expected a number, found {value!r}")
        values[f.name] = value
    return kind(**values)
