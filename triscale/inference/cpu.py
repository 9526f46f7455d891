"""The CPU engine: one function by several ways, of which the fastest is taken for each size of image.

`plain` is the network itself; `folded`, its steps in plain torch; `onednn` and `onednn fused`, its steps through oneDNN's packed
operators; `compiled`, torch.compile with frozen weights, tried only where asked for, as compiling takes a quarter of a minute or more. All
but `plain` in float32, in bfloat16, or in both: then the faster arithmetic is taken too.

A way counts only if its logits of the first batch agree with the network's: in float32 within 1e-4 of the largest, or within ten
times what the network's own logits change by where its rounding differs (an untrained one may amplify rounding so); in bfloat16
to a relative L2 error of 5e-2, or, where that was asked for, twice the network's own in it.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from triscale.inference import onednn
from triscale.inference.agreement import agree, comparable, largest_error, no_worse
from triscale.inference.executor import Torch, execute
from triscale.inference.lowering import lower, plain_kinds
from triscale.inference.notices import Tell
from triscale.inference.steps import Step
from triscale.inference.tuning import Choices, Question, measure, network, processor
from triscale.model import ConvNet
from triscale.text import first_line

Way = Callable[[Tensor], Tensor]
Kind = Literal["plain", "compiled", "onednn fused", "onednn", "folded"]
Size = tuple[int, ...]  # threads, H, W; with `compiled` among the ways threads, N, C, H, W
ROUNDING = 10  # times the network's own
SAMPLE = 4  # images of a first batch, by which the choice is made
SIZES = 4  # of images that are measured; others go the way of the measured one nearest in area
IN_BFLOAT16 = "optimize: computes in bfloat16, the faster arithmetic here, which changes logits by a hundredth or so; precision='float32' doesn't"


@dataclass(frozen=True)
class Form:
    """A way to compute the network, and in which arithmetic."""

    kind: Kind
    dtype: torch.dtype

    @property
    def name(self) -> str:
        return f"{self.kind} bfloat16" if self.dtype == torch.bfloat16 and self.kind != "plain" else self.kind


def bfloat16_is_native() -> bool:
    """Whether the processor multiplies bfloat16 itself (AVX-512 BF16, AMX); elsewhere it is slower than float32."""
    return any(getattr(torch.cpu, name, bool)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))


class CPU:
    """Computes `net`, in evaluation mode, the fastest way: (N, C, H, W) float32 -> logits float32.

    net: nobody else's, as what is measured must not change. dtypes: float32, bfloat16, or both, of which the likely faster comes
    first. A size of image is measured when it first comes, on SAMPLE of them (0.5 s, or as long as they take six times), or known
    from the cache; other batches of it go the same way. compile: `compiled` is tried too, then for each shape. Several threads may
    call at once.
    """

    takes_pixels = False

    def __init__(self, net: ConvNet, dtypes: Sequence[torch.dtype], tell: Tell, *, compile: bool = False) -> None:
        self.net, self.dtypes, self.tell, self.compile = net, tuple(dtypes), tell, compile
        self.given = next(net.parameters()).dtype
        self.lowered: dict[torch.dtype, tuple[Step, ...]] = {}
        self.plain = plain_kinds(self._steps(self.dtypes[0]))
        self.choices = Choices(tell)
        self.chosen: dict[Size, str] = {}
        self.settled: dict[Size, str] = {}  # of chosen, those that were measured or known
        self.ways: dict[str, Way] = {}
        self.sound, self.wrong = set[str](), set[str]()  # ways whose logits were compared with the network's
        self.lock = threading.Lock()

    def __call__(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        size = (torch.get_num_threads(), *x.shape[0 if self.compile else 2 :])
        name = self.chosen.get(size)
        if name is None:
            with self.lock:  # one thread measures, and no other meanwhile
                name = self.chosen.get(size) or self._choose(size, x)
        return self._compute(name, x)

    @property
    def used(self) -> tuple[str, ...]:
        return tuple(sorted(set(self.chosen.values())))

    def _choose(self, size: Size, x: Tensor) -> str:
        if (name := self._nearest(size)) is not None:
            self.chosen[size] = name
            return name
        x = x if self.compile else x[:SAMPLE]
        expected = self._compute("plain", x)  # what it raises is the user's to see
        if not bool(comparable(expected).any()):
            return "plain"  # nothing to hold a way to; the next batch decides
        if len(self.dtypes) > 1 and not self.sound | self.wrong:
            self._settle_arithmetic(x, expected)
        name = self._known(x, expected) or self._fastest(x, expected)
        self.chosen[size] = self.settled[size] = name
        kept = {"plain", *self.chosen.values()}
        self.ways = {key: way for key, way in self.ways.items() if key in kept}  # the others' packed weights go
        self.lowered.clear()
        if self._forms()[name].dtype == torch.bfloat16 != self.given and torch.float32 in self.dtypes:
            self.tell(IN_BFLOAT16)
        elif name == "plain" and self.given != torch.bfloat16 and torch.float32 not in self.dtypes:
            self.tell(f"optimize: bfloat16 is no faster than float32 for images of {x.shape[2]}x{x.shape[3]} here; they run in float32")
        return name

    def _settle_arithmetic(self, x: Tensor, expected: Tensor) -> None:
        """Leaves bfloat16 out where the network's logits are too far off in it."""
        low = [name for name, form in self._forms().items() if form.dtype == torch.bfloat16 and form.kind != "compiled"]
        logits = next((found for name in low if (found := self._run(name, x)) is not None), None)
        if logits is None or not agree(logits, expected, torch.bfloat16):
            self.dtypes = (torch.float32,)
            self.tell("optimize: bfloat16 gives other logits than the network and is left out")

    def _nearest(self, size: Size) -> str | None:
        """The way of the size that is nearest in area, with as many threads, once enough of these are settled."""
        alike = {other: name for other, name in self.settled.items() if other[0] == size[0]}
        if self.compile or len(alike) < SIZES:
            return None
        return alike[min(alike, key=lambda other: abs(math.log(other[-2] * other[-1] / (size[-2] * size[-1]))))]

    def _known(self, x: Tensor, expected: Tensor) -> str | None:
        """What was chosen before, if it does for these weights, which may be others, and this machine's torch."""
        name = self.choices.get(self._question(x))
        return name if name in self._forms() and (name in self.sound or self._holds(name, x, expected)) else None

    def _fastest(self, x: Tensor, expected: Tensor) -> str:
        forms = self._forms()
        slow = [name for name, form in forms.items() if form.kind == "compiled"]
        for name in slow:
            self._run(name, x)  # what compiling takes is not to be measured
        calls = {name: partial(self._compute, name, x) for name in forms}
        seconds = measure(calls, lambda name: self._holds(name, x, expected), least=2 + len(slow))
        name = min(seconds, key=seconds.__getitem__)
        if not self.wrong:  # what is wrong here may be right for other images or weights
            self.choices.put(self._question(x), name, seconds)
        return name

    def _question(self, x: Tensor) -> Question:
        return {
            "network": network(self.net.arch, self.net.num_classes, self.net.in_channels),
            "shape": list(x.shape),
            "dtypes": [str(dtype) for dtype in self.dtypes],
            "threads": torch.get_num_threads(),
            "machine": processor(),
            "compile": self.compile,
        }

    def _forms(self) -> dict[str, Form]:
        """By name, in the order in which they are tried: after `plain` what is fastest for most."""
        slow: tuple[Kind, ...] = ("compiled",) if self.compile else ()
        kinds: list[tuple[Kind, ...]] = [slow, ("onednn fused", "onednn") if onednn.available() else (), ("folded",)]
        forms = [Form(kind, dtype) for some in kinds for dtype in self.dtypes for kind in some]
        return {form.name: form for form in (Form("plain", self.given), *forms)}

    def _holds(self, name: str, x: Tensor, expected: Tensor) -> bool:
        """Whether the way runs and its logits are the network's; told where not."""
        logits = None if name in self.wrong else expected if name == "plain" else self._run(name, x)
        if logits is None:
            return False
        dtype = self._forms()[name].dtype
        right = agree(logits, expected, dtype)
        if not right and dtype == torch.float32:
            right = self._as_rounded(logits, expected, x)
        elif not right and torch.float32 not in self.dtypes:  # bfloat16 was asked for
            right = no_worse(logits, expected, self.net, x, dtype)
        if right:
            self.sound.add(name)
            return True
        self.wrong.add(name)
        self.tell(f"optimize: '{name}' gives other logits than the network and is left out")
        return False

    def _as_rounded(self, logits: Tensor, expected: Tensor, x: Tensor) -> bool:
        """In another memory format sums have another order; where that is the same one, inputs differ by their last bit."""
        others = (self._compute("plain", x.contiguous()), self._compute("plain", torch.nextafter(x, x.new_tensor(math.inf))))
        return largest_error(logits, expected) <= ROUNDING * max(largest_error(other, expected) for other in others)

    def _run(self, name: str, x: Tensor) -> Tensor | None:
        try:
            return self._compute(name, x)
        except Exception as error:  # no compiler, an operator that this torch or processor lacks: of many kinds
            if name == "plain":
                raise
            self.tell(f"optimize: '{name}' doesn't run here and is left out ({first_line(error)})")
            return None

    def _compute(self, name: str, x: Tensor) -> Tensor:
        way = self.ways.get(name)
        if way is None:
            way = self.ways[name] = self._build(self._forms()[name])
        return way(x)

    def _build(self, form: Form) -> Way:
        if form.kind == "plain":
            return lambda x: self.net(x.to(self.given)).float()
        if form.kind == "compiled":
            return compiled(self.net, form.dtype)
        engine = Torch() if form.kind == "folded" else onednn.OneDNN(fuse=form.kind == "onednn fused")
        steps = self._steps(form.dtype)
        return lambda x: execute(engine, steps, x.to(form.dtype)).float()

    def _steps(self, dtype: torch.dtype) -> tuple[Step, ...]:
        if dtype not in self.lowered:
            self.lowered[dtype] = lower(self.net, dtype)
        return self.lowered[dtype]


def compiled(net: nn.Module, dtype: torch.dtype) -> Way:
    """torch.compile with the weights as constants, which takes the norms into them."""
    from torch._inductor import config

    function, shapes = torch.compile(net, dynamic=False), set[torch.Size]()

    def way(x: Tensor) -> Tensor:
        new = config.patch(freezing=True) if x.shape not in shapes else nullcontext()  # torch looks when it traces, not at options
        with new, torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            out: Tensor = function(x).float()
        shapes.add(x.shape)
        return out

    return way
