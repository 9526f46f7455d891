"""The tests that need a GPU, run by pytest in this process: those skipped without CUDA, those marked `gpu`, and the kernels'
(tests/interpreter.py).

A file is taken where it asks for CUDA or says where kernels run; of its tests, those with such a condition or mark. On a GPU the
kernel tests run compiled, on the device.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
SIGNS = ("cuda.is_available()", "from interpreter import")


def files():
    found = sorted((ROOT / "tests").glob("test_*.py"))
    return [p for p in found if not p.name.startswith("test_gpu_bench") and any(s in p.read_text() for s in SIGNS)]


def needs_gpu(item):
    """Whether the test is skipped for the lack of CUDA, is marked `gpu`, or lies in a file of kernel tests."""
    reasons = " ".join(str(mark.kwargs.get("reason", "")) for mark in item.iter_markers("skipif"))
    return "cuda" in reasons.lower() or "gpu" in reasons.lower() or item.get_closest_marker("gpu") is not None or hasattr(item.module, "run_apart")


class Watch:
    """A pytest plugin: keeps the GPU's tests, records each, stops when time is short."""

    def __init__(self, run):
        self.run = run

    def pytest_collection_modifyitems(self, config, items):
        kept = [item for item in items if needs_gpu(item)]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept

    def pytest_collectreport(self, report):
        if report.failed:
            self.run.record.add("test", name=report.nodeid, outcome="error", seconds=0.0, message=last_line(report))

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or not report.passed:
            outcome = report.outcome if report.when == "call" or report.skipped else "error"
            self.run.record.add("test", name=report.nodeid, outcome=outcome, seconds=round(report.duration, 2), message=last_line(report))

    def pytest_runtest_logfinish(self, nodeid):
        if self.run.left() < 0:
            self.run.cut = True
            self.session.shouldstop = "time limit"

    def pytest_sessionstart(self, session):
        self.session = session


def last_line(report):
    """Why a test failed or was skipped; empty where it passed."""
    if report.passed:
        return ""
    text = str(report.longrepr[2]) if isinstance(report.longrepr, tuple) else report.longreprtext
    lines = [line for line in text.splitlines() if line.startswith("E ")] or text.splitlines()
    return lines[0].strip()[:300] if lines else ""


def run(run):
    import pytest

    found = [str(p) for p in files()]
    status = pytest.main(["-q", "-p", "no:cacheprovider", "--continue-on-collection-errors", *found], plugins=[Watch(run)])
    # 0 passed, 1 failures, 2 stopped (by the time limit too), 5 nothing to run
    if status not in (0, 1) and not run.cut:
        run.record.note(f"pytest ended with status {int(status)}")
