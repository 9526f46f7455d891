"""Every GPU test and benchmark that is ready, in parts of at most eight minutes, each of which can be run alone.

    python -m benchmarks.gpu [PART...]       all parts, or those named; results/PART.DEVICE.json each, then docs/gpu.md
    python -m benchmarks.gpu carry DIR ...   gathers what has to travel to a machine without an index
    python -m benchmarks.gpu code            compiles the kernels for sm_90, without a GPU, for the predictions
    python -m benchmarks.gpu page            writes docs/gpu.md from the results

Nothing is installed. What the machine lacks may lie in a folder that `carry` made, given by --carried or $TRISCALE_CARRIED. The
first lines tell what is there and which parts are skipped for the lack of what. Without a GPU nothing is run: status 0. Status 1
where a part didn't come to its end or a test failed.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

from benchmarks.gpu import carrying, code, machine, page, tuned
from benchmarks.gpu.goals import goals
from benchmarks.gpu.measured import by_device
from benchmarks.gpu.parts import LIMIT, PARTS, chosen, missing, remaining
from benchmarks.gpu.record import RESULTS, outcomes, path_of, read, read_earlier, waiting, write

GRACE = 5.0  # seconds beyond its own limit before a part is killed


def main(arguments):
    commands = {"carry": carrying.main, "code": lambda _: code.main(RESULTS), "page": lambda _: page.main(RESULTS)}
    if arguments and arguments[0] in commands:
        return commands[arguments[0]](arguments[1:])
    options = parsed(arguments)
    found = machine.carried(options.carried)
    machine.add_wheels(found)
    if not machine.have("torch"):
        print("no torch here: nothing to run")
        return 0
    try:
        about, imports = machine.probed(options.carried, rehearsal=options.rehearse).values()
    except ValueError as error:
        print(f"torch can't be asked what is here: {error}", file=sys.stderr)
        return 1
    for line in machine.inventory(found, about):
        print(line)
    if about["device"] is None and not options.rehearse:
        print("no NVIDIA GPU that torch can use: nothing to run. `--rehearse` tries the parts on the CPU, with tiny shapes")
        return 0
    options.device = about["device"]
    broken, left = run_all(ready(options, found, imports), options)
    if options.out == RESULTS:
        page.main(RESULTS)
    if options.device:
        print("\n".join(goals(by_device(options.out).get(options.device["name"], {}))))
    if left:
        print(f"no time for: {', '.join(part.name for part in left)}; the same command with --remaining goes on")
    if broken:
        print(f"not done: {', '.join(broken)}", file=sys.stderr)
    return 1 if broken else 0


def ready(options, found, imports):
    """The parts to run, in order: of those asked for what isn't done yet, where that is asked for, and whose needs are there. Prints them all."""
    parts = chosen(options.parts)
    if options.remaining:
        parts = remaining(parts, options.out, options.device, rehearsal=options.rehearse)
    able = []
    for part in parts:
        lacks = missing(part, found, imports)
        print(f"{'skipped' if lacks else 'to run '}  {part.name:<20} {part.about}{': needs ' + ', '.join(lacks) if lacks else ''}")
        able += [] if lacks else [part]
    print(f"at most {min(len(able) * options.limit / 60, options.minutes):.0f} minutes", flush=True)
    return able


def run_all(parts, options):
    """(names of the parts that didn't come to their end or found failures, parts for which there was no time)."""
    broken, left = [], []
    for i, part in enumerate(parts):
        seconds = min(options.limit, options.begun + 60 * options.minutes - time.monotonic() - GRACE)
        if seconds < min(part.least, options.limit):
            left.append(part)
            continue
        others_wait = options.minutes < float("inf") and parts[i + 1 :]
        if others_wait and read_earlier(options.out, part.name, options.device, rehearsal=options.rehearse) is None:
            seconds = min(seconds, part.most)
        if not run(part, options, seconds):
            broken.append(part.name)
        tuned.gather(options.out)
        if options.archive:
            archive(options)
    return broken, left


