"""The parts: what each measures and what it needs. A part runs alone, in a process of its own (worker.py)."""

from typing import NamedTuple

from benchmarks.gpu.record import compared, read_earlier

NETWORKS = ("b0", "b4", "b7")
BATCHES = {"b0": (512, 1024, 256), "b4": (128, 256, 64), "b7": (32, 64, 16)}  # of ours, in the order tried
LIMIT = 480.0  # seconds of a part, at most


class Part(NamedTuple):
    """runs: module of this folder and function, called with the run (worker.Run) and, where there is one, the network.

    needs: what has to be there, as keys of NEEDS. least: seconds that it needs to find anything; with fewer it isn't begun. most:
    seconds when it is first begun, where the time of all is limited and others wait; when it is begun again there is more.
    """

    name: str
    about: str
    runs: str
    network: str | None = None
    needs: tuple[str, ...] = ()
    least: float = 60.0
    most: float = LIMIT

    @property
    def decides(self):
        """Whether it is there for the comparison of ours with compiled peers."""
        return self.runs in ("ours:run", "ours:latency")


# Each -> modules of which one has to be importable. A pack and weights are carried.
NEEDS = {
    "pytest": ("pytest",),
    "hypothesis": ("hypothesis",),
    "triton": ("triton",),
    "the kernels (triscale.kernels)": ("triscale.kernels.pointwise",),
    "triscale.inference": ("triscale.inference.network",),
    "timm or torchvision": ("timm", "torchvision"),
    "torchvision": ("torchvision",),
    "numpy": ("numpy",),
    "safetensors": ("safetensors",),
    "a pack": (),
    "weights": (),
}
KERNELS = ("triton", "the kernels (triscale.kernels)")
OURS, PEERS = ("triton", "triscale.inference"), ("timm or torchvision",)
TOP1 = (*OURS, "numpy", "safetensors", "a pack", "weights")


# Seconds, until figures of a device are there: of ours, to tune one batch, sweep a peer's, compile it and time both.
OURS_LEAST, OURS_MOST = {"b0": 215.0, "b4": 250.0, "b7": 290.0}, {"b0": 300.0, "b4": 270.0, "b7": 320.0}


def _kernels(n):
    return Part(f"kernels-{n}", f"each kernel at each shape of {n}", "launches:run", n, KERNELS, 100.0, 150.0)


def _ours(n):
    return Part(f"ours-{n}", f"optimised {n} beside its peers' best, in turn", "ours:run", n, OURS, OURS_LEAST[n], OURS_MOST[n])


def _latency(n):
    return Part(f"latency-{n}", f"optimised {n} beside its peers, batch 1", "ours:latency", n, OURS, 180.0, 240.0)


# What matters most comes first, for a machine that is there for half an hour; three commands of nine minutes reach the tests.
PARTS = (
    Part("ceilings", "the GPU's copy bandwidth and matrix rate", "ceilings:run", most=60.0),
    _ours("b0"),
    _latency("b0"),
    _kernels("b0"),
    _ours("b4"),
    _ours("b7"),
    Part("ours-top1", "classes that optimising changes, on packed pictures", "agreement:run", None, TOP1, 100.0, 150.0),
    Part("tests", "the tests of the suite that need a GPU, and the kernels' on it", "suite:run", None, ("pytest", "hypothesis"), 120.0, 240.0),
    *(Part(f"peers-inference-{n}", f"{n} of timm and torchvision: rate, latency", "peers:inference", n, PEERS, 180.0) for n in NETWORKS),
    *(Part(f"peers-training-{n}", f"{n} of timm and torchvision: training steps", "peers:training", n, PEERS, 180.0) for n in NETWORKS),
    *(_kernels(n) for n in NETWORKS[1:]),
    *(_latency(n) for n in NETWORKS[1:]),
    Part("depthwise", "torch's depthwise convolution at each shape of the family", "depthwise:run"),
    Part("decode", "JPEG decoding on the GPU", "decode:run", None, ("torchvision", "numpy", "a pack")),
)  # fmt: skip


def chosen(names):
    """The parts named, in order: a name, or the beginning of several up to a dash ("peers", "peers-training"); all where none is named.

    Raises ValueError for any other name.
    """
    found = []
    for name in names:
        some = [p for p in PARTS if p.name == name or p.name.startswith(name + "-")]
        if not some:
            raise ValueError(f"no part '{name}'; there are {', '.join(p.name for p in PARTS)}")
        found += some
    return [p for p in PARTS if p in found] if names else list(PARTS)


def missing(part, carried, imports):
    """What the part needs and isn't there, with why it can't be imported. imports: {module: why not, "" where it can} (machine.probed)."""
    lacks = []
    for need in part.needs:
        errors = [imports.get(module, "not tried") for module in NEEDS[need]]
        if need in ("a pack", "weights"):
            if not (carried.packs if need == "a pack" else carried.weights):
                lacks.append(need)
        elif all(errors):
            lacks.append(f"{need} ({'; '.join(dict.fromkeys(errors))})")
    return lacks


def remaining(parts, folder, device, *, rehearsal=False):
    """Of these parts those that aren't done yet on such a device, by the records in `folder` and the tree.

    In order: those never begun; before the peers' training, those whose time was up before ours was compared with a compiled peer; all
    others whose time was up; last those that crashed or hung, for they may do so again.
    """
    bodies = [read_earlier(folder, part.name, device, rehearsal=rehearsal) for part in parts]
    training = min((i for i, part in enumerate(parts) if part.runs == "peers:training"), default=len(parts))

    def rank(i):
        part, body = parts[i], bodies[i]
        if body is None:
            return 0 if i < training else 2
        if body["ended"] != "out of time":
            return 4
        return 1 if part.decides and not any("compiled" in way for _, way in compared(body)) else 3

    left = [i for i, body in enumerate(bodies) if body is None or body["ended"] != "done"]
    return [parts[i] for i in sorted(left, key=rank)]
