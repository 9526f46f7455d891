"""JPEG decoding on the device, images/s: torchvision's nvJPEG alone, ours with crop and resize to 224 px, and both on the CPU.

The pictures of each carried pack, in batches; bytes are in memory already.
"""

import numpy as np
import torch

from benchmarks.gpu import timing
from triscale.data.datasets import find
from triscale.data.jpeg import read_square
from triscale.data.jpeg_cuda import decode_on_gpu
from triscale.recipe import Preprocess

BATCHES = (64, 256)
SIZE = 224


def pictures(pack):
    """The image files of a pack, as bytes."""
    listing = find(str(pack), draw=False)
    return [bytes(part.read(i)) for part in (listing.train, listing.held_out) for i in range(len(part))]


def run(run):
    for pack in run.found.packs:
        datas = pictures(pack)
        for batch in (2,) if run.rehearsal else BATCHES:
            run.attempt(f"{pack.name}, batch {batch}", lambda d=datas, n=batch, name=pack.name: _add(run, name, d, n), guess=20)


def _add(run, data, datas, batch):
    from torchvision.io import ImageReadMode, decode_jpeg

    some = (datas * (1 + batch // len(datas)))[:batch]
    encoded = [torch.frombuffer(bytearray(d), dtype=torch.uint8) for d in some]
    box, device = Preprocess(SIZE), str(run.device)
    out = np.empty((SIZE, SIZE, 3), np.uint8)
    ways = {
        "torchvision, device": lambda: decode_jpeg(encoded, mode=ImageReadMode.RGB, device=device),
        f"triscale, device, to {SIZE} px": lambda: decode_on_gpu(some, [box] * batch, SIZE, run.device),
        "torchvision, CPU": lambda: [decode_jpeg(e, mode=ImageReadMode.RGB) for e in encoded],
        f"triscale, CPU, to {SIZE} px": lambda: [read_square(d, out, box) for d in some],
    }
    here = decode_on_gpu(some, [box] * batch, SIZE, run.device).on_cpu
    found = timing.in_turn(ways, run.device, runs=run.runs, seconds=min(60, max(run.left() / 3, 0)), latency=True)
    for way, runs in found.items():
        times = timing.columns(runs)
        on_cpu = len(here) if way.startswith("triscale, device") else batch * ("CPU" in way)
        run.record.add("decode", data=data, way=way, images_per_s=1e3 * batch / times["ms"], on_cpu=on_cpu, batch=batch, **times)
