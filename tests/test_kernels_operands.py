"""What the kernels' launchers refuse, and the device that they launch on. No kernel runs, so that it takes neither GPU nor interpreter."""

import importlib
import re
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from interpreter import HAVE_TRITON

from triscale.kernels import machine

pytestmark = pytest.mark.skipif(not HAVE_TRITON, reason="Triton isn't installed")

BF16 = torch.bfloat16
GIVEN = {
    "depthwise": {
        **{"x": torch.zeros(1, 4, 4, 2, dtype=BF16), "weight": torch.zeros(3, 3, 2), "bias": torch.zeros(2)},
        **{"stride": 1, "pad": (1, 1, 1, 1), "act": "silu", "pool": True},
    },
    "stem": {
        **{"x": torch.zeros(1, 4, 4, 3, dtype=torch.uint8), "weight": torch.zeros(3, 3, 3, 2), "bias": torch.zeros(2)},
        **{"mean": torch.zeros(3), "inv_std": torch.ones(3), "stride": 2, "pad": (0, 1, 0, 1), "act": "silu"},
    },
    "pointwise": {
        **{"x": torch.zeros(2, 3, 3, 8, dtype=BF16), "weight": torch.zeros(8, 6, dtype=BF16), "bias": torch.zeros(6)},
        **{"gate": torch.zeros(2, 8), "residual": torch.zeros(2, 3, 3, 6, dtype=BF16)},
    },
    "squeeze": {
        **{"sums": torch.zeros(1, 1, 8), "places": 4, "w1": torch.zeros(2, 8), "b1": torch.zeros(2)},
        **{"w2": torch.zeros(8, 2), "b2": torch.zeros(8)},
    },
}


@cache
def module(kernel):
    return importlib.import_module(f"triscale.kernels.{kernel}")


def launch(kernel, **changes):
    return getattr(module(kernel), kernel)(**{**GIVEN[kernel], **changes})


