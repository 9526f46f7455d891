"""The built module: how it runs, how it starts, what it keeps."""

import copy
import io
import math
import pickle
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import archs

import triscale as ts
from triscale.blocks import BatchNorm, Conv2d, DropPath, PoolShortcut, same_padding
from triscale.model import StemPool

B0 = ts.arch("efficientnet_b0")
# Every kind of block in a network that runs in milliseconds.
MIXED = ts.Arch(
    ts.Stem(8),
    (
        ts.Stage("mbconv", 3, 1, 1, 0.25, "identity", 8, 2),
        ts.Stage("fused_mbconv", 3, 2, 4, 0.25, "identity", 16, 2),
        ts.Stage("mbconv", 5, 2, 6, 0.25, "pool", 24, 2),
        ts.Stage("separable", 3, 1, 1, 0, "identity", 24, 1),
        ts.Stage("conv", 3, 1, 1, 0, "identity", 24, 2),
        ts.Stage("basic", 3, 2, 1, 0, "identity", 32, 2),
        ts.Stage("bottleneck", 3, 2, 0.25, 0, "identity", 40, 2),
    ),
    ts.Head(64),
    64,
)


def images(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fresh(arch, *args, seed=0):
    torch.manual_seed(seed)
    return ts.build(arch, *args)


def settled(arch, *args, seed=0):
    """In evaluation, with norms away from their start and running statistics of its own inputs."""
    net = fresh(arch, *args, seed=seed).train()
    with torch.no_grad():
        for m in net.modules():
            if isinstance(m, BatchNorm):
                m.momentum = 1.0
                m.weight.uniform_(0.5, 1.5)
                m.bias.normal_(0, 0.2)
        net(images(8, net.in_channels, arch.resolution, arch.resolution, seed=9))
    return net.eval()


def relative(got, expected):
    return ((got - expected).abs().max() / expected.abs().max()).item()


@pytest.fixture(scope="module")
def mixed():
    net = settled(MIXED, 10)
    logits = net(images(2, 3, 64, 64)).detach()
    assert (logits[0] - logits[1]).abs().max() > 0.05 * logits.abs().max()
    return net


@pytest.mark.parametrize("numerics", [{}, {"padding": "symmetric", "activation": "relu"}, {"activation": "relu6"}], ids=str)
def test_folded_and_plain_paths_agree(numerics):
    """Without autograd each norm is folded into its convolution and the activations work in place."""
    net = settled(MIXED.with_numerics(**numerics), 10)
    for size in ((64, 64), (33, 50)):
        x = images(2, 3, *size)
        kept = x.clone()
        with torch.no_grad():
            folded = net(x)
        assert relative(folded, net(x).detach()) < 1e-5
        assert torch.equal(x, kept), "the input was changed"


def test_channels_last_gives_the_same(mixed):
    x = images(3, 3, 64, 64)
    expected = mixed(x).detach()
    net = copy.deepcopy(mixed).to(memory_format=torch.channels_last)
    xl = x.contiguous(memory_format=torch.channels_last)
    assert relative(net(xl).detach(), expected) < 1e-5
    with torch.no_grad():
        assert relative(net(xl), expected) < 1e-5
        assert net.features(xl).is_contiguous(memory_format=torch.channels_last)


def test_channels_last_gradients_are_the_same(mixed):
    """At 64 px the last maps are small enough for the matrix-product form of the 1x1 convolution."""
    grads = []
    for layout in (torch.contiguous_format, torch.channels_last):
        net = copy.deepcopy(mixed).double().to(memory_format=layout)
        x = images(4, 3, 64, 64).double().contiguous(memory_format=layout)
        F.cross_entropy(net(x), torch.tensor([1, 2, 3, 4])).backward()
        grads.append([p.grad for p in net.parameters()])
    assert max(relative(a, b) for a, b in zip(*grads, strict=True)) < 1e-9


FEW = replace(MIXED, stages=(MIXED.stages[2], MIXED.stages[4]))  # squeeze-excitation, both shortcuts; a branch ending in an activation


def test_compiled_evaluation():
    plain = settled(FEW, 10)
    net = torch.compile(copy.deepcopy(plain), backend="eager", fullgraph=True)
    x = images(2, 3, 64, 64)
    with torch.no_grad():
        assert relative(net(x), plain(x)) < 1e-5


def test_compiled_training_step_gives_the_same_gradients_and_statistics():
    arch = replace(FEW.with_numerics(drop_path=0.0), dropout=0.0)
    nets = [fresh(arch, 10).double().train(), fresh(arch, 10).double().train()]
    x, y = images(4, 3, 64, 64).double(), torch.tensor([1, 2, 3, 4])
    for net, call in zip(nets, (nets[0], torch.compile(nets[1], backend="aot_eager", fullgraph=True)), strict=True):
        F.cross_entropy(call(x), y).backward()
        assert not torch.equal(net.stem.norm.running_var, torch.ones(8))
    plain, compiled = (dict(net.named_parameters()) for net in nets)
    largest = max(p.grad.abs().max() for p in plain.values())
    assert all((compiled[key].grad - p.grad).abs().max() < 1e-9 * largest for key, p in plain.items())
    assert all(torch.allclose(a, b, rtol=1e-9) for a, b in zip(nets[0].buffers(), nets[1].buffers(), strict=True))


def test_export_with_a_dynamic_batch(mixed):
    batch = torch.export.Dim("batch", min=1, max=64)
    with torch.no_grad():
        program = torch.export.export(mixed, (images(2, 3, 64, 64),), dynamic_shapes=({0: batch},))
        for n in (1, 2, 7):
            x = images(n, 3, 64, 64, seed=n)
            assert relative(program.module()(x), mixed(x)) < 1e-5


def test_bfloat16_is_close(mixed):
    """Three significant digits a layer leave a few percent after 25 layers: 4 % here."""
    x = images(8, 3, 64, 64)

    def off(logits):
        return ((logits.float() - expected).norm() / expected.norm()).item()

    with torch.no_grad():
        expected = mixed(x)
        got = copy.deepcopy(mixed).bfloat16()(x.bfloat16())
        assert got.dtype == torch.bfloat16
        assert off(got) < 0.15
        with torch.autocast("cpu", torch.bfloat16):
            assert off(mixed(x)) < 0.15
    net = copy.deepcopy(mixed)
    with torch.autocast("cpu", torch.bfloat16):
        F.cross_entropy(net(x), torch.zeros(8, dtype=torch.long)).backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())


