"""What is on this machine and what was carried to it: versions, device, clocks, wheels, packs, weights.

python -m benchmarks.gpu.machine [--carried DIR] [--rehearse]: as JSON, what `probed` gives.
"""

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

PACKAGES = ("torch", "triton", "numpy", "timm", "torchvision", "safetensors", "pytest", "hypothesis")
# What parts need imported, which may fail for what is found: timm alone does without torchvision.
MODULES = (
    "triton",
    "triscale.kernels.pointwise",
    "triscale.inference.network",
    "timm",
    "torchvision",
    "numpy",
    "safetensors",
    "pytest",
    "hypothesis",
)
PURE = "-none-any.whl"
ROOT = Path(__file__).resolve().parent.parent.parent
SMI = (
    *("name", "driver_version", "memory.total", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem"),
    *("temperature.gpu", "power.draw", "power.limit", "utilization.gpu"),
)
SMI_S, PROBE_S = 10, 120  # seconds that nvidia-smi and `probed` may take


class Carried(NamedTuple):
    """Of a folder that `carry` made: wheels that can be imported, those that can't, packs by name, weight files."""

    wheels: tuple[Path, ...] = ()
    compiled: tuple[Path, ...] = ()
    packs: tuple[Path, ...] = ()
    weights: tuple[Path, ...] = ()


def carried(folder):
    """What lies in `folder` (None: nothing). Raises ValueError where it isn't there."""
    if folder is None:
        return Carried()
    if not Path(folder).is_dir():
        raise ValueError(f"{folder}: no folder; `python -m benchmarks.gpu carry DIR` makes one")
    wheels = sorted(Path(folder).rglob("*.whl"))
    pure = tuple(w for w in wheels if w.name.endswith(PURE))
    packs = tuple(p.parent for p in sorted(Path(folder).rglob("index.json")) if (p.parent / "index.safetensors").is_file())
    weights = tuple(p for p in sorted(Path(folder).rglob("*.safetensors")) if p.parent not in packs)
    return Carried(pure, tuple(w for w in wheels if w not in pure), packs, weights)


def add_wheels(found):
    """Puts the pure wheels, zip files of modules, at the end of sys.path: what is installed goes first, for it fits its surroundings."""
    sys.path += [str(w.resolve()) for w in found.wheels if str(w.resolve()) not in sys.path]


def version(package):
    """Of an installed package or a carried wheel, None where there is neither. Nothing is imported."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def have(module):
    """Whether it can be imported, its parents included."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def import_error(module):
    """Why it can't be imported, in a line; empty where it can. Imports it."""
    try:
        importlib.import_module(module)
    except Exception as error:  # a library that was built for another torch raises what it likes
        return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"[:200]
    return ""


def probed(folder, *, rehearsal):
    """{"about": `described`, "imports": {module: `import_error`}}, found in a process of its own: one that has touched the GPU keeps memory there.

    Nothing is imported where there is no GPU and this is no rehearsal. Raises ValueError where the process fails, by its error.
    """
    more = [*(["--carried", str(folder)] if folder else []), *(["--rehearse"] if rehearsal else [])]
    command = [sys.executable, "-m", "benchmarks.gpu.machine", *more]
    try:
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PROBE_S)
    except subprocess.TimeoutExpired:
        raise ValueError(f"torch says nothing of this machine within {PROBE_S} s") from None
    if run.returncode:
        lines = [line for line in run.stderr.splitlines() if "Error" in line and not line.startswith(" ")]
        raise ValueError(lines[-1] if lines else f"it ended with status {run.returncode}; {run.stderr.strip()[-300:]}")
    return json.loads(run.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--carried")
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    add_wheels(carried(options.carried))
    about = described("cpu" if options.rehearse else "cuda")
    wanted = MODULES if about["device"] or options.rehearse else ()
    print(json.dumps({"about": about, "imports": {module: import_error(module) for module in wanted}}))


def smi():
    """nvidia-smi's answer about the first GPU, by field; {} where there is no nvidia-smi, or it says nothing."""
    if shutil.which("nvidia-smi") is None:
        return {}
    command = ["nvidia-smi", "--id=0", f"--query-gpu={','.join(SMI)}", "--format=csv,noheader,nounits"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=SMI_S)
    except (subprocess.TimeoutExpired, OSError):
        return {}
    values = [v.strip() for v in run.stdout.strip().split(",")]
    return dict(zip(SMI, values, strict=True)) if run.returncode == 0 and len(values) == len(SMI) else {}


def gpu():
    """The first GPU as torch sees it, None where there is none."""
    import torch

    if not torch.cuda.is_available() or torch.version.cuda is None:
        return None
    about = torch.cuda.get_device_properties(0)
    numbers = {"memory_bytes": about.total_memory, "multiprocessors": about.multi_processor_count, "l2_bytes": about.L2_cache_size}
    return {"name": about.name, "capability": f"{about.major}.{about.minor}", "cuda": torch.version.cuda, **numbers}


def described(device):
    """For a record: versions, device, clocks before. `device`: "cuda", or "cpu" in a rehearsal."""
    versions = {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}
    import torch

    from triscale import __version__

    versions |= {"triscale": __version__, "torch": torch.__version__}
    if device != "cuda":
        return {"versions": versions, "device": None, "smi_before": {}}
    return {"versions": versions, "device": gpu(), "smi_before": smi()}


def inventory(found, about):
    """What is there, in lines."""
    here = about["device"]
    lines = [f"device: {here['name']}, compute capability {here['capability']}, {here['memory_bytes'] / 2**30:.0f} GiB" if here else "device: none"]
    if clocks := about["smi_before"]:
        lines.append(f"driver {clocks['driver_version']}, clocks {clocks['clocks.sm']} MHz of {clocks['clocks.max.sm']}, {clocks['power.draw']} W")
    lines.append(", ".join(f"{name} {found_version}" for name, found_version in about["versions"].items() if found_version))
    if absent := [name for name, found_version in about["versions"].items() if found_version is None]:
        lines.append(f"missing: {', '.join(absent)}")
    lines.append(f"carried: {len(found.wheels)} wheels, packs {names(found.packs)}, weights {names(found.weights)}")
    lines += [f"not importable from its file, so not used: {w.name}" for w in found.compiled]
    return lines


def names(paths):
    return ", ".join(p.name for p in paths) or "none"


if __name__ == "__main__":
    main()
