"""The run folder's log and pictures: values, what a kill leaves, what a resumed run does again."""

import json
import math
import sys

import numpy as np
import pytest

from triscale.run_log import (
    EpochLine,
    LogError,
    RunLog,
    StepLine,
    StepWindow,
    read_held_out,
    read_log,
    read_samples,
    write_held_out,
    write_samples,
)


def line(step, **more):
    return StepLine(**{"epoch": 0, "step": step, "steps": 100, "loss": float(step), "lr": 0.1 * step, "images": 8, **more})


def steps(log, numbers, *, per_epoch=10, batch=8, first=0):
    """Logs these steps, with times that add up to 0.1 s; `first`: images before."""
    for i, step in enumerate(numbers, 1):
        log.step(
            epoch=(step - 1) // per_epoch, step=step, steps=100, loss=1 / step, lr=0.1, images=first + i * batch,
            data_s=0.01, forward_s=0.02, backward_s=0.04, optimiser_s=0.03,
        )  # fmt: skip


def test_a_window_ends_when_both_its_steps_and_its_seconds_are_over():
    now = [0.0]
    window = StepWindow(3, 10.0, lambda: now[0])
    ends = []
    for step in range(1, 13):
        now[0] += 1.0 if step <= 6 else 6.0  # fast, then slow
        if window.add(line(step)):
            ends.append(step)
    # Ten seconds are over with step 7 (6 + 6); from there three steps take longer than ten seconds.
    assert ends == [7, 10]


def test_a_window_holds_the_means_and_the_last_of_what_counts():
    window = StepWindow(4, 0.0)
    times = {"data_s": 0.1, "forward_s": 0.2, "backward_s": 0.4, "optimiser_s": 0.3}
    rows = [line(i, images=8 if i < 4 else 4, **{k: v * i for k, v in times.items()}) for i in range(1, 5)]
    assert [window.add(r) for r in rows[:3]] == [None] * 3
    found = window.add(rows[3])
    assert (found.step, found.lr, found.window, found.images) == (4, 0.4, 4, 28)
    assert found.loss == pytest.approx(2.5)
    assert [found.data_s, found.forward_s, found.backward_s, found.optimiser_s] == pytest.approx([0.25, 0.5, 1.0, 0.75])
    assert found.seconds == pytest.approx(10.0)
    assert window.flush() is None


def test_a_log_is_read_as_it_was_written(tmp_path):
    with RunLog(tmp_path / "deep" / "run") as log:
        log.note("2 images left out")
        steps(log, range(1, 11))
        log.epoch(epoch=1, step=10, loss=0.29, seconds=1.5, lr=0.1, top1=1 / 3, top5=0.9)
        log.saved(10, tmp_path / "deep" / "run" / "state-10.pt")
        steps(log, range(11, 14), first=80)
    found = read_log(tmp_path / "deep" / "run")
    # No ten seconds have gone by: a line ends with the epoch, and with the run.
    assert [(s.step, s.window, s.images, s.epoch) for s in found.steps] == [(10, 10, 80, 0), (13, 3, 24, 1)]
    assert found.steps[0].loss == pytest.approx(sum(1 / i for i in range(1, 11)) / 10, rel=1e-6)
    assert found.steps[1].seconds == pytest.approx(0.3)
    assert found.epochs == (EpochLine(1, 0.29, 1.5, 10, 1 / 3, 0.9, 0.1),)
    assert found.saved == ((10, "state-10.pt"),)
    assert found.notes == ("2 images left out",)
    assert found.resumed == ()
    kinds = [json.loads(text)["kind"] for text in (tmp_path / "deep" / "run" / "log.jsonl").read_text().splitlines()]
    assert kinds == ["note", "step", "epoch", "saved", "step"]


def test_each_line_is_there_before_the_call_returns(tmp_path):
    log = RunLog(tmp_path)
    log.note("a")
    assert read_log(tmp_path).notes == ("a",)
    steps(log, [1])
    log.saved(1, "state-1.pt")
    assert [s.step for s in read_log(tmp_path).steps] == [1]
    log.close()
    log.close()


