"""Optimised networks beside timm's, eager and compiled, timed in turn in one run; and the classes that optimising changes.

Rates: each at its best batch so far known, of batches that lie on the device. Latency: batch 1, waited for on the host's clock; timm
compiled with mode="reduce-overhead". Ours is optimised from the fp32 network and takes bf16 batches, as the peers do. Each batch
size is tuned when it is first seen, for a minute or two, and kept on disk: the same part run again gets further.
"""

from functools import partial

import torch

from benchmarks.gpu import timing
from benchmarks.gpu.decode import pictures
from benchmarks.gpu.peers import COMPILE_S, LAST, SAMPLE_S, START, Case, compiled, forward_call, make, pixels
from benchmarks.gpu.sweep import best_batch
from triscale.families import arch
from triscale.model import build

BATCH = {"b0": 512, "b4": 128, "b7": 32}  # of ours, where no earlier record knows better
TRIALS = 256  # pictures that classes are compared on
IN_TURN_S = 60.0
TUNE_S = {"b0": 90, "b4": 120, "b7": 120}  # a guess, until one was seen


def best_before(rows, library, way):
    """The best batch by these rows, None where they don't tell."""
    found = {
        r["batch"]: r["images_per_s"] for r in rows if r["kind"] == "network" and (r["library"], r["way"], r["mode"]) == (library, way, "inference")
    }
    return best_batch(found) if found else None


def run(run, name):
    from triscale.inference import optimize

    torch.manual_seed(0)
    px, device = pixels(run, name), run.device
    net = optimize(build(arch(f"efficientnet_{name}")).eval().to(device))
    peer = make("timm", name).eval().to(device, torch.bfloat16, memory_format=LAST)
    tune, compiling = {"like": "tune", "guess": TUNE_S[name]}, {"like": "compile", "guess": COMPILE_S["inference"][name]}
    earlier = run.earlier(f"peers-inference-{name}")

    def case(library, way, calls):
        return Case(run, name, library, way, "inference", calls)

    def call_of(module):
        return lambda batch: forward_call(module, batch, px, device)

    batch = 2 if run.rehearsal else best_before(run.before, "triscale", "ours") or BATCH[name]
    ours, eager = case("triscale", "ours", call_of(net)), case("timm", "eager", call_of(peer))
    rates, waits = {}, {}
    if run.attempt(f"ours, batch {batch}", lambda: ours.add(batch), **tune):
        rates["triscale ours"] = batch, call_of(net)(batch)
    start = run.most if run.rehearsal else START["inference"][name]
    top = best_before(earlier, "timm", "eager") or run.attempt("timm eager", lambda: eager.best(start), guess=30)
    if top:
        rates["timm eager"], waits["timm eager"] = (top, call_of(peer)(top)), (1, call_of(peer)(1))
        _compile(run, rates, peer, best_before(earlier, "timm", "compiled") or top, px, compiling)
    run.attempt("rates in turn", lambda: _in_turn(run, name, rates, "inference"), guess=SAMPLE_S)
    rates.clear()
    timing.forget(device)
    if run.attempt("ours, batch 1", lambda: call_of(net)(1)() is not None, **tune):
        waits["triscale ours"] = 1, call_of(net)(1)
    _compile(run, waits, peer, 1, px, compiling, mode="reduce-overhead")
    run.attempt("latency in turn", lambda: _in_turn(run, name, waits, "latency"), guess=SAMPLE_S)
    for other in (2 * batch, batch // 2):
        run.attempt(f"ours, batch {other}", partial(ours.add, other), **tune)


def _compile(run, calls, peer, batch, px, how, mode=None):
    """Puts timm's compiled call of that batch among `calls`, where it compiles in time."""
    call = forward_call(compiled(run, peer, mode=mode), batch, px, run.device)
    if run.attempt(f"timm compiled, batch {batch}", lambda: call() is not None, **how):
        calls["timm compiled"] = batch, call


def _in_turn(run, name, calls, mode):
    """Rows of all `calls` (name: (batch, call)), and of ours against each other one."""
    latency, seconds = mode == "latency", min(IN_TURN_S, max(run.left() / 2, 0))
    only = {key: call for key, (_, call) in calls.items()}
    found = timing.in_turn(only, run.device, runs=run.runs * (10 if latency else 2), seconds=seconds, latency=latency)
    rates = {}
    for key, runs_ms in found.items():
        batch, (library, way) = calls[key][0], key.split()
        rates[key] = [1e3 * batch / ms for ms in runs_ms]
        times = timing.columns(runs_ms)
        rate = {"batch": batch, "px": pixels(run, name), "images_per_s": 1e3 * batch / times["ms"]}
        run.record.add("in turn", library=library, network=name, way=way, mode=mode, **rate, **times)
    for key, peers_rates in rates.items():
        if key != "triscale ours" and "triscale ours" in rates:
            times = sorted(a / b for a, b in zip(rates["triscale ours"], peers_rates, strict=True))
            middle = times[len(times) // 2]
            run.record.add("comparison", network=name, mode=mode, against=key, times=middle, times_min=times[0], times_max=times[-1])


def top1(run):
    """Each carried weight file on the first pack: the optimised network's classes against the fp32 network's, same device, same inputs."""
    from triscale.weights.open import open_model

    for file in run.found.weights:
        run.attempt(file.name, lambda file=file: _agreement(run, *open_model(file)), guess=30)


def _agreement(run, net, card):
    from triscale.data.normalising import normalise
    from triscale.inference import optimize

    images = squares(pictures(run.found.packs[0])[: 4 if run.rehearsal else TRIALS], card.preprocess)
    inputs = normalise(images.to(run.device), card.preprocess).contiguous(memory_format=LAST)
    net = net.eval().to(run.device)
    # The reference is fp32 proper: a GPU's tensor cores would round its products to TF32.
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        plain = torch.cat([net(part) for part in inputs.split(64)])
    fast = optimize(net)
    ours = torch.cat([fast(part) for part in inputs.split(64)])
    different, change = int((plain.argmax(1) != ours.argmax(1)).sum()), float((plain.softmax(1) - ours.softmax(1)).abs().max())
    run.record.add("agreement", network=card.arch.name, images=len(images), different=different, largest_change=change)


def squares(datas, preprocess):
    """(N, C, S, S) uint8 of image files, on the CPU."""
    import numpy as np

    from triscale.data.jpeg import read_square

    out = np.empty((len(datas), preprocess.size, preprocess.size, preprocess.channels), np.uint8)
    for data, place in zip(datas, out, strict=True):
        read_square(data, place, preprocess)
    return torch.from_numpy(out).permute(0, 3, 1, 2)
