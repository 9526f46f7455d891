"""Where a run is written: a run never overwrites another, or anything else, and one that comes to nothing leaves nothing."""

from __future__ import annotations

import shutil
from pathlib import Path


def run_folder(out: Path | None, name: str, resume: bool, first: bool) -> Path:
    """The run folder, which doesn't exist yet or is empty, or with `resume` has something to go on from; runs/NAME, with a number
    where that is taken, unless `out` says. first: the process that writes. Raises ValueError for any other folder."""
    if out is None:
        name = "".join("-" if c in "/\\ {}*?:" else c for c in name)
        return _newest(Path("runs"), name) if resume else _free(Path("runs"), name)
    if resume:
        _can_go_on(out)
    elif first and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out}: exists already and is no empty folder; give another")
    return out


def undo(out: Path) -> None:
    """Takes away what a run without one whole epoch has left, unless it has saved a state."""
    if any((out / "states").glob("state-*")):
        return
    for name in ("recipe.json", "arch.json", "log.jsonl", "samples.npz"):
        (out / name).unlink(missing_ok=True)
    shutil.rmtree(out / "tensorboard", ignore_errors=True)
    if (out / "states").is_dir():
        (out / "states").rmdir()
    if out.is_dir() and not any(out.iterdir()):
        out.rmdir()


def _can_go_on(out: Path) -> None:
    """Refuses a folder that a resumed run would write over: one that is neither new nor a run with checkpoints."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())) or any((out / "states").glob("state-*.safetensors")):
        return
    if not (out / "recipe.json").is_file() or (out / "model.safetensors").exists():
        raise ValueError(f"--out {out}: no checkpoint in it to go on from; give another folder, or leave --resume out")


def _newest(folder: Path, name: str) -> Path:
    """The last of folder/name, name-2, name-3, ... that is there, else the first."""
    path, i = folder / name, 2
    while (later := folder / f"{name}-{i}").exists():
        path, i = later, i + 1
    _can_go_on(path)
    return path


def _free(folder: Path, name: str) -> Path:
    """folder/name, or folder/name-2, -3, ...: the first that isn't there."""
    path, i = folder / name, 2
    while path.exists():
        path, i = folder / f"{name}-{i}", i + 1
    return path
