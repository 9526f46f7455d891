"""The parts of a search that are arithmetic: the grid, the space, the reward; and both searches on scores with a known optimum."""

import math
import random
import re
from collections import Counter
from itertools import combinations, product

import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

import triscale as ts
from triscale.cost_model import cost
from triscale.scaling import Coefficients, ScalingError, compound, scale
from triscale.search.coding import Coding
from triscale.search.events import Running, SearchError
from triscale.search.find import Screen, different_first, find_coefficients, find_network, network_search, pareto
from triscale.search.grid import GridError, grid, spread
from triscale.search.importance import importance
from triscale.search.record import Trial
from triscale.search.reward import HARD, SOFT, Objective, reward
from triscale.search.space import FIELDS, Space, SpaceError, mnasnet_space, plain

B0 = ts.arch("efficientnet_b0")
SPACE = mnasnet_space(B0)


# -- the grid


def test_the_grid_is_every_triple_near_the_budget_and_no_other():
    """Counted anew in whole numbers, without the code's floats: alpha in tenths, beta and gamma in twentieths."""
    near = {
        (a, b, g)
        for a, b, g in product(range(10, 21), range(20, 29), range(20, 29))
        if abs(a * b * b * g * g - 2 * 10 * 20**4) <= 10 * 20**4 // 10  # 2 +- 0.1, times 10 x 20^4
    }
    found = grid()
    assert {(round(10 * c.alpha), round(20 * c.beta), round(20 * c.gamma)) for c in found} == near
    assert len(found) == len(near) == 61
    assert Coefficients(1.2, 1.1, 1.15) in found
    # The constraint is on the factors: rounding up one layer to two makes this network 2.57 times B0, not 1.92 times.
    assert cost(scale(B0, compound(1, 1.2, 1.1, 1.15))).macs / cost(B0).macs == pytest.approx(2.573, rel=1e-3)


@given(st.floats(1.2, 4), st.floats(0.01, 0.3))
@settings(max_examples=40, deadline=None)
def test_any_budget_and_tolerance(budget, tolerance):
    try:
        found = grid(budget=budget, tolerance=tolerance)
    except GridError:
        return
    assert all(abs(c.growth - budget) <= tolerance + 1e-9 and min(c.alpha, c.beta, c.gamma) >= 1 for c in found)
    assert any(c.alpha == 1 for c in found) or tolerance < 0.2  # the axes begin at 1


def test_given_axes_and_what_is_no_grid():
    assert grid((1.2, 1.3), (1.1,), (1.15,)) == (Coefficients(1.2, 1.1, 1.15), Coefficients(1.3, 1.1, 1.15))
    with pytest.raises(GridError, match=r"no triple within 0\.01.*nearest of 1, \(1\.2, 1\.1, 1\.15\), gives 1\.92.*tolerance of 0\.0798") as error:
        grid((1.2,), (1.1,), (1.15,), tolerance=0.01)
    wider = float(str(error.value).split("a tolerance of ")[1].split(",")[0])
    assert len(grid((1.2,), (1.1,), (1.15,), tolerance=wider)) == 1  # what the message says is so
    for bad in ({"alphas": (0.9,)}, {"betas": (1.1, 1.1)}, {"gammas": (math.nan,)}, {"budget": 0.5}, {"tolerance": -1}, {"budget": math.inf}):
        with pytest.raises(GridError, match="expected"):
            grid(**bad)


def test_the_order_covers_the_grid_from_the_first_trials_on():
    found = grid()
    order = spread(found)
    assert sorted(order, key=found.index) == list(found)
    places = lambda cs: [(math.log(c.alpha), 2 * math.log(c.beta), 2 * math.log(c.gamma)) for c in cs]  # noqa: E731
    holes = lambda chosen: max(min(math.dist(p, q) for q in places(chosen)) for p in places(found))  # noqa: E731
    assert holes(order[:12]) < 0.75 * holes(found[:12])
    assert holes(order[:12]) < min(holes(random.Random(seed).sample(found, 12)) for seed in range(20))


