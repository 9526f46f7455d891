"""Samplers in Optuna's studies: what they hear, in which order, and that a study is all they keep."""

import copy
import json
import math
import multiprocessing
import pickle
import random

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from synthetic_score import CODES, SCORE, SIZES, SMALL, Score, code, small, step, study_of

from triscale.search.evolution import Evenly, Outcome
from triscale.search.samplers import PointSampler, PPOController, RegularisedEvolution, sampler

optuna.logging.set_verbosity(optuna.logging.WARNING)


@pytest.mark.parametrize("name", ["random", "evolution", "ppo"])
def test_a_resumed_study_goes_on_as_an_uninterrupted_one(name, tmp_path):
    score = Score(SMALL)
    whole = study_of(small(name))
    expected = [step(whole, CODES[name], score) for _ in range(48)]

    def opened():
        storage = JournalStorage(JournalFileBackend(str(tmp_path / "journal.log")))
        return study_of(small(name), storage=storage, study_name="s", load_if_exists=True)

    parts = [step(study, CODES[name], score) for study, n in ((opened(), 33), (opened(), 15)) for _ in range(n)]
    assert parts == expected


@pytest.mark.parametrize("name", ["random", "evolution", "ppo"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))], ids=["deepcopy", "pickle"])
def test_a_copy_of_a_sampler_goes_on_alike(name, copied):
    score = Score(SMALL)
    whole = study_of(small(name))
    expected = [step(whole, CODES[name], score) for _ in range(30)]
    study = study_of(small(name))
    parts = [step(study, CODES[name], score) for _ in range(25)]
    study.sampler = copied(study.sampler)
    assert parts + [step(study, CODES[name], score) for _ in range(5)] == expected


@pytest.mark.parametrize("name", ["evolution", "ppo"])
def test_to_minimise_is_to_maximise_the_negative(name):
    score = Score(SMALL)
    up, down = study_of(small(name)), study_of(small(name), direction="minimize")
    assert [step(up, CODES[name], score) for _ in range(40)] == [step(down, CODES[name], lambda p: -score(p)) for _ in range(40)]


@pytest.mark.parametrize("name", ["random", "evolution", "ppo"])
def test_new_seeds_draw_other_points(name):
    coding = code(SIZES, 6)
    chosen = sampler(name, coding, 1)
    first = [step(study_of(chosen), coding, SCORE) for _ in range(5)]
    assert len(set(first)) == 1  # the first trial of a study, each time
    chosen.reseed_rng()
    by_chance = [step(study_of(sampler(name, coding)), coding, SCORE) for _ in range(2)]
    assert len({first[0], step(study_of(chosen), coding, SCORE), *by_chance}) == 4


class Heard(PointSampler):
    """Even draws with a log-probability; keeps all that it is told."""

    def _fresh(self):
        self.heard = []
        even = Evenly(self.coding.sizes)

        class Proposer:
            propose = staticmethod(lambda rng: (even.propose(rng)[0], -1.5))
            learn = staticmethod(self.heard.extend)

        return Proposer


def test_every_trial_that_ended_is_heard_once_in_the_order_of_ends():
    coding = CODES["ppo"]
    study = study_of(Heard(coding, 1))
    a, b, c, d = (study.ask(coding.distributions) for _ in range(4))
    for trial, value in ((c, 3.0), (a, 1.0)):
        study.tell(trial, value)
    e = study.ask(coding.distributions)
    for trial, value in ((e, 5.0), (b, 2.0)):
        study.tell(trial, value)
    study.ask(coding.distributions)
    expected = [Outcome(coding.point(t.params), v, -1.5) for t, v in ((c, 3.0), (a, 1.0), (e, 5.0), (b, 2.0))]
    assert study.sampler.heard == expected
    joined = optuna.load_study(study_name=study.study_name, storage=study._storage, sampler=Heard(coding, 2))
    study.tell(d, 4.0)
    joined.ask(coding.distributions)
    assert joined.sampler.heard == [*expected, Outcome(coding.point(d.params), 4.0, -1.5)]


def test_pruned_trials_count_by_their_last_report_failed_and_endless_ones_not_at_all():
    coding = CODES["ppo"]
    study = study_of(Heard(coding, 1), direction="minimize")
    trials = [study.ask(coding.distributions) for _ in range(6)]
    trials[0].report(0.7, 1)
    trials[0].report(0.4, 12)
    trials[0].report(0.9, 3)
    study.tell(trials[0], state=TrialState.PRUNED)
    study.tell(trials[1], state=TrialState.PRUNED)  # without a report
    study.tell(trials[2], state=TrialState.FAIL)
    study.tell(trials[3], math.inf)
    trials[4].report(math.nan, 1)
    study.tell(trials[4], state=TrialState.PRUNED)
    study.tell(trials[5], 0.25)
    study.ask(coding.distributions)
    assert study.sampler.heard == [Outcome(coding.point(trials[0].params), -0.4, -1.5), Outcome(coding.point(trials[5].params), -0.25, -1.5)]


