"""The CPU engine: one function by several ways, of which the fastest is taken for each size of image.

`plain` is the network itself; `folded`, its steps in plain torch; `onednn` and `onednn fused`, its steps through oneDNN's packed
operators; `compiled`, torch.compile with frozen weights, tried only where asked for, as compiling takes a minute or more.
B0, batch 1, one thread: docs/benchmarks.md has the times of all.

A way counts only if its logits of the first batch agree with the network's: in float32 within 1e-4 of the largest, or within ten
times what the network's own logits change by where it runs in another memory format (an untrained one may amplify rounding
so); in bfloat16 to a relative L2 error of 5e-2.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from triscale.inference import onednn
from triscale.inference.executor import Torch, execute
from triscale.inference.lowering import lower
from triscale.inference.notices import Tell
from triscale.inference.tuning import Choices, Seconds, measure, network, processor
from triscale.model import ConvNet

Way = Callable[[Tensor], Tensor]
LARGEST_ERROR, L2_ERROR = 1e-4, 5e-2  # of float32's largest logit; of bfloat16's logits
ROUNDING = 10  # times the network's own


def bfloat16_is_native() -> bool:
    """Whether the processor multiplies bfloat16 itself (AVX-512 BF16, AMX); elsewhere it is slower than float32."""
    return any(getattr(torch.cpu, name, bool)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))


class CPU:
    """Computes `net`, in evaluation mode, the fastest way: (N, C, H, W) float32 -> logits float32. dtype: float32 or bfloat16.

    A size of image is measured when it first comes (0.5 s, or as long as four batches take) or known from the cache; other batches
    of it go the same way. compile: `compiled` is tried too, then for each shape. Several threads may call at once.
    """

    takes_pixels = False

    def __init__(self, net: ConvNet, dtype: torch.dtype, tell: Tell, *, compile: bool = False) -> None:
        self.net, self.dtype, self.tell, self.compile = net, dtype, tell, compile
        self.steps = lower(net, dtype)
        self.choices = Choices(tell)
        self.chosen: dict[tuple[int, ...], Way] = {}
        self.ways: dict[str, Way] = {}
        self.lock = threading.Lock()

    def __call__(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        key = (torch.get_num_threads(), *x.shape[0 if self.compile else 2 :])
        if key not in self.chosen:
            with self.lock:  # one thread measures, and no other meanwhile
                if key not in self.chosen:
                    self.chosen[key] = self._choose(x)
        return self.chosen[key](x)

    def _choose(self, x: Tensor) -> Way:
        question = {
            "network": network(self.net.arch, self.net.num_classes, self.net.in_channels),
            "shape": list(x.shape),
            "dtype": str(self.dtype),
            "threads": torch.get_num_threads(),
            "machine": processor(),
            "compile": self.compile,
        }
        candidates = self._candidates()
        name = self.choices.get(question)
        if name not in candidates:
            if self.chosen:
                self.tell(f"optimize: images of {x.shape[2]}x{x.shape[3]} are new and are measured once")
            seconds, certain = self._measure(candidates, x)
            name = min(seconds, key=seconds.__getitem__)
            if certain:
                self.choices.put(question, name, seconds)
            self.ways = {name: self.ways[name], "plain": self.ways["plain"]}  # the others' packed weights go
        if name == "plain" and self.dtype == torch.bfloat16:
            self.tell(f"optimize: bfloat16 is no faster than float32 for images of {x.shape[2]}x{x.shape[3]} here; they run in float32")
        return self._way(name)

    def _candidates(self) -> list[str]:
        """In the order in which they are tried: after `plain` what is fastest for most."""
        fast = ["onednn fused", "onednn"] if onednn.available() else []
        return ["plain", *(["compiled"] if self.compile else []), *fast, "folded"]

    def _measure(self, candidates: Sequence[str], x: Tensor) -> tuple[Seconds, bool]:
        """Seconds by way; and whether no way's logits were wrong, for they may be right for other images."""
        expected, certain = x.new_empty(0), True

        def run(name: str) -> Tensor | None:
            nonlocal expected
            if name == "plain":
                expected = self._way(name)(x)  # what it raises is the user's to see
                return expected
            try:
                return self._way(name)(x)
            except Exception as error:  # no compiler, an operator that this torch or processor lacks: of many kinds
                why = (str(error).strip() or type(error).__name__).splitlines()[0]
                self.tell(f"optimize: '{name}' doesn't run here and is left out ({why})")
                return None

        def right(name: str, logits: Tensor | None) -> bool:
            nonlocal certain
            if logits is None:
                return False
            if agree(logits, expected, self.dtype) or (self.dtype == torch.float32 and self._as_rounded(logits, expected, x)):
                return True
            certain = False
            self.tell(f"optimize: '{name}' gives other logits than the network and is left out")
            return False

        if self.compile:
            run("compiled")  # what compiling takes is not to be measured
        return measure({name: partial(run, name) for name in candidates}, right, least=3 if self.compile else 2), certain

    def _as_rounded(self, logits: Tensor, expected: Tensor, x: Tensor) -> bool:
        other = self._way("plain")(x.contiguous()) - expected
        return bool((logits - expected).abs().max() <= ROUNDING * other.abs().max())

    def _way(self, name: str) -> Way:
        if name not in self.ways:
            self.ways[name] = self._build(name)
        return self.ways[name]

    def _build(self, name: str) -> Way:
        if name == "plain":
            dtype = next(self.net.parameters()).dtype
            return lambda x: self.net(x.to(dtype)).float()
        if name == "compiled":
            compiled = torch.compile(self.net, dynamic=False, options={"freezing": True})
            low = self.dtype == torch.bfloat16

            def way(x: Tensor) -> Tensor:
                with torch.autocast("cpu", torch.bfloat16, enabled=low):
                    return compiled(x).float()

            return way
        engine = Torch() if name == "folded" else onednn.OneDNN(fuse=name == "onednn fused")
        return lambda x: execute(engine, self.steps, x.to(self.dtype)).float()


def agree(logits: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Whether logits (N, classes) differ from the expected ones by no more than the arithmetic of `dtype` does. Where these are
    not finite, the weights are broken, and nothing is to be held against any way."""
    if not bool(expected.isfinite().all()):
        return True
    if dtype == torch.bfloat16:
        return bool((logits - expected).norm() <= L2_ERROR * expected.norm())
    return bool((logits - expected).abs().max() <= LARGEST_ERROR * expected.abs().max())
