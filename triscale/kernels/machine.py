"""What runs the kernels: whether this machine can, and what they compile to for sm_90, which takes no GPU.

Each kernel module has `variants() -> list[Variant]`: compilations that the networks' real shapes lead to, in the types that the
engine keeps, a few of each kind. The tests compile them all, and hold registers, spills, shared memory and instruction counts
to bounds.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import pkgutil
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

SM_MIN = 80  # bf16 arithmetic and asynchronous copies
MAX_REGISTERS = 255
SHARED = 227 * 1024  # bytes of shared memory that one program, and all programs of a multiprocessor, may have on compute capability 9.0


def have_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether kernels run under Triton's interpreter: TRITON_INTERPRET was set before Triton was imported."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y", "yes")


@cache
def unsupported(device: torch.device) -> str | None:
    """Why kernels can't run on `device`, as one line; None where they can."""
    if not have_triton():
        return "the GPU kernels need Triton, which isn't installed: pip install triton"
    if interpreted():
        return None
    if device.type != "cuda" or torch.version.cuda is None:
        return f"the GPU kernels need an NVIDIA GPU, found {device.type}"
    major, minor = torch.cuda.get_device_capability(device)
    if 10 * major + minor < SM_MIN:
        name = torch.cuda.get_device_name(device)
        return f"the GPU kernels need compute capability {SM_MIN // 10}.{SM_MIN % 10} or newer, found {major}.{minor} ({name})"
    return None


def on(kernel: str, *tensors: torch.Tensor | None) -> AbstractContextManager[object]:
    """To launch in: Triton launches on the current device, wherever the tensors are, so theirs is made current.

    Raises ValueError unless they share one device, and that is an NVIDIA GPU or kernels are interpreted.
    """
    devices = list(dict.fromkeys(t.device for t in tensors if t is not None))
    if len(devices) != 1 or not (devices[0].type == "cuda" or interpreted()):
        found = " and ".join(sorted(map(str, devices)))
        raise ValueError(f"{kernel}: expected all tensors on one {'device' if interpreted() else 'NVIDIA GPU'}, found {found}; move them there")
    return torch.cuda.device(devices[0]) if devices[0].type == "cuda" else nullcontext()


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may have; Hopper's where the interpreter stands in for a GPU."""
    return int(torch.cuda.get_device_properties(device).shared_memory_per_block_optin) if device.type == "cuda" else SHARED


@dataclass(frozen=True)
class Variant:
    """One compilation of a kernel, as a launch would ask for it.

    kernel: the @triton.jit function. signature: Triton's type of each parameter that isn't constexpr ("*bf16", "*fp32",
    "*u8", "i32", "i64"). constants: the constexpr parameters. Pointers are taken as aligned to 16 bytes, as torch's are;
    divisible: integer parameters whose value is a multiple of 16 (Triton compiles for that where it sees one).
    outputs: output elements that one thread computes in one pass of the kernel's longest loop (in all where it has none).
    max_instructions: per output in that loop, the bound that the tests hold; None where nothing is promised. max_shared: bytes.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    warps: int = 4
    stages: int = 1
    divisible: tuple[str, ...] = ()
    outputs: float = 0.0
    max_registers: int = MAX_REGISTERS
    max_shared: int = SHARED
    max_instructions: float | None = None


@dataclass(frozen=True)
class Machinecode:
    """What a variant compiled to. stack and spills: bytes per thread, and instructions that move to or from it; both
    must be 0. loop: instructions by opcode in the longest loop; the whole kernel where it has none."""

    registers: int
    stack: int
    shared: int
    opcodes: Counter[str] = field(default_factory=Counter)
    loop: Counter[str] = field(default_factory=Counter)
    ttir: str = ""

    @property
    def spills(self) -> int:
        return sum(n for op, n in self.opcodes.items() if op.split(".")[0] in ("STL", "LDL"))

    def per_output(self, outputs: float) -> float:
        return self.loop.total() / outputs if outputs else float("nan")


def compile_variant(variant: Variant, sm: int = 90) -> Machinecode:
    """Compiles for compute capability sm/10 and reads the machine code. Raises what Triton raises where it doesn't compile."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(variant.kernel.arg_names)
    signature = {name: variant.signature.get(name, "constexpr") for name in names}
    missing = [name for name in names if signature[name] == "constexpr" and name not in variant.constants]
    unknown = sorted({*variant.signature, *variant.constants, *variant.divisible} - set(names))
    if missing or unknown:
        raise ValueError(f"{variant.name}: parameters without a type or value: {missing}; not parameters of {variant.kernel.__name__}: {unknown}")
    aligned = [i for i, name in enumerate(names) if signature[name].startswith("*") or name in variant.divisible]
    source = ASTSource(
        fn=variant.kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in variant.constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    options = {"num_warps": variant.warps, "num_stages": variant.stages, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
    return read_cubin(compiled.asm["cubin"], compiled.metadata.shared, compiled.asm["ttir"])


def read_cubin(cubin: bytes, shared: int = 0, ttir: str = "") -> Machinecode:
    """Registers, stack and instructions of a compiled kernel, by the cuobjdump that comes with Triton."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        run = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", "--dump-sass", str(file)]
        text = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if usage is None:
        raise ValueError(f"no resource usage in what cuobjdump printed: {text[:200]!r}")
    code = [(int(at, 16), op, rest) for at, op, rest in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)([^;]*);", text)]
    while code and code[-1][1] in ("NOP", "BRA"):  # behind the kernel: a branch to itself and padding
        code.pop()
    return Machinecode(int(usage[1]), int(usage[2]), shared, Counter(op for _, op, _ in code), _longest_loop(code), ttir)


def _longest_loop(code: list[tuple[int, str, str]]) -> Counter[str]:
    """Opcodes between the target of a backward branch and the branch: the pair furthest apart. `code`: address, opcode, operands."""
    body = (code[0][0], code[-1][0])
    longest = -1
    for at, op, rest in code:
        target = re.search(r"0x([0-9a-f]+)", rest) if op == "BRA" else None
        if target and int(target[1], 16) < at and at - int(target[1], 16) > longest:
            body = (int(target[1], 16), at)
            longest = at - body[0]
    return Counter(op for at, op, _ in code if body[0] <= at <= body[1])


def all_variants() -> dict[str, list[Variant]]:
    """The variants of each kernel module of this folder, by the module's name."""
    folder = importlib.import_module("triscale.kernels")
    modules = {m.name: importlib.import_module(f"triscale.kernels.{m.name}") for m in pkgutil.iter_modules(folder.__path__) if m.name != "machine"}
    return {name: module.variants() for name, module in modules.items() if hasattr(module, "variants")}


def table(rows: Mapping[str, tuple[Variant, Machinecode]]) -> str:
    """One line a variant: registers, stack bytes, shared bytes, instructions in the longest loop, per output, loads and stores by width."""
    lines = [f"{'variant':<58} regs stack shared  loop  per output  memory"]
    for name, (variant, code) in rows.items():
        memory = " ".join(f"{op}x{n}" for op, n in sorted(code.loop.items()) if re.match(r"(LDG|STG|LDS|STS|LDSM|LDGSTS|HMMA|HGMMA)\b", op))
        numbers = f"{code.registers:>4} {code.stack:>5} {code.shared:>6} {code.loop.total():>5} {code.per_output(variant.outputs):>11.2f}"
        lines.append(f"{name:<58} {numbers}  {memory}")
    return "\n".join(lines)
