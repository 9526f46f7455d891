"""Optimised networks: the steps that networks come down to, the engines that run them, the choice between them, and what is told."""

import copy
import json
import os
import pickle
import subprocess
import sys
import threading
import time
import warnings
from functools import partial

import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import DEVICE, HAVE_TRITON, INTERPRETED, runs_here
from networks import images, randomise
from strategies import archs
from torch.nn.utils.prune import l1_unstructured

import triscale as ts
from triscale.blocks import BatchNorm
from triscale.data.decode import decode
from triscale.data.fast import evaluate_into
from triscale.inference import OptimizeWarning, notices, onednn, optimize, tuning
from triscale.inference.agreement import agree, no_worse
from triscale.inference.cpu import bfloat16_is_native
from triscale.inference.executor import Torch, execute
from triscale.inference.lowering import lower, plain_kinds
from triscale.inference.onednn import OneDNN
from triscale.inference.steps import ExpandDepthwise, Plain, Project, Window
from triscale.inference.tuning import Choices, measure
from triscale.weights.open import open_model

FAMILIES = ("efficientnet_b0", "efficientnetv2_b0", "mobilenet_v2", "mnasnet_a1", "resnet18", "efficientnet_lite0", "resnet50", "mobilenet_v1")
V2 = "weights/efficientnetv2_b0/tf_efficientnetv2_b0.timm.safetensors"
LAST = torch.channels_last
CHANGES_LOGITS = "computes in bfloat16, the faster arithmetic here, which changes logits by a hundredth or so; precision='float32' doesn't"
exact = partial(optimize, precision="float32")
needs_onednn = pytest.mark.skipif(not onednn.available(), reason="this torch has no oneDNN operators")
needs_bfloat16 = pytest.mark.skipif(not (onednn.available() and bfloat16_is_native()), reason="this processor has no bfloat16 arithmetic")


def settled(arch, classes=10, seed=0):
    """In evaluation, with norms away from their start whose statistics are those of their own inputs."""
    torch.manual_seed(seed)
    net = ts.build(arch, classes)
    for m in net.modules():
        if isinstance(m, BatchNorm):
            m.momentum = 1.0
            m.weight.data.uniform_(0.5, 1.5)
            m.bias.data.normal_(0, 0.2)
    with torch.no_grad():
        net(images(8, (64, 64), seed + 1))
    return net.eval()


def relative(got, expected):
    return ((got - expected).norm() / expected.norm()).item()


