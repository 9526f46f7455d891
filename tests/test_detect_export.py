"""Detectors as ONNX files: ONNX Runtime gives what Detector.detect gives on real pictures, and a file that doesn't isn't written."""

import contextlib
import copy
import io
import json
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import ROOT
from networks import images, randomise
from torchvision.ops import clip_boxes_to_image

from triscale.architecture import Arch, Head, Stage, Stem
from triscale.commands.detect_converting import detect_export
from triscale.detect import export
from triscale.detect.boxes import Detections, decode
from triscale.detect.coco import read_coco
from triscale.detect.export import DetectorGraph, ExportError, export_onnx
from triscale.detect.model_file import DetectorCard, save_detector
from triscale.detect.onnx_check import _sure_bound, agreement, apart
from triscale.detect.retinanet import Outputs, build_detector
from triscale.detect.rules import TORCHVISION, Rules
from triscale.detect.views import collate, evaluation_view, normalised
from triscale.detector import Anchors, BoxHead, DetectorArch, Pyramid
from triscale.recipe import Preprocess

SIZE = 100  # maps of 13, 7, 4 and 2 places: every one is rounded up
STAGES = (Stage("conv", 3, 2, 1, 0, "none", 8, 1), Stage("conv", 3, 2, 1, 0, "none", 12, 1), Stage("mbconv", 5, 2, 2, 0.25, "none", 16, 1))
BACKBONE = Arch(Stem(8), (*STAGES, Stage("conv", 3, 2, 1, 0, "none", 24, 1)), Head(0), SIZE)
ARCH = DetectorArch(BACKBONE, Pyramid(12, last=6), BoxHead(1, 12), name="tiny")
RULES = Rules(candidates=150, max_boxes=60, min_score=0.0)  # the first two bind; 0 is a constant that the graph has elsewhere too
ANCHORS = 9 * (13 * 13 + 7 * 7 + 4 * 4 + 2 * 2)
CARD = DetectorCard(ARCH, Preprocess(SIZE), ("RBC", "WBC", "Platelets"), (2, 1, 7), RULES)


def alive(arch=ARCH, classes=3, rules=RULES):
    """Scores spread over (0, 1), boxes off their anchors."""
    torch.manual_seed(1)
    net = build_detector(arch, classes, rules=rules)
    randomise(net, images(4, (SIZE, SIZE), seed=0))
    torch.nn.init.normal_(net.head.classes.output.weight, std=0.1)
    torch.nn.init.normal_(net.head.boxes.output.weight, std=0.02)
    torch.nn.init.normal_(net.head.classes.output.bias, -2.0, 0.1)
    return net.eval()


@pytest.fixture(scope="module")
def batch(shared):
    """Three pictures of 640 x 480: a quarter of each square is padding."""
    folder = shared / "data" / "bccd"
    data = read_coco(folder / "annotations" / "instances_test.json", folder / "images", check_files=False)
    out = collate([evaluation_view(data, i, SIZE) for i in range(3)])
    assert out.contents.tolist() == [[75, 100]] * 3
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("onnx")


@pytest.fixture(scope="module")
def chosen(folder):
    """With suppression inside, any number of pictures, float32."""
    net = alive().train()
    path = folder / "chosen.onnx"
    made = export_onnx(net, CARD, path, nms=True)
    assert net.training  # as it was
    assert net.rules is RULES
    return path, made


@pytest.fixture(scope="module")
def every(folder):
    """By the command: without suppression, two pictures at a time, uint8. And what it says."""
    path, said = folder / "every.onnx", io.StringIO()
    save_detector(folder / "tiny.safetensors", alive(), CARD)
    with contextlib.redirect_stdout(said):
        assert detect_export([str(folder / "tiny.safetensors"), str(path), "--uint8", "--batch", "2"]) == 0
    return path, said.getvalue()


def run(model, **given):
    """model: a path, or a ModelProto."""
    data = str(model) if not isinstance(model, onnx.ModelProto) else model.SerializeToString()
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, map(torch.from_numpy, session.run(names, {k: v.contiguous().numpy() for k, v in given.items()})), strict=True))


def detections(got):
    return [Detections(*(got[name][i, :n] for name in Detections._fields)) for i, n in enumerate(got["counts"].tolist())]


def bounded(path, bound):
    model = onnx.load(path)
    (own,) = (t for t in model.graph.initializer if t.name == "min_score")
    own.CopyFrom(onnx.numpy_helper.from_array(np.array([[bound]], np.float32), "min_score"))
    return model


