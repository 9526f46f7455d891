"""One training step of B0, batch 32 at 64 px, two threads: ours beside timm's, drop connect and dropout on, in turn.

NCHW is timm's plain loop (its train.py without options); channels-last and bfloat16 autocast are options there, and here
channels-last is how `triscale train` runs. Each in float32, and in bfloat16 where named.
"""

import timm
import torch

from benchmarks.forward_b0 import rows_of
from triscale.families import arch
from triscale.latency import time_in_turn
from triscale.model import build

RUNS, BATCH, SIZE = 40, 32, 64


def step_call(net, layout, low=False):
    net = net.train().to(memory_format=layout)
    x = torch.randn(BATCH, 3, SIZE, SIZE).contiguous(memory_format=layout)
    y = torch.randint(0, 1000, (BATCH,))
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9, foreach=True)

    def call():
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            out = net(x)
        torch.nn.functional.cross_entropy(out.float(), y).backward()
        optimizer.step()

    return call


def main():
    torch.manual_seed(0)
    b0 = arch("efficientnet_b0")
    peers = {"drop_rate": 0.2, "drop_path_rate": 0.2}
    nets = {
        ("triscale", "same"): lambda: build(b0),
        ("timm", "same"): lambda: timm.create_model("tf_efficientnet_b0", **peers),
        ("triscale", "symmetric"): lambda: build(b0.with_numerics(padding="symmetric", norm_eps=1e-5)),
        ("timm", "symmetric"): lambda: timm.create_model("efficientnet_b0", **peers),
    }
    formats = {"NCHW": (torch.contiguous_format,), "channels-last": (torch.channels_last,), "channels-last, bfloat16": (torch.channels_last, True)}
    calls = {(*key, name): step_call(make(), *how) for key, make in nets.items() for name, how in formats.items()}
    timings = time_in_turn(calls, runs=RUNS, threads_used=2)
    return rows_of(timings)
