"""The recurrent controller: its probabilities, PPO's arithmetic, and that it learns."""

import itertools
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from triscale.search.controller import PPO, Baseline, Controller, Policy, Sampling, clipped
from triscale.search.evolution import Outcome

FEW = settings(max_examples=30, deadline=None, derandomize=True)


def stirred(sizes, seed=0):
    """A policy that isn't even."""
    policy, generator = Policy(sizes, 8), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.7)
    return policy


def every(sizes):
    return list(itertools.product(*map(range, sizes)))


@FEW
@given(st.lists(st.integers(1, 4), min_size=1, max_size=5), st.integers(0, 100))
def test_probabilities_of_all_points_sum_to_one(sizes, seed):
    logp, entropy = stirred(sizes, seed)(torch.tensor(every(sizes)))
    assert logp.exp().sum().item() == pytest.approx(1, abs=1e-5)
    assert (entropy >= -1e-6).all()
    assert (entropy <= math.log(max(sizes)) + 1e-6).all()


def test_a_new_policy_is_even():
    logp, entropy = Policy((2, 4, 1), 8)(torch.tensor(every((2, 4, 1))))
    assert logp.tolist() == pytest.approx([-math.log(8)] * 8)
    assert entropy.tolist() == pytest.approx([(math.log(2) + math.log(4)) / 3] * 8)


@FEW
@given(st.lists(st.integers(1, 5), min_size=1, max_size=12), st.integers(0, 100))
def test_what_is_drawn_has_the_probability_that_torch_gives_it(sizes, seed):
    policy = stirred(sizes, seed)
    sampling, rng = Sampling(policy, sizes), random.Random(seed)
    drawn = [sampling.draw(rng) for _ in range(10)]
    logp, _ = policy(torch.tensor([point for point, _ in drawn]))
    assert [x for _, x in drawn] == pytest.approx(logp.tolist(), abs=1e-4)


def test_points_are_drawn_as_often_as_their_probability_says():
    sizes, n = (3, 2, 3), 4000
    policy, rng = stirred(sizes), random.Random(0)
    sampling = Sampling(policy, sizes)
    points = [sampling.draw(rng)[0] for _ in range(n)]
    shares = policy(torch.tensor(every(sizes)))[0].exp().tolist()
    for point, share in zip(every(sizes), shares, strict=True):
        assert abs(points.count(point) / n - share) < 5 * math.sqrt(share / n) + 1e-3, point


def test_an_earlier_choice_matters():
    logp = dict(zip(every((2, 2)), stirred((2, 2))(torch.tensor(every((2, 2))))[0].tolist(), strict=True))
    assert abs((logp[0, 0] - logp[0, 1]) - (logp[1, 0] - logp[1, 1])) > 0.05


def test_the_clipped_objective_by_hand():
    """Ratios 1.5, 0.5, 1.5, 0.5 with advantages 2, 2, -2, -2 and clip 0.2: min(3, 2.4), min(1, 1.6), min(-3, -2.4), min(-1, -1.6)."""
    logp = torch.tensor([1.5, 0.5, 1.5, 0.5]).log().requires_grad_()
    value = clipped(logp, torch.zeros(4), torch.tensor([2.0, 2.0, -2.0, -2.0]), 0.2)
    assert value.item() == pytest.approx((2.4 + 1 - 3 - 1.6) / 4)
    value.backward()
    assert logp.grad.tolist() == pytest.approx([0, 1 / 4, -3 / 4, 0])  # nothing where it is clipped, else ratio x advantage / 4


def test_advantages_by_hand():
    """First by themselves: mean 2, spread 1. Then against that mean: sqrt((4 + 16) / 2); the averages move by a fifth."""
    baseline = Baseline(0.8)
    assert baseline.advantages([1.0, 3.0]) == [-1, 1]
    assert (baseline.mean, baseline.spread) == (2, 1)
    assert baseline.advantages([4.0, 6.0]) == [2, 4]
    assert baseline.mean == pytest.approx(2 + 0.2 * 3)
    assert baseline.spread == pytest.approx(0.8 + 0.2 * math.sqrt(10))
    assert Baseline(0.8).advantages([5.0, 5.0]) == [0, 0]


def test_one_update_by_hand():
    """One decision of two choices, one outcome each with advantages 1 and -1. Adam's first step is the rate times the gradient's sign:
    the logits' difference becomes 2 rate (1 + sum |h|), h the LSTM's state, whatever the gradient's size."""
    rate = 1e-4
    controller = Controller((2,), PPO(hidden=4, batch=2, epochs=1, rate=rate, entropy=0.0))
    h = controller.policy.lstm(controller.policy.embed(torch.zeros(1, 1, dtype=torch.long)))[0].detach()
    even = math.log(0.5)
    controller.learn([Outcome((0,), 7.0, even)])
    assert controller.policy.bias.abs().sum() == 0  # half a batch
    controller.learn([Outcome((1,), 3.0, even)])
    logp = controller.policy(torch.tensor([[0], [1]]))[0].tolist()
    assert logp[0] - logp[1] == pytest.approx(2 * rate * (1 + h.abs().sum().item()), rel=1e-3)


