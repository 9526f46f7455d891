"""The paper's tables and figures: our counts, the differences, and a reason for every large one."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
from PIL import Image

from triscale import paper
from triscale.budget import STEP
from triscale.cost_model import cost
from triscale.families import arch
from triscale.naming import UnknownNameError
from triscale.reproduce import NAMES, Reproduction, render, reproduce
from triscale.reproduce.layout import NO_RULE
from triscale.reproduce.reasons import why
from triscale.reproduce.study_results import COMMAND, ResultsError
from triscale.scaling import compound, scale

# Counted independently, by torch's flop counter on another library's modules: billions of MACs.
FAMILY = (0.386, 0.687, 0.994, 1.827, 4.394, 10.266, 19.068, 37.746)
COUNTED = {
    "EfficientNet-B0 base": 0.386,
    "EfficientNet-B0 d=4": 1.575,
    "EfficientNet-B0 w=2": 1.450,
    "EfficientNet-B0 r=2": 1.538,
    "EfficientNet-B0 compound": 1.800,
    "MobileNetV1 base": 0.569,
    "MobileNetV1 w=2": 2.216,
    "MobileNetV1 r=2": 2.272,
    "MobileNetV1 compound": 2.470,
    "MobileNetV2 base": 0.301,
    "MobileNetV2 d=4": 1.220,
    "MobileNetV2 w=2": 1.137,
    "MobileNetV2 r=2": 1.199,
    "ResNet-50 base": 4.089,
    "ResNet-50 d=4": 14.571,
    "ResNet-50 r=2": 16.351,
}
PARAMS = (5288548, 7794184, 9109994, 12233232, 19341616, 30389784, 43040704, 66347960)


def columns(result: Reproduction) -> dict[str, dict[str, str]]:
    """Row name -> column name -> cell."""
    return {row[0]: dict(zip(result.header, row, strict=True)) for row in result.rows}


def note_of(result: Reproduction, row: str) -> str:
    return " ".join(n for n in result.notes if n.startswith(f"{row}:"))


def test_table1_is_the_papers_and_sums_to_b0():
    rows = reproduce("table1").rows
    assert [row[6] for row in rows] == ["the same"] * 9 + [""]
    assert rows[3][:6] == ("4", "MBConv6 k5", "56", "40", "2", "2")
    assert sum(int(row[7].replace(",", "")) for row in rows[:9]) == 5288548
    assert rows[9][7:] == ("5,288,548", "0.3858")


def test_table1_shows_what_differs(monkeypatch):
    wrong = (*paper.TABLE1[:2], replace(paper.TABLE1[2], channels=32, stride=1), *paper.TABLE1[3:])
    monkeypatch.setattr(paper, "TABLE1", wrong)
    assert reproduce("table1").rows[2][6] == "channels 32; stride 1"


def test_table2_counts_the_family_exactly():
    rows = reproduce("table2").rows
    for row, params, macs in zip(rows, PARAMS, FAMILY, strict=False):
        assert row[1] == f"{params:,}"
        assert row[3] == f"{macs:.3f}"
    assert rows[4] == ("EfficientNet-B4", "19,341,616", "19M", "4.394", "4.2", "+4.6%", "not run", "82.9 / 96.4")
    assert rows[8] == ("ResNet-50", "25,557,032", "26M", "4.089", "4.1", "-0.3%", "not run", "76.0")
    assert rows[9][1:6] == ("60,192,808", "60M", "11.514", "11", "+4.7%")


def test_table2_leaves_open_what_is_not_there():
    table = reproduce("table2")
    missing = [row for row in table.rows if row[1] == "not built yet"]
    assert len(missing) == len(table.rows) - 10 == 14
    assert all(row[3] == row[5] == row[7] == "-" for row in missing)
    assert missing[-1] == ("GPipe (AmoebaNet-B)", "not built yet", "557M", "-", "-", "-", "not run", "-")
    off = next(n for n in table.notes if n.startswith("Within 5%"))
    assert "EfficientNet-B5 10.3 for 9.9 B MACs" in off
    assert "B6" not in off  # 19.068 is 19


@pytest.mark.parametrize("name", ["table3", "table7"])
def test_scaling_tables_count_what_an_independent_counter_counts(name):
    for row, cells in columns(reproduce(name)).items():
        if row in COUNTED:
            assert cells["MACs (B)"] == f"{COUNTED[row]:.3f}", row
        assert cells["Top-1 here"] == "not run"


def test_table7_row_by_row():
    table = reproduce("table7")
    assert table.rows[1][:10] == ("EfficientNet-B0 d=4", "4", "1", "1", "224", "1.575", "1.8", "-12.5%", "not run", "79.0")
    assert table.rows[4][:10] == ("EfficientNet-B0 compound", "1.4", "1.2", "1.3", "292", "1.800", "1.8", "+0.0%", "not run", "81.1")


def test_resnet_width_is_the_counted_value_and_its_note_has_the_other_readings():
    table = reproduce("table3")
    assert columns(table)["ResNet-50 w=2"]["MACs (B)"] == "15.870"
    assert "doubled too it is 16.117" in note_of(table, "ResNet-50 w=2")


@pytest.mark.parametrize("name", ["table2", "table3", "table7", "figure5"])
def test_differences_are_right_and_large_ones_have_a_note(name):
    table = reproduce(name)
    compared = 0
    for row, cells in columns(table).items():
        if cells["Differs by"] == "-":
            continue
        compared += 1
        ours, theirs = float(cells["MACs (B)"]), float(cells["Paper's MACs"])
        percent = 100 * (ours - theirs) / theirs
        assert float(cells["Differs by"].rstrip("%")) == pytest.approx(percent, abs=0.2)
        assert abs(percent) <= 5 or len(note_of(table, row)) > len(row) + 20, row
    assert compared == {"table2": 10, "table3": 14, "table7": 5, "figure5": 14}[name]


def test_reasons_are_computed():
    three, seven = reproduce("table3"), reproduce("table7")
    assert "0.569" in note_of(three, "MobileNetV1 base")
    assert "into 20" in note_of(three, "MobileNetV1 compound")
    assert "single it is 2.318" in note_of(three, "MobileNetV1 compound")
    # One bottleneck block after the first: 1x1, 3x3 and 1x1 at 56 x 56 with 256 and 64 channels.
    block = (2 * 256 * 64 + 9 * 64 * 64) * 56 * 56
    assert f"costs {block / 1e9:.3f} B" in note_of(three, "ResNet-50 d=4")
    assert f"71 give {14.570749952 + 7 * block / 1e9:.2f}, 72 give {14.570749952 + 8 * block / 1e9:.2f}" in note_of(three, "ResNet-50 d=4")
    # The four projections of twice the width: 128 -> 512 at 56 x 56, then 512 -> 1024 at 28 x 28 and two of the same cost.
    projections = 128 * 512 * 56 * 56 + 3 * 512 * 1024 * 28 * 28
    assert f"projections {(16.11661312e9 - projections) / 1e9:.3f}" in note_of(three, "ResNet-50 w=2")
    assert "every stage (what ceil gives for d from just above 4) is 1.759" in note_of(seven, "EfficientNet-B0 d=4")
    assert "(224 px) gives 1.755, which prints as 1.8" in note_of(seven, "EfficientNet-B0 w=2")
    assert "(492 px) gives 1.918, which prints as 1.9" in note_of(seven, "EfficientNet-B0 r=2")


def test_doubling_never_costs_more_than_four_times():
    """What the notes on w=2 and r=2 of Table 7 rest on, stage by stage."""
    base = cost(arch("efficientnet_b0")).per_stage
    for axis in ({"width": 2}, {"resolution": 2}):
        for before, after in zip(base, cost(scale(arch("efficientnet_b0"), **axis)).per_stage, strict=True):
            assert after.macs <= 4 * before.macs


def test_a_difference_without_a_derived_reason_says_so():
    assert why("Another", 1.2, "1.0") == (f"Another: {NO_RULE}",)
    assert why("Another", 1.04, "1.0") == ()


@pytest.mark.parametrize(("row", "base", "budget"), [("MobileNetV2 compound", "mobilenet_v2", 1.3e9), ("ResNet-50 compound", "resnet50", 16.7e9)])
def test_compound_rows_without_coefficients_fill_their_budget(row, base, budget):
    table = reproduce("table3")
    note = note_of(table, row)
    phi = float(note.split("phi ")[1].split(":")[0])
    assert cost(scale(arch(base), compound(phi))).macs <= budget < cost(scale(arch(base), compound(phi + 1 / STEP))).macs
    cells = columns(table)[row]
    assert (float(cells["d"]), float(cells["w"]), float(cells["r"])) == pytest.approx((1.2**phi, 1.1**phi, 1.15**phi), abs=5e-4)
    assert float(cells["MACs (B)"]) * 1e9 <= budget


@pytest.mark.parametrize("name", ["table1", "table2", "table3", "table7", "figure1", "figure5"])
def test_every_print_says_once_what_macs_are_and_whose_the_accuracies_are(name):
    text = " ".join(render(reproduce(name), 120).split())
    assert text.count("FLOPS") == ("MACs (B)" in reproduce(name).header)
    assert ("Accuracies are the paper's" in text) == (name != "table1")


def test_render_aligns_and_wraps():
    table = Reproduction("T", ("Network", "Two words", "Text"), (("a", "1.5", "x"), ("long name", "-12.0", "yy")), ("word " * 20,))
    assert render(table, 60).splitlines() == [
        "T",
        "             Two",
        "Network    words  Text",
        "----------------------",
        "a            1.5  x",
        "long name  -12.0  yy",
        "- " + " ".join(["word"] * 11),
        "  " + " ".join(["word"] * 9),
    ]


def test_table5_is_the_papers_and_leaves_open_what_was_not_measured(tmp_path):
    (tmp_path / "results.jsonl").write_text("")
    table = reproduce("table5", study=tmp_path)
    assert len(table.rows) == 8
    assert table.rows[0] == (
        "CIFAR-10",
        "NASNet-A (85M)",
        "98.0",
        "EfficientNet-B0 (4M)",
        "98.1",
        "GPipe (556M)",
        "99.0",
        "EfficientNet-B7 (64M)",
        "98.9",
        "not run",
    )
    assert [row[-1] for row in table.rows] == ["not run"] * 8
    assert any("Nothing has been measured here" in note for note in table.notes)


def test_table5_shows_what_was_measured(tmp_path):
    lines = (
        '{"dataset": "oxford-iiit-pet", "network": "efficientnetv2_b0", "mean_per_class": [0.91, 0.93], "images": 3680, "px": 224, "seeds": 2}\n'
        '{"dataset": "cifar10-mini", "network": "efficientnetv2_b0", "top1": 0.8812, "images": 2000}\n'
        '{"dataset": "cifar10", "netw'  # cut off by a kill
    )
    (tmp_path / "results.jsonl").write_text(lines)
    table = columns(reproduce("table5", study=tmp_path))
    assert table["Oxford-IIIT Pets"]["Measured here"] == "efficientnetv2_b0 92.0 (3680 training images, 224 px, 2 seeds, mean per class)"
    assert table["CIFAR-10"]["Measured here"] == "not run"
    assert table["cifar10-mini"]["Measured here"] == "efficientnetv2_b0 88.1 (2000 training images)"
    (tmp_path / "results.jsonl").write_text('{"dataset": "cifar10", "network": "b0"}\n')
    with pytest.raises(ResultsError, match=r"results\.jsonl, line 1: expected dataset, network and top1 or mean_per_class"):
        reproduce("table5", study=tmp_path)


@pytest.mark.parametrize("name", ["table7", "figure3", "figure4", "figure8"])
def test_without_results_a_study_is_not_run_and_its_command_is_told(name, tmp_path):
    result = reproduce(name, tmp_path / "figures", study=tmp_path)
    assert any(note.startswith("The study: not run") and COMMAND in note for note in result.notes)
    assert all("not run" in row for row in result.rows)
    assert result.figure is None
    assert not (tmp_path / "figures").exists()


@pytest.mark.parametrize("name", NAMES)
def test_a_narrow_render_loses_nothing(name):
    result = reproduce(name)
    text = render(result, 50)
    assert max(map(len, text.splitlines())) <= 50
    flat = " ".join(text.split())
    assert all(cell in flat for row in result.rows for cell in row)


@pytest.mark.parametrize("name", ["figure1", "figure5"])
def test_figures_are_written(name, tmp_path):
    result = reproduce(name, tmp_path / "new" / "folder")
    assert result.figure == tmp_path / "new" / "folder" / f"{name}.png"
    assert os.listdir(result.figure.parent) == [f"{name}.png"]
    assert result.figure.stat().st_size < 200_000
    with Image.open(result.figure) as image:
        image.load()
        assert (image.format, image.size) == ("PNG", (1080, 750))
        assert len(image.convert("RGB").quantize(256).getcolors()) > 50  # something is drawn
    assert f"figure: {result.figure}" in render(result, 200)


def test_figures_hold_our_counts_and_the_papers_accuracies():
    one, five = reproduce("figure1"), reproduce("figure5")
    assert one.figure is None
    assert one.rows[7] == ("EfficientNet-B7", "66,347,960", "84.3")
    assert {row[0]: row[1:] for row in one.rows}["ResNet-50 base"] == ("25,557,032", "76.0")
    assert five.rows[7] == ("EfficientNet-B7", "37.746", "37", "+2.0%", "84.3")
    assert [row[0] for row in five.rows[8:]] == [f"{n} {end}" for n in ("MobileNetV1", "MobileNetV2", "ResNet-50") for end in ("base", "compound")]


def test_a_figure_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "kept.png"
    file.write_bytes(b"old")

    def full(_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        reproduce("figure1", file)
    assert file.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["kept.png"]


def test_out_must_be_a_folder_or_a_png(tmp_path):
    (tmp_path / "notes.txt").write_text("kept")
    with pytest.raises(ValueError, match=r"notes\.txt: expected a folder or a \.png file"):
        reproduce("figure1", tmp_path / "notes.txt")
    assert (tmp_path / "notes.txt").read_text() == "kept"


def test_an_unknown_name_gives_the_nearest():
    with pytest.raises(UnknownNameError, match="unknown table or figure 'tabel7'; nearest is 'table7'"):
        reproduce("tabel7")


def test_importing_loads_neither_torch_nor_matplotlib():
    code = "import sys, triscale.reproduce as r; r.reproduce('table2'); print([m for m in ('torch', 'numpy', 'matplotlib') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
