"""The kernels' machine code for sm_90, compiled here without a GPU: instructions an output, which the predictions read.

results/machine_code.json: every variant's registers and instructions, and by counting.code_key the instructions an output of the
depthwise kernels: the most of the variants of that key. The other kernels' are bound by bytes or by the matrix units.
"""

import json

from benchmarks.gpu.machine import have, version
from triscale.files import write_text

FILE = "machine_code.json"


def main(folder):
    if not have("triton"):
        print("no Triton here, so nothing is compiled: pip install triton")
        return 2
    from triscale.kernels.machine import all_variants, compile_variant, interpreted, table

    if interpreted():
        print("TRITON_INTERPRET is set, so nothing is compiled: unset it")
        return 2
    rows, per_output = [], {}
    for module, variants in all_variants().items():
        compiled = {v.name: (v, compile_variant(v)) for v in variants}
        print(table(compiled), flush=True)
        for name, (variant, code) in compiled.items():
            about = {"module": module, "variant": name, "registers": code.registers, "stack": code.stack, "shared": code.shared}
            loop = code.loop.total() / variant.outputs if variant.outputs else None
            rows.append({**about, "spills": code.spills, "instructions_in_loop": code.loop.total(), "instructions_per_output": loop})
            key = key_of(module, variant)
            if key and loop is not None:
                per_output[key] = max(loop, per_output.get(key, 0.0))
    body = {"format": 1, "triton": version("triton"), "sm": 90, "per_output": dict(sorted(per_output.items())), "variants": rows}
    write_text(folder / FILE, json.dumps(body, indent=1) + "\n")
    return 0


def key_of(module, variant):
    """counting.code_key of the steps that this variant is compiled for, None where predictions don't read it."""
    size, stride, channels = (variant.constants.get(name, 0) for name in ("size", "stride", "channels"))
    if module != "depthwise" or channels % 2:  # the networks' channels are multiples of 8; odd ones take a load each
        return None
    return f"{module} {size}x{size} s{stride}" if size and stride else None


def per_output(folder):
    """Instructions an output by code_key; {} before `main` was run."""
    path = folder / FILE
    return json.loads(path.read_text(encoding="utf-8"))["per_output"] if path.is_file() else {}