def test_meta_device_build_allocates_nothing_and_loads():
    with torch.device("meta"):
        net = ts.build(MIXED, 10)
    assert all(t.is_meta for t in (*net.parameters(), *net.buffers()))
    real = settled(MIXED, 10)
    net.load_state_dict(real.state_dict(), assign=True)
    x = images(2, 3, 64, 64)
    assert torch.equal(net.eval()(x), real(x))


@pytest.mark.parametrize("name", ["efficientnet_b0", "resnet18"])
@pytest.mark.parametrize("size", [(32, 32), (33, 33), (47, 65)], ids=str)
def test_input_sizes_round_up(name, size):
    net = fresh(ts.arch(name), 5).eval()
    with torch.no_grad():
        maps, last = net.stages(images(2, 3, *size)), net.features(images(2, 3, *size))
    for name, x in maps.items():
        stride = int(name.removeprefix("stride"))
        assert x.shape[2:] == tuple(math.ceil(n / stride) for n in size)
    assert last.shape[2:] == maps["stride32"].shape[2:]


@pytest.mark.parametrize("padding", ["same", "symmetric"])
@settings(max_examples=40, deadline=None, derandomize=True)
@given(arch=archs(most_stages=2), height=st.integers(1, 40), width=st.integers(1, 40))
def test_both_paddings_give_maps_rounded_up(padding, arch, height, width):
    net = ts.build(arch.with_numerics(padding=padding), 3).eval()
    with torch.no_grad():
        for name, x in net.stages(images(1, 3, height, width)).items():
            stride = int(name.removeprefix("stride"))
            assert x.shape[2:] == (math.ceil(height / stride), math.ceil(width / stride))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(1, 500), st.sampled_from((1, 3, 5, 7, 9)), st.sampled_from((1, 2)))
def test_same_padding_is_tensorflows(size, kernel, stride):
    before, after = same_padding(size, kernel, stride)
    assert before + after == max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
    assert after - before in (0, 1)
    assert (size + before + after - kernel) // stride + 1 == math.ceil(size / stride)