def test_coefficients_as_a_file():
    c = Coefficients(1.3, 1.05, 1.2)
    assert Coefficients.from_json(c.to_json({"score": 0.5})) == Coefficients.from_json(c.to_json()) == c
    for text, why in (
        ("x", "no JSON"),
        ('{"alpha": 1.2}', "format"),
        ('{"format": 1, "alpha": 1.2, "beta": 0.5, "gamma": 1}', "beta"),
        ('{"format": 1, "alpha": "a", "beta": 1.5, "gamma": 1}', "alpha"),
        ('{"format": 1, "alpha": true, "beta": 1.5, "gamma": 1}', "alpha"),
        ('{"format": 1, "alpha": 1.2, "beta": 1.5, "gamma": 1, "delta": 2}', "delta"),
    ):
        with pytest.raises(ScalingError, match=why):
            Coefficients.from_json(text)


# -- the space


def test_encode_and_decode_ten_thousand_points():
    rng = random.Random(0)
    for _ in range(10_000):
        point = SPACE.random(rng)
        assert SPACE.encode(SPACE.decode(point)) == point


def test_every_form_of_a_point_is_read_back():
    rng = random.Random(1)
    codings = [Coding.of(SPACE, group) for group in (1, 6, 12, 14)]
    for _ in range(200):
        point = SPACE.random(rng)
        for writes, reads in product(codings, codings):
            assert reads.point(writes.params(point)) == point
    assert [len(c.distributions) for c in codings] == [42, 7, 4, 3]
    assert Coding.of(SPACE).point({"alpha": 1.0}) is None
    with pytest.raises(ValueError, match="2\\^53"):
        Coding.of(SPACE, 42)


def test_mutation_changes_one_decision_and_reaches_all():
    rng, seen = random.Random(2), set()
    point = SPACE.random(rng)
    for _ in range(4000):
        other = SPACE.mutate(point, rng)
        changed = [i for i in range(42) if other[i] != point[i]]
        assert len(changed) == 1
        assert all(0 <= v < size for v, size in zip(other, SPACE.sizes, strict=True))
        seen.add((changed[0], other[changed[0]]))
    assert len(seen) == sum(SPACE.sizes) - 42  # every other choice of every decision


def test_choices_that_round_to_one_value_are_one_choice():
    channels = [choices.channels for choices in SPACE.blocks]
    assert channels[0] == (16, 24)  # 0.75 x 16 = 12 rounds to 16
    assert channels[4] == (88, 112, 144)
    assert SPACE.blocks[0].layers == (1, 2)  # none less than one
    assert SPACE.size == math.prod(SPACE.sizes) == 554_652_776_685_109_248


def test_networks_that_differ_in_words_alone_are_known_as_one():
    """Bit for bit the same outputs from the same weights, and no others fall together: of 300 random points, each with all its skips."""
    rng, kinds = random.Random(3), Counter()
    small = mnasnet_space(ts.scale(B0, width=0.25, resolution=32 / 224))
    x = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for _ in range(12):
        point = small.random(rng)
        decision = 6 * rng.randrange(7) + 3
        archs = [small.decode((*point[:decision], skip, *point[decision + 1 :])) for skip in range(3)]
        outputs = []
        for arch in archs:
            torch.manual_seed(0)
            outputs.append(ts.build(arch, 10).eval()(x).detach())
        for (a, of_a), (b, of_b) in combinations(zip(archs, outputs, strict=True), 2):
            assert (plain(a) == plain(b)) == torch.equal(of_a, of_b)
            kinds[plain(a) == plain(b)] += 1
    assert min(kinds[True], kinds[False]) >= 5
    assert all(plain(plain(a)) == plain(a) for a in archs)