def parsed(arguments):
    parser = argparse.ArgumentParser("python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(p.name for p in PARTS)}; or a beginning: peers, peers-training")
    parser.add_argument("--carried", default=os.environ.get("TRISCALE_CARRIED"), help="a folder that `carry` made; $TRISCALE_CARRIED")
    parser.add_argument("--limit", type=float, default=LIMIT, help=f"seconds of a part, up to {LIMIT:.0f}")
    parser.add_argument(
        "--minutes",
        type=float,
        default=float("inf"),
        help="of all together, from now: each part's share is limited at first, and one that no longer fits isn't begun",
    )
    parser.add_argument("--remaining", action="store_true", help="only parts that aren't done yet on such a device; those begun after the others")
    parser.add_argument("--out", type=Path, help="the folder of the records; benchmarks/gpu/results unless given")
    parser.add_argument("--archive", type=Path, metavar="FILE.tgz", help="written after each part: all records of the device, and what tuning found")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU with tiny shapes, to try the parts themselves; needs --out")
    options = parser.parse_args(arguments)
    if not 30 <= options.limit <= LIMIT:
        parser.error(f"--limit: expected 30 to {LIMIT:.0f} seconds, found {options.limit:g}")
    if not options.minutes >= 1:
        parser.error(f"--minutes: expected 1 or more, found {options.minutes:g}")
    if options.rehearse and options.out is None:
        parser.error("--rehearse: give --out too; a rehearsal's figures must not lie among the results")
    try:
        chosen(options.parts)
        machine.carried(options.carried)
    except ValueError as error:
        parser.error(str(error))
    options.out, options.begun, options.device = options.out or RESULTS, time.monotonic(), None
    return options


def run(part, options, seconds):
    """Whether the part came to its end, with something found, and no test failed."""
    print(f"== {part.name}", flush=True)
    path = path_of(options.out, part.name, (options.device or {}).get("name"))
    waiting(path).unlink(missing_ok=True)
    start, before = time.monotonic(), written(path)
    more = [*(["--carried", options.carried] if options.carried else []), *(["--rehearse"] if options.rehearse else [])]
    command = [sys.executable, "-m", "benchmarks.gpu.worker", part.name, str(seconds), str(options.out.resolve()), *more]
    status = supervised(command, seconds + GRACE)
    body = closed(path, status) if waiting(path).is_file() or written(path) != before else None
    ended, rows = (body["ended"], body["rows"]) if body else ("nothing written", [])
    tests = outcomes(rows)
    told = f"; tests: {', '.join(f'{n} {outcome}' for outcome, n in tests.items())}" if sum(tests.values()) else ""
    if waiting(path).is_file():
        waiting(path).unlink()
        told += "; the earlier record has more, and stays"
    print(f"   {ended}, {len(rows)} rows, {time.monotonic() - start:.0f} s{told}", flush=True)
    return ended in ("done", "out of time") and len(rows) > 0 and not tests["failed"] + tests["error"]


def archive(options):
    """All records of the device in one file, and what tuning found; whole at any time."""
    file, device = options.archive, (options.device or {}).get("name")
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(file.name + ".part")
    with tarfile.open(partial, "w:gz") as tar:
        for path in (*(path_of(options.out, part.name, device) for part in PARTS), options.out / tuned.FILE):
            if path.is_file():
                tar.add(path, path.name)
    partial.replace(file)


def supervised(command, seconds):
    """The exit status of `command`, run from the repository; None where it was killed after `seconds`. Its children die with it."""
    child = subprocess.Popen(command, cwd=machine.ROOT, process_group=0)
    try:
        return child.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def closed(path, status):
    """The part's record, there or waiting beside it, marked as killed or crashed where its process could not end it. status: `supervised`'s."""
    path = waiting(path) if waiting(path).is_file() else path
    body = read(path)
    if body["ended"] == "running":
        body["ended"] = "killed at the limit" if status is None else "crashed"
        write(path, body)
    return body


def written(path):
    """When, to tell a record from an earlier run's; None where there is none."""
    return path.stat().st_mtime_ns if path.is_file() else None


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))  # so that a part dies with this process
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(3)
