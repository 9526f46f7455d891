"""demo and train: long work with a progress bar, a run folder and a report."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from triscale.architecture import Arch
from triscale.commands import TYRO
from triscale.commands.networks import read_arch
from triscale.quantities import count, short
from triscale.recipe import Recipe
from triscale.recipes import named
from triscale.text import aligned


class _Rate(ProgressColumn):
    """Work a second, in the task's own unit."""

    def render(self, task: Task) -> Text:
        speed, unit = task.finished_speed or task.speed, task.fields.get("unit", "")
        return Text(f"{speed * task.fields.get('per', 1):,.0f} {unit}/s" if speed and unit else "")


@contextmanager
def _bar() -> Iterator[Progress]:
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), _Rate(), TimeRemainingColumn(), TextColumn("left"))
    with Progress(*columns, console=Console(stderr=True), transient=True, speed_estimate_period=20) as bar:
        yield bar


def demo(out: Path = Path("runs/demo"), seeds: int = 3, workers: int | None = None) -> int:
    """The paper's idea on real scans: a small network, four times its MACs spent in four ways, all five trained and compared.

    Args:
        out: the run folder: results.json, model.safetensors, report.html.
        seeds: trainings of each network.
        workers: trainings at a time, one thread each; all cores unless given.
    """
    import json

    from triscale import demo as demo_task
    from triscale.report import DEMO_HEADER, demo_rows, render, verdict

    if seeds < 1:
        raise ValueError(f"--seeds: expected 1 or more, found {seeds}")
    start = time.perf_counter()
    runs = len(demo_task.ways()) * seeds
    print(f"{runs} trainings on scikit-learn's scans of handwritten digits: a base network and {demo_task.BUDGET} times its MACs in four ways")
    finished = 0
    with _bar() as bar:
        task = bar.add_task(f"training 0 of {runs}", total=None)
        for progress in demo_task.run(out, seeds=seeds, workers=workers):
            bar.update(task, completed=progress.done, total=progress.total)
            if progress.finished:
                finished += 1
                way, seed, top1 = progress.finished
                bar.update(task, description=f"training {finished} of {runs}")
                bar.console.print(
                    f"  {way}{' network' if way == 'base' else ' scaling'}, seed {seed}: {100 * top1:.2f} % of held-out scans right", highlight=False
                )
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    print(aligned(DEMO_HEADER, demo_rows(results["networks"])))
    print(f"\n{verdict(results['networks'], results['budget'])}")
    print(f"\nThe {results['best']} network on held-out scans, its least certain first:")
    for s in results["samples"]:
        wrong = "" if s["says"] == s["label"] else f", wrong: it is a {s['label']}"
        print(f"  {s['name']}: {s['says']} ({100 * s['probability']:.1f} %){wrong}")
    path = render(out)
    print(f"\n{time.perf_counter() - start:.0f} s. Report: {path.resolve()}")
    return 0


@dataclass
class Train:
    """Train a network from scratch; write a run folder with its model file, log and report."""

    data: tyro.conf.Positional[str]
    """A folder of class folders (or with train and val or test inside), digits, or cifar10."""
    arch: str = "efficientnet_b0"
    """A network's name, or a .json file."""
    macs: str | None = None
    """Scale the network to this budget of multiply-adds an image first, e.g. 40M."""
    resolution: int | None = None
    """Input size; the network's own unless given (digits: 16, cifar10: 32). Where the last feature map would be smaller than
    4x4, strides are taken out, the first ones first, before --macs is met."""
    data_dir: str | None = None
    """Where cifar10 lies: a folder with cifar-10-batches-py, or with its Parquet files."""
    out: Path | None = None
    """The run folder; runs/DATA-ARCH, with a number where that is taken, unless given."""
    recipe: str = "quick"
    """Named settings, which the options below override: quick, small."""
    threads: int | None = None
    """CPU threads; torch's own choice unless given."""
    settings: Annotated[Recipe, tyro.conf.arg(name="")] = field(default_factory=Recipe)


def train_options(args: list[str]) -> Train:
    """Parsed twice: the named recipe gives the defaults that the other options override."""
    name = next((args[i + 1] for i, a in enumerate(args[:-1]) if a == "--recipe"), None)
    name = next((a.split("=", 1)[1] for a in args if a.startswith("--recipe=")), name) or "quick"
    settings = named(name)
    if "digits" in args:  # a mirrored digit is another digit, or none; --flip still turns it on
        settings = replace(settings, flip=False)
    default = Train(data=tyro.MISSING, recipe=name, settings=settings)
    return tyro.cli(Train, args=args, default=default, prog="triscale train", config=TYRO)