def test_trials_of_other_samplers_and_codings_are_heard_without_a_probability():
    coding = CODES["ppo"]
    study = study_of(small("tpe"))
    for _ in range(3):
        step(study, CODES["tpe"], Score(SMALL))
    study.tell(study.ask({"something else": optuna.distributions.FloatDistribution(0, 1)}), 0.5)
    study.sampler = Heard(coding, 1)
    study.enqueue_trial(coding.params((1, 2, 0, 3, 2, 1, 1, 2)))
    step(study, coding, Score(SMALL))
    study.enqueue_trial(CODES["tpe"].params((0, 2, 0, 3, 2, 1, 1, 2)))  # in another coding than the study's
    step(study, coding, Score(SMALL))
    study.enqueue_trial({"group 6 part 2": 5})  # a part of a point
    partial = step(study, coding, Score(SMALL))
    assert partial[6:] == (1, 2)
    study.ask(coding.distributions)
    own = [(1, 2, 0, 3, 2, 1, 1, 2), (0, 2, 0, 3, 2, 1, 1, 2), partial]
    by_tpe = [CODES["tpe"].point(t.params) for t in study.trials[:3]]
    assert study.sampler.heard == [Outcome(p, Score(SMALL)(p)) for p in by_tpe + own]


@pytest.mark.parametrize("name", ["random", "evolution", "ppo"])
def test_several_objectives_are_refused(name):
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=small(name))
    for _ in range(2):
        with pytest.raises(ValueError, match="one objective, found 2; take nsga2"):
            study.ask(CODES[name].distributions)


def work(path, seed):
    storage = JournalStorage(JournalFileBackend(path))
    study = optuna.load_study(study_name="s", storage=storage, sampler=small("evolution", seed))
    for _ in range(25):
        step(study, CODES["evolution"], Score(SMALL))


def test_processes_with_one_seed_share_a_study(tmp_path):
    path = str(tmp_path / "journal.log")
    study = optuna.create_study(storage=JournalStorage(JournalFileBackend(path)), study_name="s", direction="maximize")
    workers = [multiprocessing.get_context("spawn").Process(target=work, args=(path, 3)) for _ in range(2)]
    for w in workers:
        w.start()
    for w in workers:
        w.join(60)
        assert w.exitcode == 0
    points = [CODES["evolution"].point(t.params) for t in study.trials]
    assert len(points) == 50
    # The first are drawn at random, by seed and number alone, whoever draws them.
    assert points[:10] == [Evenly(SMALL).propose(random.Random(f"3 {number}"))[0] for number in range(10)]
    assert len(set(points)) > 20
    following = study_of(small("evolution"), storage=study._storage, study_name="s", load_if_exists=True)
    assert step(following, CODES["evolution"], Score(SMALL)) is not None
    known = {o.point: o.value for o in following.sampler._proposer.members}
    assert known == {p: Score(SMALL)(p) for p in known}


def test_what_a_study_holds_is_small():
    """One attribute a trial beside the parameters, and that only where there is something to tell."""
    for name, expected in (("random", 0), ("evolution", 0), ("ppo", 1)):
        study = study_of(small(name))
        step(study, CODES[name], Score(SMALL))
        attrs = study.trials[0].system_attrs
        assert (len(attrs), len(study.trials[0].params)) == (expected, 2)
        assert len(json.dumps(attrs)) < 60


@pytest.mark.parametrize("name", ["evolution", "ppo"])
def test_two_workers_know_the_same(name):
    storage, score = optuna.storages.InMemoryStorage(), Score(SMALL)
    ours, theirs = (study_of(small(name, seed), storage=storage, study_name="s", load_if_exists=True) for seed in (1, 2))
    for _ in range(15):
        step(ours, CODES[name], score)
        step(theirs, CODES[name], score)
    for study in (ours, theirs):  # both hear of the last trials
        study.sampler._catch_up(study)
    a, b = (s.sampler._proposer for s in (ours, theirs))
    assert [a.propose(random.Random(i)) for i in range(10)] == [b.propose(random.Random(i)) for i in range(10)]
    assert isinstance(ours.sampler, PPOController if name == "ppo" else RegularisedEvolution)
