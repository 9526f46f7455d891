"""1x1 convolutions and squeeze-excitation's layers as kernels, against float64. Whatever surrounds a tensor is NaN, and stays it."""

import math
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import DEVICE, TANH, run_apart, runs_here

import triscale as ts
from triscale.blocks import make_block

if runs_here():
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle, interpreter_builder

    from triscale.kernels import squeeze as squeezing
    from triscale.kernels.depthwise import depthwise
    from triscale.kernels.pointwise import PointwiseConfig, configs, pointwise, pointwise_kernel, pointwise_reference
    from triscale.kernels.squeeze import squeeze, squeeze_reference
    from triscale.kernels.tiling import DepthwiseConfig

BF16, FP16 = torch.bfloat16, torch.float16
TOLERANCE = {BF16: 4e-3, FP16: 1e-3}
FRAME = 64  # elements before and after


def framed(tensor):
    buffer = torch.full((tensor.numel() + 2 * FRAME,), math.nan, dtype=tensor.dtype, device=DEVICE)
    inside = buffer[FRAME : FRAME + tensor.numel()].view(tensor.shape)
    inside.copy_(tensor)
    return inside


@contextmanager
def poisoned():
    """What is allocated inside starts as NaN in a frame of NaN; afterwards the frame still has to be."""
    real, frames = torch.empty, []

    def empty(shape, *, dtype=torch.float32, device=None):
        buffer = torch.full((math.prod(shape) + 2 * FRAME,), math.nan, dtype=dtype, device=device)
        frames.append(buffer)
        return buffer[FRAME:-FRAME].view(shape)

    torch.empty = empty
    try:
        yield
    finally:
        torch.empty = real
    assert len(frames) == 1
    assert frames[0][:FRAME].isnan().all()
    assert frames[0][-FRAME:].isnan().all()


def error(found, expected):
    """Relative L2 distance."""
    return float((found.double() - expected).norm() / expected.norm())


def operands(shape, cout, dtype=BF16, *, gate=False, residual=False):
    n, height, width, cin = shape
    out = {
        "x": torch.randn(shape).to(dtype),
        "weight": (torch.randn(cin, cout) / cin**0.5).to(dtype),
        "bias": torch.randn(cout),
        "gate": torch.rand(n, cin) if gate else None,
        "residual": torch.randn(n, height, width, cout).to(dtype) if residual else None,
    }
    return {name: t if t is None else framed(t) for name, t in out.items()}


def exact(given, **rest):
    return pointwise_reference(**{name: t if t is None else t.double() for name, t in given.items()}, **rest)


def run(given, **rest):
    with poisoned():
        return pointwise(**given, **rest)


@settings(max_examples=24, deadline=None, derandomize=True)
@given(st.data())
def test_any_shape_equals_float64(data):
    shape = tuple(data.draw(st.integers(1, top)) for top in (3, 6, 7, 67))
    cout, dtype = data.draw(st.integers(1, 50)), data.draw(st.sampled_from((BF16, FP16)))
    gate, residual, pool = (data.draw(st.booleans()) for _ in range(3))
    act = data.draw(st.sampled_from(("silu", "relu", "relu6", "none")))
    places = shape[1] * shape[2]
    config = data.draw(st.sampled_from(configs(shape[0] * places, places, shape[3], cout, gated=gate, pool=pool)))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    given = operands(shape, cout, dtype, gate=gate, residual=residual)
    y, expected = run(given, act=act, pool=pool, config=config), exact(given, act=act)
    approximate = TANH * exact(given).abs() / 2 if act == "silu" else torch.zeros_like(expected)
    if pool:
        assert y.dtype == torch.float32
        # Sums of few values may cancel: the measure is the size of what was added.
        bound = (TOLERANCE[dtype] * expected.abs() + approximate).sum((1, 2)).norm()
        assert float((y.double().sum(1) - expected.sum((1, 2))).norm()) <= float(bound)
    else:
        assert y.dtype == dtype
        assert float((y.double() - expected).norm()) <= TOLERANCE[dtype] * float(expected.norm()) + float(approximate.norm())


def test_every_way_to_cut_the_product_gives_the_same():
    torch.manual_seed(0)
    given = operands((2, 4, 5, 80), 72)
    expected = exact(given, act="silu")
    ways = (*configs(40, 20, 80, 72), PointwiseConfig(32, 16, 64, 16, span=2))  # the last: 5 tiles of outputs by twos
    assert any(c.held and c.tail_k for c in ways)
    assert any(not c.held and c.block_k < 80 for c in ways)
    for config in ways:
        assert error(run(given, act="silu", config=config), expected) <= 2.5e-3, config


