"""Both searches on real images with two cores, and what they found trained anew: python -m studies.search.run DATA [--out FOLDER].

The commands are those of the README. Then the best network and the reference, scaled to the same multiply-adds, are trained on all
training images by another recipe, three seeds each, and judged on the test images, which the search has not seen.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shlex
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
COEFFICIENTS = "search coefficients {data} --arch {here}/base.json --trials 12 --epochs 4 --out {out}/coefficients --no-cache"
NETWORK = "search network {data} --arch efficientnet_b0 --resolution 32 --macs 4M --trials 24 --out {out}/network --no-cache"
SEEDS, EPOCHS = 3, 20


def command(line: str) -> float:
    """Runs triscale; returns the seconds it took."""
    print(f"triscale {line}", flush=True)
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "triscale", *shlex.split(line)], check=True)
    return time.perf_counter() - began


def retrain(job: tuple[str, str, str, int]) -> dict[str, Any]:
    """One training of (label, network as JSON, data, seed) on one thread."""
    import torch

    from triscale.architecture import Arch
    from triscale.classify import prepare, preprocess_for, train_classifier
    from triscale.classify.events import Evaluated
    from triscale.cost_model import cost
    from triscale.data.datasets import find
    from triscale.recipes import named

    torch.set_num_threads(1)
    label, text, source, seed = job
    arch = Arch.from_json(text)
    recipe = replace(named("small"), epochs=EPOCHS, norm_momentum=0.1, seed=seed)
    preprocess = preprocess_for(arch.resolution, 3)
    listing = find(source, None)
    data = prepare(listing, preprocess, recipe)
    began, top1 = time.perf_counter(), 0.0
    for event in train_classifier(data, arch, preprocess, recipe, evaluate_every=EPOCHS):
        if isinstance(event, Evaluated):
            top1 = event.top1
    c = cost(arch, len(listing.classes))
    return {"network": label, "seed": seed, "top1": round(top1, 4), "macs": c.macs, "params": c.params, "seconds": round(time.perf_counter() - began)}


def at_least(reference: Any, macs: int) -> Any:
    """The reference made wider and deeper until it costs as much: the cheapest such one that costs no less."""
    from triscale.cost_model import cost
    from triscale.scaling import scale

    tried = [scale(reference, depth=depth, width=1 + w / 50) for depth in (1.0, 2.0, 3.0) for w in range(200)]
    return min((arch for arch in tried if cost(arch, 10).macs >= macs), key=lambda arch: cost(arch, 10).macs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", help="the images, as for triscale train")
    parser.add_argument("--out", type=Path, default=Path("runs/study-search"))
    given = parser.parse_args()
    from triscale.architecture import Arch
    from triscale.cost_model import cost

    values = {"data": given.data, "here": HERE, "out": given.out}
    seconds = {name: command(line.format(**values)) for name, line in (("coefficients", COEFFICIENTS), ("network", NETWORK))}
    best, reference = (Arch.from_json((given.out / "network" / f"{name}.json").read_text()) for name in ("best", "reference"))
    equal = at_least(reference, cost(best, 10).macs)
    jobs = [(label, arch.to_json(), given.data, seed) for seed in range(SEEDS) for label, arch in (("found", best), ("reference", equal))]
    cores = len(os.sched_getaffinity(0))
    with multiprocessing.get_context("spawn").Pool(min(cores, len(jobs))) as pool:
        rows = list(pool.imap(retrain, jobs))
    for row in rows:
        print(json.dumps(row))
    results = {"format": 1, "cores": cores, "seconds": {k: round(v) for k, v in seconds.items()}, "epochs": EPOCHS, "trainings": rows}
    (given.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