@pytest.mark.parametrize("size", [5, 6, 32, 33])
@pytest.mark.parametrize("kernel", [3, 5])
def test_same_convolution_puts_the_odd_pixel_last(kernel, size):
    conv = Conv2d(1, 1, kernel, 2)
    total = max((math.ceil(size / 2) - 1) * 2 + kernel - size, 0)
    x = images(1, 1, size, size)
    padded = torch.zeros(1, 1, size + total, size + total)
    padded[:, :, total // 2 : total // 2 + size, total // 2 : total // 2 + size] = x
    assert torch.allclose(conv(x), F.conv2d(padded, conv.weight, stride=2), atol=1e-6)


@pytest.mark.parametrize("channels", [1, 5])
@pytest.mark.parametrize("classes", [0, 1, 7])
def test_other_inputs_and_heads(channels, classes):
    net = settled(MIXED, classes, channels)
    y = net(images(2, channels, 64, 64)).detach()
    assert y.shape == (2, classes or 64)
    assert not torch.equal(y[0], y[1])
    if not classes:
        assert torch.equal(y, net.features(images(2, channels, 64, 64)).mean((2, 3)))
        assert net.classifier is None


@pytest.mark.parametrize("wrong", [(-1, 3), (10, 0)])
def test_no_input_channel_or_fewer_than_no_classes_is_refused(wrong):
    with pytest.raises(ValueError, match="num_classes >= 0 and in_channels >= 1"):
        ts.build(MIXED, *wrong)


def test_a_name_in_place_of_an_arch_is_refused():
    with pytest.raises(ValueError, match="expected an Arch, found str"):
        ts.build("efficientnet_b0")


@pytest.mark.parametrize(
    ("name", "channels"),
    [("efficientnet_b0", (16, 24, 40, 112, 320)), ("resnet50", (64, 256, 512, 1024, 2048)), ("mobilenet_v1", (64, 128, 256, 512, 1024))],
)
def test_stages_of_named_networks(name, channels):
    with torch.device("meta"):
        net = ts.build(ts.arch(name)).eval()
        out = net.stages(torch.empty(2, 3, 224, 224))
    assert {key: x.shape[1:] for key, x in out.items()} == {f"stride{2**i}": (c, 224 >> i, 224 >> i) for i, c in enumerate(channels, 1)}


def test_stages_are_what_forward_uses(mixed):
    """The deepest stage, through the head, pooling and the classifier, gives the logits; each stage is its last block's output."""
    x = images(2, 3, 64, 64)
    with torch.no_grad():
        maps = mixed.stages(x)
        assert list(maps) == ["stride2", "stride4", "stride8", "stride16", "stride32"]
        assert relative(mixed.head(maps["stride32"]), mixed.features(x)) < 1e-6
        assert relative(mixed.classifier(mixed.head(maps["stride32"]).mean((2, 3))), mixed(x)) < 1e-6
        y = mixed.body[0][1](mixed.body[0][0](mixed.stem(x)))
        assert relative(maps["stride2"], y) < 1e-6


@settings(max_examples=30, deadline=None, derandomize=True)
@given(archs())
def test_random_networks_train_and_evaluate(arch):
    net = fresh(arch, 3)
    x = images(4, 3, arch.resolution, arch.resolution)
    F.cross_entropy(net(x), torch.tensor([0, 1, 2, 0])).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    with torch.no_grad():
        folded = net.eval()(x)
    plain = net(x).detach()
    assert (folded - plain).abs().max() <= 1e-4 * max(plain.abs().max().item(), 1e-3)


@pytest.mark.parametrize("activation", ["silu", "relu", "relu6"])
@pytest.mark.parametrize("padding", ["same", "symmetric"])
def test_gradients_are_the_slope_of_the_loss(padding, activation):
    """In training with drop connect and dropout drawn alike, where sums, activations and drops work in place; in float64."""
    net = fresh(MIXED.with_numerics(padding=padding, activation=activation, drop_path=0.5), 10).double().train()
    x, y = images(4, 3, 64, 64).double(), torch.tensor([1, 2, 3, 4])
    parameters = list(net.parameters())
    direction = [torch.randn_like(p) * p.abs().mean() for p in parameters]

    def loss(step):
        torch.manual_seed(0)
        shifted = {name: p + step * d for (name, p), d in zip(net.named_parameters(), direction, strict=True)}
        return F.cross_entropy(torch.func.functional_call(net, shifted, (x,)), y)

    loss(0.0).backward()
    slope = sum((p.grad * d).sum() for p, d in zip(parameters, direction, strict=True)).item()
    with torch.no_grad():
        h = 1e-8  # 1e-6 crosses enough kinks of the ReLUs to show
        assert slope == pytest.approx(((loss(h) - loss(-h)) / (2 * h)).item(), rel=1e-4)
    assert abs(slope) > 1e-3


@pytest.mark.parametrize("padding", ["same", "symmetric"])
@pytest.mark.parametrize("size", [(6, 7), (7, 6)], ids=str)
def test_stem_pool_takes_the_largest_real_value(padding, size):
    """Negative values too: what is padded never wins. SAME puts the odd row or column last, symmetric padding one on each side."""
    x = -images(1, 1, *size).abs() - 1
    got = StemPool(padding)(x)[0, 0]
    for i in range(got.shape[0]):
        for j in range(got.shape[1]):
            first = [2 * k - (1 if padding == "symmetric" or n % 2 else 0) for k, n in zip((i, j), size, strict=True)]
            window = x[0, 0, max(first[0], 0) : first[0] + 3, max(first[1], 0) : first[1] + 3]
            assert got[i, j] == window.max()
    assert got.shape == ((size[0] + 1) // 2, (size[1] + 1) // 2)


def test_pool_shortcut_by_hand():
    """Means over stride x stride, partial windows at the edge over what they hold; the added channels are 0."""
    x = torch.arange(9.0).view(1, 1, 3, 3)
    y = PoolShortcut(2, 2)(x)
    assert y.shape == (1, 3, 2, 2)
    assert y[0, 0].tolist() == [[2.0, 3.5], [6.5, 8.0]]
    assert not y[0, 1:].any()
    assert torch.equal(PoolShortcut(1, 1)(x)[:, :1], x)


def test_the_same_seed_gives_the_same_network():
    first, second, other = fresh(B0, seed=3), fresh(B0, seed=3), fresh(B0, seed=4)
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True))
    assert not torch.equal(first.stem.conv.weight, other.stem.conv.weight)


