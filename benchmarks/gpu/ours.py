"""Optimised networks beside timm's and torchvision's, eager and compiled, timed in turn in one run.

Rates: each way at the best of the batches tried, on batches that lie on the device. Latency: batch 1, waited for on the host's clock.
What decides comes first: ours at one batch beside one peer eager and compiled; only then other batches and other peers.
Ours is optimised from the fp32 network and takes bf16 batches, as the peers do; also uint8 ones. Each batch size is tuned when it
is first seen, and what that finds is kept (tuned.py): the same part run again gets further. A row names what ours ran by: where the
kernels failed it says plain, and is no figure of ours.
"""

from functools import partial

import torch

from benchmarks.gpu import timing
from benchmarks.gpu.parts import BATCHES
from benchmarks.gpu.peers import COMPILE_S, LAST, SAMPLE_S, START, Case, compiled, forward_call, libraries, make, pixels
from benchmarks.gpu.sweep import best_batch
from triscale.architecture import Arch, Head, Stage, Stem
from triscale.families import arch
from triscale.model import build

GRAPHED = ("compiled, frozen, reduce-overhead", "compiled, reduce-overhead")  # of each library, at batch 1, in the order tried
IN_TURN_S, IN_TURN_SPARE_S = 60.0, 30.0
TUNE_S = 60  # seconds that tuning a new shape of images takes: a guess, as long as none took longer
TUNED_S = 20  # seconds to make and time what was tuned
COMPILED = ("compiled, frozen", "compiled", "compiled, frozen, max-autotune")
REHEARSED = Arch(Stem(8), (Stage("mbconv", 3, 2, 2, 0.25, "identity", 8, 1),), Head(16), 32)  # small enough for Triton's interpreter


def optimized(run, name):
    """A network of ours, optimised, with random weights; it takes pixels too. A rehearsal's is small, through the kernels where they are
    interpreted."""
    from triscale.inference import optimize
    from triscale.kernels.machine import interpreted
    from triscale.recipe import Preprocess

    torch.manual_seed(0)
    net = build(REHEARSED if run.rehearsal else arch(f"efficientnet_{name}")).eval().to(run.device)
    net.preprocess = Preprocess(pixels(run, name))
    return optimize(net, engine="triton", precision="bfloat16") if run.rehearsal and interpreted() else optimize(net)


def used_by(net):
    """What an optimised network has run by, in words: "kernels bfloat16"; it begins with "plain" where the network itself ran."""
    engine = net.engine
    return f"plain: {engine}" if isinstance(engine, str) else ", ".join(engine.used)


class Ours(Case):
    """Our network, made anew for each batch, so that the graphs of one aren't in another's memory. net, call: the latest."""

    def __init__(self, run, name, way):
        super().__init__(run, name, "triscale", way, "inference", self._call, used=lambda: used_by(self.net))
        self.net, self.call, self.from_pixels = None, None, way == "ours from uint8"

    def _call(self, batch):
        self.net = optimized(self.run, self.name)
        self.call = forward_call(self.net, batch, self.px, self.run.device, pixels=self.from_pixels)
        return self.call


