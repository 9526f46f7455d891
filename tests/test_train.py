"""The loop, the schedule, the weight average, the model file, the recipe: values."""

import json
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file, save_file

import triscale as ts
from triscale.files import write_whole
from triscale.naming import UnknownNameError
from triscale.recipe import RecipeError, from_json, override
from triscale.recipes import named
from triscale.train.loop import EpochEnd, NonFiniteLossError, Step, cross_entropy, fit
from triscale.train.optim import WeightAverage, learning_rate, make_optimizer
from triscale.weights.model_file import ModelCard, ModelFileError, load_model, save_model

SMALL = ts.Arch(ts.Stem(4), (ts.Stage("mbconv", 3, 2, 2, 0.25, "identity", 8, 2),), ts.Head(8), 16, 0.0)


class Fixed:
    """Two batches, the same in every epoch."""

    def __init__(self, n=2, seed=0):
        g = torch.Generator().manual_seed(seed)
        self.batches = [(torch.randn(8, 3, 16, 16, generator=g), torch.randint(0, 3, (8,), generator=g)) for _ in range(n)]

    def __len__(self):
        return len(self.batches)

    def epoch(self, index, start=0):
        return iter(self.batches[start:])

    def names(self, numbers):
        return [f"file{i}.jpg" for i in numbers]


def test_learning_rate_rises_linearly_and_falls_by_half_a_cosine():
    recipe = ts.Recipe(epochs=10, lr=0.4, warmup_epochs=2.0)
    rates = [learning_rate(recipe, step, 5) for step in range(50)]
    assert rates[:10] == pytest.approx([0.4 * (i + 1) / 11 for i in range(10)])
    assert rates[10] == pytest.approx(0.4)
    assert rates[30] == pytest.approx(0.2)  # half of the 40 steps after the warm-up
    assert rates[-1] < 0.001
    assert all(a > b for a, b in pairwise(rates[10:]))


def test_weight_decay_acts_on_weights_alone():
    net = ts.build(SMALL, 3)
    decayed, others = make_optimizer(net, ts.Recipe(weight_decay=0.1)).param_groups
    assert decayed["weight_decay"] == 0.1
    assert others["weight_decay"] == 0
    named_parameters = dict(net.named_parameters())
    assert {id(p) for p in decayed["params"]} == {id(p) for name, p in named_parameters.items() if name.endswith("weight") and "norm" not in name}
    assert len(decayed["params"]) + len(others["params"]) == len(named_parameters)


def test_weight_average_follows_its_formula_and_swaps_back():
    net = torch.nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        net.weight.fill_(0.5)
    average, expected = WeightAverage(net, 0.9), 0.5
    for t in range(1, 300):
        with torch.no_grad():
            net.weight.fill_(float(t % 7))
        average.update(net)
        d = min(0.9, (1 + t) / (10 + t))
        expected -= (1 - d) * (expected - t % 7)
    average.swap(net)
    assert net.weight.item() == pytest.approx(expected, rel=1e-5)
    average.swap(net)
    assert net.weight.item() == 299 % 7


def test_the_loop_is_plain_sgd_written_out():
    """Three steps against the formulas of Nesterov momentum, in float64, on the same network."""
    recipe = ts.Recipe(epochs=3, batch_size=8, lr=0.05, momentum=0.9, weight_decay=0.01, warmup_epochs=0.0, label_smoothing=0.1)
    torch.manual_seed(0)
    net = ts.build(SMALL.with_numerics(drop_path=0.0), 3).double()
    x, y = Fixed(1).batches[0]
    source = Fixed(1)
    source.batches = [(x.double(), y)]
    expected = {n: p.detach().clone() for n, p in net.named_parameters()}
    velocity = {n: torch.zeros_like(p) for n, p in expected.items()}
    reference = ts.build(SMALL.with_numerics(drop_path=0.0), 3).double()
    losses = []
    for step in range(3):
        reference.load_state_dict({**net.state_dict(), **expected} if step == 0 else {**reference.state_dict(), **expected})
        log_p = reference.train()(x.double()).log_softmax(1)
        loss = -(0.9 * log_p[torch.arange(8), y] + 0.1 * log_p.mean(1)).mean()
        losses.append(loss.item())
        grads = torch.autograd.grad(loss, list(reference.parameters()))
        for (n, p), g in zip(expected.items(), grads, strict=True):
            g = g + (0.01 * p if p.ndim > 1 else 0)
            velocity[n] = 0.9 * velocity[n] + g
            expected[n] = p - learning_rate(recipe, step, 1) * (g + 0.9 * velocity[n])
    events = list(fit(net, source, cross_entropy(0.1), recipe))
    assert [type(e) for e in events] == [Step, EpochEnd] * 3
    assert [e.loss for e in events if isinstance(e, Step)] == pytest.approx(losses, rel=1e-9)
    for n, p in net.named_parameters():
        assert torch.allclose(p, expected[n], rtol=1e-8, atol=1e-12), n


