"""Detectors from and to mmdetection's checkpoints through files, and Pascal VOC's annotations, by the commands themselves."""

import json
from pathlib import Path

import pytest
import torch
from networks import images
from PIL import Image
from torchvision.models._meta import _COCO_CATEGORIES

from triscale.commands.detect_converting import detect_convert, detect_export
from triscale.detect.coco import read_coco
from triscale.detect.coco_classes import COCO_CLASSES
from triscale.detect.mmdetection import class_names, to_mmdet
from triscale.detect.model_file import DetectorCard, load_detector, save_detector
from triscale.detect.opening import open_detector
from triscale.detect.retinanet import build_detector
from triscale.detector import BoxHead, DetectorArch, Pyramid, retinanet
from triscale.families import arch as named
from triscale.recipe import Preprocess
from triscale.weights.dialects import WeightsError
from triscale.weights.model_file import ModelCard, ModelFileError, save_model

ARCH = DetectorArch(named("mobilenet_v2"), Pyramid(8), BoxHead(1, 8), name="small")
NAMES = ("red cell", "white cell", "platelet")


def net_of(arch=ARCH, classes=3, seed=0):
    """Every value its own, norms' statistics too."""
    torch.manual_seed(seed)
    net = build_detector(arch, classes)
    with torch.no_grad():
        for value in net.state_dict().values():
            value.copy_(torch.rand_like(value) + 0.1 if value.ndim == 1 else value + torch.randn_like(value) * 0.01)
    return net.eval()


def checkpoint(path, net, meta=None, **more):
    torch.save({"meta": meta or {}, "state_dict": to_mmdet(net)} | more, path)
    return str(path)


@pytest.fixture
def arch_file(tmp_path):
    path = tmp_path / "arch.json"
    path.write_text(ARCH.to_json())
    return str(path)


def equal(first, second):
    one, two = first.state_dict(), second.state_dict()
    return one.keys() == two.keys() and all(torch.equal(v, two[k]) for k, v in one.items())


def test_the_whole_reference_goes_to_mmdetection_and_back_bit_for_bit(tmp_path, capsys):
    """retinanet_efficientnet_b3_fpn with COCO's classes: 20 million values written by one command and read by the other."""
    arch = retinanet("efficientnet_b3")
    net = net_of(arch, 80)
    ours, theirs, again = (tmp_path / name for name in ("ours.safetensors", "theirs.pth", "again.safetensors"))
    save_detector(ours, net, DetectorCard(arch, Preprocess(896), tuple(COCO_CLASSES.values()), tuple(COCO_CLASSES)))
    assert detect_export([str(ours), str(theirs)]) == 0
    written = torch.load(theirs, weights_only=True)
    assert set(written) == {"meta", "state_dict"}
    assert written["meta"]["CLASSES"] == tuple(COCO_CLASSES.values())
    state = written["state_dict"]
    assert torch.equal(state["bbox_head.cls_convs.4.3.conv.weight"], net.head.classes.convs[3].weight)
    assert torch.equal(state["neck.fpn_convs.3.bn.running_var"], net.pyramid.outputs[3].norm.running_var)
    assert theirs.stat().st_size < 1.1 * ours.stat().st_size  # what the levels share is stored once
    assert detect_convert([str(theirs), str(again), "--from", "mmdetection"]) == 0
    back, card = load_detector(again)
    assert equal(back, net)
    assert (card.arch, card.classes) == (arch, tuple(COCO_CLASSES.values()))
    assert card.category_ids[:12] == (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 13)
    assert card.preprocess == Preprocess(896)
    assert card.preprocess.mean == pytest.approx((123.675, 116.28, 103.53))  # its img_norm_cfg
    assert card.preprocess.std == pytest.approx((58.395, 57.12, 57.375))
    assert card.provenance["dialect"] == "mmdetection"
    assert "assumed" not in card.provenance
    assert card.provenance["assumed_before"] == ["the network is retinanet_efficientnet_b3_fpn", "896 px, ImageNet's mean and std"]
    out, err = capsys.readouterr()
    assert f"{theirs}: retinanet_efficientnet_b3_fpn, 80 classes, " in out
    assert "theirs.pth doesn't say it, assumed: the network is retinanet_efficientnet_b3_fpn; 896 px" in err


