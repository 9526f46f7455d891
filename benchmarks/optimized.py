"""B0 optimised, batch 1, one thread: beside itself and timm's, eager and compiled, all channels-last, in turn, with the same weights.

Compiled: torch.compile with the weights as constants, its fastest form on a CPU, in bfloat16 under autocast; `optimize(compile=True)` tries
that too. Compiling takes a quarter of a minute each and is not timed. Errors: the largest
difference from timm's eager logits, as a share of the largest logit. Classes: how many of 256 ImageNet pictures V2-B0's own weights
classify otherwise once optimised (TRISCALE_TEST_DATA; left out where that isn't there). Parts: the fastest of PROFILED runs of each step
of the optimised network; of the eager one, torch's profiler's time by operator, which its own work makes longer.

python -m benchmarks.optimized --quick prints the same from fewer runs and without compiling.
"""

import json
import os
import sys
import tempfile
import time
from collections import Counter
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import timm
import torch

from triscale.families import arch
from triscale.inference import optimize
from triscale.inference.cpu import bfloat16_is_native, compiled
from triscale.inference.executor import execute
from triscale.inference.lowering import lower
from triscale.inference.onednn import OneDNN
from triscale.latency import threads, time_in_turn
from triscale.model import build
from triscale.predict import logits_of_files
from triscale.weights.load import load_weights
from triscale.weights.open import open_model

RUNS, PROFILED, LAST = 60, 40, torch.channels_last
SHARED = Path(os.environ.get("TRISCALE_TEST_DATA", Path(__file__).parent.parent.parent / "shared"))
WEIGHTS = SHARED / "weights/efficientnetv2_b0/tf_efficientnetv2_b0.timm.safetensors"


def networks(image, quick):
    """(library, how) -> network, all of the same weights."""
    peer = timm.create_model("tf_efficientnet_b0").to(memory_format=LAST)
    settle(peer, image)
    net = load_weights(build(arch("efficientnet_b0")), peer.state_dict()).eval().to(memory_format=LAST)
    found = {("timm", "eager"): peer, ("triscale", "eager"): net, ("triscale", "optimised"): optimize(net, precision="float32")}
    if bfloat16_is_native():
        found["triscale", "optimised, bfloat16"] = optimize(net, precision="bfloat16")
    if not quick:
        for library, network in (("timm", peer), ("triscale", net)):
            found[library, "compiled"] = compiled(network, torch.float32)
            if bfloat16_is_native():
                found[library, "compiled, bfloat16"] = compiled(network, torch.bfloat16)
    return found


@contextmanager
def empty_cache():
    """What was measured here before doesn't decide. Gives the folder."""
    before = os.environ.get("TRISCALE_HOME")
    with tempfile.TemporaryDirectory() as home:
        os.environ["TRISCALE_HOME"] = home
        try:
            yield Path(home)
        finally:
            del os.environ["TRISCALE_HOME"]
            if before is not None:
                os.environ["TRISCALE_HOME"] = before


def main(quick=False):
    torch.manual_seed(0)
    image = torch.nn.functional.interpolate(torch.randn(1, 3, 14, 14), 224, mode="bilinear").contiguous(memory_format=LAST)
    with empty_cache() as home, torch.no_grad(), threads(1):
        nets = networks(image, quick)
        logits = {key: net(image) for key, net in nets.items()}
        expected = logits["timm", "eager"]
        errors = {key: ((found - expected).abs().max() / expected.abs().max()).item() for key, found in logits.items()}
        choices = [json.loads(file.read_text()) for file in (home / "tuning").iterdir()]
        ways = {data["of"]["dtypes"][0]: data["choice"] for data in choices}
        timings = time_in_turn({key: partial(net, image) for key, net in nets.items()}, runs=20 if quick else RUNS, threads_used=1)
        return [*rows_of(timings, errors, ways), *parts(nets["triscale", "eager"], image, fuse=ways["torch.float32"] == "onednn fused"), *classes()]


def settle(net, image):
    """Norms take the statistics of the picture and its mirror images, and biases of 0.5 about: else a random network is dead, or chaotic."""
    for m in net.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.momentum = 1.0
            m.weight.data.uniform_(0.5, 1.5)
            m.bias.data.normal_(0.5, 0.5)
    net.train()(torch.cat([image, image.flip(3), image.flip(2), image.flip(2, 3)]))
    net.eval()


