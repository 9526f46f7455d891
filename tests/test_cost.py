"""The cost arithmetic against torch's own counters on the built modules, and against the paper."""

import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import meta_build
from strategies import archs
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import triscale as ts

# Billions of multiply-adds, counted with torch's flop counter on timm's modules.
COUNTED = dict(zip((f"efficientnet_b{i}" for i in range(9)), (0.386, 0.687, 0.994, 1.827, 4.394, 10.266, 19.068, 37.746, 62.597), strict=True))
COUNTED |= {"mobilenet_v1": 0.569, "mobilenet_v2": 0.301, "resnet50": 4.089}
COUNTED_SCALED = [
    ("efficientnet_b0", {"depth": 4}, 1.575),
    ("efficientnet_b0", {"width": 2}, 1.450),
    ("efficientnet_b0", {"resolution": 2}, 1.538),
    ("efficientnet_b0", {"depth": 1.4, "width": 1.2, "resolution": 1.3}, 1.800),
    ("mobilenet_v1", {"width": 2}, 2.216),
    ("mobilenet_v1", {"resolution": 2}, 2.272),
    ("mobilenet_v1", {"depth": 1.4, "width": 1.2, "resolution": 1.3}, 2.470),
    ("mobilenet_v2", {"depth": 4}, 1.220),
    ("mobilenet_v2", {"width": 2}, 1.137),
    ("mobilenet_v2", {"resolution": 2}, 1.199),
    ("resnet50", {"depth": 4}, 14.571),
    ("resnet50", {"width": 2}, 15.870),
    ("resnet50", {"resolution": 2}, 16.351),
]
PAPER_TABLE_2 = dict(zip((f"efficientnet_b{i}" for i in range(8)), (0.39, 0.70, 1.0, 1.8, 4.2, 9.9, 19, 37), strict=True))


class Outputs(TorchDispatchMode):
    """Elements that convolutions and linear layers put out."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.convolution.default, torch.ops.aten.addmm.default):
            self.elements += out.numel()
        return out


def counted(net, arch, size=None):
    """(multiply-adds, output elements) of one forward pass, half of the operations that torch's own counter gives."""
    height, width = size or (arch.resolution, arch.resolution)
    with torch.no_grad(), FlopCounterMode(display=False) as flops, Outputs() as outputs:
        net(torch.empty(1, net.in_channels, height, width, device=next(net.parameters()).device))
    return flops.get_total_flops() / 2, outputs.elements


@pytest.mark.parametrize("name", sorted({*ts.names()} - {"efficientnet_l2_475"}))  # L2 at another size
def test_macs_and_activations_are_what_torch_counts(name):
    arch = ts.arch(name)
    c = ts.cost(arch)
    assert (c.macs, c.activations) == counted(meta_build(arch), arch)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    archs(most_stages=3), st.sampled_from((0, 1, 10, 1000)), st.sampled_from((1, 3, 5)), st.none() | st.tuples(st.integers(1, 40), st.integers(1, 40))
)
def test_macs_parameters_and_activations_of_random_networks(arch, classes, channels, size):
    net = ts.build(arch, classes, channels).eval()
    c = ts.cost(arch, classes, channels, resolution=size)
    assert (c.macs, c.activations) == counted(net, arch, size)
    assert c.params == sum(p.numel() for p in net.parameters())
    assert c.params == sum(row.params for row in c.per_stage)
    assert c.macs == sum(row.macs for row in c.per_stage)


@pytest.mark.parametrize(("classes", "channels", "size"), [(0, 3, (224, 224)), (10, 1, (160, 224)), (1000, 3, (75, 333)), (2, 5, (32, 32))])
def test_other_heads_inputs_and_shapes_of_b0(classes, channels, size):
    arch = ts.arch("efficientnet_b0")
    net = meta_build(arch, classes, channels)
    c = ts.cost(arch, classes, channels, resolution=size)
    assert (c.macs, c.activations) == counted(net, arch, size)
    assert c.params == sum(p.numel() for p in net.parameters())
    assert c.params == 5_288_548 - 1281 * (1000 - classes) + (channels - 3) * 9 * 32
    assert c.per_stage[0].resolution == size


def test_a_square_resolution_may_be_given_as_one_number():
    arch = ts.arch("efficientnet_b0")
    assert ts.cost(arch, resolution=224) == ts.cost(arch, resolution=(224, 224))
    assert ts.cost(arch, resolution=224).macs == ts.cost(arch).macs


@pytest.mark.parametrize("name", COUNTED)
def test_macs_as_counted_elsewhere(name):
    assert round(ts.cost(ts.arch(name)).macs / 1e9, 3) == COUNTED[name]


@pytest.mark.parametrize(("name", "factors", "macs"), COUNTED_SCALED)
def test_scaled_macs_as_counted_elsewhere(name, factors, macs):
    scaled = ts.scale(ts.arch(name), **factors)
    if factors.get("resolution") == 1.3:
        assert scaled.resolution == 292
    assert round(ts.cost(scaled).macs / 1e9, 3) == macs


def test_resnet50_four_times_as_deep():
    scaled = ts.scale(ts.arch("resnet50"), depth=4)
    assert [s.layers for s in scaled.stages] == [12, 16, 24, 12]


@pytest.mark.parametrize("name", PAPER_TABLE_2)
def test_macs_are_those_of_the_papers_table_2(name):
    assert ts.cost(ts.arch(name)).macs / 1e9 == pytest.approx(PAPER_TABLE_2[name], rel=0.07)


def test_stage_rows_equal_the_modules():
    """Parameters of each row are those of the stage's own module, so a printed table can be trusted row by row."""
    arch = ts.arch("efficientnetv2_s")
    net = meta_build(arch)
    rows = ts.cost(arch).per_stage
    parts = [[net.stem], *net.body, [net.head, net.classifier]]
    assert [row.params for row in rows] == [sum(p.numel() for m in part for p in m.parameters()) for part in parts]
    assert [row.layers for row in rows] == [1, *(s.layers for s in arch.stages), 1]


@pytest.mark.parametrize(
    ("wrong", "named"),
    [({"batch": 0}, "batch"), ({"in_channels": 0}, "in_channels"), ({"resolution": 0}, "resolution"), ({"resolution": (32, -1)}, "resolution")],
)
def test_a_request_below_one_is_refused(wrong, named):
    with pytest.raises(ValueError, match=named):
        ts.cost(ts.arch("efficientnet_b0"), **wrong)


def test_cost_is_quick():
    arch = ts.arch("efficientnet_b7")
    start = time.perf_counter()
    for i in range(100):
        ts.cost(ts.scale(arch, width=1 + i / 1000))
    assert (time.perf_counter() - start) / 100 < 0.01
