"""The parts: what each measures and what it needs. A part runs alone, in a process of its own (worker.py)."""

from typing import NamedTuple

from benchmarks.gpu.machine import have, version

NETWORKS = ("b0", "b4", "b7")
LIMIT = 480.0  # seconds of a part, at most


class Part(NamedTuple):
    """runs: module of this folder and function, called with the run (worker.Run) and, where there is one, the network.

    needs: what has to be there, as keys of NEEDS.
    """

    name: str
    about: str
    runs: str
    network: str | None = None
    needs: tuple[str, ...] = ()


NEEDS = {
    "pytest": lambda carried: version("pytest") is not None,
    "triton": lambda carried: have("triton"),
    "the kernels (triscale.kernels)": lambda carried: have("triscale.kernels.pointwise"),
    "triscale.inference": lambda carried: have("triscale.inference.network"),
    "timm or torchvision": lambda carried: have("timm") or have("torchvision"),
    "timm": lambda carried: have("timm"),
    "torchvision": lambda carried: have("torchvision"),
    "numpy": lambda carried: have("numpy"),
    "safetensors": lambda carried: have("safetensors"),
    "a pack": lambda carried: bool(carried.packs),
    "weights": lambda carried: bool(carried.weights),
}
OURS = ("triton", "triscale.inference")
PARTS = (
    Part("tests", "the tests of the suite that need a GPU, and the kernels' on it", "suite:run", None, ("pytest",)),
    Part("ceilings", "the GPU's copy bandwidth and matrix rate", "ceilings:run"),
    *(Part(f"kernels-{n}", f"each kernel at each shape of {n}", "launches:run", n, ("triton", "the kernels (triscale.kernels)")) for n in NETWORKS),
    *(Part(f"ours-{n}", f"optimised {n} beside timm eager and compiled, in turn", "ours:run", n, (*OURS, "timm")) for n in NETWORKS),
    Part("ours-top1", "classes that optimising changes, on packed pictures", "ours:top1", None, (*OURS, "numpy", "safetensors", "a pack", "weights")),
    *(Part(f"peers-inference-{n}", f"{n} of timm and torchvision: rate, latency", "peers:inference", n, ("timm or torchvision",)) for n in NETWORKS),
    *(Part(f"peers-training-{n}", f"{n} of timm and torchvision: training steps", "peers:training", n, ("timm or torchvision",)) for n in NETWORKS),
    Part("depthwise", "torch's depthwise convolution at each shape of the family", "depthwise:run"),
    Part("decode", "JPEG decoding on the GPU", "decode:run", None, ("torchvision", "numpy", "a pack")),
)


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


def missing(part, carried):
    """What the part needs and isn't there."""
    return [need for need in part.needs if not NEEDS[need](carried)]