def test_cocos_classes_are_torchvisions():
    assert {i: name for i, name in enumerate(_COCO_CATEGORIES) if name not in ("__background__", "N/A")} == COCO_CLASSES


def test_a_network_and_a_size_of_ones_own(tmp_path, arch_file, capsys):
    net = net_of()
    source = checkpoint(tmp_path / "epoch_12.pth", net, {"CLASSES": NAMES, "epoch": 12})
    target = tmp_path / "own.safetensors"
    assert detect_convert([source, str(target), "--from", "mmdetection", "--arch", arch_file, "--size", "320"]) == 0
    back, card = load_detector(target)
    assert equal(back, net)
    assert (card.classes, card.category_ids, card.preprocess.size, card.arch.backbone.resolution) == (NAMES, (1, 2, 3), 320, 320)
    assert card.arch.pyramid == ARCH.pyramid
    assert "assumed: ImageNet's mean and std\n" in capsys.readouterr().err
    x = images(1, (320, 320), seed=0)
    with torch.no_grad():
        assert torch.allclose(back(x).logits[0], net(x).logits[0], atol=1e-4)
    with pytest.raises(ValueError, match=r"own.safetensors: exists already"):
        detect_convert([source, str(target), "--from", "mmdetection"])


@pytest.mark.parametrize(
    "meta",
    [{"CLASSES": list(NAMES)}, {"dataset_meta": {"classes": NAMES, "palette": None}}, {"dataset_meta": {"CLASSES": NAMES}}],
)
def test_classes_are_read_from_either_generations_meta(tmp_path, meta):
    assert class_names(checkpoint(tmp_path / "a.pth", net_of(), meta)) == NAMES


def test_a_single_class_whose_tuple_lost_its_comma(tmp_path):
    assert class_names(checkpoint(tmp_path / "a.pth", net_of(classes=1), {"CLASSES": "cell"})) == ("cell",)


@pytest.mark.parametrize("meta", [{}, {"CLASSES": None}, {"CLASSES": [1, 2, 3]}, {"CLASSES": {"a": 1}}, {"dataset_meta": "cells"}, "CLASSES"])
def test_a_meta_that_names_nothing(tmp_path, meta):
    path = checkpoint(tmp_path / "a.pth", net_of(), meta)
    assert class_names(path) == ()
    with pytest.raises(WeightsError, match=r"a.pth: its head has 3 classes, and their names aren't in the file; give them"):
        open_detector(path, arch=ARCH)
    assert open_detector(path, arch=ARCH, classes=NAMES)[1].classes == NAMES


