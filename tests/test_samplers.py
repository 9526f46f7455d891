"""The samplers of the network search: what they find, on a score with a known optimum, and how each proposes."""

import itertools
import math
import random
import statistics

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu, wilcoxon
from synthetic_score import CODES, SCORE, SIZES, SMALL, Score, code, small, step, study_of

from triscale.naming import UnknownNameError
from triscale.search.evolution import Evenly, Evolution, Outcome
from triscale.search.samplers import LOGP, SAMPLERS, Prefiltered, RegularisedEvolution, sampler

optuna.logging.set_verbosity(optuna.logging.WARNING)
FEW = settings(max_examples=100, deadline=None, derandomize=True)


def search(proposer, score, trials, seed):
    """The points of a search without Optuna."""
    points = []
    for number in range(trials):
        point, logp = proposer.propose(random.Random(f"{seed} {number}"))
        proposer.learn([Outcome(point, score(point), logp)])
        points.append(point)
    return points


def test_the_optimum_is_the_best_of_all_points_and_is_not_found_decision_by_decision():
    score = Score((3, 2, 4, 1, 3, 2), seed=25)
    points = list(itertools.product(*map(range, score.sizes)))
    assert score.optimum() == pytest.approx(max(map(score, points)), rel=1e-12)
    means = [[statistics.mean(score(p) for p in points if p[i] == c) for c in range(size)] for i, size in enumerate(score.sizes)]
    alone = tuple(m.index(max(m)) for m in means)
    assert score(alone) < 0.95 * score.optimum()


@pytest.fixture(scope="module")
def best_of_random():
    return [max(map(SCORE, search(Evenly(SIZES), SCORE, 500, seed))) for seed in range(20)]


@pytest.mark.parametrize("name", ["evolution", "ppo"])
def test_evolution_and_ppo_beat_random_at_500_trials_on_20_seeds(name, best_of_random):
    chosen = sampler(name, code(SIZES, 6), trials=500)
    found = [max(map(SCORE, search(chosen._fresh(), SCORE, 500, seed))) for seed in range(20)]
    u, p = mannwhitneyu(found, best_of_random, alternative="greater")
    paired = wilcoxon(found, best_of_random, alternative="greater").pvalue
    ours, theirs = statistics.mean(found) / SCORE.optimum(), statistics.mean(best_of_random) / SCORE.optimum()
    print(f"\n{name}: {ours:.3f} of the optimum, random {theirs:.3f}; Mann-Whitney U = {u:.0f} of 400, p = {p:.1e}; Wilcoxon p = {paired:.1e}")
    assert p < 0.01
    assert paired < 0.01
    assert theirs < 0.65 < 0.75 < ours < 1


@FEW
@given(st.lists(st.integers(1, 5), min_size=1, max_size=12), st.integers(0, 2**32))
def test_a_child_differs_from_a_member_in_one_decision(sizes, seed):
    evolution, rng = Evolution(sizes, 4, 2), random.Random(seed)
    for _ in range(8):
        point, _ = evolution.propose(rng)
        assert all(0 <= choice < size for choice, size in zip(point, sizes, strict=True))
        evolution.learn([Outcome(point, rng.random())])
    assert len(evolution.members) == 4
    child, _ = evolution.propose(rng)
    differing = {sum(a != b for a, b in zip(child, m.point, strict=True)) for m in evolution.members}
    assert (0 if max(sizes) == 1 else 1) in differing


def test_evolution_takes_the_best_of_the_youngest():
    evolution = Evolution((9, 9, 9), population=3, tournament=3)
    evolution.learn([Outcome((choice,) * 3, value) for choice, value in ((0, 99.0), (1, 1.0), (5, 3.0), (2, 2.0))])
    parents = [statistics.mode(evolution.propose(random.Random(i))[0]) for i in range(600)]
    shares = [parents.count(parent) / len(parents) for parent in (5, 2, 1)]
    assert set(parents) == {5, 2, 1}  # the oldest is gone, though it was the best
    # Of three draws with replacement the best is the first with 1 - (2/3)^3, the last with (1/3)^3.
    assert shares == pytest.approx([19 / 27, 7 / 27, 1 / 27], abs=0.05)


@pytest.mark.parametrize(("population", "tournament"), [(5, 6), (3, -1)])
def test_a_tournament_is_of_members(population, tournament):
    with pytest.raises(ValueError, match=f"tournament <= population, found {tournament} and {population}"):
        RegularisedEvolution(CODES["evolution"], 0, population=population, tournament=tournament)


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_runs_a_study_and_learns_but_random(name):
    score = Score(SMALL)
    study = study_of(small(name))
    points = [step(study, CODES[name], score) for _ in range(60)]
    assert all(0 <= c < size for p in points for c, size in zip(p, SMALL, strict=True))
    assert len(set(points)) > 20
    if name in ("evolution", "tpe", "nsga2"):
        assert statistics.mean(map(score, points[40:])) > statistics.mean(map(score, points[:10]))
    again = study_of(small(name))
    assert [step(again, CODES[name], score) for _ in range(60)] == points


def test_nsga2_takes_several_objectives():
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=small("nsga2"))
    for _ in range(30):
        trial = study.ask(CODES["nsga2"].distributions)
        point = CODES["nsga2"].point(trial.params)
        study.tell(trial, (Score(SMALL)(point), sum(point)))
    assert len({t.values[1] for t in study.best_trials}) > 1


def test_names():
    with pytest.raises(UnknownNameError, match="unknown sampler 'evolutoin'; nearest is 'evolution'"):
        sampler("evolutoin", CODES["evolution"])
    with pytest.raises(ValueError, match="sampler tpe: expected a Coding of one decision a parameter, found groups of 6"):
        sampler("tpe", CODES["ppo"])


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_space_of_one_point_is_proposed(name):
    coding = code((1, 1, 1), CODES[name].group)
    study = study_of(sampler(name, coding, 0, 40))
    assert {step(study, coding, len) for _ in range(15)} == {(0, 0, 0)}


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_screen_picks_among_the_proposals(name):
    """A screen that knows the score: the mean of the best of 6 is above that of all."""
    score, asked = Score(SMALL), []

    def screen(point):
        asked.append(point)
        return math.nan if len(asked) % 6 == 1 else score(point)  # the first of six can't be scored

    study = study_of(Prefiltered(small(name), screen, 6, CODES[name]))
    points = [step(study, CODES[name], score) for _ in range(25)]
    assert len(asked) == 6 * 25
    for i, point in enumerate(points):
        assert score(point) == max(map(score, asked[6 * i + 1 : 6 * i + 6]))
    plain = study_of(small(name))
    assert statistics.mean(map(score, points)) > statistics.mean(score(step(plain, CODES[name], score)) for _ in range(25))


def test_a_screen_changes_nothing_about_the_recorded_probability():
    from triscale.search.controller import Controller

    study = study_of(Prefiltered(small("ppo"), Score(SMALL), 4, CODES["ppo"]))
    point = step(study, CODES["ppo"], Score(SMALL))
    assert study.trials[0].system_attrs[LOGP] == pytest.approx(-sum(map(math.log, SMALL)))  # an even policy at first
    drawn = [Controller(SMALL).propose(rng)[0] for rng in [random.Random("3 0")] for _ in range(4)]
    assert point == max(drawn, key=Score(SMALL))
    with pytest.raises(ValueError, match="1 or more proposals a trial, found 0"):
        Prefiltered(small("ppo"), Score(SMALL), 0, CODES["ppo"])
