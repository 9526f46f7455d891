"""Scaling as a function: the official rounding, the paper's compound rule, floors, and small inputs."""

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import triscale as ts
from triscale.scaling import ALPHA, BETA, GAMMA, ScalingError, round_channels, round_layers, round_resolution

B0 = ts.arch("efficientnet_b0")
SOME = [B0, *(ts.arch(n) for n in ("efficientnet_lite0", "efficientnetv2_b0", "mobilenet_v1", "mobilenet_v2", "mnasnet_a1", "resnet18", "resnet50"))]
FEW = settings(max_examples=150, deadline=None, derandomize=True)


def channels(arch):
    return [arch.stem.channels, *(s.channels for s in arch.stages), arch.head.channels]


def layers(arch):
    return [s.layers for s in arch.stages]


@pytest.mark.parametrize("name", [f"efficientnet_b{i}" for i in range(1, 9)] + ["efficientnet_l2"])
def test_rounding_gives_the_official_family(name, shared):
    """B1 to B8 and L2 from B0 by their multipliers: what round_filters and round_repeats gave in the official graphs."""
    row = json.loads((shared / "golden/family.json").read_text())["models"][name.replace("_", "-")]
    scaled = ts.scale(B0, depth=row["depth_coefficient"], width=row["width_coefficient"])
    assert channels(scaled) == [row["stem_filters"], *(s["output_filters"] for s in row["stages"]), row["head_filters"]]
    assert layers(scaled) == [s["num_blocks"] for s in row["stages"]]


