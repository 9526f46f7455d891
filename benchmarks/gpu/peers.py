"""timm's and torchvision's networks, eager and compiled, bf16, channels-last: best batch, images/s, peak memory, latency.

Inference: weights in bf16, inference mode. Training: weights in fp32 under bf16 autocast, cross-entropy, SGD with momentum, dropout and
drop-path as in the paper for both. timm's are the TensorFlow-padded ones, which compute what ours do; torchvision's pad
symmetrically, which saves it copies. Compiled: torch.compile with static shapes, by the modes that WAYS names; frozen: the norms
folded into constant weights (inductor's freezing). Input is on the device already. Each case has a network of its own, alone
on the device, so that its peak memory is its own.
"""

import contextlib
import copy
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

from benchmarks.gpu import timing
from benchmarks.gpu.counting import largest_batch, steps
from benchmarks.gpu.machine import have
from benchmarks.gpu.sweep import best_batch, sweep
from triscale.families import arch

CLASSES = 1000
LAST = torch.channels_last
START = {"inference": {"b0": 64, "b4": 16, "b7": 8}, "training": {"b0": 32, "b4": 8, "b7": 4}}
COMPILE_S = {"inference": {"b0": 45, "b4": 80, "b7": 120}, "training": {"b0": 80, "b4": 150, "b7": 240}}  # guesses, until one was seen
SAMPLE_S = 6.0  # of timing one case
DROP_PATH = 0.2  # of the deepest block


class Way(NamedTuple):
    """mode: torch.compile's."""

    mode: str | None = None
    frozen: bool = False


WAYS = {
    "compiled": Way(),
    "compiled, frozen": Way(None, True),
    "compiled, reduce-overhead": Way("reduce-overhead"),
    "compiled, frozen, reduce-overhead": Way("reduce-overhead", True),
    "compiled, frozen, max-autotune": Way("max-autotune-no-cudagraphs", True),
}


def make(library, name):
    """The network with random weights, in training mode; dropout and drop-path as in the paper, which timm leaves out unless asked."""
    if library == "timm":
        import timm

        dropout = arch(f"efficientnet_{name}").dropout
        return timm.create_model(f"tf_efficientnet_{name}", drop_rate=dropout, drop_path_rate=DROP_PATH)
    import torchvision

    return getattr(torchvision.models, f"efficientnet_{name}")(stochastic_depth_prob=DROP_PATH)  # its own dropout is the paper's


def libraries():
    return [name for name in ("timm", "torchvision") if have(name)]


def pixels(run, name):
    return 32 if run.rehearsal else arch(f"efficientnet_{name}").resolution


def most_images(run, name):
    """The largest batch of a sweep: twice the one whose largest feature map has up to 2^31 elements, beyond which some refuse."""
    return min(run.most, 2 * largest_batch(steps(arch(f"efficientnet_{name}"))))


def compiled(run, net, way):
    """x -> net(x), compiled by WAYS[way] at each new shape; a rehearsal compiles without inductor, which takes a minute.

    Static shapes: each batch size compiles anew, so torch's limit of recompilations, past which it runs eagerly, is lifted.
    """
    import torch._inductor.config as inductor

    torch._dynamo.config.recompile_limit = 256
    torch._dynamo.config.accumulated_recompile_limit = 4096
    how, seen = WAYS[way], set()
    # Written out, so that they differ: of one network compiled twice with equal options torch runs the same code.
    options = {**(torch._inductor.list_mode_options(how.mode) if how.mode else {}), "freezing": how.frozen}
    made = torch.compile(net, dynamic=False, **({"backend": "eager"} if run.rehearsal else {"options": options}))

    def call(x):
        # torch looks at the setting when it traces, too: given as an option alone it comes too late, and freezes nothing.
        with inductor.patch(freezing=True) if how.frozen and x.shape not in seen else contextlib.nullcontext():
            out = made(x)
        seen.add(x.shape)
        return out

    return call


def forward_call(net, batch, px, device, *, pixels=False):
    """A call without arguments: inference of one batch that lies on the device; pixels: as uint8."""
    x = torch.randint(0, 256, (batch, 3, px, px), device=device, dtype=torch.uint8) if pixels else torch.randn(batch, 3, px, px, device=device)
    x = x.to(torch.uint8 if pixels else torch.bfloat16).contiguous(memory_format=LAST)

    def call():
        with torch.inference_mode():
            return net(x)

    return call


def step_call(net, optimizer, batch, px, device):
    """A call without arguments: one training step."""
    x = torch.randn(batch, 3, px, px, device=device).contiguous(memory_format=LAST)
    y = torch.randint(0, CLASSES, (batch,), device=device)

    def call():
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16):
            loss = F.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()

    return call


