"""The detector's parts against examples computed by hand, the whole against torchvision's on the same weights."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import error, images, randomise
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.detection import retinanet_resnet50_fpn
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou

from triscale.architecture import ArchError
from triscale.detect.anchors import cached_anchors, make_anchors
from triscale.detect.boxes import BACKGROUND, IGNORED, assign, decode, encode, select
from triscale.detect.losses import Target, detection_losses
from triscale.detect.mmdetection import load_mmdet, mmdet_names, to_mmdet
from triscale.detect.retinanet import Outputs, build_detector
from triscale.detect.rules import MMDETECTION, TORCHVISION, Rules
from triscale.detector import Anchors, BoxHead, DetectorArch, Pyramid, detector_cost, retinanet
from triscale.families import arch as named
from triscale.families import names as arch_names
from triscale.weights.dialects import WeightsError, dialect_of
from triscale.weights.dialects import names as dialect_names

CPU = torch.device("cpu")


def tensor(*rows):
    return torch.tensor(rows, dtype=torch.float32).reshape(-1, 4)


def small(backbone="efficientnet_b0", channels=16, convs=1, **pyramid):
    return DetectorArch(named(backbone), Pyramid(channels, **pyramid), BoxHead(convs, channels))


def alive(arch, classes=3, **kwargs):
    """A small detector whose scores spread over (0, 1)."""
    torch.manual_seed(0)
    net = build_detector(arch, classes, **kwargs)
    torch.nn.init.normal_(net.head.classes.output.weight, std=0.2)
    torch.nn.init.constant_(net.head.classes.output.bias, -2.0)
    return net


def test_anchors_of_a_2x2_map_by_hand():
    arch = Anchors(scale=4, octaves=2, ratios=(1.0, 4.0))
    (got,) = make_anchors(arch, (8,), ((2, 2),), (16, 16), CPU)
    # Base side 32; the second octave's 32 sqrt(2). Ratio 4 halves the width and doubles the height. Half sides:
    a, b = 16.0, 16 * math.sqrt(2)
    cell = tensor((-a, -a, a, a), (-b, -b, b, b), (-a / 2, -2 * a, a / 2, 2 * a), (-b / 2, -2 * b, b / 2, 2 * b))
    places = tensor((0, 0, 0, 0), (8, 0, 8, 0), (0, 8, 0, 8), (8, 8, 8, 8))  # x first
    assert torch.allclose(got, torch.cat([cell + place for place in places]), atol=1e-5)


def test_rounded_anchors_are_torchvisions_and_named_differences_are_all():
    strides, maps, size = (8, 16, 32, 64, 128), ((12, 20), (6, 10), (3, 5), (2, 3), (1, 2)), (96, 160)
    sizes = tuple((x, int(x * 2 ** (1 / 3)), int(x * 2 ** (2 / 3))) for x in (32, 64, 128, 256, 512))
    theirs = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 5)(ImageList(torch.zeros(1, 3, *size), [size]), [torch.zeros(1, 1, *m) for m in maps])[0]
    ours = make_anchors(Anchors(rounded=True), strides, maps, size, CPU)
    assert torch.equal(torch.cat(ours), theirs)
    exact = make_anchors(Anchors(), strides, maps, size, CPU)
    assert (torch.cat(ours[:3]) - torch.cat(exact[:3])).abs().max() < 2  # whole pixels: the size's cut and the corner's rounding
    assert ours[3][9:18].mean(0).tolist() == [
        pytest.approx(v, abs=1) for v in exact[3][9:18].mean(0) - torch.tensor([11.0, 0, 11, 0])
    ]  # 160 // 3 = 53


def test_cached_anchors_serve_training_after_inference():
    arguments = (Anchors(scale=3), (8,), ((2, 2),), (16, 16), CPU)
    with torch.inference_mode():
        first = cached_anchors(*arguments)
    assert cached_anchors(*arguments) is first
    assert not first[0].is_inference()


def test_deltas_by_hand():
    anchor, box = tensor((0, 0, 10, 20)), tensor((5, 0, 25, 10))
    # Centres (5, 10) and (15, 5), sizes 10 x 20 and 20 x 10.
    expected = tensor((1, -0.25, math.log(2), -math.log(2)))
    assert torch.allclose(encode(box, anchor), expected)
    assert torch.allclose(decode(expected, anchor), box, atol=1e-5)


def test_size_bounds_and_where_torchvision_has_none():
    anchor, deltas = tensor((-500, -500, 500, 500)), tensor((0, 0, 9, -9))
    assert torch.allclose(decode(deltas, anchor), tensor((-31250, -8, 31250, 8)), rtol=1e-5)  # x 1000/16, x 16/1000
    unbound = decode(deltas, anchor, shrink_bound=False)
    assert torch.allclose(unbound, BoxCoder((1.0, 1.0, 1.0, 1.0)).decode_single(deltas, anchor), rtol=1e-5)
    assert unbound[0, 3] == pytest.approx(500 * math.exp(-9), rel=1e-4)


corner, side = st.floats(-1000, 1000, width=32), st.floats(1, 500, width=32)
a_box = st.tuples(corner, corner, side, side).map(lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3]))


@settings(max_examples=50, deadline=None)
@given(a_box, a_box)
def test_decoding_undoes_encoding_within_the_bound(box, anchor):
    box, anchor = tensor(box), tensor(anchor)
    deltas = encode(box, anchor)
    if deltas[0, 2:].abs().max() < math.log(1000 / 16):
        assert torch.allclose(decode(deltas, anchor), box, atol=0.02)


def mmdetections_loop(anchors, boxes, positive=0.5, negative=0.5):
    """MaxIoUAssigner as it is written, box by box; 0 is background there."""
    overlaps = box_iou(boxes, anchors)
    out = [-1] * len(anchors)
    for j in range(len(anchors)):
        best = overlaps[:, j].max()
        out[j] = 0 if best < negative else int(overlaps[:, j].argmax()) + 1 if best >= positive else -1
    for i in range(len(boxes)):
        for j in range(len(anchors)):
            if overlaps[i, j] == overlaps[i].max() > 0:
                out[j] = i + 1
    return [{0: BACKGROUND, -1: IGNORED}.get(v, v - 1) for v in out]


def test_assignment_by_hand():
    anchors = tensor((0, 0, 10, 10), (0, 10, 10, 20), (100, 100, 110, 110))
    # Box 0 covers 9 of 10 columns of anchor 0: IoU 0.9. Box 1 has half of anchors 0 and 1, 1/3 each: a tie below 0.5 that takes both.
    boxes = tensor((0, 0, 9, 10), (0, 5, 10, 15))
    assert box_iou(boxes, anchors)[:, :2].tolist() == [[pytest.approx(0.9), 0], [pytest.approx(1 / 3), pytest.approx(1 / 3)]]
    assert assign(anchors, boxes, MMDETECTION).tolist() == [1, 1, BACKGROUND]  # the later box takes anchor 0, though box 0 has more of it
    assert assign(anchors, boxes, TORCHVISION).tolist() == [0, 1, BACKGROUND]
    assert assign(anchors, boxes.flip(0), MMDETECTION).tolist() == [1, 0, BACKGROUND]
    assert assign(anchors, boxes[:0], MMDETECTION).tolist() == [BACKGROUND] * 3


def test_an_anchor_between_the_bounds_learns_nothing():
    anchors, boxes = tensor((0, 0, 10, 10), (0, 0, 10, 4.5)), tensor((0, 0, 10, 10))
    assert assign(anchors, boxes, MMDETECTION).tolist() == [0, BACKGROUND]  # IoU 0.45
    assert assign(anchors, boxes, TORCHVISION).tolist() == [0, IGNORED]
    assert assign(anchors, boxes, Rules(negative=0.45)).tolist() == [0, IGNORED]  # at the bound


def test_a_box_off_every_anchor_gets_none():
    anchors, boxes = tensor((0, 0, 10, 10), (20, 20, 30, 30)), tensor((50, 50, 60, 60), (0, 0, 10, 10))
    for rules in (MMDETECTION, TORCHVISION):
        assert assign(anchors, boxes, rules).tolist() == [1, BACKGROUND]


whole_box = st.tuples(*[st.integers(0, 6)] * 2, *[st.integers(1, 4)] * 2).map(lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3]))


@settings(max_examples=60, deadline=None)
@given(st.lists(whole_box, min_size=1, max_size=12), st.lists(whole_box, min_size=1, max_size=5))
def test_assignment_is_mmdetections_loop_and_torchvisions_matcher(anchors, boxes):
    """Small whole boxes: ties are the rule."""
    anchors, boxes = tensor(*anchors), tensor(*boxes)
    assert assign(anchors, boxes, MMDETECTION).tolist() == mmdetections_loop(anchors, boxes)
    overlap = box_iou(boxes, anchors)
    if (overlap.amax(1) > 0).all():  # else torchvision's and ours differ, as the test above says
        assert torch.equal(assign(anchors, boxes, TORCHVISION), Matcher(0.5, 0.4, allow_low_quality_matches=True)(overlap))


def test_losses_by_hand():
    """Two images, two anchors, two classes, all logits 0: p = 1/2, cross entropy log 2, modulated by (1/2)^2."""
    anchors = tensor((0, 0, 10, 10), (100, 100, 110, 110))
    logits, deltas = torch.zeros(2, 2, 2), torch.zeros(2, 2, 4)
    both = Target(tensor((5, 0, 15, 10), (100, 100, 110, 110)), torch.tensor([1, 0]))
    none = Target(tensor(), torch.tensor([], dtype=torch.int64))
    negative = 0.75 * 0.25 * math.log(2)
    positive = 0.25 * 0.25 * math.log(2)
    sums = [2 * negative + 2 * positive, 4 * negative]  # of each image's four logits
    # Box 0, shifted by half the anchor, has IoU 1/3 and is its best; dx = 0.5 and the others 0. Box 1 lies on its anchor.
    got = detection_losses(logits, deltas, anchors, [both, none], MMDETECTION)
    assert got.classes.item() == pytest.approx(sum(sums) / (2 + 1))  # the image without boxes counts 1
    assert got.boxes.item() == pytest.approx(0.5 / 3)
    got = detection_losses(logits, deltas, anchors, [both, none], replace(MMDETECTION, normaliser="image"))
    assert got.classes.item() == pytest.approx((sums[0] / 2 + sums[1] / 1) / 2)
    assert got.boxes.item() == pytest.approx((0.5 / 2 + 0) / 2)


def test_what_lies_between_the_bounds_adds_no_loss():
    anchors = tensor((0, 0, 10, 10), (0, 0, 10, 4.5))
    target = [Target(tensor((0, 0, 10, 10)), torch.tensor([0]))]
    logits = torch.tensor([[[0.0], [50.0]]])  # the second anchor is sure of what it must not say
    for rules, extra in ((MMDETECTION, 0.75 * 50), (TORCHVISION, 0)):
        got = detection_losses(logits, torch.zeros(1, 2, 4), anchors, target, rules)
        assert got.classes.item() == pytest.approx(0.0625 * math.log(2) + extra)


def test_an_image_without_boxes_trains_every_parameter():
    net = alive(small())
    outputs = net(images(2, (64, 64), seed=0))
    losses = net.losses(outputs, [Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))] * 2)
    sum(losses).backward()
    assert losses.boxes.item() == 0
    assert losses.classes.item() > 0
    assert all(p.grad is not None for p in net.parameters())  # distributed training waits for each


@pytest.mark.parametrize(
    ("targets", "told"),
    [
        ([], "a target for each of 1 images, found 0"),
        ([Target(torch.ones(2, 4), torch.zeros(1, dtype=torch.int64))], r"found \(2, 4\) and \(1,\)"),
        ([Target(tensor((0, 0, 1, 1)), torch.tensor([3]))], "labels from 0 to 2 for image 0, found 3"),
    ],
)
def test_bad_targets_are_told(targets, told):
    with pytest.raises(ValueError, match=told):
        detection_losses(torch.zeros(1, 1, 3), torch.zeros(1, 1, 4), tensor((0, 0, 1, 1)), targets, MMDETECTION)


def test_selection_by_hand():
    """Level 1: a good box, its double of the same class (IoU 0.8), of the other class, a weak one. Level 2: one cut away, one cut."""
    fine = tensor((0, 0, 10, 10), (0, 0, 10, 8), (50, 50, 60, 60), (0, 0, 10, 10))
    coarse = tensor((200, 0, 220, 10), (90, 90, 120, 120))
    fine_logits = torch.tensor([[0.9, 0.01], [0.8, 0.7], [0.04, 0.01], [0.02, 0.02]]).logit()
    coarse_logits = torch.tensor([[0.95, 0.01], [0.01, 0.6]]).logit()
    levels = [(fine_logits, torch.zeros(4, 4), fine), (coarse_logits, torch.zeros(2, 4), coarse)]
    got = select(levels, (100, 110), Rules())
    assert got.scores.tolist() == [pytest.approx(v) for v in (0.9, 0.7, 0.6)]
    assert got.labels.tolist() == [0, 1, 1]
    assert torch.equal(got.boxes, tensor((0, 0, 10, 10), (0, 0, 10, 8), (90, 90, 110, 100)))
    kept = select(levels, (100, 110), Rules(keep_empty=True))
    assert kept.boxes[0].tolist() == [110, 0, 110, 10]
    assert len(kept.boxes) == 4
    assert select(levels, (100, 110), Rules(candidates=1)).scores.tolist() == [pytest.approx(0.9)]  # one a level; the coarse one has no area
    assert len(select(levels, (100, 110), Rules(max_boxes=2)).boxes) == 2
    assert len(select(levels, (100, 110), Rules(nms_iou=0.85)).boxes) == 4
    assert len(select(levels, (100, 110), Rules(min_score=0.96)).boxes) == 0
    assert select(levels, (100, 110), Rules(min_score=0.7001)).scores.tolist() == [pytest.approx(0.9)]
    assert len(select(levels, (100, 110), Rules(min_score=0.6999)).boxes) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bound", [0.0, 0.001, 0.05, 0.5, 0.999, 1.0])
def test_the_score_bound_is_exact(bound, dtype):
    logits = torch.linspace(-12, 12, 3001).to(dtype)[:, None]
    boxes = torch.arange(3001.0)[:, None] + torch.tensor([0, 0, 1, 1])
    got = select([(logits, torch.zeros(3001, 4), boxes)], (4000, 4000), Rules(min_score=bound, candidates=9999, max_boxes=9999))
    assert len(got.scores) == (logits.float().sigmoid() > bound).sum()


@pytest.mark.parametrize("change", [{"negative": 0.6}, {"candidates": 0}, {"low_quality": "all"}, {"normaliser": "sum"}, {"min_score": 2}])
def test_rules_that_are_none_are_told(change):
    with pytest.raises(ValueError, match=f"Rules.{next(iter(change))}: expected"):
        Rules(**change)


def theirs_and_ours(classes):
    torch.manual_seed(0)
    theirs = retinanet_resnet50_fpn(weights=None, weights_backbone=None, num_classes=classes, image_mean=[0] * 3, image_std=[1] * 3)
    theirs.transform.resize = lambda image, target: (image, target)
    randomise(theirs.backbone, images(2, (96, 160), seed=0))
    torch.nn.init.normal_(theirs.head.classification_head.cls_logits.weight, std=0.05)
    torch.nn.init.constant_(theirs.head.classification_head.cls_logits.bias, -3.0)
    torch.nn.init.normal_(theirs.head.regression_head.bbox_reg.weight, std=0.05)
    arch = DetectorArch(named("resnet50"), Pyramid(extra="pyramid", norm=False), BoxHead(norm=False), Anchors(rounded=True))
    ours = build_detector(arch, classes, rules=TORCHVISION)
    state, own = theirs.state_dict(), ours.state_dict()
    trunk = arch.trunk
    keys = [k.removeprefix("backbone.") for k in own if k.startswith("backbone.")]
    table = {f"backbone.{k}": f"backbone.body.{v}" for k, v in dialect_names(trunk, dialect_of("torchvision", trunk), keys).items()}
    for leaf in ("weight", "bias"):
        for i in range(3):
            table[f"pyramid.laterals.{i}.{leaf}"] = f"backbone.fpn.inner_blocks.{i}.0.{leaf}"
            table[f"pyramid.outputs.{i}.{leaf}"] = f"backbone.fpn.layer_blocks.{i}.0.{leaf}"
        for i in (3, 4):
            table[f"pyramid.outputs.{i}.{leaf}"] = f"backbone.fpn.extra_blocks.p{i + 3}.{leaf}"
        for tower, head, last in (("classes", "classification", "cls_logits"), ("boxes", "regression", "bbox_reg")):
            table |= {f"head.{tower}.convs.{j}.{leaf}": f"head.{head}_head.conv.{j}.0.{leaf}" for j in range(4)}
            table[f"head.{tower}.output.{leaf}"] = f"head.{head}_head.{last}.{leaf}"
    assert set(table.values()) == {k for k in state if not k.endswith("num_batches_tracked")}
    ours.load_state_dict({key: state[name] for key, name in table.items()})
    return theirs, ours


def test_torchvisions_retinanet_equals_ours_on_the_same_weights():
    classes, sizes = 4, [(96, 160), (80, 144)]  # 96 and 160 are no multiples of 64 and 128: torchvision's own steps
    theirs, ours = theirs_and_ours(classes)
    pictures = images(2, sizes[0], seed=3)
    pictures[1, :, 80:] = pictures[1, :, :, 144:] = 0  # padded as torchvision pads
    single = [pictures[0], pictures[1, :, :80, :144]]
    with torch.no_grad():
        features = list(theirs.eval().backbone(pictures).values())
        expected = theirs.head(features)
        outputs = ours.eval()(pictures)
        logits, deltas = (torch.cat(part, 1) for part in ours.flat(outputs))
        assert expected["cls_logits"].std() > 0.1
        assert expected["bbox_regression"].std() > 0.1
        assert error(logits, expected["cls_logits"]) < 1e-4
        assert error(deltas, expected["bbox_regression"]) < 1e-4
        before = theirs(single)
        found = ours.detect(outputs, sizes)
    for got, want in zip(found, before, strict=True):
        assert len(got.boxes) == len(want["boxes"]) > 50
        assert torch.equal(got.labels, want["labels"])
        assert error(got.scores, want["scores"]) < 1e-4
        assert error(got.boxes, want["boxes"]) < 1e-4
    boxes = [tensor((10, 10, 50, 60), (60, 5, 150, 90), (12, 8, 52, 61)), tensor((0, 0, 30, 30))]
    labels = [torch.tensor([0, 3, 1]), torch.tensor([2])]
    for training in (False, True):
        ours.train(training)
        theirs.train()
        for norm in (m for m in theirs.modules() if isinstance(m, torch.nn.BatchNorm2d)):
            norm.train(training)
        want = theirs(single, [{"boxes": b, "labels": k} for b, k in zip(boxes, labels, strict=True)])
        got = ours.losses(ours(pictures), [Target(b, k) for b, k in zip(boxes, labels, strict=True)])
        assert got.classes.item() == pytest.approx(want["classification"].item(), rel=1e-4)
        assert got.boxes.item() == pytest.approx(want["bbox_regression"].item(), rel=1e-4)


@pytest.mark.parametrize(("name", "resolution", "classes", "gmacs"), [("efficientnet_b3", 896, 80, 133.1), ("efficientnet_b0", 512, 91, 41.7)])
def test_parameters_and_macs_are_what_the_cost_says(name, resolution, classes, gmacs):
    arch = retinanet(name, resolution)
    with torch.device("meta"):
        net = build_detector(arch, classes).eval()
        x = torch.empty(1, 3, resolution, resolution)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(x)
    cost = detector_cost(arch, classes)
    assert sum(p.numel() for p in net.parameters()) == cost.params
    assert counter.get_total_flops() == 2 * cost.macs
    assert round(cost.macs / 1e9, 1) == gmacs


def test_every_named_backbone_with_the_strides_builds():
    built = 0
    for name in arch_names():
        try:
            arch = retinanet(name, 256)
        except ArchError:
            continue
        with torch.device("meta"):
            net = build_detector(arch, 2)
        assert sum(p.numel() for p in net.parameters()) == detector_cost(arch, 2).params, name
        built += 1
    assert built >= 20


@pytest.mark.parametrize("extra", ["backbone", "pyramid"])
def test_the_pyramid_by_its_definition(extra):
    """Without norms, on maps of odd sizes: 13x11, 7x6, 4x3."""
    net = build_detector(small(norm=False, extra=extra), 2).pyramid
    maps = [torch.randn(1, c, h, w) for c, h, w in ((40, 13, 11), (112, 7, 6), (320, 4, 3))]

    def conv(module, x, **kwargs):
        return F.conv2d(x, module.weight, module.bias, **kwargs)

    p5 = conv(net.laterals[2], maps[2])
    p4 = conv(net.laterals[1], maps[1]) + p5[:, :, [0, 0, 1, 1, 2, 2, 3]][:, :, :, [0, 0, 1, 1, 2, 2]]
    p3 = conv(net.laterals[0], maps[0]) + p4[:, :, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6]][:, :, :, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5]]
    out = [conv(net.outputs[i], p, padding=1) for i, p in enumerate((p3, p4, p5))]
    out.append(conv(net.outputs[3], maps[2] if extra == "backbone" else out[2], padding=1, stride=2))
    out.append(conv(net.outputs[4], out[3].relu(), padding=1, stride=2))
    got = net(maps)
    assert len(got) == 5
    for level, want in zip(got, out, strict=True):
        assert torch.allclose(level, want, atol=1e-5)


def test_a_level_has_its_own_norms_on_shared_convolutions():
    tower = alive(small(convs=2)).head.boxes.eval()
    x = torch.randn(1, 16, 4, 4)
    assert torch.equal(tower(x, 0), tower(x, 4))
    tower.norms[1][4].weight.data.mul_(2)
    assert torch.allclose(tower(x, 4) - tower.output.bias[:, None, None], 2 * (tower(x, 0) - tower.output.bias[:, None, None]), atol=1e-6)
    tower.convs[0].weight.data.zero_()
    assert torch.equal(tower(x, 2), tower.output.bias[:, None, None].expand(1, -1, 4, 4))


def test_initial_values():
    torch.manual_seed(0)
    net = build_detector(DetectorArch(named("efficientnet_b0")), 5)
    assert torch.allclose(net.head.classes.output.bias.sigmoid(), torch.tensor(0.01))
    for conv in (*net.head.classes.convs, *net.head.boxes.convs, net.head.classes.output, net.head.boxes.output):
        assert conv.weight.std().item() == pytest.approx(0.01, rel=0.02)
    for conv in (net.pyramid.laterals[0], net.pyramid.outputs[0].conv):
        receptive = conv.kernel_size[0] ** 2
        bound = math.sqrt(6 / (receptive * (conv.in_channels + conv.out_channels)))
        assert 0.98 * bound < conv.weight.abs().max() <= bound
    norms = [m for part in (net.pyramid, net.head) for m in part.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert {(m.eps, m.momentum) for m in norms} == {(1e-5, 0.1)}
    assert len(norms) == 5 + 2 * 4 * 5
    assert net.backbone.stem.norm.eps == 1e-3


def test_odd_sizes_and_maps_that_round_up():
    net = alive(small()).eval()
    with torch.no_grad():
        outputs = net(images(1, (75, 131), seed=1))
    assert [tuple(x.shape[1:]) for x in outputs.logits] == [(27, h, w) for h, w in ((10, 17), (5, 9), (3, 5), (2, 3), (1, 2))]
    assert [x.shape[1] for x in outputs.deltas] == [36] * 5
    (found,) = net.detect(outputs)
    assert len(found.boxes) == 100
    assert (found.boxes >= 0).all()
    assert (found.boxes <= torch.tensor([131.0, 75, 131, 75])).all()
    assert (found.scores.diff() <= 0).all()


def test_the_order_of_channels_is_anchors_then_classes():
    """One logit set high: the box at its place, of its anchor and class, comes first."""
    net = build_detector(small(), 3)
    maps = [(4, 5), (2, 3), (1, 2), (1, 1), (1, 1)]
    outputs = Outputs(tuple(torch.full((1, 27, *m), -9.0) for m in maps), tuple(torch.zeros(1, 36, *m) for m in maps), (32, 40))
    outputs.logits[0][0, 4 * 3 + 2, 2, 3] = 3.0  # anchor 4 (ratio 1, second octave), class 2, row 2, column 3
    (found,) = net.detect(outputs)
    half = 16 * 2 ** (1 / 3)
    assert found.labels.tolist() == [2]
    expected = tensor((24 - half, 16 - half, 24 + half, 16 + half)).clamp(min=0)
    assert torch.allclose(found.boxes, torch.minimum(expected, torch.tensor([40.0, 32, 40, 32])), atol=1e-4)


def test_bf16_and_channels_last():
    arch = small()
    net, x = alive(arch).eval(), images(2, (96, 128), seed=2)
    with torch.no_grad():
        plain = net(x)
        last = net.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
        for a, b in zip(plain.logits + plain.deltas, last.logits + last.deltas, strict=True):
            assert torch.allclose(a, b, atol=1e-4)
        with torch.autocast("cpu", torch.bfloat16):
            half = net(x)
            found = net.detect(half)
    assert half.logits[0].dtype == torch.bfloat16
    assert error(half.logits[0].float(), plain.logits[0]) < 0.1
    assert found[0].boxes.dtype == torch.float32
    target = [Target(tensor((10, 10, 60, 60)), torch.tensor([1]))] * 2
    got, want = net.losses(half, target), net.losses(plain, target)
    assert got.classes.dtype == torch.float32
    assert got.classes.item() == pytest.approx(want.classes.item(), rel=0.05)


def test_a_detector_learns_two_boxes():
    """Everything together: encoded and decoded, assigned and suppressed. A picture and its mirror image, for the batch norms."""
    net = alive(small("mobilenet_v2", channels=32))
    torch.nn.init.constant_(net.head.classes.output.bias, -4.6)
    picture = torch.zeros(1, 3, 96, 96)
    picture[:, 0, 10:50, 10:50] = 2
    picture[:, 1, 40:90, 60:90] = 2
    pictures, labels = torch.cat((picture, picture.flip(3))), torch.tensor([0, 2])
    targets = [Target(tensor((10, 10, 50, 50), (60, 40, 90, 90)), labels), Target(tensor((46, 10, 86, 50), (6, 40, 36, 90)), labels)]
    optimiser = torch.optim.Adam(net.parameters(), 2e-3)
    for _ in range(60):
        outputs = net(pictures)
        optimiser.zero_grad()
        sum(net.losses(outputs, targets)).backward()
        optimiser.step()
    for found, target in zip(net.detect(outputs), targets, strict=True):
        best = torch.stack([found.boxes[found.labels == k][0] for k in (0, 2)])
        assert box_iou(best, target.boxes).diag().min() > 0.8


def test_mmdetections_names():
    arch = retinanet("efficientnet_b3")
    table = mmdet_names(arch)
    theirs = [name for names in table.values() for name in names]
    assert len(theirs) == len(set(theirs))
    with torch.device("meta"):
        assert table.keys() == build_detector(arch, 80).state_dict().keys()
    assert table["backbone.stem.conv.weight"] == ("backbone.layers.0.conv.weight",)
    assert table["backbone.body.6.1.project.norm.bias"] == ("backbone.layers.5.7.linear_conv.bn.bias",)  # B3: stages 6 and 7 are layers.5, 6 + 2
    assert not any(name.startswith("backbone.layers.6") for name in theirs)
    assert table["pyramid.laterals.2.bias"] == ("neck.lateral_convs.2.conv.bias",)
    assert table["pyramid.outputs.4.norm.running_var"] == ("neck.fpn_convs.4.bn.running_var",)
    assert table["head.classes.convs.3.weight"] == tuple(f"bbox_head.cls_convs.{level}.3.conv.weight" for level in range(5))
    assert table["head.boxes.norms.1.4.bias"] == ("bbox_head.reg_convs.4.1.bn.bias",)
    assert table["head.boxes.output.weight"] == ("bbox_head.retina_reg.weight",)
    plain = mmdet_names(DetectorArch(named("resnet50"), Pyramid(norm=False), BoxHead(norm=False)))
    assert plain["pyramid.outputs.3.bias"] == ("neck.fpn_convs.3.conv.bias",)
    assert plain["head.classes.convs.0.bias"] == ("bbox_head.cls_convs.0.conv.bias",)


def counted(state):
    """As mmdetection's own state has it: a counter beside each norm."""
    return state | {k.removesuffix("running_var") + "num_batches_tracked": torch.tensor(7) for k in state if k.endswith("running_var")}


