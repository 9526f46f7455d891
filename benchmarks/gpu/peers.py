"""timm's and torchvision's networks, eager and compiled, bf16, channels-last: best batch, images/s, peak memory, latency.

Inference: weights in bf16, inference mode. Training: weights in fp32 under bf16 autocast, cross-entropy, SGD with momentum. timm's are
the TensorFlow-padded ones, which compute what ours do; torchvision's pad symmetrically, which saves it copies. Compiled:
torch.compile with static shapes, for batch 1 with mode="reduce-overhead" (CUDA graphs); frozen: also with the norms folded
into constant weights (inductor's freezing), timm alone. Input is on the device already.
"""

from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.gpu import timing
from benchmarks.gpu.machine import have
from benchmarks.gpu.sweep import best_batch, sweep
from triscale.families import arch

CLASSES = 1000
LAST = torch.channels_last
START = {"inference": {"b0": 64, "b4": 16, "b7": 8}, "training": {"b0": 32, "b4": 8, "b7": 4}}
COMPILE_S = {"inference": {"b0": 45, "b4": 80, "b7": 120}, "training": {"b0": 80, "b4": 150, "b7": 240}}  # guesses, until one was seen
SAMPLE_S = 6.0  # of timing one case


def make(library, name):
    """The network with random weights, in training mode."""
    if library == "timm":
        import timm

        return timm.create_model(f"tf_efficientnet_{name}")
    import torchvision

    return getattr(torchvision.models, f"efficientnet_{name}")()


def libraries():
    return [name for name in ("timm", "torchvision") if have(name)]


def pixels(run, name):
    return 32 if run.rehearsal else arch(f"efficientnet_{name}").resolution


def compiled(run, net, **how):
    """Static shapes; each batch size compiles anew, so torch's limit of recompilations, past which it runs eagerly, is lifted."""
    torch._dynamo.config.recompile_limit = 256
    torch._dynamo.config.accumulated_recompile_limit = 4096
    return torch.compile(net, dynamic=False, **({"backend": "eager"} if run.rehearsal else how))


def forward_call(net, batch, px, device):
    """A call without arguments: inference of one batch that lies on the device."""
    x = torch.randn(batch, 3, px, px, device=device, dtype=torch.bfloat16).contiguous(memory_format=LAST)

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


def network_row(run, call, batch, px, *, latency=False):
    """The columns batch to runs of a "network" row, measured now."""
    seconds = min(SAMPLE_S, max(run.left() / 4, 0))
    call()  # before the peak is read: cuDNN tries algorithms with larger workspaces than the one it takes
    runs = run.runs * (10 if latency else 1)
    found, peak = timing.peak_of(lambda: timing.in_turn({"": call}, run.device, runs=runs, seconds=seconds, latency=latency)[""], run.device)
    times = timing.columns(found)
    return {"batch": batch, "px": px, "images_per_s": 1e3 * batch / times["ms"], "peak_bytes": peak, **times}


class Case:
    """One library's network one way. calls: batch -> a call without arguments. add: measures a batch and records it; returns images/s."""

    def __init__(self, run, name, library, way, mode, calls):
        self.run, self.about, self.calls = run, {"library": library, "network": name, "way": way, "mode": mode}, calls
        self.px = pixels(run, name)

    def add(self, batch):
        run = self.run
        try:
            call = self.calls(batch)
            row = network_row(run, call, batch, self.px, latency=self.about["mode"] == "latency")
        finally:
            call = None
            timing.forget(run.device)
        run.record.add("network", **self.about, **row)
        return row["images_per_s"]

    @property
    def label(self):
        return f"{self.about['library']} {self.about['way']}, {self.about['mode']}"

    def best(self, start):
        """The best batch of a sweep from `start`, 0 where not even that one runs."""
        found, ended = sweep(self.add, start, most=self.run.most, left=lambda: self.run.left() > 10)
        self.run.record.note(f"{self.label}: {ended}")
        return best_batch(found) if found else 0


def inference(run, name):
    """All that is measured of inference: "network" rows."""
    px, device = pixels(run, name), run.device
    nets = {library: make(library, name).eval().to(device, torch.bfloat16, memory_format=LAST) for library in libraries()}

    def case(library, way, mode="inference"):
        how = {"frozen": {"options": {"freezing": True}}, "compiled": {"mode": "reduce-overhead" if mode == "latency" else None}}
        net = nets[library] if way == "eager" else compiled(run, nets[library], **how[way])
        return Case(run, name, library, way, mode, lambda batch: forward_call(net, batch, px, device))

    measure(run, name, list(nets), "inference", case)


def training(run, name):
    """As `inference`, of training steps."""
    px, device = pixels(run, name), run.device
    nets = {library: make(library, name).train().to(device, memory_format=LAST) for library in libraries()}
    optimizers = {library: torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9, foreach=True) for library, net in nets.items()}

    def case(library, way, mode="training"):
        net = nets[library] if way == "eager" else compiled(run, nets[library])
        return Case(run, name, library, way, mode, lambda batch: step_call(net, optimizers[library], batch, px, device))

    measure(run, name, list(nets), "training", case)


def measure(run, name, libraries, mode, case):
    """What matters most first: eager sweeps; compiled at the eager best; latency; then frozen, twice and half that batch."""
    start, guess = run.most if run.rehearsal else START[mode][name], COMPILE_S[mode][name]

    def at(library, way, batch, of=mode):
        kind = {} if way == "eager" else {"like": "compile", "guess": guess}
        run.attempt(f"{library} {way}, {of}, batch {batch}", lambda: case(library, way, of).add(batch), **kind)

    best = {library: run.attempt(f"{library} eager", partial(case(library, "eager").best, start)) for library in libraries}
    best = {library: batch for library, batch in best.items() if batch}
    for library, batch in best.items():
        at(library, "compiled", batch)
    if mode == "inference":
        for library in best:
            at(library, "eager", 1, "latency")
            at(library, "compiled", 1, "latency")
        if "timm" in best:
            at("timm", "frozen", best["timm"])
    for library, batch in best.items():
        at(library, "compiled", 2 * batch)
        if batch > 1:
            at(library, "compiled", batch // 2)
