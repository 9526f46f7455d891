"""The sections of a network search's page."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

from triscale.cost_model import StageCost, cost
from triscale.search.record import Record, front
from triscale.search_report import network_plots as draw
from triscale.search_report.facts import (
    CERTAIN,
    Network,
    amount,
    images,
    importance_grid,
    metric,
    network_of,
    number,
    phrase,
    priced,
    ranked,
    reference,
    standard_error,
    value_of,
    values_apart,
)
from triscale.search_report.parts import cell, drawn, learning_curves, progress, reasons, row, settings, table, trials, why_none
from triscale.text import printable

FEW = 100  # trials below which the importance of 42 decisions is mostly chance
FRONT = 12  # rows of the front


def figures(record: Record, classes: int, channels: int) -> dict[str, Any | None]:
    side = reference(record, classes, channels)
    return {"history": draw.history(record, side), "pareto": draw.pareto(record, side), "importance": draw.importance(record)}


def network_page(record: Record, classes: int, channels: int) -> dict[str, Any]:
    side, plots = reference(record, classes, channels), figures(record, classes, channels)
    parts = [
        _first(record, side), _history(record, plots), _pareto(record, plots), _importance(record, plots), _table_1(record, side, classes, channels),
        learning_curves(record), trials(record), reasons(record), _terms(record), settings(record),
    ]  # fmt: skip
    title = f"Network search around {printable(record.reference.name) or 'a reference network'}"
    return {"title": title, "lead": lead(record, side), "sections": [part for part in parts if part]}


def lead(record: Record, side: Network) -> str:
    """The result in one sentence, then how much it is worth."""
    first, kind = ranked(record), metric(record)
    if not first:
        return f"No network has been scored yet{why_none(record)}. The reference, {side.name}, {_beside(side, kind)}."
    best = first[0]
    paid, worth = best.cost.get(kind), ""
    if record.target:
        share = f", {paid / record.target[1]:.2f} × the target of {amount(*record.target)}" if paid and record.target[1] else ""
        worth = f"{share}: value {number(best.value)}"
    name = (
        f"Trial {best.number} is the best of {len(first):,} scored networks" if len(first) > 1 else f"Trial {best.number} is the only scored network"
    )
    text = f"{name}, with score {number(best.score)} at {phrase(kind, paid)}{worth}; the reference, {side.name}, {_beside(side, kind)}."
    return f"{text} {_verdict(record, side)}".strip()


def _beside(side: Network, kind: str) -> str:
    """What is known of the reference, and what isn't."""
    paid = kind if kind in side.cost else "macs"
    missing = ([kind] if kind not in side.cost else []) + (["score"] if side.score is None else [])
    score = "" if side.score is None else f" and scores {number(side.score)}"
    unknown = f"; its {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'}n't known" if missing else ""
    return f"takes {phrase(paid, side.cost.get(paid))}{score}{unknown}"


def _verdict(record: Record, side: Network) -> str:
    best, n = ranked(record)[0], images(record)
    if best.value is None or side.value is None:
        return ""
    ahead = best.value - side.value
    if ahead <= 0:
        return f"No network found is better than the reference, whose value is {number(side.value)}."
    text = f"That is {number(ahead)} more value than the reference's {number(side.value)}"
    apart, count = values_apart(record, network_of(best), side), len(ranked(record))
    if n and apart is False:
        return f"{text}; on {n:,} scored images the two can't be told apart."
    if n and apart and count > 2:
        return f"{text}, beyond {CERTAIN:g} standard errors on {n:,} scored images; but the best of {count:,} noisy scores is on average too high."
    return f"{text}."


