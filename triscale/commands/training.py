"""train: long work with a progress bar, a run folder and a report."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from triscale.architecture import Arch
from triscale.commands import TYRO
from triscale.commands.bars import bars
from triscale.commands.computing import Computing, Keeping, make_running
from triscale.commands.fitting import SMALL, fitted
from triscale.commands.following import FIRST, PROCESSES, available_cores, follow, named_recipe
from triscale.commands.networks import read_arch
from triscale.quantities import count, short
from triscale.recipe import UNIT_MEAN, UNIT_STD, Recipe
from triscale.recipes import FINETUNE, named

if TYPE_CHECKING:
    from triscale.classify import Data, Running, Start
    from triscale.data.datasets import Listing
    from triscale.recipe import Preprocess


@dataclass(frozen=True)
class ClassifierComputing(Computing):
    """How a step is computed."""

    workers: int | None = None
    """What prepares batches ahead: threads for images in memory (none unless given), processes for streamed ones (one a core,
    at most 8)."""
    stream: bool | None = None
    """Decode images when they are needed instead of holding them in memory: what fits and isn't cropped at random is held unless given."""


@dataclass
class Train:
    """Train a network, from scratch or from a checkpoint; write a run folder with its model file, log and report."""

    data: tyro.conf.Positional[str]
    """A folder of class folders (or with train and val or test inside), of shards or of Parquet files; a pattern of shards,
    'train-{000..146}.tar', also http(s)://; or digits, cifar10, cifar100, birdsnap, stanford-cars, flowers102, fgvc-aircraft,
    oxford-iiit-pet, food101, imagenet."""
    arch: str | None = None
    """A network's name, or a .json file; that of --weights, else efficientnet_b0 unless given."""
    weights: str | None = None
    """Begin with these under a new classifier: a model file, a checkpoint of timm, torchvision, Keras and others, or a published
    one, efficientnet_b0:imagenet-aa. Up to a tenth of its tensors may be missing, which is told."""
    raw: bool = False
    """Of --weights, not the moving averages."""
    offline: bool = False
    """Of published checkpoints, only those in the cache."""
    macs: str | None = None
    """Scale the network to this budget of multiply-adds an image first, e.g. 40M."""
    resolution: int | None = None
    """Input size; the network's own unless given (from scratch, digits: 16, cifar: 32). Where the last feature map would be smaller
    than 4x4, strides are taken out, the first ones first, before --macs is met; not with --weights."""
    crop_padding: int | None = None
    """Of evaluation: pixels that the crop leaves out around its side; 32 from 96 px on, else and for cifar and digits 0 unless given."""
    data_dir: str | None = None
    """Where a named data set lies, as torchvision keeps it (cifar10 also as Parquet)."""
    recipe: str = "quick"
    """Named settings, which the options below override: quick, small, cifar10, proxy, finetune, transfer, paper, paper-gpu, randaugment,
    advprop. transfer has the epochs of 20 000 steps for the eight data sets' names."""
    keeping: Keeping = field(default_factory=Keeping)
    computing: ClassifierComputing = field(default_factory=ClassifierComputing)
    settings: Annotated[Recipe, tyro.conf.arg(name="")] = field(default_factory=Recipe)


def train_options(args: list[str]) -> Train:
    """Parsed twice: the named recipe gives the defaults that the other options override."""
    name = named_recipe(args) or "quick"
    default = Train(data=tyro.MISSING, recipe=name, settings=_settings(name, args))
    options = tyro.cli(Train, args=args, default=default, prog="triscale train", config=TYRO)
    if options.data == "digits" and "--flip" not in args:  # a mirrored digit is another digit, or none
        options.settings = replace(options.settings, flip=False)
    return options


def _settings(name: str, args: list[str]) -> Recipe:
    """The named recipe; transfer's epochs are those of the data set, where it is one of the eight."""
    data = next((a for a in args if a in FINETUNE), None)
    return FINETUNE[data].recipe() if name == "transfer" and data else named(name)


