"""fit_budget: the largest network of a scaling family that keeps every budget."""

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import triscale as ts
from triscale.budget import BudgetError

B0 = ts.arch("efficientnet_b0")
STEP = 0.001
SOME = settings(max_examples=25, deadline=None, derandomize=True)


def use(arch, workload=None):
    workload = workload or ts.Workload()
    c = workload.cost(arch)
    return {"macs": c.macs, "params": c.params, "memory": workload.memory(c)}


def at(phi, base=B0, **coefficients):
    return ts.scale(base, ts.compound(phi, **coefficients))


def assert_largest(fit, budgets, base=B0, workload=None):
    """It fits, and the next step of phi doesn't, for the reasons given in `binding`."""
    assert fit.arch == at(fit.phi, base)
    now, after = use(fit.arch, workload), use(at(round(fit.phi + STEP, 3), base), workload)
    assert all(now[key] <= budget for key, budget in budgets.items())
    assert fit.binding == tuple(key for key, budget in budgets.items() if after[key] > budget)
    assert fit.binding
    assert fit.use == {key: (now[key], budget) for key, budget in budgets.items()}
    assert fit.cost.macs == now["macs"]


@pytest.mark.parametrize("name", ["efficientnet_b0", "efficientnet_lite0", "mobilenet_v2", "resnet50"])
@pytest.mark.parametrize("budgets", [{"macs": 2e9}, {"params": 12e6}, {"memory": 100e6}, {"macs": 0.2e9}], ids=str)
def test_fits_and_the_next_step_does_not(name, budgets):
    base = ts.arch(name)
    assert_largest(ts.fit_budget(base, **budgets), budgets, base)


@SOME
@given(st.floats(1e6, 1e11))
def test_any_multiply_add_budget(macs):
    assert_largest(ts.fit_budget(B0, macs=macs), {"macs": macs})


@SOME
@given(macs=st.floats(1e8, 1e10), params=st.floats(1e6, 1e8), memory=st.floats(3e7, 3e9))
def test_several_budgets_give_the_smallest_of_each_alone(macs, params, memory):
    budgets = {"macs": macs, "params": params, "memory": memory}
    together = ts.fit_budget(B0, **budgets)
    alone = {key: ts.fit_budget(B0, **{key: value}).phi for key, value in budgets.items()}
    assert together.phi == min(alone.values())
    assert together.binding == tuple(key for key in budgets if alone[key] == together.phi)
    assert_largest(together, budgets)


def test_the_macs_of_b3_give_a_network_as_large_as_b3():
    b3 = ts.cost(ts.arch("efficientnet_b3")).macs
    fit = ts.fit_budget(B0, macs=b3)
    assert 2 < fit.phi < 3
    assert 0.97 * b3 < fit.cost.macs <= b3


def test_a_budget_met_exactly_is_met():
    exact = ts.cost(at(1.5)).macs
    assert ts.fit_budget(B0, macs=exact).phi >= 1.5
    assert ts.fit_budget(B0, macs=exact - 1).phi < 1.5
    assert ts.fit_budget(B0, macs=ts.cost(B0).macs).phi >= 0
    assert ts.fit_budget(B0, macs=ts.cost(B0).macs - 1).phi < 0


def test_the_memory_of_training_counts_batch_gradients_and_optimiser():
    budgets = {"memory": 4e9}
    workload = ts.Workload(batch=32, training=True)
    fit = ts.fit_budget(B0, **budgets, workload=workload)
    assert_largest(fit, budgets, workload=workload)
    assert fit.phi < ts.fit_budget(B0, **budgets, workload=ts.Workload(batch=32)).phi
    assert fit.phi < ts.fit_budget(B0, **budgets, workload=ts.Workload(batch=8, training=True)).phi
    m = fit.cost.memory
    assert fit.use["memory"] == (3 * m.weights + m.input + m.training_peak, 4e9)


def test_the_workload_s_classes_count():
    ten = ts.fit_budget(B0, params=4e6, workload=ts.Workload(num_classes=10))
    assert ten.phi > ts.fit_budget(B0, params=4e6).phi
    assert ten.cost.params == ts.cost(ten.arch, 10).params <= 4e6


def test_other_coefficients():
    width_only = ts.Coefficients(1, 1.5, 1)
    fit = ts.fit_budget(B0, macs=2e9, coefficients=width_only)
    assert fit.arch == at(fit.phi, alpha=1, beta=1.5, gamma=1)
    assert fit.arch.resolution == 224
    assert [s.layers for s in fit.arch.stages] == [s.layers for s in B0.stages]
    assert ts.cost(at(round(fit.phi + STEP, 3), alpha=1, beta=1.5, gamma=1)).macs > 2e9


def test_shrinks_down_to_the_floors():
    least = at(-100)
    fit = ts.fit_budget(B0, params=ts.cost(least).params)
    assert fit.cost.params == ts.cost(least).params
    assert [s.layers for s in fit.arch.stages] == [1] * 7
    with pytest.raises(BudgetError, match=r"smallest network.*params 21,726 > 21,725"):
        ts.fit_budget(B0, params=ts.cost(least).params - 1)


def test_an_impossible_budget_says_which_one_and_by_how_much():
    with pytest.raises(BudgetError, match=r"doesn't fit: macs 321,408 > 1,000$"):
        ts.fit_budget(B0, macs=1000, params=1e9)