def largest(got, expected):
    return ((got - expected).abs().max() / expected.abs().max()).item()


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty cache."""
    monkeypatch.setenv("TRISCALE_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "tuning"


@pytest.fixture
def told():
    return []


@pytest.fixture(scope="module")
def b0():
    """A quarter as wide, for the tests that need no more."""
    return settled(ts.scale(ts.arch("efficientnet_b0"), width=0.25))


@pytest.fixture(autouse=True)
def no_autograd():
    with torch.no_grad():
        yield


# The steps.


@pytest.mark.parametrize("name", FAMILIES)
def test_steps_are_the_network(name):
    net = settled(ts.arch(name)).double()
    steps = lower(net, torch.float64)
    assert plain_kinds(steps) == []
    for size in ((64, 64), (75, 50)):
        x = images(2, size, 1, torch.float64).contiguous(memory_format=LAST)
        kept, expected = x.clone(), net(x)
        assert (expected[0] - expected[1]).abs().max() > 0.05 * expected.abs().max()
        assert largest(execute(Torch(), steps, x), expected) < 1e-10
        assert torch.equal(x, kept)


@settings(max_examples=10, deadline=None)
@given(archs(), st.tuples(*[st.integers(1, 40)] * 2), st.tuples(*[st.integers(1, 40)] * 2), st.integers(0, 99), st.sampled_from((0, 5)))
def test_any_network_by_its_steps_and_through_onednn(arch, size, other, seed, classes):
    """Every block, shortcut, padding, activation and odd size; weights packed for one size serve the other, after which the first comes again."""
    torch.manual_seed(seed)
    net = ts.build(arch, classes, 1 + seed % 4).eval()
    for m in net.modules():
        if isinstance(m, BatchNorm):
            m.running_mean.normal_(0, 0.3)
            m.running_var.uniform_(0.5, 1.5)
    batches = [torch.randn(2, net.in_channels, *s) for s in (size, other)]
    expected = [copy.deepcopy(net).double()(x.double()) for x in batches]
    engines = [(Torch(), torch.float64, 1e-9), (Torch(), torch.float32, 1e-4)]
    if onednn.available():
        engines += [(OneDNN(fuse=fuse), torch.float32, 1e-4) for fuse in (True, False)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # determinism, of an operator that has none on a GPU
        torch.use_deterministic_algorithms(True)  # what torch allocates starts as NaN
    try:
        for engine, dtype, tolerance in engines:
            steps = lower(copy.deepcopy(net).to(dtype), dtype)
            for i in (0, 1, 0):
                got = execute(engine, steps, batches[i].to(dtype).contiguous(memory_format=LAST))
                assert got.shape == expected[i].shape
                assert (got - expected[i]).abs().max() <= tolerance * expected[i].abs().max().clamp_min(1e-6), type(engine)
    finally:
        torch.use_deterministic_algorithms(False)


def test_steps_are_data():
    """What B0 comes down to, and how it is laid out."""
    net = settled(ts.arch("efficientnet_b0"))
    steps = lower(net)
    assert [type(s).__name__ for s in steps[:9]] == [
        *("Stem", "Depthwise", "Squeeze", "Project", "ExpandDepthwise", "Squeeze", "Project", "Keep", "ExpandDepthwise"),
    ]
    assert [type(s).__name__ for s in steps[-2:]] == ["Head", "Classifier"]
    inner = steps[4]
    assert isinstance(inner, ExpandDepthwise)
    assert inner.expand.weight.shape == (16, 96)
    assert inner.depthwise.weight.shape == (3, 3, 96)
    assert inner.depthwise.window == Window(3, 2, True)
    assert inner.depthwise.pool
    assert sum(isinstance(s, Project) and s.residual for s in steps) == sum(b.shortcut == "identity" for b in net.arch.blocks()) == 9
    own = [t for s in steps for t in vars(s).values() if isinstance(t, torch.Tensor)]
    assert all(t.is_contiguous() and t.dtype == torch.float32 and not t.requires_grad for t in own)
    low = lower(net, torch.bfloat16)
    assert [t.dtype for t in (low[0].weight, low[4].expand.weight, low[4].expand.bias, low[4].depthwise.weight, low[-1].weight)] == [
        *(torch.float32, torch.bfloat16, torch.float32, torch.float32, torch.float32),
    ]


def test_a_window_pads_from_the_image_that_comes():
    assert Window(3, 2, True).pad(224, 225) == (0, 1, 1, 1)
    assert Window(5, 2, True).pad(14, 15) == (1, 2, 2, 2)
    assert Window(5, 2, False).pad(14, 15) == (2, 2, 2, 2)
    assert Window(3, 2, True).out(7, 8) == (4, 4)


def test_steps_are_a_snapshot(b0):
    net = copy.deepcopy(b0)
    x = images(2, (32, 32), 3).contiguous(memory_format=LAST)
    steps, before = lower(net), net(x)
    for p in net.parameters():
        p.zero_()
    assert largest(execute(Torch(), steps, x), before) < 1e-5


class Doubled(torch.nn.Module):
    def forward(self, x):
        return 2 * x


CHANGES = {
    "a hook in a block": lambda net: net.body[1][0].depthwise.conv.register_forward_hook(lambda m, i, o: 2 * o),
    "a hook of the head": lambda net: net.head.register_forward_pre_hook(lambda m, i: (i[0] + 1,)),
    "a block exchanged": lambda net: net.body[1].__setitem__(1, torch.nn.Hardswish()),
    "a projection exchanged": lambda net: setattr(net.body[1][1].project, "norm", torch.nn.Identity()),
    "squeeze-excitation removed": lambda net: setattr(net.body[2][1], "se", torch.nn.Identity()),
    "weights parametrised": lambda net: torch.nn.utils.parametrize.register_parametrization(net.body[3][0].expand.conv, "weight", Doubled()),
    "a convolution dilated": lambda net: (
        setattr(net.body[4][1].depthwise.conv, "dilation", (2, 2)) or setattr(net.body[4][1].depthwise.conv, "padding", (4, 4))
    ),
    "a classifier of two layers": lambda net: setattr(net, "classifier", torch.nn.Sequential(torch.nn.Linear(320, 8), torch.nn.Linear(8, 4))),
    "a classifier for other classes": lambda net: setattr(net, "classifier", torch.nn.Linear(320, 4)),
    "a stem exchanged": lambda net: setattr(net, "stem", torch.nn.Conv2d(3, 8, 3, 2)),
    "a block's forward exchanged": lambda net: setattr(net.body[2][1], "forward", lambda x: 2 * x),
    "a block removed": lambda net: net.body[2].__delitem__(1),
    "a block added": lambda net: net.body[2].append(torch.nn.Hardswish()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_not_as_built_runs_as_it_is(b0, change, told):
    net = copy.deepcopy(b0)
    CHANGES[change](net)
    net = net.double().eval()
    x = images(2, (64, 64), 3, torch.float64).contiguous(memory_format=LAST)
    steps = lower(net, torch.float64)
    assert largest(execute(Torch(), steps, x), net(x)) < 1e-9
    assert largest(net(x), b0(x.float())[:, : net(x).shape[1]].double()) > 1e-3
    plain = change != "a classifier for other classes"
    assert sum(isinstance(s, Plain) for s in steps) == plain
    net = net.float()
    out, x = exact(net, tell=told.append), images(2, (64, 64), 3)
    assert largest(out(x), net(x)) < 1e-2  # without its norm the stem gives large values
    if "hook" in change:  # they see what passes, so nothing less than the network will do
        assert told == ["optimize: the network has hooks; the network runs as it is"]
    else:
        assert [text.endswith("these parts run as they are") for text in told] == [True] * plain


def test_adversarial_norms_fold_the_one_that_is_on(b0):
    net = copy.deepcopy(b0)
    for m in [m for m in net.modules() if isinstance(m, BatchNorm)]:
        m.auxiliary = BatchNorm(m.num_features, net.arch.numerics)
        m.auxiliary.switch = m.switch
    net.eval()
    x = images(2, (32, 32), 3).contiguous(memory_format=LAST)
    main = execute(Torch(), lower(net), x)
    for m in net.modules():
        if isinstance(m, BatchNorm) and m.auxiliary is not None:
            m.switch.on = True
    assert largest(execute(Torch(), lower(net), x), net(x)) < 1e-5
    assert largest(main, net(x)) > 1e-2


# The CPU engine.


@needs_onednn
@pytest.mark.parametrize("name", FAMILIES[:6])
def test_onednn_gives_the_networks_logits(name):
    net = settled(ts.arch(name))
    steps, engines = lower(net), [OneDNN(fuse=fuse) for fuse in (True, False)]
    for n, size in ((1, (64, 64)), (3, (75, 50)), (2, (64, 64))):
        x = images(n, size, 1).contiguous(memory_format=LAST)
        for engine in engines:
            assert largest(execute(engine, steps, x), net(x)) < 1e-4


@needs_bfloat16
def test_bfloat16_keeps_the_classes(shared, home, told):
    """V2-B0's own weights on real pictures."""
    net, card = open_model(shared / V2)
    files = sorted((shared / "data/imagenet-samples").rglob("*.JPEG"))[::16]
    x = torch.empty(len(files), 224, 224, 3)
    for place, file in zip(x, files, strict=True):
        evaluate_into(place, decode(file), card.preprocess)
    x = x.permute(0, 3, 1, 2)
    expected = torch.cat([net(part) for part in x.split(8)])
    for fuse in (True, False):
        steps = lower(net, torch.bfloat16)
        got = torch.cat([execute(OneDNN(fuse=fuse), steps, part.bfloat16().contiguous(memory_format=LAST)) for part in x.split(8)])
        assert got.dtype == torch.float32
        assert 1e-4 < relative(got, expected) < 0.03
        assert torch.equal(got.argmax(1), expected.argmax(1))
    out = optimize(net, precision="bfloat16", tell=told.append)
    assert relative(out(x[:2]), expected[:2]) < 0.03
    assert not any("left out" in text for text in told)
    (question,) = (json.loads(p.read_text())["of"] for p in home.iterdir())
    assert question["dtypes"] == ["torch.bfloat16"]