class Turn:
    """Calls that are to be timed in turn: (library, way) -> (batch, call, what is recorded as used, asked after the timing)."""

    def __init__(self, run, name, mode):
        self.run, self.name, self.mode, self.calls, self.changed = run, name, mode, {}, False

    def add(self, library, way, batch, call, used=lambda: None):
        self.calls[library, way], self.changed = (batch, call, used), True

    def batch(self, library, way):
        """At which it is to be timed, None where it isn't there."""
        return self.calls.get((library, way), (None,))[0]

    def time(self):
        """Rows of all calls, and of ours against each other one."""
        run, latency, seconds = self.run, self.mode == "latency", min(IN_TURN_S, max(self.run.left() / 2, 0))
        only = {key: call for key, (_, call, _) in self.calls.items()}
        how = {"runs": run.runs * (10 if latency else 2), "seconds": seconds, "latency": latency, "group_ms": run.group_ms}
        found, rates = timing.in_turn(only, run.device, **how), {}
        for (library, way), runs_ms in found.items():
            batch, _, used = self.calls[library, way]
            rates[library, way] = [1e3 * batch / ms for ms in runs_ms]
            times = timing.columns(runs_ms)
            about = {"library": library, "network": self.name, "way": way, "mode": self.mode, "used": used(), "batch": batch}
            run.record.add("in turn", **about, px=pixels(run, self.name), images_per_s=1e3 * batch / times["ms"], **times)
        ours = rates.get(("triscale", "ours"))
        for (library, way), peers_rates in rates.items():
            if ours and library != "triscale":
                times = sorted(a / b for a, b in zip(ours, peers_rates, strict=True))
                columns = {"times": times[len(times) // 2], "times_min": times[0], "times_max": times[-1]}
                used = self.calls["triscale", "ours"][2]()
                run.record.add("comparison", network=self.name, mode=self.mode, library=library, way=way, used=used, **columns)
        self.changed = False

    def attempt(self):
        """Times all, where one was added since that was last done; of a call's rows the last one counts."""
        if self.changed:
            self.run.attempt(f"{self.mode} in turn: {'; '.join(' '.join(key) for key in self.calls)}", self.time, like="in turn", guess=SAMPLE_S)


def latency(run, name):
    """Batch 1: ours, and of each library eager and compiled with CUDA graphs."""
    turn, px, device = Turn(run, name, "latency"), pixels(run, name), run.device

    def ours():
        net = optimized(run, name)
        call = forward_call(net, 1, px, device)
        call()
        turn.add("triscale", "ours", 1, call, lambda: used_by(net))

    def peer(library, way, net):
        call = forward_call(net if way == "eager" else compiled(run, net, way), 1, px, device)
        call()
        turn.add(library, way, 1, call)

    run.attempt("ours, batch 1", ours, guess=TUNE_S)
    turn.attempt()
    for library in libraries():
        net = run.attempt(library, partial(_peers_network, run, name, library), guess=10)
        for way in ("eager", *GRAPHED) if net is not None else ():
            how = {} if way == "eager" else {"like": "compile", "guess": COMPILE_S["inference"][name], "spare": IN_TURN_SPARE_S}
            run.attempt(f"{library} {way}, batch 1", partial(peer, library, way, net), **how)
            turn.attempt()


def run(run, name):
    """Ours at one batch and the first library eager and compiled, timed in turn; then ours at other batches, the library's other ways, and
    the other library, timed in turn again after each gain."""
    turn = Turn(run, name, "inference")
    first, *others = batches(run, name)
    _ours(run, turn, "ours", first)
    peers = [Peer(run, turn, library) for library in libraries()]
    for peer in peers[:1]:
        peer.begin()
    for batch in others:
        _ours(run, turn, "ours", batch)
        turn.attempt()
    if turn.batch("triscale", "ours"):
        _ours(run, turn, "ours from uint8", turn.batch("triscale", "ours"))
        turn.attempt()
    for peer in peers[:1]:
        peer.go_on()
    for peer in peers[1:]:
        peer.begin()
        peer.go_on()


def batches(run, name):
    """Of ours, in the order tried: first the best of an earlier run of this part."""
    known, tried = best_before(run.before, "triscale", "ours"), (2, 4, 1) if run.rehearsal else BATCHES[name]
    return tuple(dict.fromkeys([known, *tried] if known else tried))


def _ours(run, turn, way, batch):
    """Measures ours at a batch; where it is the best so far it is the one timed in turn."""

    def work():
        case = Ours(run, turn.name, way)
        case.add(batch)
        best = best_of(run, "triscale", way)
        if best != turn.batch("triscale", way):
            call = case.call if best == batch else case.calls(best)
            call()
            turn.add("triscale", way, best, call, case.used)

    # A batch whose choices were kept takes seconds, and says nothing of the next one's tuning; uint8 differs by the stem alone.
    seen = [seconds for what, seconds in run.longest.items() if what.startswith("ours, batch")]
    run.attempt(f"{way}, batch {batch}", work, guess=max([TUNE_S, *seen]) if way == "ours" else TUNED_S)


def _peers_network(run, name, library):
    return make(library, name).eval().to(run.device, torch.bfloat16, memory_format=LAST)


class Peer:
    """A library's network beside ours: eager at its best batch, compiled near that, and all timed in turn after each step that brought
    something."""

    def __init__(self, run, turn, library):
        self.run, self.turn, self.library, self.name = run, turn, library, turn.name
        self.net, self.kept, self.top = None, {}, None

    def begin(self):
        """Eager, and frozen at the best batch of that."""
        run, turn, library = self.run, self.turn, self.library
        self.net = run.attempt(library, partial(_peers_network, run, self.name, library), guess=10)
        if self.net is None:
            return
        self.kept = {way: compiled(run, self.net, way) for way in COMPILED}
        start = 2 if run.rehearsal else START["inference"][self.name]
        sweep = partial(self._case("eager").best, start)
        self.top = best_batch_known(run, library, "eager") or run.attempt(f"{library} eager", sweep, guess=30)
        if self.top:
            turn.add(library, "eager", self.top, self._call("eager", self.top))
            turn.attempt()
            self._compile("compiled, frozen", self.top)

    def go_on(self):
        """The other ways, where `begin` found a batch."""
        if self.top:
            self._compile("compiled, frozen", 2 * self.top)
            self._compile("compiled", self.top)
            if (self.library, self.name) == ("timm", "b0"):
                self._compile("compiled, frozen, max-autotune", self.top)

    def _case(self, way):
        return Case(self.run, self.name, self.library, way, "inference", partial(self._call, way))

    def _call(self, way, batch):
        return forward_call(self.kept.get(way, self.net), batch, pixels(self.run, self.name), self.run.device)

    def _compile(self, way, batch):
        like, times = ("autotune", 3) if "autotune" in way else ("compile", 1)
        guess = times * COMPILE_S["inference"][self.name]

        def work():
            self._case(way).add(batch)
            best = best_of(self.run, self.library, way)
            if best != self.turn.batch(self.library, way):
                self.turn.add(self.library, way, best, self._call(way, best))

        self.run.attempt(f"{self.library} {way}, batch {batch}", work, like=like, guess=guess, spare=IN_TURN_SPARE_S)
        self.turn.attempt()


def best_of(run, library, way):
    """The best batch of what this run has measured, None where it is nothing."""
    return best_before(run.record.body["rows"], library, way)


def best_batch_known(run, library, way):
    """The best batch by an earlier run of this part, or of the peers' part; None where they don't tell."""
    rows = best_before(run.before, library, way), best_before(run.earlier(f"peers-inference-{run.part.network}"), library, way)
    return next((batch for batch in rows if batch), None)


def best_before(rows, library, way):
    """The best batch by these rows, None where they don't tell."""
    found = {
        r["batch"]: r["images_per_s"] for r in rows if r["kind"] == "network" and (r["library"], r["way"], r["mode"]) == (library, way, "inference")
    }
    return best_batch(found) if found else None
