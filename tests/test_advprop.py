"""AdvProp: the attack by hand, norms that don't mix, the joint step against its parts, resuming, processes, export.

Run as a program this file is two processes that train together, and each writes what it found to a file.
"""

import copy
import itertools
import json
import os
import socket
import subprocess
import sys
import traceback
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

import triscale as ts
from triscale.blocks import BatchNorm
from triscale.recipe import Preprocess, Recipe
from triscale.train import dist
from triscale.train.advprop import PGD, attack, auxiliary_norms, pgd_accuracy, with_auxiliary_norms, without_auxiliary_norms
from triscale.train.dist import World
from triscale.train.loop import EpochEnd, NonFiniteLossError, Note, Step, cross_entropy, fit
from triscale.train.plan import Plan
from triscale.train.state import TrainState
from triscale.train.syncnorm import GhostBatchNorm, SharedBatchNorm, ghost_norms, share_norms
from triscale.weights.model_file import ModelCard, load_model, save_model

STAGES = (
    ts.Stage("mbconv", 3, 1, 1, 0.25, "identity", 8, 1),
    ts.Stage("mbconv", 5, 2, 4, 0.25, "identity", 12, 2),
)
NET = ts.Arch(ts.Stem(8), STAGES, ts.Head(16), 16, 0.3, ts.Numerics(drop_path=0.4, norm_momentum=0.1))
STILL = replace(NET.with_numerics(drop_path=0.0), dropout=0.0)  # draws nothing in training
PREPROCESS = Preprocess(16, mean=(120.0, 125.0, 130.0), std=(60.0, 62.0, 64.0))
LOSS = cross_entropy(0.1)
CLASSES = 4


def made(arch=NET, seed=0, dtype=torch.float32):
    """With both sets of norms, the auxiliary ones elsewhere than the clean ones."""
    torch.manual_seed(seed)
    net = with_auxiliary_norms(ts.build(arch, CLASSES)).to(dtype)
    for name, value in net.state_dict().items():
        if ".auxiliary." in name:
            value.uniform_(0.5, 1.5)
    return net


class Pictures:
    """Random pictures, normalised; targets are shares of the classes where `mixed`."""

    def __init__(self, batches=2, size=8, mixed=False, dtype=torch.float32):
        g = torch.Generator().manual_seed(5)
        self.batches = []
        for _ in range(batches):
            pixels = torch.randint(256, (size, 3, 16, 16), generator=g).to(dtype)
            x = (pixels - torch.tensor(PREPROCESS.mean).view(-1, 1, 1)) / torch.tensor(PREPROCESS.std).view(-1, 1, 1)
            y = torch.randint(CLASSES, (size,), generator=g)
            self.batches.append((x.to(dtype), torch.rand(size, CLASSES, generator=g).to(dtype).softmax(1) if mixed else y))

    def __len__(self):
        return len(self.batches)

    def epoch(self, index, start=0):
        return iter(self.batches[start:])


def pgd(epsilon=4.0, steps=3, step=1.5, random_start=False):
    return PGD(epsilon, steps, step, PREPROCESS.mean, PREPROCESS.std, random_start)


def run(net, batches, recipe, *, adversary=None, plan=Plan(), model=None, rank=0):  # noqa: B008 - frozen
    """The steps, the state, and the gradients after the last step."""
    state = TrainState(net, recipe, adversary=adversary or pgd())
    events = list(fit(model or net, batches, LOSS, recipe, plan=plan, state=state, rank=rank))
    return [e for e in events if isinstance(e, Step)], state, {n: p.grad.clone() for n, p in net.named_parameters()}


def recipe(**changes):
    return Recipe(
        **{"epochs": 1, "batch_size": 8, "lr": 0.05, "momentum": 0.0, "warmup_epochs": 0.0, "weight_decay": 0.0, "advprop": True, **changes}
    )


# ---- the attack


