"""B0, batch 1, one thread: ours beside timm's and torchvision's eager modules, each in both memory formats, in turn."""

import copy

import timm
import torch
import torchvision

from triscale.families import arch
from triscale.latency import time_in_turn
from triscale.model import build

RUNS = 60


def networks():
    b0 = arch("efficientnet_b0")
    return {
        ("triscale", "same"): build(b0),
        ("timm", "same"): timm.create_model("tf_efficientnet_b0"),
        ("triscale", "symmetric"): build(b0.with_numerics(padding="symmetric", norm_eps=1e-5)),
        ("timm", "symmetric"): timm.create_model("efficientnet_b0"),
        ("torchvision", "symmetric"): torchvision.models.efficientnet_b0(),
    }


def main():
    torch.manual_seed(0)
    image = torch.randn(1, 3, 224, 224)
    calls = {}
    for key, net in networks().items():
        for name, layout in (("NCHW", torch.contiguous_format), ("channels-last", torch.channels_last)):
            same = copy.deepcopy(net).eval().to(memory_format=layout)
            x = image.contiguous(memory_format=layout)
            calls[(*key, name)] = lambda n=same, x=x: n(x)
    with torch.no_grad():
        timings = time_in_turn(calls, runs=RUNS, threads_used=1)
    return rows_of(timings)


def rows_of(timings):
    """(library, padding, format) -> Timing, as rows in ms."""
    return [
        {
            "library": k[0],
            "padding": k[1],
            "format": k[2],
            "median_ms": 1e3 * t.median,
            "min_ms": 1e3 * min(t.runs),
            "sd_ms": 1e3 * t.spread,
            "runs": len(t.runs),
        }
        for k, t in timings.items()
    ]


def ratios(rows, formats=("NCHW", "channels-last")):
    """Ours over each peer's, same padding, each in its better one of the formats."""
    best = {}
    for r in (r for r in rows if r["format"] in formats):
        key = (r["library"], r["padding"])
        if key not in best or r["median_ms"] < best[key]["median_ms"]:
            best[key] = r
    return [
        {"against": library, "padding": padding, "ratio": best["triscale", padding]["median_ms"] / peer["median_ms"]}
        for (library, padding), peer in best.items()
        if library != "triscale"
    ]
