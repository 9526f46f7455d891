"""The scaling study: what it trains, that a kill loses nothing, and that what is said of its results is what they are."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from triscale.cost_model import cost
from triscale.reproduce import render, reproduce
from triscale.reproduce.study_results import ResultsError, Trained, read_study, shipped, verdict
from triscale.scaling import ALPHA, BETA, GAMMA

sys.path.insert(0, str(ROOT))  # studies/ is no part of the installed package

from studies.scaling import page, plan
from studies.scaling.ledger import Ledger

TINY = ["--scale", "tiny", "--part", "figure8", "--only", "base,width", "--workers", "1"]


# --- what is trained ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["laptop", "gpu"])
def test_the_four_ways_cost_the_same_and_compound_is_the_papers(name):
    base = plan.SETTINGS[name].base
    five = plan.equal_macs(base)
    macs = {way: plan.macs(plan.scaled(base, s, way)) for way, s in five.items()}
    ways = [m for way, m in macs.items() if way != "base"]
    assert max(ways) / min(ways) < 1.05
    assert all(3.8 < m / macs["base"] < 4.2 for m in ways)
    s = five["compound"]
    assert (s.depth, s.width, s.resolution) == pytest.approx((ALPHA**s.phi, BETA**s.phi, GAMMA**s.phi))
    for axis in ("depth", "width", "resolution"):
        assert [a for a in ("depth", "width", "resolution") if getattr(five[axis], a) != 1] == [axis]


def test_shared_runs_are_made_once():
    setting = plan.SETTINGS["laptop"]
    every, alone = plan.runs(setting), {part: plan.runs(setting, (part,)) for part in plan.PARTS}
    key = [(replace(r.arch, name=""), r.recipe.seed) for r in every]
    assert len(set(key)) == len(key) == 29
    assert set(key) == {(replace(r.arch, name=""), r.recipe.seed) for runs in alone.values() for r in runs}
    assert len(alone["figure8"]) == 15
    assert {r.recipe.seed for r in alone["figure3"]} == {0}
    points = {(r.scaling.depth, r.scaling.resolution) for r in alone["figure4"]} & set(plan.PAIRS)
    assert points == set(plan.PAIRS)
    for pair in plan.PAIRS:
        assert len({r.scaling.width for r in every if (r.scaling.depth, r.scaling.resolution) == pair}) >= 3


# --- running ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Class folders of 32-px pictures whose class is their brightness, so that a network can learn it."""
    folder, draw = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for split, count in (("train", 20), ("test", 4)):
        for label in range(10):
            (folder / split / f"c{label}").mkdir(parents=True)
            for i in range(count):
                pixels = draw.normal(25 * label, 10, (32, 32, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / split / f"c{label}" / f"{i}.png")
    return folder


def command(pictures: Path, out: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "studies.scaling.run", *TINY, "--data-dir", str(pictures), "--out", str(out), *more]


def test_a_killed_study_goes_on_and_loses_nothing(pictures, tmp_path):
    out, results = tmp_path / "study", tmp_path / "study" / "results.jsonl"
    with open(tmp_path / "log", "w") as log:
        first = subprocess.Popen(command(pictures, out), cwd=ROOT, stdout=log, stderr=log)
        until = time.monotonic() + 120
        while not (results.exists() and results.read_bytes().count(b"\n")) and first.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
        first.send_signal(signal.SIGKILL)
        first.wait()
    before = results.read_bytes()
    assert 1 <= before.count(b"\n") < 4, (tmp_path / "log").read_text()  # killed in the middle
    with open(results, "ab") as file:
        file.write(b'{"format": 1, "na')  # as a kill within a write leaves it
    second = subprocess.run(command(pictures, out), cwd=ROOT, capture_output=True, text=True)
    assert second.returncode == 0, second.stderr
    after = results.read_bytes()
    whole = before[: before.rindex(b"\n") + 1]
    assert after.startswith(whole)
    lines = [json.loads(line) for line in after.splitlines()]
    assert sorted((line["name"], line["seed"]) for line in lines) == [("base", 0), ("base", 1), ("width", 0), ("width", 1)]
    kept = whole.count(b"\n")
    assert f"4 trainings, {kept} of them in" in second.stdout
    assert sorted(os.listdir(out)) == ["figure8.png", "models", "results.jsonl"]  # no folder of decoded pictures is left, of the killed one neither
    _models_and_lines_agree(out, lines)


def _models_and_lines_agree(out: Path, lines: list[dict]) -> None:
    from triscale.architecture import Arch
    from triscale.weights.model_file import load_model

    assert sorted(os.listdir(out / "models")) == ["base.safetensors", "width.safetensors"]
    for line in lines:
        arch = Arch.from_json(json.dumps(line["arch"]))
        assert (line["macs"], line["params"]) == (cost(arch, 10).macs, cost(arch, 10).params)
        assert (line["train_images"], line["test_images"]) == (200, 40)
        assert 0 <= line["top1"] <= line["top5"] <= 1
        assert line["recipe"]["seed"] == line["seed"]
        if line["seed"] == 0:
            net, card = load_model(out / "models" / f"{line['name']}.safetensors")
            assert card.arch == arch
            assert card.measured == {"top1": line["top1"]}
            assert sum(p.numel() for p in net.parameters()) == line["params"]


def test_two_studies_never_write_to_one_file(tmp_path):
    path = tmp_path / "results.jsonl"
    ledger = Ledger(path)
    with pytest.raises(ValueError, match="another process is running this study"):
        Ledger(path)
    ledger.append({"a": 1})
    ledger.close()
    again = Ledger(path)
    assert again.lines == [{"a": 1}]
    again.close()


def test_mistakes_are_told_in_a_line(tmp_path, capsys):
    from studies.scaling.run import main

    for more, told in (([], "--data-dir: expected the folder"), (["--data-dir", "x", "--only", "bese"], "no network 'bese'")):
        assert main(["--scale", "tiny", "--out", str(tmp_path / "o"), *more]) == 2
        assert told in capsys.readouterr().err
    assert main(["--render", "--out", str(tmp_path)]) == 2
    assert "no results" in capsys.readouterr().err


# --- what is said of results -------------------------------------------------------------------------------------------


def written(folder: Path, top1: dict[str, list[float]], scale: str = "laptop") -> Path:
    """Result lines of the laptop study's runs with these accuracies by name and seed, 0.5 for names that aren't there."""
    lines = []
    for r in plan.runs(plan.SETTINGS["laptop"]):
        c, s = cost(r.arch, 10), r.scaling
        accuracies = top1.get(r.name, [0.5] * 3)
        body = {"format": 1, "study": "scaling", "scale": scale, "name": r.name, "seed": r.recipe.seed, "px": r.arch.resolution}
        body |= {"depth": s.depth, "width": s.width, "resolution": s.resolution, "phi": s.phi, "macs": c.macs, "params": c.params}
        body |= {"top1": accuracies[r.recipe.seed], "top5": 0.9, "arch": json.loads(r.arch.to_json()), "recipe": r.recipe.to_dict()}
        lines.append(json.dumps(body | {"train_images": 50000, "test_images": 10000}))
    folder.mkdir(exist_ok=True)
    (folder / "results.jsonl").write_text("\n".join(lines) + "\n")
    return folder


WON = {
    "base": [0.60, 0.61, 0.62],
    "depth": [0.66, 0.66, 0.66],
    "width": [0.67, 0.68, 0.69],
    "resolution": [0.65, 0.66, 0.67],
    "compound": [0.71, 0.72, 0.73],
}


def test_table7_and_figure8_hold_the_results(tmp_path):
    folder = written(tmp_path / "study", WON)
    seven, eight = reproduce("table7", study=folder), reproduce("figure8", tmp_path, folder)
    assert [row[-1] for row in seven.rows] == ["61.00 ± 1.00", "66.00 ± 0.00", "68.00 ± 1.00", "66.00 ± 1.00", "72.00 ± 1.00"]
    assert seven.rows[4][10:14] == ("1.39, 1.19, 1.29", "20", "1.753", "3.97")
    assert seven.rows[4][9] == "81.1"
    assert [row[5] for row in eight.rows] == [row[-1] for row in seven.rows]
    assert [row[-1] for row in eight.rows] == ["77.3", "79.0", "78.9", "79.1", "81.1"]
    assert "compound first, as in the paper" in render(eight, 4000)
    assert eight.figure == tmp_path / "figure8.png"


@pytest.mark.parametrize(("name", "size"), [("figure3", (1440, 570)), ("figure4", (1080, 660)), ("figure8", (1080, 660))])
def test_figures_are_drawn(name, size, tmp_path):
    result = reproduce(name, tmp_path, written(tmp_path / "study", WON))
    assert result.figure.stat().st_size < 200_000
    with Image.open(result.figure) as image:
        assert image.size == size
        assert len(image.convert("RGB").quantize(256).getcolors()) > 50


def test_figure3_has_each_dimension_alone_and_its_gains(tmp_path):
    result = reproduce("figure3", study=written(tmp_path / "study", WON | {"depth 2": [0.64]}))
    depth = {row[0]: row[5] for row in result.rows if row[0].startswith("depth")}
    assert depth == {"depth 1.00": "61.00 ± 1.00", "depth 2.00": "64.00", "depth 3.51": "66.00 ± 0.00", "depth 6.00": "50.00"}
    assert len(result.rows) == 4 + 4 + 5
    # Depth 2 costs 1.9931 times the base: 3 points in log2(1.9931) = 0.995 doublings.
    assert any(note.startswith("Depth alone: +3.02 points for each doubling") and "highest at 3.51 with 66.00" in note for note in result.notes)


def test_figure4_compares_at_equal_cost(tmp_path):
    heights = {"d 2 r 1.3 w 1": [0.80], "d 2 r 1.3 w 1.5": [0.80], "d 2 r 1.3 w 2": [0.80], "d 1 r 1.3 w 2": [0.7]}
    note = " ".join(reproduce("figure4", study=written(tmp_path / "a", WON | heights)).notes)
    # The curve that ends first is d=1, r=1.3 at 2.43 M; there it is at its own last point.
    assert "At 2.43 M multiply-adds" in note
    assert "d=1.0 r=1.3 70.00 %" in note
    assert "d=2.0 r=1.3 80.00 %: highest d=2.0 r=1.3, as in the paper" in note
    other = " ".join(reproduce("figure4", study=written(tmp_path / "b", WON | {"d 1 r 1.3 w 2": [0.7]})).notes)
    assert "highest d=1.0 r=1.3, in the paper d=2.0 r=1.3 is" in other


def network(name: str, *top1: float) -> Trained:
    return Trained(name, 1, 1, 1, None, 16, 100 if name == "base" else 400, 10, top1, top1)


def five(**ways: tuple[float, ...]) -> list[Trained]:
    rest = {"depth": (0.60, 0.61), "width": (0.60, 0.61), "resolution": (0.60, 0.61), "compound": (0.60, 0.61)}
    return [network("base", 0.5, 0.5), *(network(name, *top1) for name, top1 in (rest | ways).items())]


@pytest.mark.parametrize(
    ("networks", "told", "not_told"),
    [
        (five(compound=(0.70, 0.71)), "lead of 10.00 points, more than the spread", "no winner"),
        (five(compound=(0.70, 0.71)), "compound first, as in the paper.", "unlike"),
        (five(width=(0.70, 0.71)), "width first and not compound, unlike the paper.", "as in the paper"),
        (five(width=(0.70, 0.71), depth=(0.65, 0.65), resolution=(0.64, 0.64)), "Compound is last with 60.50", "as in the paper"),
        (five(compound=(0.61, 0.62)), "no winner.", "as in the paper"),  # 1 point ahead, the difference's spread is 1.0
        (five(compound=(0.7,), width=(0.6,)), "of one seed, so no winner can be named", "as in the paper"),
        (five()[:3], "Not all five networks have been trained: resolution, compound are missing.", "winner"),
    ],
)
def test_the_reading_is_honest(networks, told, not_told):
    said = verdict(networks)
    assert told in said
    assert not_told not in said


def test_results_of_another_recipe_or_scale_are_not_mixed_in(tmp_path):
    folder = written(tmp_path / "study", WON)
    line = json.loads((folder / "results.jsonl").read_text().splitlines()[0])
    line["recipe"]["epochs"], line["top1"] = 99, 0.99
    (folder / "longer.jsonl").write_text(json.dumps(line) + "\n")
    study = read_study(folder)
    assert study.five()[0].top1 == (0.60, 0.61, 0.62)
    assert "1 results of another scale or recipe" in study.notes[0]


def test_broken_results_are_named(tmp_path):
    file = tmp_path / "results.jsonl"
    for text, told in (("[1]\n", "line 1: expected a JSON object"), ('{"study": "scaling"}\n', 'line 1: expected "format": 1'), ("\xff\n", "UTF-8")):
        file.write_text(text, encoding="latin-1")
        with pytest.raises(ResultsError, match=told):
            read_study(tmp_path)
    with pytest.raises(ResultsError, match="no such folder"):
        reproduce("figure8", study=tmp_path / "nowhere")


# --- the page ----------------------------------------------------------------------------------------------------------


def test_the_page_is_made_from_the_results_between_its_markers(tmp_path):
    folder, docs = written(tmp_path / "study", WON), tmp_path / "docs"
    docs.mkdir()
    (docs / "scaling.md").write_text("mine\n<!-- scaling -->\nold\n<!-- /scaling -->\nmine too\n")
    paths = page.write(folder, docs)
    text = (docs / "scaling.md").read_text()
    assert text.startswith("mine\n<!-- scaling -->\nAt 4.0 times the multiply-adds")
    assert text.endswith("<!-- /scaling -->\nmine too\n")
    assert "old" not in text
    assert "| compound | 1.39, 1.19, 1.29 | 20 | 1.753 |" in text
    assert [p.name for p in paths] == ["scaling.md", "scaling-figure8.png", "scaling-figure3.png", "scaling-figure4.png"]
    assert all(f"({p.name})" in text for p in paths[1:])


def test_the_docs_page_is_that_of_the_results_kept_here():
    study = read_study()
    if study is None:
        assert not list(shipped().glob("*.jsonl"))
        pytest.skip("no results are kept in studies/scaling/results")
    text = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    figures = {name: replace(reproduce(name), figure=Path("x")) for name in page.FIGURES}
    assert page.between_markers(text, page.block(study, figures)) == text
