"""The sections of a coefficient search's page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from triscale.cost_model import cost
from triscale.quantities import short
from triscale.scaling import ALPHA, BETA, GAMMA, Coefficients, compound, scale
from triscale.search.record import Record
from triscale.search_report import coefficient_plots as draw
from triscale.search_report.facts import (
    CERTAIN,
    Network,
    Triple,
    amount,
    budget,
    images,
    known,
    number,
    phrase,
    place,
    reference,
    standard_error,
    told_apart,
    triples,
)
from triscale.search_report.parts import (
    cell,
    drawn,
    learning_curves,
    left_out,
    progress,
    reason,
    reasons,
    row,
    selected,
    settings,
    table,
    took,
    why_none,
)
from triscale.text import printable

PHIS = range(8)
PHI_HEADER = ("phi", "depth ×", "width ×", "resolution ×", "px", "layers", "parameters", "MACs", "of phi 0")
PAPER = Coefficients(ALPHA, BETA, GAMMA)


def scored(record: Record) -> list[Triple]:
    """Best first."""
    return [t for t in triples(record) if t.trial.state == "complete" and known(t.trial.score) and known(t.trial.value)]


def figures(record: Record, classes: int, channels: int) -> dict[str, Any | None]:
    best = next(iter(scored(record)), None)
    lines: list[tuple[str, list[tuple[int, int]]]] = []
    if best:
        pairs = [(f"chosen: {_named(best.coefficients)}", best.coefficients), (f"the paper's: {_named(PAPER)}", PAPER)]
        pairs = pairs[: 1 if best.coefficients == PAPER else 2]
        lines = [(name, [(phi, macs) for phi in PHIS if (macs := _macs(record, phi, c, classes, channels))]) for name, c in pairs]
    return {"surface": draw.surface(record), "ranking": draw.ranking(record), "growth": draw.growth(lines)}


def coefficient_page(record: Record, classes: int, channels: int) -> dict[str, Any]:
    side, plots = reference(record, classes, channels), figures(record, classes, channels)
    parts = [
        {"title": "", "texts": [progress(record)]}, _surface(plots), _ranking(record, plots), _networks(record, plots, classes, channels),
        _triples(record), learning_curves(record), reasons(record), _terms(record), settings(record),
    ]  # fmt: skip
    title = f"Scaling coefficients for {printable(record.reference.name) or 'a reference network'}"
    return {"title": title, "lead": lead(record, side), "sections": [part for part in parts if part]}


def _named(c: Coefficients) -> str:
    return f"{c.alpha:g}, {c.beta:g}, {c.gamma:g}"


def lead(record: Record, side: Network) -> str:
    """The chosen coefficients in one sentence, then how sure the choice is and where the paper's came."""
    found = scored(record)
    if not found:
        return f"No network has been scored yet{why_none(record)}. Unscaled, {side.name} takes {phrase('macs', side.cost.get('macs'))}."
    best, c, base = found[0].trial, found[0].coefficients, side.cost.get("macs")
    paid = best.cost.get("macs")
    costs = f"{phrase('macs', paid)}, {paid / base:.2f} times those of {side.name}" if paid and base else phrase("macs", paid)
    of = f"score best of {len(found):,} triples" if len(found) > 1 else "are the only scored triple"
    text = f"alpha {c.alpha:g} (depth), beta {c.beta:g} (width), gamma {c.gamma:g} (resolution) {of}: {number(best.score)} at {costs}"
    text += f"; unscaled it scores {number(side.score)}." if known(side.score) else "."
    return " ".join([text, *_paper(found), *_certainty(record, found)])


def _certainty(record: Record, found: Sequence[Triple]) -> list[str]:
    n, best = images(record), found[0].trial
    if len(found) < 2 or n is None or standard_error(best.score, n) is None:
        return []
    near = sum(told_apart(best.score, t.trial.score, n) is False for t in found[1:])
    if not near:
        return [f"On {n:,} scored images it stands out from all others."]
    return [f"On {n:,} scored images {near:,} of the other {len(found) - 1:,} can't be told from it."]


def _paper(found: Sequence[Triple]) -> list[str]:
    other = next((t for t in found if t.coefficients == PAPER), None)
    if other is None:
        return []
    if other is found[0]:
        return ["They are the paper's."]
    rank = place([t.trial.value or 0.0 for t in found], other.trial.value or 0.0)
    return [f"The paper's {_named(PAPER)} is number {rank}, with {number(other.trial.score)}."]


def _surface(plots: dict[str, Any]) -> dict[str, Any] | None:
    if plots["surface"] is None:
        return None
    texts = [
        "Of triples that share beta and gamma the best is drawn. Near a dotted line alpha is about its label; the tolerance lets it differ a little."
    ]
    return {"title": "Score over the constraint surface", **drawn(plots["surface"], "gamma against beta, each triple with its score"), "texts": texts}


