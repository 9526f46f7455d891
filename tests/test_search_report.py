"""The page of a search: what it says at any time of it, that it is true to the record, and that hostile text stays text."""

import math
import random
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import triscale as ts
from triscale.search.grid import grid
from triscale.search.record import Record, Trial, front
from triscale.search.reward import Objective
from triscale.search.space import mnasnet_space
from triscale.search_report import facts, network_plots, plots, render
from triscale.search_report.network import lead, network_page

B0 = ts.arch("efficientnet_b0")
SPACE = mnasnet_space(B0)
T, CLASSES = 400e6, 10
OBJECTIVE = Objective("macs", T, classes=CLASSES)
HOSTILE = "<script>alert('x')</script> & $x_1$ \x1b[2J"


class Page(HTMLParser):
    """Tags as they nest, the visible text by section, and the rows of its tables: (class of the row, texts, classes of the cells)."""

    def __init__(self, path):
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.open, self.tags, self.sections, self.rows, self.current = [], set(), {"": ""}, {"": []}, ""
        self.feed(self.source)
        self.close()
        self.sections = {title: " ".join(text.split()) for title, text in self.sections.items()}
        self.text = " ".join(self.sections.values())

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        style = dict(attributes).get("class") or ""
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)
        if tag == "h2":
            self.current = None
        if tag == "tr":
            self.rows[self.current].append((style, [], []))
        if tag == "td":
            self.rows[self.current][-1][1].append("")
            self.rows[self.current][-1][2].append(set(style.split()))

    def handle_startendtag(self, tag, attributes):
        self.tags.add(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag in ("td", "th", "dt", "p"):
            self.sections[self.current] += " "

    def handle_data(self, data):
        if {"style", "svg"} & set(self.open):
            return
        if self.current is None:
            self.current = data.strip()
            self.sections[self.current], self.rows[self.current] = "", []
        self.sections[self.current] += data
        if "td" in self.open:
            self.rows[self.current][-1][1][-1] += data

    def table(self, title):
        """The texts of the section's rows, without the header."""
        return [texts for _, texts, _ in self.rows[title] if texts]


def trial(number, point, score, **more):
    arch = SPACE.decode(point)
    costs = OBJECTIVE.costs(arch)
    value = OBJECTIVE.value(score, costs) if score is not None and math.isfinite(score) else score
    fields = {"state": "complete", "arch": arch, "choices": SPACE.labels(point), "score": score, "value": value, "cost": costs, "seconds": 2.0}
    return Trial(number, **fields | more)


def network_record(count, seed=0, **more):
    rng = random.Random(seed)
    trials = tuple(
        trial(i, SPACE.random(rng), 0.3 + 0.4 * rng.random(), began=1000.0 + 10 * i, ended=1008.0 + 10 * i, reported=(0.1, 0.2, 0.3))
        for i in range(count)
    )
    fields = {"target": ("macs", T), "exponents": (-0.07, -0.07), "settings": {"sampler": "evolution"}, "wanted": count}
    return Record("network", B0, trials, **fields | more)


SCALED = [(c, ts.scale(B0, ts.compound(1, c.alpha, c.beta, c.gamma))) for c in grid()]


def coefficient_record(count=None, score=lambda c: 0.6 - abs(c.alpha - 1.3) / 10 - (c.beta - 1.1) ** 2, **more):
    trials = []
    for i, (c, arch) in enumerate(SCALED[:count]):
        found, s = ts.cost(arch, CLASSES), score(c)
        choices = {"alpha": f"{c.alpha:g}", "beta": f"{c.beta:g}", "gamma": f"{c.gamma:g}"}
        trials.append(Trial(i, "complete", arch, choices, s, (s / 2, s), s, {"macs": found.macs, "params": found.params}, 3.0))
    settings_ = {"budget": "2", "scored images": "2,000"}
    return Record("coefficients", B0, tuple(trials), **{"settings": settings_, "wanted": len(trials)} | more)


def page(record, folder, classes=CLASSES):
    path = render(record, folder, classes)
    assert path == folder / "report.html"
    assert [p.name for p in folder.iterdir() if p.name.startswith(".")] == []
    return Page(path)


@pytest.fixture(scope="module")
def record():
    """Forty networks, and others that gave no value."""
    whole = network_record(40, reference_score=0.5, settings={"sampler": "evolution", "scored images": "2000"})
    rest = [
        Trial(40, "pruned", B0, reported=(0.1, 0.05), why="below the median"),
        Trial(41, "failed", B0, why=HOSTILE),
        Trial(42, "lost", B0, why="its worker died"),
        Trial(43, "running"),
        Trial(44, "waiting"),
    ]
    importance = dict.fromkeys(SPACE.decisions, 0.0) | {"block 3 kernel": 0.5, "block 3 op": 0.2, "block 7 kernel": 0.25, HOSTILE: 0.05}
    return replace(whole, trials=(*whole.trials, *rest), wanted=60, importance=importance)


@pytest.fixture(scope="module")
def whole(record, tmp_path_factory):
    return page(record, tmp_path_factory.mktemp("search"))


@pytest.fixture(scope="module")
def surface(tmp_path_factory):
    """The page of all triples of the default grid."""
    return page(coefficient_record(), tmp_path_factory.mktemp("coefficients"))


def test_the_first_screen_holds_the_best_beside_the_reference(record, whole):
    best = max(record.complete, key=lambda t: t.value)
    macs, params = ts.cost(best.arch, CLASSES).macs, ts.cost(best.arch, CLASSES).params
    value = best.score * (macs / T) ** -0.07
    text = whole.sections[""]
    assert f"Trial {best.number} is the best of 40 scored networks, with score {best.score:.4f} at {macs / 1e6:.3g}M MACs, {macs / T:.2f} ×" in text
    assert f"value {value:.4f}; the reference, efficientnet_b0, takes 385M MACs and scores 0.5000." in text
    theirs = 0.5 * (ts.cost(B0, CLASSES).macs / T) ** -0.07
    assert f"That is {value - theirs:.4f} more value than the reference's {theirs:.4f}" in text
    first, second = whole.table("")
    assert first == [
        f"best: trial {best.number}",
        f"{best.score:.4f}",
        f"{value:.4f}",
        f"{macs / 1e6:.3g}M",
        f"{macs / T:.2f}",
        f"{params / 1e6:.3g}M",
    ]
    assert second == ["reference: efficientnet_b0", "0.5000", f"{theirs:.4f}", "385M", "0.96", "4.02M"]
    assert "42 of 60 trials done: 40 complete, 1 running, 1 waiting, 1 pruned, 1 failed, 1 lost." in text
    assert "6 min 38 s from the first start to the last end, 362 trials an hour." in text  # 1000 to 1398, 40 trials


def test_the_page_is_whole_html_and_needs_nothing_beside_it(whole):
    assert set(whole.open) <= {"html"}
    assert not {"script", "i", "b", "link", "iframe", "img"} & whole.tags
    assert not re.search(r"(src|href)=[\"'](?!data:|#)", whole.source)
    assert "None" not in whole.text
    assert "nan" not in whole.text.lower().split()
    assert list(whole.sections) == [
        "", "How the search went", "Score against MACs", "Which decisions mattered", "The best network beside the reference",
        "Learning curves of the proxy training", "The trials", "What went wrong", "What the words mean", "Settings",
    ]  # fmt: skip
    assert whole.source.count("<svg") == 4


def test_hostile_text_stays_text(record, tmp_path, whole):
    assert "<script>" not in whole.source
    shown = "<script>alert('x')</script> & $x_1$ \\x1b[2J"
    assert shown in whole.sections["What went wrong"]
    assert shown in whole.sections["Which decisions mattered"]
    named = replace(B0, name=HOSTILE)
    first = replace(record.trials[0], arch=replace(record.trials[0].arch, name=HOSTILE), choices={HOSTILE: HOSTILE})
    told = page(replace(record, reference=named, trials=(first, *record.trials[1:]), settings={HOSTILE: HOSTILE}), tmp_path)
    assert "<script>" not in told.source
    assert "\x1b" not in told.source
    assert told.sections[""].count(shown) == 4  # title of the window, heading, sentence, table
    assert [shown, shown] in told.table("Settings")
    trials = tuple(replace(t, choices=dict(t.choices) | {"beta": HOSTILE}, why=HOSTILE) for t in coefficient_record(4).trials)
    told = page(replace(coefficient_record(4), reference=named, trials=trials, settings={"budget": HOSTILE, "scored images": HOSTILE}), tmp_path)
    assert "<script>" not in told.source
    assert shown in told.sections["All triples"]


# Few different values, so that equal costs, equal scores and equal points occur.
POINTS = st.lists(
    st.tuples(st.integers(0, 6).map(float), st.integers(-3, 3).map(float)) | st.tuples(st.floats(0, 1e9), st.floats(-1, 1)), max_size=40
)


@settings(max_examples=300, deadline=None)
@given(POINTS)
def test_the_front_is_what_no_other_point_beats(points):
    found = front(points)
    beaten = [any(c <= cost and s >= score and (c, s) != (cost, score) for c, s in points) for cost, score in points]
    assert sorted(found) == [i for i, b in enumerate(beaten) if not b]
    assert [points[i][0] for i in found] == sorted(points[i][0] for i in found)


def test_the_front_is_listed_and_the_best_always_is(record, whole, tmp_path):
    points = [(t.cost["macs"], t.score) for t in record.complete]
    expected = [t for t in record.complete if not any(c <= t.cost["macs"] and s > t.score for c, s in points)]
    expected.sort(key=lambda t: t.cost["macs"])
    best = max(record.complete, key=lambda t: t.value)
    rows = whole.table("Score against MACs")
    assert [row[0] for row in rows] == [f"{t.number}" for t in expected]
    assert rows[-1][1:3] == [f"{expected[-1].score:.4f}", facts.amount("macs", expected[-1].cost["macs"])]
    assert f"<!-- Pareto front ({len(expected)}) -->" in whole.source
    assert f"<!-- best: trial {best.number} -->" in whole.source
    assert {"<!-- target 400M -->", "<!-- reference -->", "<!-- as much worth as the best -->"} <= set(re.findall("<!-- .*? -->", whole.source))
    # A front of thirty: dearer is better. Twelve or so are listed, the best and the dearest among them.
    dear = sorted(record.complete[:30], key=lambda t: t.cost["macs"])
    long = replace(record, trials=tuple(replace(t, score=t.cost["macs"] / 2e9, value=float(i == 3)) for i, t in enumerate(dear)))
    told = page(long, tmp_path)
    rows = told.table("Score against MACs")
    assert len(rows) <= 13
    assert {f"{dear[3].number}", f"{dear[-1].number}"} <= {row[0] for row in rows}
    assert f"{len(rows)} of the 30 networks of the front are listed." in told.text


def test_the_history_is_the_running_best():
    values = [0.2, 0.1, 0.5, 0.5, 0.4, float("nan"), 0.6]
    times = [5.0, 1.0, 2.0, 4.0, 3.0, 6.0, 7.0]
    trials = [Trial(i, "complete", score=v, value=v, ended=t) for i, (v, t) in enumerate(zip(values, times, strict=True))]
    assert facts.running_best(trials) == [(0, 0.2), (2, 0.5), (6, 0.6)]
    assert facts.running_best(trials, "ended") == [(1.0, 0.1), (2.0, 0.5), (7.0, 0.6)]


def test_a_value_that_is_no_number_ranks_nowhere():
    values = [float("nan"), 0.1, 0.5, None, 0.5, float("inf"), 0.3]
    trials = tuple(Trial(i, "complete", score=v, value=v) for i, v in enumerate(values))
    assert [t.number for t in facts.ranked(Record("network", B0, trials))] == [2, 4, 6, 1]


def test_trials_are_ranked_and_the_others_say_why_not(record, whole):
    rows = whole.table("The trials")
    expected = sorted(record.complete, key=lambda t: -t.value)
    assert [row[1] for row in rows] == [f"{t.number}" for t in expected] + ["43", "44", "40", "41", "42"]
    assert [row[0] for row in rows] == [f"{i}" for i in range(1, 41)] + ["–"] * 5
    assert [row[3] for row in rows[:40]] == [f"{t.value:.4f}" for t in expected]
    assert [row[7] for row in rows[40:]] == ["running", "waiting", "pruned", "failed", "lost"]
    assert rows[42][8] == "below the median"
    assert whole.rows["The trials"][1][0] == "best"


def test_differing_cells_of_table_1_are_marked_and_no_others(tmp_path):
    stages = list(B0.stages)
    stages[2] = replace(stages[2], kernel=3, layers=3)  # row 4: operator, layers, parameters, MACs
    stages[6] = replace(stages[6], skip="none")  # row 8: a skip costs nothing
    arch = replace(B0, stages=tuple(stages), name="other")
    found = ts.cost(arch, CLASSES)
    one = Trial(0, "complete", arch, score=0.5, value=0.5, cost={"macs": found.macs, "params": found.params})
    told = page(Record("network", B0, (one,)), tmp_path)
    marked = {
        (r, c)
        for r, (_, _, styles) in enumerate(told.rows["The best network beside the reference"][2:], 1)
        for c, s in enumerate(styles)
        if "differs" in s
    }
    half = {(4, 1), (4, 5), (4, 6), (4, 7), (8, 3), (10, 5), (10, 6), (10, 7)}
    assert marked == half | {(r, c + 7) for r, c in half}
    rows = told.table("The best network beside the reference")
    mine, its = found.per_stage[3], ts.cost(B0, CLASSES).per_stage[3]
    for cells, stage in ((rows[3][1:8], mine), (rows[3][8:], its)):
        assert cells == [stage.operator, "56", "identity", "40", f"{stage.layers}", f"{stage.params / 1e3:.3g}k", f"{stage.macs / 1e6:.3g}M"]
    assert rows[9][5:8] == ["19", f"{found.params / 1e6:.3g}M", f"{found.macs / 1e6:.3g}M"]
    assert "so the search counted with others" not in told.text
    assert f"the record has {found.macs:,} MACs for this network" in page(Record("network", B0, (one,)), tmp_path, classes=7).text


def test_importance_is_drawn_by_block_and_kind(record, whole):
    drawn = whole.source[whole.source.index("Which decisions mattered") : whole.source.index("The best network beside")]
    labels = re.findall("<!-- (.*?) -->", drawn)
    assert labels.count("50") == 1  # a decision
    assert {"75", "70"} <= {label.strip() for label in labels}  # all kernels; block 3
    assert "With 40 scored networks for 46 decisions" not in whole.text
    assert "With 40 scored networks for 43 decisions these shares are mostly noise." in whole.text
    rows, rest = facts.importance_grid(record)
    assert (rows[2][1], rows[2][0], rows[6][1], sum(map(sum, rows)), rest) == (0.5, 0.2, 0.25, 0.95, {HOSTILE: 0.05})


def test_the_formula_is_told_with_the_records_own_numbers(record, whole, tmp_path):
    best = max(record.complete, key=lambda t: t.value)
    paid = facts.amount("macs", best.cost["macs"])
    text = whole.sections["What the words mean"]
    assert f"with T = 400M MACs and w = -0.07. Of the best: {best.score:.4f} × ({paid} / 400M)^-0.07 = {best.value:.4f}." in text
    assert "twice the target loses 5 % of its value" in text
    other = replace(record, trials=tuple(replace(t, value=t.score) for t in record.complete), exponents=(0.0, -1.0))
    text = page(other, tmp_path).sections["What the words mean"]
    first = max(other.complete, key=lambda t: t.value)
    value = first.score * min(1, T / first.cost["macs"])
    assert "w = 0 at or below the target and -1 above" in text
    assert f"= {value:.4f}" + (f"; the record gives {first.score:.4f}." if first.cost["macs"] > T else ".") in text


def said(record):
    return lead(record, facts.reference(record, CLASSES, 3))


def test_what_is_not_better_than_the_reference_or_not_surely_is_said(record, whole):
    best = max(record.complete, key=lambda t: t.value)
    factor = (ts.cost(B0, CLASSES).macs / T) ** -0.07
    assert said(replace(record, reference_score=0.9)).endswith(f"No network found is better than the reference, whose value is {0.9 * factor:.4f}.")
    near = replace(record, reference_score=(best.value - 0.0051) / factor)
    assert said(near).endswith(
        f"That is 0.0051 more value than the reference's {best.value - 0.0051:.4f}; on 2,000 scored images the two can't be told apart."
    )
    assert "told apart" not in said(record)
    assert "told apart" not in said(replace(near, settings={}))
    error = lambda t: math.sqrt(t.score * (1 - t.score) / 2000)  # noqa: E731
    factors = {t.number: (t.cost["macs"] / T) ** -0.07 for t in record.complete}  # of a value, and so of its error
    near = [
        t for t in record.complete
        if t is not best and best.value - t.value <= 2 * math.hypot(error(best) * factors[best.number], error(t) * factors[t.number])
    ]  # fmt: skip
    assert f"standard error of about {error(best):.4f}: the values of {len(near)} of the 39 others lie within 2" in whole.text
    alone = replace(record, trials=(best, replace(near[0], score=best.score - 0.2, value=(best.score - 0.2) * factors[near[0].number])))
    assert "no other network's value lies within 2 standard errors" in str(network_page(alone, CLASSES, 3))
    assert "but the best of 40 noisy scores is on average too high" in said(replace(record, reference_score=best.value / factor - 0.2))


def test_the_line_of_equal_worth_goes_through_the_best_and_rises_with_the_cost(record):
    """Twice the cost needs 2^0.07 times the score."""
    figure = network_plots.pareto(record, facts.reference(record, CLASSES, 3))
    best = max(record.complete, key=lambda t: t.value)
    (line,) = [line for line in figure.axes[0].lines if line.get_label() == "as much worth as the best"]
    x, y = line.get_data()
    at = lambda cost: float(np.interp(cost, x, y))  # noqa: E731
    assert at(best.cost["macs"]) == pytest.approx(best.score, rel=1e-3)
    assert at(1.25 * T) / at(T) == pytest.approx(1.25**0.07, rel=1e-3)


def test_the_references_score_and_latency_come_from_a_trial_of_the_same_network():
    same = Trial(0, "complete", replace(B0, name="again", dropout=0.1), score=0.4, value=0.4, cost={"macs": 1.0, "latency": 0.0125})
    known = Record("network", B0, (same,), ("latency", 0.025), (-0.07, -0.07))
    side = facts.reference(known, CLASSES, 3)
    assert (side.score, side.cost["latency"], side.cost["macs"]) == (0.4, 0.0125, ts.cost(B0, CLASSES).macs)
    assert side.value == pytest.approx(0.4 * 0.5**-0.07)
    assert "takes 12.5 ms of latency and scores 0.4000" in said(known)
    memory = replace(known, trials=(), target=("memory", 1e8))
    assert facts.reference(memory, CLASSES, 3).cost["memory"] == ts.cost(B0, CLASSES).memory.inference
    assert said(replace(known, trials=())).endswith("takes 385M MACs; its latency and score aren't known.")


@pytest.mark.parametrize("make", [network_record, coefficient_record])
def test_a_page_is_there_at_any_time(make, tmp_path):
    some = make(3)
    empty = page(replace(some, trials=()), tmp_path)
    assert "No network has been scored yet." in empty.sections[""]
    assert "0 of 3 trials done." in empty.sections[""]
    assert "There is no trial yet." in empty.text
    assert plots(replace(some, trials=()), tmp_path / "plots") == []
    one = page(replace(some, trials=some.trials[:1]), tmp_path)
    assert ("decisions mattered Not known." in one.text) == (make is network_record)
    assert "is the only scored" in one.text or "are the only scored" in one.text
    failed = tuple(replace(t, state="failed", score=None, value=None, reported=(), why="out of memory") for t in some.trials)
    told = page(replace(some, trials=failed), tmp_path)
    assert "No network has been scored yet: 3 of 3 trials failed, 3 of them with “out of memory”." in told.sections[""]
    assert told.table("What went wrong") == [["3", "failed", "out of memory"]]
    odd = [
        Trial(3, "running"), Trial(4, "waiting"), Trial(5, "lost"), Trial(6, "complete", B0, score=float("nan"), value=float("nan")),
        Trial(7, "complete"), Trial(8, "complete", score=-5.0, value=-5.0), Trial(9, "pruned", reported=(float("nan"),)),
    ]  # fmt: skip
    told = page(replace(some, trials=(*some.trials, *odd), reference_score=float("inf")), tmp_path)
    best = max(some.trials, key=lambda t: t.value)
    assert f"{best.score:.4f}" in told.sections[""]
    assert not {"nan", "inf"} & set(re.findall(r"\w+", told.text.lower()))
    plots(replace(some, trials=tuple(odd)), tmp_path / "plots")


def test_five_thousand_trials_make_a_small_page(tmp_path):
    rng = random.Random(1)
    few = [SPACE.random(rng) for _ in range(20)]
    base = [trial(i, p, 0.5) for i, p in enumerate(few)]
    trials = []
    for i in range(5000):
        t, score = base[i % 20], rng.random()
        state = "pruned" if i % 7 == 0 else "complete"
        trials.append(
            replace(t, number=i, state=state, score=score, value=OBJECTIVE.value(score, dict(t.cost)), reported=(score,) * 5, why="w" * 9999)
        )
    told = page(replace(network_record(0), trials=tuple(trials), wanted=5000), tmp_path)
    assert len(told.source) < 1e6  # as paths, the dots alone would take more
    numbers = [int(row[1]) for row in told.table("The trials")]
    expected = sorted((t for t in trials if t.state == "complete"), key=lambda t: (-t.value, t.number))
    assert numbers[:50] == [t.number for t in expected[:50]]
    assert set(range(4980, 5000)) <= set(numbers)
    assert set(numbers) == {t.number for t in expected[:50]} | set(range(4980, 5000))
    assert f"Shown are the best 50 and the newest 20; {5000 - len(numbers):,} more trials are in the record." in told.text
    assert "Of 715 pruned trials 40 are drawn" in told.text
    assert "w" * 200 not in told.source


def test_the_curves_are_of_the_best_the_median_and_the_pruned(whole, record):
    order = sorted(record.complete, key=lambda t: -t.value)
    labels = set(re.findall("<!-- (.*?) -->", whole.source))
    told = {f"best: trial {order[0].number}, 0.3000", f"median: trial {order[20].number}, 0.3000", "pruned (1 shown), × where stopped"}
    assert told <= labels


def test_the_chosen_coefficients_and_how_sure_they_are(surface):
    record, told = coefficient_record(), surface
    scores = [t.score for t in record.trials]
    best = record.trials[scores.index(max(scores))]
    alpha, beta, gamma = (best.choices[n] for n in ("alpha", "beta", "gamma"))
    times = best.cost["macs"] / ts.cost(B0, CLASSES).macs
    start = f"alpha {alpha} (depth), beta {beta} (width), gamma {gamma} (resolution) score best of {len(scores)} triples: {max(scores):.4f}"
    assert f"{start} at {facts.amount('macs', best.cost['macs'])} MACs, {times:.2f} times those of efficientnet_b0." in told.sections[""]
    paper = next(t for t in record.trials if list(t.choices.values()) == ["1.2", "1.1", "1.15"])
    assert f"The paper's 1.2, 1.1, 1.15 is number {1 + sum(s > paper.score for s in scores)}, with {paper.score:.4f}." in told.text
    errors = {s: math.sqrt(s * (1 - s) / 2000) for s in scores}
    near = sum(max(scores) - s <= 2 * math.hypot(errors[s], errors[max(scores)]) for s in scores) - 1
    assert 0 < near < len(scores) - 1
    assert f"On 2,000 scored images {near} of the other {len(scores) - 1} can't be told from it." in told.text
    rows = told.table("All triples")
    assert sum(row[-1] == "not told from the best" for row in rows) == near
    assert [float(row[5]) for row in rows] == sorted((round(s, 4) for s in scores), reverse=True)
    a, b, g, growth = map(float, rows[7][1:5])
    assert growth == pytest.approx(a * b * b * g * g, abs=6e-4)


def test_the_networks_for_each_phi_are_those_that_scaling_gives(surface, tmp_path):
    c = facts.triples(coefficient_record())[0].coefficients
    rows = surface.table("The networks for each phi")
    assert [row[0] for row in rows] == [f"{phi}" for phi in range(8)]
    for phi, row in enumerate(rows):
        arch = ts.scale(B0, ts.compound(phi, c.alpha, c.beta, c.gamma))
        found, paper = ts.cost(arch, CLASSES), ts.cost(ts.scale(B0, ts.compound(phi)), CLASSES)
        multipliers = [f"{c.alpha**phi:.2f}", f"{c.beta**phi:.2f}", f"{c.gamma**phi:.2f}", f"{arch.resolution}"]
        assert row[1:5] == multipliers
        assert row[5:8] == [f"{sum(s.layers for s in arch.stages)}", facts.amount("params", found.params), facts.amount("macs", found.macs)]
        assert row[9] == facts.amount("macs", paper.macs)
    steep = Trial(0, "complete", B0, {"alpha": "8", "beta": "1", "gamma": "1"}, 0.5, (), 0.5)
    rows = page(Record("coefficients", B0, (steep,)), tmp_path).table("The networks for each phi")
    assert rows[7][4] == "too large"  # 8^7 layers
    assert rows[1][5] == "128"


def test_the_surface_shows_each_place_once_with_its_best_score(surface):
    source = surface.source
    drawn = source[source.index("Score over the constraint surface") : source.index("How sure the order is")]
    labels = re.findall("<!-- (.*?) -->", drawn)
    best = {}
    for t in facts.triples(coefficient_record()):
        place = t.coefficients.beta, t.coefficients.gamma
        best[place] = max(best.get(place, 0), t.trial.score)
    assert len(best) < len(grid())
    written = [label for label in labels if re.fullmatch(r"0\.\d{4}", label)]
    assert sorted(written) == sorted(f"{s:.4f}" for s in best.values())
    assert {"α 1", "α 1.5", "α 2"} <= set(labels)


@pytest.mark.parametrize(
    ("make", "names"), [(network_record, ["history", "pareto", "importance"]), (coefficient_record, ["surface", "ranking", "growth"])]
)
def test_plots_are_files_for_documents(make, names, tmp_path):
    record = replace(make(12), importance={"block 1 op": 0.7, "block 2 skip": 0.3})
    paths = plots(record, tmp_path / "new", CLASSES)
    assert [p.name for p in paths] == [f"{name}.png" for name in names]
    for path in paths:
        with Image.open(path) as image:
            assert round(image.info["dpi"][0]) == 150
            assert 1000 < image.width < 1500
            assert np.asarray(image.convert("L")).std() > 10


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium on this machine")
def test_a_browser_shows_it_whole(record, tmp_path):
    path = render(record, tmp_path, CLASSES)
    shot = tmp_path / "shot.png"
    quiet = ["--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", *quiet, f"--user-data-dir={tmp_path / 'profile'}", "--hide-scrollbars"]
    subprocess.run([*command, f"--screenshot={shot}", "--window-size=1000,2400", path.as_uri()], check=True, capture_output=True, timeout=60)
    pixels = np.asarray(Image.open(shot).convert("L"))
    assert pixels.shape == (2400, 1000)
    assert (pixels[:, 984:] > 250).all()  # nothing runs over the margin
    bands = (pixels < 128).reshape(24, 100, 1000).any(axis=(1, 2))
    assert bands[:23].mean() > 0.9  # text and plots all the way down