def test_a_window_covers_a_hundredth_of_an_epoch_at_least(tmp_path):
    with RunLog(tmp_path, steps_per_epoch=500) as log:
        log._window.seconds = 0.0
        steps(log, range(1, 12), per_epoch=500)
    assert [s.step for s in read_log(tmp_path).steps] == [5, 10, 11]


def test_a_resumed_run_takes_the_place_of_what_the_killed_one_did_after_its_state(tmp_path):
    with RunLog(tmp_path) as log:
        log.note("left out: a.jpg")
        steps(log, range(1, 11))
        log.epoch(epoch=1, step=10, loss=0.5, seconds=1, top1=0.5)
        log.saved(10, "state-10.pt")
        steps(log, range(11, 21), first=80)
        log.epoch(epoch=2, step=20, loss=0.4, seconds=2, top1=0.6)
        log.saved(20, "state-20.pt")
    with RunLog(tmp_path) as log:
        log.resumed(10)
        log.note("left out: a.jpg")
        log.note("on another machine")
        steps(log, range(11, 16))
        log.saved(15, "state-15.pt")
        steps(log, range(16, 21), first=40)
        log.epoch(epoch=2, step=20, loss=0.3, seconds=3, top1=0.7)
    found = read_log(tmp_path)
    assert [s.step for s in found.steps] == [10, 15, 20]
    assert [(e.epoch, e.loss) for e in found.epochs] == [(1, 0.5), (2, 0.3)]
    assert found.saved == ((10, "state-10.pt"), (15, "state-15.pt"))
    assert found.resumed == (10,)
    assert found.notes == ("left out: a.jpg", "on another machine")


def test_without_a_mark_the_later_line_of_a_step_wins_and_steps_are_in_order(tmp_path):
    rows = [line(5, loss=1.0), line(10, loss=2.0), line(3, loss=3.0), line(10, loss=4.0)]
    text = "".join(json.dumps({"kind": "step", **vars(r)}) + "\n" for r in rows)
    (tmp_path / "log.jsonl").write_text(text)
    assert [(s.step, s.loss) for s in read_log(tmp_path).steps] == [(3, 3.0), (5, 1.0), (10, 4.0)]


@pytest.mark.parametrize("cut", range(1, 12, 2))
def test_a_last_line_that_a_kill_cut_is_left_out_and_mended(tmp_path, cut):
    with RunLog(tmp_path) as log:
        steps(log, range(1, 11))
        log.epoch(epoch=1, step=10, loss=0.5, seconds=1, top1=0.5)
    path = tmp_path / "log.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    # Without its end of line alone the line is whole.
    assert len(read_log(tmp_path).epochs) == (1 if cut == 1 else 0)
    with RunLog(tmp_path) as log:
        log.resumed(10)
    for text in path.read_text().splitlines():
        json.loads(text)
    assert [s.step for s in read_log(tmp_path).steps] == [10]
    assert read_log(tmp_path).resumed == (10,)