def test_which_named_networks_are_points():
    """Around the paper's reference, MobileNetV2, MnasNet-A1 and B0 differ in the channels of one block and of two (its space knows
    0.75, 1 and 1.25 times), and in how the head is scaled; around themselves they are points."""
    around = mnasnet_space(ts.arch("mobilenet_v2"))
    head = "head Head(channels=1280, scale='width') instead of Head(channels=1280, scale='at_least')"
    fifth = "block 5: channels 112 instead of one of 72, 96, 120"
    assert around.differences(ts.arch("mobilenet_v2")) == []
    assert around.differences(ts.arch("mnasnet_a1")) == [head, fifth]
    assert around.differences(B0) == [head, fifth, "block 6: channels 192 instead of one of 120, 160, 200"]
    assert SPACE.decode(SPACE.encode(B0)).topology == B0.topology
    assert SPACE.differences(ts.arch("mnasnet_a1")) == ["block 6: channels 160 instead of one of 144, 192, 240"]
    with pytest.raises(SpaceError, match=r"efficientnetv2_b0: not in the space around efficientnet_b0: 6 blocks instead of 7"):
        SPACE.encode(ts.arch("efficientnetv2_b0"))
    with pytest.raises(SpaceError, match=r"block 1: op fused_mbconv x1"):
        mnasnet_space(ts.arch("efficientnetv2_b0")).encode(ts.arch("efficientnetv2_b0"))


