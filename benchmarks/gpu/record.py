"""What a part leaves behind: one JSON file, whole at any time, whose rows have fixed columns."""

import json
import re
import time
from pathlib import Path

from triscale.files import write_text

FORMAT = 1
NUMBER, OPTIONAL, TEXT = (int, float), (int, float, type(None)), (str, type(None))
# The columns of each kind of row. Times are of one call, images_per_s of its median; runs: how many times it was timed.
TIMES = {"ms": NUMBER, "ms_min": NUMBER, "ms_max": NUMBER, "runs": int}
SIZES = {"batch": int, "px": int, "images_per_s": NUMBER, "peak_bytes": OPTIONAL}
COLUMNS = {
    "test": {"name": str, "outcome": str, "seconds": NUMBER, "message": str},
    # mode: inference, training or latency (batch 1, waited for, on the host's clock); way: a key of peers.WAYS, or ours, ours from uint8
    # used: of ours, what its engine took ("kernels bfloat16"; "plain ..." where the network itself ran, and why); None for peers
    # peak_bytes: reserved at most while it was timed, beyond what lay there before it was built
    "network": {"library": str, "network": str, "way": str, "mode": str, "used": TEXT, **SIZES, **TIMES},
    # timed in turn with the others of its part, at the best batch; of two rows of one library and way the later counts
    "in turn": {"library": str, "network": str, "way": str, "mode": str, "used": TEXT, "batch": int, "px": int, "images_per_s": NUMBER, **TIMES},
    # library, way: of a peer timed in turn with ours -> how many times its rate ours is, median and range over the rounds
    "comparison": {"network": str, "mode": str, "library": str, "way": str, "used": TEXT}
    | {"times": NUMBER, "times_min": NUMBER, "times_max": NUMBER},
    # key: of counting.Step; config: how it was cut, the rank-th choice by the kernel's own estimate; bytes: of the batch, as counted
    "kernel": {"network": str, "key": str, "config": str, "rank": int, "batch": int, "bytes": int, "bytes_per_s": NUMBER, **TIMES},
    # backend: what torch takes for it, "Cudnn" or "CudaDepthwise2d"
    "depthwise": {"channels": int, "side": int, "kernel": int, "stride": int, "batch": int, "way": str, "backend": str, "pass": str, "bytes": int}
    | {"bytes_per_s": NUMBER, **TIMES},
    "decode": {"data": str, "way": str, "images_per_s": NUMBER, "on_cpu": int, **TIMES, "batch": int},
    # right: pictures that ours classifies as the pack's labels say, right_plain: the fp32 network; None where the pack has other classes
    "agreement": {"network": str, "pack": str, "used": TEXT, "images": int, "different": int, "right": OPTIONAL, "right_plain": OPTIONAL}
    | {"largest_change": NUMBER},
    "ceiling": {"what": str, "rate": NUMBER, "unit": str, **TIMES},
}
BODY = {"format": int, "part": str, "date": str, "rehearsal": bool, "machine": dict, "limit_s": NUMBER, "seconds": NUMBER, "ended": str}
BODY |= {"notes": list, "rows": list}
ENDED = ("running", "done", "out of time", "killed at the limit", "crashed")


def check(body):
    """Raises ValueError where `body` is no record: missing or unknown keys, or values of another type."""
    _columns(body, BODY, "record")
    if body["format"] != FORMAT or body["ended"] not in ENDED:
        raise ValueError(f"record: expected format {FORMAT}, ended one of {', '.join(ENDED)}; found {body['format']}, {body['ended']!r}")
    for i, row in enumerate(body["rows"]):
        kind = row.get("kind")
        if kind not in COLUMNS:
            raise ValueError(f"row {i}: expected a kind of {', '.join(COLUMNS)}, found {kind!r}")
        _columns({k: v for k, v in row.items() if k != "kind"}, COLUMNS[kind], f"row {i} ({kind})")