def test_lines_of_older_versions_and_of_later_ones_are_read(tmp_path):
    rows = [{"epoch": 1, "loss": 2.0, "top1": 0.25, "seconds": 3.5}, {"epoch": 2, "loss": 1.5, "top1": 0.5, "seconds": 7}, {"kind": "weather"}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    found = read_log(tmp_path)
    assert [(e.epoch, e.loss, e.top1, e.seconds, e.step) for e in found.epochs] == [(1, 2.0, 0.25, 3.5, None), (2, 1.5, 0.5, 7, None)]


@pytest.mark.parametrize("text", ["no json", "[1]", '{"kind": "step", "step": 1}', '{"epoch": "1", "loss": 1, "seconds": 1}', '{"kind": "resumed"}'])
def test_a_line_in_the_middle_that_is_none_is_an_error_that_names_it(tmp_path, text):
    (tmp_path / "log.jsonl").write_text(f'{{"kind": "note", "text": "a"}}\n{text}\n{{"kind": "note", "text": "b"}}\n')
    with pytest.raises(LogError, match=r"log\.jsonl: line 2 ") as error:
        read_log(tmp_path)
    assert "\n" not in str(error.value)


def test_a_missing_log_is_named(tmp_path):
    with pytest.raises(LogError, match=r"log\.jsonl: No such file"):
        read_log(tmp_path)


def test_what_is_not_finite_is_null_in_the_file_and_nan_when_read(tmp_path):
    with RunLog(tmp_path) as log:
        log.epoch(epoch=1, step=1, loss=math.nan, seconds=1.0, top1=math.nan)
    assert "NaN" not in (tmp_path / "log.jsonl").read_text()
    found = read_log(tmp_path).epochs[0]
    assert math.isnan(found.loss)
    assert found.top1 is None


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/dev/full is Linux's")
def test_a_full_disk_is_told_as_it_comes(tmp_path):
    (tmp_path / "log.jsonl").symlink_to("/dev/full")

    def run():
        with RunLog(tmp_path) as log:
            steps(log, [1, 2])
            log.epoch(epoch=1, step=2, loss=1.0, seconds=1.0)

    with pytest.raises(OSError, match="No space left"):
        run()


def scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder))
    found.Reload()
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_tensorboard_gets_the_same_values_at_the_same_steps(tmp_path):
    pytest.importorskip("tensorboard")
    with RunLog(tmp_path, tensorboard=True) as log:
        steps(log, range(1, 11))
        log.epoch(epoch=1, step=10, loss=0.29, seconds=1.5, top1=0.25, top5=0.75)
        steps(log, range(11, 21), first=80)
        log.epoch(epoch=2, step=20, loss=0.2, seconds=3, top1=0.5)
    found, lines = scalars(tmp_path / "tensorboard"), read_log(tmp_path).steps
    assert set(found) == {
        "train/loss", "train/lr", "train/images_per_s", "split/data", "split/forward", "split/backward", "split/optimiser",
        "held_out/top1", "held_out/top5",
    }  # fmt: skip
    assert [step for step, _ in found["train/loss"]] == [10, 20]
    assert [v for _, v in found["train/loss"]] == pytest.approx([s.loss for s in lines], rel=1e-6)
    assert [v for _, v in found["train/lr"]] == pytest.approx([0.1, 0.1])
    assert [v for _, v in found["train/images_per_s"]] == pytest.approx([80, 80])
    shares = [found[f"split/{name}"][0][1] for name in ("data", "forward", "backward", "optimiser")]
    assert shares == pytest.approx([0.1, 0.2, 0.4, 0.3])
    assert found["held_out/top1"] == [(10, 0.25), (20, 0.5)]
    assert found["held_out/top5"] == [(10, 0.75)]


def test_tensorboard_forgets_what_a_resumed_run_does_again(tmp_path):
    pytest.importorskip("tensorboard")
    for resumed, value in ((False, 0.25), (True, 0.5)):
        with RunLog(tmp_path, tensorboard=True) as log:
            if resumed:
                log.resumed(10)
            else:
                log.epoch(epoch=1, step=10, loss=1.0, seconds=1.0, top1=0.125)
            log.epoch(epoch=2, step=20, loss=1.0, seconds=1.0, top1=value)
    assert scalars(tmp_path / "tensorboard")["held_out/top1"] == [(10, 0.125), (20, 0.5)]


def test_a_missing_tensorboard_is_one_line_with_the_remedy_and_nothing_is_left(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match=r"pip install 'triscale\[logging\]'"):
        RunLog(tmp_path / "run", tensorboard=True)
    assert not (tmp_path / "run").exists()


def test_samples_round_trip_and_other_shapes_are_refused(tmp_path):
    images = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    assert read_samples(tmp_path) is None
    write_samples(tmp_path, images, [1, 0], ("Katze", "犬"))
    found = read_samples(tmp_path)
    assert np.array_equal(found.images, images)
    assert found.labels.tolist() == [1, 0]
    assert found.classes == ("Katze", "犬")
    write_samples(tmp_path, images[..., :1], np.array([1, 0]))
    assert read_samples(tmp_path).classes == ()
    for bad, labels in ((images.astype(float), [0, 1]), (images, [0]), (images.transpose(0, 3, 1, 2), [0, 1])):
        with pytest.raises(ValueError, match="samples: expected"):
            write_samples(tmp_path, bad, labels)
    assert [p.name for p in tmp_path.iterdir()] == ["samples.npz"]


def picture(size=(40, 40)):
    return np.full((*size, 3), 7, np.uint8)