def _first(record: Record, side: Network) -> dict[str, Any]:
    """The comparison that stands under the sentence."""
    first, kind = ranked(record), metric(record)
    kinds = [kind, *(k for k in ("macs", "params") if k != kind)]
    names = {"macs": "MACs", "params": "parameters"}
    rows = []
    for network, style in [(network_of(t), "best") for t in first[:1]] + [(side, "")]:
        paid = network.cost.get(kind)
        share = [f"{paid / record.target[1]:.2f}" if paid and record.target[1] else "–"] if record.target else []
        costs = [amount(k, network.cost.get(k)) for k in kinds]
        name = f"best: {network.name}" if style else f"reference: {network.name}"
        rows.append(row([name, number(network.score), number(network.value), costs[0], *share, *costs[1:]], style))
    of = [f"of target {amount(*record.target)}"] if record.target else []
    header = ("network", "score", "value", names.get(kind, kind), *of, *(names.get(k, k) for k in kinds[1:]))
    return {"title": "", "tables": [table(header, rows)], "texts": [progress(record), *_caveat(record)]}


def _caveat(record: Record) -> list[str]:
    first, n = ranked(record), images(record)
    error = standard_error(first[0].score, n) if first else None
    if n is None or error is None:
        return []
    if len(first) < 2:
        return []
    near = sum(values_apart(record, network_of(first[0]), network_of(t)) is False for t in first[1:])
    text = f"On {n:,} scored images the best score has a standard error of about {error:.4f}: "
    if not near:
        return [f"{text}no other network's value lies within {CERTAIN:g} standard errors of the difference."]
    others = f"the values of {near:,} of the {len(first) - 1:,} others lie within {CERTAIN:g} standard errors of the difference"
    return [f"{text}{others}, so their order is uncertain, and the best of many noisy scores is on average too high."]


def _history(record: Record, plots: dict[str, Any]) -> dict[str, Any] | None:
    if plots["history"] is None:
        return None
    alt = "value of each trial in order, the best so far as a step line, and trials without a value"
    return {"title": "How the search went", **drawn(plots["history"], alt)}