def test_optimised_networks_are_the_network(b0, home, told):
    net = copy.deepcopy(b0)
    out = ts.optimize(net, precision="float32", tell=told.append)
    for n, size in ((2, (64, 64)), (5, (64, 64)), (1, (70, 64))):
        x = images(n, size, 1)
        assert largest(out(x), net(x)) < 1e-4
    with torch.inference_mode():
        assert largest(out(images(1, (64, 64), 1)), net(images(1, (64, 64), 1))) < 1e-4
    assert out(x.bfloat16()).dtype == torch.bfloat16
    assert (out.arch, out.num_classes, out.in_channels, out.training) == (net.arch, 10, 3, False)
    assert list(out.stages(x)) == list(net.stages(x))
    assert told == []
    with pytest.raises(AttributeError, match="stagse"):
        _ = out.stagse


@needs_bfloat16
def test_bfloat16_is_taken_where_it_is_faster_and_said_once(shared, home, told):
    net, x = open_model(shared / V2)[0], images(2, (96, 96), 1)
    expected = net(x)
    optimize(net, tell=told.append)(x)
    (path,) = home.iterdir()
    data = json.loads(path.read_text())
    assert data["of"]["dtypes"] == ["torch.bfloat16", "torch.float32"]
    assert {"plain", "onednn fused bfloat16"} <= set(data["seconds"])
    told.clear()
    for choice in ("onednn", "onednn bfloat16"):  # whichever was faster this time
        path.write_text(json.dumps({**data, "choice": choice}))
        assert 1e-4 < relative(optimize(net, tell=told.append)(x), expected) < 0.05 or choice == "onednn"
        assert largest(exact(net, tell=told.append)(x), expected) < 1e-4
        assert told == [f"optimize: {CHANGES_LOGITS}"] * (choice == "onednn bfloat16")

    # Other weights of this network, whose logits are small beside what they are sums of: bfloat16 rounds them away.
    told.clear()
    net.classifier.weight.sub_(net.classifier.weight.mean(1, keepdim=True))
    net.head.norm.bias.add_(1000)
    net.classifier.bias.sub_(net(x).mean(0))
    assert largest(optimize(net, tell=told.append)(x), net(x)) < 1e-2
    assert told == ["optimize: bfloat16 gives other logits than the network and is left out"]


def test_random_numbers_go_on_as_if_nothing_had_been(b0, home):
    torch.manual_seed(3)
    expected = torch.randn(3)
    torch.manual_seed(3)
    exact(b0, (1, 3, 32, 32))
    assert torch.equal(torch.randn(3), expected)


def test_a_copy_computes_the_same(b0, home):
    out = exact(b0)
    x = images(2, (64, 64), 1)
    expected = out(x)
    for other in (copy.deepcopy(out), pickle.loads(pickle.dumps(out)), exact(out), out.eval()):
        assert largest(other(x), expected) < 1e-5


def test_weights_are_read_again_after_to(b0, home, told):
    out = exact(copy.deepcopy(b0), tell=told.append)
    x = images(2, (64, 64), 1)
    before = out(x)
    for p in out.net.classifier.parameters():
        p.mul_(2)
    assert torch.equal(out(x), before)
    assert largest(out.to(memory_format=LAST)(x), 2 * before) < 1e-5
    assert largest(out.double()(x.double()), 2 * before.double()) < 1e-4
    assert told == ["optimize: float64 has no faster way; the network runs as it is"]


def test_weights_are_a_copy_until_they_are_loaded_anew(b0, home, told):
    net = copy.deepcopy(b0)
    out, x = exact(net, tell=told.append), images(2, (64, 64), 1)
    before = out(x)
    net.classifier.weight.mul_(2)
    net.classifier.bias.mul_(2)
    for size in ((64, 64), (50, 50)):  # one that was measured before the change, and one after
        y = images(2, size, 1)
        assert largest(out(y), b0(y)) < 1e-4
    assert told == []
    net.register_load_state_dict_pre_hook(lambda *args: out(x))  # as another thread may call meanwhile
    assert out.load_state_dict(out.state_dict()).missing_keys == []
    assert largest(out(x), 2 * before) < 1e-5
    net._load_state_dict_pre_hooks.clear()


def test_a_network_put_into_training_mode_is_refused(b0, home):
    net = copy.deepcopy(b0)
    out, norm = exact(net), net.stem.norm.running_mean.clone()
    net.train()
    with pytest.raises(ValueError, match="was put into training mode"):
        out(images(2, (64, 64), 1))
    assert torch.equal(net.stem.norm.running_mean, norm)


