"""Images a second and core from JPEG bytes to 224-px batches: the streaming loader beside timm's, in turn in one run.

256 ImageNet pictures (TRISCALE_TEST_DATA/data/imagenet-samples), again and again, in batches of 64, one worker process each. What
is counted is CPU time, user and system, of this process and its workers once they run; so is the time of what is done to whole
batches here. Both make the same of a picture: a random crop (area 0.08 to 1, aspect 3/4 to 4/3), resized to 224 px, mirrored at
random. timm resizes with Pillow's bicubic, as its training transform does when told to (its own choice is bilinear or bicubic at
random).

uint8: the batch as timm's workers give it (create_loader, before its PrefetchLoader normalises); normalised: float32 out of its
PrefetchLoader. AutoAugment: ours v0 on whole batches here; timm's "original", an image at a time in the worker. (Its "v0", of the
same 25 sub-policies, asks Pillow for a posterize to 0 bits, which Pillow 13 refuses with an error.)

python -m benchmarks.loader --quick prints the same of two short rounds.
"""

import cProfile
import json
import os
import pstats
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import timm.data
import torch

from triscale.data import batched, policies
from triscale.data.datasets import Listing, find
from triscale.data.loader import Finish, draw_moves, move
from triscale.data.pack import Packing, pack
from triscale.data.sources import Folder
from triscale.data.stream import StreamedBatches
from triscale.data.work import Work
from triscale.recipe import Preprocess, Recipe

DATA = Path(os.environ.get("TRISCALE_TEST_DATA", Path(__file__).parent.parent.parent / "shared")) / "data" / "imagenet-samples"
SIZE, BATCH = 224, 64
SHORT_SIDE = 256


class Uint8(Finish):
    """Mirrored and augmented, not normalised."""

    def __call__(self, images, labels, generator, part=slice(None), whole=0):
        whole = whole or len(images)
        images = move(images, draw_moves(self.recipe, whole, images.shape[2:], generator), part)
        if self.recipe.augment != "none":
            images = batched.apply(images, policies.draw(self.recipe, whole, tuple(images.shape[2:]), generator)[part])
        return images, labels


def cpu_seconds():
    """Of this process and its children that live."""
    children = [pid for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()]
    return time.process_time() + sum(time.clock_gettime((~int(pid) << 3) | 2) for pid in children)  # Linux: a process's CPU clock


def original(folder):
    paths = sorted(str(p.relative_to(folder)) for p in folder.rglob("*.JPEG"))
    names = sorted({Path(p).parent.name for p in paths})
    return Folder(folder, paths, np.array([names.index(Path(p).parent.name) for p in paths])), names


def packed(samples, names, out):
    """The pack of all samples (two of them are its held-out part too: a pack has one)."""
    index = pack(
        Listing("imagenet-samples", samples, Folder(samples.root, [samples.paths[0], samples.paths[1]], [0, 0]), tuple(names), ""),
        out,
        Packing(SHORT_SIDE),
    )
    assert len(index.left_out) == 0
    return find(str(out)).train


def as_files(samples, out):
    """The pack's JPEGs in class folders, for timm."""
    for i, label in enumerate(samples.labels.tolist()):
        path = out / f"{label:03}" / f"{i:05}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(samples.read(i))
    return out


def ours(samples, product, augment):
    recipe = Recipe(batch_size=BATCH, crop_area=0.08, shift=0.0, augment=augment)
    preprocess = Preprocess(SIZE)
    batches = StreamedBatches(samples, preprocess, recipe, finish=(Uint8 if product == "uint8" else Finish)(preprocess, recipe), workers=1)
    return batches.epoch, batches


def theirs(folder, product, augment):
    loader = timm.data.create_loader(
        timm.data.ImageDataset(str(folder)), input_size=SIZE, batch_size=BATCH, is_training=True, color_jitter=0.0, interpolation="bicubic",
        auto_augment="original" if augment == "autoaugment" else None, num_workers=1, device=torch.device("cpu"),
    )  # fmt: skip
    return (lambda epoch: iter(loader if product == "normalised" else loader.loader)), loader


def images_per_cpu_second(epoch_of, epochs, first):
    start, count = cpu_seconds(), 0
    for epoch in range(first, first + epochs):
        for batch in epoch_of(epoch):
            count += len(batch[0])
    return count / (cpu_seconds() - start)


def measure(ways, rounds, epochs):
    for make in ways.values():
        images_per_cpu_second(make, 1, 0)  # start of the workers, files in the page cache
    rates = {key: [] for key in ways}
    for i in range(rounds):
        for key, make in ways.items():
            rates[key].append(images_per_cpu_second(make, epochs, 1 + i * epochs))
    return rates