def train(options: Train) -> int:
    """Trains and reports. Returns the exit status: 1 where files were left out; for torchrun that would be a crash, so there 0."""
    from triscale.classify import prepare
    from triscale.data.datasets import find
    from triscale.latency import set_threads

    c = options.computing
    set_threads(c.threads)
    options.keeping.check()
    arch, start, given = _beginning(options)
    label = Path(arch.name or Path(options.arch or "network").stem).name
    out = options.keeping.folder(f"{Path(options.data).name}-{label}")
    channels = given.channels if given else 1 if options.data == "digits" else 3
    with bars() as bar:
        task = bar.add_task("looking for images", total=None, unit="images", visible=FIRST)
        watch = lambda what, done, total: bar.update(task, description=what, completed=done, total=total)  # noqa: E731
        listing = find(options.data, options.data_dir, watch)
        arch = _network(options, arch, len(listing.classes), channels)
        preprocess = _preprocess(options, arch, channels, given)
        tick = lambda done, total: bar.update(task, description="reading images", completed=done, total=total)  # noqa: E731
        data = prepare(listing, preprocess, options.settings, stream=c.stream, broken_share=c.broken_share, progress=tick)
    running = _running(options, arch, data, channels)
    if FIRST:
        _describe(options, arch, data, channels, running)
        _remarks(listing)
    top1, by_class = _follow(options, out, data, arch, preprocess, running, start)
    left_out = data.left_out()
    if FIRST:
        from triscale.report import render

        protocol = FINETUNE[options.data].accuracy if options.data in FINETUNE else "top1"
        also = f", {100 * by_class:.2f} % as the mean over the classes, which the transfer protocol asks for" if protocol == "mean_per_class" else ""
        print(f"{100 * top1:.2f} % of the held-out images right{also}. Model: {out / 'model.safetensors'}. Report: {render(out)}")
        if left_out:
            print(f"{len(left_out)} of {len(listing.train) + len(listing.held_out)} images could not be read and were left out", file=sys.stderr)
    return 1 if left_out and PROCESSES == 1 else 0


def _beginning(options: Train) -> tuple[Arch, Start | None, Preprocess | None]:
    """The network, what to load into it, and the preprocessing that came with the weights."""
    if options.weights is None:
        if options.raw or options.offline:
            raise ValueError("--raw and --offline: of --weights, which isn't given")
        return read_arch(options.arch or "efficientnet_b0"), None, None
    from triscale.classify import Start
    from triscale.commands.running import Reading
    from triscale.weights.dialects import WeightsError
    from triscale.weights.open import trunk_of

    if options.macs is not None:
        raise ValueError("--macs: a network that weights are loaded into can't be scaled; leave one of the two out")
    label = Path(options.weights).name
    try:
        net, card = Reading(arch=options.arch, raw=options.raw, offline=options.offline).open("train", options.weights)
    except WeightsError as error:  # a checkpoint that lacks tensors, e.g. a backbone's, may still do
        try:
            arch, preprocess, said = trunk_of(options.weights, arch=read_arch(options.arch) if options.arch else None, raw=options.raw)
        except ValueError:
            raise error from None
        if FIRST:
            print(f"triscale train: {label} is not whole; assumed: {'; '.join(said)}", file=sys.stderr)
        return arch, Start(options.weights, raw=options.raw, label=label), preprocess
    return card.arch, Start(net.state_dict(), card.classes, label=label), card.preprocess


def _preprocess(options: Train, arch: Arch, channels: int, given: Preprocess | None) -> Preprocess:
    from triscale.classify import preprocess_for

    preprocess = replace(given, size=arch.resolution) if given else preprocess_for(arch.resolution, channels)
    if options.settings.advprop and not given and channels == 3:
        preprocess = replace(preprocess, mean=UNIT_MEAN, std=UNIT_STD)  # as the official AdvProp checkpoints have it
    small = options.data in SMALL or (options.resolution is not None and options.resolution < 96)
    padding = options.crop_padding if options.crop_padding is not None else 0 if small else preprocess.crop_padding
    return replace(preprocess, crop_padding=padding)


