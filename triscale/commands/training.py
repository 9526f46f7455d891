"""train: long work with a progress bar, a run folder and a report."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from triscale.architecture import Arch
from triscale.commands import TYRO
from triscale.commands.bars import bars
from triscale.commands.networks import read_arch
from triscale.quantities import count, short
from triscale.recipe import Recipe
from triscale.recipes import named

if TYPE_CHECKING:
    from triscale.classify import Running
    from triscale.data.datasets import Splits
    from triscale.recipe import Preprocess

Precision = Literal["auto", "float32", "bfloat16"]
# Of the processes that torchrun has started, if it has; the first one speaks.
PROCESSES, FIRST = int(os.environ.get("WORLD_SIZE", "1")), os.environ.get("RANK", "0") == "0"


@dataclass(frozen=True)
class Computing:
    """How a step is computed."""

    device: str = "cpu"
    """cpu, cuda, or auto."""
    threads: int | None = None
    """CPU threads; torch's own choice unless given."""
    workers: int = 0
    """Threads that prepare batches ahead."""
    precision: Precision = "auto"
    """Of convolutions: auto is bfloat16 on an accelerator that has it, float32 on a CPU."""
    memory: str | None = None
    """Split the batch so that a step's tensors fit this, e.g. 2GB, counted in float32 without --recompute."""
    micro_batch: int = 0
    """Images at a time, instead of by --memory; 0: all of a process's share."""
    recompute: bool = False
    """Keep only the blocks' outputs, and compute what is inside them again in the backward pass."""
    compile: bool = False
    """Use torch.compile."""
    shard: bool = False
    """Share the optimiser's state out over the processes."""


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
    resume: bool = False
    """Go on from the newest whole checkpoint in --out, where there is one."""
    save_every: int = 0
    """Steps between checkpoints, beside those at the end of each epoch."""
    tensorboard: bool = False
    """Write TensorBoard's curves too."""
    recipe: str = "quick"
    """Named settings, which the options below override: quick, small, cifar10, paper, paper-gpu, randaugment, advprop, finetune."""
    computing: Computing = field(default_factory=lambda: Computing())
    settings: Annotated[Recipe, tyro.conf.arg(name="")] = field(default_factory=Recipe)


def train_options(args: list[str]) -> Train:
    """Parsed twice: the named recipe gives the defaults that the other options override."""
    name = next((args[i + 1] for i, a in enumerate(args[:-1]) if a == "--recipe"), None)
    name = next((a.split("=", 1)[1] for a in args if a.startswith("--recipe=")), name) or "quick"
    default = Train(data=tyro.MISSING, recipe=name, settings=named(name))
    options = tyro.cli(Train, args=args, default=default, prog="triscale train", config=TYRO)
    if options.data == "digits" and "--flip" not in args:  # a mirrored digit is another digit, or none
        options.settings = replace(options.settings, flip=False)
    return options


def train(options: Train) -> int:
    """Trains and reports. Returns the exit status: 1 where files were left out."""
    from triscale.classify import check, preprocess_for
    from triscale.data.datasets import find, load
    from triscale.latency import set_threads

    check(options.settings)
    if options.recipe == "finetune":
        raise ValueError("the recipe finetune starts from pretrained weights, which train can't take in this version")
    set_threads(options.computing.threads)
    arch = read_arch(options.arch)
    out = _new_folder(options, arch)
    channels = 1 if options.data == "digits" else 3
    listing = find(options.data, options.data_dir)
    arch = _network(options, arch, len(listing.classes), channels)
    preprocess = preprocess_for(arch.resolution, channels)
    with bars() as bar:
        task = bar.add_task("reading images", total=None, unit="images")
        splits = load(listing, preprocess, lambda done, total: bar.update(task, completed=done, total=total))
    running = _running(options, arch, len(splits.classes), channels)
    left_out = splits.train.left_out + splits.held_out.left_out
    if FIRST:
        _describe(options, arch, splits, channels, running)
        if listing.passed_over:
            print(f"passed over, not images by their names: {_some(listing.passed_over)}", file=sys.stderr)
        for reason in left_out:
            print(f"left out: {reason}", file=sys.stderr)
    top1 = _follow(options, out, splits, arch, preprocess, running)
    if FIRST:
        from triscale.report import render

        print(f"{100 * top1:.2f} % of the held-out images right. Model: {out / 'model.safetensors'}. Report: {render(out)}")
        if left_out:
            total = len(left_out) + len(splits.train) + len(splits.held_out)
            print(f"{len(left_out)} of {total} images could not be read and were left out", file=sys.stderr)
    return 1 if left_out else 0