@pytest.mark.parametrize("by_image", [False, True])
def test_rows_of_a_tile_take_the_gates_of_their_own_images(by_image):
    """Seven images of five rows in tiles of 16: a gate of another image would be off by a factor of 4 or more."""
    torch.manual_seed(1)
    given = operands((7, 1, 5, 33), 20, residual=True)
    given["gate"] = framed(4.0 ** -torch.arange(7.0)[:, None] * torch.ones(33))
    given["residual"].mul_(given["gate"][:, None, None, :1].to(BF16))
    y = run(given, config=PointwiseConfig(16, 16, 16, by_image=by_image))
    y, expected = (t - given["bias"] for t in (y.double(), exact(given)))
    assert error(y[0], expected[0]) <= 4e-3
    given["bias"].zero_()
    y, expected = run(given, config=PointwiseConfig(16, 16, 16, by_image=by_image)), exact(given)
    assert max(error(y[i], expected[i]) for i in range(7)) <= 4e-3


def test_the_activation_comes_after_the_residual():
    """As in Bottleneck and DepthwiseSeparable."""
    given = operands((1, 2, 3, 4), 5, residual=True)
    given["weight"].zero_()
    given["bias"].fill_(1.0)
    given["residual"].fill_(-0.5)
    assert torch.equal(run(given, act="relu"), torch.full_like(given["residual"], 0.5))
    given["residual"].fill_(-3.0)
    assert torch.equal(run(given, act="relu"), torch.zeros_like(given["residual"]))


def test_each_part_of_the_pooled_sums_is_of_its_own_rows():
    torch.manual_seed(2)
    given = operands((2, 5, 9, 24), 40)
    sums = run(given, act="silu", pool=True, config=PointwiseConfig(16, 32, 32, by_image=True))
    rows = exact(given, act="silu").view(2, 45, 40)
    expected = torch.stack([rows[:, start : start + 16].sum(1) for start in (0, 16, 32)], 1)
    assert sums.shape == (2, 3, 40)
    assert error(sums, expected) <= (1e-5 if DEVICE.type == "cpu" else 1e-3)  # the device's tanh is good to 2^-11


def test_the_same_bits_every_time():
    torch.manual_seed(3)
    given = operands((2, 7, 7, 40), 24, gate=True, residual=True)
    for pool in (False, True):
        assert torch.equal(run(given, pool=pool), run(given, pool=pool))
    sums = torch.randn(2, 9, 40, device=DEVICE)
    layers = [torch.randn(*s, device=DEVICE) for s in ((6, 40), (6,), (40, 6), (40,))]
    assert torch.equal(squeeze(sums, 49, *layers), squeeze(sums, 49, *layers))


def test_no_images():
    given = operands((0, 3, 3, 4), 5)
    assert pointwise(**given).shape == (0, 3, 3, 5)
    assert pointwise(**given, pool=True).shape[::2] == (0, 5)
    assert squeeze(torch.zeros(0, 2, 3), 4, torch.ones(1, 3), torch.ones(1), torch.ones(3, 1), torch.ones(3)).shape == (0, 3)


def test_pooling_takes_tiles_by_image():
    with pytest.raises(ValueError, match="by image"):
        pointwise(**operands((2, 3, 3, 8), 6), pool=True, config=PointwiseConfig(16, 16, 16))


def layers_of(channels, squeezed, dtype):
    shapes = ((squeezed, channels), (squeezed,), (channels, squeezed), (channels,))
    return [framed((torch.randn(shape) / shape[-1] ** 0.5).to(dtype if len(shape) == 2 else torch.float32)) for shape in shapes]


def check_gate(sums, places, layers, act, config):
    with poisoned():
        gate = squeeze(framed(sums), places, *layers, act=act, config=config)
    expected = squeeze_reference(sums.double(), places, *(t.double() for t in layers), act=act)
    assert gate.dtype == torch.float32
    assert float((gate.double() - expected).abs().max()) <= 1e-5


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.data())
def test_any_gate_equals_float64(data):
    n, parts, channels, squeezed = (data.draw(st.integers(1, top)) for top in (3, 40, 90, 12))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    layers = layers_of(channels, squeezed, data.draw(st.sampled_from((BF16, FP16, torch.float32))))
    config = data.draw(st.sampled_from(squeezing.configs(data.draw(st.sampled_from((1, 200))), parts, channels, squeezed)))
    config = replace(config, block_t=data.draw(st.sampled_from((1, config.block_t))))  # with and without a loop over the parts
    sums = 20 * torch.randn(n, parts, channels, device=DEVICE)
    check_gate(sums, data.draw(st.integers(1, 500)), layers, data.draw(st.sampled_from(("silu", "relu", "relu6"))), config)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_gates_of_the_widest_block():
    torch.manual_seed(4)
    layers = layers_of(3840, 160, BF16)
    check_gate(300 * torch.randn(1, 4, 3840, device=DEVICE), 361, layers, "silu", None)
    saturated = torch.full((1, 1, 3840), 1e6, device=DEVICE) * torch.randn(3840, device=DEVICE)
    check_gate(saturated, 1, layers, "silu", None)