BAD = [
    ("depthwise", {"x": torch.zeros(1, 4, 4, 2)}, "x to be (N, H, W, C) bfloat16 or float16 and contiguous, found (1, 4, 4, 2) float32"),
    ("depthwise", {"x": torch.zeros(4, 4, 2, dtype=BF16)}, "x to be (N, H, W, C) bfloat16 or float16 and contiguous, found (4, 4, 2) bfloat16"),
    ("depthwise", {"x": torch.zeros(1, 2, 4, 4, dtype=BF16).permute(0, 2, 3, 1)}, "and contiguous, found (1, 4, 4, 2) bfloat16, strided"),
    (
        "depthwise",
        {"x": torch.zeros(1, 0, 4, 2, dtype=BF16)},
        "x to be (N, H, W, C) bfloat16 or float16, contiguous and not empty, found (1, 0, 4, 2)",
    ),
    ("depthwise", {"x": torch.zeros(1, 4, 4, 0, dtype=BF16)}, "not empty, found (1, 4, 4, 0)"),
    ("depthwise", {"weight": torch.tensor(3.0)}, "weight to be (K, K, 2) bfloat16 or float16 or float32 or float64 and contiguous, found () float32"),
    ("depthwise", {"weight": torch.zeros(3, 5, 2)}, "weight to be (K, K, 2)"),
    ("depthwise", {"weight": torch.zeros(3, 3, 4)}, "weight to be (K, K, 2)"),
    ("depthwise", {"weight": torch.zeros(3, 3, 2, dtype=torch.int32)}, "found (3, 3, 2) int32"),
    ("depthwise", {"weight": torch.zeros(9, 9, 2)}, "a kernel of at most 7x7, found 9x9"),
    (
        "depthwise",
        {"bias": torch.zeros(2, 3)[:, 1]},
        "bias to be (2,) bfloat16 or float16 or float32 or float64 and contiguous, found (2,) float32, strided",
    ),
    ("depthwise", {"stride": 0}, "stride 1 or 2 and four paddings of at least 0, found 0"),
    ("depthwise", {"stride": 3}, "stride 1 or 2"),
    ("depthwise", {"pad": (1, -1, 0, 0)}, "four paddings of at least 0"),
    ("depthwise", {"pad": (1, 1)}, "four paddings of at least 0, found 1 and (1, 1)"),
    ("stem", {"pad": [1, 1]}, "four paddings of at least 0"),
    ("depthwise", {"pad": (0, 0, 0, 0), "x": torch.zeros(1, 1, 4, 2, dtype=BF16)}, "a 3x3 kernel finds no place in 1x4 padded by (0, 0, 0, 0)"),
    ("stem", {"x": torch.zeros(1, 4, 4, 3)}, "x to be (N, H, W, 3) uint8 or bfloat16 or float16"),
    ("stem", {"x": torch.zeros(4, 4, 3, dtype=BF16)}, "x to be (N, H, W, 3)"),
    ("stem", {"weight": torch.zeros(2, 3, 3, 2)}, "weight to be (K, K, 3, C)"),
    ("stem", {"weight": torch.zeros(0, 0, 3, 2)}, "not empty, found (0, 0, 3, 2)"),
    ("stem", {"bias": torch.zeros(2, 3)[:, 1]}, "found (2,) float32, strided"),
    ("stem", {"mean": torch.zeros(1).expand(3)}, "mean to be (3,) float32 and contiguous, found (3,) float32, strided"),
    ("stem", {"inv_std": torch.ones(1).expand(3)}, "inv_std to be (3,)"),
    ("stem", {"mean": torch.zeros(3, dtype=torch.int64)}, "mean to be (3,) float32 and contiguous, found (3,) int64"),
    ("stem", {"inv_std": torch.ones(3, dtype=torch.float64)}, "found (3,) float64"),
    ("stem", {"stride": 0}, "stride 1 or 2"),
    ("stem", {"pad": (0, 0, 0, 0), "x": torch.zeros(1, 1, 4, 3, dtype=BF16)}, "a 3x3 kernel finds no place in 1x4"),
    ("pointwise", {"x": torch.zeros(2, 3, 3, 8)}, "x to be (N, H, W, I) bfloat16 or float16 and contiguous, found (2, 3, 3, 8) float32"),
    ("pointwise", {"x": torch.zeros(3, 3, 8, dtype=BF16)}, "x to be (N, H, W, I)"),
    ("pointwise", {"x": torch.zeros(2, 0, 3, 8, dtype=BF16)}, "not empty, found (2, 0, 3, 8)"),
    ("pointwise", {"weight": torch.zeros(6, 8, dtype=BF16).T}, "weight to be (8, O) bfloat16 and contiguous, found (8, 6) bfloat16, strided"),
    ("pointwise", {"weight": torch.zeros(8, 6)}, "found (8, 6) float32"),
    ("pointwise", {"bias": torch.zeros(6, dtype=BF16)}, "bias to be (6,) float32"),
    ("pointwise", {"gate": torch.zeros(8, 2)}, "gate to be (2, 8) float32"),
    ("pointwise", {"residual": torch.zeros(2, 3, 3, 6)}, "residual to be (2, 3, 3, 6) bfloat16"),
    ("squeeze", {"sums": torch.zeros(1, 8)}, "sums to be (N, T, C) float32"),
    ("squeeze", {"sums": torch.zeros(1, 0, 8)}, "not empty, found (1, 0, 8)"),
    ("squeeze", {"w2": torch.zeros(2, 8)}, "w2 to be (8, 2) float32"),
    ("squeeze", {"w2": torch.zeros(8, 2, dtype=BF16)}, "w2 to be (8, 2) float32"),
    ("squeeze", {"w1": torch.zeros(0, 8), "b1": torch.zeros(0), "w2": torch.zeros(8, 0)}, "not empty, found (0, 8)"),
    ("squeeze", {"places": 0}, "at least 1 place an image, found 0"),
    *((kernel, {"act": act}, f"the activation silu, relu, relu6 or none, found '{act}'") for kernel in GIVEN for act in ("gelu", "SiLU")),
    *((kernel, {}, "all tensors on one NVIDIA GPU, found cpu; move them there") for kernel in GIVEN),
    ("depthwise", {"bias": torch.zeros(2, device="meta")}, "found cpu and meta"),
    ("stem", {"mean": torch.zeros(3, device="meta")}, "found cpu and meta"),
    ("pointwise", {"gate": torch.zeros(2, 8, device="meta")}, "found cpu and meta"),
    ("squeeze", {"w2": torch.zeros(8, 2, device="meta")}, "found cpu and meta"),
]