def test_the_attack_by_hand():
    """Loss w.x: each step adds step / std x sign w, until epsilon / std or the pixel's end."""
    weight = torch.tensor([2.0, -1.0, 0.0, 3.0, -1.0]).view(1, 1, 1, 5)
    pixels = torch.tensor([100.0, 100.0, 100.0, 254.0, 2.0]).view(1, 1, 1, 5)
    x = (pixels - 50.0) / 20.0
    net = torch.nn.Identity()
    for steps, expected in ((1, [103, 97, 100, 255, 0]), (2, [104, 96, 100, 255, 0]), (0, [100, 100, 100, 254, 2])):
        got = attack(net, x, None, lambda out, y: (out * weight).sum(), PGD(4.0, steps, 3.0, (50.0,), (20.0,), random_start=False))
        assert (got * 20 + 50).flatten().tolist() == pytest.approx(expected, abs=1e-4)
    two = torch.full((1, 2, 1, 1), 1.0)  # one step on the 0..255 scale is another for each channel's std
    got = attack(net, two, None, lambda out, y: out.sum(), PGD(8.0, 1, 6.0, (50.0, 50.0), (20.0, 60.0), random_start=False))
    assert got.flatten().tolist() == pytest.approx([1.3, 1.1])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1 << 30), st.floats(0, 32), st.integers(0, 5), st.floats(0, 12), st.booleans())
def test_the_attack_stays_in_the_ball_and_raises_a_linear_loss(seed, epsilon, steps, step, random_start):
    g = torch.Generator().manual_seed(seed)
    pixels, weight = torch.randint(256, (2, 3, 4, 4), generator=g).float(), torch.randn(3 * 16, 5, generator=g)
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (PREPROCESS.mean, PREPROCESS.std))
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 5, bias=False))
    model[1].weight.data.copy_(weight.T)
    losses = []

    def loss(out, y):
        losses.append((out * y).sum().item())
        return (out * y).sum()

    torch.manual_seed(seed)
    y = torch.randn(2, 5, generator=g)
    x = (pixels - mean) / std
    before = x.clone()
    got = attack(model, x, y, loss, replace(pgd(epsilon, steps, step), random_start=random_start))
    loss(model(got), y)
    back = got * std + mean
    assert (back - pixels).abs().max() <= epsilon + 1e-3
    assert back.min() >= -1e-3
    assert back.max() <= 255 + 1e-3
    assert all(after >= earlier - 1e-2 for earlier, after in itertools.pairwise(losses))
    assert torch.equal(x, before)
    assert not got.requires_grad
    if not steps or not epsilon:
        assert torch.equal(got, x)
    elif steps * step >= 2 * epsilon and not random_start:  # every pixel of a linear model is driven to its bound
        sign = (y @ model[1].weight.detach()).view_as(x).sign()
        assert torch.allclose(back, torch.clamp(pixels + epsilon * sign, 0, 255), atol=1e-3)


def test_an_attack_leaves_the_model_as_it_was_and_repeats_by_its_random_numbers():
    net, (x, y) = made().train(), Pictures(1).batches[0]
    net.head.norm.eval()  # frozen by somebody
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    before, modes = {k: v.clone() for k, v in net.state_dict().items()}, [m.training for m in net.modules()]
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(attack(net, x, y, LOSS, pgd(random_start=True)))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in net.parameters())
    assert [m.training for m in net.modules()] == modes
    with auxiliary_norms(net):  # its gradients come by the other norms
        torch.manual_seed(1)
        assert not torch.equal(attack(net, x, y, LOSS, pgd(random_start=True)), found[0])


def test_accuracy_under_attack():
    """Of a linear classifier by brightness: pixels within epsilon of the border are lost, and no others."""
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(1, 2))
    model[1].weight.data = torch.tensor([[-1.0], [1.0]])
    model[1].bias.data.zero_()  # the border is 128
    pixels, labels = torch.tensor([0.0, 100.0, 125.5, 131.5, 150.0, 20.0]), torch.tensor([0, 0, 0, 1, 1, 1])
    preprocess = Preprocess(1, mean=(128.0,), std=(64.0,))
    batches = [(((pixels - 128) / 64).view(-1, 1, 1, 1), labels)]
    torch.manual_seed(3)
    state = torch.get_rng_state()
    got = [pgd_accuracy(model, batches, preprocess, e, 4, 20.0) for e in (0, 2, 3, 4, 40)]
    assert got == pytest.approx([5 / 6, 5 / 6, 4 / 6, 3 / 6, 1 / 6])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("values", "message"), [((-1.0, 1, 1.0), "from 0 to 255"), ((1.0, -1, 1.0), "steps from 0"), ((1.0, 1, 300.0), "step from 0")]
)
def test_an_attack_that_cannot_be_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        PGD(*values, (1.0,), (1.0,))
    with pytest.raises(ValueError, match="as many means as stds"):
        PGD(1.0, 1, 1.0, (1.0, 2.0), (1.0,))


