"""All kernels compiled for sm_90, which takes no GPU: registers, spills and instructions, and what a machine needs to run them."""

import importlib
import os
import re
import subprocess
import sys
from functools import cache

import pytest
import torch
from conftest import ROOT
from interpreter import HAVE_TRITON, INTERPRETED

from triscale.kernels import machine

if HAVE_TRITON:
    import triton
    import triton.language as tl

    NAMES = sorted(machine.all_variants())
else:
    NAMES = ["depthwise"]


@pytest.fixture(scope="module")
def compiler():
    reason = "Triton isn't installed" if not HAVE_TRITON else "interpreted kernels don't compile" if INTERPRETED else None
    if reason:
        print(reason)
        pytest.skip(reason)


@cache
def compiled(name):
    return {v.name: (v, machine.compile_variant(v)) for v in machine.all_variants()[name]}


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("name", NAMES)
def test_kernels_compile_for_sm_90_without_spills(name):
    rows = compiled(name)
    print(table := machine.table(rows))
    assert len(rows) >= 2
    for label, (variant, code) in rows.items():
        assert (code.stack, code.spills) == (0, 0), f"{label} spills:\n{table}"
        assert 16 <= code.registers <= variant.max_registers, f"{label}: expected at most {variant.max_registers} registers:\n{table}"
        assert code.shared <= variant.max_shared <= 227 * 1024, f"{label}: expected at most {variant.max_shared} bytes of shared memory:\n{table}"
        assert code.opcodes["EXIT"] >= 1
        if variant.max_instructions is not None:
            found = code.per_output(variant.outputs)
            assert found <= variant.max_instructions, f"{label}: expected at most {variant.max_instructions} instructions an output:\n{table}"


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(("cin", "cout"), [(960, 160), (512, 2048), (333, 53), (17, 480)])
def test_none_of_the_first_four_ways_to_cut_a_product_spills(cin, cout):
    """So many are measured on a GPU. Gates and residuals take registers beside the outputs', odd channels for addresses."""
    pointwise = importlib.import_module("triscale.kernels.pointwise")
    layers = [layer for layer, _ in pointwise.LAYERS] + [pointwise.Layer("project", 1, 56, 17, 480, gated=True)]
    layer = next(layer for layer in layers if (layer.cin, layer.cout) == (cin, cout))
    ways = layer.configs()[:4]
    assert len(ways) == 4
    for config in ways:
        code = machine.compile_variant(layer.variant(config))
        assert (code.stack, code.spills) == (0, 0), config
        assert code.shared <= config.shared(layer.gated), config


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("sm", [86, 120])
def test_the_largest_squeeze_of_b0_fits_gpus_with_99_kib(sm):
    """Its first choice takes 104 KiB where there are more."""
    variant = importlib.import_module("triscale.kernels.squeeze").variant
    assert variant(1, 28, 1152, 48).max_shared > 99 * 1024
    within = variant(1, 28, 1152, 48, 99 * 1024)
    assert machine.compile_variant(within, sm).shared <= within.max_shared <= 99 * 1024


@pytest.mark.usefixtures("compiler")
def test_depthwise_convolutions_take_their_multiply_adds_and_little_more():
    """Each tap is one fused multiply-add, each SiLU one more and one tanh, loads are as wide as a lane's channels."""
    for label, (variant, code) in compiled("depthwise").items():
        size, vector = variant.constants["size"], variant.constants["lanes"] // (32 * variant.warps)
        fused = code.loop["FFMA"] / variant.outputs
        assert size**2 <= fused <= size**2 + 1.5, label
        assert code.loop["MUFU.TANH"] == (variant.outputs if variant.constants["act"] == "silu" else 0), label
        width = {1: "LDG.E.U16", 2: "LDG.E", 4: "LDG.E.64"}[vector]
        columns = (variant.constants["strip"] - 1) * variant.constants["stride"] + size
        assert code.loop[width] == columns * variant.constants["stride"], label
        assert code.loop.total() > fused * variant.outputs, label


@pytest.mark.usefixtures("compiler")
def test_matrix_products_run_on_tensor_cores():
    """Those of a whole warp group where the tile has its 64 rows, a warp's otherwise; never one multiply-add at a time."""
    for label, (variant, code) in compiled("pointwise").items():
        group = variant.constants["block_m"] >= 64
        product, other = ("HGMMA", "HMMA") if group else ("HMMA", "HGMMA")
        found = {op: sum(n for name, n in code.opcodes.items() if name.split(".")[0] == op) for op in (product, other)}
        assert found[product] > 0 == found[other], f"{label}: {found}"


def offsets(ttir, pointer):
    """(offsets before it, type, whether constant) of all that is added to a parameter, in Triton's own language before it lowers anything."""
    constants = set(re.findall(r"%(\w+) = arith\.constant", ttir))
    found, waiting = set(), {(pointer, 0)}
    done = set()
    while waiting:
        name, before = at = waiting.pop()
        done.add(at)
        for by, bits, moved in added(ttir, name):
            found.add((before, bits, by in constants))
            waiting |= {(moved, before + 1)} - done
        waiting |= {(same, before) for same in re.findall(rf"%(\w+) = tt\.(?:splat|broadcast|expand_dims) %{name}\b", ttir)} - done
    return found


