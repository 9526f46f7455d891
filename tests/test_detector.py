"""Detectors as data: what they are made of, scale to and cost, and what is refused."""

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import triscale as ts
from triscale.architecture import ArchError
from triscale.cli import main
from triscale.detector import Anchors, BoxHead, DetectorArch, Pyramid, detector_cost, retinanet, scale_detector
from triscale.detector_budget import DetectorWorkload, fit_detector
from triscale.detector_memory import detector_memory
from triscale.quantities import size
from triscale.scaling import Scaling, compound

B3 = retinanet("efficientnet_b3")


def test_the_reference_configuration():
    """mmdetection's retinanet_effb3_fpn_crop896_8x4_1x_coco, as its file has it."""
    assert B3.name == "retinanet_efficientnet_b3_fpn"
    assert B3.backbone.resolution == 896
    assert B3.laterals == ((8, 48), (16, 136), (32, 384))
    assert B3.pyramid.strides == (8, 16, 32, 64, 128)
    assert (B3.anchors.scale, B3.anchors.each) == (4.0, 9)


def test_costs_by_hand_and_as_published_for_512_px():
    """One level of a small detector counted on paper; B0 at 512 px with 91 classes is 41.7 G multiply-adds."""
    assert detector_cost(retinanet("efficientnet_b0", 512), 91).macs == 41_713_803_776
    small = DetectorArch(ts.arch("efficientnet_b0"), Pyramid(8, 5, 5, norm=False), BoxHead(1, 8), Anchors(octaves=1, ratios=(1.0,)))
    parts = {p.name: p for p in detector_cost(small, 3, 64).parts}  # one map of 2 x 2 places, 320 channels deep
    assert parts["lateral, stride 32"][1:] == (320 * 8 + 8, 320 * 8 * 4, 8 * 4)
    assert parts["pyramid, stride 32"][1:] == (8 * 8 * 9 + 8, 8 * 8 * 9 * 4, 8 * 4)
    assert parts["classes, convolution 1"][1:] == (8 * 8 * 9 + 16, 8 * 8 * 9 * 4, 8 * 4)
    assert parts["classes, output"][1:] == (8 * 3 * 9 + 3, 8 * 3 * 9 * 4, 3 * 4)
    assert parts["boxes, output"][1:] == (8 * 4 * 9 + 4, 8 * 4 * 9 * 4, 4 * 4)
    trunk = ts.cost(small.trunk, 0, resolution=64)
    assert parts["backbone"][1:] == (trunk.params, trunk.macs, trunk.activations)
    assert detector_cost(small, 3, 64).params == sum(p.params for p in parts.values())