class Case:
    """One library's network one way. calls: batch -> a call without arguments, with all that it needs. add: measures a batch and records it.

    used: what is recorded as such. drop: whether torch's compiler forgets after each batch what it made.
    """

    def __init__(self, run, name, library, way, mode, calls, *, used=lambda: None, drop=False):
        self.run, self.about, self.calls, self.used, self.drop = (
            run,
            {"library": library, "network": name, "way": way, "mode": mode},
            calls,
            used,
            drop,
        )
        self.px, self.name = pixels(run, name), name

    def add(self, batch):
        """Images/s. Raises DeviceLostError."""
        run, row = self.run, None
        try:
            row = self._row(batch)
        except RuntimeError:
            run.sound()
            raise
        finally:
            if self.drop:
                torch.compiler.reset()
            timing.forget(run.device)
        run.record.add("network", **self.about, used=self.used(), **row)
        return row["images_per_s"]

    def _row(self, batch):
        """The columns batch to runs of a "network" row, measured now."""
        run, latency = self.run, self.about["mode"] == "latency"
        before = timing.held(run.device)
        call = self.calls(batch)
        call()  # compiles, tunes, and lets cuDNN try its algorithms, all of which takes more memory than what comes of it
        seconds = min(SAMPLE_S, max(run.left() / 4, 0))
        runs = run.runs * (10 if latency else 1)
        timed = partial(timing.in_turn, {"": call}, run.device, runs=runs, seconds=seconds, latency=latency, group_ms=run.group_ms)
        found, peak = timing.peak_of(timed, run.device)
        times = timing.columns(found[""])
        rate = {"images_per_s": 1e3 * batch / times["ms"], "peak_bytes": None if peak is None else peak - before}
        return {"batch": batch, "px": self.px, **rate, **times}

    @property
    def label(self):
        return f"{self.about['library']} {self.about['way']}, {self.about['mode']}"

    def best(self, start):
        """The best batch of a sweep from `start`, 0 where not even that one runs."""
        found, ended = sweep(self.add, start, most=most_images(self.run, self.name), left=lambda: self.run.left() > 10)
        self.run.record.note(f"{self.label}: {ended}")
        return best_batch(found) if found else 0


def fresh(kept, library, name):
    """A network of its own, on the CPU. kept: {library: network}, of those built before."""
    if library not in kept:
        kept[library] = make(library, name)
    return copy.deepcopy(kept[library])


def inference(run, name):
    """All that is measured of inference: "network" rows."""
    px, device, kept = pixels(run, name), run.device, {}

    def calls(library, way, batch):
        net = fresh(kept, library, name).eval().to(device, torch.bfloat16, memory_format=LAST)
        return forward_call(net if way == "eager" else compiled(run, net, way), batch, px, device)

    def case(library, way, mode="inference"):
        return Case(run, name, library, way, mode, partial(calls, library, way), drop=way != "eager")

    measure(run, name, "inference", case)


def training(run, name):
    """As `inference`, of training steps."""
    px, device, kept = pixels(run, name), run.device, {}

    def calls(library, way, batch):
        net = fresh(kept, library, name).train().to(device, memory_format=LAST)
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9, foreach=True)
        return step_call(net if way == "eager" else compiled(run, net, way), optimizer, batch, px, device)

    def case(library, way, mode="training"):
        return Case(run, name, library, way, mode, partial(calls, library, way), drop=way != "eager")

    measure(run, name, "training", case)


def measure(run, name, mode, case):
    """What matters most first: eager sweeps; compiled at the eager best; latency; then other modes, and twice and half that batch."""
    start, guess = 2 if run.rehearsal else START[mode][name], COMPILE_S[mode][name]

    def at(library, way, batch, of=mode, like="compile"):
        kind = {} if way == "eager" else {"like": like, "guess": guess * (3 if like == "autotune" else 1)}
        run.attempt(f"{library} {way}, {of}, batch {batch}", lambda: case(library, way, of).add(batch), **kind)

    best = {library: run.attempt(f"{library} eager", partial(case(library, "eager").best, start)) for library in libraries()}
    best = {library: batch for library, batch in best.items() if batch}
    top = "compiled, frozen" if mode == "inference" else "compiled"
    for library, batch in best.items():
        at(library, top, batch)
    if mode == "inference":
        for library in best:
            at(library, "eager", 1, "latency")
            at(library, "compiled, frozen, reduce-overhead", 1, "latency")
        for library, batch in best.items():
            at(library, "compiled", batch)
    for library, batch in best.items():
        at(library, top, 2 * batch)
        if batch > 1:
            at(library, top, batch // 2)
    if mode == "inference" and name == "b0":
        for library, batch in best.items():
            at(library, "compiled, frozen, max-autotune", batch, like="autotune")
