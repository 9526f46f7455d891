"""A training's run folder, read as far as it is there: what every one has, and a classifier's."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from triscale.architecture import Arch
from triscale.detector import is_detector
from triscale.report import ReportError
from triscale.run_log import HeldOut, Log, LogError, Samples, read_held_out, read_log, read_samples
from triscale.text import first_line, printable
from triscale.weights.model_file import KEY, ModelCard

MODEL, ARCH = "model.safetensors", "arch.json"
T = TypeVar("T")


@dataclass(frozen=True)
class Run:
    """What there is of any run folder. recipe: empty where it is not known; classes: names as far as they are known."""

    folder: Path
    log: Log
    recipe: dict[str, Any]
    classes: tuple[str, ...]

    @property
    def epochs(self) -> int:
        """Finished epochs."""
        return self.log.epochs[-1].epoch if self.log.epochs else 0

    @property
    def planned(self) -> int | None:
        """Epochs of the recipe, where it is known."""
        value = self.recipe.get("epochs")
        return value if isinstance(value, int) and value > 0 else None

    @property
    def finished(self) -> bool:
        return self.epochs > 0 and self.epochs >= (self.planned or 0)

    def name(self, label: int) -> str:
        """The class's name, safe to show; its number where it has none."""
        return printable(self.classes[label]) if 0 <= label < len(self.classes) else str(label)


@dataclass(frozen=True)
class ClassifierRun(Run):
    card: ModelCard | None
    arch: Arch | None
    samples: Samples | None
    held_out: HeldOut | None

    @property
    def measured_on(self) -> str:
        """What the epochs' accuracies are of: with a minival, only the last word is spoken on the held-out images."""
        return "minival" if self.recipe.get("minival") else "held-out"


def of_detector(folder: Path) -> bool:
    """Whether a detector was trained here: what the model's file says, before there is one the architecture's, else what was measured.

    Raises ReportError where nothing is logged yet or a file can't be read.
    """
    log = read_lines(folder)
    if metadata := read_metadata(folder / MODEL):
        return KEY not in metadata
    text = read_text(folder / ARCH)
    return is_detector(text) if text is not None else any(e.ap is not None for e in log.epochs)


def read_run(folder: Path) -> ClassifierRun:
    """Raises ReportError as of_detector does."""
    log, metadata = read_lines(folder), read_metadata(folder / MODEL)
    card = parsed(folder / MODEL, "triscale model", ModelCard.from_json, metadata.get(KEY))
    arch = card.arch if card else parsed(folder / ARCH, "Arch", Arch.from_json, read_text(folder / ARCH))
    try:
        samples, held_out = read_samples(folder), read_held_out(folder)
    except LogError as error:
        raise ReportError(str(error)) from None
    classes = card.classes if card else samples.classes if samples else ()
    return ClassifierRun(folder, log, read_recipe(folder, card.provenance if card else {}), classes, card, arch, samples, held_out)


def read_lines(folder: Path) -> Log:
    """The log. Raises ReportError where it has no step yet."""
    try:
        log = read_log(folder)
    except LogError as error:
        raise ReportError(str(error)) from None
    if not log.epochs and not log.steps:
        raise ReportError(f"{folder}: log.jsonl has no step and no epoch yet")
    return log


def read_recipe(folder: Path, provenance: dict[str, Any]) -> dict[str, Any]:
    """As recipe.json has it, else as the model's provenance has; empty where neither does."""
    kept = provenance.get("recipe")
    return read_json(folder / "recipe.json") or (kept if isinstance(kept, dict) else {})


def read_metadata(path: Path) -> dict[str, str]:
    """A model file's, without its tensors, which may be gigabytes; empty where there is no file. Raises ReportError."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        return {}
    try:
        with safe_open(path, framework="np") as file:
            found: dict[str, str] | None = file.metadata()
    except (SafetensorError, OSError) as error:
        raise ReportError(f"{path}: no triscale model ({first_line(error)})"[:300]) from None
    if not found or not any(key.startswith(KEY) for key in found):
        raise ReportError(f"{path}: no triscale model (its metadata don't say what it is)")
    return found


def parsed(path: Path, what: str, read: Callable[[str], T], text: str | None) -> T | None:
    """What `read` makes of the file's text; None where there is none. Raises ReportError."""
    if text is None:
        return None
    try:
        return read(text)
    except (ValueError, TypeError, KeyError) as error:
        raise ReportError(f"{path}: no {what} ({first_line(error)})"[:300]) from None


def read_text(path: Path) -> str | None:
    """None where there is no such file. Raises ReportError."""
    if not path.is_file():
        return None
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ReportError(f"{path}: can't be read ({first_line(error)})") from None


def read_json(path: Path) -> dict[str, Any]:
    """An object; empty where there is no such file. Raises ReportError."""
    if (text := read_text(path)) is None:
        return {}
    try:
        data = json.loads(text)
    except ValueError as error:
        raise ReportError(f"{path}: no JSON ({first_line(error)})") from None
    if not isinstance(data, dict):
        raise ReportError(f"{path}: expected an object")
    return data
