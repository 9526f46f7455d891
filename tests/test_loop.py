"""The loop's ways of computing one and the same step: micro-batches, recomputation, memory limits, precision; and what it says of NaN."""

import json
import math
from dataclasses import replace

import pytest
import torch
from live_storages import LiveStorages
from test_train import SMALL, Fixed

import triscale as ts
from triscale.blocks import BatchNorm
from triscale.recipe import Recipe
from triscale.train.loop import EpochEnd, NonFiniteLossError, Note, Step, cross_entropy, fit
from triscale.train.plan import Plan, fit_memory, largest_micro_batch, optimizer_slots, step_memory
from triscale.train.state import TrainState

LOSS = cross_entropy(0.1)
ALL = ts.Arch(
    ts.Stem(8),
    (
        ts.Stage("conv", 3, 1, 1, 0.25, "identity", 8, 2),
        ts.Stage("mbconv", 5, 2, 4, 0.25, "identity", 16, 2),
        ts.Stage("fused_mbconv", 3, 1, 2, 0.0, "identity", 16, 2),
        ts.Stage("bottleneck", 3, 2, 0.5, 0.0, "identity", 24, 2),
    ),
    ts.Head(32),
    32,
    0.3,
    ts.Numerics(drop_path=0.4),
)


def made(arch=ALL, classes=5, seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return ts.build(arch, classes).to(dtype)


def one_step(net, x, y, plan, recipe=None):
    recipe = recipe or Recipe(epochs=1, batch_size=len(y), lr=0.1, warmup_epochs=0.0)

    class Once:
        def __len__(self):
            return 1

        def epoch(self, index, start=0):
            yield x, y

    (step,) = [e for e in fit(net, Once(), LOSS, recipe, plan=plan) if isinstance(e, Step)]
    return step, {n: p.grad.clone() for n, p in net.named_parameters()}, {k: v.clone() for k, v in net.state_dict().items()}


def apart(a, b):
    return max(((a[k] - b[k]).abs().max() / b[k].abs().max().clamp(min=1e-3)).item() for k in b)


@pytest.mark.parametrize("biased", ["biased", "unbiased"])
def test_recomputation_gives_the_plain_step(biased):
    """With dropout and drop connect on: the second pass draws what the first drew, and norms count it once."""
    arch = ALL.with_numerics(running_variance=biased)
    x, y = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(1)), torch.arange(6) % 5
    plain, again = (one_step(made(arch), x, y, Plan(recompute=r)) for r in (False, True))
    assert again[0].loss == pytest.approx(plain[0].loss, rel=1e-6)
    assert apart(again[1], plain[1]) <= 1e-6
    assert apart(again[2], plain[2]) <= 1e-6
    moved = made(arch).state_dict()
    assert not torch.equal(plain[2]["stem.norm.running_var"], moved["stem.norm.running_var"])


def peak(net, x, y):
    """Bytes beside weights and batch that a pass has alive at most."""
    with LiveStorages([x, y, *net.parameters(), *net.buffers()]) as storages:
        LOSS(net(x), y).backward()
    return storages.peak


def test_recomputation_keeps_less():
    found = []
    for recompute in (False, True):
        torch.manual_seed(0)
        net = ts.build(replace(ts.arch("efficientnet_b0"), resolution=64), 10).train()
        net.recompute = recompute
        found.append(peak(net, torch.randn(4, 3, 64, 64), torch.zeros(4, dtype=torch.long)))
    assert found[1] < 0.7 * found[0]


class Accumulated(torch.nn.Module):
    """The plain step in which norms see the same groups: the batch goes through in parts, and one loss is taken of all logits."""

    def __init__(self, net, size):
        super().__init__()
        self.net, self.size = net, size

    def forward(self, x):
        return torch.cat([self.net(part) for part in x.split(self.size)])


@pytest.mark.parametrize(("micro", "clip"), [(4, 0.0), (3, 0.0), (4, 0.01)])
def test_micro_batches_are_the_plain_step_where_norms_see_the_same_groups(micro, clip):
    arch = replace(ALL.with_numerics(drop_path=0.0), dropout=0.0)
    x, y = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1)).double(), torch.arange(8) % 5
    recipe = Recipe(epochs=1, batch_size=8, lr=0.1, momentum=0.0, warmup_epochs=0.0, clip=clip, ema=0.9)  # momentum changes .grad in place
    parts = one_step(made(arch, dtype=torch.float64), x, y, Plan(micro_batch=micro), recipe)
    reference = made(arch, dtype=torch.float64)
    plain = one_step(Accumulated(reference, micro), x, y, Plan(), recipe)
    assert parts[0].loss == pytest.approx(plain[0].loss, rel=1e-12)
    assert apart(parts[1], {k.removeprefix("net."): v for k, v in plain[1].items()}) <= 1e-10
    assert apart(parts[2], {k.removeprefix("net."): v for k, v in plain[2].items()}) <= 1e-10
    if clip:
        assert math.sqrt(sum(g.square().sum() for g in parts[1].values())) == pytest.approx(clip, rel=1e-4)