def _pareto(record: Record, plots: dict[str, Any]) -> dict[str, Any] | None:
    if plots["pareto"] is None:
        return None
    found, kind = priced(record), metric(record)
    chosen = [found[i] for i in front([(paid, score) for _, paid, score in found])]
    best = ranked(record)[0].number
    step = max(1, -(-len(chosen) // FRONT))
    shown = [c for i, c in enumerate(chosen) if (len(chosen) - 1 - i) % step == 0 or c[0].number == best]
    names = {"macs": "MACs"}
    rows = [
        row(
            [f"{t.number}", number(score), amount(kind, paid), number(t.value), amount("params", t.cost.get("params"))],
            "best" if t.number == best else "",
        )
        for t, paid, score in shown
    ]
    texts = ["On the front: no network scored is both cheaper and better. Choose from it by what you can afford."]
    if len(shown) < len(chosen):
        texts.append(f"{len(shown)} of the {len(chosen):,} networks of the front are listed.")
    header = ("trial", "score", names.get(kind, kind), "value", "parameters")
    alt = f"score against {kind}, with the Pareto front, the best network, the reference and the target"
    return {
        "title": f"Score against {names.get(kind, kind)}",
        **drawn(plots["pareto"], alt),
        "tables": [table(header, rows, "small")],
        "texts": texts,
    }


def _importance(record: Record, plots: dict[str, Any]) -> dict[str, Any]:
    title, (_, rest) = "Which decisions mattered", importance_grid(record)
    if not record.importance:
        return {"title": title, "intro": ["Not known."]}
    count = len(ranked(record))
    texts = ["How much each decision sets the best tenth of the scored networks apart from the rest (PED-ANOVA); it says nothing of the direction."]
    if count < FEW:
        texts.append(f"With {count:,} scored networks for {len(record.importance)} decisions these shares are mostly noise.")
    if rest:
        most = sorted(rest.items(), key=lambda item: -item[1])[:20]
        texts.append(printable("Other decisions: " + ", ".join(f"{name} {100 * share:.0f} %" for name, share in most) + "."))
    return {"title": title, **drawn(plots["importance"], "importance of each decision, by block and kind"), "texts": texts}


def _table_1(record: Record, side: Network, classes: int, channels: int) -> dict[str, Any] | None:
    best = next(iter(ranked(record)), None)
    if best is None or best.arch is None:
        return None
    counted = [cost(arch, classes, channels) for arch in (best.arch, record.reference)]
    skips = [["", *(s.skip for s in arch.stages), ""] for arch in (best.arch, record.reference)]
    halves = [[_cells(r, s) for r, s in zip(c.per_stage, skip, strict=True)] for c, skip in zip(counted, skips, strict=True)]
    rows = []
    for i, (mine, its) in enumerate(zip_longest(*halves, fillvalue=[""] * 7), 1):
        rows.append(row([f"{i}", *_marked(mine, its, "differs new"), *_marked(its, mine)]))
    sums = [["total", "", "", "", f"{sum(r.layers for r in c.per_stage)}", amount("params", c.params), amount("macs", c.macs)] for c in counted]
    rows.append(row(["", *_marked(sums[0], sums[1], "differs new"), *_marked(sums[1], sums[0])], "total"))
    header = ("#", *("operator", "px", "skip", "ch.", "layers", "params", "MACs") * 2)
    content = table(header, rows, "dense", ("operator", "skip")) | {
        "groups": [("", 1), (f"best: trial {best.number}", 7), (f"reference: {side.name}", 7)]
    }
    texts = ["Shaded: differs, bold in the best. px: input of the stage; ch.: output channels; parameters and MACs are of all layers of a stage."]
    paid = best.cost.get("macs")
    if paid is not None and paid != counted[0].macs:
        told = f"the record has {paid:,.0f} MACs for this network and this table {counted[0].macs:,}"
        texts.append(f"Counted with {classes:,} classes and {channels} input channels: {told}, so the search counted with others.")
    return {"title": "The best network beside the reference", "tables": [content], "texts": texts}


def _cells(r: StageCost, skip: str) -> list[str]:
    return [r.operator, f"{r.resolution[0]}", skip, f"{r.channels}", f"{r.layers}", amount("params", r.params), amount("macs", r.macs)]


def _marked(mine: Sequence[str], its: Sequence[str], mark: str = "differs") -> list[dict[str, str]]:
    """Cells of one half of a row, with those that differ from the other half marked."""
    styles = [["edge left", "", "left", "", "", "", ""][i] + (f" {mark}" if a != b else "") for i, (a, b) in enumerate(zip(mine, its, strict=True))]
    return [cell(text, style.strip()) for text, style in zip(mine, styles, strict=True)]


def _terms(record: Record) -> dict[str, Any]:
    return {"title": "What the words mean", "terms": [*_value_terms(record), *_other_terms(record)]}


def _value_terms(record: Record) -> list[tuple[str, str]]:
    score = ("score", "What the score function gave a network, as a rule its accuracy on held-out images after a short training, the proxy.")
    if not record.target:
        return [score, ("value", "What the search maximises: here the score itself, as no target was given.")]
    kind, target = record.target
    below, above = record.exponents
    w = f"w = {below:g}" if below == above else f"w = {below:g} at or below the target and {above:g} above"
    text = f"What the search maximises: score × (cost / T)^w, with T = {phrase(kind, target)} and {w}."
    best = next(iter(ranked(record)), None)
    paid = best.cost.get(kind) if best else None
    if best and paid:
        found = value_of(record, best.score, best.cost)
        sum_ = f"{number(best.score)} × ({amount(kind, paid)} / {amount(kind, target)})^{above if paid > target else below:g} = {number(found)}"
        text += f" Of the best: {sum_}" + ("." if number(found) == number(best.value) else f"; the record gives {number(best.value)}.")
    text += f" A network of twice the target loses {100 * (1 - 2**above):.0f} % of its value." if above < 0 else ""
    return [score, ("value", text)]


def _other_terms(record: Record) -> list[tuple[str, str]]:
    return [
        ("MACs", "Multiply-adds of convolutions and linear layers for one image."),
        ("Pareto front", "The networks that no other beats in score and cost at once."),
        ("pruned", "Stopped early, because it did worse than others at the same epoch."),
        ("lost", "Its worker died; another trial takes its place."),
        ("cached", "The score of this network was known, so nothing was trained."),
    ]
