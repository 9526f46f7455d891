"""Peak memory of reading an EfficientNet-L2 checkpoint (480 M parameters, random), against its tensors' size; a process for each."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

LIMIT = 1.3
READ = """
import json, sys
from triscale.weights.open import open_model
from triscale.weights.load import load_weights
from triscale.model import build
from triscale.families import arch
import torch
path, way = sys.argv[1:]
build(arch("efficientnet_b0"))  # what torch allocates once
def high_water():  # not getrusage: a child's maximum begins with its parent's
    return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
before = high_water()
if way == "open_model":
    net, card = open_model(path)
    assert card.arch.name == "efficientnet_l2"
else:
    net = load_weights(build(arch("efficientnet_l2")), path)
size = sum(t.numel() * t.element_size() for t in net.state_dict().values())
assert all(bool(t.isfinite().all()) for t in net.state_dict().values())  # every page has been read
print(json.dumps({"size": size, "peak": high_water() - before}))
"""


def main():
    from safetensors.torch import save_file

    from triscale.families import arch
    from triscale.model import build
    from triscale.weights.convert import write_as
    from triscale.weights.dialects import dialect_of
    from triscale.weights.load import write_state
    from triscale.weights.model_file import ModelCard

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        net = build(arch("efficientnet_l2"))
        state = write_state(net, dialect_of("timm", net.arch))
        save_file(state, Path(folder) / "tf_l2.safetensors")
        torch.save(state, Path(folder) / "tf_l2.pth")
        card = ModelCard(net.arch, None, ())
        write_as(Path(folder) / "l2.npz", net, card, "keras-npz")
        del net, state
        for name, way in (
            ("tf_l2.safetensors", "open_model"),
            ("tf_l2.pth", "open_model"),
            ("l2.npz", "open_model"),
            ("tf_l2.safetensors", "load_weights"),
        ):
            run = subprocess.run([sys.executable, "-c", READ, f"{folder}/{name}", way], capture_output=True, text=True, check=True)
            found = json.loads(run.stdout.splitlines()[-1])
            rows.append({"format": Path(name).suffix, "way": way, **found, "ratio": found["peak"] / found["size"], "limit": LIMIT})
            print(rows[-1], flush=True)
    return rows
