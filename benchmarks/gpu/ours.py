"""Optimised networks beside timm's and torchvision's, eager and compiled, timed in turn in one run; and the classes that optimising changes.

Rates: each way at the best of the batches tried, on batches that lie on the device. Latency: batch 1, waited for on the host's clock.
Ours is optimised from the fp32 network and takes bf16 batches, as the peers do; also uint8 ones. Each batch size is tuned when it
is first seen, for a minute or two, and kept on disk: the same part run again gets further. A row names what ours ran by: where the
kernels failed it says plain, and is no figure of ours.
"""

from functools import partial

import torch

from benchmarks.gpu import timing
from benchmarks.gpu.decode import listing, pictures
from benchmarks.gpu.parts import BATCHES
from benchmarks.gpu.peers import COMPILE_S, LAST, SAMPLE_S, START, Case, compiled, forward_call, libraries, make, pixels
from benchmarks.gpu.sweep import best_batch
from triscale.families import arch
from triscale.model import build

GRAPHED = ("compiled, frozen, reduce-overhead", "compiled, reduce-overhead")  # of each library, at batch 1, in the order tried
TRIALS = 256  # pictures that classes are compared on
IN_TURN_S, IN_TURN_SPARE_S = 60.0, 30.0
TUNE_S = {"b0": 90, "b4": 120, "b7": 120}  # a guess, until one was seen


def optimized(run, name):
    """A network of ours, optimised, with random weights; it takes pixels too."""
    from triscale.inference import optimize
    from triscale.recipe import Preprocess

    torch.manual_seed(0)
    net = build(arch(f"efficientnet_{name}")).eval().to(run.device)
    net.preprocess = Preprocess(pixels(run, name))
    return optimize(net)


def used_by(net):
    """What an optimised network has run by, in words: "kernels bfloat16"; it begins with "plain" where the network itself ran."""
    engine = net.engine
    return f"plain: {engine}" if isinstance(engine, str) else ", ".join(engine.used)


class Ours(Case):
    """Our network, made anew for each batch, so that the graphs of one aren't in another's memory. net: the latest."""

    def __init__(self, run, name, way):
        super().__init__(run, name, "triscale", way, "inference", self._call, used=lambda: used_by(self.net))
        self.net, self.from_pixels = None, way == "ours from uint8"

    def _call(self, batch):
        self.net = optimized(self.run, self.name)
        return forward_call(self.net, batch, self.px, self.run.device, pixels=self.from_pixels)


class Turn:
    """Calls that are to be timed in turn: (library, way) -> (batch, call, what is recorded as used, asked after the timing)."""

    def __init__(self, run, name, mode):
        self.run, self.name, self.mode, self.calls = run, name, mode, {}

    def add(self, library, way, batch, call, used=lambda: None):
        self.calls[library, way] = batch, call, used

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

    def attempt(self):
        if self.calls:
            self.run.attempt(f"{self.mode} in turn: {'; '.join(' '.join(key) for key in self.calls)}", self.time, like="in turn", guess=SAMPLE_S)


def latency(run, name):
    """Batch 1: ours, and of each library eager and compiled with CUDA graphs."""
    turn, px, device = Turn(run, name, "latency"), pixels(run, name), run.device

    def ours():
        net = optimized(run, name)
        call = forward_call(net, 1, px, device)
        call()
        turn.add("triscale", "ours", 1, call, lambda: used_by(net))

    def peer(library):
        net = make(library, name).eval().to(device, torch.bfloat16, memory_format=LAST)
        call = forward_call(net, 1, px, device)
        call()
        turn.add(library, "eager", 1, call)
        return net

    run.attempt("ours, batch 1", ours, guess=TUNE_S[name])
    for library in libraries():
        net = run.attempt(f"{library} eager, batch 1", partial(peer, library), guess=10)
        for way in GRAPHED if net is not None else ():
            work = partial(_compile, run, turn, net, library, way)
            run.attempt(f"{library} {way}, batch 1", work, like="compile", guess=COMPILE_S["inference"][name], spare=IN_TURN_SPARE_S)
            turn.attempt()  # what there is so far; the last one counts


def _compile(run, turn, net, library, way):
    call = forward_call(compiled(run, net, way), 1, pixels(run, turn.name), run.device)
    call()
    turn.add(library, way, 1, call)


def run(run, name):
    """Ours at several batches, alone on the device; then each peer's eager sweep, what it compiles to near its best batch, and all in turn."""
    turn = Turn(run, name, "inference")
    for batch in (2, 4, 1) if run.rehearsal else BATCHES[name]:
        run.attempt(f"ours, batch {batch}", partial(Ours(run, name, "ours").add, batch), like="tune", guess=TUNE_S[name])
    batch = best_of(run, "triscale", "ours")
    for way in ("ours", "ours from uint8") if batch else ():
        run.attempt(f"{way}, batch {batch}, to be timed in turn", partial(_ours_in_turn, run, turn, way, batch), like="tuned", guess=20)
    for library in libraries():
        _peer(run, turn, library)