def _running(options: Train, arch: Arch, classes: int, channels: int) -> Running:
    from triscale.classify import Running
    from triscale.train.plan import Plan, fit_memory

    c = options.computing
    if c.workers < 0 or options.save_every < 0:
        raise ValueError(f"--workers and --save-every: expected 0 or more, found {c.workers} and {options.save_every}")
    plan = Plan(c.device, c.precision, c.micro_batch, c.recompute, c.compile)
    if c.memory is not None:
        if c.micro_batch:
            raise ValueError("--memory and --micro-batch: expected one of the two")
        share = max(1, options.settings.batch_size // PROCESSES)
        plan = fit_memory(plan, arch, options.settings, classes, count(c.memory), share=share, in_channels=channels)
    return Running(plan, c.workers, options.save_every, resume=options.resume, shard=c.shard, tensorboard=options.tensorboard, stop=_StopSignal())


class _StopSignal:
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


def _describe(options: Train, arch: Arch, splits: Splits, channels: int, running: Running) -> None:
    from triscale.cost_model import cost

    settings, plan = options.settings, running.plan
    c = cost(arch, len(splits.classes), channels, batch=plan.micro_batch or settings.batch_size // PROCESSES)
    memory = short(c.memory.training(1))
    print(f"{arch.name} at {arch.resolution} px: {short(c.macs)} MACs, {short(c.params)} parameters; training step {memory}B of memory")
    print(f"{len(splits.classes)} classes, {len(splits.train)} images to train on, {len(splits.held_out)} held out ({splits.held_out_is})")
    defaults = Recipe().to_dict()
    changed = {k: v for k, v in settings.to_dict().items() if v != defaults[k]}
    print(f"recipe {options.recipe}: {', '.join(f'{k} {v:g}' if type(v) is float else f'{k} {v}' for k, v in changed.items()) or 'as it stands'}")
    if plan.micro_batch:
        print(f"{plan.micro_batch} images at a time, {-(-settings.batch_size // PROCESSES // plan.micro_batch)} times a step")


def _follow(options: Train, out: Path, splits: Splits, arch: Arch, preprocess: Preprocess, running: Running) -> float:
    """Carries the run out, with a bar and a line an epoch; returns the last accuracy."""
    from triscale.classify import Evaluated, Resumed, Saved, Stopped, run_folder
    from triscale.train.loop import Note, Step

    saved, top1, made, epochs = 0, 0.0, not out.exists(), options.settings.epochs
    with bars() as bar:
        task = bar.add_task("epoch 1", total=None, unit="images", per=options.settings.batch_size, visible=FIRST)
        try:
            waited = taken = 0.0
            for event in run_folder(out, splits, arch, preprocess, options.settings, options.data, running):
                if isinstance(event, Step):
                    taken = 0.98 * taken + event.data + event.forward + event.backward + event.optimizer
                    waited = 0.98 * waited + event.data
                    description = f"epoch {event.epoch + 1} of {epochs}, loss {event.loss:.3f}, waiting for data {waited / taken:.0%}"
                    bar.update(task, completed=event.step, total=event.steps, description=description)
                elif isinstance(event, Evaluated):
                    top1 = event.top1
                    loss = f"loss {event.train_loss:.4f}, " if event.train_loss else ""  # none where only the end is told again
                    line = f"epoch {event.epoch}: {loss}{event.on} accuracy {100 * top1:.2f} %, {event.seconds:.0f} s"
                    bar.console.print(line, highlight=False)
                elif isinstance(event, Saved):
                    saved = event.epoch
                elif isinstance(event, Resumed):
                    saved = event.epoch - 1
                    bar.console.print(f"going on from step {event.step}, in epoch {event.epoch}", highlight=False)
                elif isinstance(event, Note):
                    bar.console.print(event.text, highlight=False)
        except Stopped as stop:
            raise KeyboardInterrupt(f"after step {stop.step}; the same command with --out {out} --resume goes on") from None
        except (Exception, KeyboardInterrupt):
            _undo(out, made, saved)
            raise
    return top1


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
        if PROCESSES > 1:
            raise ValueError("--out: several processes need to be told their folder")
        base = Path(options.data).resolve().name
        name = f"{base}-{Path(arch.name or Path(options.arch).stem).name}".replace(" ", "-")
        return _newest(Path("runs"), name) if options.resume else _free(Path("runs"), name)
    if options.resume:
        _can_go_on(options.out)
    elif FIRST and options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        raise ValueError(f"--out {options.out}: exists already and is no empty folder; give another")
    return options.out


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


def _undo(out: Path, made: bool, saved: int) -> None:
    """Takes away what a run without one whole epoch has left."""
    if saved or not FIRST or not made or any((out / "states").glob("state-*")):
        return
    for name in ("recipe.json", "arch.json", "log.jsonl", "samples.npz"):
        (out / name).unlink(missing_ok=True)
    shutil.rmtree(out / "tensorboard", ignore_errors=True)
    if (out / "states").is_dir():
        (out / "states").rmdir()
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