@pytest.mark.parametrize(("kernel", "changes", "told"), BAD)
def test_what_a_launcher_cannot_take_is_said_in_one_line(monkeypatch, kernel, changes, told):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match=re.escape(told)) as raised:
        launch(kernel, **changes)
    assert str(raised.value).startswith(f"{kernel}: ")
    assert "\n" not in str(raised.value)


def test_kernels_launch_on_the_gpu_that_the_tensors_are_on(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    on_second = machine.on("k", SimpleNamespace(device=torch.device("cuda", 1)), None, SimpleNamespace(device=torch.device("cuda", 1)))
    assert isinstance(on_second, torch.cuda.device)
    assert on_second.idx == 1
    with pytest.raises(ValueError, match="k: expected all tensors on one NVIDIA GPU, found cuda:0 and cuda:1"):
        machine.on("k", *(SimpleNamespace(device=torch.device("cuda", i)) for i in range(2)))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with machine.on("k", torch.zeros(1)):
        pass
    with pytest.raises(ValueError, match="on one device, found cpu and meta"):
        machine.on("k", torch.zeros(1), torch.zeros(1, device="meta"))


@pytest.mark.parametrize("kernel", GIVEN)
def test_the_launch_itself_lies_within(monkeypatch, kernel):
    """A stand-in for the kernel sees whether the device was made current: two GPUs to tell apart are seldom at hand."""
    within, launched = [], []

    @contextmanager
    def on(name, *tensors):
        within.append((name, len([t for t in tensors if t is not None])))
        yield
        within.clear()

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **options: launched.append((grid, *within))

    monkeypatch.setattr(module(kernel), "on", on)
    monkeypatch.setattr(module(kernel), f"{kernel}_kernel", Kernel())
    launch(kernel)
    operands = sum(isinstance(value, torch.Tensor) for value in GIVEN[kernel].values())
    assert len(launched) == 1
    name, count = launched[0][1]
    assert name == kernel
    assert count >= operands


def chosen(monkeypatch, kernel, **changes):
    """What the launcher chooses by itself, as its kernel's options say."""
    options = {}

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **given: options.update(given, grid=grid)

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(module(kernel), f"{kernel}_kernel", Kernel())
    launch(kernel, **changes)
    return options


@pytest.mark.parametrize("kernel", ["pointwise", "squeeze"])
def test_a_gpu_with_less_shared_memory_gets_what_fits(monkeypatch, kernel):
    large = {
        "pointwise": {"x": torch.zeros(1, 64, 64, 512, dtype=BF16), "weight": torch.zeros(512, 512, dtype=BF16), "bias": torch.zeros(512)}
        | {"gate": None, "residual": None},
        "squeeze": {"sums": torch.zeros(1, 28, 1152), "w1": torch.zeros(48, 1152), "b1": torch.zeros(48), "w2": torch.zeros(1152, 48)}
        | {"b2": torch.zeros(1152)},
    }[kernel]
    before = chosen(monkeypatch, kernel, **large)
    monkeypatch.setattr(module(kernel), "shared_memory", lambda device: 48 * 1024)
    assert chosen(monkeypatch, kernel, **large) != before


def test_pooling_has_a_choice_of_its_own(monkeypatch):
    """Few parts of the sums, where tiles alone are best small."""
    x = {"x": torch.zeros(1, 112, 112, 32, dtype=BF16), "weight": torch.zeros(3, 3, 32), "bias": torch.zeros(32)}
    alone, pooled = (chosen(monkeypatch, "depthwise", **x, pool=pool)["grid"] for pool in (False, True))
    assert alone > pooled


def test_more_squeezed_channels_than_fit_are_named(monkeypatch):
    many = {"w1": torch.zeros(20_000, 8), "b1": torch.zeros(20_000), "w2": torch.zeros(8, 20_000)}
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match="squeeze: 20000 squeezed channels need more shared memory than this GPU has"):
        launch("squeeze", **many)