def _remarks(listing: Listing) -> None:
    for note in listing.notes:
        print(note, file=sys.stderr)
    if listing.passed_over:
        print(f"passed over: {_some(listing.passed_over)}", file=sys.stderr)


def _running(options: Train, arch: Arch, data: Data, channels: int) -> Running:
    from triscale.train.plan import fit_memory

    c = options.computing
    workers = c.workers if c.workers is not None else min(8, available_cores()) if data.streamed else 0
    if workers < 0:
        raise ValueError(f"--workers: expected 0 or more, found {workers}")
    plan = c.plan()
    if c.memory is not None:
        share = max(1, options.settings.batch_size // PROCESSES)
        plan = fit_memory(plan, arch, options.settings, len(data.classes), count(c.memory), share=share, in_channels=channels)
    return make_running(plan, workers, c, options.keeping)


def _describe(options: Train, arch: Arch, data: Data, channels: int, running: Running) -> None:
    from triscale.cost_model import cost

    settings, plan = options.settings, running.plan
    c = cost(arch, len(data.classes), channels, batch=plan.micro_batch or settings.batch_size // PROCESSES)
    memory = short(c.memory.training(1))
    print(f"{arch.name} at {arch.resolution} px: {short(c.macs)} MACs, {short(c.params)} parameters; training step {memory}B of memory")
    how = f", decoded as needed, worker processes: {running.workers}" if data.streamed else ""
    print(f"{len(data.classes)} classes, {len(data.train)} images to train on, {len(data.held_out)} held out ({data.held_out_is}){how}")
    if options.weights:
        print(f"beginning with {options.weights}; {_trained(settings)}")
    defaults = Recipe().to_dict()
    changed = {k: v for k, v in settings.to_dict().items() if v != defaults[k]}
    print(f"recipe {options.recipe}: {', '.join(f'{k} {v:g}' if type(v) is float else f'{k} {v}' for k, v in changed.items()) or 'as it stands'}")
    if plan.micro_batch:
        print(f"{plan.micro_batch} images at a time, {-(-settings.batch_size // PROCESSES // plan.micro_batch)} times a step")


def _trained(settings: Recipe) -> str:
    if settings.freeze:
        return "its classifier alone is trained"
    return "all of it is trained" + (", batch norms by the statistics they came with" if settings.freeze_norms else "")


def _follow(options: Train, out: Path, data: Data, arch: Arch, preprocess: Preprocess, running: Running, start: Start | None) -> tuple[float, float]:
    """Carries the run out, with a bar and a line an epoch; returns the last accuracy, and that of the classes' mean."""
    from triscale.classify import Evaluated
    from triscale.classify import run_folder as carry_out

    last = (0.0, 0.0)

    def line(event: Evaluated) -> str:
        nonlocal last
        last = event.top1, event.mean_per_class
        loss = f"loss {event.train_loss:.4f}, " if event.train_loss else ""  # none where only the end is told again
        by_class = f" ({100 * event.mean_per_class:.2f} % mean per class)" if abs(event.mean_per_class - event.top1) > 5e-5 else ""
        return f"epoch {event.epoch}: {loss}{event.on} accuracy {100 * event.top1:.2f} %{by_class}, {event.seconds:.0f} s"

    settings = options.settings
    follow(carry_out(out, data, arch, preprocess, settings, options.data, running, start), out, settings.epochs, settings.batch_size, line)
    return last


def _network(options: Train, arch: Arch, classes: int, channels: int) -> Arch:
    """`arch` for the input size of the data and, where there is one, within the budget."""
    label = arch.name or Path(options.arch or "").stem
    if options.weights is not None:
        return replace(arch, name=label, resolution=options.resolution or arch.resolution)
    tell = print if FIRST else lambda text: None
    return replace(fitted(arch, options.data, options.resolution, options.macs, (classes, channels), tell), name=label)


def _some(items: tuple[str, ...], shown: int = 5) -> str:
    return ", ".join(items[:shown]) + (f" and {len(items) - shown} more" if len(items) > shown else "")