def test_mmdetections_checkpoint_both_ways(tmp_path):
    arch = small(convs=2)
    first, second = alive(arch), build_detector(arch, 3)
    state = to_mmdet(first)
    torch.save({"meta": {"epoch": 12}, "state_dict": counted(state)}, tmp_path / "epoch_12.pth")
    assert load_mmdet(second, tmp_path / "epoch_12.pth") is second
    for (key, a), b in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b), key
    back = to_mmdet(second)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[k], state[k]) for k in state)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda s: s.pop("neck.fpn_convs.3.bn.bias"), "1 missing: neck.fpn_convs.3.bn.bias"),
        (lambda s: s.update({"bbox_head.extra": torch.zeros(1)}), "1 left over: bbox_head.extra"),
        (lambda s: s.update({"bbox_head.retina_cls.bias": torch.zeros(9)}), r"bbox_head.retina_cls.bias \(9,\) instead of \(27,\)"),
        (
            lambda s: s.update({"bbox_head.cls_convs.2.0.conv.weight": torch.zeros(16, 16, 3, 3)}),
            r"cls_convs.2.0.conv.weight differs from .*0.0.conv",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_whole(change, told):
    net = alive(small())
    before = {k: v.clone() for k, v in net.state_dict().items()}
    state = {k: v + 1 for k, v in to_mmdet(net).items()}
    change(state)
    with pytest.raises(WeightsError, match=told):
        load_mmdet(net, state)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize(("arguments", "told"), [((small(), 0), "num_classes >= 1, found 0"), (("efficientnet_b0", 3), "a DetectorArch, found str")])
def test_what_is_no_detector_is_told(arguments, told):
    with pytest.raises(ValueError, match=told):
        build_detector(*arguments)
