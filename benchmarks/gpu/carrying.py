"""python -m benchmarks.gpu carry DIR: what has to travel to a machine without an index, in one folder.

Wheels of the peers and what they need, made by pip for the versions installed here: those of Python alone, which can be
imported from the file. What comes with torch stays here, and so does what is compiled: both are named. Packs of `triscale pack`
and weight files are copied. What is installed there goes before its wheel, so a wheel too many does no harm.

Where the repository itself is what travels, DIR has to lie inside it, in a folder that git ignores (runs/), and to be named where
the command is given that is run there. Both together count against the limit.
"""

import argparse
import importlib.metadata
import re
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu.machine import ROOT
from triscale.quantities import size

WANTED = ("timm", "pytest", "hypothesis")
PRESENT = ("torch", "torchvision", "triton")  # taken to be on a GPU machine, with all that they need
NOT_CARRIED = "compiled, so the machine has to have them: python3 -m pip show NAME there says whether it does"
LIMIT = 64 << 20  # bytes in all, the repository's own files among them


def main(arguments):
    parser = argparse.ArgumentParser("python -m benchmarks.gpu carry", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="new, or an earlier one of this command's")
    parser.add_argument("--packs", type=Path, nargs="*", default=[], help="folders that `triscale pack` made")
    parser.add_argument("--weights", type=Path, nargs="*", default=[], help=".safetensors files")
    parser.add_argument("--wheels", nargs="*", default=WANTED, metavar="PACKAGE", help=f"{', '.join(WANTED)} unless given; none after --wheels alone")
    options = parser.parse_args(arguments)
    from triscale.data.index import has_index  # numpy, which a machine with a GPU may lack

    wrong = [f"{p}: no pack; `triscale pack DATA OUT` makes one" for p in options.packs if not has_index(p)]
    wrong += [f"{p}: no .safetensors file" for p in options.weights if not p.is_file() or p.suffix != ".safetensors"]
    if wrong:
        print("\n".join(wrong), file=sys.stderr)
        return 2
    pure, compiled, absent = travelling(options.wheels)
    made = gather(options, pure)
    report(options.folder, compiled, absent)
    return 0 if made and total(options.folder) + repository(options.folder) <= LIMIT else 1


def travelling(packages):
    """({name: version} of Python alone, compiled names, names not installed here): the packages and all they need, but for PRESENT's needs."""
    there, found = _needs(PRESENT), _needs(packages)
    pure, compiled, absent = {}, [], []
    for name in sorted(found.keys() - there.keys()):
        about = found[name]
        if about is None:
            absent.append(name)
        elif "Root-Is-Purelib: true" in (about.read_text("WHEEL") or ""):
            pure[name] = about.version
        else:
            compiled.append(name)
    return pure, compiled, absent


def _needs(packages):
    """{name: its installed distribution, None where there is none} of the packages and all they need, without extras."""
    from packaging.requirements import Requirement  # not on every machine that these benchmarks run on

    found, waiting = {}, list(packages)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in found:
            continue
        try:
            found[name] = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
            continue
        needs = [Requirement(text) for text in found[name].requires or []]
        waiting += [need.name for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    return found


def gather(options, pure):
    """Whether all is in the folder."""
    wheels = options.folder / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    for pack in options.packs:
        shutil.copytree(pack, options.folder / "packs" / pack.name, dirs_exist_ok=True)
    for file in options.weights:
        (options.folder / "weights").mkdir(exist_ok=True)
        shutil.copy(file, options.folder / "weights" / file.name)
    if not pure:
        return True
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps", "--wheel-dir", str(wheels)]
    status = subprocess.run([*command, *(f"{name}=={version}" for name, version in pure.items())]).returncode
    if status:
        print(f"pip ended with status {status}: the wheels above are missing", file=sys.stderr)
    return not status


def total(folder):
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def repository(folder):
    """Bytes of the repository's files that git tracks or doesn't ignore, without those in `folder`; 0 where this is no git repository."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return 0
    files = {(ROOT / name).resolve() for name in run.stdout.split("\0") if name} if not run.returncode else set()
    return sum(p.stat().st_size for p in files if p.is_file() and not p.is_relative_to(folder.resolve()))


def ignored(folder):
    """Whether git ignores the folder; None where it can't say, as outside the repository."""
    try:
        status = subprocess.run(["git", "check-ignore", "-q", str(folder.resolve() / "x")], cwd=ROOT, capture_output=True).returncode
    except OSError:
        return None
    return {0: True, 1: False}.get(status)


def report(folder, compiled, absent):
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        print(f"{size(path.stat().st_size):>8}  {path.relative_to(folder)}")
    own = repository(folder)
    whole = total(folder) + own
    print(f"{size(own):>8}  the repository's own files")
    print(f"{size(whole):>8}  in all, of {size(LIMIT)} at most{': too much' if whole > LIMIT else ''}")
    if not folder.resolve().is_relative_to(ROOT):
        print(f"{folder} lies outside the repository: it doesn't travel with it")
    elif ignored(folder) is False:
        print(f"{folder} isn't ignored by git: runs/ is, and what lies in it")
    for names, why in ((compiled, NOT_CARRIED), (absent, "not installed here")):
        if names:
            print(f"left out, {why}: {', '.join(names)}")
    print(f"there: python -m benchmarks.gpu --carried {folder}")
