"""Tables 1, 2, 3 and 7: our counts beside the paper's. Source: paper.py's."""

from __future__ import annotations

from triscale import paper
from triscale.architecture import Arch, Stage
from triscale.budget import fit_budget
from triscale.cost_model import cost
from triscale.families import arch
from triscale.reproduce.layout import ACCURACY, LIMIT, MACS, NO_RULE, NONE, NOT_BUILT, NOT_RUN, Reproduction, as_printed, billions, difference
from triscale.reproduce.reasons import why
from triscale.scaling import Scaling, compound, scale


def _operator(stage: Stage) -> str:
    return f"MBConv{stage.expand:g} k{stage.kernel}" if stage.block == "mbconv" else stage.operator


def table1() -> Reproduction:
    b0 = arch("efficientnet_b0")
    c = cost(b0)
    operators = [f"Conv {b0.stem.kernel}x{b0.stem.kernel}", *map(_operator, b0.stages), "Conv 1x1, pooling, FC"]
    strides = [b0.stem.stride, *(s.stride for s in b0.stages), 1]
    rows = []
    for i, (row, operator, stride, theirs) in enumerate(zip(c.per_stage, operators, strides, paper.TABLE1, strict=True), 1):
        ours = paper.StageRow(operator, row.resolution[0], row.channels, row.layers, stride)
        differs = [f"{key} {value}" for key, value in vars(theirs).items() if getattr(ours, key) != value]
        same = "; ".join(differs) or "the same"
        rows.append((f"{i}", operator, *(f"{n}" for n in list(vars(ours).values())[1:]), same, f"{row.params:,}", f"{row.macs / 1e9:.4f}"))
    layers = sum(row.layers for row in c.per_stage)
    rows.append(("total", "", "", "", f"{layers}", "", "", f"{c.params:,}", f"{c.macs / 1e9:.4f}"))
    header = ("Stage", "Operator", "Resolution", "Channels", "Layers", "Stride", "Paper's row", "Params", "MACs (B)")
    notes = (MACS, "Resolution is the stage's input; the stride is its first layer's. Squeeze-excitation 0.25 in every MBConv.")
    return Reproduction("Table 1: EfficientNet-B0, ours beside the paper's", header, tuple(rows), notes)


def table2() -> Reproduction:
    rows, notes, off = [], [MACS, ACCURACY], []
    for row in paper.TABLE2:
        accuracy = " / ".join(f"{a:.1f}" for a in (row.top1, row.top5) if a is not None) or NONE
        theirs = row.macs or NONE
        if row.arch is None:
            rows.append((row.name, NOT_BUILT, f"{row.params}M", NONE, theirs, NONE, NOT_RUN, accuracy))
            continue
        c = cost(arch(row.arch))
        ours = c.macs / 1e9
        rows.append((row.name, f"{c.params:,}", f"{row.params}M", f"{ours:.3f}", theirs, f"{difference(ours, theirs):+.1%}", NOT_RUN, accuracy))
        notes += why(row.name, ours, theirs)
        for value, printed, unit in ((c.params / 1e6, row.params, "M parameters"), (ours, theirs, "B MACs")):
            if as_printed(value, printed) != printed:
                off.append(f"{row.name} {as_printed(value, printed)} for {printed} {unit}")
    notes.append(f"Within {LIMIT:.0%}, but not the paper's digits: {', '.join(off)}. {NO_RULE}")
    notes.append(f'"{NONE}": not counted here, not printed by the paper, or an accuracy that isn\'t kept here. One accuracy is the top-1 alone.')
    header = ("Network", "Params", "Paper's params", "MACs (B)", "Paper's MACs", "Differs by", "Top-1 / top-5 here", "Paper's top-1 / top-5")
    return Reproduction("Table 2: the family and the networks it is compared with", header, tuple(rows), tuple(notes))


def scaled(row: paper.ScaledRow) -> tuple[Scaling, Arch]:
    """The row's network; where the paper gives no multipliers, the largest of the compound line within the row's MACs."""
    base = arch(row.arch)
    if row.scaling is None:
        fit = fit_budget(base, macs=float(row.macs) * 1e9)
        return compound(fit.phi), fit.arch
    s = Scaling(*row.scaling)
    return s, scale(base, s)


def fitted(row: paper.ScaledRow, s: Scaling) -> str:
    plain = billions(scale(arch(row.arch), depth=1.4, width=1.2, resolution=1.3))
    return (
        f"{row.name}: the paper gives no multipliers. fit_budget to its {row.macs} B with alpha 1.2, beta 1.1, gamma 1.15 "
        f"finds phi {s.phi:g}: d={s.depth:.3f}, w={s.width:.3f}, r={s.resolution:.3f}. (d=1.4, w=1.2, r=1.3 cost {plain:.3f} B.)"
    )


def scaling_table(title: str, table: tuple[paper.ScaledRow, ...]) -> Reproduction:
    rows, notes = [], [MACS, ACCURACY]
    for row in table:
        s, network = scaled(row)
        ours = billions(network)
        multipliers = (f"{m:g}" if row.scaling else f"{m:.3f}" for m in (s.depth, s.width, s.resolution))
        off = f"{difference(ours, row.macs):+.1%}"
        rows.append((row.name, *multipliers, f"{network.resolution}", f"{ours:.3f}", row.macs, off, NOT_RUN, f"{row.top1:.1f}"))
        if row.scaling is None:
            notes.append(fitted(row, s))
        notes += why(row.name, ours, row.macs)
    header = ("Network", "d", "w", "r", "px", "MACs (B)", "Paper's MACs", "Differs by", "Top-1 here", "Paper's top-1")
    return Reproduction(title, header, tuple(rows), tuple(notes))
