"""What the tests of the GPU benchmarks share."""

import torch

import triscale as ts
from benchmarks.gpu import counting, record
from benchmarks.gpu.parts import PARTS

CPU = torch.device("cpu")
NETWORKS = ("b0", "b4", "b7")
TIMES = {"ms": 1.0, "ms_min": 0.9, "ms_max": 1.1, "runs": 3}


def steps(name):
    return counting.steps(ts.arch(f"efficientnet_{name}"))


def part(name):
    return next(p for p in PARTS if p.name == name)


def recorded(folder, name, device=None):
    return record.read(record.path_of(folder, name, device))


def add_row(kept, kind="ceiling", **columns):
    if kind == "comparison":
        columns = {"network": "b0", "mode": "inference", "library": "timm", "used": "kernels bfloat16", **columns}
        kept.add(kind, **columns, times=2.0, times_min=1.9, times_max=2.1)
    else:
        kept.add("ceiling", what="copy", rate=1.0, unit="byte/s", **TIMES)