def _columns(found, expected, where):
    if found.keys() != expected.keys():
        raise ValueError(f"{where}: missing {sorted(expected.keys() - found.keys())}, unknown {sorted(found.keys() - expected.keys())}")
    for name, kind in expected.items():
        if not isinstance(found[name], kind) or (isinstance(found[name], bool) and kind is not bool):
            raise ValueError(f"{where}: {name} is {found[name]!r}, a {type(found[name]).__name__}")


def path_of(folder, part, device=None):
    """device: its name; each has records of its own."""
    return Path(folder) / f"{part}.{re.sub(r'[^a-z0-9]+', '-', (device or 'cpu').lower())}.json"


def device_of(body):
    """The name of the device that it was measured on, None where there was none."""
    return (body["machine"].get("device") or {}).get("name")


def write(path, body):
    check(body)
    write_text(path, json.dumps(body, indent=1) + "\n")


def read(path):
    """The record at `path`, None where there is none. Raises ValueError for a file that is something else."""
    if not path.is_file():
        return None
    body = json.loads(path.read_text(encoding="utf-8"))
    check(body)
    return body


RESULTS = Path(__file__).parent / "results"


def read_earlier(folder, part, device, *, rehearsal=False):
    """The record of a part on such a device (machine.gpu), in `folder` or else among the tree's results; None where there is none.

    One of another version, or on another device, counts as none.
    """
    name = (device or {}).get("name")
    for place in dict.fromkeys((Path(folder), RESULTS)):
        try:
            body = read(path_of(place, part, name))
        except ValueError:  # of another version: nothing to build on
            continue
        if body and body["rehearsal"] == rehearsal and device_of(body) == name:
            return body
    return None


def compared(body):
    """(library, way) of the peers that ours was timed in turn with, where it ran by its kernels."""
    rows = [row for row in body["rows"] if row["kind"] == "comparison" and not (row["used"] or "").startswith("plain")]
    return {(row["library"], row["way"]) for row in rows}


def better(body, old):
    """Whether a record is to take the place of an older one: it is done; or the older isn't, and lacks a comparison or has fewer rows."""
    if old is None or body["ended"] == "done":
        return True
    return old["ended"] != "done" and (not compared(body) <= compared(old) or len(body["rows"]) > len(old["rows"]))


def outcomes(rows):
    """How many of the tests among them passed, failed and so on."""
    tests = [row["outcome"] for row in rows if row["kind"] == "test"]
    return {outcome: tests.count(outcome) for outcome in ("passed", "failed", "error", "skipped")}


class Record:
    """The record of a part that runs: each row is on disk when `add` returns. add: columns as COLUMNS[kind] has them.

    An earlier record of the part on such a device, here or in the tree, stays until this one is `better`; so long this one lies beside
    its place, at `waiting`.
    """

    def __init__(self, folder, part, machine, limit, rehearsal=False):
        self.start = time.monotonic()
        self.body = {"format": FORMAT, "part": part, "date": time.strftime("%Y-%m-%d"), "rehearsal": rehearsal, "machine": machine}
        self.body |= {"limit_s": limit, "seconds": 0.0, "ended": "running", "notes": [], "rows": []}
        self.path, device = path_of(folder, part, device_of(self.body)), machine.get("device")
        self.waiting, self.old = waiting(self.path), read_earlier(folder, part, device, rehearsal=rehearsal)
        self.save()

    def add(self, kind, **columns):
        self.body["rows"].append({"kind": kind, **columns})
        self.save()

    def note(self, text):
        """One line about what was left out, and why."""
        print(f"  {text}", flush=True)
        self.body["notes"].append(text)
        self.save()

    def end(self, how, machine=None):
        self.body["ended"] = how
        self.body["machine"] |= machine or {}
        self.save()

    def save(self):
        self.body["seconds"] = round(time.monotonic() - self.start, 1)
        if better(self.body, self.old):
            write(self.path, self.body)
            self.waiting.unlink(missing_ok=True)
        else:
            write(self.waiting, self.body)


def waiting(path):
    """Where a record lies that isn't better than the one at `path`."""
    return path.with_name(path.name + ".new")
