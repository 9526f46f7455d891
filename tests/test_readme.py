"""What the README says is what runs and what was measured."""

import re
import subprocess
import sys

from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_example_runs_as_it_stands(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    macs, memory = map(int, result.stdout.splitlines()[0].split())
    assert abs(macs / (2**3 * 385_814_752) - 1) < 0.15  # twice the MACs for each phi, but for the rounding
    assert memory > 32 * 100e6
    assert "bound by" in result.stdout


def test_tables_are_made_from_the_results(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.run import PAGE, page, readme

    assert readme(README) == README
    assert page() == PAGE.read_text(encoding="utf-8")


def test_every_command_named_exists_and_every_link_leads_somewhere():
    from triscale.cli import COMMANDS

    assert set(re.findall(r"^    triscale ((?:search|detect) \w+|\w+)", README, re.MULTILINE)) == set(COMMANDS) - {"demo"}
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