# ---- the norms


def plain(net, which):
    """A network without auxiliary norms that holds the clean or the auxiliary ones' values."""
    out = ts.build(net.arch, CLASSES).to(next(net.parameters()).dtype)
    values = net.state_dict()
    for name in out.state_dict():
        other = name.replace(".norm.", ".norm.auxiliary.")
        out.state_dict()[name].copy_(values[other if which == "auxiliary" and other in values else name])
    return out


def test_the_auxiliary_norms_start_as_copies_and_draw_nothing():
    torch.manual_seed(0)
    net = ts.build(NET, CLASSES)
    state, names = torch.get_rng_state(), list(net.state_dict())
    net.stem.norm.running_mean.fill_(3)
    with_auxiliary_norms(net)
    assert torch.equal(torch.get_rng_state(), state)
    values = net.state_dict()
    added = [n for n in values if n not in names]
    assert len(added) == sum(".norm." in n for n in names)
    assert all(torch.equal(values[n], values[n.replace(".auxiliary", "")]) for n in added)
    assert values["stem.norm.auxiliary.running_mean"].data_ptr() != values["stem.norm.running_mean"].data_ptr()
    with pytest.raises(ValueError, match="has auxiliary norms already"):
        with_auxiliary_norms(net)
    with pytest.raises(ValueError, match="has no batch norms"):
        with_auxiliary_norms(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="no auxiliary norms"), auxiliary_norms(ts.build(NET, CLASSES)):
        pass


@pytest.mark.parametrize("kind", [BatchNorm, GhostBatchNorm])
@pytest.mark.parametrize("first", [True, False])
def test_each_set_is_a_network_of_its_own(kind, first):
    """Outputs and statistics of a pass are those of a plain network with these norms, and the other set doesn't move."""

    def grouped(net):
        return ghost_norms(net, 3) if kind is GhostBatchNorm else net

    torch.manual_seed(0)
    net = with_auxiliary_norms(grouped(ts.build(STILL, CLASSES))) if first else grouped(with_auxiliary_norms(ts.build(STILL, CLASSES)))
    for name, value in net.state_dict().items():
        if ".norm." in name:
            value.uniform_(0.5, 1.5)
    x = Pictures(1).batches[0][0]
    sets = {which: grouped(plain(net, which)) for which in ("clean", "auxiliary")}
    for which, other in (("clean", "auxiliary"), ("auxiliary", "clean"), ("clean", "auxiliary")):
        kept = {k: v.clone() for k, v in plain(net, other).state_dict().items()}
        with auxiliary_norms(net) if which == "auxiliary" else torch.enable_grad():
            assert torch.equal(net.train()(x), sets[which].train()(x))
            assert torch.equal(net.eval()(x), sets[which].eval()(x))
            with torch.no_grad():  # where the clean norms are folded
                assert torch.allclose(net(x), sets[which](x), atol=1e-5)
        expected = sets[which].state_dict()
        assert all(torch.equal(v, expected[k]) for k, v in plain(net, which).state_dict().items())
        assert all(torch.equal(v, kept[k]) for k, v in plain(net, other).state_dict().items())
    assert not torch.equal(net.stem.norm.running_mean, net.stem.norm.auxiliary.running_mean)


def test_export_has_the_clean_norms_alone(tmp_path):
    net, x = made().eval(), Pictures(1).batches[0][0]
    clean = without_auxiliary_norms(net)
    assert list(clean.state_dict()) == list(ts.build(NET, CLASSES).state_dict())
    assert any(".auxiliary." in n for n in net.state_dict())
    assert all(v.data_ptr() == net.state_dict()[k].data_ptr() for k, v in clean.state_dict().items())
    save_model(tmp_path / "m.safetensors", clean, ModelCard(NET, PREPROCESS, tuple("abcd")))
    loaded, _ = load_model(tmp_path / "m.safetensors")
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            assert torch.equal(net(x), clean(x))
            assert torch.equal(net(x), loaded(x))
            with auxiliary_norms(net):
                assert not torch.equal(net(x), clean(x))
                assert torch.equal(clean(x), loaded(x))
    assert torch.equal(without_auxiliary_norms(clean)(x), clean(x))
    copied = copy.deepcopy(net)
    with auxiliary_norms(net):
        assert torch.equal(copied(x), clean(x))  # a copy has a switch of its own