def test_the_probability_at_the_draw_counts_not_todays():
    """Drawn as unlikely, now likely: the ratio of the better point stands above 1 + clip, where nothing is gained by more of it. Were the
    ratio taken against today's probabilities, it would be 1 and the point made more likely still."""
    controller = Controller((2,), PPO(hidden=4, batch=2, epochs=1, rate=1e-3, entropy=0.0))
    now = controller.policy(torch.tensor([[0], [1]]))[0].tolist()
    controller.learn([Outcome((0,), 7.0, now[0] - 1), Outcome((1,), 3.0, now[1] + 1)])  # ratios e and 1/e, advantages 1 and -1
    after = controller.policy(torch.tensor([[0], [1]]))[0].tolist()
    assert after == pytest.approx(now, abs=1e-7)
    fresh = Controller((2,), PPO(hidden=4, batch=2, epochs=1, rate=1e-3, entropy=0.0))
    fresh.learn([Outcome((0,), 7.0, now[0]), Outcome((1,), 3.0, now[1])])
    assert fresh.policy(torch.tensor([[0]]))[0].item() > now[0] + 1e-4


def test_a_flat_first_batch_does_not_blow_up_the_next():
    baseline = Baseline(0.8)
    assert baseline.advantages([0.1] * 10) == [0.0] * 10
    assert max(map(abs, baseline.advantages([0.1] * 5 + [0.3] * 5))) < 2.001
    assert max(map(abs, Baseline(0.8, 1.0, 1e-6, 1).advantages([5.0, 5.0, 5.1]))) <= 10


@pytest.mark.parametrize("entropy", [0.0, 1.0])
def test_entropy_draws_back_to_even_where_all_values_are_equal(entropy):
    controller = Controller((2,), PPO(hidden=4, batch=2, entropy=entropy))
    with torch.no_grad():
        controller.policy.bias[:] = torch.tensor([1.0, -1.0])
    for _ in range(100):
        logp = controller.policy(torch.tensor([[0], [1]]))[0].tolist()
        controller.learn([Outcome((0,), 1.0, logp[0]), Outcome((1,), 1.0, logp[1])])
    assert logp[0] - logp[1] == pytest.approx(0.0 if entropy else 2.0, abs=0.05)


def test_outcomes_of_unknown_probability_teach_nothing():
    a, b = (Controller((3, 2), PPO(batch=4)) for _ in range(2))
    known = [Outcome((i % 3, i % 2), float(i), -math.log(6)) for i in range(8)]
    a.learn(known)
    b.learn(o for known_one in known for o in (known_one, Outcome((0, 0), 1e6)))
    for p, q in zip(a.policy.parameters(), b.policy.parameters(), strict=True):
        assert torch.equal(p, q)
    assert a.baseline == b.baseline
    assert a.baseline.updates == 2


def test_the_scale_of_the_score_changes_nothing():
    points = []
    for scale in (1.0, 1024.0, 2.0**-20):
        controller, rng = Controller((3, 3, 2)), random.Random(0)
        for _ in range(60):
            point, logp = controller.propose(rng)
            controller.learn([Outcome(point, scale * sum(point), logp)])
        points.append([controller.propose(rng)[0] for _ in range(20)])
    assert points[0] == points[1] == points[2]


def test_it_learns_a_separable_score_to_near_its_optimum():
    sizes, rng = (3, 2, 4, 1, 3, 3, 2, 4, 3, 2), random.Random(5)
    worth = [[rng.random() for _ in range(size)] for size in sizes]
    optimum, low = sum(map(max, worth)), sum(map(min, worth))
    controller, shares = Controller(sizes), []
    for _ in range(1000):
        point, logp = controller.propose(rng)
        value = sum(w[choice] for w, choice in zip(worth, point, strict=True))
        controller.learn([Outcome(point, value, logp)])
        shares.append((value - low) / (optimum - low))
    assert sum(shares[:50]) / 50 < 0.65
    assert sum(shares[-50:]) / 50 > 0.9
    assert max(shares) > 0.97


def test_torch_s_own_generator_is_left_alone():
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    controller = Controller((2, 3))
    with torch.no_grad():  # as a caller may have it
        for i in range(20):
            controller.learn([Outcome((i % 2, i % 3), float(i), -math.log(6))])
    assert torch.equal(torch.rand(3), expected)
    assert controller.baseline.updates == 2
    assert controller.policy.bias.abs().sum() > 0


@pytest.mark.parametrize("wrong", [{"batch": 0}, {"rate": -1.0}, {"decay": 1.0}, {"clip": math.nan}, {"entropy": -0.1}])
def test_settings_that_make_no_sense(wrong):
    with pytest.raises(ValueError, match=r"PPO: expected .* found PPO\(.*" + next(iter(wrong))):
        PPO(**wrong)
