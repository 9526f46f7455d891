"""The paper's central claim on CIFAR-10: the same multiply-adds spent on depth, width, resolution or all three (README.md).

    python -m studies.scaling.run --scale laptop --data-dir DIR        trains what is missing, then draws the figures
    python -m studies.scaling.run --render                             the docs' figures and tables from the results kept here

Every finished training is a line of OUT/results.jsonl; what stands there is skipped, so a study that was stopped or killed
goes on with the same command and loses the trainings under way alone.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from studies.scaling.images import unpack
from studies.scaling.ledger import Ledger
from studies.scaling.plan import PARTS, SETTINGS, Run, Setting, runs
from studies.scaling.pool import Done, Worked, side_by_side
from studies.scaling.train import Job
from triscale.reproduce import render, reproduce

RESULTS = "results.jsonl"
WORK = ".work-"  # the folder of decoded pictures while the study runs


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 all is there; 2 a mistake; 3 stopped, to be gone on with."""
    options = _options(arguments)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        if options.render:
            from studies.scaling.page import write

            for path in write(options.out):
                print(path)
            return 0
        return study(options)
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 3
    except (ValueError, MemoryError) as error:
        print(f"studies.scaling: {error}", file=sys.stderr)
        return 2


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m studies.scaling.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=SETTINGS, default="laptop", help="laptop: two cores; gpu: one large GPU; tiny: seconds, to try it")
    parser.add_argument("--data-dir", help="the folder of CIFAR-10 (torchvision's, or Parquet), or of train/ and test/ with a folder a class")
    parser.add_argument("--out", type=Path, help="results.jsonl, models/ and figures; runs/scaling-SCALE unless given")
    parser.add_argument("--part", choices=(*PARTS, "all"), default="all")
    parser.add_argument("--seeds", type=int, help="of figure 8 (table 7); the other figures have one")
    parser.add_argument("--epochs", type=int, help="instead of the scale's own; not comparable with runs of another number")
    parser.add_argument("--only", default="", help="names of networks, separated by commas, e.g. base,compound")
    parser.add_argument("--workers", type=int, help="trainings at a time; on a CPU one a core unless given, on a GPU 1")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no training after so many")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="torch.compile; on a GPU unless refused")
    parser.add_argument("--device", help="cpu, cuda, cuda:1; the scale's own unless given")
    parser.add_argument("--render", action="store_true", help="write docs/scaling.md and its figures, from --out or else the results kept here")
    options = parser.parse_args(arguments)
    for name in ("seeds", "epochs", "workers"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name}: expected 1 or more, found {getattr(options, name)}")
    return options


def study(options: argparse.Namespace) -> int:
    """Trains what is missing, draws what there is. Returns the exit status."""
    setting = SETTINGS[options.scale]
    setting = replace(setting, device=options.device or setting.device)
    if not options.data_dir:
        raise ValueError("--data-dir: expected the folder of CIFAR-10")
    if setting.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {setting.device}: torch sees no CUDA device; --scale laptop needs none")
    out = options.out or Path("runs") / f"scaling-{setting.name}"
    wanted = _wanted(setting, options)
    ledger = Ledger(out / RESULTS)
    try:
        missing = [r for r in wanted if not ledger.has(setting.name, r)]
        print(f"{len(wanted)} trainings, {len(wanted) - len(missing)} of them in {out / RESULTS}", flush=True)
        if missing:
            _train(missing, setting, options, out, ledger)
        left = sum(not ledger.has(setting.name, r) for r in wanted)
    finally:
        ledger.close()
    for name in ("table7", *PARTS) if options.part == "all" else (options.part,):
        print(f"\n{render(reproduce(name, out, study=out), 110)}")
    if left:
        print(f"\n{left} trainings are left; the same command goes on", file=sys.stderr)
    return 3 if left else 0


def _wanted(setting: Setting, options: argparse.Namespace) -> list[Run]:
    wanted = runs(setting, PARTS if options.part == "all" else (options.part,), options.seeds, options.epochs)
    names = [n.strip() for n in options.only.split(",") if n.strip()]
    known = dict.fromkeys(r.name for r in wanted)
    for name in names:
        if name not in known:
            raise ValueError(f"--only: no network '{name}' in this part; there are {', '.join(known)}")
    return [r for r in wanted if not names or r.name in names]


def _train(missing: list[Run], setting: Setting, options: argparse.Namespace, out: Path, ledger: Ledger) -> None:
    """Each line is in the ledger before the next event is looked at."""
    on_gpu = setting.device.startswith("cuda")
    workers = options.workers or (1 if on_gpu else _cores())
    threads = _cores() if on_gpu else 1
    deadline = time.monotonic() + 60 * options.minutes
    for old in out.glob(f"{WORK}*"):  # of a study that was killed; the ledger's lock says that none is running here
        shutil.rmtree(old, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=WORK) as folder, _bar() as bar:
        task = bar.add_task("decoding the pictures", total=None)
        classes = unpack(options.data_dir, Path(folder), setting.train_images, setting.test_images)
        compiled = on_gpu if options.compile is None else options.compile
        jobs = [Job(r, setting.name, folder, classes, setting.device, compiled, _model(out, r), threads) for r in missing]
        bar.update(task, description=f"training 0 of {len(jobs)}", total=sum(r.work for r in missing), completed=0)
        finished = 0
        for event in side_by_side(jobs, workers, deadline):
            if isinstance(event, Done):
                ledger.append(event.line)
                finished += 1
                bar.update(task, description=f"training {finished} of {len(jobs)}")
                line = event.line
                said = f"{100 * line['top1']:.2f} % of the test images right, {line['macs'] / 1e6:.2f} M MACs, {line['seconds']:.0f} s"
                bar.console.print(f"  {event.job.run.label}: {said}", highlight=False)
            elif isinstance(event, Worked):
                bar.advance(task, event.work)
            else:
                bar.console.print(f"  {event.text}", highlight=False)


def _bar() -> Progress:
    """Not that of triscale.commands: the study runs where the command line's own packages are missing."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn(), TextColumn("left"))
    return Progress(*columns, console=Console(stderr=True), transient=True, speed_estimate_period=120)


def _model(out: Path, run: Run) -> str | None:
    """Where the network is kept: those that figure 7 compares, of seed 0."""
    if run.recipe.seed or run.name not in ("base", "depth", "width", "resolution", "compound"):
        return None
    return str(out / "models" / f"{run.name}.safetensors")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    sys.exit(main())