@pytest.mark.parametrize("bound", [0.0, 0.05, 0.45, 0.999])
@pytest.mark.parametrize("pictures", [1, 3])
def test_with_suppression_onnx_runtime_detects_what_detect_does(chosen, batch, pictures, bound):
    net = alive(rules=replace(RULES, min_score=bound))
    contents = batch.contents[:pictures]
    x = normalised(batch.images[:pictures], contents, CARD.preprocess)
    with torch.no_grad():
        outputs = net(x)
    ours = net.detect(outputs, contents.tolist())
    got = run(bounded(chosen[0], bound), images=x, contents=contents)
    for a, b, boxes, scores, labels in zip(detections(got), ours, got["boxes"], got["scores"], got["labels"], strict=True):
        n = len(b.boxes)
        assert n == {0.0: 60, 0.05: 60, 0.999: 0}.get(bound, n)
        assert len(a.boxes) == n
        assert apart(a, b, SIZE) < 1e-4
        assert torch.allclose(a.scores, b.scores, rtol=1e-4, atol=1e-6)
        assert (a.scores.diff() <= 0).all()
        assert (a.boxes[:, 3] <= 75).all()
        assert (boxes[n:] == 0).all()
        assert (scores[n:] == 0).all()
        assert (labels[n:] == -1).all()
    if bound == 0.45:
        assert all(0 < len(found.boxes) < 60 for found in ours)
        assert len(set(ours[0].labels.tolist())) > 1
        assert len(ours[0].boxes) < (torch.cat(net.flat(outputs)[0], 1)[0].sigmoid() > bound).sum()  # suppression did something


def test_without_suppression_every_box_and_score_comes_out(every, batch):
    path, _ = every
    net = alive()
    images, contents = batch.images[:2], batch.contents[:2]
    with torch.no_grad():
        outputs = net(normalised(images, contents, CARD.preprocess))
    logits, deltas = (torch.cat(part, 1) for part in net.flat(outputs))
    boxes = clip_boxes_to_image(decode(deltas, torch.cat(net.anchors(outputs))), (75, 100))
    got = run(path, images=images, contents=contents)
    assert got["scores"].shape == (2, ANCHORS, 3)
    assert (got["scores"] - logits.sigmoid()).abs().max() < 1e-5
    assert (got["boxes"] - boxes).abs().max() < 1e-3
    assert logits.sigmoid().std() > 0.1


def test_the_file_says_what_it_is(chosen):
    path, made = chosen
    assert made.inputs == (("images", "float32", f"(batch, 3, {SIZE}, {SIZE})"), ("contents", "int64", "(batch, 2)"))
    assert made.outputs == (
        ("boxes", "float32", "(batch, 60, 4)"),
        ("scores", "float32", "(batch, 60)"),
        ("labels", "int64", "(batch, 60)"),
        ("counts", "int64", "(batch)"),
    )
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert [o.version for o in model.opset_import if not o.domain] == [18]
    about = {p.key: json.loads(p.value) for p in model.metadata_props}
    assert (about["classes"], about["category_ids"]) == (["RBC", "WBC", "Platelets"], [2, 1, 7])
    assert (about["size"], about["mean"], about["std"]) == (SIZE, list(CARD.preprocess.mean), list(CARD.preprocess.std))
    assert Rules(**about["rules"]) == RULES
    text = path.read_bytes()
    assert str(ROOT).encode() not in text
    assert b"site-packages" not in text


def test_the_check_says_how_far_it_is_and_how_much_it_saw(chosen):
    agreed = chosen[1].agreement
    assert agreed.batches == (1, 3)
    assert agreed.boxes >= 20
    assert 0 < agreed.difference < 1e-5
    assert agreed.told() == f"{agreed.boxes} boxes and their scores differ from torch's by up to {agreed.difference:.1e} (boxes: of the side)"


def changed(path, which, change):
    """The file with one of its constants changed: by name, or by the size of its first axis."""
    model = onnx.load(path)
    (tensor,) = (t for t in model.graph.initializer if which in (t.name, *t.dims[:1]))
    tensor.CopyFrom(onnx.numpy_helper.from_array(change(onnx.numpy_helper.to_array(tensor)).astype(np.float32), tensor.name))
    return model


@pytest.mark.parametrize(
    ("kind", "which", "change"),
    [
        ("chosen", "net.head.boxes.output.bias", lambda v: v + 0.01),  # a hundredth of an anchor
        ("chosen", "net.head.classes.output.bias", lambda v: v + 0.01),
        ("chosen", ANCHORS, lambda v: v[::-1]),
        ("every", "net.head.classes.output.bias", lambda v: v + 0.01),
        ("every", "mean", lambda v: v + 0.5),
        ("every", "net.head.boxes.output.bias", lambda v: v * np.nan),
        ("every", "net.head.classes.output.bias", lambda v: v * np.nan),
    ],
)
def test_a_graph_that_computes_something_else_is_not_written(request, monkeypatch, tmp_path, kind, which, change):
    path, _ = request.getfixturevalue(kind)
    monkeypatch.setattr(export, "_traced", lambda *args, **kwargs: changed(path, which, change))
    batches = {"chosen": {"nms": True}, "every": {"nms": False, "batch": 2, "uint8": True}}[kind]
    with pytest.raises(ExportError, match=r"bad.onnx: not written: ONNX Runtime's .*; expected at most 0.0001"):
        export_onnx(alive(), CARD, tmp_path / "bad.onnx", **batches)
    assert not list(tmp_path.iterdir())


