"""Class activation maps and Grad-CAM by value, their places in pixels, and the explain command as a person runs it."""

import csv
import signal
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn

import triscale as ts
from triscale import cli
from triscale.explain import cell_centres, class_activation, grad_cam, overlay, palette, peak, upsample
from triscale.weights.model_file import ModelCard, save_model

SIZES = [(64, 64), (65, 65), (33, 97), (100, 50), (32, 32)]


def tiny(padding="same", resolution=64, strides=(2, 2), classes=3):
    """Stem and one stage per stride, plain 3x3 convolutions and ReLU."""
    stages = tuple(ts.Stage("conv", 3, stride, 1, 0, "none", 8, 1) for stride in strides)
    return ts.build(ts.Arch(ts.Stem(8, 3, 2), stages, ts.Head(16), resolution, 0.2, ts.Numerics(padding, "relu"), name="tiny"), classes).eval()


def small(name="efficientnet_b0", classes=7):
    """A named network at a quarter of its width, its norms' statistics no longer those of a fresh one."""
    torch.manual_seed(3)
    net = ts.build(ts.scale(ts.arch(name), width=0.25), classes)
    net(torch.randn(4, 3, 64, 64))
    nn.init.normal_(net.classifier.bias)
    return net.eval()


# ---------------------------------------------------------------------------------------------------------------- values


def test_a_map_is_the_features_weighted_by_the_classifiers_row():
    net = tiny(classes=2)
    net.classifier = nn.Linear(2, 2)
    net.classifier.weight.data = torch.tensor([[1.0, 0.5], [2.0, -1.0]])
    net.classifier.bias.data = torch.tensor([100.0, 0.0])
    net.features = lambda x: x[:, :2]
    x = torch.tensor([[[[1.0, 2], [3, 4]], [[10, 20], [30, 40]], [[0, 0], [0, 0]]]])
    assert class_activation(net, x).tolist() == [[[6, 12], [18, 24]]]  # class 0: 100 + 2.5 + 12.5 against 5 - 25
    assert class_activation(net, x, [1]).tolist() == [[[-8, -16], [-24, -32]]]
    assert class_activation(net, x.repeat(2, 1, 1, 1), torch.tensor([1, 0]))[:, 0, 0].tolist() == [-8, 6]


@pytest.mark.parametrize("name", ["efficientnet_b0", "mobilenet_v2", "resnet18"])
@pytest.mark.parametrize("size", SIZES)
def test_a_maps_mean_and_the_bias_are_the_logit_at_every_size(name, size):
    net, x = small(name), torch.randn(2, 3, *size)
    with torch.no_grad():
        logits = net(x)
    for classes in ([0, 6], [3, 1]):
        maps = class_activation(net, x, classes)
        assert maps.shape == (2, -(-size[0] // 32), -(-size[1] // 32))
        assert maps.dtype == torch.float32
        assert torch.allclose(maps.mean((1, 2)) + net.classifier.bias[classes], logits[[0, 1], classes], rtol=1e-5, atol=1e-5)
    assert torch.equal(class_activation(net, x), class_activation(net, x, logits.argmax(1)))


@pytest.mark.parametrize("name", ["efficientnet_b0", "mobilenet_v2", "resnet18"])
@pytest.mark.parametrize("size", [(64, 64), (65, 96)])
def test_grad_cam_of_the_last_features_is_the_positive_map_over_its_cells(name, size):
    net, x = small(name), torch.randn(2, 3, *size)
    maps = class_activation(net, x, [2, 5])
    expected = maps.relu() / (maps.shape[1] * maps.shape[2])
    assert torch.allclose(grad_cam(net, x, [2, 5]), expected, rtol=1e-4, atol=1e-5 * float(expected.max()))


@pytest.mark.parametrize(("name", "target", "index"), [("efficientnet_b0", "stride8", 2), ("resnet18", "stride16", 2), ("resnet18", "stride2", -1)])
def test_grad_cam_of_a_stage_is_selvarajus_equation(name, target, index):
    """The rest of the network after the stage, written out: eq. 1 and 2 with autograd on it."""
    net, x = small(name), torch.randn(1, 3, 70, 64)
    a = net.stages(x)[target].detach().requires_grad_()
    y = a
    if index == -1:
        y = net.pool(y)
    for stage in net.body[index + 1 :]:
        for block in stage:
            y = block(y)
    logits, found = net.classifier((net.head(y) if net.head else y).mean((2, 3)))[0], 0
    for index, logit in enumerate(logits):
        (gradient,) = torch.autograd.grad(logit, a, retain_graph=True)
        expected = (gradient.mean((2, 3), keepdim=True) * a).sum(1).relu().detach()
        assert torch.allclose(grad_cam(net, x, [index], target), expected, rtol=1e-4, atol=1e-5 * float(expected.max()))
        found += bool(expected.max() > 0)
    assert found


def test_grad_cam_takes_other_networks_and_heads():
    conv = nn.Conv2d(3, 5, 3, padding=1)
    other = nn.Sequential(conv, nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 2))
    x = torch.randn(1, 3, 9, 8)
    features = F.relu(conv(x))
    alpha = (other[4].weight[1][:, None, None] * (features[0] > 0)).mean((1, 2)) / 72
    expected = torch.einsum("k,khw->hw", alpha, conv(x)[0]).relu()
    assert torch.allclose(grad_cam(other, x, [1], "0")[0], expected, atol=1e-7)
    assert cell_centres(other, (9, 8)) is None
    net = tiny()
    net.classifier = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))
    assert grad_cam(net, x, [1]).shape == (1, 2, 1)
    with pytest.raises(ValueError, match="linear classifier, found Sequential; grad_cam"):
        class_activation(net, x)