# ---- the joint step


def test_the_step_is_the_sum_of_its_parts():
    """Gradients and statistics: those of two plain networks, one on the images, one on the attacked images."""
    net, batches = made(STILL, dtype=torch.float64), Pictures(1, dtype=torch.float64)
    x, y = batches.batches[0]
    clean, auxiliary = (plain(net, which).train() for which in ("clean", "auxiliary"))
    attacked = attack(auxiliary, x, y, LOSS, pgd())
    losses = LOSS(clean(x), y), LOSS(auxiliary(attacked), y)
    for loss in losses:
        loss.backward()
    (step,), _, grads = run(net, batches, recipe(lr=0.0))
    assert (step.loss, step.adversarial) == pytest.approx([v.item() for v in losses], rel=1e-12)
    assert step.adversarial > step.loss + 0.01
    theirs = dict(auxiliary.named_parameters())
    for name, p in clean.named_parameters():
        other = name.replace(".norm.", ".norm.auxiliary.")
        if other == name:
            torch.testing.assert_close(grads[name], p.grad + theirs[name].grad, rtol=1e-9, atol=1e-12)
        else:
            torch.testing.assert_close(grads[name], p.grad, rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(grads[other], theirs[name].grad, rtol=1e-9, atol=1e-12)
    for which, expected in (("clean", clean), ("auxiliary", auxiliary)):
        for k, v in plain(net, which).state_dict().items():
            torch.testing.assert_close(v, expected.state_dict()[k], rtol=1e-9, atol=1e-12)


def close(a, b, limit=1e-9):
    return max(((a[k] - b[k]).abs().max() / b[k].abs().max().clamp(min=1e-3)).item() for k in b) <= limit


@pytest.mark.parametrize("mixed", [False, True])
def test_micro_batches_and_recomputation_give_the_same_step(mixed):
    """Norms over groups of 4 either way."""
    found = []
    for plan in (Plan(), Plan(micro_batch=4), Plan(micro_batch=4, recompute=True)):
        net = made(STILL, dtype=torch.float64)
        if not plan.micro_batch:
            net = ghost_norms(net, 4)
        (step,), _, grads = run(net, Pictures(1, mixed=mixed, dtype=torch.float64), recipe(), plan=plan)
        found.append((step, grads, net.state_dict()))
    for other in found[1:]:
        assert (other[0].loss, other[0].adversarial) == pytest.approx((found[0][0].loss, found[0][0].adversarial), rel=1e-12)
        assert close(other[1], found[0][1])
        assert close(other[2], found[0][2])


def test_recomputation_gives_the_plain_step_with_dropping():
    found = []
    for recompute in (False, True):
        net = made(dtype=torch.float64)
        (step,), _, grads = run(net, Pictures(1, dtype=torch.float64), recipe(), plan=Plan(recompute=recompute), adversary=pgd(random_start=True))
        found.append((step.adversarial, grads, net.state_dict()))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-12)
    assert close(found[1][1], found[0][1])
    assert close(found[1][2], found[0][2])


