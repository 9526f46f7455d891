"""What was to be reached on a GPU, and what was, in lines: printed when the parts have run, and on the page."""

from benchmarks.gpu import counting
from benchmarks.gpu.measured import copied, fastest, last, plain, rows_of
from benchmarks.gpu.parts import NETWORKS
from triscale.families import arch

TIMES = {"b0": 2.5, "b4": 2.0, "b7": 2.0}  # the rate of the best compiled peer, at the best batch of each
LATENCY_MS = {"b0": 0.5}  # batch 1
CHANGED = 1 / 256  # of the pictures, at most, may get another class
SHARE = counting.SHARE  # of the copy's bandwidth, by the bytes counted


def goals(bodies):
    """Lines. bodies: {part: record} of one device."""
    lines = [_rate(bodies, name) for name in NETWORKS] + [_latency(bodies, name) for name in LATENCY_MS] + _classes(bodies)
    return lines + [line for name in NETWORKS if (line := _bandwidth(bodies, name))]


def _reached(yes):
    return "reached" if yes else "not reached"


def compiled_best(found):
    """Of comparisons by (library, way) that of the fastest compiled peer, None where there is none."""
    return min((row for (_, way), row in found.items() if "compiled" in way), key=lambda row: row["times"], default=None)


def _rate(bodies, name):
    ours = last(bodies, f"ours-{name}", "in turn").get(("triscale", "ours"))
    goal = f"goal {TIMES[name]:g} times the best compiled peer"
    if ours is None:
        return f"{name.upper()}, rate: not measured ({goal})"
    said = f"{name.upper()}: {ours['images_per_s']:,.0f} images/s at batch {ours['batch']}"
    if plain(ours):
        return f"{said}, not by the kernels ({ours['used']}) ({goal}): not reached"
    top = compiled_best(last(bodies, f"ours-{name}", "comparison"))
    if top is None:
        return f"{said}, not compared with a compiled peer yet ({goal})"
    return f"{said}, {top['times']:.2f} times {top['library']} {top['way']} (goal {TIMES[name]:g}): {_reached(top['times'] >= TIMES[name])}"


def _latency(bodies, name):
    ours, goal = last(bodies, f"latency-{name}", "in turn").get(("triscale", "ours")), LATENCY_MS[name]
    if ours is None:
        return f"{name.upper()}, latency: not measured (goal {goal:g} ms)"
    top = compiled_best(last(bodies, f"latency-{name}", "comparison"))
    beside = f", {top['times']:.2f} times as fast as {top['library']} {top['way']}" if top else ""
    by = f", not by the kernels ({ours['used']})" if plain(ours) else ""
    return f"{name.upper()}, batch 1: {ours['ms']:.3f} ms{beside}{by} (goal {goal:g}): {_reached(ours['ms'] <= goal and not plain(ours))}"


def _classes(bodies):
    rows = rows_of(bodies, "ours-top1", "agreement")
    if not rows:
        return [f"classes that optimising changes: not measured (goal at most {CHANGED * 256:.0f} of 256)"]
    lines = []
    for r in rows:
        by = f", not by the kernels ({r['used']})" if plain(r) else ""
        fine = r["different"] <= CHANGED * r["images"] and not plain(r)
        lines.append(
            f"{r['network']}: {r['different']} of {r['images']} classes change{by} (goal at most {CHANGED * 256:.0f} of 256): {_reached(fine)}"
        )
    return lines


def _bandwidth(bodies, name):
    """The kernels' share of the device's copy, all bytes by all time, by kind and together; "" where nothing was measured."""
    took, copy = fastest(bodies, f"kernels-{name}"), copied(bodies)
    found = [step for step in counting.steps(arch(f"efficientnet_{name}"), pixel=1) if step.key in took]
    if not found or not copy:
        return ""
    kinds = {kind: [step for step in found if step.kind == kind] for kind in dict.fromkeys(step.kind for step in found)}

    def share(some):
        moved = sum(step.times * took[step.key]["bytes"] / took[step.key]["batch"] for step in some)
        return moved / (1e-3 * copy * sum(step.times * took[step.key]["ms"] / took[step.key]["batch"] for step in some))

    whole, parts = share(found), ", ".join(f"{kind} {share(some):.0%}" for kind, some in kinds.items())
    missing = len(counting.steps(arch(f"efficientnet_{name}"))) - len(found)
    lacks = f", without {missing} kernels that weren't measured" if missing else ""
    return f"{name.upper()}'s kernels: {whole:.0%} of the copy's bandwidth{lacks} (goal {SHARE:.0%}): {_reached(whole >= SHARE)}; {parts}"