def test_the_network_is_left_as_it_was():
    net, x = small(), torch.randn(1, 3, 64, 64)
    net.train()
    net.stem.eval()
    for parameter in net.parameters():
        parameter.requires_grad_(False)  # a frozen network is explained too
    state = {name: value.clone() for name, value in net.state_dict().items()}
    modes = [m.training for m in net.modules()]
    with torch.no_grad():
        assert grad_cam(net, x).max() > 0
    class_activation(net, x)
    with pytest.raises(ValueError, match="class indices from 0 to 6"):
        grad_cam(net, x, [7])
    assert [m.training for m in net.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    assert not any(m._forward_hooks for m in net.modules())


def test_what_cannot_be_explained_is_said():
    x = torch.randn(2, 3, 40, 40)
    for explain in (class_activation, grad_cam):
        with pytest.raises(ValueError, match="num_classes"):
            explain(tiny(classes=0), x)
        for wrong in ([0], [0, 3], [0, -1], [0.5, 1.0]):
            with pytest.raises(ValueError, match="2 class indices from 0 to 2"):
                explain(tiny(), x, wrong)
        with pytest.raises(ValueError, match="N, C, H, W"):
            explain(tiny(), x[0])
    with pytest.raises(ValueError, match="nearest is 'stride8'"):
        grad_cam(tiny(), x, target="stride9")


# ---------------------------------------------------------------------------------------------------------------- places


@pytest.mark.parametrize(("grid", "size"), [((7, 7), (224, 224)), ((3, 5), (70, 150)), ((1, 2), (32, 33)), ((1, 1), (5, 4))])
def test_upsample_is_torchs_bilinear(grid, size):
    maps = torch.randn(2, *grid)
    expected = F.interpolate(maps[None], size, mode="bilinear", align_corners=False)[0]
    assert torch.allclose(upsample(maps, size), expected, atol=1e-5)


@pytest.mark.parametrize("padding", ["same", "symmetric"])
def test_cells_are_centred_at_the_training_size(padding):
    for resolution in (64, 96):
        rows, columns = cell_centres(tiny(padding, resolution), (resolution, resolution))
        assert torch.equal(rows, columns)
        assert torch.equal(rows, torch.arange(resolution // 8) * 8 + 3.5)  # bilinear resizing's places
    rows, columns = cell_centres(tiny(padding, 100), (100, 100))  # 13 cells, 96 px from the first to the last
    assert (rows[0] + rows[-1]) / 2 == 49.5


@pytest.mark.parametrize("padding", ["same", "symmetric"])
@pytest.mark.parametrize("resolution", [64, 75])
def test_cells_move_with_the_padding(padding, resolution):
    """What each cell sees, by the gradient of a network of positive weights, against its centre: one constant at all sizes."""
    net = tiny(padding, resolution)
    for name, value in net.state_dict().items():
        value.fill_(1.0 if name.endswith(("weight", "running_var")) else 0.0)
    differences = []
    for height in (64, 65, 66, 68, 71, 72, 75, 79, 96):
        for target, cell in (("features", 4), ("stride4", 7)):
            x = torch.ones(1, 3, height, 40, requires_grad=True)
            y = net.features(x) if target == "features" else net.stages(x)[target]
            (seen,) = torch.autograd.grad(y[:, :, cell].sum(), x)
            weights = seen.sum((0, 1, 3))
            centre = float((weights * torch.arange(height)).sum() / weights.sum())
            rows, _ = cell_centres(net, (height, 40), target)
            assert len(rows) == y.shape[2]
            differences.append((target, round(float(rows[cell]) - centre, 3)))
    assert len(set(differences)) == 2, differences
    assert all(abs(d) <= 4 for _, d in differences)


def test_peak_is_the_largest_cells_centre():
    grid = torch.zeros(4, 4)
    grid[2, 1] = 1
    assert peak(grid, (64, 64)) == (0.625, 0.375)
    assert peak(grid, (32, 32), cell_centres(tiny(resolution=32), (32, 32))) == (0.625, 0.375)
    assert peak(torch.ones(4, 4), (64, 64)) is None
    heat = upsample(grid, (32, 32), cell_centres(tiny(resolution=32), (32, 32)))
    assert divmod(int(heat.argmax()), 32) in [(r, c) for r in (19, 20) for c in (11, 12)]
    assert peak(torch.eye(9)[8:].T, (65, 8), (torch.arange(9) * 8.0 + 3, torch.zeros(1)))[0] == 1.0  # beyond the edge: on it


def test_overlay_by_value():
    image = np.full((2, 3, 3), 100, np.uint8)
    drawn = overlay(image, torch.tensor([[0.0, 1, 2], [2, 1, 0]]))
    assert drawn.dtype == np.uint8
    low, high = palette(np.array(0.0)), palette(np.array(1.0))
    assert np.abs(drawn[0, 0] - (0.6 * low + 40)).max() <= 0.51
    assert np.abs(drawn[0, 2] - (0.6 * high + 40)).max() <= 0.51
    assert np.array_equal(drawn[0], drawn[1, ::-1])
    for constant in (0.0, -7.5):
        assert (overlay(image[:, :, :1], np.full((2, 3), constant)) == drawn[0, 0]).all()
    for wrong in (np.zeros((3, 2)), np.array([[0, 1, np.nan]] * 2)):
        with pytest.raises(ValueError, match="overlay"):
            overlay(image, wrong)


def test_the_colours_rise_in_grey_print():
    grey = palette(np.linspace(0, 1, 256)) @ [0.299, 0.587, 0.114]
    assert (np.diff(grey) > -0.3).all()
    assert grey[0] < 5
    assert grey[-1] > 230


# ----------------------------------------------------------------------------------------------------------- real weights


@pytest.fixture(scope="module")
def pretrained(shared):
    net = ts.build(ts.arch("efficientnetv2_b0"))
    return ts.load_weights(net, shared / "weights/efficientnetv2_b0/tf_efficientnetv2_b0.timm.safetensors").eval()


@pytest.fixture(scope="module")
def objects(shared):
    """Class index -> a picture that its object fills."""
    files = {388: shared / "data/efficientnet-sample/img.jpg", 1: shared / "data/imagenet-samples/n01443537/n01443537_goldfish.JPEG"}
    return {index: Image.open(file).convert("RGB") for index, file in files.items()}


def scene(picture, side, top, left, size):
    """The picture shrunk to a square at a place in grey noise, normalised as ImageNet networks take it."""
    canvas = np.random.default_rng(0).normal(124, 12, (size, size, 3)).clip(0, 255).astype(np.uint8)
    canvas[top : top + side, left : left + side] = np.array(picture.resize((side, side)))
    preprocess = ts.Preprocess(size)
    return torch.from_numpy(((canvas - np.array(preprocess.mean)) / np.array(preprocess.std)).transpose(2, 0, 1)).float()


@pytest.mark.parametrize("index", [388, 1])
def test_the_maximum_is_in_the_quadrant_of_the_object(pretrained, objects, index):
    corners = [(top, left) for top in (32, 256) for left in (32, 256)]
    x = torch.stack([scene(objects[index], 160, top, left, 448) for top, left in corners])
    maps = class_activation(pretrained, x, [index] * 4)
    for grid, (top, left) in zip(maps, corners, strict=True):
        row, column = peak(grid, (448, 448), cell_centres(pretrained, (448, 448)))
        assert (row > 0.5, column > 0.5) == (top > 224, left > 224)
        assert top <= 448 * row <= top + 160
        assert left <= 448 * column <= left + 160


def test_places_hold_at_sizes_that_the_stride_does_not_divide(pretrained, objects):
    """The map's centroid against the object's centre, column by column, each picture mirrored too so that its shape cancels.

    What is left is the network's own: a sixth of a cell to the left at every size. Evenly spread cells would wander.
    """
    rng, side, found, even = np.random.default_rng(1), 88, [], []
    for size in (224, 225, 321):
        centres, errors = cell_centres(pretrained, (size, size))[1], []
        for index, picture in objects.items():
            places = rng.integers(0, size - side, (6, 2))
            for view in (picture, ImageOps.mirror(picture)):
                maps = class_activation(pretrained, torch.stack([scene(view, side, *place, size) for place in places]), [index] * 6).relu()
                maps = maps * (maps > 0.3 * maps.amax((1, 2), keepdim=True))
                weights = maps.sum(1) / maps.sum((1, 2))[:, None]
                true = torch.from_numpy(places[:, 1]) + (side - 1) / 2
                spread = (torch.arange(len(centres)) + 0.5) * size / len(centres) - 0.5
                errors.append([(float(w @ centres - t), float(w @ spread - t)) for w, t in zip(weights, true, strict=True)])
        ours, theirs = np.mean(errors, (0, 1))
        found.append(ours)
        even.append(theirs)
    assert max(map(abs, found)) < 8
    assert np.ptp(found) < 3
    assert np.ptp(even) > 10


# ------------------------------------------------------------------------------------------------------------ the command


class Page(HTMLParser):
    """The texts, tags and attributes of a page."""

    def __init__(self, html):
        super().__init__()
        self.texts, self.tags, self.links = [], [], []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "srcset", "onerror")]

    def handle_data(self, data):
        self.texts.append(data.strip())


@pytest.fixture
def run(monkeypatch, capfd, tmp_path):
    """`run(*arguments)`: triscale explain in this process and a folder of its own; (status, output, errors)."""
    monkeypatch.setitem(cli.COMMANDS, "explain", ("commands.explaining", ""))
    monkeypatch.chdir(tmp_path)
    before = signal.getsignal(signal.SIGTERM)

    def call(*arguments):
        capfd.readouterr()
        with pytest.raises(SystemExit) as status:
            cli.main(["explain", *map(str, arguments)])
        out = capfd.readouterr()
        return status.value.code, out.out, out.err

    yield call
    signal.signal(signal.SIGTERM, before)


NAMES = ("<script>alert(1)</script>", 'a "quoted" & b', "smooth")


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(1)
    net = tiny()
    save_model(tmp_path / "net.safetensors", net, ModelCard(net.arch, ts.Preprocess(64), NAMES))
    return tmp_path / "net.safetensors"


def noise(path, size=(50, 40)):
    Image.fromarray(np.random.default_rng(2).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).save(path)
    return path


def test_a_photo_end_to_end(run, shared, pretrained, tmp_path):
    with open(shared / "data/imagenet-samples/labels.csv", encoding="utf-8") as file:
        names = tuple(row["name"] for row in csv.DictReader(file))
    save_model("net.safetensors", pretrained, ModelCard(pretrained.arch, ts.Preprocess(224), names))
    photo = shared / "data/efficientnet-sample/img.jpg"
    status, out, _ = run(photo, "--weights", "net.safetensors", "--compare", "net.safetensors", "--top", 2, "--out", "seen")
    assert status == 0
    rows = [line.replace(str(photo), "").split() for line in out.splitlines() if " panda " in line]
    assert [row[-8:-6] for row in rows] == [["giant", "panda"]] * 2 + [["lesser", "panda"]] * 2
    for row in rows[:2]:  # on the head and shoulders, right of the middle
        assert float(row[-6]) > 50
        assert 40 < float(row[-4]) < 80
        assert 50 < float(row[-2]) < 80
    assert sorted(p.name for p in (tmp_path / "seen").iterdir()) == ["explain.html", "img.png"]
    picture = Image.open(tmp_path / "seen" / "img.png")
    assert (picture.size, picture.mode) == ((16 + 3 * (288 + 16), 2 * 16 + 4 * 22 + 2 * (22 + 288 + 16)), "RGB")
    page = Page((tmp_path / "seen" / "explain.html").read_text())
    assert page.texts.count("giant panda") == page.texts.count("lesser panda") == 2
    assert page.tags.count("img") == 1 + 1 + 4
    assert all(link.startswith("data:image/") for link in page.links)
    assert "efficientnetv2_b0 (net.safetensors)" in page.texts


def test_names_are_escaped_and_bad_files_are_passed_over(run, model, tmp_path):
    odd = noise(tmp_path / "<script>'x\".png")
    (tmp_path / "bad.jpg").write_bytes(b"\xff\xd8\xff no more")
    (tmp_path / "other").mkdir()
    noise(tmp_path / "other" / "<script>'x\".jpg")
    status, out, errors = run(odd, "bad.jpg", "other", "--weights", model, "--top", 3)
    assert status == 1
    assert errors.splitlines()[0].startswith("triscale explain: bad.jpg: ")
    assert "1 of 3 files" in errors.splitlines()[1]
    assert len(errors.splitlines()) == 2
    assert all(out.count(name) == 2 for name in NAMES)
    folder = tmp_path / "runs" / "explain"
    assert {p.name for p in folder.iterdir()} == {"<script>'x\".png", "<script>'x\"-2.png", "explain.html"}
    page = Page((folder / "explain.html").read_text())
    assert "script" not in page.tags
    assert all(page.texts.count(name) == 2 for name in NAMES)
    assert str(odd) in page.texts
    assert run("bad.jpg", "missing.png", "--weights", model)[0] == 2


def test_options(run, model, tmp_path):
    noise(tmp_path / "a.png")
    status, out, _ = run("a.png", "--weights", model, "--class-name", "smooth", "--method", "gradcam", "--size", 70)
    assert status == 0
    assert out.splitlines()[2].split()[:3] == ["a.png", "tiny", "smooth"]
    page = (tmp_path / "runs" / "explain" / "explain.html").read_text()
    assert "70 px" in page
    assert "Selvaraju" in page
    assert "Zhou" not in page
    before = sorted(tmp_path.rglob("*"))
    for arguments, words in (
        (("--class-name", "smoth"), "'smooth'"),
        (("--top", 0), "--top"),
        (("--top", 2, "--class-name", "smooth"), "--top"),
        (("--size", 0), "size"),
        (("--compare", "none.safetensors"), "none.safetensors"),
        (("--out", "."), "exists already"),
        (("--out", "a.png"), "exists already"),
    ):
        status, _, errors = run("a.png", "--weights", model, *arguments)
        assert (status, len(errors.splitlines())) == (2, 1), errors
        assert words in errors
    assert sorted(tmp_path.rglob("*")) == before


def test_no_file_to_be_explained_is_overwritten(run, model, tmp_path):
    noise(tmp_path / "a.png")
    assert run("a.png", "--weights", model)[0] == 0
    drawn = tmp_path / "runs" / "explain" / "a.png"
    content = drawn.read_bytes()
    assert run(drawn, "--weights", model)[0] == 0
    assert drawn.read_bytes() == content
    assert drawn.with_name("a-2.png").is_file()


def test_a_grey_network_and_what_a_stop_leaves(run, tmp_path, monkeypatch):
    from triscale.commands import overlay_sheet

    torch.manual_seed(0)
    net = ts.build(tiny().arch, 2, 1)
    save_model("grey.safetensors", net, ModelCard(net.arch, ts.Preprocess(48, mean=(127.5,), std=(127.5,)), ("x", "y")))
    for name in ("a", "b", "c"):
        noise(tmp_path / f"{name}.png")
    drawn, save = [], overlay_sheet.save_picture

    def stop_at_the_second(path, *rest):
        if drawn:
            raise KeyboardInterrupt
        drawn.append(path.name)
        save(path, *rest)

    monkeypatch.setattr(overlay_sheet, "save_picture", stop_at_the_second)
    assert run("a.png", "b.png", "c.png", "--weights", "grey.safetensors")[0] == 3
    assert sorted(p.name for p in (tmp_path / "runs" / "explain").iterdir()) == ["a.png", "explain.html"]
    page = Page((tmp_path / "runs" / "explain" / "explain.html").read_text())
    assert "a.png" in page.texts
    assert "b.png" not in page.texts