@pytest.mark.parametrize("mixed", [False, True])
def test_stopped_and_resumed_is_bit_for_bit(mixed):
    r = recipe(epochs=2, optimizer="rmsprop", lr=0.01, momentum=0.9, ema=0.9)
    net, batches = made(), Pictures(2, mixed=mixed)
    state = TrainState(net, r, adversary=PGD.of(r, PREPROCESS))
    events, kept = [], []
    for event in fit(net, batches, LOSS, r, state=state):
        events.append(event)
        kept.append(({k: v.clone() for k, v in state.tensors().items()}, json.dumps(state.numbers())))
    assert {f"{part}/stem.norm.auxiliary.{name}" for part, name in (("model", "running_var"), ("average", "weight"))} <= set(kept[0][0])
    assert "optimizer/stem.norm.auxiliary.weight/square" in kept[0][0]
    assert not torch.equal(kept[0][0]["model/stem.norm.auxiliary.weight"], kept[-1][0]["model/stem.norm.auxiliary.weight"])
    for done in (1, 3):
        fresh = made(seed=9)
        resumed = TrainState(fresh, r, adversary=PGD.of(r, PREPROCESS))
        resumed.load(kept[done - 1][0], json.loads(kept[done - 1][1]))
        rest = [e for e in fit(fresh, batches, LOSS, r, state=resumed) if isinstance(e, Step)]
        assert [(e.loss, e.adversarial) for e in rest] == [(e.loss, e.adversarial) for e in events[done:] if isinstance(e, Step)]
        assert all(torch.equal(v, kept[-1][0][k]) for k, v in resumed.tensors().items())
    for event in events:
        if isinstance(event, EpochEnd):  # of the clean images
            steps = [e for e in events if isinstance(e, Step) and e.epoch == event.epoch]
            assert event.loss == pytest.approx(sum(s.loss for s in steps) / 2)


def test_norms_kept_in_evaluation_stay_there_through_the_attacks():
    """`prepare` is called after train(), and the attack puts back what it found."""
    net = made()
    frozen = [m for m in net.modules() if isinstance(m, BatchNorm)]
    before = {k: v.clone() for k, v in net.state_dict().items() if "running" in k}
    r = recipe(epochs=2)
    state = TrainState(net, r, prepare=lambda: [m.eval() for m in frozen], adversary=pgd())
    for event in fit(net, Pictures(2), LOSS, r, state=state):
        if isinstance(event, Step):
            assert net.training
            assert not any(m.training for m in frozen)
    assert all(torch.equal(net.state_dict()[k], v) for k, v in before.items())


def test_not_a_number_tells_which_pass_and_which_norm():
    net = made()
    net.head.norm.auxiliary.weight.data.fill_(3e38)  # finite, but not what it gives
    for steps in (0, 1):
        with pytest.raises(NonFiniteLossError, match=r"^adversarial loss is (nan|inf) at step 1 .* is the output of head\.norm\.auxiliary;"):
            run(copy.deepcopy(net), Pictures(1), recipe(), adversary=pgd(steps=steps))
    net = made()
    net.body[0][0].project.norm.bias.data.fill_(float("inf"))
    with pytest.raises(NonFiniteLossError, match=r"^loss is nan at step 1 .* the weights of body\.0\.0\.project\.norm\.bias"):
        run(net, Pictures(1), recipe())
    with pytest.raises(ValueError, match="adversary=PGD"):
        list(fit(made(), Pictures(1), LOSS, recipe()))
    with pytest.raises(ValueError, match="no auxiliary norms"):
        run(ts.build(NET, CLASSES), Pictures(1), recipe())


def test_the_compiled_step_switches_too_and_a_broken_compiler_is_done_without(monkeypatch):
    """Graphs are captured as for any compiler, and run as they are."""
    real, found = torch.compile, []
    for compiler in (None, lambda model, mode=None: real(model, backend="eager"), lambda model, mode=None: lambda x: 1 / 0):
        if compiler:
            monkeypatch.setattr(torch, "compile", compiler)
        net = made(STILL)
        state = TrainState(net, recipe(), adversary=pgd())
        events = list(fit(net, Pictures(2), LOSS, recipe(), state=state, plan=Plan(compile=compiler is not None)))
        found.append(([(e.loss, e.adversarial) for e in events if isinstance(e, Step)], [e.text for e in events if isinstance(e, Note)]))
    assert found[1][0] == [pytest.approx(pair, rel=1e-4) for pair in found[0][0]]
    assert found[2][0] == found[0][0]
    assert found[0][1] == found[1][1] == []
    assert found[2][1] == ["torch.compile failed, going on without it: division by zero"]


