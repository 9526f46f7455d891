"""torch's depthwise convolution at each distinct shape of B0, B4 and B7, bf16: forward, data gradient, weight gradient.

Bytes: the forward pass reads the input and writes the output, the data gradient reads the output's and writes the input's, the
weight gradient reads both. Padding is symmetric, so that none is copied. Ways: cuDNN channels-last; torch's own kernels, which are
NCHW, from channels-last tensors, whose copies count in its time; and from NCHW ones (bf16 in NCHW doesn't go to cuDNN). Each row
names the backend that torch took. Inputs rotate, so that no cache holds them.
"""

import math

import torch

from benchmarks.gpu import timing
from benchmarks.gpu.counting import BYTES, elements, steps
from benchmarks.gpu.parts import NETWORKS
from triscale.families import arch

TARGET = 1 << 29  # bytes that a call moves, about
# way -> whether cuDNN may be taken, memory format
WAYS = {
    "cuDNN, channels-last": (True, torch.channels_last),
    "native, from channels-last (copies)": (False, torch.channels_last),
    "native, NCHW": (False, None),
}
PASSES = ("forward", "data gradient", "weight gradient")


def shapes():
    """(channels, side, kernel, stride) of the depthwise convolutions of the three networks, each once."""
    found = [s for name in NETWORKS for s in steps(arch(f"efficientnet_{name}")) if s.kind == "depthwise"]
    return list(dict.fromkeys((s.source[2], s.source[0], s.kernel, s.stride) for s in found))


def counted(channels, side, stride):
    """Bytes of one pass on one image."""
    return BYTES * (elements((side, side, channels)) + elements((-(-side // stride), -(-side // stride), channels)))


def batch_of(shape):
    """A power of two whose call moves about TARGET bytes."""
    channels, side, _, stride = shape
    return 1 << max(3, round(math.log2(TARGET / counted(channels, side, stride))))


def tensors(shape, batch, layout, device):
    """Random input, weights and gradient of the output, in bf16."""
    channels, side, kernel, stride = shape
    out, form = -(-side // stride), layout or torch.contiguous_format
    sizes = ((batch, channels, side, side), (channels, 1, kernel, kernel), (batch, channels, out, out))
    return [torch.randn(size, device=device, dtype=torch.bfloat16).contiguous(memory_format=form) for size in sizes]


def calls(x, w, g, stride):
    """{pass: a call on these tensors}."""
    channels, pad = w.shape[0], w.shape[2] // 2

    def backward(mask):
        return torch.ops.aten.convolution_backward(g, x, w, None, [stride] * 2, [pad] * 2, [1, 1], False, [0, 0], channels, mask)

    return {
        "forward": lambda: torch.nn.functional.conv2d(x, w, None, stride, pad, 1, channels),
        "data gradient": lambda: backward([True, False, False]),
        "weight gradient": lambda: backward([False, True, False]),
    }


def backend(x, w, stride):
    """torch's name of what it takes for the convolution, as its flags stand: "Cudnn", "CudaDepthwise2d" (its own)."""
    pad = w.shape[2] // 2
    return str(torch._C._select_conv_backend(x, w, None, [stride] * 2, [pad] * 2, [1, 1], False, [0, 0], w.shape[0])).rpartition(".")[2]


def run(run):
    cases = [((8, 9, 3, 2), 2)] if run.rehearsal else [(shape, batch_of(shape)) for shape in shapes()]
    for way, (cudnn, layout) in WAYS.items():
        for shape, batch in cases:
            label = f"{way}, {shape[0]} channels {shape[1]} px {shape[2]}x{shape[2]} stride {shape[3]}"
            run.attempt(label, lambda s=shape, n=batch, w=way, c=cudnn, f=layout: _add(run, s, n, (w, c, f)), like=way)


def _add(run, shape, batch, how):
    way, cudnn, layout = how
    channels, side, kernel, stride = shape
    moved = batch * counted(channels, side, stride)
    about = {"channels": channels, "side": side, "kernel": kernel, "stride": stride, "batch": batch, "way": way, "bytes": moved}
    try:
        with torch.backends.cudnn.flags(enabled=cudnn, benchmark=True), torch.no_grad():
            inputs = [tensors(shape, batch, layout, run.device) for _ in range(2)]
            about["backend"] = backend(*inputs[0][:2], stride)
            sets = [calls(*some, stride) for some in inputs]
            for name in PASSES:
                some = [s[name] for s in sets]
                found = timing.in_turn({"": lambda some=some: [call() for call in some]}, run.device, runs=run.runs)[""]
                times = timing.columns([ms / len(some) for ms in found])
                run.record.add("depthwise", **about, **{"pass": name}, bytes_per_s=1e3 * moved / times["ms"], **times)
    finally:
        inputs = sets = None
        timing.forget(run.device)
