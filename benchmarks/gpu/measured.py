"""The records among the results, as the page and the goals read them: by device, and of repeated rows the one that counts."""

from collections import Counter

from benchmarks.gpu.counting import BANDWIDTH, MATRIX, Rates
from benchmarks.gpu.parts import PARTS
from benchmarks.gpu.record import device_of, read


def by_device(results):
    """{device: {part: record}}, rehearsals left out; the device with the most parts first."""
    found = {}
    for part in PARTS:
        for path in sorted(results.glob(f"{part.name}.*.json")):
            body = read(path)
            if not body["rehearsal"]:
                found.setdefault(device_of(body), {})[part.name] = body
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))


def on_one_device(found, names, also=()):
    """({part: record} of the device that has most of the parts `names`, and of its parts `also`; a line that names it and what is left out,
    "" where none of them was measured)."""
    having = Counter({device: sum(name in bodies for name in names) for device, bodies in found.items()})
    device, most = having.most_common(1)[0] if having else (None, 0)
    if not most:
        return {}, ""
    others = [f"{name} ({other})" for other, bodies in found.items() if other != device for name in names if name in bodies]
    kept = {name: body for name, body in found[device].items() if name in (*names, *also)}
    return kept, f"Measured on: {device}." + (f" Left out, as measured elsewhere: {', '.join(others)}." if others else "")


def rows_of(bodies, part, kind):
    return [r for r in bodies[part]["rows"] if r["kind"] == kind] if part in bodies else []


def last(bodies, part, kind):
    """{(library, way): row}, of those timed in turn or compared several times the last."""
    return {(r["library"], r["way"]): r for r in rows_of(bodies, part, kind)}


def plain(row):
    """Whether the row is no figure of the kernels', as the network itself ran."""
    return (row["used"] or "").startswith("plain")


def fastest(bodies, part):
    """{key of a step: row} of the fastest configuration tried."""
    took = {}
    for row in rows_of(bodies, part, "kernel"):
        took[row["key"]] = min(row, took.get(row["key"], row), key=lambda r: r["ms"])
    return took


def copied(bodies):
    """Bytes/s that the device copies, None where that wasn't measured."""
    return next((r["rate"] for r in rows_of(bodies, "ceilings", "ceiling") if r["unit"] == "byte/s"), None)


def rates_of(bodies):
    """What predictions for the device count on: its own ceilings where they were measured, else an H200's."""
    product = next((r["rate"] for r in rows_of(bodies, "ceilings", "ceiling") if r["unit"] == "FLOP/s"), None)
    return Rates(copied(bodies) or BANDWIDTH, product or MATRIX)
