"""The writer of log.jsonl; the lines are those of lines.py."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from triscale.run_log.board import Board
from triscale.run_log.lines import LOG, TIMES, EpochLine, StepLine


class StepWindow:
    """Steps added up until `steps` of them and `seconds` have gone by, so that neither fast nor slow runs write a flood."""

    def __init__(self, steps: int = 1, seconds: float = 10.0, clock: Callable[[], float] = time.monotonic) -> None:
        self.steps, self.seconds, self.clock = steps, seconds, clock
        self.held: list[StepLine] = []
        self.start = clock()

    def add(self, line: StepLine) -> StepLine | None:
        """The finished window, where this step finishes it."""
        self.held.append(line)
        full = len(self.held) >= self.steps and self.clock() - self.start >= self.seconds
        return self.flush() if full else None

    def flush(self) -> StepLine | None:
        """The window as it stands, None where it is empty; the next one starts now."""
        held, self.held, self.start = self.held, [], self.clock()
        if not held:
            return None
        means: dict[str, Any] = {name: math.fsum(getattr(h, name) for h in held) / len(held) for name in ("loss", *TIMES)}
        return replace(held[-1], **means, images=sum(h.images for h in held), window=len(held))


class RunLog:
    """Writes log.jsonl line by line, each at the operating system before the call returns; a context manager.

    One writer a folder. steps_per_epoch: a step line covers 1 % of them, and 10 s at least; it also ends where an epoch ends
    or a state is saved, so that no line reaches over a step that a run resumes from. tensorboard: the same values as
    scalars in folder/tensorboard. Raises OSError as it comes, ValueError where the tensorboard package is missing.
    """

    def __init__(self, folder: Path, *, tensorboard: bool = False, steps_per_epoch: int = 1) -> None:
        self._board = Board(folder / "tensorboard") if tensorboard else None
        self._window = StepWindow(max(1, steps_per_epoch // 100))
        self._images = 0
        folder.mkdir(parents=True, exist_ok=True)
        _mend(folder / LOG)
        self._file = open(folder / LOG, "ab", buffering=0)  # noqa: SIM115 - closed in close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(error, OSError):  # one more line would meet the same full disk, and hide the first error
            self._window.flush()
        self.close()

    def step(
        self,
        *,
        epoch: int,
        step: int,
        steps: int,
        loss: float,
        lr: float,
        images: int,
        data_s: float = 0.0,
        forward_s: float = 0.0,
        backward_s: float = 0.0,
        optimiser_s: float = 0.0,
    ) -> None:
        """After every step, with the loop's counts: epoch from 0, step from 1; images: since this log was opened; seconds: of this step."""
        line = StepLine(epoch, step, steps, loss, lr, images - self._images, data_s, forward_s, backward_s, optimiser_s)
        self._images = images
        self._write_window(self._window.add(line))

    def epoch(
        self,
        *,
        epoch: int,
        step: int,
        loss: float,
        seconds: float,
        lr: float | None = None,
        top1: float | None = None,
        top5: float | None = None,
        mean_per_class: float | None = None,
        ap: float | None = None,
        ap50: float | None = None,
    ) -> None:
        """After an epoch, counted from 1. seconds: of training since its start, those before a resume too. Accuracies: 0 to 1."""
        self._write_window(self._window.flush())
        rate = None if lr is None else _short(lr)
        line = EpochLine(epoch, _short(loss), round(seconds, 2), step, top1, top5, rate, mean_per_class, ap, ap50)
        self._write("epoch", asdict(line))
        if self._board:
            self._board.add(step, {"held_out/top1": top1, "held_out/top5": top5, "held_out/AP": ap, "held_out/AP50": ap50})

    def saved(self, step: int, path: str | Path) -> None:
        """A state or model file stands whole. Only its name is kept: a run folder can be moved."""
        self._write_window(self._window.flush())
        self._write("saved", {"step": step, "path": Path(path).name})

    def resumed(self, step: int) -> None:
        """The run goes on from the state after `step`. Before the first step of this process."""
        if self._board:
            self._board.purge = step + 1
        self._write("resumed", {"step": step})

    def note(self, text: str) -> None:
        """A line for the reader of the report: images left out, a fallback."""
        self._write("note", {"text": text})

    def close(self) -> None:
        """Writes the window that is open. Once closed, closing again does nothing."""
        if self._file.closed:
            return
        try:
            self._write_window(self._window.flush())
        finally:
            self._file.close()
            if self._board:
                self._board.close()

    def _write_window(self, line: StepLine | None) -> None:
        if line is None:
            return
        body = asdict(line)
        self._write("step", body | {name: _short(body[name]) for name in ("loss", "lr", "images", *TIMES)})
        if self._board:
            total = line.seconds / line.window
            shares = {f"split/{name.removesuffix('_s')}": getattr(line, name) / total for name in TIMES} if total else {}
            rate = {"train/images_per_s": line.images / line.seconds} if total else {}
            self._board.add(line.step, {"train/loss": line.loss, "train/lr": line.lr, **rate, **shares})

    def _write(self, kind: str, body: dict[str, Any]) -> None:
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in body.items()}  # JSON has no NaN
        data = (json.dumps({"kind": kind, **finite}) + "\n").encode()
        while data:  # a disk that fills up takes a part and says so at the next write
            data = data[self._file.write(data) :]


def _mend(path: Path) -> None:
    """Takes away a last line that a kill cut, so that what follows starts on a line of its own."""
    if not path.is_file():
        return
    with open(path, "r+b") as file:
        text = file.read()
        whole = text.rfind(b"\n") + 1
        if whole == len(text):
            return
        try:
            json.loads(text[whole:])
        except ValueError:
            file.truncate(whole)
        else:
            file.write(b"\n")


def _short(value: float) -> float:
    return float(f"{value:.7g}")
