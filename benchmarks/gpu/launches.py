"""Each of our kernels at each shape of a network: time and bandwidth beside the counted bytes.

The launchers of `triscale.kernels`, by the configurations that they hold likeliest, on random tensors; the launches of a measurement
take turns on sets of tensors that together exceed the cache, in one CUDA graph, so that what is timed is the kernels.
"""

import importlib
from functools import partial

import torch

from benchmarks.gpu import timing
from benchmarks.gpu.counting import steps
from triscale.blocks import same_padding
from triscale.families import arch
from triscale.kernels.machine import SHARED, shared_memory

BATCH = {"b0": 256, "b4": 64, "b7": 16}
BEYOND_CACHE = 1 << 28  # bytes of all sets, five times an H200's second-level cache
MOST_SETS = 16
TRIED = 4  # configurations of each step
HALF = torch.bfloat16


def launcher(kind):
    """The function that launches steps of this kind. Raises ImportError where that kernel isn't there yet."""
    module = {"expand": "pointwise", "project": "pointwise", "head": "pointwise"}.get(kind, kind)
    return getattr(importlib.import_module(f"triscale.kernels.{module}"), module)


def padding(step):
    """top, bottom, left, right: SAME's."""
    height, width, _ = step.source
    return *same_padding(height, step.kernel, step.stride), *same_padding(width, step.kernel, step.stride)


def arguments(step, act, batch, parts, device):
    """(positional, named) arguments of the launcher for one set of random tensors, in the types that the engine keeps: matrices in HALF,
    all other weights in fp32. parts: of the sums that a squeeze adds up."""
    tensor = lambda *shape, dtype=HALF, scale=1.0: (scale * torch.randn(shape, device=device)).to(dtype)  # noqa: E731
    (height, width, cin), cout, places = step.source, step.out[2], step.source[0] * step.source[1]
    x, single = tensor(batch, height, width, cin), partial(tensor, dtype=torch.float32)
    bias = single(cout)
    window = {"stride": step.stride, "pad": padding(step)}
    if step.kind == "stem":
        x = torch.randint(0, 256, x.shape, device=device, dtype=torch.uint8)
        mean, inv_std = torch.full((3,), 120.0, device=device), torch.full((3,), 1 / 60, device=device)
        return (x, single(step.kernel, step.kernel, cin, cout, scale=0.2), bias, mean, inv_std), {**window, "act": act}
    if step.kind == "depthwise":
        return (x, single(step.kernel, step.kernel, cout, scale=0.2), bias), {**window, "act": act, "pool": step.vectors > 0}
    if step.kind == "squeeze":
        r, layer = step.squeezed, partial(single, scale=cout**-0.5)
        return (single(batch, parts, cout), places, layer(r, cout), single(r), layer(cout, r), bias), {"act": act}
    more = {"act": "none" if step.kind == "project" else act, "pool": step.kind == "head"}
    if step.gated:
        more["gate"] = torch.rand(batch, cin, device=device)
    if step.residual:
        more["residual"] = tensor(batch, *step.out)
    return (x, tensor(cin, cout, scale=cin**-0.5), bias), more


def configurations(step, batch, parts, shared=SHARED):
    """The ways to cut a step that its kernel would try, the likely fastest first. shared: bytes that a program may have."""
    (height, width, cin), cout, places = step.source, step.out[2], step.source[0] * step.source[1]
    if step.kind == "stem":
        from triscale.kernels.stem import configs

        return configs(*step.out[:2])
    if step.kind == "depthwise":
        from triscale.kernels.tiling import Shape, configs

        return configs(Shape(batch, height, width, cin, step.kernel, step.stride, padding(step)), pool=step.vectors > 0)
    if step.kind == "squeeze":
        from triscale.kernels.squeeze import configs

        return configs(batch, parts, cout, step.squeezed, shared=shared)
    from triscale.kernels.pointwise_tiles import configs

    kind = {"gated": step.gated, "residual": step.residual, "pool": step.kind == "head"}
    return configs(batch * places, places, cin, cout, **kind, shared=shared)


def run(run, name):
    """The first choices of all steps, then the second of all, as far as time goes."""
    from triscale.kernels.machine import unsupported

    if why := unsupported(run.device):
        run.record.note(why)
        return
    network = arch(f"efficientnet_{name}")
    found = steps(network, 32 if run.rehearsal else None, pixel=1)
    if run.rehearsal:  # the interpreter takes seconds a launch: the first step of each kind
        found = list({step.kind: step for step in reversed(found)}.values())[::-1]
    parts = {}
    for rank in range(1 if run.rehearsal else TRIED):
        for step in found:
            label = f"{step.key}, choice {rank + 1}"
            if step.kind == "squeeze" and step.place not in parts:
                if not rank:
                    run.record.note(f"{step.key}: left out, for its depthwise step, by which it gets its sums, didn't run")
                continue
            run.attempt(label, partial(_add, run, name, step, rank, network.numerics.activation, parts), like=step.kind, guess=10)


def _add(run, name, step, rank, act, parts):
    """parts: of the sums, by place; filled by the first depthwise choice that runs, for the squeeze that follows."""
    batch = 1 if run.rehearsal else BATCH[name]
    choices = configurations(step, batch, parts.get(step.place, 1), shared_memory(run.device))
    if rank >= len(choices):
        return
    moved, launch = batch * step.bytes, launcher(step.kind)
    sets = 1 if run.rehearsal else min(MOST_SETS, 1 + BEYOND_CACHE // moved)
    try:
        with torch.inference_mode():
            calls = []
            for _ in range(sets):
                positional, named = arguments(step, act, batch, parts.get(step.place, 1), run.device)
                calls.append(partial(launch, *positional, **named, config=choices[rank]))
            result = calls[0]()
            if step.kind == "depthwise" and result[1] is not None:
                parts.setdefault(step.place, result[1].shape[1])
            result = None
            found = timing.in_turn({"": timing.together(calls, run.device)}, run.device, runs=run.runs)[""]
    finally:
        calls = None
        timing.forget(run.device)
    times = timing.columns([ms / sets for ms in found])
    about = {"network": name, "key": step.key, "config": str(choices[rank]), "rank": rank}
    run.record.add("kernel", **about, batch=batch, bytes=moved, bytes_per_s=1e3 * moved / times["ms"], **times)
