"""What all tests share: the reference data, and one thread."""

import atexit
import os
import shutil
import signal
import tempfile
from pathlib import Path

import pytest

# Before torch is imported. Two OpenMP threads wait for each other wherever a core is taken by something else: one training
# step of B0 took 7 s instead of 0.1 s on two cores of which one was busy.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell's background job and pytest-xdist's workers ignore Ctrl-C, and so would every process that a test starts and interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Parquet's images and arrays are copied into the cache: not into the user's.
os.environ.setdefault("TRISCALE_HOME", tempfile.mkdtemp(prefix="triscale-tests-"))
atexit.register(shutil.rmtree, os.environ["TRISCALE_HOME"], ignore_errors=True)

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference data: $TRISCALE_TEST_DATA, else ../shared beside the repository."""
    folder = Path(os.environ.get("TRISCALE_TEST_DATA", ROOT.parent / "shared")).resolve()
    if not (folder / "golden").is_dir():
        reason = f"no reference data at {folder} (set TRISCALE_TEST_DATA to the folder that holds golden/ and weights/)"
        print(reason)
        pytest.skip(reason)
    return folder


@pytest.fixture
def no_results(tmp_path, monkeypatch):
    """No record of the GPU benchmarks among the tree's results, whatever was measured."""
    from benchmarks.gpu import record, tuned

    for module in (record, tuned):
        monkeypatch.setattr(module, "RESULTS", tmp_path / "no-results")


@pytest.fixture
def rehearsal(tmp_path, monkeypatch):
    """name -> a run of that part of the GPU benchmarks on the CPU."""
    from gpu_bench import part

    from benchmarks.gpu import machine, timing, worker

    monkeypatch.setattr(timing, "GROUP_MS", 0.01)
    return lambda name, found=None: worker.Run(part(name), 60.0, tmp_path, found or machine.Carried(), rehearsal=True)


@pytest.fixture(scope="session")
def small_pack(tmp_path_factory):
    """A pack of four pictures of classes a and b."""
    import numpy as np
    from PIL import Image

    from triscale.data.datasets import find
    from triscale.data.pack import Packing, pack

    folder = tmp_path_factory.mktemp("pictures")
    noise = np.random.default_rng(0)
    for i in range(4):
        (folder / "data" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise.integers(0, 256, (40, 50, 3), np.uint8)).save(folder / "data" / "ab"[i % 2] / f"{i}.jpg")
    pack(find(str(folder / "data"), draw=False), folder / "small", Packing(32))
    return folder / "small"