@FEW
@given(st.integers(1, 2048), st.floats(0.05, 8))
def test_channels_follow_the_official_formula(c, width):
    wish = c * width
    expected = max(8, int(wish + 4) // 8 * 8)
    expected += 8 if expected < 0.9 * wish else 0
    assert round_channels(c, width) == (c if width == 1 else expected)
    assert round_channels(c, width) % 8 == 0 or width == 1


@pytest.mark.parametrize(
    ("c", "width", "limit", "expected"),
    [(16, 1.4, 0.9, 24), (16, 1.2, 0.0, 16), (16, 1.2, 0.9, 24), (3, 0.5, 0.9, 8), (1280, 1.1, 0.9, 1408)],
)
def test_channels_by_hand(c, width, limit, expected):
    """16 x 1.2 = 19.2 is rounded to 16, below 0.9 x 19.2, so up to 24; V2-B3 keeps its 16."""
    assert round_channels(c, width, ts.Numerics(round_limit=limit)) == expected


def test_another_divisor():
    assert round_channels(32, 1.1, ts.Numerics(divisor=1)) == 35
    assert round_channels(32, 1.1, ts.Numerics(divisor=16)) == 32
    assert round_channels(5, 0.1, ts.Numerics(divisor=16)) == 16


def test_layers_are_rounded_up_exactly():
    """In whole hundredths there is no rounding error to argue about: ceil(n x depth), where 25 x 2.2 in floats lies above 55."""
    for n in range(1, 61):
        for hundredths in range(1, 801):
            assert round_layers(n, hundredths / 100) == -(-n * hundredths // 100)


def test_layers_by_hand():
    assert [round_layers(n, 1.1) for n in (1, 2, 3, 10)] == [2, 3, 4, 11]
    assert [round_layers(n, 0.001) for n in (1, 4)] == [1, 1]


@FEW
@given(st.integers(1, 2000), st.floats(0.01, 10))
def test_resolution_is_the_nearest_even_number(r, factor):
    got = round_resolution(r, factor)
    if factor == 1:
        assert got == r
    elif got > min(32, r):
        assert got % 2 == 0
        assert abs(got - r * factor) <= 1 + 1e-9
    else:
        assert got == min(32, r)
        assert r * factor <= got + 1


@pytest.mark.parametrize("arch", SOME, ids=lambda a: a.name)
def test_scaling_by_one_changes_nothing(arch):
    assert ts.scale(arch) == arch
    assert ts.scale(arch, depth=1.0, width=1.0, resolution=1.0) == arch
    assert ts.scale(arch, ts.compound(0)) == arch
    assert ts.scale(arch, ts.Scaling()) == arch


def test_compound_is_equation_3():
    s = ts.compound(3)
    assert (s.depth, s.width, s.resolution, s.phi) == (1.2**3, 1.1**3, 1.15**3, 3)
    assert (ALPHA, BETA, GAMMA) == (1.2, 1.1, 1.15)
    assert ts.Coefficients().growth == pytest.approx(1.2 * 1.1**2 * 1.15**2) == pytest.approx(1.92, abs=0.01)
    other = ts.compound(-1.5, alpha=2, beta=1, gamma=1.5)
    assert (other.depth, other.width, other.resolution) == pytest.approx((2**-1.5, 1, 1.5**-1.5))


def test_compound_at_phi_1_of_b0():
    one = ts.scale(B0, ts.compound(1))
    assert layers(one) == [2, 3, 3, 4, 4, 5, 2]
    assert channels(one) == [32, 16, 24, 48, 88, 120, 208, 352, 1408]  # 17.6 and 26.4 go down to 16 and 24, 44 to 48
    assert one.resolution == 258  # 257.6


@pytest.mark.parametrize(("phi", "dropout"), [(-3, 0.2), (0, 0.2), (3.5, 0.35), (7, 0.5), (12, 0.5)])
def test_dropout_goes_linearly_from_b0_to_b7(phi, dropout):
    assert ts.scale(B0, ts.compound(phi)).dropout == pytest.approx(dropout)
    assert ts.scale(B0, depth=2).dropout == 0.2
    assert ts.scale(ts.arch("resnet50"), ts.compound(phi)).dropout == 0


@pytest.mark.parametrize("arch", SOME, ids=lambda a: a.name)
def test_a_small_phi_ends_at_the_floors(arch):
    """One layer a stage, one divisor of channels, 32 pixels; what a family holds fixed stays."""
    least = ts.scale(arch, ts.compound(-100))
    assert layers(least) == [old.layers if old.fixed_depth else 1 for old in arch.stages]
    assert {s.channels for s in least.stages} == {8}
    assert least.stem.channels == (arch.stem.channels if arch.stem.scale == "fixed" else 8)
    assert least.head.channels == (min(8, arch.head.channels) if arch.head.scale == "width" else arch.head.channels)
    assert least.resolution == 32
    assert ts.scale(least, ts.compound(-100)) == least


def test_what_a_family_holds_fixed():
    lite = ts.scale(ts.arch("efficientnet_lite0"), depth=2, width=2)
    assert (lite.stem.channels, lite.head.channels) == (32, 1280)
    assert layers(lite) == [1, 4, 4, 6, 6, 8, 1]
    v2 = ts.arch("mobilenet_v2")
    assert ts.scale(v2, width=0.5).head.channels == 1280
    assert ts.scale(v2, width=2).head.channels == 2560
    assert ts.scale(ts.arch("resnet18"), width=2).head.channels == 0


def test_scale_changes_only_what_it_says():
    s = ts.scale(B0, depth=2)
    assert channels(s) == channels(B0)
    assert (s.resolution, s.numerics, s.dropout) == (B0.resolution, B0.numerics, B0.dropout)
    w = ts.scale(B0, width=2)
    assert layers(w) == layers(B0)
    r = ts.scale(B0, resolution=2)
    assert r == replace(B0, resolution=448)


def test_the_name_says_how_it_was_scaled():
    assert ts.scale(B0, ts.compound(2.5)).name == "efficientnet_b0 phi=2.5"
    assert ts.scale(B0, depth=1.4, width=1.2).name == "efficientnet_b0 d=1.4 w=1.2"


@pytest.mark.parametrize("index", range(len(SOME)), ids=[a.name for a in SOME])
@settings(max_examples=40, deadline=None, derandomize=True)
@given(phi=st.floats(-12, 10), step=st.floats(0, 2))
def test_costs_never_fall_along_phi(index, phi, step):
    low, high = (ts.cost(ts.scale(SOME[index], ts.compound(p)), batch=2) for p in (phi, phi + step))
    assert low.params <= high.params
    assert low.macs <= high.macs
    assert low.activations <= high.activations
    assert low.memory.inference <= high.memory.inference
    assert low.memory.training() <= high.memory.training()


@pytest.mark.parametrize("axis", ["depth", "width", "resolution"])
@settings(max_examples=60, deadline=None, derandomize=True)
@given(a=st.floats(0.1, 4), b=st.floats(0.1, 4))
def test_costs_never_fall_along_one_axis(axis, a, b):
    low, high = (ts.cost(ts.scale(B0, **{axis: x})) for x in sorted((a, b)))
    assert low.macs <= high.macs
    assert low.params <= high.params


@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf, "2", None])
@pytest.mark.parametrize("axis", ["depth", "width", "resolution"])
def test_a_factor_that_is_none_is_refused(axis, value):
    with pytest.raises(ScalingError, match=axis):
        ts.scale(B0, **{axis: value})


