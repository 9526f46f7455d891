"""What the device can do at most: bytes copied in device memory, and a large bf16 matrix product on random data."""

import torch

from benchmarks.gpu import timing

COPIED = 1 << 32  # bytes, far beyond any cache
SIDE = 8192


def run(run):
    size, side = (1 << 22, 64) if run.rehearsal else (COPIED, SIDE)
    source = torch.randint(0, 256, (size,), device=run.device, dtype=torch.uint8)
    target = torch.empty_like(source)
    times = timing.columns(timing.in_turn({"": lambda: target.copy_(source)}, run.device, runs=2 * run.runs)[""])
    run.record.add("ceiling", what="copy, bytes read and written", rate=2e3 * size / times["ms"], unit="byte/s", **times)
    a, b = (torch.randn(side, side, device=run.device, dtype=torch.bfloat16) for _ in range(2))
    times = timing.columns(timing.in_turn({"": lambda: a @ b}, run.device, runs=2 * run.runs)[""])
    run.record.add("ceiling", what=f"bf16 product of {side} x {side}", rate=2e3 * side**3 / times["ms"], unit="FLOP/s", **times)