@given(st.integers(0, 1 << 30))
@settings(max_examples=12, deadline=None)
def test_every_network_builds_and_costs_what_is_measured(seed):
    from torch.utils.flop_counter import FlopCounterMode

    point = SPACE.random(random.Random(seed))
    arch = ts.scale(SPACE.decode(point), resolution=32 / 224)
    net = ts.build(arch, num_classes=10).eval()
    expected = cost(arch, 10)
    assert sum(p.numel() for p in net.parameters()) == expected.params
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        assert net(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    assert counter.get_total_flops() == 2 * expected.macs


@pytest.mark.parametrize("point", [(), (0,) * 41, (0,) * 41 + (9,), (-1,) * 42, (0.0,) * 42])
def test_what_is_no_point(point):
    with pytest.raises(SpaceError, match="point: "):
        SPACE.decode(point)


def test_a_space_without_choices_is_refused():
    with pytest.raises(SpaceError, match="block 1, kernel"):
        mnasnet_space(B0, kernels=())
    with pytest.raises(SpaceError, match="expected choices for 7 blocks, found 0"):
        Space(B0, ())
    assert len(FIELDS) * 7 == 42


# -- the reward


def test_a_negative_score_is_not_weighed():
    """Half the cost would make it worse."""
    with pytest.raises(ValueError, match="expected a score from 0"):
        reward(-0.5, 1.0, 2.0)
    assert reward(-0.5, 1.0, 2.0, (0.0, 0.0)) == -0.5
    found = find_network(lambda arch: cost(arch).params / 5e6 - 1, SPACE, Objective("macs", 300e6), seed=3, running=Running(trials=20))
    for t in found.record.trials:
        below = cost(t.arch).params < 5e6
        assert (t.state, t.why[:34]) == (("failed", "reward: expected a score from 0, a") if below else ("complete", ""))


@pytest.mark.parametrize(
    ("score", "macs", "target", "exponents", "value"),
    [
        (0.75, 400e6, 400e6, SOFT, 0.75),  # at T the reward is the accuracy
        (0.75, 800e6, 400e6, SOFT, 0.75 * 0.9526380),  # 2^-0.07: the 5 % of the paper
        (0.75, 200e6, 400e6, SOFT, 0.75 * 1.0497167),  # 2^0.07
        (0.75, 800e6, 400e6, HARD, 0.375),  # 2^-1
        (0.75, 200e6, 400e6, HARD, 0.75),  # below T only the accuracy counts
        (0.75, 400e6, 400e6, HARD, 0.75),
        (0.6, 0.1, 0.05, (-0.15, -0.15), 0.6 * 0.9012505),  # 2^-0.15, on seconds
    ],
)
def test_reward_arithmetic(score, macs, target, exponents, value):
    assert reward(score, macs, target, exponents) == pytest.approx(value, rel=1e-6)


def test_twice_the_cost_is_worth_five_percent():
    assert reward(0.8, 2.0, 1.0) == pytest.approx(reward(0.8 / 1.05, 1.0, 1.0), rel=5e-4)  # MnasNet, section 3


def test_objectives_count_what_they_say():
    small = ts.scale(B0, resolution=0.25)
    assert Objective("macs", 1e6, classes=10).costs(small) == {"macs": cost(small, 10).macs, "params": cost(small, 10).params}
    assert Objective("memory", 1e6, classes=10).costs(small)["memory"] == cost(small, 10).memory.inference
    timed = Objective("latency", 0.01, HARD, measure=lambda arch: 0.02)
    assert timed.value(0.8, timed.costs(small)) == pytest.approx(0.4)
    for bad, why in (
        ({"kind": "watts", "target": 1}, "one of macs, latency, memory"),
        ({"target": 0}, "above 0"),
        ({"kind": "latency", "target": 1}, "measures"),
    ):
        with pytest.raises(ValueError, match=why):
            Objective(**bad)
    for bad in ((0.5, 0, 1), (0.5, 1, -1)):
        with pytest.raises(ValueError, match="above 0"):
            reward(*bad)


# -- both searches on synthetic scores


def bent(arch):
    """A score over alpha, beta, gamma that isn't separable: smooth in the MACs, and bent by a product of depth and width, so that
    the best depth depends on the width. Written down here, nothing learnt."""
    layers = sum(s.layers for s in arch.stages) / 16
    width = arch.stages[5].channels / 192
    pixels = arch.resolution / 224
    return 0.7 + 0.1 * math.log(cost(arch).macs / 389e6) - 0.8 * (layers * width - 1.45) ** 2 - 0.5 * (pixels / width - 1.04) ** 2


def test_the_coefficient_search_finds_the_best_point_of_the_grid():
    triples = grid()
    scores = {c: bent(scale(B0, compound(1, c.alpha, c.beta, c.gamma))) for c in triples}
    best = max(scores.values())
    found = find_coefficients(bent, B0, running=Running(trials=1000))
    assert found.trial.score == best
    assert scores[found.coefficients] == best
    assert found.arch == scale(B0, compound(1, found.coefficients.alpha, found.coefficients.beta, found.coefficients.gamma))
    tried = {tuple(t.choices.values()) for t in found.record.trials}
    assert len(found.record.trials) == len(tried) == 61  # each once, however many trials are allowed
    assert [t.score for t in found.record.ranked] == sorted(scores.values(), reverse=True)
    apart = max(s for c, s in scores.items() if c.alpha == 1), max(s for c, s in scores.items() if c.beta == 1)
    assert max(apart) < best  # the optimum lies inside


def test_a_triple_given_twice_is_one_and_one_network_of_two_comes_last():
    c = Coefficients(1.2, 1.1, 1.15)
    assert len(find_coefficients(bent, B0, [c, c], running=Running(trials=10)).record.trials) == 1
    triples = spread(grid())
    order = different_first(B0, triples)
    networks = [scale(B0, compound(1, c.alpha, c.beta, c.gamma)) for c in order]
    assert sorted(order, key=triples.index) == list(triples)
    assert len(set(networks)) == len(set(networks[:55])) == 55 < 61


def test_fewer_trials_than_triples():
    found = find_coefficients(bent, B0, running=Running(trials=12))
    assert [tuple(map(float, t.choices.values())) for t in found.record.trials] == [(c.alpha, c.beta, c.gamma) for c in spread(grid())[:12]]


@pytest.mark.parametrize("sampler", ["evolution", "ppo", "random", "tpe", "nsga2"])
def test_every_sampler_through_one_interface(sampler):
    objective = Objective("macs", 300e6)
    score = lambda arch: 0.5 + 0.1 * math.log(cost(arch).params / 5e6)  # noqa: E731 - more parameters, better
    found = find_network(score, SPACE, objective, sampler=sampler, seed=3, running=Running(trials=25))
    assert len(found.record.complete) == 25
    first = found.record.trials[0]
    assert first.arch.topology == B0.topology
    assert found.record.reference_score == first.score == score(B0)
    for t in found.record.complete:
        assert t.score == score(t.arch)
        assert t.value == pytest.approx(reward(t.score, cost(t.arch).macs, 300e6))
        assert t.cost["macs"] == cost(t.arch).macs
    assert found.trial.value == max(t.value for t in found.record.complete)
    points = {tuple(t.choices.values()) for t in found.record.complete}
    assert len(points) > 12  # TPE comes back to what was good


def test_a_front_is_what_no_other_beats():
    rng = random.Random(5)
    trials = [Trial(i, "complete", score=rng.randrange(8) / 8, cost={"macs": rng.randrange(1, 9)}) for i in range(40)]
    trials.append(Trial(40, "failed", cost={"macs": 0.5}))
    found = pareto(trials, "macs")

    def beaten(t):
        here = t.cost["macs"], t.score
        return any(o.cost["macs"] <= here[0] and o.score >= here[1] and (o.cost["macs"], o.score) != here for o in trials[:40])

    assert {(t.cost["macs"], t.score) for t in found} == {(t.cost["macs"], t.score) for t in trials[:40] if not beaten(t)}
    assert [t.cost["macs"] for t in found] == sorted(t.cost["macs"] for t in found)


def test_the_same_seed_makes_the_same_search():
    score = lambda arch: -abs(cost(arch).macs / 3e8 - 1)  # noqa: E731
    runs = [find_network(score, SPACE, sampler="evolution", seed=7, running=Running(trials=30)).record.trials for _ in range(2)]
    assert [t.choices for t in runs[0]] == [t.choices for t in runs[1]]
    assert [t.choices for t in find_network(score, SPACE, seed=8, running=Running(trials=30)).record.trials] != [t.choices for t in runs[0]]


def test_a_screen_weighs_the_cost_and_may_raise():
    objective, seen = Objective("macs", 300e6, HARD), []

    def screen(arch):
        seen.append(arch)
        if len(seen) % 3 == 0:
            raise RuntimeError("no luck")
        return 1.0

    search = network_search(lambda arch: 0.5, SPACE, objective, sampler="random", screen=Screen(screen, 3), running=Running(trials=6))
    with pytest.warns(UserWarning, match="prefilter: RuntimeError: no luck"):
        list(search.events())
    record = search.record()
    assert len(record.complete) == 6
    for i, t in enumerate(record.trials[1:]):  # the first is the reference
        one, two, _ = (cost(arch).macs for arch in seen[3 * i : 3 * i + 3])
        assert cost(t.arch).macs == (two if max(one, two) > 300e6 and two < one else one)  # the last one raised; of equals the first


def test_what_mattered_is_found():
    """The score knows the kernel of block 3 and half as much of block 5's squeeze-excitation."""
    score = lambda arch: 0.5 + 0.2 * (arch.stages[2].kernel == 5) + 0.1 * (arch.stages[4].squeeze > 0)  # noqa: E731
    search = network_search(score, SPACE, sampler="random", running=Running(trials=300))
    assert importance(search) == {}
    list(search.events())
    found = importance(search)
    assert sorted(found, key=found.get)[-2:] in (["block 5 squeeze", "block 3 kernel"], ["block 3 kernel", "block 5 squeeze"])
    assert sum(found.values()) == pytest.approx(1)
    assert found["block 3 kernel"] + found["block 5 squeeze"] > 0.5


def test_what_is_no_search():
    with pytest.raises(SearchError, match=r"nsga2.*objective"):
        find_network(bent, SPACE, sampler="nsga2")
    with pytest.raises(ValueError, match="unknown sampler 'evolutoin'; nearest is 'evolution'"):
        find_network(bent, SPACE, sampler="evolutoin")
    for bad in ({"trials": 0}, {"timeout": 5}, {"pruner": "medium"}, {"workers": -1}):
        with pytest.raises(ValueError, match=r"trials|workers|pruner"):
            Running(**bad)


def test_the_documentations_example_runs(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "search.md").read_text(encoding="utf-8"), re.DOTALL)
    exec(compile(code, "docs/search.md", "exec"), {})
    out = capsys.readouterr().out
    assert out.startswith("Coefficients(alpha=")
    assert re.search(r"\] *$|\d\]$", out.strip())