def train(options: Train) -> int:
    """Trains and reports. Returns the exit status: 1 where files were left out."""
    from triscale.classify import Evaluated, Saved, preprocess_for, run_folder
    from triscale.cost_model import cost
    from triscale.data.datasets import find, load
    from triscale.latency import set_threads
    from triscale.report import render
    from triscale.train.loop import Step

    set_threads(options.threads)
    arch = read_arch(options.arch)
    out = _new_folder(options, arch)
    channels = 1 if options.data == "digits" else 3
    listing = find(options.data, options.data_dir)
    arch = _network(options, arch, len(listing.classes), channels)
    preprocess = preprocess_for(arch.resolution, channels)
    with _bar() as bar:
        task = bar.add_task("reading images", total=None, unit="images")
        splits = load(listing, preprocess, lambda done, total: bar.update(task, completed=done, total=total))
    c = cost(arch, len(splits.classes), channels, batch=options.settings.batch_size)
    memory = short(c.memory.training(1))
    print(f"{arch.name} at {arch.resolution} px: {short(c.macs)} MACs, {short(c.params)} parameters; training step {memory}B of memory")
    print(f"{len(splits.classes)} classes, {len(splits.train)} images to train on, {len(splits.held_out)} held out ({splits.held_out_is})")
    if listing.passed_over:
        print(f"passed over, not images by their names: {_some(listing.passed_over)}", file=sys.stderr)
    left_out = splits.train.left_out + splits.held_out.left_out
    for reason in left_out:
        print(f"left out: {reason}", file=sys.stderr)
    saved, top1, made = 0, 0.0, not out.exists()
    with _bar() as bar:
        task = bar.add_task("epoch 1", total=None, unit="images", per=options.settings.batch_size)
        try:
            for event in run_folder(out, splits, arch, preprocess, options.settings, options.data):
                if isinstance(event, Step):
                    description = f"epoch {event.epoch + 1} of {options.settings.epochs}, loss {event.loss:.3f}"
                    bar.update(task, completed=event.step, total=event.steps, description=description)
                elif isinstance(event, Evaluated):
                    top1 = event.top1
                    line = f"epoch {event.epoch}: loss {event.train_loss:.4f}, held-out accuracy {100 * top1:.2f} %, {event.seconds:.0f} s"
                    bar.console.print(line, highlight=False)
                elif isinstance(event, Saved):
                    saved = event.epoch
        except Exception:
            _undo(out, made, saved)
            raise
        except KeyboardInterrupt:
            if not saved:
                _undo(out, made, saved)
                raise KeyboardInterrupt("before the first epoch was done; nothing is kept") from None
            raise KeyboardInterrupt(f"{out / 'model.safetensors'} holds epoch {saved} of {options.settings.epochs}") from None
    print(f"{100 * top1:.2f} % of the held-out images right. Model: {out / 'model.safetensors'}. Report: {render(out)}")
    if left_out:
        print(
            f"{len(left_out)} of {len(left_out) + len(splits.train) + len(splits.held_out)} images could not be read and were left out",
            file=sys.stderr,
        )
    return 1 if left_out else 0


def _network(options: Train, arch: Arch, classes: int, channels: int) -> Arch:
    """`arch` for the input size of the data and, where there is one, within the budget."""
    from triscale.budget import Workload, fit_budget
    from triscale.scaling import Coefficients, fit_input

    label = arch.name or Path(options.arch).stem
    resolution = {"digits": 16, "cifar10": 32}.get(options.data) if options.resolution is None else options.resolution
    arch = fit_input(arch, arch.resolution if resolution is None else resolution)
    if options.macs is not None:
        # An input size that is asked for stays: the budget is then met by depth and width alone.
        coefficients = Coefficients() if resolution is None else Coefficients(gamma=1.0)
        workload = Workload(num_classes=classes, in_channels=channels)
        fit = fit_budget(arch, macs=count(options.macs), coefficients=coefficients, workload=workload)
        print(fit)
        arch = fit.arch
    return replace(arch, name=label)


def _new_folder(options: Train, arch: Arch) -> Path:
    """The run folder, which doesn't exist yet or is empty: a run never overwrites another, or anything else."""
    if options.out is None:
        base = Path(options.data).resolve().name
        return _free(Path("runs"), f"{base}-{Path(arch.name or Path(options.arch).stem).name}".replace(" ", "-"))
    if options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        raise ValueError(f"--out {options.out}: exists already and is no empty folder; give another")
    return options.out


def _undo(out: Path, made: bool, saved: int) -> None:
    """Takes away what a run without one whole epoch has left."""
    if saved:
        return
    for name in ("recipe.json", "log.jsonl"):
        (out / name).unlink(missing_ok=True)
    if made and out.is_dir() and not any(out.iterdir()):
        out.rmdir()


def _some(items: tuple[str, ...], shown: int = 5) -> str:
    return ", ".join(items[:shown]) + (f" and {len(items) - shown} more" if len(items) > shown else "")


def _free(folder: Path, name: str) -> Path:
    """folder/name, or folder/name-2, -3, ...: the first that isn't there."""
    path, i = folder / name, 2
    while path.exists():
        path, i = folder / f"{name}-{i}", i + 1
    return path