def added(ttir, name):
    """The offset, its type and the result of each addition to a pointer."""
    found = re.findall(rf"%(\w+) = tt\.addptr %{name}, %(\w+) : \S+, (?:tensor<[\dx]+x)?(i\d+)", ttir)
    return [(by, bits, moved) for moved, by, bits in found]


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("name", NAMES)
def test_offsets_of_images_are_in_int64(name):
    """What may exceed 2^31 elements is moved in 64 bits before anything else; weights, in 32.

    A depthwise program walks down an image of any size, so that each of its steps is in 64 bits or constant; the others stay
    within a tile.
    """
    images = {"x", "y", "residual", "gate", "sums"}
    weights = {"squeeze": ("w1", "b1", "w2", "b2")}.get(name, ("weight", "bias"))
    for label, (variant, code) in compiled(name).items():
        for pointer in images & set(variant.signature):
            found = offsets(code.ttir, pointer)
            assert {bits for before, bits, _ in found if not before} == {"i64"}, (label, pointer)
            if name == "depthwise" and pointer != "sums":
                assert {before for before, *_ in found} >= {0, 1}, (label, pointer)
                assert all(bits == "i64" or constant for _, bits, constant in found), (label, pointer)
        for pointer in weights:
            assert {bits for _, bits, _ in offsets(code.ttir, pointer)} == {"i32"}, (label, pointer)


@pytest.mark.usefixtures("compiler")
def test_reading_finds_spills_and_loops():
    """A kernel that needs 100 values at once where 1024 threads leave each 64 registers, and one whose loop is known."""

    @triton.jit
    def crowded(x, y, n: tl.constexpr):
        at = tl.arange(0, 1024)
        held = ()
        total = tl.zeros([1024], tl.float32)
        for i in tl.static_range(n):
            held += (tl.load(x + at + i * 1024, volatile=True),)
            total += held[i]
        for i in tl.static_range(n):
            tl.store(y + at + i * 1024, held[i] * total)

    @triton.jit
    def looped(x, y, n):
        at = tl.arange(0, 128)
        total = tl.zeros([128], tl.float32)
        for i in range(n):
            total += tl.exp(tl.load(x + at + i * 128))
        tl.store(y + at, total)

    signature = {"x": "*fp32", "y": "*fp32"}
    code = machine.compile_variant(machine.Variant("crowded", crowded, signature, {"n": 100}, warps=32))
    assert code.stack > 0
    assert code.spills > 0
    code = machine.compile_variant(machine.Variant("looped", looped, {**signature, "n": "i32"}, {}, outputs=1))
    assert (code.stack, code.spills) == (0, 0)
    assert 0 < code.loop.total() < code.opcodes.total()
    assert code.loop["MUFU.EX2"] >= 1
    assert sum(n for op, n in code.loop.items() if op.startswith("STG")) == 0


@pytest.mark.usefixtures("compiler")
def test_a_variant_that_forgets_a_parameter_is_named():
    variant = machine.all_variants()["depthwise"][0]
    short = {key: value for key, value in variant.constants.items() if key != "stride"}
    with pytest.raises(ValueError, match=r"stride"):
        machine.compile_variant(machine.Variant("short", variant.kernel, variant.signature, short))


def test_what_a_machine_lacks_is_said_in_a_line(monkeypatch):
    def why(device, **changes):
        machine.unsupported.cache_clear()
        with monkeypatch.context() as patch:
            for name, value in changes.items():
                patch.setattr(machine, name, value)
            return machine.unsupported(torch.device(device))

    assert why("cpu", have_triton=lambda: True) == "the GPU kernels need an NVIDIA GPU, found cpu"
    assert why("cpu", interpreted=lambda: True) is None
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    assert why("cuda:0") == "the GPU kernels need compute capability 8.0 or newer, found 7.5 (Tesla T4)"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert why("cuda:0") is None
    machine.unsupported.cache_clear()


def test_without_triton_it_is_asked_for_by_name():
    imports = "import sys; sys.modules['triton'] = None; import torch; from triscale.kernels import machine"
    script = f"{imports}; print(machine.unsupported(torch.device('cpu')))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout.strip() == "the GPU kernels need Triton, which isn't installed: pip install triton"


@pytest.mark.skipif(not HAVE_TRITON, reason="Triton isn't installed")
def test_the_switch_follows_triton_s_own(monkeypatch):
    for value, on in (("1", True), ("true", True), ("0", False), ("", False)):
        monkeypatch.setitem(os.environ, "TRITON_INTERPRET", value)
        assert machine.interpreted() == on == triton.knobs.runtime.interpret
