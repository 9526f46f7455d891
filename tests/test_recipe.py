"""The paper's recipe against values of the official code: optimiser, learning rate, average, loss, one training step."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import triscale as ts
from triscale.blocks import DropPath
from triscale.recipes import FINETUNE, PAPER, RECIPES
from triscale.train.loop import cross_entropy
from triscale.train.optim import RMSprop, WeightAverage, learning_rate, parameter_groups
from triscale.weights.dialects import dialect_of, names

IMAGES = 1_281_167


@pytest.fixture(scope="module")
def golden(shared):
    return dict(np.load(shared / "golden/optimizer.npz"))


@pytest.mark.parametrize("constant", [False, True])
def test_rmsprop_follows_the_official_trajectory(golden, constant):
    p = torch.nn.Parameter(torch.from_numpy(golden["rmsprop_param0"].copy()))
    optimizer = RMSprop([p], lr=0.256)
    want = golden["rmsprop_constlr_params" if constant else "rmsprop_params"]
    for i, gradient in enumerate(golden["rmsprop_grads"]):
        optimizer.param_groups[0]["lr"] = 0.256 if constant else float(golden["rmsprop_lr"][i])
        p.grad = torch.from_numpy(gradient.copy())
        optimizer.step()
        assert np.abs(p.detach().numpy() - want[i + 1]).max() <= 1e-6 * np.abs(want).max()
        if not constant:
            for ours, theirs in (("square", "rmsprop_ms"), ("velocity", "rmsprop_mom")):
                assert np.abs(optimizer.state[p][ours].numpy() - golden[theirs][i + 1]).max() <= 1e-6 * np.abs(golden[theirs]).max()


def test_torchs_rmsprop_is_another():
    """That the trajectory can tell: eps outside the root, the mean square from 0."""
    p, q = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    p.grad = q.grad = torch.tensor([1.0, 0.1, 0.01])
    RMSprop([p], lr=0.1).step()
    torch.optim.RMSprop([q], lr=0.1, alpha=0.9, momentum=0.9, eps=1e-3).step()
    assert (p - q).abs().max() > 0.1


@pytest.mark.parametrize("batch", [256, 2048, 4096])
def test_learning_rate_is_the_official_one(golden, batch):
    recipe = replace(PAPER, batch_size=batch)
    got = np.array([learning_rate(recipe, int(s), IMAGES / batch) for s in golden[f"lr_bs{batch}_step"]], np.float32)
    want = golden[f"lr_bs{batch}"]
    assert np.abs(got - want).max() <= 2e-7 * want.max()
    assert (np.abs(got - want) <= 2e-7 * want).all()


@pytest.mark.parametrize(("name", "start"), [("from0", 0), ("from89900", 89_900)])
def test_the_moving_average_is_the_official_one(golden, name, start):
    value, want = golden[f"ema_{name}_values"], golden[f"ema_{name}_shadow"]
    net = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(net.weight, 0.5)
    average = WeightAverage(net, 0.9999)
    average.updates = start
    for i, v in enumerate(value):
        torch.nn.init.constant_(net.weight, float(v))
        average.update(net)
        assert abs(average.values["weight"].item() - want[i + 1]) <= 1e-6


@pytest.fixture(scope="module")
def b0(shared):
    """B0 on the raw variables of the official checkpoint, dropout and drop connect off, as the golden step was made."""
    arch = replace(ts.arch("efficientnet_b0").with_numerics(drop_path=0.0), dropout=0.0)
    return ts.load_weights(ts.build(arch), shared / "golden/b0_ckpt", raw=True)


@pytest.fixture(scope="module")
def extras(shared):
    return json.loads((shared / "golden/train_extras.json").read_text())


def images_and_labels(shared):
    x = np.load(shared / "golden/b0_eval.npz")["input"]
    return torch.from_numpy(x).permute(0, 3, 1, 2).contiguous(), torch.tensor([3, 700])


def test_the_loss_and_what_is_decayed(shared, b0, extras):
    want = extras["loss_eval"]
    x, y = images_and_labels(shared)
    with torch.no_grad():
        assert cross_entropy(0.1)(b0.eval()(x), y).item() == pytest.approx(want["cross_entropy"], rel=1e-6)
    decayed = parameter_groups(b0, PAPER)[0]["params"]
    assert len(decayed) == want["num_regularised_tensors"]
    assert sum(p.detach().double().square().sum().item() / 2 for p in decayed) == pytest.approx(want["l2_loss_sum"], rel=1e-6)
    assert sum(p.ndim == 1 for p in decayed) == len(want["regularised_non_kernel"])
    total = want["cross_entropy"] + PAPER.weight_decay * want["l2_loss_sum"]
    assert total == pytest.approx(want["total"], rel=1e-6)


def test_one_training_step_of_b0(shared, b0, extras):
    """Logits, loss, every gradient's norm, seven whole gradients and the moving statistics, at the golden values' own precision."""
    golden = np.load(shared / "golden/b0_train_step.npz")
    dialect, before = dialect_of("official", b0.arch), {k: v.clone() for k, v in b0.state_dict().items()}
    named = {theirs: ours for ours, theirs in names(b0.arch, dialect).items()}
    x, y = images_and_labels(shared)
    logits = b0.train()(x)
    loss = cross_entropy(0.1)(logits, y)
    decayed = parameter_groups(b0, PAPER)[0]["params"]
    total = loss + PAPER.weight_decay * sum(p.square().sum() / 2 for p in decayed)
    total.backward()
    assert loss.item() == pytest.approx(extras["train_step"]["cross_entropy"], rel=1e-6)
    assert total.item() == pytest.approx(float(golden["loss"][2]), rel=1e-6)
    assert np.abs(logits.detach().numpy() - golden["logits"]).max() <= 1e-5 * np.abs(golden["logits"]).max()
    parameters, moved = dict(b0.named_parameters()), b0.state_dict()

    def theirs(ours, tensor):
        return tensor.permute(dialect.axes(ours, tensor.ndim)).detach().numpy()

    sensitivity = dict(zip(golden["grad_names"].tolist(), golden["grad_rel_change_under_ulp_input_perturbation"].tolist(), strict=True))
    noise = {name for name, change in sensitivity.items() if change > 0.1}  # 16 betas in front of another norm: true gradient 0
    assert len(noise) == 16
    apart = {}
    for name, norm in zip(golden["grad_names"].tolist(), golden["grad_l2norm"].tolist(), strict=True):
        if name not in noise:
            gradient = parameters[named[name.split("/", 1)[1]]].grad
            apart[name] = abs(gradient.double().norm().item() - norm) / norm / max(sensitivity[name], 1e-6)
    assert max(apart.values()) <= 10, max(apart, key=apart.get)  # times what a change of the input by one float32 ulp does
    for key in golden.files:
        kind, _, name = key.partition(":")
        if kind == "grad":
            ours = named[name.split("/", 1)[1]]
            assert np.abs(theirs(ours, parameters[ours].grad) - golden[key]).max() <= 1e-4 * np.abs(golden[key]).max(), name
        elif kind == "after":
            ours = named[name.split("/", 1)[1]]
            assert np.abs(theirs(ours, moved[ours]) - golden[key]).max() <= 1e-5 * np.abs(golden[key]).max(), name
    for name, norm in zip(golden["moving_names"].tolist(), golden["moving_l2norm_after"].tolist(), strict=True):
        assert moved[named[name.split("/", 1)[1]]].double().norm().item() == pytest.approx(norm, rel=1e-5), name
    b0.load_state_dict(before)


@pytest.mark.parametrize("name", ["b0", "b7"])
def test_drop_connect_rates_are_the_official_ones(shared, name):
    want = json.loads((shared / "golden/drop_connect_rates.json").read_text())[f"efficientnet-{name}"]
    blocks = list(ts.arch(f"efficientnet_{name}").blocks())
    assert len(blocks) == len(want)
    for block, row in zip(blocks, want, strict=True):
        assert block.drop_path == pytest.approx(row["drop_connect_rate"], abs=1e-15)
        assert (block.shortcut != "none") == row["applied"] or block.index == 0


def test_drop_connect_divides_what_it_keeps(golden):
    """One draw of the official code: kept samples divided by the survival probability, whole samples dropped."""
    x, out, kept = (torch.from_numpy(golden[f"drop_connect_{k}"]) for k in ("in", "out", "kept"))
    rate = 1 - float(golden["drop_connect_survival_prob"])
    drop = DropPath(rate).train()
    torch.manual_seed(0)
    ours = drop(x.permute(0, 3, 1, 2).clone()).permute(0, 2, 3, 1)
    alive = ours.flatten(1).abs().sum(1) > 0
    kept = kept.flatten().bool()
    assert torch.allclose(out[kept], x[kept] / (1 - rate), rtol=1e-6)
    assert torch.allclose(ours[alive], x[alive] / (1 - rate), rtol=1e-6)
    assert (out[~kept] == 0).all()
    assert (ours[~alive] == 0).all()
    assert 0 < alive.sum() < len(x)


def test_named_recipes_are_the_papers():
    assert (PAPER.epochs, PAPER.batch_size, PAPER.optimizer, PAPER.ema, PAPER.weight_decay) == (350, 4096, "rmsprop", 0.9999, 1e-5)
    assert round(PAPER.minival * IMAGES) == 25_022
    assert RECIPES["paper-gpu"] == replace(PAPER, batch_size=256)
    assert set(FINETUNE) == {"cifar10", "cifar100", "birdsnap", "stanford-cars", "flowers102", "fgvc-aircraft", "oxford-iiit-pet", "food101"}
    for name, row in FINETUNE.items():
        steps = row.recipe().epochs * (row.images // row.recipe().batch_size)
        assert abs(steps / 20_000 - 1) < 0.02, name