def test_scores_below_the_files_own_bound_are_compared_too(chosen):
    """As a fresh network has them, all about 0.01, where the file would give no box."""
    net, model = alive(rules=replace(RULES, min_score=0.05)), bounded(chosen[0], 0.05)
    for tower in (net.head.classes, net.head.boxes):
        tower.output.weight.data.mul_(0.05)
    net.head.classes.output.bias.data.fill_(-4.6)
    for tensor in model.graph.initializer:
        if "output." in tensor.name and tensor.name.startswith("net.head"):
            tensor.CopyFrom(onnx.numpy_helper.from_array(net.state_dict()[tensor.name.removeprefix("net.")].numpy(), tensor.name))
    assert not len(net.detect(net(images(1, (SIZE, SIZE), seed=3)))[0].boxes)
    found = agreement(model, net, CARD.preprocess, (1, 3))
    assert found.boxes > 0
    assert found.difference < 1e-5


@pytest.mark.parametrize("nms", [False, True])
@pytest.mark.parametrize("uint8", [False, True])
@pytest.mark.parametrize(
    ("arch", "rules"), [(ARCH, Rules()), (replace(ARCH, anchors=Anchors(rounded=True)), TORCHVISION), (ARCH, Rules(candidates=20, max_boxes=99))]
)
def test_the_graph_in_torch_is_the_detector(batch, nms, uint8, arch, rules):
    net = alive(arch, rules=rules)
    contents = torch.tensor([[75, 100], [75, 100], [60, 31]])
    x = normalised(batch.images, contents, CARD.preprocess)
    given = (batch.images if uint8 else x, contents) if nms or uint8 else (x,)
    with torch.no_grad():
        outputs = net(x)
        got = DetectorGraph(net, CARD.preprocess, nms=nms, uint8=uint8)(*given)
    ours = net.detect(outputs, contents.tolist())
    if nms:
        assert got[0].shape == (3, rules.max_boxes, 4)
        assert all(len(found.boxes) >= 10 for found in ours)
        for a, b in zip(detections(dict(zip(("boxes", "scores", "labels", "counts"), got, strict=True))), ours, strict=True):
            assert apart(a, b, SIZE) < 1e-6
        return
    scores, boxes = got
    for i, found in enumerate(ours):  # each box that detect finds is one of them, with that score
        limit = clip_boxes_to_image(boxes[i], contents[i].tolist())
        best = (found.boxes[:, None] - limit).abs().amax(2) + (found.scores[:, None] - scores[i][:, found.labels].T).abs()
        assert best.amin(1).max() < 1e-4


class Mean(torch.nn.Module):
    def forward(self, x):
        return x.mean((2, 3))


def test_means_of_large_maps_keep_their_precision(chosen):
    """Half of a map the same value, as padding makes it: added up one after the other its 200 000 values lose 1e-4 of their mean."""
    x = torch.randn(2, 4, 448, 448, generator=torch.Generator().manual_seed(0)) + 0.3
    x[:, :, 224:] = torch.linspace(0.1, 0.7, 4)[:, None, None]
    table = {torch.ops.aten.mean.dim: export._mean_in_onnx}
    program = torch.onnx.export(Mean().eval(), (x,), dynamo=True, verbose=False, opset_version=18, input_names=["x"], custom_translation_table=table)
    (got,) = run(program.model_proto, x=x).values()
    exact = x.double().mean((2, 3))
    assert got.shape == (2, 4)
    assert (got - exact).abs().max() < 3e-6 * exact.abs().max()
    model = onnx.load(chosen[0])
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    axes = [constants[n.input[1]].tolist() for n in model.graph.node if n.op_type == "ReduceMean"]
    assert axes == [[3], [2]]  # of the one squeeze-excitation


def test_how_far_detections_are_apart():
    boxes = torch.tensor([[0.0, 0, 10, 10], [50, 50, 90, 90]])
    a = Detections(boxes, torch.tensor([0.9, 0.8]), torch.tensor([0, 1]))
    assert apart(a, Detections(*(part.flip(0) for part in a)), 100) == 0
    moved = Detections(boxes + torch.tensor([[0.0, 0, 0, 0], [0, 0, 2, 0]]), a.scores, a.labels)
    assert apart(a, moved, 100) == pytest.approx(0.02)
    assert apart(a, a._replace(scores=torch.tensor([0.9, 0.7])), 100) == pytest.approx(0.1)
    assert apart(a, a._replace(labels=torch.tensor([1, 0])), 100) == pytest.approx(0.8)  # of each class the nearest is the other box
    assert apart(a, a._replace(labels=torch.tensor([0, 0])), 100) == float("inf")
    assert apart(a, Detections(*(part[:1] for part in a)), 100) == float("inf")
    assert apart(Detections(*(part[:0] for part in a)), Detections(*(part[:0] for part in a)), 100) == 0