def test_initial_values_have_the_official_spread():
    """Normal with std sqrt(2 / (k k out)), for depthwise convolutions sqrt(2 / (k k)); not truncated; norms 1 and 0."""
    net = fresh(ts.arch("efficientnet_b4"), 100)
    scaled = {True: [], False: []}
    for m in net.modules():
        if isinstance(m, Conv2d):
            depthwise = m.groups > 1
            fan_out = m.kernel_size[0] ** 2 * (1 if depthwise else m.out_channels)
            values = m.weight.detach().flatten() / math.sqrt(2 / fan_out)
            scaled[depthwise].append(values)
            n = values.numel()
            if n > 2000:
                assert values.std().item() == pytest.approx(1, abs=5 / math.sqrt(2 * n))
            assert abs(values.mean().item()) < 6 / math.sqrt(n)
            if m.bias is not None:
                assert not m.bias.any()
        elif isinstance(m, BatchNorm):
            assert bool((m.weight == 1).all())
            assert not m.bias.any()
    for values in scaled.values():
        everything = torch.cat(values)
        assert everything.std().item() == pytest.approx(1, abs=0.005)
        assert (everything.abs() > 2).float().mean().item() == pytest.approx(0.0455, abs=0.003)  # a truncated normal has none
    bound = 1 / math.sqrt(100)
    w = net.classifier.weight.detach()
    assert w.abs().max().item() <= bound
    assert w.abs().max().item() > 0.99 * bound
    assert w.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert not net.classifier.bias.any()


@pytest.mark.parametrize("rate", [0.0, 0.2, 0.5])
def test_drop_path_drops_whole_samples_at_its_rate(rate):
    torch.manual_seed(0)
    n = 20_000
    drop = DropPath(rate).train()
    x = torch.rand(n, 2, 1, 2) + 0.5
    y = drop(x.clone())
    kept = (y != 0).flatten(1).all(1)
    assert torch.equal(kept, (y != 0).flatten(1).any(1))
    assert torch.allclose(y[kept], x[kept] / (1 - rate))
    assert kept.float().mean().item() == pytest.approx(1 - rate, abs=5 * math.sqrt(rate * (1 - rate) / n))
    assert torch.equal(drop.eval()(x.clone()), x)


def test_drop_path_acts_in_training_and_only_on_blocks_with_a_skip():
    net = fresh(B0.with_numerics(drop_path=0.9), 3)
    rates = [(block.drop.rate, block.joined) for stage in net.body for block in stage]
    assert all((rate > 0) == joined for rate, joined in rates)
    block = net.body[1][1].train()  # of 24 channels, its skip is the identity
    block.drop.rate = 0.5
    x = images(64, 24, 4, 4)
    y = block(x.clone()).detach()
    dropped = (y == x).flatten(1).all(1)
    assert 16 < dropped.sum() < 48


