"""bench and reproduce: what was measured and counted, beside the paper's."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from triscale.commands.networks import read_arch
from triscale.quantities import short
from triscale.text import aligned

if TYPE_CHECKING:
    from triscale.inference import Optimized

PAPER_TABLE_4 = "The paper's Table 4 (one core of a Xeon E5-2690): ResNet-152 0.554 s, EfficientNet-B1 0.098 s, a ratio of 5.7."


def bench(
    names: list[str],
    /,
    *,
    relative_to: str | None = None,
    batch: int = 1,
    threads: int = 1,
    runs: int = 20,
    device: str = "cpu",
    engine: Literal["auto", "torch"] | None = None,
) -> int:
    """Latency of networks by the paper's Table 4 protocol: batch 1, one CPU thread, 20 runs, mean and spread.

    The networks take turns, run by run, so that a machine whose speed drifts treats them alike.

    Args:
        names: networks or .json files; resnet152 and efficientnet_b1, the paper's pair, unless given.
        relative_to: the network that the ratio column divides by; the last one unless given.
        batch: images at a time.
        threads: CPU threads.
        runs: timed runs of each network.
        device: cpu, cuda, auto (cuda where there is one), or another device of torch.
        engine: auto, what is fastest (in bfloat16 where the device multiplies it; on an NVIDIA GPU through kernels of our own), or torch,
            the network as it is; on a CPU torch unless given, which is the paper's protocol.
    """
    if min(batch, runs) < 1:
        raise ValueError(f"--batch and --runs: expected 1 or more, found {batch} and {runs}")
    archs = {name: read_arch(name) for name in names or ["resnet152", "efficientnet_b1"]}
    reference = relative_to or list(archs)[-1]
    archs.setdefault(reference, read_arch(reference))
    import torch

    from triscale.commands.running import available, notices
    from triscale.cost_model import cost
    from triscale.inference import optimize
    from triscale.latency import forward_call, time_in_turn
    from triscale.model import build

    device = available(device)
    fast = (engine or ("torch" if device == "cpu" else "auto")) == "auto"
    torch.set_flush_denormal(True)  # random deep networks fade into denormals, which trained ones don't have
    torch.manual_seed(0)
    tell = notices("triscale bench")
    nets = {n: optimize(build(a).to(device).eval(), engine="auto" if fast else "torch", tell=tell) for n, a in archs.items()}
    calls = {n: forward_call(net, torch.randn(batch, 3, *[archs[n].resolution] * 2, device=device)) for n, net in nets.items()}
    timings = time_in_turn(calls, runs=runs, threads_used=threads, device=device)
    base = timings[reference].median
    rows = []
    for name, t in timings.items():
        seconds = [f"{1e3 * v:.1f}" for v in (t.mean, t.spread, t.median, min(t.runs))]
        macs = cost(archs[name]).macs
        rate = f"{macs * batch / t.median / 1e9:.1f}"
        rows.append((name, f"{archs[name].resolution}", short(macs), *seconds, rate, f"{t.median / base:.2f}"))
    where = f"{threads} thread{'s' * (threads > 1)}" if device == "cpu" else device
    print(f"batch {batch}, {where}, {runs} runs in turn, torch {torch.__version__}, {_computed(nets.values())}, in ms")
    print(aligned(("network", "px", "MACs", "mean", "sd", "median", "fastest", "GMAC/s", f"/ {reference}"), rows))
    if {"resnet152", "efficientnet_b1"} <= set(archs):
        print(f"\n{PAPER_TABLE_4}")
        print(f"Here, medians: {timings['resnet152'].median / timings['efficientnet_b1'].median:.1f}.")
    return 0


def _computed(nets: Iterable[Optimized]) -> str:
    """How the networks were computed, in words."""
    ways = sorted({way for net in nets for way in (["eager"] if isinstance(net.engine, str) else net.engine.used)})
    return "eager, channels-last, float32" if ways == ["eager"] else f"optimised ({', '.join(ways)})"


def reproduce(name: str, /, out: Path | None = None, study: Path | None = None) -> int:
    """A table or figure of the paper, ours beside the paper's, with the difference.

    Args:
        name: table1, table2, table3, table5, table7, figure1, figure3, figure4, figure5 or figure8.
        out: where a figure is written, a .png file or a folder; runs/reproduce unless given.
        study: the folder of a study's results.jsonl, for table5, table7 and figures 3, 4 and 8; a clone's own results unless given.
    """
    from triscale.reproduce import render, reproduce

    if out is None and name.startswith("figure"):
        out = Path("runs/reproduce")
    result = reproduce(name, out, study)
    print(render(result, shutil.get_terminal_size((160, 24)).columns))
    return 0
