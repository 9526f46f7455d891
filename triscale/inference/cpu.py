"""The CPU engine: one function by several ways, of which the fastest is taken for each size of image.

`plain` is the network itself; `folded`, its steps in plain torch; `onednn` and `onednn fused`, its steps through oneDNN's packed
operators; `compiled`, torch.compile with frozen weights, tried only where asked for, as compiling takes a minute or more. All
but `plain` in float32, in bfloat16, or in both: then the faster arithmetic is taken too.
B0, batch 1, one thread: docs/benchmarks.md has the times of all.

A way counts only if its logits of the first batch agree with the network's: in float32 within 1e-4 of the largest, or within ten
times what the network's own logits change by where it runs in another memory format (an untrained one may amplify rounding
so); in bfloat16 to a relative L2 error of 5e-2.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from triscale.inference import onednn
from triscale.inference.executor import Torch, execute
from triscale.inference.lowering import lower
from triscale.inference.notices import Tell
from triscale.inference.tuning import Choices, Seconds, measure, network, processor
from triscale.model import ConvNet

Way = Callable[[Tensor], Tensor]
Kind = Literal["plain", "compiled", "onednn fused", "onednn", "folded"]
LARGEST_ERROR, L2_ERROR = 1e-4, 5e-2  # of float32's largest logit; of bfloat16's logits
ROUNDING = 10  # times the network's own
IN_BFLOAT16 = "optimize: computes in bfloat16, the faster arithmetic here, which changes logits by a hundredth or so; precision='float32' doesn't"


@dataclass(frozen=True)
class Form:
    """A way to compute the network, and in which arithmetic."""

    kind: Kind
    dtype: torch.dtype

    @property
    def name(self) -> str:
        return f"{self.kind} bfloat16" if self.dtype == torch.bfloat16 else self.kind


def bfloat16_is_native() -> bool:
    """Whether the processor multiplies bfloat16 itself (AVX-512 BF16, AMX); elsewhere it is slower than float32."""
    return any(getattr(torch.cpu, name, bool)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))


class CPU:
    """Computes `net`, in evaluation mode, the fastest way: (N, C, H, W) float32 -> logits float32.

    dtypes: float32, bfloat16, or both, of which the likely faster comes first. A size of image is measured when it first comes
    (0.5 s, or as long as four batches take) or known from the cache; other batches of it go the same way. compile: `compiled` is
    tried too, then for each shape. Several threads may call at once.
    """

    takes_pixels = False

    def __init__(self, net: ConvNet, dtypes: Sequence[torch.dtype], tell: Tell, *, compile: bool = False) -> None:
        self.net, self.dtypes, self.tell, self.compile = net, tuple(dtypes), tell, compile
        self.lowered = {dtype: lower(net, dtype) for dtype in dtypes}
        self.steps = self.lowered[self.dtypes[0]]
        self.choices = Choices(tell)
        self.chosen: dict[tuple[int, ...], str] = {}
        self.ways: dict[str, Way] = {}
        self.lock = threading.Lock()

    def __call__(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        key = (torch.get_num_threads(), *x.shape[0 if self.compile else 2 :])
        if key not in self.chosen:
            with self.lock:  # one thread measures, and no other meanwhile
                if key not in self.chosen:
                    self.chosen[key] = self._choose(x)
        return self._way(self.chosen[key])(x)

    @property
    def used(self) -> tuple[str, ...]:
        return tuple(sorted(set(self.chosen.values())))

    def _choose(self, x: Tensor) -> str:
        question = {
            "network": network(self.net.arch, self.net.num_classes, self.net.in_channels),
            "shape": list(x.shape),
            "dtypes": [str(dtype) for dtype in self.dtypes],
            "threads": torch.get_num_threads(),
            "machine": processor(),
            "compile": self.compile,
        }
        candidates = self._candidates()
        name = self.choices.get(question)
        if name not in candidates or not self._holds(candidates[name], x):
            if self.chosen:
                self.tell(f"optimize: images of {x.shape[2]}x{x.shape[3]} are new and are measured once")
            seconds, certain = self._measure(candidates, x)
            name = min(seconds, key=seconds.__getitem__)
            if certain:
                self.choices.put(question, name, seconds)
        kept = {"plain", name, *self.chosen.values()}
        self.ways = {key: way for key, way in self.ways.items() if key in kept}  # the others' packed weights go
        self._tell_precision(name, f"images of {x.shape[2]}x{x.shape[3]}")
        return name

    def _holds(self, form: Form, x: Tensor) -> bool:
        """Whether what was chosen before does for these weights, which may be others: in bfloat16 not all networks give like logits."""
        return form.dtype != torch.bfloat16 or agree(self._way(form.name)(x), self._way("plain")(x), form.dtype)

    def _tell_precision(self, name: str, images: str) -> None:
        given = next(self.net.parameters()).dtype
        if torch.bfloat16 not in self.dtypes or given == torch.bfloat16:
            return
        if self._candidates()[name].dtype == torch.bfloat16 and torch.float32 in self.dtypes:
            self.tell(IN_BFLOAT16)
        elif name == "plain" and torch.float32 not in self.dtypes:
            self.tell(f"optimize: bfloat16 is no faster than float32 for {images} here; they run in float32")

    def _candidates(self) -> dict[str, Form]:
        """By name, in the order in which they are tried: after `plain` what is fastest for most."""
        compiled: tuple[Kind, ...] = ("compiled",) if self.compile else ()
        kinds: list[tuple[Kind, ...]] = [compiled, ("onednn fused", "onednn") if onednn.available() else (), ("folded",)]
        forms = [Form(kind, dtype) for some in kinds for dtype in self.dtypes for kind in some]
        return {"plain": Form("plain", torch.float32)} | {form.name: form for form in forms}

    def _measure(self, candidates: Mapping[str, Form], x: Tensor) -> tuple[Seconds, bool]:
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
            dtype = candidates[name].dtype
            if agree(logits, expected, dtype) or (dtype == torch.float32 and self._as_rounded(logits, expected, x)):
                return True
            certain = False
            what = "bfloat16" if dtype == torch.bfloat16 and torch.float32 in self.dtypes else f"'{name}'"
            self.tell(f"optimize: {what} gives other logits than the network and is left out")
            return False

        slow = [name for name, form in candidates.items() if form.kind == "compiled"]
        for name in slow:
            run(name)  # what compiling takes is not to be measured
        return measure({name: partial(run, name) for name in candidates}, right, least=2 + len(slow)), certain

    def _as_rounded(self, logits: Tensor, expected: Tensor, x: Tensor) -> bool:
        other = self._way("plain")(x.contiguous()) - expected
        return bool((logits - expected).abs().max() <= ROUNDING * other.abs().max())

    def _way(self, name: str) -> Way:
        if name not in self.ways:
            self.ways[name] = self._build(self._candidates()[name])
        return self.ways[name]

    def _build(self, form: Form) -> Way:
        if form.kind == "plain":
            dtype = next(self.net.parameters()).dtype
            return lambda x: self.net(x.to(dtype)).float()
        if form.kind == "compiled":
            compiled = torch.compile(self.net, dynamic=False, options={"freezing": True})

            def way(x: Tensor) -> Tensor:
                with torch.autocast("cpu", torch.bfloat16, enabled=form.dtype == torch.bfloat16):
                    return compiled(x).float()

            return way
        engine = Torch() if form.kind == "folded" else onednn.OneDNN(fuse=form.kind == "onednn fused")
        steps = self.lowered[form.dtype]
        return lambda x: execute(engine, steps, x.to(form.dtype)).float()


def agree(logits: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Whether logits (N, classes) differ from the expected ones by no more than the arithmetic of `dtype` does. Where these are
    not finite, the weights are broken, and nothing is to be held against any way."""
    if not bool(expected.isfinite().all()):
        return True
    if dtype == torch.bfloat16:
        return bool((logits - expected).norm() <= L2_ERROR * expected.norm())
    return bool((logits - expected).abs().max() <= LARGEST_ERROR * expected.abs().max())