def rows_of(timings, errors, ways):
    base = timings["timm", "eager"].median
    for (library, how), t in timings.items():
        way = ways.get("torch.bfloat16" if "bfloat16" in how else "torch.float32") if "optimised" in how else None
        yield {
            "part": "time", "library": library, "how": how, "way": way, "median_ms": 1e3 * t.median, "min_ms": 1e3 * min(t.runs),
            "sd_ms": 1e3 * t.spread, "runs": len(t.runs), "times_timm": base / t.median, "error": errors[library, how],
        }  # fmt: skip


class Timed:
    """An engine whose steps are timed: seconds of each run by method and place."""

    def __init__(self, engine):
        self.engine, self.seconds, self.place = engine, {}, 0

    def __getattr__(self, name):
        method = getattr(self.engine, name)

        def timed(step, *rest):
            start = time.perf_counter()
            result = method(step, *rest)
            self.seconds.setdefault((name, id(step)), []).append(time.perf_counter() - start)
            return result

        return timed


def parts(net, image, fuse):
    """Rows: where the optimised and the eager network spend their time."""
    steps, timed = lower(net), Timed(OneDNN(fuse=fuse))
    for _ in range(PROFILED):
        execute(timed, steps, image)
    found = Counter()
    for (name, _), taken in timed.seconds.items():
        found[name.replace("_", " ")] += 1e3 * min(taken)
    yield from ({"part": "parts", "of": "optimised", "what": what, "ms": ms} for what, ms in found.most_common())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        for _ in range(PROFILED):
            net(image)
    found = Counter()
    for event in profile.key_averages(group_by_input_shape=True):
        found[kind(event.key, event.input_shapes)] += event.self_cpu_time_total / 1e3 / PROFILED
    yield from ({"part": "parts", "of": "eager", "what": what, "ms": ms} for what, ms in found.most_common())


def kind(name, shapes):
    """What an operator of the eager network is there for."""
    weight = shapes[1] if len(shapes) > 1 else []
    if "conv" in name and len(weight) == 4:
        return "1x1 convolutions" if weight[2] == 1 else "depthwise" if weight[1] == 1 else "stem"
    if "silu" in name:
        return "SiLU"
    if name in ("aten::rsqrt", "aten::addcmul") or (name == "aten::mul" and len(shapes[0]) == 4):
        return "batch norms folded at each call"
    if name in ("aten::fill_", "aten::constant_pad_nd", "aten::copy_"):
        return "padding, copies"
    if name in ("aten::addmm", "aten::sum", "aten::div_", "aten::mean", "aten::mul_", "aten::sigmoid"):
        return "squeeze-excitation, classifier"
    return "the rest, mostly calls"


def classes():
    """Rows: pictures whose class changes."""
    files = sorted(str(p) for p in (SHARED / "data/imagenet-samples").rglob("*.JPEG"))
    if not (files and WEIGHTS.is_file()):
        return
    net, card = open_model(WEIGHTS)

    def logits(net):
        return torch.stack([row for _, row in logits_of_files(files, net, card.preprocess, batch_size=8, workers=1)])

    expected = logits(net.to(memory_format=LAST))
    for precision in ("float32", *(["bfloat16"] if bfloat16_is_native() else [])):
        found = logits(optimize(net, precision=precision))
        changed = int((found.argmax(1) != expected.argmax(1)).sum())
        error = ((found - expected).abs().max() / expected.abs().max()).item()
        yield {"part": "classes", "precision": precision, "pictures": len(files), "changed": changed, "error": error}


def described(rows):
    """Parts of the page: tables and sentences."""
    times = [r for r in rows if r["part"] == "time"]
    cells = [
        [
            *(r["library"], r["how"] + (f" ({r['way']})" if r["way"] else ""), f"{r['median_ms']:.2f}", f"{r['min_ms']:.2f}", f"{r['sd_ms']:.2f}"),
            *(f"{r['times_timm']:.2f}", f"{r['error']:.0e}"),
        ]
        for r in times
    ]
    yield ("library", "how", "median ms", "fastest ms", "sd ms", "times timm eager's speed", "largest error"), cells
    changes = [f"{r['changed']} of {r['pictures']} in {r['precision']}" for r in rows if r["part"] == "classes"]
    if changes:
        yield f"ImageNet pictures that V2-B0's weights classify otherwise once optimised: {', '.join(changes)}."
    for of in ("optimised", "eager"):
        found = ", ".join(f"{r['what']} {r['ms']:.1f}" for r in rows if r["part"] == "parts" and r["of"] == of)
        yield f"Where the milliseconds go, {of}: {found}."


if __name__ == "__main__":
    for row in main(quick="--quick" in sys.argv):
        print(json.dumps(row))