@pytest.mark.parametrize("phi", [math.nan, math.inf, 101, -101])
def test_a_phi_that_is_none_is_refused(phi):
    with pytest.raises(ScalingError, match="phi"):
        ts.compound(phi)


@pytest.mark.parametrize(("wrong", "named"), [({"alpha": 0.9}, "alpha"), ({"beta": math.nan}, "beta"), ({"gamma": -1}, "gamma")])
def test_coefficients_below_one_are_refused(wrong, named):
    with pytest.raises(ScalingError, match=named):
        ts.compound(1, **wrong)


def test_two_ways_at_once_are_refused():
    with pytest.raises(ScalingError, match="not both"):
        ts.scale(B0, ts.compound(1), depth=2)


def strides(arch):
    return [arch.stem.stride, 2 if arch.stem.pool else 1, *(s.stride for s in arch.stages)]


def last_map(arch):
    size = arch.resolution
    for stride in strides(arch):
        size = math.ceil(size / stride)
    return size


@pytest.mark.parametrize(
    ("name", "resolution", "expected"),
    [
        ("efficientnet_b0", 224, [2, 1, 1, 2, 2, 2, 1, 2, 1]),  # 7 is enough: unchanged
        ("efficientnet_b0", 128, [2, 1, 1, 2, 2, 2, 1, 2, 1]),  # 4 is just enough
        ("efficientnet_b0", 64, [1, 1, 1, 2, 2, 2, 1, 2, 1]),
        ("efficientnet_b0", 32, [1, 1, 1, 1, 2, 2, 1, 2, 1]),
        ("efficientnet_b0", 8, [1, 1, 1, 1, 1, 1, 1, 2, 1]),
        ("efficientnet_b0", 4, [1, 1, 1, 1, 1, 1, 1, 1, 1]),
        ("resnet50", 32, [1, 1, 1, 2, 2, 2]),
        ("resnet50", 16, [1, 1, 1, 1, 2, 2]),
    ],
)
def test_fit_input_takes_out_the_first_strides(name, resolution, expected):
    fitted = ts.fit_input(ts.arch(name), resolution)
    assert strides(fitted) == expected
    assert fitted.resolution == resolution
    assert last_map(fitted) == 4 or resolution == 224


def test_fit_input_keeps_the_rest():
    fitted = ts.fit_input(B0, 32)
    assert channels(fitted) == channels(B0)
    assert layers(fitted) == layers(B0)
    assert fitted.numerics == B0.numerics
    assert ts.fit_input(ts.arch("resnet50"), 32).stem == ts.Stem(64, 3, 1, pool=False, scale="at_most")
    assert ts.fit_input(B0, 224) == B0


@FEW
@given(st.sampled_from(SOME), st.integers(1, 400), st.integers(1, 16))
def test_fit_input_reaches_the_map_or_takes_out_every_stride(arch, resolution, smallest):
    fitted = ts.fit_input(arch, resolution, smallest)
    assert last_map(fitted) >= smallest or set(strides(fitted)) == {1}
    assert math.prod(strides(fitted)) <= math.prod(strides(arch))


@pytest.mark.parametrize("wrong", [(0, 4), (32, 0), (-3, 4)])
def test_fit_input_refuses_sizes_below_one(wrong):
    with pytest.raises(ScalingError):
        ts.fit_input(B0, *wrong)


def test_a_stem_at_most_its_own_width_narrows_and_never_widens():
    assert ts.scale(ts.arch("resnet50"), width=2).stem.channels == 64
    assert ts.scale(ts.arch("resnet50"), width=0.5).stem.channels == 32
