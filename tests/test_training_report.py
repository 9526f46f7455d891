"""The page of a training: what it says, that it can be read, and that it comes from whatever is there of a run folder."""

import base64
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

import triscale as ts
from triscale.report import ReportError, render
from triscale.run_log import RunLog, write_held_out, write_samples
from triscale.training_report.page import duration
from triscale.weights.model_file import ModelCard, save_model

TINY = ts.Arch(ts.Stem(4), (ts.Stage("mbconv", 3, 2, 2, 0.25, "identity", 8, 1),), ts.Head(8), 16, 0.0, name="tiny")
NAMES = ("cat", "<script>alert('dog')</script>", "a & b $x_1$")
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Tags that are open or were closed out of order, the visible text by section, pictures with their texts."""

    def __init__(self, path):
        super().__init__()
        self.open, self.tags, self.images, self.sections, self.hidden, self.current = [], set(), [], {"": ""}, 0, ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        self.text = " ".join(" ".join(self.sections.values()).split())

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        if tag == "img":
            self.images.append(dict(attributes))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "h2":
            self.current = None

    def handle_startendtag(self, tag, attributes):
        self.tags.add(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag == "td":
            self.sections[self.current] += " "

    def handle_data(self, data):
        if {"style", "svg"} & set(self.open):
            return
        if self.current is None:
            self.current = data.strip()
            self.sections[self.current] = ""
        self.sections[self.current] += data


def write_run(folder, *, epochs=3, planned=3, model=True, held_out=True, resumed=False, times=True, classes=NAMES, size=16):
    """A run folder of `epochs` (4 steps each, 8 images a step) without a training."""
    rng = np.random.default_rng(0)
    count = len(classes)
    folder.mkdir(exist_ok=True)
    recipe = ts.Recipe(epochs=planned, lr=0.125)
    (folder / "recipe.json").write_text(json.dumps(recipe.to_dict()))
    (folder / "arch.json").write_text(TINY.to_json())
    write_samples(folder, rng.integers(0, 255, (6, size, size, 3), dtype=np.uint8), rng.integers(0, count, 6), classes)
    split = {"data_s": 0.03, "forward_s": 0.02, "backward_s": 0.04, "optimiser_s": 0.01} if times else {}
    with RunLog(folder) as log:
        log.note("1 image left out: <i>.jpg")
        if resumed:
            log.resumed(0)
        for step in range(1, max(4 * epochs, 2) + 1):
            log.step(epoch=(step - 1) // 4, step=step, steps=4 * planned, loss=2 / step, lr=0.125, images=8 * step, **split)
            if step % 4 == 0:
                log.epoch(epoch=step // 4, step=step, loss=2 / step, seconds=30.0 * step, lr=0.125, top1=0.25, top5=0.75)
    if held_out:
        logits = np.full((10, count), -4.0, np.float32)
        labels = np.arange(10) % 2
        logits[np.arange(10), labels] = 4.0
        logits[0, :2], logits[1, :2] = (-4.0, 0.0), (2.0, -4.0)  # two mistakes: 0 said 1, 1 said 0, the second surer
        write_held_out(folder, logits, labels, [f"val/{i}.jpg" for i in range(10)], lambda rows: [np.full((size, size, 3), 50, np.uint8)] * len(rows))
    if model:
        card = ModelCard(
            TINY, ts.Preprocess(16, 0), tuple(classes), {"data": "photos/pets", "held_out": "20 %", "recipe": recipe.to_dict()}, {"top1": 0.8}
        )
        save_model(folder / "model.safetensors", ts.build(TINY, count, 3), card)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return Page(render(write_run(tmp_path_factory.mktemp("run"))))


def test_the_first_sentences_hold_the_result(whole):
    c = ts.cost(TINY, 3)
    head = " ".join(whole.sections[""].split())
    assert "tiny on pets" in head
    assert "80.00 % of 10 held-out images right (95 % interval 49.0 to 94.3)." in head  # Wilson: 8 of 10
    assert f"tiny at 16 px ({c.macs / 1e3:.3g}k MACs, {c.params / 1e3:.3g}k parameters)" in head or f"{c.params} parameters" in head
    assert "trained for 3 epochs, 6 min 00 s at 80 images/s." in head


def test_the_page_is_whole_html_and_needs_nothing_beside_it(whole):
    assert set(whole.open) <= {"html"}
    assert not {"script", "i", "b", "link", "iframe"} & whole.tags
    assert not re.search(r"(src|href)=[\"'](?!data:|#)", whole.source)
    assert "nan" not in whole.text.lower().split()
    assert "None" not in whole.text


def test_sections_are_in_the_order_a_reader_asks(whole):
    titles = ["", "How it went", "What the network sees", "Which classes it confuses", "Its worst mistakes", "Where the time goes: 80 images/s"]
    assert list(whole.sections) == [*titles, "Notes", "Recipe, and what it was run on", "The network"]
    assert whole.source.count("<svg") == 3


def test_mistakes_are_told_with_both_names_and_the_probability(whole):
    text = " ".join(whole.sections["Its worst mistakes"].split())
    # softmax of (2, -4, -4) and of (0, -4, -4): 1 / (1 + 2 e^-6) and 1 / (1 + 2 e^-4)
    first, second = "is <script>alert('dog')</script>, said cat, 100 %", "is cat, said <script>alert('dog')</script>, 96 %"
    assert 0 <= text.index(first) < text.index(second)
    assert [i["alt"] for i in whole.images[6:]] == ["val/1.jpg", "val/0.jpg"]


def test_names_are_text_wherever_they_stand(whole):
    assert "<script>" not in whole.source
    assert "a & b $x_1$" in whole.sections["What the network sees"] + whole.sections["Which classes it confuses"]
    assert "1 image left out: <i>.jpg" in whole.sections["Notes"]


def test_pictures_decode_to_what_was_written(tmp_path, whole):
    expected = np.random.default_rng(0).integers(0, 255, (6, 16, 16, 3), dtype=np.uint8)
    assert len(whole.images) == 8
    for i, image in enumerate(whole.images):
        kind, data = image["src"].split(",")
        assert kind == "data:image/png;base64"
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
        assert np.array_equal(pixels, expected[i]) if i < 6 else (pixels == 50).all()
    page = Page(render(write_run(tmp_path, size=300, model=False)))
    for image in page.images[:6]:
        kind, data = image["src"].split(",")
        assert kind == "data:image/jpeg;base64"
        assert Image.open(io.BytesIO(base64.b64decode(data))).size == (128, 128)


def test_the_time_is_split_as_it_was_measured(whole):
    text = whole.sections["Where the time goes: 80 images/s"]
    assert "A step takes 100 ms; 30 % of it is waiting for data. It waits for its images" in text
    drawn = whole.source[whole.source.index("Where the time goes") :]
    for label in ("waiting for data 30 %, 30 ms", "forward 20 %, 20 ms", "backward 40 %, 40 ms", "optimiser 10 %, 10 ms"):
        assert f"<!-- {label} -->" in drawn


def test_the_first_window_is_no_measure_of_the_rest(tmp_path):
    write_run(tmp_path)
    (tmp_path / "log.jsonl").unlink()
    with RunLog(tmp_path) as log:
        for step in range(1, 6):
            log.step(epoch=0, step=step, steps=5, loss=1.0, lr=0.1, images=8 * step, forward_s=100.0 if step == 1 else 0.5, data_s=0.5)
            log.saved(step, "state.pt")
    page = Page(render(tmp_path))
    assert "without the first window" in page.sections["Where the time goes: 8 images/s"]


def test_the_curves_end_on_their_values_and_top_5_needs_many_classes(tmp_path, whole):
    assert {"<!-- 25.00 -->", "<!-- 0.167 -->"} <= set(re.findall("<!-- .*? -->", whole.source))
    assert "top-5" not in whole.source
    write_run(tmp_path, classes=[f"class {i}" for i in range(41)])
    assert "<!-- top-5 75.00 -->" in Page(render(tmp_path)).source


def test_the_confusion_is_a_matrix_up_to_40_classes_and_pairs_beyond(tmp_path, whole):
    assert "<!-- 8 of 10 images right, 80.00 % -->" in whole.source
    assert "<!-- most confused pairs -->" not in whole.source
    write_run(tmp_path, classes=[f"class {i}" for i in range(41)])
    said = np.eye(41)[[*range(41), 7, 7]]
    write_held_out(tmp_path, said, [*range(41), 3, 3], ["f"] * 43, lambda rows: [np.zeros((16, 16, 3), np.uint8)] * len(rows))
    page = Page(render(tmp_path))
    assert {"<!-- 41 of 43 images right, 95.35 % -->", "<!-- most confused pairs -->", "<!-- class 3 → class 7 -->"} <= set(
        re.findall("<!-- .*? -->", page.source)
    )
    assert "Most often class 3 taken for class 7: 2." in page.sections["Which classes it confuses"]


def test_recipe_and_network_are_there(whole):
    text = " ".join(whole.sections["Recipe, and what it was run on"].split())
    assert "epochs 3" in text
    assert "lr 0.125" in text
    assert "flip yes" in text
    assert "data photos/pets" in text
    assert "format" not in text
    assert "mbconv" in whole.sections["The network"].lower()


def test_while_it_runs_the_page_says_how_far_it_is(tmp_path):
    page = Page(render(write_run(tmp_path, epochs=2, planned=5, model=False, held_out=False)))
    head = " ".join(page.sections[""].split())
    assert head.startswith("tiny: training tiny: training Not finished, 2 of 5 epochs done. So far 25.00 % of the held-out images right.")
    assert "Its worst mistakes" not in page.sections
    assert NAMES[1] in page.sections["What the network sees"]  # from samples.npz: there is no model file yet


def test_accuracies_of_a_minival_are_not_called_held_out(tmp_path, whole):
    assert "<!-- held-out accuracy, % -->" in whole.source
    write_run(tmp_path, held_out=False)
    recipe = json.loads((tmp_path / "recipe.json").read_text())
    (tmp_path / "recipe.json").write_text(json.dumps(recipe | {"minival": 100}))
    page = Page(render(tmp_path))
    assert "25.00 % of the minival images right" in page.text
    assert "<!-- minival accuracy, % -->" in page.source
    assert "held-out accuracy" not in page.source


def test_before_the_first_epoch_is_over_there_is_a_page(tmp_path):
    page = Page(render(write_run(tmp_path, epochs=0, planned=5, model=False, held_out=False)))
    assert "Still in its first epoch of 5, step 2 of 20, loss 1.500." in page.text


def test_a_log_alone_makes_a_page(tmp_path):
    write_run(tmp_path, times=False, resumed=True)
    for name in ("recipe.json", "arch.json", "samples.npz", "held_out.npz", "model.safetensors"):
        (tmp_path / name).unlink()
    page = Page(render(tmp_path))
    assert "25.00 % of the held-out images right. The network trained for 3 epochs, 6 min 00 s." in page.text
    assert not any(title.startswith("Where the time goes") for title in page.sections)
    assert "Resumed after step 0, epoch 0.0." in page.sections["Notes"]


def test_a_run_of_an_older_version_has_its_page(tmp_path):
    write_run(tmp_path, held_out=False)
    for name in ("arch.json", "samples.npz"):
        (tmp_path / name).unlink()
    lines = [{"epoch": i, "loss": 1 / i, "top1": 0.25 * i, "seconds": 2.0 * i} for i in (1, 2, 3)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = Page(render(tmp_path))
    assert "75.00 % of the held-out images right. tiny at 16 px" in page.text
    assert list(page.sections) == ["", "How it went", "Recipe, and what it was run on", "The network"]


def test_accuracy_may_be_missing(tmp_path):
    with RunLog(tmp_path) as log:
        log.epoch(epoch=1, step=10, loss=0.5, seconds=7300)
    assert "training loss 0.500, held-out accuracy not measured. The network trained for 1 epoch, 2 h 01 min." in Page(render(tmp_path)).text


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("log.jsonl", "", "no step and no epoch yet"),
        ("log.jsonl", "no json\n{}\n", "line 1"),
        ("model.safetensors", "no model", "no triscale model"),
        ("recipe.json", "[]", "expected an object"),
        ("recipe.json", "{", "no JSON"),
        ("arch.json", "{}", "no Arch"),
        ("held_out.npz", "no zip", "can't be read"),
    ],
)
def test_a_damaged_file_is_one_line_that_names_it(tmp_path, name, text, told):
    write_run(tmp_path)
    if name == "arch.json":
        (tmp_path / "model.safetensors").unlink()
    (tmp_path / name).write_text(text)
    with pytest.raises(ReportError, match=told) as error:
        render(tmp_path)
    assert name in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "report.html").exists()


def test_other_folders_are_told_apart(tmp_path):
    with pytest.raises(ReportError, match="no run folder"):
        render(tmp_path)
    (tmp_path / "results.json").write_text(json.dumps({"format": 1, "kind": "evaluation"}))
    with pytest.raises(ReportError, match=r"an evaluation.*confusion\.png"):
        render(tmp_path)
    (tmp_path / "results.json").write_text(json.dumps({"format": 1, "kind": "weather"}))
    with pytest.raises(ReportError, match="weather"):
        render(tmp_path)
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(ReportError, match=r"results\.json: can't be read"):
        render(tmp_path)
    write_run(tmp_path)
    (tmp_path / "results.json").write_text(json.dumps({"kind": "evaluation"}))  # an evaluation written into a training's folder
    assert "80.00 %" in Page(render(tmp_path)).text


def test_durations_are_said_as_people_do():
    said = {0: "0 s", 59.4: "59 s", 59.6: "1 min 00 s", 221: "3 min 41 s", 3600: "1 h 00 min", 100_000: "27 h 46 min"}
    assert {s: duration(s) for s in said} == said
