"""Where tests of Triton kernels run: on the GPU where there is one, else under Triton's interpreter, in a process of their own.

TRITON_INTERPRET has to be set before Triton is imported, and turns every kernel of the process into an interpreted one.
"""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from benchmarks.gpu.interpreter import mend
from triscale.kernels.machine import interpreted

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HAVE_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = interpreted()
if INTERPRETED:
    mend()
TANH = 2**-11 if DEVICE.type == "cuda" else 0.0  # relative error of the device's tanh (PTX ISA), where the interpreter has libm's
TIMEOUT = 600  # seconds that a file may take under the interpreter: ten times what any needs


def run_apart(module):
    """To be called last in a test file, with its globals(): its tests give way to one that runs the file under the interpreter.

    Does nothing on a GPU and under the interpreter itself. The file imports Triton and kernels under
    `if runs_here():` alone.
    """
    if runs_here():
        return
    file = module["__file__"]
    for name in [name for name in module if name.startswith("test_")]:
        del module[name]
    module["test_under_the_interpreter"] = lambda: _run(file)


def runs_here():
    return HAVE_TRITON and (INTERPRETED or DEVICE.type == "cuda")


def _run(file):
    if not HAVE_TRITON:
        reason = "Triton isn't installed"
        print(reason)
        pytest.skip(reason)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file]
    run = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=TIMEOUT)
    assert run.returncode == 0, run.stdout + run.stderr
