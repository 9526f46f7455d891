"""A training's run folder, read as far as it is there."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from triscale.architecture import Arch
from triscale.report import ReportError
from triscale.run_log import HeldOut, Log, LogError, Samples, read_held_out, read_log, read_samples
from triscale.text import printable
from triscale.weights.model_file import KEY, ModelCard


@dataclass(frozen=True)
class Run:
    """What is there of a run folder. recipe: empty where it is not known."""

    folder: Path
    log: Log
    recipe: dict[str, Any]
    card: ModelCard | None
    arch: Arch | None
    samples: Samples | None
    held_out: HeldOut | None

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

    @property
    def measured_on(self) -> str:
        """What the epochs' accuracies are of: with a minival, only the last word is spoken on the held-out images."""
        return "minival" if self.recipe.get("minival") else "held-out"

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names as far as they are known."""
        return self.card.classes if self.card else self.samples.classes if self.samples else ()

    def name(self, label: int) -> str:
        """The class's name, safe to show; its number where it has none."""
        return printable(self.classes[label]) if 0 <= label < len(self.classes) else str(label)


def read_run(folder: Path) -> Run:
    """Raises ReportError where nothing is logged yet or a file can't be read."""
    try:
        log, samples, held_out = read_log(folder), read_samples(folder), read_held_out(folder)
    except LogError as error:
        raise ReportError(str(error)) from None
    if not log.epochs and not log.steps:
        raise ReportError(f"{folder}: log.jsonl has no step and no epoch yet")
    card = _card(folder / "model.safetensors")
    kept = card.provenance.get("recipe") if card else None
    recipe = _json(folder / "recipe.json") or (kept if isinstance(kept, dict) else {})
    arch = card.arch if card else _arch(folder / "arch.json")
    return Run(folder, log, recipe, card, arch, samples, held_out)


def _card(path: Path) -> ModelCard | None:
    """The model's card alone: its tensors are not needed, and may be gigabytes."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="np") as file:
            return ModelCard.from_json((file.metadata() or {})[KEY])
    except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
        raise ReportError(f"{path}: no triscale model ({(str(error) or type(error).__name__).splitlines()[0]})"[:300]) from None


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ReportError(f"{path}: no JSON ({str(error).splitlines()[0]})") from None
    if not isinstance(data, dict):
        raise ReportError(f"{path}: expected an object")
    return data


def _arch(path: Path) -> Arch | None:
    if not path.is_file():
        return None
    try:
        return Arch.from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ReportError(f"{path}: no Arch ({(str(error) or type(error).__name__).splitlines()[0]})"[:300]) from None