@pytest.fixture
def here(tmp_path, monkeypatch, capsys):
    """`here(*arguments)`: the command in a folder of its own; (status, output, errors)."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        with pytest.raises(SystemExit) as status:
            main([str(a) for a in arguments])
        return status.value.code, *capsys.readouterr()

    return call


def test_show_tells_the_detectors_cost(here):
    status, out, _ = here("show", "retinanet_efficientnet_b3_fpn")
    assert status == 0
    assert "retinanet_efficientnet_b3_fpn: 896 px, 80 classes" in out
    assert "efficientnet_b3; pyramid of 256 channels at strides 8, 16, 32, 64, 128; towers of 4 x 256; 9 anchors a place" in out
    assert ["total", "19,977,756", "133,089,096,000"] in [line.split() for line in out.splitlines()]
    assert "4 images" not in out


def test_show_tells_the_memory_of_one_image_and_of_a_batch(here):
    _, out, _ = here("show", "retinanet_efficientnet_b0_fpn", "--classes", 3, "--batch", 4)
    one, four = (detector_memory(retinanet("efficientnet_b0"), 3, n) for n in (1, 4))
    lines = {line[:43].strip(): line[43:].split() for line in out.split("Peak memory")[1].splitlines()}
    for row, pick in (
        ("inference, in all", lambda m: m.inference),
        ("training step, beside weights and images", lambda m: m.training_peak),
        ("training step with SGD's momentum, in all", lambda m: m.training(1)),
    ):
        assert lines[row] == [*size(pick(one)).split(), *size(pick(four)).split()]


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ("retinanet_efficientnet_b33_fpn", "retinanet_efficientnet_b3_fpn"),
        ("efficientnet_b33", "efficientnet_b3"),
        ("retinanet_resnet_50_fpn", "retinanet_resnet50_fpn"),
        ("mobilenet2", "mobilenet_v2"),
    ],
)
def test_an_unknown_name_gets_the_nearest_of_networks_and_detectors(here, wrong, nearest):
    status, _, errors = here("show", wrong)
    assert status == 2
    assert errors == f"triscale show: unknown network or detector '{wrong}'; nearest is '{nearest}'\n"


def test_a_scaled_detector_is_told_saved_shown_and_scaled_again(here, tmp_path):
    status, out, _ = here("scale", "retinanet_efficientnet_b0_fpn", "--phi", 3, "--save", "d.json")
    before = retinanet("efficientnet_b0")
    after = DetectorArch.from_json((tmp_path / "d.json").read_text())
    assert status == 0
    assert after == scale_detector(before, compound(3))
    assert "px 896 -> 1376, pyramid 256 -> 344, heads 256 -> 344, backbone's layers 16 -> 31" in out
    one, two = detector_cost(before, 80), detector_cost(after, 80)
    total = ["total", f"{one.params:,}", f"{two.params:,}", f"{one.macs:,}", f"{two.macs:,}", f"{two.macs / one.macs:.2f}"]
    assert total in [line.split() for line in out.splitlines()]
    assert here("show", "d.json")[1].startswith("retinanet_efficientnet_b0_fpn phi=3: 1376 px")
    assert DetectorArch.from_json(here("show", "d.json", "--json")[1]) == after
    here("scale", "d.json", "--width", 0.5, "--resolution", 0.25, "--save", "small.json")
    assert DetectorArch.from_json((tmp_path / "small.json").read_text()) == scale_detector(after, Scaling(1, 0.5, 0.25))


def test_a_detector_within_budgets(here):
    _, out, _ = here("scale", "retinanet_efficientnet_b0_fpn", "--macs", "40G", "--memory", "2GB", "--training", "--save", "d.json")
    d = retinanet("efficientnet_b0")
    fit = fit_detector(d, {"macs": 40e9, "memory": 2e9}, workload=DetectorWorkload(training=True))
    assert out.startswith(f"{fit}\n\nretinanet_efficientnet_b0_fpn phi={fit.phi:g}, 80 classes")
    assert fit.binding == ("macs",)
    assert fit.use["macs"] == (detector_cost(fit.arch, 80).macs, 40e9)
    assert fit.use["memory"] == (detector_memory(fit.arch, 80).training(1), 2e9)
    assert fit.arch == scale_detector(d, compound(fit.phi))
    assert detector_cost(scale_detector(d, compound(fit.phi + 0.001)), 80).macs > 40e9 >= fit.use["macs"][0]
    for budgets in ({"params": 5e6}, {"macs": 1e12}, {"memory": 3e8}):
        (name,) = budgets
        fit = fit_detector(d, budgets)
        assert fit.binding == (name,)
        assert 0.9 * budgets[name] < fit.use[name][0] <= budgets[name]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("scale", "retinanet_efficientnet_b0_fpn"), "give one of: --phi"),
        (("scale", "retinanet_efficientnet_b0_fpn", "--latency", "3ms"), "--latency: of networks only"),
        (("scale", "retinanet_efficientnet_b0_fpn", "--macs", "3"), "even the smallest detector of this family doesn't fit: macs"),
        (("scale", "retinanet_efficientnet_b0_fpn", "--macs", "1e30"), "the budget allows phi 20 and more"),
        (("show", "retinanet_efficientnet_b0_fpn", "--classes", "0"), "expected num_classes >= 1"),
        (("show", "retinanet_efficientnet_b0_fpn", "--batch", "0"), "expected batch >= 1"),
        (("show", "broken.json"), "broken.json: not a detector file"),
        (("bench", "d.json"), "d.json: a detector; expected a network"),
    ],
)
def test_what_no_command_takes_is_one_line(here, tmp_path, arguments, told):
    (tmp_path / "broken.json").write_text('{"backbone": {}}')
    (tmp_path / "d.json").write_text(B3.to_json())
    status, _, errors = here(*arguments)
    assert status == 2
    assert told in errors
    assert errors.count("\n") == 1


def test_scaling_takes_backbone_input_and_width_together():
    d = retinanet("efficientnet_b0", 512)
    big = scale_detector(d, compound(1))
    assert replace(big.backbone, resolution=588) == ts.scale(d.backbone, ts.compound(1))
    assert big.backbone.resolution == 576  # 512 x 1.15 = 588.8, to a multiple of 32
    assert (big.pyramid.channels, big.head.channels) == (280, 280)  # 256 x 1.1 to a multiple of 8


detectors = st.builds(
    DetectorArch,
    st.builds(
        lambda name, px: replace(ts.arch(name), resolution=px),
        st.sampled_from(("efficientnet_b0", "resnet18", "mobilenet_v2")),
        st.integers(32, 1024),
    ),
    st.builds(
        Pyramid,
        st.integers(1, 32).map(lambda n: 8 * n),
        st.integers(3, 5),
        st.integers(5, 8),
        st.sampled_from(("backbone", "pyramid")),
        st.booleans(),
    ),
    st.builds(BoxHead, st.integers(0, 4), st.integers(1, 32).map(lambda n: 8 * n), st.booleans()),
)


@settings(max_examples=40, deadline=None)
@given(detectors, st.lists(st.floats(-4, 4), min_size=2, max_size=4))
def test_cost_and_memory_grow_with_phi_and_maps_halve(d, phis):
    """From any input size; from channels that are whole multiples, which others become as soon as they are scaled."""
    assert scale_detector(d, compound(0)) == d
    costs = []
    for phi in sorted(phis):
        scaled = scale_detector(d, compound(phi))
        assert DetectorArch.from_json(scaled.to_json()) == scaled
        if compound(phi).resolution != 1:
            assert scaled.backbone.resolution % 32 == 0
        memory = detector_memory(scaled, 3, boxes=4)
        costs.append((detector_cost(scaled, 3).params, detector_cost(scaled, 3).macs, memory.inference, memory.training_peak))
    for low, high in pairwise(costs):
        assert all(a <= b for a, b in zip(low, high, strict=True))


def test_round_trip_and_what_is_refused():
    assert DetectorArch.from_json(B3.to_json()) == B3
    for change, why in (
        (lambda: replace(B3, pyramid=Pyramid(first=6)), "Pyramid.first: expected a whole number from 2 to 5"),
        (lambda: replace(B3, head=BoxHead(prior=0.7)), "BoxHead.prior"),
        (lambda: replace(B3, anchors=Anchors(ratios=())), "Anchors.ratios"),
        (lambda: DetectorArch(ts.fit_input(ts.arch("efficientnet_b0"), 32)), r"expected maps at strides 16, 32, found those at 1, 2, 4, 8"),
        (lambda: DetectorArch.from_json("{}"), "format"),
        (lambda: DetectorArch.from_json("x"), "no JSON"),
        (lambda: DetectorArch.from_json(B3.to_json().replace('"octaves"', '"octavse"')), r"anchors: unknown field 'octavse'; nearest is 'octaves'"),
        (lambda: detector_cost(B3, 0), "num_classes >= 1"),
    ):
        with pytest.raises((ArchError, ValueError), match=why):
            change()