def test_training_by_it_resists_what_plain_training_does_not():
    """Two classes told by a robust feature (the picture's brightness) and by a faint one that an attack can turn over."""
    g = torch.Generator().manual_seed(0)
    y = torch.arange(256) % 2
    sign = (2.0 * y - 1).view(-1, 1, 1, 1)
    board = (torch.arange(16)[:, None] + torch.arange(16)) % 2 * 2.0 - 1
    pixels = 128 + 10 * torch.randn(256, 1, 1, 1, generator=g) + 16 * sign + 2.5 * sign * board + 4 * torch.randn(256, 3, 16, 16, generator=g)
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (PREPROCESS.mean, PREPROCESS.std))
    x = ((pixels.clamp(0, 255) - mean) / std).contiguous(memory_format=torch.channels_last)
    batches = Pictures(0)
    batches.batches = [(x[i : i + 32], y[i : i + 32]) for i in range(0, 256, 32)]
    found = {}
    for advprop in (False, True):
        r = recipe(epochs=5, lr=0.02, momentum=0.9, advprop=advprop)
        torch.manual_seed(0)
        net = ts.build(STILL, CLASSES)
        net = with_auxiliary_norms(net) if advprop else net
        list(fit(net, batches, LOSS, r, state=TrainState(net, r, adversary=pgd(4.0, 3, 2.0, random_start=True))))
        found[advprop] = [pgd_accuracy(net, batches.batches, PREPROCESS, e, 5, 1.5) for e in (0, 4)]
    print(found)
    assert found[False][0] > 0.9
    assert found[True][1] > found[False][1] + 0.2


# ---- processes


class Part:
    """This process's part of each batch."""

    def __init__(self, batches, w):
        self.batches, self.w = batches, w

    def __len__(self):
        return len(self.batches)

    def epoch(self, index, start=0):
        for x, y in self.batches.epoch(index, start):
            n = len(x) // self.w.size
            yield x[self.w.rank * n :][:n], y[self.w.rank * n :][:n]


def together(w, micro=0):
    """The weights after training, the norms shared over all processes or in micro-batches, and how often gradients were joined."""
    net = made(STILL, dtype=torch.float64)
    if not micro:
        net = share_norms(net, w, w.size)
        assert w.size == 1 or type(net.stem.norm) is type(net.stem.norm.auxiliary) is SharedBatchNorm
    model, joined = dist.parallel(net, w), []
    if w.size > 1:
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

        model.register_comm_hook(None, lambda state, bucket: (joined.append(bucket.is_last()), allreduce_hook(None, bucket))[1])
    # Processes that don't share their norms attack by running statistics of their own after the first step.
    batches = Part(Pictures(1 if micro else 3, size=8, dtype=torch.float64), w)
    steps, _, _ = run(net, batches, recipe(lr=0.02, momentum=0.9), model=model, plan=Plan(micro_batch=micro), rank=w.rank)
    losses = [(dist.mean([s.loss], w)[0], dist.mean([s.adversarial], w)[0]) for s in steps]
    return losses, {k: v for k, v in net.state_dict().items() if not micro or "running" not in k}, sum(joined)


def main(folder):
    import torch._dynamo  # what both would import for themselves

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(s.getsockname()[1]), "WORLD_SIZE": "2"}
    children = []
    for rank in range(2):
        if pid := os.fork():
            children.append(pid)
            continue
        status = 1
        try:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            with dist.world("cpu") as w:
                torch.save([together(w), together(w, micro=2)], folder / f"{rank}.pt")
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    statuses = [os.waitpid(pid, 0)[1] for pid in children]
    return int(any(statuses))


def test_two_processes_train_as_one(tmp_path):
    """Gradients are joined once a step, also with micro-batches; both sets of norms see the images of all."""
    done = subprocess.run([sys.executable, __file__, tmp_path], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    alone = World(0, 1, 0, torch.device("cpu"))
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2)]
    for i, (losses, values, _) in enumerate((together(alone), together(alone, micro=2))):
        for process in found:
            assert process[i][0] == [pytest.approx(pair, rel=1e-9) for pair in losses]
            assert close(process[i][1], values, 1e-7)
            assert process[i][2] == len(losses)


def test_soft_targets_are_what_the_loss_says():
    logits, y = torch.randn(4, CLASSES), torch.tensor([0, 1, 2, 3])
    assert torch.allclose(LOSS(logits, F.one_hot(y, CLASSES).float()), LOSS(logits, y))


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1])))