def test_held_out_keeps_the_five_best_and_the_worst_mistakes(tmp_path):
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(0, 3, (200, 7)), rng.integers(0, 7, 200)
    logits[5] = np.nan
    asked = []
    assert read_held_out(tmp_path) is None
    write_held_out(tmp_path, logits, labels, [f"é{i}.jpg" for i in range(200)], lambda rows: asked.append(rows) or [picture()] * len(rows))
    found = read_held_out(tmp_path)
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    good = [i for i in range(200) if i != 5]
    assert np.array_equal(found.top[good], np.argsort(-logits[good], 1)[:, :5])
    assert np.allclose(found.probability[good], -np.sort(-p[good], 1)[:, :5], atol=1e-6)
    assert found.probability.dtype == np.float32
    assert found.top[5].tolist() == [-1] * 5
    assert found.probability[5].tolist() == [0] * 5
    assert found.names[3] == "é3.jpg"
    wrong = sorted((i for i in good if logits[i].argmax() != labels[i]), key=lambda i: -p[i].max())
    assert asked == [wrong[:24]]
    assert found.thumbnail_of.tolist() == wrong[:24]
    assert found.thumbnails.shape == (24, 80, 80, 3)  # 40 pixels in whole steps


def test_two_classes_and_no_mistake(tmp_path):
    write_held_out(tmp_path, np.array([[1.0, 0.0], [0.0, 1.0]], np.float32), [0, 1], ["a", "b"], lambda rows: pytest.fail("no picture is needed"))
    found = read_held_out(tmp_path)
    assert found.top.tolist() == [[0, 1, -1, -1, -1], [1, 0, -1, -1, -1]]
    assert found.probability[0] == pytest.approx([0.7310586, 0.2689414, 0, 0, 0])
    assert found.thumbnails.shape[0] == 0


@pytest.mark.parametrize(("size", "side"), [(1, 96), (16, 96), (32, 96), (40, 80), (50, 96), (64, 64), (96, 96), (224, 96)])
def test_pictures_of_mistakes_are_64_to_96_pixels(tmp_path, size, side):
    write_held_out(tmp_path, np.eye(2), [1, 0], ["a", "b"], lambda rows: [picture((size, size))] * len(rows))
    found = read_held_out(tmp_path).thumbnails
    assert found.shape == (2, side, side, 3)
    assert np.unique(found).tolist() == [7]


def test_pictures_of_any_shape_are_kept_whole_on_white(tmp_path):
    pictures = [picture((50, 100)), np.full((96, 96, 1), 7, np.uint8)]
    write_held_out(tmp_path, np.eye(2), [1, 0], ["a", "b"], lambda rows: pictures)
    wide, grey = read_held_out(tmp_path).thumbnails
    assert (wide == 7).all(2).sum() == 48 * 96
    assert (wide == 255).all(2).sum() == 48 * 96
    assert (grey == 7).all()


def test_held_out_of_other_shapes_is_refused_and_a_damaged_file_named(tmp_path):
    for logits, labels, names in ((np.eye(2)[0], [0, 1], "ab"), (np.eye(2), [0], "ab"), (np.eye(2), [0, 1], "a")):
        with pytest.raises(ValueError, match="held-out: expected"):
            write_held_out(tmp_path, logits, labels, names, lambda rows: [])
    write_held_out(tmp_path, np.eye(2), [0, 1], "ab", lambda rows: [])
    path = tmp_path / "held_out.npz"
    data = path.read_bytes()
    for damaged in (data[:-30], data[:100], b"", b"no zip"):
        path.write_bytes(damaged)
        with pytest.raises(LogError, match=r"held_out\.npz: can't be read") as error:
            read_held_out(tmp_path)
        assert "\n" not in str(error.value)
    np.savez(path, labels=np.zeros(2))
    with pytest.raises(LogError, match="missing: top"):
        read_held_out(tmp_path)
    write_held_out(tmp_path, np.eye(2), [1, 0], "ab", lambda rows: [picture()] * 2)
    arrays = vars(read_held_out(tmp_path))
    for name, value in (("names", ["a"]), ("thumbnail_of", [0, 2]), ("top", np.zeros((2, 4), int))):
        np.savez(path, **(arrays | {name: value}))
        with pytest.raises(LogError, match="don't go together"):
            read_held_out(tmp_path)
