"""JPEG decoding on the device, images/s: torchvision's nvJPEG alone, ours with crop and resize to 224 px, and both on the CPU.

The pictures of each carried pack, in batches; bytes are in memory already. On the CPU they are decoded one after another, by one thread.
"""

from functools import partial

import numpy as np
import torch

from benchmarks.gpu import timing
from triscale.data.datasets import find
from triscale.data.jpeg import read_square
from triscale.data.jpeg_cuda import decode_on_gpu
from triscale.recipe import Preprocess

BATCHES = (64, 256)
SIZE = 224


def listing(pack):
    return find(str(pack), draw=False)


def pictures(pack, *, labels=False):
    """The image files of a pack, as bytes; with `labels` also the number of each one's class, as the listing's `classes` has it."""
    found = listing(pack)
    parts = found.train, found.held_out
    datas = [bytes(part.read(i)) for part in parts for i in range(len(part))]
    return (datas, [int(label) for part in parts for label in part.labels]) if labels else datas


def run(run):
    for pack in run.found.packs:
        datas = pictures(pack)
        for batch in (2,) if run.rehearsal else BATCHES:
            some = (datas * (1 + batch // len(datas)))[:batch]
            for way, (call, on_cpu) in ways(some, run.device).items():
                run.attempt(f"{pack.name}, {way}, batch {batch}", partial(_add, run, pack.name, way, batch, call, on_cpu), like=way, guess=20)


def ways(datas, device):
    """{way: (a call that decodes them all, one that gives how many of them the CPU decodes)}."""
    from torchvision.io import ImageReadMode, decode_jpeg

    encoded = [torch.frombuffer(bytearray(d), dtype=torch.uint8) for d in datas]
    boxes, everyone = [Preprocess(SIZE)] * len(datas), lambda: len(datas)
    out = np.empty((SIZE, SIZE, 3), np.uint8)
    ours = partial(decode_on_gpu, datas, boxes, SIZE, device)
    return {
        "torchvision, device": (lambda: decode_jpeg(encoded, mode=ImageReadMode.RGB, device=str(device)), lambda: 0),
        f"triscale, device, to {SIZE} px": (ours, lambda: len(ours().on_cpu)),
        "torchvision, CPU, 1 thread": (lambda: [decode_jpeg(e, mode=ImageReadMode.RGB) for e in encoded], everyone),
        f"triscale, CPU, 1 thread, to {SIZE} px": (lambda: [read_square(d, out, boxes[0]) for d in datas], everyone),
    }


def _add(run, data, way, batch, call, on_cpu):
    found = timing.in_turn({"": call}, run.device, runs=run.runs, seconds=min(15, max(run.left() / 3, 0)), latency=True)[""]
    times = timing.columns(found)
    run.record.add("decode", data=data, way=way, images_per_s=1e3 * batch / times["ms"], on_cpu=on_cpu(), batch=batch, **times)