@pytest.mark.parametrize("name", ["efficientnet_b0", "resnet18"])
def test_the_planners_micro_batch_is_the_largest_that_fits(name):
    """Against live storages of real steps on the meta device, which the model of memory doesn't see."""
    arch, recipe = replace(ts.arch(name), resolution=96), Recipe(batch_size=64, optimizer="rmsprop", ema=0.999)

    def real(images):
        with torch.device("meta"):
            net = ts.build(arch, 10).train()
            x, y = torch.empty(images, 3, 96, 96), torch.empty(images, dtype=torch.int64)
        weights = sum(p.numel() * 4 for p in net.parameters())
        return peak(net, x, y) + weights * (1 + optimizer_slots(recipe)) + x.numel() * 4

    for images in (5, 11, 16):
        limit = real(images) + 1000
        assert real(images + 1) > limit
        assert abs(largest_micro_batch(arch, recipe, 10, limit, 64) - images) <= 1
    with pytest.raises(ValueError, match="a step of one image needs"):
        fit_memory(Plan(), arch, recipe, 10, 1e6)
    assert fit_memory(Plan(), arch, recipe, 10, 1e12).micro_batch == 0


def test_the_planner_shares_out_evenly():
    arch, recipe = ts.arch("mobilenet_v2"), Recipe(batch_size=96)
    limit = step_memory(arch, recipe, 10, 40)
    assert fit_memory(Plan(), arch, recipe, 10, limit).micro_batch == 32


def test_not_a_number_tells_the_samples_and_the_layer():
    source = Fixed()
    x, y = source.batches[1]
    x = x.clone()
    x[3, 0, 0, 0] = float("nan")
    source.batches[1] = (x, y, range(8, 16))
    steps = fit(ts.build(SMALL, 3), source, LOSS, Recipe(epochs=1))
    next(steps)
    with pytest.raises(NonFiniteLossError, match=r"step 2 of epoch 1.*first not finite is the input; of file11\.jpg$"):
        list(steps)
    net = ts.build(SMALL, 3)
    with torch.no_grad():
        net.head.norm.weight[0] = float("inf")
    with pytest.raises(NonFiniteLossError, match=r"first not finite is the weights of head\.norm\.weight"):
        list(fit(net, Fixed(), LOSS, Recipe(epochs=1)))
    net = ts.build(SMALL, 3)
    with torch.no_grad():
        net.body[0][1].project.conv.weight.fill_(3e38)  # finite, but not what it gives
    with pytest.raises(NonFiniteLossError, match=r"the output of body\.0\.1\.project\.conv.*a lower rate may help"):
        list(fit(net, Fixed(), LOSS, Recipe(epochs=1)))


def test_a_state_put_back_goes_on_bit_for_bit():
    """At every event of a run, also while the average is being evaluated; through JSON, as a checkpoint keeps it."""
    for optimizer in ("sgd", "adamw", "rmsprop"):
        recipe = Recipe(epochs=3, batch_size=8, optimizer=optimizer, lr=0.01, warmup_epochs=0.5, ema=0.9, clip=1.0)
        net = made(classes=3)
        state = TrainState(net, recipe)
        events, kept = [], []
        for event in fit(net, Fixed(3), LOSS, recipe, state=state):
            events.append(event)
            kept.append(({k: v.clone() for k, v in state.tensors().items()}, json.dumps(state.numbers()), len(events)))
        final = {k: v.clone() for k, v in net.state_dict().items()}
        for tensors, numbers, done in kept[::2]:
            fresh = made(classes=3, seed=9)
            resumed = TrainState(fresh, recipe)
            resumed.load(tensors, json.loads(numbers))
            rest = [e for e in fit(fresh, Fixed(3), LOSS, recipe, state=resumed) if isinstance(e, Step)]
            assert [e.loss for e in rest] == [e.loss for e in events[done:] if isinstance(e, Step)], (optimizer, done)
            if done < len(events):
                assert all(torch.equal(v, final[k]) for k, v in fresh.state_dict().items()), (optimizer, done)


def test_a_state_of_another_network_is_refused_and_changes_nothing():
    recipe = Recipe(ema=0.9)
    state, other = TrainState(made(classes=3), recipe), TrainState(made(classes=4), recipe)
    before = {k: v.clone() for k, v in state.tensors().items()}
    with pytest.raises(ValueError, match="another network or recipe"):
        state.load(other.tensors(), other.numbers())
    with pytest.raises(ValueError, match="another network or recipe"):
        state.load({k: v for k, v in before.items() if not k.startswith("average/")}, state.numbers())
    assert all(torch.equal(v, before[k]) for k, v in state.tensors().items())


def test_bfloat16_learns_the_same_within_its_precision():
    losses = {}
    for precision in ("float32", "bfloat16"):
        net = made(replace(ALL.with_numerics(drop_path=0.0), dropout=0.0), 3)
        recipe = Recipe(epochs=12, batch_size=8, lr=0.05, warmup_epochs=1.0)
        losses[precision] = [e.loss for e in fit(net, Fixed(2), LOSS, recipe, plan=Plan(precision=precision)) if isinstance(e, Step)]
        assert all(p.dtype == torch.float32 for p in net.parameters())
        assert all(b.dtype == torch.float32 for m in net.modules() if isinstance(m, BatchNorm) for b in m.buffers())
    assert losses["bfloat16"][0] == pytest.approx(losses["float32"][0], rel=0.02)
    assert losses["bfloat16"][0] != losses["float32"][0]
    assert losses["bfloat16"][-1] < 0.8 * losses["bfloat16"][0]


def test_a_compiler_that_fails_is_told_of_and_done_without(monkeypatch):
    def broken(model, mode=None):
        def run(x):
            raise RuntimeError("no C++ compiler\nmore")

        return run

    monkeypatch.setattr(torch, "compile", broken)
    events = list(fit(made(SMALL, 3), Fixed(), LOSS, Recipe(epochs=1), plan=Plan(compile=True)))
    assert [type(e) for e in events] == [Note, Step, Step, EpochEnd]
    assert events[0].text == "torch.compile failed, going on without it: no C++ compiler"
