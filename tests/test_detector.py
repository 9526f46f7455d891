"""Detectors as data: what they are made of, scale to and cost, and what is refused."""

from dataclasses import replace

import pytest

import triscale as ts
from triscale.architecture import ArchError
from triscale.detector import Anchors, BoxHead, DetectorArch, Pyramid, detector_cost, retinanet, scale_detector
from triscale.scaling import compound

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


def test_show_tells_the_detectors_cost(capsys):
    from triscale.cli import main

    with pytest.raises(SystemExit) as status:
        main(["show", "retinanet_efficientnet_b3_fpn"])
    assert status.value.code == 0
    out = capsys.readouterr().out
    assert "retinanet_efficientnet_b3_fpn: 896 px, 80 classes" in out
    assert out.split()[-2:] == ["19,977,756", "133,089,096,000"]
    with pytest.raises(SystemExit):
        main(["show", "retinanet_efficientnet_b33_fpn"])
    assert "nearest is 'retinanet_efficientnet_b3_fpn'" in capsys.readouterr().err


def test_scaling_takes_backbone_input_and_width_together():
    d = retinanet("efficientnet_b0", 512)
    big = scale_detector(d, compound(1))
    assert big.backbone == ts.scale(d.backbone, ts.compound(1))
    assert (big.pyramid.channels, big.head.channels) == (280, 280)  # 256 x 1.1 to a multiple of 8
    costs = [detector_cost(scale_detector(d, compound(phi)), 91).macs for phi in (-2, -1, 0, 1, 2, 3)]
    assert costs == sorted(costs)
    assert scale_detector(d, compound(0)) == d


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