def test_80_classes_without_names_are_cocos(tmp_path):
    net, card = open_detector(checkpoint(tmp_path / "a.pth", net_of(classes=80)), arch=ARCH)
    assert net.num_classes == 80
    assert dict(zip(card.category_ids, card.classes, strict=True)) == COCO_CLASSES
    assert card.provenance["assumed"] == ["224 px, ImageNet's mean and std", "the 80 classes are COCO's"]


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_nothing_in_a_checkpoint_is_executed(tmp_path):
    path = checkpoint(tmp_path / "a.pth", net_of(), {"CLASSES": NAMES, "config": Bomb(tmp_path / "executed")})
    with pytest.raises(WeightsError, match=r"a.pth: not a checkpoint that can be read safely"):
        open_detector(path, arch=ARCH)
    assert class_names(path) == ()
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda s: s.pop("bbox_head.retina_cls.weight"), r"nor a RetinaNet of mmdetection: no tensor bbox_head.retina_cls.weight"),
        (lambda s: s.update({"bbox_head.retina_cls.weight": torch.zeros(26, 8, 3, 3)}), r"26 outputs, expected a multiple of the network's 9"),
        (
            lambda s: s.update({"bbox_head.retina_cls.weight": torch.zeros(18, 8, 3, 3)}),
            r"its head has 2 classes, but 3 different names are in its meta",
        ),
        (
            lambda s: s.update({"neck.lateral_convs.0.conv.weight": torch.zeros(8, 99, 1, 1), "bbox_head.retina_reg.bias": torch.zeros(9)}),
            r"2 of another shape: neck.lateral_convs.0.conv.weight \(8, 99, 1, 1\) instead of \(8, 32, 1, 1\), "
            r"bbox_head.retina_reg.bias \(9,\) instead of \(36,\); expected small$",
        ),
        (lambda s: s.pop("neck.fpn_convs.1.bn.weight"), r"1 missing: neck.fpn_convs.1.bn.weight; expected small$"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_one_line_and_no_file(tmp_path, arch_file, change, told):
    state = to_mmdet(net_of())
    change(state)
    torch.save({"meta": {"CLASSES": NAMES}, "state_dict": state}, tmp_path / "bad.pth")
    with pytest.raises(WeightsError, match=rf"bad.pth: .*{told}") as error:
        detect_convert([str(tmp_path / "bad.pth"), str(tmp_path / "out.safetensors"), "--from", "mmdetection", "--arch", arch_file])
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out.safetensors").exists()


def test_the_wrong_network_is_told(tmp_path):
    path = checkpoint(tmp_path / "a.pth", net_of(classes=80))
    with pytest.raises(WeightsError, match=r"a.pth: .* missing: .*; expected retinanet_efficientnet_b3_fpn, as no other was given$"):
        open_detector(path)
    with pytest.raises(ValueError, match=r"--arch mobilenet_v2: a network; expected a detector"):
        detect_convert([path, str(tmp_path / "a.safetensors"), "--from", "mmdetection", "--arch", "mobilenet_v2"])
    with pytest.raises(WeightsError, match=r"its head has 80 classes, but 2 different names are given: a, b"):
        detect_convert([path, str(tmp_path / "a.safetensors"), "--from", "mmdetection", "--classes", "a, b"])


def test_our_own_file_says_everything_itself(tmp_path):
    net, path = net_of(), tmp_path / "ours.safetensors"
    save_detector(path, net, DetectorCard(ARCH, Preprocess(224), NAMES, (3, 1, 9)))
    back, card = open_detector(path)
    assert equal(back, net)
    assert card.category_ids == (3, 1, 9)
    assert open_detector(path, size=160)[1].preprocess == Preprocess(160)
    with pytest.raises(WeightsError, match=r"ours.safetensors: carries its own architecture, which isn't what was given"):
        open_detector(path, arch=retinanet("efficientnet_b3"))
    with pytest.raises(WeightsError, match=r"ours.safetensors: carries its own class names, which isn't what was given"):
        open_detector(path, classes=("a", "b", "c"))
    assert open_detector(path, arch=ARCH, classes=NAMES)[1] == card
    with pytest.raises(ValueError, match=r"ours.safetensors: a detector's file already"):
        detect_convert([str(path), str(tmp_path / "again.safetensors"), "--from", "mmdetection"])


def test_what_is_no_detector_is_told(tmp_path):
    backbone = named("mobilenet_v2")
    from triscale.model import build

    save_model(tmp_path / "classifier.safetensors", build(backbone, 2), ModelCard(backbone, Preprocess(224), ("a", "b")))
    with pytest.raises(ModelFileError, match=r"a classifier; expected a detector's file"):
        open_detector(tmp_path / "classifier.safetensors")
    with pytest.raises(WeightsError, match=r"nothing.pth: no such file"):
        open_detector(tmp_path / "nothing.pth")
    torch.save({"conv.weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(WeightsError, match=r"other.pth: .*nor a RetinaNet of mmdetection"):
        open_detector(tmp_path / "other.pth")


# --- VOC


def as_voc(data, folder, number, stem):
    """One picture of a COCO set as Pascal VOC has it: corners of whole pixels from 1, both inside."""
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    entry = data.images[number]
    (folder / f"JPEGImages/{stem}.jpg").write_bytes(data.path(number).read_bytes())
    boxes, labels = data.targets(number)
    tags = ("xmin", "ymin", "xmax", "ymax")
    rows = "".join(
        f"<object><name>{data.classes[label]}</name><bndbox>"
        + "".join(f"<{tag}>{int(v) + (i < 2)}</{tag}>" for i, (tag, v) in enumerate(zip(tags, box, strict=True)))
        + "</bndbox></object>"
        for box, label in zip(boxes.tolist(), labels.tolist(), strict=True)
    )
    size = f"<size><width>{entry.width}</width><height>{entry.height}</height><depth>3</depth></size>"
    (folder / f"Annotations/{stem}.xml").write_text(f"<annotation><filename>{stem}.jpg</filename>{size}{rows}</annotation>")
    return boxes.astype(int).tolist(), [data.classes[label] for label in labels]


def test_real_pictures_boxes_go_to_voc_and_back_by_the_command(shared, tmp_path, capsys):
    bccd = shared / "data" / "bccd"
    data = read_coco(bccd / "annotations" / "instances_test.json", bccd / "images", check_files=False)
    source, target = tmp_path / "VOC", tmp_path / "coco"
    given = {f"p{i}": as_voc(data, source, i, f"p{i}") for i in range(6)}
    (source / "ImageSets/Main/train.txt").write_text("p0\np1\np2\np3\n")
    (source / "ImageSets/Main/test.txt").write_text("p5\np4\n")
    assert detect_convert([str(source), str(target), "--from", "voc"]) == 0
    seen = {}
    for split in ("train", "test"):
        made = read_coco(target / f"annotations/instances_{split}.json", source / "JPEGImages")
        assert not made.left_out
        for i, entry in enumerate(made.images):
            boxes, labels = made.targets(i)
            seen[Path(entry.name).stem] = (boxes.astype(int).tolist(), [made.classes[label] for label in labels])
    assert seen == given
    assert sum(len(boxes) for boxes, _ in seen.values()) > 30
    out = capsys.readouterr().out
    assert f"train  {target}/annotations/instances_train.json       4" in out
    assert "3 classes: Platelets, RBC, WBC\n" in out
    assert f"the pictures stay in {source / 'JPEGImages'}" in out
    before = (target / "annotations/instances_test.json").read_bytes()
    with pytest.raises(ValueError, match=r"instances_test.json: exists already; give another folder"):
        detect_convert([str(source), str(target), "--from", "voc"])
    assert (target / "annotations/instances_test.json").read_bytes() == before


def test_what_voc_has_no_use_for_is_told(tmp_path, capsys):
    (tmp_path / "VOC/Annotations").mkdir(parents=True)
    (tmp_path / "VOC/JPEGImages").mkdir()
    Image.new("RGB", (20, 10)).save(tmp_path / "VOC/JPEGImages/a.jpg")
    corners = "<xmin>3</xmin><ymin>2</ymin><xmax>12</xmax><ymax>8</ymax>"
    (tmp_path / "VOC/Annotations/a.xml").write_text(f"<annotation><object><name>cat</name><bndbox>{corners}</bndbox></object></annotation>")
    with pytest.raises(ValueError, match=r"--arch, --size and --classes: of mmdetection's checkpoints"):
        detect_convert([str(tmp_path / "VOC"), str(tmp_path / "out"), "--from", "voc", "--size", "320"])
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(ValueError, match=r"a.json: expected a folder, found a file"):
        detect_convert([str(tmp_path / "VOC"), str(tmp_path / "a.json"), "--from", "voc"])
    with pytest.raises(ValueError, match=r"a.pth: a detector's file is a .safetensors file"):
        detect_convert([str(tmp_path / "VOC"), str(tmp_path / "a.pth"), "--from", "mmdetection"])
    assert detect_convert([str(tmp_path / "VOC"), str(tmp_path / "VOC"), "--from", "voc"]) == 0  # beside its XML: then one folder is all
    made = json.loads((tmp_path / "VOC/annotations/instances_all.json").read_text())
    assert made["annotations"][0]["bbox"] == [2, 1, 10, 7]
    assert "no list of names in ImageSets/Main" in capsys.readouterr().err