def test_the_average_is_what_is_evaluated():
    torch.manual_seed(0)
    net = ts.build(SMALL, 3)
    seen = []
    for event in fit(net, Fixed(), cross_entropy(0.0), ts.Recipe(epochs=2, ema=0.5)):
        if isinstance(event, EpochEnd):
            assert not net.training
            seen.append(net.classifier.weight.detach().clone())
    assert torch.equal(seen[-1], net.classifier.weight)
    torch.manual_seed(0)
    plain = ts.build(SMALL, 3)
    list(fit(plain, Fixed(), cross_entropy(0.0), ts.Recipe(epochs=2)))
    assert not torch.equal(plain.classifier.weight, net.classifier.weight)


def test_a_loss_that_is_not_finite_stops_before_the_weights_are_touched():
    net = ts.build(SMALL, 3)
    source = Fixed()
    source.batches[1][0][0, 0, 0, 0] = float("nan")
    steps = fit(net, source, cross_entropy(0.0), ts.Recipe(epochs=1))
    next(steps)
    before = net.classifier.weight.detach().clone()
    with pytest.raises(NonFiniteLossError, match="step 2 of epoch 1"):
        list(steps)
    assert torch.equal(before, net.classifier.weight)


def test_model_file_round_trip(tmp_path):
    torch.manual_seed(1)
    net = ts.build(SMALL, 3).eval()
    card = ModelCard(SMALL, ts.Preprocess(16, 0), ("a", "b", "ü"), {"data": "none"}, {"top1": 0.5})
    save_model(tmp_path / "deep" / "m.safetensors", net, card)
    again, read = load_model(tmp_path / "deep" / "m.safetensors")
    x = torch.randn(2, 3, 16, 16)
    assert read == card
    assert not again.training
    with torch.no_grad():
        assert torch.equal(again(x), net(x))
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["m.safetensors"]


@pytest.mark.parametrize("change", ["missing", "left over", "wrong shape", "no metadata", "arch", "classes", "format", "recursion"])
def test_a_model_file_that_does_not_fit_is_refused_by_name(tmp_path, change):
    path = tmp_path / "m.safetensors"
    net, card = ts.build(SMALL, 3), ModelCard(SMALL, ts.Preprocess(16, 0), ("a", "b", "c"))
    save_model(path, net, card)
    tensors, meta = load_file(path), json.loads(card.to_json())
    if change == "missing":
        del tensors["classifier.bias"]
    elif change == "left over":
        tensors["more"] = torch.zeros(1)
    elif change == "wrong shape":
        tensors["classifier.bias"] = torch.zeros(4)
    elif change == "arch":
        meta["arch"]["stem"]["stride"] = 3
    elif change == "classes":
        meta["classes"] = []
    elif change == "format":
        meta["format"] = 2
    text = "[" * 100_000 if change == "recursion" else json.dumps(meta)
    save_file(tensors, path, metadata=None if change == "no metadata" else {"triscale": text})
    words = {"missing": "1 missing: classifier.bias", "arch": "stride", "format": "format", "classes": "class names"}
    with pytest.raises(ModelFileError, match=words.get(change, change.split()[0])) as error:
        load_model(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_files_are_whole_or_not_there(tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("old")

    def half(path):
        path.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_whole(target, half)
    assert target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_recipes_refuse_what_does_not_exist_and_round_trip():
    recipe = override(named("small"), {"lr": 0.2, "epochs": 3})
    assert (recipe.lr, recipe.epochs, recipe.ema) == (0.2, 3, named("small").ema)
    assert from_json(ts.Recipe, json.dumps(recipe.to_dict())) == recipe
    p = ts.Preprocess(240, 32, "after", "bilinear", (1.0,), (2.0,))
    assert from_json(ts.Preprocess, json.dumps(p.to_dict())) == p
    with pytest.raises(UnknownNameError, match="weight_decay"):
        override(recipe, {"weight_decy": 0})
    with pytest.raises(UnknownNameError, match="small"):
        named("smal")
    for bad in ({"epochs": 0}, {"lr": float("nan")}, {"lr": -1.0}, {"optimizer": "sdg"}, {"flip": 1}, {"label_smoothing": 1.0}, {"batch_size": True}):
        with pytest.raises((RecipeError, UnknownNameError), match=next(iter(bad))):
            override(recipe, bad)
    for bad in ({"size": 0}, {"mean": (1.0, 2.0)}, {"std": (0.0, 1.0, 1.0)}, {"interpolation": "cubic"}, {"crop_padding": -1}):
        with pytest.raises(RecipeError, match=next(iter(bad)) if "mean" not in bad else "means"):
            ts.Preprocess(**{"size": 8, **bad})