def test_what_autocast_does_outside_changes_nothing(b0, home, told):
    x = images(2, (64, 64), 1)
    out = exact(b0, tell=told.append)
    with torch.autocast("cpu", torch.bfloat16):
        inside = out(x)
    assert largest(inside, b0(x)) < 1e-4
    assert torch.equal(inside, out(x))
    assert told == []


def test_pixels_are_normalised(b0, home):
    net = copy.deepcopy(b0)
    pixels = (50 * images(2, (64, 64), 3) + 120).clamp(0, 255).to(torch.uint8)
    with pytest.raises(ValueError, match="uint8 images need the network's mean and std"):
        exact(net)(pixels)
    net.preprocess = ts.Preprocess(64, mean=(100.0, 110.0, 120.0), std=(50.0, 60.0, 70.0))
    x = (pixels - torch.tensor([100.0, 110.0, 120.0]).view(3, 1, 1)) / torch.tensor([50.0, 60.0, 70.0]).view(3, 1, 1)
    for engine in ("auto", "torch"):
        got = optimize(net, engine=engine, precision="float32" if engine == "auto" else None)(pixels)
        assert got.dtype == torch.float32
        assert largest(got, net(x)) < 1e-4


def test_threads_may_call_at_once(b0, home):
    out = exact(b0)
    batches = [images(2, (64, 64), i) for i in range(6)]
    got = {}

    def call(i):
        with torch.inference_mode():
            got[i] = out(batches[i])

    threads = [threading.Thread(target=call, args=(i,)) for i in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all(largest(got[i], b0(batches[i])) < 1e-4 for i in range(6))
    assert len(list(home.iterdir())) == 1  # measured once


# The choice.


def test_the_fastest_that_is_right_is_chosen():
    clock = {"wrong": 0.0, "slow": 0.03, "fast": 0.001, "never": 0.0}
    ran = []

    def call(name):
        ran.append(name)
        end = time.thread_time() + clock[name]
        while time.thread_time() < end:
            pass
        return name != "wrong"

    calls = {name: lambda n=name: call(n) for name in clock}
    found = measure(calls, call, budget=0.2)
    assert set(found) == {"slow", "fast", "never"}
    assert found["fast"] < found["slow"]
    assert ran.count("wrong") == 1 < ran.count("fast")
    ran.clear()
    found = measure(calls, call, budget=0.0)
    assert ran == ["wrong", *["slow", "fast"] * 2]  # at least two that are right, and beside the first run one that counts
    assert min(found, key=found.get) == "fast"


def test_choices_are_kept_and_used(b0, home, told):
    x = images(2, (64, 64), 1)
    first = exact(b0, (2, 3, 64, 64), tell=told.append)
    (path,) = home.iterdir()
    data = json.loads(path.read_text())
    assert data["choice"] in data["seconds"]
    assert min(data["seconds"], key=data["seconds"].get) == data["choice"]
    assert set(data["seconds"]) >= {"plain", "folded"}
    for choice in ("folded", "plain"):
        path.write_text(json.dumps({**data, "choice": choice}))
        out = exact(b0, tell=told.append)
        assert largest(out(x), first(x)) < 1e-5
        assert set(out.engine.ways) == {choice, "plain"}  # to hold it to; nothing else was tried
        assert out.engine.used == (choice,)
        assert json.loads(path.read_text())["choice"] == choice
    assert told == []


BROKEN = {
    "no JSON": (lambda data: "{", "can't be read"),
    "no UTF-8": (lambda data: b"\xff\xfe", "can't be read"),
    "too large": (lambda data: " " * (tuning.LARGEST + 1), "can't be read"),
    "deep": (lambda data: "[" * 100_000, "can't be read"),
    "a list": (lambda data: "[1]", "not a tuning file"),
    "another format": (lambda data: json.dumps({**data, "format": 2}), "not a tuning file"),
    "another question": (lambda data: json.dumps({**data, "of": {}}), "not a tuning file"),
    "no name": (lambda data: json.dumps({**data, "choice": 3}), "not a tuning file"),
    "another torch": (
        lambda data: json.dumps({**data, "versions": {"triscale": "0.1.0", "torch": "1.0"}}),
        "measured with triscale 0.1.0, torch 1.0",
    ),
    "no versions": (lambda data: json.dumps({**data, "versions": None}), "measured with unknown versions"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_files_that_say_nothing_are_told_and_written_over(home, told, case):
    make, expected = BROKEN[case]
    choices, question = Choices(told.append), {"network": "x", "shape": [1, 3, 32, 32]}
    choices.put(question, "onednn", {"onednn": 0.1, "other": float("inf")})
    assert choices.get(question) == "onednn"
    path = choices.path(question)
    body = make(json.loads(path.read_text()))
    path.write_bytes(body if isinstance(body, bytes) else body.encode())
    assert choices.get(question) is None
    assert len(told) == 1
    assert expected in told[0]
    assert str(path) in told[0]
    choices.put(question, "plain", {"plain": 0.1})
    assert choices.get(question) == "plain"


def test_an_unknown_choice_is_measured_again(b0, home):
    exact(b0, (2, 3, 64, 64))
    (path,) = home.iterdir()
    path.write_text(json.dumps({**json.loads(path.read_text()), "choice": "of tomorrow"}))
    exact(b0, (2, 3, 64, 64))
    assert json.loads(path.read_text())["choice"] != "of tomorrow"


def test_a_cache_that_can_t_be_written_is_told(b0, tmp_path, monkeypatch, told):
    (tmp_path / "home").write_text("a file\n")
    monkeypatch.setenv("TRISCALE_HOME", str(tmp_path / "home"))
    x = images(1, (64, 64), 1)
    assert largest(exact(b0, tell=told.append)(x), b0(x)) < 1e-4
    assert len(told) == 2  # neither read nor written
    assert "set TRISCALE_HOME to a folder that can be written" in told[1]


def test_networks_and_threads_are_told_apart(b0, home):
    exact(b0, (1, 3, 64, 64))
    exact(settled(ts.scale(ts.arch("mobilenet_v2"), width=0.25)), (1, 3, 64, 64))
    exact(b0, (2, 3, 64, 64))
    assert len(list(home.iterdir())) == 3
    exact(settled(b0.arch, seed=3), (1, 3, 64, 64))  # other weights are no other network
    assert len(list(home.iterdir())) == 3


def test_after_four_sizes_the_nearest_decides(b0, home):
    out = exact(b0)
    for side in (32, 48, 64, 96):
        out(images(1, (side, side), 1))
    kept = {path.name for path in home.iterdir()}
    assert len(kept) == 4
    out.engine.settled = {size: "folded" if size[1] == 96 else "plain" for size in out.engine.settled}
    for side, way in ((40, "plain"), (90, "folded"), (200, "folded")):
        x = images(1, (side, side), 1)
        assert largest(out(x), b0(x)) < 1e-4
        assert out.engine.chosen[torch.get_num_threads(), side, side] == way
    assert {path.name for path in home.iterdir()} == kept


@needs_onednn
def test_what_was_kept_is_held_to_the_network_again(b0, home, told, monkeypatch):
    """Another torch build of the same version, or an operator that takes other weights otherwise."""
    x = images(2, (64, 64), 1)
    exact(b0)(x)
    (path,) = home.iterdir()
    path.write_text(json.dumps({**json.loads(path.read_text()), "choice": "onednn"}))
    right = OneDNN.squeeze
    monkeypatch.setattr(OneDNN, "squeeze", lambda self, *args: right(self, *args) * 1.3)
    out = exact(b0, tell=told.append)
    assert largest(out(x), b0(x)) < 1e-4
    assert "optimize: 'onednn' gives other logits than the network and is left out" in told


def test_images_that_are_not_finite_decide_nothing(b0, home):
    x = images(2, (64, 64), 1)
    out = exact(b0)
    assert out(x * float("nan")).isnan().all()
    assert out.engine.used == ()
    assert not home.exists()
    x[1, 0, 3, 3] = float("nan")
    assert largest(out(x)[:1], b0(x)[:1]) < 1e-4
    assert out.engine.used != ()


@needs_onednn
@pytest.mark.parametrize("fault", ["wrong", "raises"])
def test_a_way_that_goes_wrong_is_left_out(b0, home, told, monkeypatch, fault):
    """As an operator that isn't public might, in a torch to come."""
    right = OneDNN.squeeze

    def broken(self, *args):
        if fault == "raises":
            raise RuntimeError("no such operator\nand more")
        return right(self, *args) * 1.001

    monkeypatch.setattr(OneDNN, "squeeze", broken)
    x = images(2, (64, 64), 1)
    assert largest(exact(b0, tell=told.append)(x), b0(x)) < 1e-5
    said = {"wrong": "gives other logits than the network and is left out", "raises": "doesn't run here and is left out (no such operator)"}[fault]
    assert told == [f"optimize: '{name}' {said}" for name in ("onednn fused", "onednn")]
    kept = [set(json.loads(p.read_text())["seconds"]) for p in home.glob("*.json")]
    assert kept == ([] if fault == "wrong" else [{"plain", "folded"}])  # on other images it may be right


def test_rounding_that_the_network_amplifies_is_held_against_no_way(home, told):
    """A random network whose last norms saw two values each: float32 gives it one figure."""
    torch.manual_seed(0)
    net, x = ts.build(ts.arch("efficientnet_b0"), 10), images(2, (32, 32), 1)
    randomise(net, x)
    assert largest(net(x), copy.deepcopy(net).double()(x.double())) > 1e-3
    exact(net, tell=told.append)(x)
    assert told == []
    assert set(json.loads(next(home.iterdir()).read_text())["seconds"]) >= {"plain", "folded"}


def test_without_onednn_s_operators_torch_s_own_serve(b0, home, told, monkeypatch):
    monkeypatch.setattr(onednn, "_OPERATORS", ("_no_such_operator",))
    assert not onednn.available()
    x = images(2, (64, 64), 1)
    assert largest(exact(b0, tell=told.append)(x), b0(x)) < 1e-5
    assert set(json.loads(next(home.iterdir()).read_text())["seconds"]) == {"plain", "folded"}
    assert told == []


def test_logits_agree_or_not():
    expected = torch.tensor([[1.0, -10.0]])
    assert agree(expected + 0.9e-3, expected, torch.float32)
    assert not agree(expected + 1.1e-3, expected, torch.float32)
    assert not agree(expected * torch.nan, expected, torch.float32)
    assert agree(expected + 0.3, expected, torch.bfloat16)
    assert not agree(expected + 0.6, expected, torch.bfloat16)
    assert not agree(expected * torch.nan, expected, torch.bfloat16)
    assert agree(expected, expected * torch.nan, torch.float32)  # broken weights are no way's fault


def test_commands_optimise_what_classifies_more_than_a_few_images(b0, home, capsys):
    from triscale.commands.running import FEW, EngineSpeed

    few, many, plain = (EngineSpeed(engine=e).prepare(copy.deepcopy(b0), n) for e, n in (("auto", FEW), ("auto", FEW + 1), ("torch", 10**6)))
    x = images(7, (32, 32), 1)
    assert torch.equal(few(x), plain(x))
    assert not home.exists()
    assert largest(many(x), plain(x)) < 1e-4
    assert len(list(home.iterdir())) == 1
    assert few.used == plain.used == ["eager"]
    assert len(many.used) == 1
    assert many.used != ["eager"]
    assert capsys.readouterr().err == ""


def test_bench_with_either_engine(home, capsys):
    from triscale.commands.measuring import bench

    for engine, how in ((None, "eager, channels-last, float32"), ("auto", "optimised (")):
        try:
            assert bench(["efficientnet_lite0"], runs=1, engine=engine) == 0
        finally:
            torch.set_flush_denormal(False)  # which the command sets for its process
        printed = capsys.readouterr().out
        assert how in printed
        assert "1 thread, 1 runs in turn" in printed
        assert home.exists() == (engine == "auto")


# What is refused, and what is told.


def test_mistakes_are_told(b0):
    net = copy.deepcopy(b0)
    with pytest.raises(ValueError, match=r"found training mode; call net\.eval\(\) first"):
        optimize(net.train())
    net.eval().body[0][0].depthwise.norm.train()
    with pytest.raises(ValueError, match="found training mode"):
        optimize(net)
    with pytest.raises(ValueError, match=r"made by triscale\.build, found Linear"):
        optimize(torch.nn.Linear(3, 3))
    with pytest.raises(ValueError, match="found Child"):
        optimize(type("Child", (ts.ConvNet,), {})(net.arch).eval())
    with pytest.raises(ValueError, match="unknown optimize: engine 'tritn'; nearest is 'triton'"):
        optimize(b0, engine="tritn")
    with pytest.raises(ValueError, match="unknown optimize: precision 'fp16'"):
        optimize(b0, precision="fp16")
    with pytest.raises(ValueError, match="expected precision float32 or bfloat16 on a CPU, found float16"):
        optimize(b0, precision="float16")
    with pytest.raises(ValueError, match="precision 'bfloat16' goes with the engines auto and triton"):
        optimize(b0, engine="torch", precision="bfloat16")
    for broken in (images(1, (64, 64), 1).long(), images(1, (64, 64), 1) > 0, images(1, (64, 64), 1).cfloat()):
        with pytest.raises(ValueError, match="expected float or uint8 images"):
            exact(b0)(broken)
    out = exact(b0)
    for shape in ((2, 4, 64, 64), (3, 64, 64), (2, 3, 64)):
        with pytest.raises(ValueError, match=r"expected float or uint8 images \(N, 3, H, W\) on cpu, found"):
            out(torch.zeros(shape))
    with pytest.raises(ValueError, match="can't be trained"):
        out.train()


@pytest.mark.skipif(INTERPRETED, reason="the interpreter stands in for a GPU")
def test_kernels_asked_for_and_not_there_are_refused(b0):
    with pytest.raises(ValueError, match="the GPU kernels need"):
        optimize(b0, engine="triton")


def test_without_triton_all_but_the_kernels_works(tmp_path):
    code = """
import sys
sys.modules["triton"] = None
import importlib.util, torch, triscale as ts
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name == "triton" else find(name, *more)
net = ts.build(ts.arch("mobilenet_v2"), 5).eval()
with torch.no_grad():
    print((ts.optimize(net, precision='float32')(torch.ones(1, 3, 32, 32)) - net(torch.ones(1, 3, 32, 32))).abs().max().item() < 1e-4)
try:
    ts.optimize(net, engine="triton")
except ValueError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert run.stdout == "True\noptimize: engine 'triton': the GPU kernels need Triton, which isn't installed: pip install triton\n", run.stderr


def test_the_plain_path_is_told_once(b0, home, told):
    net = copy.deepcopy(b0)
    out = exact(net, tell=told.append)
    x = images(1, (64, 64), 1)
    with torch.enable_grad():
        grad = x.clone().requires_grad_()
        for _ in range(2):
            out(grad).sum().backward()
    assert grad.grad.abs().sum() > 0
    assert out(x[:0]).shape == (0, 10)
    double = exact(copy.deepcopy(net).double(), tell=told.append)
    assert largest(double(x.double()), net(x).double()) < 1e-4
    net.register_forward_hook(lambda m, i, o: 3 * o)
    hooked = exact(net, tell=told.append)
    assert largest(hooked(x), 3 * b0(x)) < 1e-5
    reasons = ("a gradient is asked for", "there are no images", "float64 has no faster way", "the network has hooks")
    assert told == [f"optimize: {reason}; the network runs as it is" for reason in reasons]


def test_pixels_for_a_network_in_another_type(b0, home, told):
    pixels = (50 * images(2, (64, 64), 3) + 120).clamp(0, 255).to(torch.uint8)
    net = copy.deepcopy(b0)
    net.preprocess = ts.Preprocess(64)
    expected = optimize(net, engine="torch")(pixels)
    for change in (torch.float16, torch.float64):
        for engine in ("auto", "torch"):
            got = optimize(copy.deepcopy(net).to(change), engine=engine, tell=told.append)(pixels)
            assert got.dtype == torch.float32
            assert relative(got, expected) < (0.05 if change == torch.float16 else 1e-4)


def test_what_overflows_in_the_network_itself_excuses_nothing():
    """In float16 its logits are infinite, and anything would be within twice that."""
    net, x = torch.nn.Linear(2, 2), torch.full((3, 2), 6e4)
    net.weight.fill_(2.0)
    expected = net(x)
    assert not no_worse(torch.randn(3, 2), expected, net, x, torch.float16)
    assert no_worse(torch.randn(3, 2) + expected / 1e4, expected / 1e4, net, x / 1e4, torch.float16) is False
    assert no_worse(net(x / 1e4), net(x / 1e4), net, x / 1e4, torch.float16)


def test_half_precision_on_a_cpu_and_pruned_weights_run_as_they_are(b0, home, told):
    x = images(1, (64, 64), 1)
    half = copy.deepcopy(b0).half()
    assert torch.equal(optimize(half, tell=told.append)(x.half()), half(x.half()))
    pruned = copy.deepcopy(b0)
    with torch.enable_grad():
        l1_unstructured(pruned.body[1][0].expand.conv, "weight", 0.5)
    assert largest(exact(pruned, tell=told.append)(x), pruned(x)) < 1e-6
    assert [text.split(";")[0].split("(")[0] for text in told] == [
        "optimize: float16 has no faster way on a CPU",
        "optimize: the network has hooks",
    ]


def test_odd_surroundings(b0, home, told, monkeypatch):
    """No preprocess, another default device and type, no home."""
    net, x = copy.deepcopy(b0), images(1, (64, 64), 1)
    net.preprocess = None
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            out = exact(net, (1, 3, 64, 64), tell=told.append)
        assert largest(out(x), b0(x)) < 1e-4
    finally:
        torch.set_default_dtype(torch.float32)
    assert told == []
    monkeypatch.delenv("TRISCALE_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert largest(exact(net, tell=told.append)(x), b0(x)) < 1e-4
    assert told == ["optimize: what is measured can't be kept: no home directory for the cache; set TRISCALE_HOME to a folder that can be written"]


@needs_bfloat16
def test_a_bfloat16_network_in_float32_is_computed_in_float32(b0, home, told):
    net, x = copy.deepcopy(b0).bfloat16(), images(2, (64, 64), 1)
    expected = copy.deepcopy(net).float()(x)
    assert largest(exact(net, tell=told.append)(x), expected) < 1e-4
    assert told == []


def test_warnings_come_once_a_process_and_point_at_the_caller(b0, monkeypatch):
    monkeypatch.setattr(notices, "_told", set())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            exact(copy.deepcopy(b0).double())(images(1, (32, 32), 1, torch.float64))
    assert [(w.category, w.filename) for w in caught] == [(OptimizeWarning, __file__)]


def test_a_processor_without_bfloat16_takes_float32(b0, home, told, monkeypatch):
    from triscale.inference import network

    monkeypatch.setattr(network, "bfloat16_is_native", lambda: False)
    x = images(1, (64, 64), 1)
    assert largest(optimize(b0, precision="bfloat16", tell=told.append)(x), b0(x)) < 1e-5
    assert told == ["optimize: this processor has no bfloat16 arithmetic; float32 is used"]


def test_compiling_is_tried_where_asked_for(b0, home, told, monkeypatch):
    """Without a compiler, whose absence is told: compiling takes a minute."""
    monkeypatch.setattr(torch, "compile", lambda net, **options: lambda x: (_ for _ in ()).throw(RuntimeError("no C++ compiler")))
    x = images(1, (64, 64), 1)
    assert largest(exact(b0, compile=True, tell=told.append)(x), b0(x)) < 1e-4
    assert told == ["optimize: 'compiled' doesn't run here and is left out (no C++ compiler)"]


@pytest.mark.skipif(not HAVE_TRITON or INTERPRETED, reason="Triton isn't there, or measures nothing under the interpreter")
def test_configurations_are_measured_once_and_kept(home, told, monkeypatch):
    """The GPU's clock stands in for a GPU; all else is real."""
    from triscale.inference import kernel_tuning as gpu

    took = {"a": 3.0, "c": 1.0, "d": 2.0, "e": 0.5}
    measured = []
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU of test")
    monkeypatch.setattr(gpu, "_seconds", lambda run: took[run()])

    def run(config):
        measured.append(config)
        if config in "bf":
            raise RuntimeError("PassManager::run failed\nin full")
        return config

    def tune(n=1, configs="abcde"):
        return gpu.Tuner(torch.device("cpu"), torch.bfloat16, told.append)("pointwise", {"n": n}, lambda: list(configs), run)

    assert tune() == "c"
    assert sorted(measured[: gpu.TRIED]) == list("abcd")  # compiled at once, in any order
    assert measured[gpu.TRIED :] == list("acdc")  # measured, and run
    assert tune() == "c"
    assert measured[8:] == ["c"]
    assert tune(configs="a") == "a"  # nothing to choose
    assert tune(n=2) == "c"
    assert tune(configs="abde") == "e"  # "c" is none of them any more
    count = len(measured)
    assert tune(configs="abde") == "e"
    assert measured[count:] == ["e"]
    assert all("measuring kernels on GPU of test" in text for text in told)
    for configs in ("bf", "b", ""):
        with pytest.raises(gpu.NoConfigurationError, match="PassManager::run failed$" if configs else "no way to cut it that fits"):
            tune(n=3, configs=configs)
    tuner = gpu.Tuner(torch.device("cpu"), torch.bfloat16, told.append)
    tuner.measures = False
    measured.clear()
    for _ in range(2):
        assert tuner("pointwise", {"n": 4}, lambda: list("bac"), run) == "a"  # the likely fastest that runs, for now
    assert measured == ["b", "a", "a"]
    assert tuner.found == {}
    tuner.measures = True
    assert tuner("pointwise", {"n": 4}, lambda: list("bac"), run) == "c"
    monkeypatch.setattr(gpu, "_seconds", lambda run: (_ for _ in ()).throw(torch.OutOfMemoryError("too large")))
    assert tuner("pointwise", {"n": 5}, lambda: list("bac"), run) == "a"  # no memory to measure: the likely fastest


# The kernels, on a GPU or through Triton's interpreter.

if runs_here():

    @pytest.fixture
    def quick(monkeypatch):
        """One configuration of each kernel: compiling takes most of the time on a GPU."""
        from triscale.inference import kernel_tuning

        monkeypatch.setattr(kernel_tuning, "TRIED", 1)

    @pytest.mark.gpu
    @pytest.mark.usefixtures("quick")
    @pytest.mark.parametrize("name", ["efficientnet_b0", "efficientnetv2_b0", "mobilenet_v2"])
    def test_networks_through_the_kernels(name, home, told):
        """float16, whose rounding a random network amplifies the least; no worse than torch's own float16."""
        net = settled(ts.arch(name)).to(DEVICE)
        net.preprocess = ts.Preprocess(64)
        x = images(1 if INTERPRETED else 4, (64, 64), 1).to(DEVICE)
        out = optimize(net, engine="triton", precision="float16", tell=told.append)
        got, plain = out(x), copy.deepcopy(net).half()(x.half())
        expected = copy.deepcopy(net).double()(x.double())
        assert got.dtype == torch.float32
        assert relative(got, expected) < max(0.02, 1.2 * relative(plain, expected))
        assert not [text for text in told if "measuring kernels" not in text]
        assert out.engine.used == ("kernels float16",)
        if not INTERPRETED:  # the second call is the graph's alone, and shapes take turns
            assert torch.equal(out(x), got)
            assert relative(out(x[:1]), expected[:1]) < max(0.02, 1.2 * relative(plain, expected))
            assert torch.equal(out(x), got)

    @pytest.mark.gpu
    @pytest.mark.usefixtures("quick")
    @pytest.mark.parametrize("fault", ["wrong", "raises"])
    def test_faults_of_the_kernels_are_told(home, told, monkeypatch, fault):
        from triscale.kernels import squeeze

        right = squeeze.squeeze

        def broken(*args, **options):
            if fault == "raises":
                raise RuntimeError("PassManager::run failed\nin full")
            return 3 * right(*args, **options)

        monkeypatch.setattr(squeeze, "squeeze", broken)
        net = settled(ts.scale(ts.arch("efficientnet_b0"), width=0.25, depth=0.2)).to(DEVICE)
        x = images(1, (32, 32), 1).to(DEVICE)
        out = optimize(net, engine="triton", precision="float16", tell=told.append)
        for _ in range(2):
            assert relative(out(x), net(x)) < 0.02
        said = [text for text in told if "measuring kernels" not in text]
        if fault == "raises":  # all else goes on
            assert out.engine.used == ("kernels float16",)
            assert said
            assert all("the kernel 'squeeze' doesn't run here for n 1, parts" in text for text in said)
            assert all(text.endswith("torch computes such steps (PassManager::run failed)") for text in said)
        else:
            assert out.engine.used == ("plain",)
            assert said == ["optimize: in float16 the kernels give other logits than the network; the network runs as it is"]

    @pytest.mark.gpu
    @pytest.mark.usefixtures("quick")
    def test_without_a_single_kernel_of_the_kernels_the_engine_still_computes(home, told, monkeypatch):
        """Each step by torch, from pixels: its types and layouts are the kernels'."""
        from triscale.kernels import depthwise, pointwise, squeeze, stem

        def refuse(*args, **options):
            raise RuntimeError("out of resources")

        for module, name in ((depthwise, "depthwise"), (pointwise, "pointwise"), (squeeze, "squeeze"), (stem, "stem")):
            monkeypatch.setattr(module, name, refuse)
        net = settled(ts.scale(ts.arch("efficientnet_b0"), width=0.25, depth=0.2)).to(DEVICE)
        net.preprocess = ts.Preprocess(64)
        pixels = (50 * images(2, (32, 32), 3) + 120).clamp(0, 255).to(torch.uint8).to(DEVICE)
        out = optimize(net, engine="triton", precision="bfloat16", tell=told.append)
        expected = optimize(net, engine="torch")(pixels)
        assert relative(out(pixels), expected) < 0.1
        assert out.engine.used == ("kernels bfloat16",)
        before = len(told)
        out(pixels)
        assert len(told) == before > 4  # each shape once

    @pytest.mark.gpu
    @pytest.mark.usefixtures("quick")
    def test_pixels_through_the_kernels(home):
        """A small network; bfloat16; blocks without kernels beside those with them."""
        stages = (
            *(ts.Stage("mbconv", 3, 1, 1, 0.25, "identity", 8, 1), ts.Stage("fused_mbconv", 3, 2, 4, 0.25, "identity", 16, 2)),
            *(ts.Stage("mbconv", 5, 2, 6, 0.25, "pool", 20, 2), ts.Stage("bottleneck", 3, 1, 0.5, 0, "identity", 24, 1)),
            *(ts.Stage("separable", 9, 1, 1, 0, "identity", 24, 1), ts.Stage("basic", 3, 2, 1, 0, "identity", 24, 1)),
        )
        net = settled(ts.Arch(ts.Stem(8, pool=True), stages, ts.Head(0), 64)).to(DEVICE)
        net.preprocess = ts.Preprocess(64)
        pixels = (50 * images(2, (61, 50), 3) + 120).clamp(0, 255).to(torch.uint8).to(DEVICE)
        mean, std = (torch.tensor(v, device=DEVICE).view(3, 1, 1) for v in (net.preprocess.mean, net.preprocess.std))
        x = (pixels - mean) / std
        out = optimize(net, engine="triton", precision="bfloat16", tell=lambda text: None)
        expected, plain = copy.deepcopy(net).double()(x.double()), copy.deepcopy(net).bfloat16()(x.bfloat16())
        for given_ in (pixels, x):
            assert relative(out(given_), expected) < max(0.03, 1.2 * relative(plain, expected))
            assert out.engine.used == ("kernels bfloat16",)

else:

    @pytest.mark.skipif(not HAVE_TRITON, reason="Triton isn't installed")
    def test_under_the_interpreter():
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-m", "gpu"]
        run = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stdout + run.stderr
        assert "7 passed" in run.stdout