def test_the_bound_lies_where_no_decision_is_close():
    """One level's anchors at (0, 0), (8, 0), (16, 0), ... of 32 x 32: neighbours have IoU 24/40 and suppress each other; those 16 apart 16/48."""
    arch = DetectorArch(BACKBONE, Pyramid(12, last=5), BoxHead(1, 12), Anchors(octaves=1, ratios=(1.0,)))
    net = build_detector(arch, 1).eval()
    logits = [torch.full((1, 1, 13, 13), -9.0), torch.full((1, 1, 7, 7), -9.0), torch.full((1, 1, 4, 4), -9.0)]
    outputs = Outputs(tuple(logits), tuple(torch.zeros(1, 4, *x.shape[2:]) for x in logits), (SIZE, SIZE))

    def bound(*values):
        """Logits of anchors in row 6 from column 3 on, which lie within the square."""
        logits[0][0, 0, 6] = -9.0
        logits[0][0, 0, 6, 3 : 3 + len(values)] = torch.tensor(values)
        return torch.tensor(_sure_bound(net, outputs, [(SIZE, SIZE)])).logit().item()

    # 1 and 0.99 are neighbours and no tie; what is last is surely above the mass at -9, whose first rival is a tie.
    assert bound(1.0, 0.99) < 0
    assert bound(1.0, 0.0, 0.0) == pytest.approx(0.5, abs=0.1)  # a tie of rivals: between 1 and them
    assert bound(1.0, 0.5, 0.0, 0.0, -1.0) == pytest.approx(0.25, abs=0.1)
    assert bound(0.0, -9.0, 0.0) < -1  # a tie of no rivals
    assert bound(2.0, 2.0) == float("inf")  # nothing is sure


def test_what_cannot_be_exported_is_told(tmp_path, monkeypatch):
    path = tmp_path / "a.onnx"
    with pytest.raises(ExportError, match="batch 'dynamic' or a whole number >= 1, found 0"):
        export_onnx(alive(), CARD, path, nms=True, batch=0)
    with pytest.raises(ValueError, match=r"Preprocess.size: expected"):
        export_onnx(alive(), CARD, path, nms=True, size=0)
    monkeypatch.setattr(export, "LARGEST", 1000)
    with pytest.raises(ExportError, match="bytes of weights, more than the 1000"):
        export_onnx(alive(), CARD, path, nms=True)
    monkeypatch.setattr(export, "find_spec", lambda name: None if name == "onnxscript" else True)
    with pytest.raises(ExportError, match=r"needs onnxscript: pip install 'triscale\[deploy\]'"):
        export_onnx(alive(), CARD, path, nms=True)
    path.write_bytes(b"mine")
    with pytest.raises(ExportError, match=r"a.onnx: exists already"):
        export_onnx(alive(), CARD, path, nms=True)
    assert path.read_bytes() == b"mine"


def test_the_command_tells_what_goes_in_and_out(every, tmp_path):
    path, said = every
    values = sum(v.numel() for v in alive().state_dict().values())
    assert said.startswith(f"{path}: tiny, 3 classes, {values:,} values, {path.stat().st_size / 1e6:.1f} MB\n")
    assert "in   images    uint8    (2, 3, 100, 100)\n" in said
    assert "in   contents  int64    (2, 2)\n" in said
    assert f"out  scores    float32  (2, {ANCHORS}, 3)\n" in said
    assert f"2 at a time: {2 * ANCHORS} boxes and their scores differ from torch's by up to " in said
    model = str(path.with_name("tiny.safetensors"))
    with pytest.raises(ValueError, match=r"every.onnx: exists already"):
        detect_export([model, str(path)])
    with pytest.raises(ValueError, match=r"a.bin: expected a name that ends in .onnx or .pth, or --to"):
        detect_export([model, str(tmp_path / "a.bin")])
    with pytest.raises(ValueError, match=r"--nms, --uint8 and --batch: of ONNX"):
        detect_export([model, str(tmp_path / "a.pth"), "--nms"])
    with pytest.raises(ExportError, match="a whole number >= 1, found 0"):
        detect_export([model, str(tmp_path / "a.onnx"), "--batch", "0"])


def test_copying_leaves_the_callers_detector_alone(chosen):
    net = alive()
    before = copy.deepcopy(net.state_dict())
    agreement(onnx.load(chosen[0]), net, CARD.preprocess, (1,))
    assert net.rules is RULES
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