def _ranking(record: Record, plots: dict[str, Any]) -> dict[str, Any] | None:
    found, n = scored(record), images(record)
    if plots["ranking"] is None:
        return None
    texts = [f"The best {draw.BARS} of {len(found):,} triples are drawn."] if len(found) > draw.BARS else []
    error = standard_error(found[0].trial.score, n)
    if n is None or error is None:
        texts.append("How many images were scored isn't known, or the score is no share of them: so is its standard error.")
    else:
        texts.append(
            f"Standard error: of a share p of n images right about sqrt(p (1 − p) / n), here {error:.4f} for the best on {n:,} images. Two scores "
            f"count as different from {CERTAIN:g} standard errors of their difference on. Other seeds would change them too: that is left out."
        )
    return {"title": "How sure the order is", **drawn(plots["ranking"], "scores of the triples with their uncertainty"), "texts": texts}


def _networks(record: Record, plots: dict[str, Any], classes: int, channels: int) -> dict[str, Any] | None:
    best = next(iter(scored(record)), None)
    if best is None:
        return None
    rows, other, chosen = [], best.coefficients != PAPER, best.coefficients
    for phi in PHIS:
        paper = _macs(record, phi, PAPER, classes, channels)
        rows.append(row([f"{phi}", *_network(record, phi, chosen, classes, channels), *([short(paper) if paper else "too large"] if other else [])]))
    header = (*PHI_HEADER, *([f"MACs with {_named(PAPER)}"] if other else []))
    texts = [
        f"Depth is alpha^phi, width beta^phi, resolution gamma^phi, with {_named(chosen)}. MACs should grow by {chosen.growth:.3f} with each "
        "phi; they grow unevenly, because layers are rounded up and channels to a multiple.",
        "The last column has the paper's coefficients on the same reference." if other else "These are the paper's coefficients.",
    ]
    alt = "multiply-adds against phi, with the chosen and the paper's coefficients"
    return {"title": "The networks for each phi", **drawn(plots["growth"], alt), "tables": [table(header, rows, "small")], "texts": texts}


def _network(record: Record, phi: int, c: Coefficients, classes: int, channels: int) -> list[str]:
    s = compound(phi, c.alpha, c.beta, c.gamma)
    multipliers = [f"{s.depth:.2f}", f"{s.width:.2f}", f"{s.resolution:.2f}"]
    try:
        arch = scale(record.reference, s)
    except ValueError:  # beyond what a network may be
        return [*multipliers, "too large", "–", "–", "–", "–"]
    found, base = cost(arch, classes, channels), cost(record.reference, classes, channels)
    layers = f"{sum(stage.layers for stage in arch.stages)}"
    return [*multipliers, f"{arch.resolution}", layers, short(found.params), short(found.macs), f"{found.macs / base.macs:.2f}"]


def _macs(record: Record, phi: int, c: Coefficients, classes: int, channels: int) -> int | None:
    try:
        return cost(scale(record.reference, compound(phi, c.alpha, c.beta, c.gamma)), classes, channels).macs
    except ValueError:  # beyond what a network may be
        return None


def _triples(record: Record) -> dict[str, Any]:
    found, n = scored(record), images(record)
    ranks = {t.trial.number: i for i, t in enumerate(found, 1)}
    coefficients = {t.trial.number: t.coefficients for t in triples(record)}
    shown, hidden = selected(record, [t.trial for t in found])
    rows = []
    for t in shown:
        c, rank = coefficients.get(t.number), ranks.get(t.number)
        three = [f"{c.alpha:g}", f"{c.beta:g}", f"{c.gamma:g}", f"{c.growth:.3f}"] if c else ["–"] * 4
        same = rank is not None and rank > 1 and told_apart(found[0].trial.score, t.score, n) is False
        note = "not told from the best" if same else reason(t)
        texts = [
            f"{rank or '–'}",
            *three,
            number(t.score),
            amount("macs", t.cost.get("macs")),
            amount("params", t.cost.get("params")),
            took(t),
            f"{t.number}",
        ]
        rows.append(row([*texts, cell(t.state, "left"), cell(note, "text")], "best" if rank == 1 else "" if rank else "faint"))
    header = ("rank", "alpha", "beta", "gamma", "α·β²·γ²", "score", "MACs", "parameters", "seconds", "trial", "state", "note")
    content = {"tables": [table(header, rows, "small", ("state", "note"))]} if rows else {"intro": ["There is no trial yet."]}
    return {"title": "All triples", **content, "texts": left_out(hidden)}


def _terms(record: Record) -> dict[str, Any]:
    total = budget(record)
    about = f"about {total:g}" if total else "near one number"
    terms = [
        ("alpha, beta, gamma", "By what depth, width and resolution are multiplied when phi grows by 1; each is at least 1."),
        ("the constraint", f"alpha × beta² × gamma² is {about}: MACs grow with depth, and with the square of width and of resolution."),
        ("score", "What the score function gave the scaled network, as a rule its accuracy on held-out images after a short training, the proxy."),
        ("MACs", "Multiply-adds of convolutions and linear layers for one image."),
    ]
    return {"title": "What the words mean", "terms": terms}