def rounded_to_bf16(layer):
    """Folded weight and bias of a ConvNormAct whose weight was changed so that bf16 holds the folded one exactly."""
    factor = layer.norm.weight * torch.rsqrt(layer.norm.running_var + layer.norm.eps)
    weight = (layer.conv.weight * factor.view(-1, 1, 1, 1)).to(BF16)
    layer.conv.weight.copy_(weight.double() / factor.view(-1, 1, 1, 1))
    return weight, layer.folded()[1].float()


@torch.no_grad()
def mbconv():
    """B0's second block of its third stage (40 -> 240 -> 40 channels, 5x5, squeezed to 10, identity) with norms that do something."""
    arch = ts.arch("efficientnet_b0")
    found = next(b for b in arch.blocks() if b.stage_index == 2 and b.layer == 1)
    block = make_block(found, arch.numerics).double().eval()
    for norm in (block.expand.norm, block.depthwise.norm, block.project.norm):
        for tensor, low, high in ((norm.weight, 0.5, 1.5), (norm.bias, -0.5, 0.5), (norm.running_mean, -0.2, 0.2), (norm.running_var, 0.5, 2.0)):
            tensor.uniform_(low, high)
    for layer in (block.se.reduce, block.se.expand):
        layer.bias.uniform_(-1, 1)
    return block


@torch.no_grad()
def test_the_four_kernels_make_an_mbconv():
    torch.manual_seed(5)
    block = mbconv()
    expand, (taps, bias), project = (rounded_to_bf16(layer) for layer in (block.expand, block.depthwise, block.project))
    x = torch.randn(2, 40, 6, 7).to(BF16)
    expected = block(x.double()).permute(0, 2, 3, 1).to(DEVICE)

    x = x.permute(0, 2, 3, 1).contiguous().to(DEVICE)
    weights = [t.flatten(1).T.contiguous().to(DEVICE) for t in (expand[0], project[0])]
    inner = pointwise(x, weights[0], expand[1].to(DEVICE), act="silu", config=PointwiseConfig(64, 128, 32, 16, 2))
    taps = taps[:, 0].permute(1, 2, 0).to(DEVICE)
    inner, sums = depthwise(
        inner, taps.contiguous(), bias.to(DEVICE), stride=1, pad=(2, 2, 2, 2), act="silu", pool=True, config=DepthwiseConfig(7, 6, 4, 4)
    )
    se = (t.float().to(DEVICE) for layer in (block.se.reduce, block.se.expand) for t in (layer.weight.flatten(1), layer.bias))
    gate = squeeze(sums, 42, *se, act="silu")
    way = PointwiseConfig(64, 64, 64, by_image=True)
    y = pointwise(inner, weights[1], project[1].to(DEVICE), gate=gate, residual=x, config=way)
    assert error(y, expected) <= 4e-3
    assert error(y - x, expected - x) <= 6e-3  # the branch alone


def test_tensors_of_more_than_two_to_the_31_elements(monkeypatch):
    """On a GPU for real. The interpreter runs the last program alone, and the memory that it doesn't touch is never there."""
    n, places, cin, cout, config = 2**17 + 8, 1024, 16, 17, PointwiseConfig(16, 32, 16, by_image=True)
    x, y = (torch.empty(n, 32, 32, c, dtype=BF16, device=DEVICE) for c in (cin, cout))
    x[-1] = torch.randn(32, 32, cin)
    weight, bias = torch.randn(cin, cout, device=DEVICE).to(BF16), torch.randn(cout, device=DEVICE)
    gate = torch.empty(n, cin, device=DEVICE)
    gate[-1] = torch.rand(cin)
    expected = pointwise_reference(x[-1:].double(), weight.double(), bias.double(), gate=gate[-1:].double())
    if DEVICE.type == "cuda":
        for by_image in (True, False):
            y = pointwise(x, weight, bias, gate=gate, config=replace(config, by_image=by_image))
            assert error(y[-1:], expected) <= 4e-3
        return
    last = TensorHandle(np.array([n * places // 16 - 1], dtype=np.int32), tl.int32)
    monkeypatch.setattr(interpreter_builder, "create_get_program_id", lambda axis: last)
    constants = {"cin": cin, "cout": cout, "act": "none", "pool": False, "block_m": 16, "block_o": 32, "block_k": 16, "tail_k": 0, "span": 1}
    for by_image in (True, False):
        y[-1, -1, 16:] = math.nan
        pointwise_kernel[(1,)](x, weight, bias, gate, None, y, n * places, places, **constants, by_image=by_image)
        assert error(y[-1, -1, 16:], expected[0, -1, 16:]) <= 4e-3


run_apart(globals())