def _ours_in_turn(run, turn, way, batch):
    case = Ours(run, turn.name, way)
    if way != "ours":
        case.add(batch)
    call = case.calls(batch)
    call()
    turn.add("triscale", way, batch, call, case.used)


def _peer(run, turn, library):
    """Adds a library's network to those timed in turn, and times them after each step that brought something."""
    name, guess = turn.name, COMPILE_S["inference"][turn.name]
    px, device = pixels(run, name), run.device
    net = run.attempt(library, lambda: make(library, name).eval().to(device, torch.bfloat16, memory_format=LAST), guess=10)
    if net is None:
        return
    kept = {way: compiled(run, net, way) for way in ("compiled, frozen", "compiled", "compiled, frozen, max-autotune")}

    def case(way):
        return Case(run, name, library, way, "inference", partial(forward_call, kept.get(way, net), px=px, device=device))

    start = 2 if run.rehearsal else START["inference"][name]
    top = best_batch_known(run, library, "eager") or run.attempt(f"{library} eager", partial(case("eager").best, start), guess=30)
    if not top:
        return
    turn.add(library, "eager", top, forward_call(net, top, px, device))
    tried = [("compiled, frozen", top), ("compiled, frozen", 2 * top), ("compiled", top)]
    if (library, name) == ("timm", "b0"):
        tried.append(("compiled, frozen, max-autotune", top))
    for i, (way, batch) in enumerate(tried):
        like = "autotune" if "autotune" in way else "compile"
        what = f"{library} {way}, batch {batch}"
        if run.attempt(what, partial(case(way).add, batch), like=like, guess=guess * (3 if like == "autotune" else 1), spare=IN_TURN_SPARE_S):
            best = best_of(run, library, way)
            turn.add(library, way, best, forward_call(kept[way], best, px, device))
        if i != 1 and i < len(tried) - 1:
            turn.attempt()
    turn.attempt()


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


def top1(run):
    """Each carried weight file on a pack of its classes, else the first: the optimised network's classes against the fp32 network's and
    the pack's labels, same device, same inputs."""
    from triscale.weights.open import open_model

    for file in run.found.weights:
        run.attempt(file.name, lambda file=file: _agreement(run, *open_model(file)), guess=TUNE_S["b0"])


def _agreement(run, net, card):
    from triscale.data.normalising import normalise
    from triscale.inference import optimize

    pack, index = fitting(run.found.packs, card.classes)
    datas, labels = pictures(pack, labels=True)
    count = min(len(datas), 4 if run.rehearsal else TRIALS)
    images = squares(datas[:count], card.preprocess)
    inputs = normalise(images.to(run.device), card.preprocess).contiguous(memory_format=LAST)
    net = net.eval().to(run.device)
    # The reference is fp32 proper: a GPU's tensor cores would round its products to TF32.
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        plain = torch.cat([net(part) for part in inputs.split(64)])
    fast = optimize(net)
    ours = torch.cat([fast(part) for part in inputs.split(64)])
    different, change = int((plain.argmax(1) != ours.argmax(1)).sum()), float((plain.softmax(1) - ours.softmax(1)).abs().max())
    right = dict.fromkeys(("right", "right_plain"))
    if index is None:
        run.record.note(f"{card.arch.name}: no carried pack is of its classes, so none is right or wrong on {pack.name}")
    else:
        truth = torch.tensor([index[label] for label in labels[:count]], device=run.device)
        right = {key: int((logits.argmax(1) == truth).sum()) for key, logits in (("right", ours), ("right_plain", plain))}
    about = {"network": card.arch.name, "pack": pack.name, "used": used_by(fast), "images": count}
    run.record.add("agreement", **about, different=different, **right, largest_change=change)


def fitting(packs, classes):
    """(pack, class of the model by class of the pack) of the first pack whose classes are all the model's, by name or as ImageNet's
    WordNet ids; (the first pack, None) where there is none."""
    from triscale.imagenet import imagenet_classes

    names = {name: i for i, name in enumerate(classes)}
    wnids = {c.wnid: i for i, c in enumerate(imagenet_classes())} if len(classes) == len(imagenet_classes()) else {}
    for pack in packs:
        own = listing(pack).classes
        for index in (names, wnids):
            if own and all(name in index for name in own):
                return pack, [index[name] for name in own]
    return packs[0], None


def squares(datas, preprocess):
    """(N, C, S, S) uint8 of image files, on the CPU."""
    import numpy as np

    from triscale.data.jpeg import read_square

    out = np.empty((len(datas), preprocess.size, preprocess.size, preprocess.channels), np.uint8)
    for data, place in zip(datas, out, strict=True):
        read_square(data, place, preprocess)
    return torch.from_numpy(out).permute(0, 3, 1, 2)
