"""What a user waits for before anything is computed: import, --help, cost, fit_budget, build."""

import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
from PIL import Image

from triscale.cost_model import _cost, cost
from triscale.families import arch
from triscale.imagenet import class_names
from triscale.recipe import Preprocess

RUNS = 20
# What, the limit that the project sets itself in ms.
LIMITS = {
    "import triscale": 50,
    "triscale --help": 300,
    "cost of B7": 1,
    "cost of B7 with peak memory": None,
    "fit_budget of B0": 50,
    "build of B7": 2000,
    "triscale predict of one JPEG, B0 weights on disk": 3500,
}


def milliseconds(call, runs=RUNS, before=lambda: None):
    out = []
    for _ in range(runs):
        before()
        start = time.perf_counter()
        call()
        out.append(1e3 * (time.perf_counter() - start))
    return out


def forget():
    """Nothing that an earlier call has worked out is kept."""
    from triscale.memory_model import _block_part

    _cost.cache_clear()
    _block_part.cache_clear()


def main():
    from triscale.budget import fit_budget

    python = [sys.executable, "-c"]
    timed_import = (
        "import time; t = time.perf_counter(); import triscale; print(1e3 * (time.perf_counter() - t)); import sys; assert 'torch' not in sys.modules"
    )
    imports = [float(subprocess.run([*python, timed_import], capture_output=True, text=True, check=True).stdout) for _ in range(RUNS)]
    run_help = [sys.executable, "-m", "triscale", "--help"]
    b0, b7 = arch("efficientnet_b0"), arch("efficientnet_b7")
    figures = {
        "import triscale": imports,
        "triscale --help": milliseconds(lambda: subprocess.run(run_help, capture_output=True, check=True)),
        "cost of B7": milliseconds(lambda: cost(b7), before=forget),
        "cost of B7 with peak memory": milliseconds(lambda: cost(b7).memory, before=forget),
        "fit_budget of B0": milliseconds(lambda: fit_budget(b0, macs=2e9, params=10e6, memory=200e6), before=forget),
    }
    from triscale.model import build
    from triscale.weights.model_file import ModelCard, save_model

    figures["build of B7"] = milliseconds(lambda: build(b7), runs=5)
    with tempfile.TemporaryDirectory() as folder:
        pixels = np.random.default_rng(0).integers(0, 256, (375, 500, 3), np.uint8)
        Image.fromarray(pixels).save(f"{folder}/a.jpg")
        save_model(f"{folder}/b0.safetensors", build(b0), ModelCard(b0, Preprocess(224), class_names(1000)))
        predict = [sys.executable, "-m", "triscale", "predict", f"{folder}/a.jpg", "--weights", f"{folder}/b0.safetensors"]
        subprocess.run(predict, capture_output=True, check=True)
        figures["triscale predict of one JPEG, B0 weights on disk"] = milliseconds(
            lambda: subprocess.run(predict, capture_output=True, check=True), runs=7
        )
    rows = []
    for name, values in figures.items():
        median = statistics.median(values)
        rows.append({"what": name, "limit_ms": LIMITS[name], "median_ms": median, "min_ms": min(values), "max_ms": max(values), "runs": len(values)})
    return rows