def test_dropout_acts_in_training_only(mixed):
    net = copy.deepcopy(mixed)
    x = images(2, 3, 64, 64)
    assert torch.equal(net(x), net(x))
    for m in net.modules():
        m.training = not isinstance(m, (BatchNorm, DropPath))  # dropout alone
    torch.manual_seed(0)
    with torch.no_grad():
        features = net.features(x).mean((2, 3))
        torch.manual_seed(0)
        expected = net.classifier(F.dropout(features, 0.2, True))
        torch.manual_seed(0)
        assert relative(net(x), expected) < 1e-5
    assert not torch.equal(net(x), net(x))


def test_evaluation_leaves_the_running_statistics_alone(mixed):
    before = copy.deepcopy(mixed.state_dict())
    mixed(images(4, 3, 64, 64))
    with torch.no_grad():
        mixed(images(4, 3, 64, 64))
    assert all(torch.equal(v, before[k]) for k, v in mixed.state_dict().items())


def test_copies_pickles_and_states_give_the_same_numbers(mixed):
    x = images(2, 3, 64, 64)
    expected = mixed(x)
    assert torch.equal(copy.deepcopy(mixed)(x), expected)
    again = pickle.loads(pickle.dumps(mixed))
    assert torch.equal(again(x), expected)
    assert (again.arch, again.num_classes, again.in_channels) == (MIXED, 10, 3)
    file = io.BytesIO()
    torch.save(mixed.state_dict(), file)
    file.seek(0)
    other = fresh(MIXED, 10, seed=5).eval()
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(x), expected)


def test_a_state_needs_no_batch_counters_and_may_have_them(mixed):
    state = mixed.state_dict()
    assert not [key for key in state if "num_batches_tracked" in key]
    other = fresh(MIXED, 10, seed=5).eval()
    for extra in ({}, {f"{key.removesuffix('.running_var')}.num_batches_tracked": torch.tensor(3) for key in state if key.endswith("running_var")}):
        plain = {**{key: value.clone() for key, value in state.items()}, **extra}  # no version metadata, as from a safetensors file
        keys = len(plain)
        other.load_state_dict(plain, strict=True)
        assert len(plain) == keys
        assert torch.equal(other(images(2, 3, 64, 64)), mixed(images(2, 3, 64, 64)))


def test_a_state_that_lacks_or_exceeds_is_refused(mixed):
    state = dict(mixed.state_dict())
    del state["stem.norm.running_var"]
    with pytest.raises(RuntimeError, match=r"Missing key.*stem\.norm\.running_var"):
        copy.deepcopy(mixed).load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*stem\.norm\.scale"):
        copy.deepcopy(mixed).load_state_dict({**mixed.state_dict(), "stem.norm.scale": torch.ones(1)})


def test_running_variance_rules():
    """biased keeps the batch variance as it is, unbiased n / (n - 1) of it; both normalise alike."""
    x = images(2, 4, 3, 3)
    n = x.numel() // 4
    outputs = []
    for rule, factor in (("biased", 1), ("unbiased", n / (n - 1))):
        norm = BatchNorm(4, ts.Numerics(running_variance=rule, norm_momentum=0.1)).train()
        outputs.append(norm(x).detach())
        expected = 0.9 + 0.1 * factor * x.var((0, 2, 3), correction=0)
        assert torch.allclose(norm.running_var, expected, rtol=1e-6)
        assert torch.allclose(norm.running_mean, 0.1 * x.mean((0, 2, 3)), rtol=1e-5)
    assert torch.equal(*outputs)


def test_hooks_and_norms_in_training_are_not_folded_away():
    """Statistics re-estimated in an evaluating network, and a hook on a norm: both are the plain path."""
    net = ts.build(ts.arch("mobilenet_v2")).eval()
    x = torch.randn(2, 3, 32, 32)
    seen = []
    net.stem.norm.register_forward_hook(lambda *_: seen.append(1))
    before = net.body[3][0].depthwise.norm.running_mean.clone()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d) and module is not net.stem.norm:
            module.train()
    with torch.no_grad():
        net(x)
    assert seen == [1]
    assert not torch.equal(before, net.body[3][0].depthwise.norm.running_mean)