@pytest.mark.parametrize(
    ("budgets", "named"),
    [
        ({}, "at least one of macs, params, memory, latency"),
        ({"macs": 0}, "macs above 0"),
        ({"params": -5}, "params above 0"),
        ({"memory": math.nan}, "memory above 0"),
        ({"macs": "2e9"}, "macs above 0"),
        ({"macs": 1e40}, "tighter"),
        ({"macs": math.inf}, "tighter"),
        ({"latency": 0.1}, "measure"),
        ({"macs": 1e9, "coefficients": ts.Coefficients(1, 1, 1)}, "all 1"),
    ],
)
def test_what_is_no_budget_is_refused(budgets, named):
    with pytest.raises(BudgetError, match=named):
        ts.fit_budget(B0, **budgets)


def seconds(arch):
    """A machine of 10 billion multiply-adds a second."""
    return ts.cost(arch).macs / 1e10


@pytest.mark.parametrize("latency", [0.01, 0.0386, 0.1, 0.5])
def test_latency_that_grows_with_cost(latency):
    fit = ts.fit_budget(B0, latency=latency, measure=seconds)
    low, high = fit.interval
    assert fit.phi == low
    assert 0 < high - low <= 0.05
    assert seconds(at(low)) <= latency < seconds(at(high))
    assert fit.binding == ("latency",)
    assert fit.use["latency"] == (seconds(fit.arch), latency)
    assert fit.measured == {phi: seconds(at(phi)) for phi in fit.measured}


def test_latency_with_another_budget_that_binds_first():
    fit = ts.fit_budget(B0, macs=1e9, latency=10, measure=seconds)
    exact = ts.fit_budget(B0, macs=1e9)
    assert (fit.phi, fit.binding) == (exact.phi, ("macs",))
    assert fit.interval is None
    assert fit.use["latency"] == (seconds(fit.arch), 10)
    both = ts.fit_budget(B0, macs=1e9, latency=0.05, measure=seconds)
    assert both.binding == ("latency",)
    assert both.use["macs"][0] <= 1e9
    assert both.use["latency"][0] <= 0.05


@pytest.mark.parametrize("amount", [0.02, 0.1])
def test_latency_that_scatters_and_is_not_monotone(amount):
    """The answer fits as measured and truly, up to the scatter; the interval's other end was too slow, twice."""
    draw = random.Random(0)

    def scattering(arch):
        return seconds(arch) * (1 + draw.uniform(-amount, amount))

    for latency in (0.02, 0.1, 0.3):
        fit = ts.fit_budget(B0, latency=latency, measure=scattering)
        low, high = fit.interval
        assert fit.phi == low < high
        assert fit.use["latency"] == (fit.measured[low], latency)
        assert fit.measured[low] <= latency < fit.measured[high]
        assert seconds(fit.arch) <= latency / (1 - amount)
        assert seconds(at(high)) > latency / (1 + amount)


def test_one_slow_run_does_not_end_the_search():
    """What is measured too slow for the first time, and only then, is measured again."""
    seen = set()

    def first_run_slow(arch):
        slow = seconds(arch) > 0.15 and arch not in seen
        seen.add(arch)
        return seconds(arch) * (10 if slow else 1)

    fit = ts.fit_budget(B0, latency=0.2, measure=first_run_slow)
    assert fit.interval[0] < fit.interval[1]
    assert 0.15 < seconds(fit.arch) <= 0.2
    exact = ts.fit_budget(B0, macs=0.17e10, latency=0.2, measure=first_run_slow)
    assert exact.binding == ("macs",)
    assert exact.phi == ts.fit_budget(B0, macs=0.17e10).phi


def test_latency_with_a_step():
    """Real machines jump, e.g. where a map no longer fits the cache: the answer stays before the jump."""
    jump = 1.3
    limit = ts.cost(at(jump)).macs
    fit = ts.fit_budget(B0, latency=0.2, measure=lambda a: 0.1 if ts.cost(a).macs <= limit else 0.5)
    assert fit.interval[0] <= jump + 0.01
    assert ts.cost(fit.arch).macs <= limit < ts.cost(at(fit.interval[1])).macs


def test_latency_below_the_smallest_network():
    with pytest.raises(BudgetError, match=r"smallest network.*latency 1 s > 0\.5 s"):
        ts.fit_budget(B0, latency=0.5, measure=lambda a: 1.0)


def test_latency_that_never_binds():
    with pytest.raises(BudgetError, match="tighter"):
        ts.fit_budget(B0, latency=0.5, measure=lambda a: 0.1)


@pytest.mark.parametrize("value", [math.nan, math.inf, -1, None, "fast"])
def test_a_measurement_that_is_none_is_refused(value):
    with pytest.raises(BudgetError, match="measure gave"):
        ts.fit_budget(B0, latency=0.5, measure=lambda a: value)


def test_prints_phi_and_what_binds():
    text = str(ts.fit_budget(B0, macs=2e9, params=1e9))
    assert text.startswith("phi ")
    assert "bound by macs\n" in text
    assert "macs: 1.9" in text or "macs: 2" in text
    assert "of 2e+09" in text
    assert "params: " in text