def main(quick=False):
    torch.set_num_threads(1)
    samples, names = original(DATA)
    with tempfile.TemporaryDirectory() as temporary:
        small = packed(samples, names, Path(temporary) / "pack")
        small_files = as_files(small, Path(temporary) / "files")
        sources = {
            ("timm", "original files"): partial(theirs, DATA),
            ("triscale", "original files"): partial(ours, samples),
            ("triscale", "pack"): partial(ours, small),
            ("timm", "pack's pictures as files"): partial(theirs, small_files),
        }
        ways, loaders = {}, []
        for augment in ("none", "autoaugment"):
            for product in ("uint8", "normalised"):
                for (library, source), make in sources.items():
                    ways[library, source, product, augment], loader = make(product, augment)
                    loaders.append(loader)
        rates = measure(ways, 2 if quick else 5, 2 if quick else 3)
        for loader in loaders:
            if isinstance(loader, StreamedBatches):
                loader.close()
        return [*table(rates), *(row for source, s in (("original files", samples), ("pack", small)) for row in limits(s, source))]


def table(rates):
    rows = []
    for (library, source, product, augment), found in rates.items():
        against = rates["timm", "original files", product, augment]
        ratios = [a / b for a, b in zip(found, against, strict=True)]
        rows.append(
            {
                "library": library, "source": source, "product": product, "augment": augment, "images_per_cpu_s": statistics.median(found),
                "min": min(found), "max": max(found), "rounds": len(found), "times_timm": statistics.median(ratios),
                "times_timm_min": min(ratios), "times_timm_max": max(ratios),
            }
        )  # fmt: skip
    return rows


def described(rows):
    """Paragraphs and (header, rows) of tables for docs/benchmarks.md."""
    rates, profile = [r for r in rows if "profile" not in r], [r for r in rows if "profile" in r]
    cells = [
        [r["library"], r["source"], r["product"], r["augment"], f"{r['images_per_cpu_s']:.0f}", f"{r['min']:.0f} to {r['max']:.0f}",
         f"{r['times_timm']:.2f} ({r['times_timm_min']:.2f} to {r['times_timm_max']:.2f})"] for r in rates
    ]  # fmt: skip
    yield ["library", "from", "batch of", "AutoAugment", "images/s, median", "range", "times timm from original files"], cells
    yield (
        "One worker process each; CPU time of worker and parent together, once they run. All: random crop of area 0.08 to 1, bicubic, "
        f"mirror. uint8: as timm's workers give it; normalised: float32 after its PrefetchLoader. Pack: `triscale pack`, short side "
        f"{SHORT_SIDE}, quality {Packing().quality}. "
        'AutoAugment: ours v0 on whole batches, on the CPU here; timm\'s "original" an image at a time.'
    )
    yield "What one image takes, by section; the profiler adds its own to the parts but not to the whole:"
    sources = list(dict.fromkeys(r["profile"] for r in profile))
    found = {(r["profile"], r["part"]): f"{r['us_per_image']:.0f}" for r in profile}
    parts = dict.fromkeys(r["part"] for r in profile)
    yield ["part", *(f"{source}, µs" for source in sources)], [[part, *(found.get((s, part), "—") for s in sources)] for part in parts]


SECTIONS = {
    "read": "read the file",
    "header": "parse the header",
    "cut": "cut off what the crop leaves out",
    "crop_numbers": "draw the crop",
    "crop_plan": "place the crop",
    "_decoded": "decode the JPEG",
    "resize": "resize",
}  # functions, of which none calls another


def limits(samples, source, epochs=3):
    """What one image takes, in microseconds of CPU time in one process: cProfile's cumulative time of the functions above, and of a
    batch's end without it."""
    recipe = Recipe(batch_size=BATCH, crop_area=0.08, shift=0.0)
    work, out = Work(samples, Preprocess(SIZE), 0.08), np.empty((SIZE, SIZE, 3), np.uint8)
    fill = [partial(work.fill, out, n, epoch) for epoch in range(epochs) for n in range(len(samples))]
    for one in fill[: len(samples)]:
        one()
    start = time.process_time()
    for one in fill:
        one()
    whole = (time.process_time() - start) / len(fill) * 1e6
    profile = cProfile.Profile(time.process_time)
    profile.enable()
    for one in fill:
        one()
    profile.disable()
    taken = {}
    for (file, _, function), (_, _, _, cumulative, _) in pstats.Stats(profile).stats.items():
        if function in SECTIONS and "triscale" in file:
            taken[SECTIONS[function]] = taken.get(SECTIONS[function], 0) + cumulative / len(fill) * 1e6
    rows = [{"profile": source, "part": part, "us_per_image": us} for part, us in sorted(taken.items(), key=lambda item: -item[1])]
    rows.append({"profile": source, "part": "the whole, without the profiler", "us_per_image": whole})
    for name, kind, augment in (("mirror", Uint8, "none"), ("mirror, normalise", Finish, "none"), ("AutoAugment v0, mirror", Uint8, "autoaugment")):
        end = kind(Preprocess(SIZE), replace(recipe, augment=augment))
        batch = torch.randint(0, 256, (BATCH, SIZE, SIZE, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
        start = time.process_time()
        for i in range(20):
            end(batch, torch.zeros(BATCH, dtype=torch.int64), torch.Generator().manual_seed(i), slice(None), BATCH)
        rows.append({"profile": source, "part": f"batch: {name}", "us_per_image": (time.process_time() - start) / 20 / BATCH * 1e6})
    return rows


if __name__ == "__main__":
    print(json.dumps(main("--quick" in sys.argv), indent=1))
