"""Boxes from COCO and VOC files, good and bad; pictures and boxes that stay together through every move."""

import copy
import json
import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from triscale.data.decode import BadImage
from triscale.data.sources import DataError
from triscale.detect import coco_json, geometry
from triscale.detect.coco import read_coco
from triscale.detect.geometry import Frame, back, draw_numbers, evaluation_frame, into, mirrored, pixels, train_frame
from triscale.detect.views import collate, evaluation_view, normalised, train_view
from triscale.detect.voc import convert_voc
from triscale.recipe import Preprocess

WIDTH, HEIGHT = 64, 48

GOOD = {
    "images": [{"id": i, "file_name": f"{i}.png", "width": WIDTH, "height": HEIGHT} for i in (12, 5, 9)],
    "annotations": [
        {"id": 40, "image_id": 9, "category_id": 90, "bbox": [10, 5, 20, 10], "area": 150, "iscrowd": 0},
        {"id": 7, "image_id": 5, "category_id": 3, "bbox": [0.5, 1.5, 10, 20], "area": 200, "iscrowd": 0},
        {"id": 8, "image_id": 9, "category_id": 3, "bbox": [1, 2, 30, 40], "iscrowd": 1},
        {"id": 6, "image_id": 9, "category_id": 17, "bbox": [2, 2, 4, 4]},
    ],
    "categories": [{"id": 90, "name": "cup"}, {"id": 3, "name": "cat"}, {"id": 17, "name": "dog"}],
}


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in (5, 9, 12):
        Image.new("RGB", (WIDTH, HEIGHT), (i, 0, 0)).save(folder / f"{i}.png")
    return folder


def read(root, content, **options):
    path = root.parent / "boxes.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return read_coco(path, root, **options)


def changed(table, row, **values):
    """GOOD with a row's entries replaced (None: removed), or, for row None, with one row more."""
    out = copy.deepcopy(GOOD)
    if row is None:
        out[table].append(values)
        return out
    out[table][row].update(values)
    out[table][row] = {k: v for k, v in out[table][row].items() if v is not None}
    return out


def test_a_good_file_is_read_by_ids(root):
    data = read(root, GOOD)
    assert [e.id for e in data.images] == [5, 9, 12]
    assert (data.classes, data.category_ids) == (("cat", "dog", "cup"), (3, 17, 90))
    boxes, labels = data.targets(1)
    assert boxes.tolist() == [[2, 2, 6, 6], [10, 5, 30, 15]]
    assert labels.tolist() == [1, 2]
    assert data.crowds(1).tolist() == [[1, 2, 31, 42]]
    assert data.targets(0)[0].tolist() == [[0.5, 1.5, 10.5, 21.5]]
    assert data.targets(2)[0].shape == (0, 4)
    assert (data.boxes.dtype, data.labels.dtype) == (np.float32, np.int64)
    assert data.areas.tolist() == [200, 16, 1200, 150]
    assert (data.counts().tolist(), data.with_boxes().tolist()) == ([1, 1, 1], [0, 1])
    assert data.notes == ("boxes.json: 1 of 3 images without boxes (id 12): all background",)
    assert data.left_out == ()
    assert data.image(2)[0, 0].tolist() == [12, 0, 0]


def test_the_order_in_the_file_is_of_no_matter(root):
    other = {name: rows[::-1] for name, rows in GOOD.items()}
    one, two = read(root, GOOD), read(root, other)
    assert one.images == two.images
    assert one.ids.tolist() == two.ids.tolist() == [7, 6, 8, 40]
    assert one.boxes.tolist() == two.boxes.tolist()
    assert one.classes == two.classes


def test_what_is_read_can_be_written_for_the_evaluation(root):
    truth = read(root, GOOD).to_coco()
    assert {a["id"]: a["bbox"] for a in truth["annotations"]} == {a["id"]: a["bbox"] for a in GOOD["annotations"]}
    assert {a["id"]: (a["image_id"], a["category_id"], a["iscrowd"]) for a in truth["annotations"]}[8] == (9, 3, 1)
    assert truth["categories"][2] == {"id": 90, "name": "cup"}
    again = read(root, truth)
    assert again.boxes.tolist() == read(root, GOOD).boxes.tolist()
    assert again.areas.tolist() == [200, 16, 1200, 150]
    from_0 = read(root, changed("annotations", 0, id=0)).to_coco()
    assert [a["id"] for a in from_0["annotations"]] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "no JSON file that can be read"),
        ('{"images": [1e999, NaN]}', "NaN is no number of JSON"),
        ("[" * 100_000, "no JSON file that can be read"),
        ("[]", "found a list; a list of results"),
        ("3", "found a number"),
        ('{"images": [], "categories": []}', "found no annotations"),
        ('{"images": {}, "annotations": [], "categories": []}', "found images: an object"),
        ({**GOOD, "annotations": [[]]}, "annotations[0]: expected an object, found a list"),
        ({**GOOD, "images": []}, "no images in it"),
        ({**GOOD, "categories": []}, "expected 1 to 10000 categories, found 0"),
        (changed("images", None, id=5, file_name="x.png"), "image id 5 stands there more than once"),
        (changed("annotations", None, **GOOD["annotations"][0]), "annotation id 40 stands there more than once"),
        (changed("categories", 1, id=90), "category id 90 stands there more than once"),
        (changed("categories", 0, name="cat"), "categories 3, 90 share a name"),
        (changed("categories", 0, name=" "), "category 90: expected a name"),
        (changed("images", 0, id="12"), "images[0]: expected id, a whole number, found '12'"),
        (changed("images", 0, id=True), "expected id, a whole number, found True"),
        (changed("images", 0, id=1 << 60), "expected id, a whole number"),
        (changed("images", 0, file_name="../12.png"), "image 12: expected file_name, a path inside"),
        (changed("images", 0, file_name="/etc/passwd"), "image 12: expected file_name, a path inside"),
        (changed("images", 0, file_name="a\0.png"), "image 12: expected file_name, a path inside"),
        (changed("images", 0, file_name=None), "found none"),
        (changed("images", 0, width=0), "image 12: expected whole numbers above 0"),
        (changed("images", 0, width=64.5), "found 64.5 and 48"),
        (changed("annotations", 0, image_id=None), "annotation 40: expected image_id, a whole number, found none"),
        (changed("annotations", 0, category_id=4), "annotation 40: category_id isn't among categories (3, 17, 90)"),
        (changed("annotations", 0, bbox=[1, 2, 3]), "annotation 40: expected bbox, four finite numbers"),
        (changed("annotations", 0, bbox=[1, 2, 3, "4"]), "annotation 40: expected bbox"),
        (changed("annotations", 0, bbox=[1, 2, 3, 10**400]), "annotation 40: expected bbox"),
        (json.dumps(changed("annotations", 0, bbox=[1, 2, 3, 4.25])).replace("4.25", "1e999"), "annotation 40: expected bbox"),
        (changed("annotations", 0, bbox=None), "annotation 40: expected bbox"),
        (changed("annotations", 0, iscrowd=2), "annotation 40: expected iscrowd 0 or 1, found 2"),
        ({**GOOD, "images": [{**GOOD["images"][0], "id": 1}]}, "all 4 annotations are of images that aren't in its list (annotations 6, 7, 8, 40)"),
    ],
)  # fmt: skip
def test_what_contradicts_itself_is_an_error_of_one_line(root, content, told):
    with pytest.raises(DataError) as error:
        read(root, content)
    assert told in str(error.value)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(str(root.parent / "boxes.json"))


def test_many_of_one_kind_are_one_message_with_the_first_ids(root):
    bad = {**GOOD, "annotations": [{**GOOD["annotations"][0], "id": i, "category_id": 1000} for i in range(100, 120)]}
    with pytest.raises(DataError, match=r"annotations 100, 101, 102, 103, 104 and 15 more: category_id"):
        read(root, bad)


def test_files_that_are_too_large_or_not_there(root, monkeypatch):
    with pytest.raises(DataError, match="cannot be read"):
        read_coco(root.parent / "no.json", root)
    with pytest.raises(DataError, match=r"no such folder; expected the folder of the images of boxes.json"):
        read_coco(root.parent / "boxes.json", root / "deeper")
    read(root, GOOD)
    with pytest.raises(DataError, match="more than the limit of 100"):
        coco_json.read_tables(root.parent / "boxes.json", 100)
    monkeypatch.setattr("triscale.detect.coco.MOST_BOXES", 2)
    with pytest.raises(DataError, match="image 9: more than 2 boxes in one"):
        read(root, GOOD)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (changed("annotations", 0, bbox=[10, 5, 0, 10]), "1 annotation dropped: boxes without area (id 40)"),
        (changed("annotations", 0, bbox=[10, 5, 10, -1]), "1 annotation dropped: boxes without area (id 40)"),
        (changed("annotations", 0, bbox=[64, 5, 10, 10]), "1 annotation dropped: boxes outside their images (id 40)"),
        (changed("annotations", 0, bbox=[-20, 5, 20, 10]), "1 annotation dropped: boxes outside their images (id 40)"),
        (changed("annotations", 0, image_id=77), "1 annotation dropped: their images aren't in the list (id 40)"),
    ],
)
def test_boxes_without_a_place_are_dropped_and_counted(root, content, told):
    data = read(root, content)
    assert f"boxes.json: {told}" in data.notes
    assert data.ids.tolist() == [7, 6, 8]
    assert "boxes.json: 1 of 3 classes without an example: cup" in data.notes
    assert data.counts().tolist() == [1, 1, 0]


def test_boxes_across_the_edge_are_cut_and_counted(root):
    data = read(root, changed("annotations", 0, bbox=[-4, 40, 1000, 20]))
    assert data.targets(1)[0][1].tolist() == [0, 40, 64, 48]
    assert data.given[3].tolist() == [-4, 40, 1000, 20]
    assert "boxes.json: 1 annotation cut at the edge of their images (id 40)" in data.notes


def test_an_area_that_is_no_number_is_counted(root):
    data = read(root, changed("annotations", 0, area=-5))
    assert data.areas.tolist() == [200, 16, 1200, 200]
    assert any("area is no number" in note and "(id 40)" in note for note in data.notes)


def test_images_that_cannot_be_used_are_left_out_with_their_boxes(root):
    (root / "12.png").unlink()
    (root / "5.png").write_bytes(b"no image")
    data = read(root, GOOD)
    assert [e.id for e in data.images] == [9]
    assert data.ids.tolist() == [6, 8, 40]
    assert data.left_out == ("image 5, 5.png: not an image that can be read", "image 12, 12.png: no such file")
    assert data.notes[0].startswith("boxes.json: 2 of 3 images left out with their boxes; the first: image 5, 5.png")
    (root / "9.png").unlink()
    with pytest.raises(DataError, match=r"none of its 3 images can be used under .*; the first: image 5, 5.png"):
        read(root, GOOD)


def test_a_pipe_is_no_image(root):
    (root / "12.png").unlink()
    os.mkfifo(root / "12.png")
    assert read(root, GOOD).left_out == ("image 12, 12.png: not a file",)


def test_sizes_that_disagree_with_the_file(root):
    Image.new("RGB", (60, 50)).save(root / "5.png")
    turned, plain = Image.Exif(), Image.new("RGB", (WIDTH, HEIGHT))
    turned[0x0112] = 6
    plain.save(root / "12.png", exif=turned)
    data = read(root, GOOD)
    assert data.left_out[0] == "image 5, 5.png: 64x48 in the JSON, 60x50 in the file; its boxes may be wrong"
    assert data.left_out[1].startswith("image 12, 12.png: 64x48 in the JSON is the size before its EXIF orientation")
    upright = copy.deepcopy(GOOD)
    upright["images"][0] |= {"width": HEIGHT, "height": WIDTH}
    data = read(root, upright)
    assert data.images[1] == (12, "12.png", WIDTH, HEIGHT)
    assert data.image(1).shape == (WIDTH, HEIGHT, 3)


def test_sizes_that_are_not_told_come_from_the_files(root):
    without = {**GOOD, "images": [{"id": r["id"], "file_name": r["file_name"]} for r in GOOD["images"]]}
    assert read(root, without).images == read(root, GOOD).images
    with pytest.raises(DataError, match="images 5, 9, 12: expected width and height, found neither"):
        read(root, without, check_files=False)


def test_unchecked_files_show_when_they_are_read(root):
    (root / "12.png").unlink()
    Image.new("RGB", (60, 50)).save(root / "5.png")
    data = read(root, GOOD, check_files=False)
    assert len(data) == 3
    with pytest.raises(BadImage, match="cannot be opened"):
        data.image(2)
    with pytest.raises(BadImage, match=r"5.png: expected 64x48 pixels, found 60x50"):
        evaluation_view(data, 0, 32)


def test_two_images_of_one_file_are_told(root):
    data = read(root, changed("images", 0, file_name="9.png"))
    assert "boxes.json: 2 images share their files with others (ids 9, 12)" in data.notes


@pytest.mark.parametrize(
    ("split", "images", "boxes", "classes"),
    [("train", 205, 2804, (2381, 214, 209)), ("val", 87, 1137, (967, 87, 83)), ("test", 72, 945, (805, 71, 69))],
)
def test_bccd_has_the_counts_of_its_table(shared, split, images, boxes, classes):
    folder = shared / "data" / "bccd"
    data = read_coco(folder / "annotations" / f"instances_{split}.json", folder / "images")
    assert (len(data), len(data.boxes), tuple(data.counts().tolist())) == (images, boxes, classes)
    assert data.classes == ("RBC", "WBC", "Platelets")
    assert data.left_out == ()
    assert (data.boxes[:, 2:] > data.boxes[:, :2]).all()
    assert data.boxes[:, 2:].max(0).tolist() == [640, 480]


# --- geometry

numbers_01 = st.floats(0, 1, exclude_max=True)
tries = st.lists(st.tuples(numbers_01, numbers_01, numbers_01, numbers_01), min_size=1, max_size=3).map(np.array)
shapes = st.tuples(st.integers(30, 150), st.integers(30, 150))


@st.composite
def drawn(draw):
    """A grey picture with a box of green in it, and the box."""
    height, width = draw(shapes)
    x1, y1 = draw(st.integers(0, width - 12)), draw(st.integers(0, height - 12))
    x2, y2 = draw(st.integers(x1 + 12, width)), draw(st.integers(y1 + 12, height))
    image = np.full((height, width, 3), 200, np.uint8)
    image[y1:y2, x1:x2] = (20, 220, 60)
    return image, np.array([[x1, y1, x2, y2]], np.float32)


def check_on_its_pixels(square, box, frame):
    """The square is green where the box is, and nowhere else in the picture, but for a blurred pixel at its edge; beyond is padding."""
    high, wide = frame.content
    x1, y1, x2, y2 = box.tolist()
    rows, columns = np.arange(frame.size) + 0.5, np.arange(frame.size) + 0.5
    blur = 1 + max(1, *frame.scale, *(1 / s for s in frame.scale))

    def covered(margin):
        return ((rows > y1 - margin) & (rows < y2 + margin))[:, None] & ((columns > x1 - margin) & (columns < x2 + margin))

    within, content = covered(-blur), (np.arange(frame.size) < high)[:, None] & (np.arange(frame.size) < wide)
    if within.any():
        assert np.abs(square[within].astype(int) - (20, 220, 60)).max() <= 2
    outside = content & ~covered(blur)
    if outside.any():
        assert np.abs(square[outside].astype(int) - 200).max() <= 2
    assert (square[~content] == geometry.FILL).all()
    # To a fraction of a pixel: as much green as the box has area, and its centre of gravity. A sampled ramp errs by an eighth an edge.
    amount = ((200 - square[..., 0].astype(float)) / 180) * content
    if min(x2 - x1, y2 - y1) > 2 * blur:
        assert amount.sum() == pytest.approx((x2 - x1) * (y2 - y1), abs=0.25 * ((x2 - x1) + (y2 - y1)))
        centre = [(amount.sum(0) * columns).sum() / amount.sum(), (amount.sum(1) * rows).sum() / amount.sum()]
        assert centre == pytest.approx([(x1 + x2) / 2, (y1 + y2) / 2], abs=0.25)


@settings(max_examples=150, deadline=None)
@given(drawn(), tries, st.integers(32, 160))
def test_a_box_stays_on_its_pixels_in_training(picture, numbers, size):
    image, boxes = picture
    frame = train_frame(image.shape[:2], boxes, size, numbers)
    placed, kept = into(boxes, frame)
    assert kept.tolist() == [0]
    assert 0.8 * size - 1 <= max(frame.tall, frame.wide) <= 1.2 * size
    high, wide = frame.content
    assert (placed >= 0).all()
    assert (placed <= (wide, high) * 2).all()
    check_on_its_pixels(pixels(image, frame), placed[0], frame)


@settings(max_examples=100, deadline=None)
@given(drawn(), st.integers(32, 160))
def test_a_box_stays_on_its_pixels_in_evaluation_and_comes_back(picture, size):
    image, boxes = picture
    frame = evaluation_frame(image.shape[:2], size)
    assert max(frame.content) == size
    placed, _ = into(boxes, frame)
    check_on_its_pixels(pixels(image, frame), placed[0], frame)
    assert back(placed, frame) == pytest.approx(boxes, abs=1e-3)


@settings(max_examples=200, deadline=None)
@given(shapes, tries, st.integers(16, 200), st.lists(st.tuples(*[st.floats(0, 1)] * 4), max_size=5))
def test_boxes_come_back_from_training_but_for_what_was_cropped(shape, numbers, size, corners):
    height, width = shape
    boxes = np.array([[*sorted((a * width, b * width)), *sorted((c * height, d * height))] for a, b, c, d in corners], np.float32).reshape(-1, 4)
    boxes = boxes[:, [0, 2, 1, 3]]
    boxes = boxes[(boxes[:, 2:] > boxes[:, :2] + 0.01).all(1)]
    frame = train_frame(shape, boxes, size, numbers)
    placed, kept = into(boxes, frame)
    assert bool(len(kept)) == bool(len(boxes))
    high, wide = frame.content
    window = np.array([frame.left, frame.top, frame.left + wide, frame.top + high]) / np.tile(frame.scale, 2)
    seen = np.concatenate([np.maximum(boxes[:, :2], window[:2]), np.minimum(boxes[:, 2:], window[2:])], 1)
    assert back(placed, frame) == pytest.approx(seen[kept], abs=1e-2)
    lost = np.setdiff1d(np.arange(len(boxes)), kept)
    assert ((seen[lost, 2:] - seen[lost, :2]).min(1) <= 1e-3).all()


@given(st.lists(st.tuples(*[st.integers(0, 100)] * 4), max_size=5), st.integers(100, 300))
def test_mirroring_twice_is_nothing(corners, width):
    boxes = np.array(corners, np.float64).reshape(-1, 4)
    assert mirrored(mirrored(boxes, width), width).tolist() == boxes.tolist()
    frame = Frame(40, width, 400, 40, width, mirrored=True)
    image = np.random.default_rng(0).integers(0, 256, (40, width, 3), np.uint8)
    assert (pixels(pixels(image, frame)[:40, :width], frame)[:40, :width] == image).all()


def test_mirroring_and_scaling_by_hand():
    frame = Frame(50, 100, 160, 100, 200, top=0, left=30, mirrored=True)  # doubled, 160 of its 200 columns kept, from 30 on
    placed, kept = into(np.array([[20, 10, 40, 30], [0, 0, 15, 50], [90, 0, 100, 10]], np.float32), frame)
    assert placed.tolist() == [[110, 20, 150, 60], [0, 0, 10, 20]]  # 40..80 - 30 = 10..50 -> 110..150; 150..160 -> 0..10, the rest beyond
    assert kept.tolist() == [0, 2]
    assert back(placed, frame).tolist() == [[20, 10, 40, 30], [90, 0, 95, 10]]


@pytest.mark.parametrize(
    ("shape", "size", "expected"),
    [
        ((480, 640), 896, (672, 896)),
        ((640, 427), 896, (896, 598)),
        ((1, 5000), 64, (1, 64)),
        ((333, 500), 320, (213, 320)),
        ((7, 7), 320, (320, 320)),
    ],
)
def test_the_longer_side_is_fitted_with_mmcv_s_rounding(shape, size, expected):
    frame = evaluation_frame(shape, size)
    assert (frame.tall, frame.wide) == expected


def test_ratios_and_offsets_cover_their_ranges():
    boxes, frames = np.array([[0, 0, 640, 640]], np.float32), []
    for number in range(2000):
        frames.append(train_frame((640, 640), boxes, 100, draw_numbers(3, 1, number)))
    sides, mirrors = np.array([f.tall for f in frames]), np.mean([f.mirrored for f in frames])
    assert (sides.min(), sides.max()) == (80, 119)  # int(S x ratio), ratio below 1.2, as in mmdetection
    assert sides.mean() == pytest.approx(99.5, abs=1)
    assert mirrors == pytest.approx(0.5, abs=0.05)
    wide = [f for f in frames if f.tall == 110]
    assert {f.left for f in wide} | {f.top for f in wide} == set(range(11))
    assert all(f.left == f.top == 0 for f in frames if f.tall <= 100)


def test_a_crop_without_boxes_is_drawn_anew_and_at_last_not_cropped():
    shape, corner = (100, 100), np.array([[0, 0, 3, 3]], np.float32)
    far, near = (0.999, 0.999, 0.999, 0.7), (0.999, 0.0, 0.0, 0.7)
    lost = Frame(100, 100, 100, 119, 119, 19, 19, False)
    assert len(into(corner, lost)[1]) == 0
    assert train_frame(shape, corner, 100, np.array([far, near])) == lost._replace(top=0, left=0)
    assert train_frame(shape, corner, 100, np.array([far, far])) == evaluation_frame(shape, 100)
    assert train_frame(shape, corner[:0], 100, np.array([far, near])) == lost  # an empty picture has nothing to lose
    assert train_frame(shape, corner, 100, np.array([(0.999, 0.999, 0.999, 0.2)])).mirrored is True


def test_pillow_and_opencv_agree_where_a_picture_grows():
    cv2 = pytest.importorskip("cv2")
    image = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    frame = evaluation_frame(image.shape[:2], 90)
    other = cv2.resize(image, (frame.wide, frame.tall), interpolation=cv2.INTER_LINEAR)
    assert np.abs(pixels(image, frame)[: frame.tall, : frame.wide].astype(int) - other).max() <= 2


def test_impossible_frames_are_refused():
    for size in (0, 1 << 14):
        with pytest.raises(ValueError, match="expected a side from 1 to 8192"):
            evaluation_frame((4, 4), size)
    with pytest.raises(ValueError, match="expected ratios"):
        train_frame((4, 4), np.zeros((0, 4)), 32, draw_numbers(0, 0, 0), (1.2, 0.8))
    with pytest.raises(ValueError, match="expected a picture of 4 x 4, found 5 x 4"):
        pixels(np.zeros((5, 4, 3), np.uint8), evaluation_frame((4, 4), 8))


# --- views


def test_a_view_depends_on_seed_epoch_and_number_alone(shared):
    folder = shared / "data" / "bccd"
    data = read_coco(folder / "annotations" / "instances_val.json", folder / "images", check_files=False)

    def views(numbers, seed=1, epoch=0):
        return {n: train_view(data, n, 96, seed=seed, epoch=epoch) for n in numbers}

    forward, backward = views([0, 1, 2, 3]), views([3, 2, 1, 0])
    for n, view in forward.items():
        assert view.frame == backward[n].frame
        assert (view.image == backward[n].image).all()
        assert (view.boxes == backward[n].boxes).all()
        assert (view.labels == backward[n].labels).all()
    assert len({v.frame for v in forward.values()}) == 4
    assert all(v.frame != views([n], seed=2)[n].frame and v.frame != views([n], epoch=1)[n].frame for n, v in forward.items())


def test_labels_follow_their_boxes_and_crowds_are_apart(root):
    content = copy.deepcopy(GOOD)
    content["annotations"] += [{"id": 50 + i, "image_id": 9, "category_id": 90, "bbox": [60, 44, 4, 4]} for i in range(2)]
    data, seen = read(root, content), set()
    for epoch in range(60):
        view = train_view(data, 1, 50, seed=0, epoch=epoch)
        found = back(view.boxes, view.frame)
        for box, label in zip(found, view.labels.tolist(), strict=True):
            truth = {1: [[2, 2, 6, 6]], 2: [[10, 5, 30, 15], [60, 44, 64, 48]]}[label]
            assert any((box[:2] >= np.array(t[:2]) - 0.01).all() and (box[2:] <= np.array(t[2:]) + 0.01).all() for t in truth)
        seen.add(len(found))
        assert len(view.crowds) == 1
    assert len(seen) > 1  # some crops lose some


def test_a_batch_is_normalised_and_its_padding_is_zero(root):
    data = read(root, GOOD)
    batch = collate([evaluation_view(data, i, 32) for i in (2, 0, 1)])
    assert batch.images.shape == (3, 3, 32, 32)
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert batch.contents.tolist() == [[24, 32]] * 3
    assert batch.numbers.tolist() == [2, 0, 1]
    assert [len(b) for b in batch.boxes] == [0, 1, 2]
    assert batch.boxes[1].tolist() == [[0.25, 0.75, 5.25, 10.75]]
    assert batch.labels[2].tolist() == [1, 2]
    out = normalised(batch.images, batch.contents, Preprocess(32))
    assert out.dtype == torch.float32
    assert (out[:, :, 24:] == 0).all()
    assert out[:, 0, 5, 5].tolist() == pytest.approx([(i - 123.675) / 58.395 for i in (12, 5, 9)], abs=1e-5)
    tall = normalised(torch.full((1, 3, 8, 8), 255, dtype=torch.uint8), torch.tensor([[8, 5]]), Preprocess(8))
    assert (tall != 0).sum().item() == 3 * 8 * 5
    assert (tall[..., 5:] == 0).all()
    with pytest.raises(ValueError, match="at least one view"):
        collate([])


# --- VOC


def voc_xml(name, objects, size=(WIDTH, HEIGHT), filename=None):
    things = "".join(
        f"<object><name>{label}</name><difficult>{difficult}</difficult><part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>"
        f"<bndbox><xmax>{x2}</xmax><xmin>{x1}</xmin><ymin>{y1}</ymin><ymax>{y2}</ymax></bndbox></object>"
        for label, (x1, y1, x2, y2), difficult in objects
    )
    size = f"<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>"
    return f"<annotation><filename>{filename or name + '.png'}</filename>{size}{things}</annotation>"


@pytest.fixture
def voc(tmp_path):
    """Three pictures, of which `c` is in no list; `b` has a difficult object."""
    source = tmp_path / "VOC2007"
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (source / name).mkdir(parents=True)
    objects = {
        "a": [("dog", (1, 1, 64, 48), 0), ("cat", (48, 24, 60, 37), 0)],
        "b": [("dog", (10, 10, 10, 12), 1)],
        "c": [("bird", (5, 5, 9, 9), 0)],
    }
    for name, things in objects.items():
        Image.new("RGB", (WIDTH, HEIGHT)).save(source / "JPEGImages" / f"{name}.png")
        (source / "Annotations" / f"{name}.xml").write_text(voc_xml(name, things))
    (source / "ImageSets/Main/train.txt").write_text("a\n")
    (source / "ImageSets/Main/val.txt").write_text("b\n\n")
    (source / "ImageSets/Main/dog_train.txt").write_text("a  1\nb -1\n")
    return source


def test_voc_becomes_coco(voc, tmp_path):
    done = convert_voc(voc, tmp_path / "out")
    files = {name: path for name, path, _, _ in done.files}
    assert [(name, images, boxes) for name, _, images, boxes in done.files] == [("train", 1, 2), ("val", 1, 1)]
    assert done.classes == ("bird", "cat", "dog")
    assert done.notes == ("1 list of ImageSets/Main passed over for having more than a name a line: dog_train",)
    train, val = (read_coco(files[name], done.images_root) for name in ("train", "val"))
    # pixels 48..60 of columns counted from 1 are 47..59 from 0: edges 47 and 60; pixels 1..64 are all of 64 columns
    assert train.boxes.tolist() == [[0, 0, 64, 48], [47, 23, 60, 37]]
    assert train.given.tolist() == [[0, 0, 64, 48], [47, 23, 13, 14]]
    assert train.areas.tolist() == [64 * 48, 13 * 14]
    assert [train.classes[i] for i in train.labels] == ["dog", "cat"]
    assert (val.crowd.tolist(), val.boxes.tolist()) == ([True], [[9, 9, 10, 12]])
    assert val.targets(0)[0].shape == (0, 4)
    assert train.category_ids == val.category_ids == (1, 2, 3)
    assert {e.id for e in train.images}.isdisjoint(e.id for e in val.images)
    assert set(train.ids.tolist()).isdisjoint(val.ids.tolist())


def test_without_lists_all_pictures_are_in_one_file(voc, tmp_path):
    for path in (voc / "ImageSets/Main").iterdir():
        path.unlink()
    done = convert_voc(voc, tmp_path / "out")
    assert [(name, images, boxes) for name, _, images, boxes in done.files] == [("all", 3, 4)]
    assert "all images in one file" in done.notes[0]


def test_odd_but_readable_xml(voc, tmp_path):
    """Decimals, a size of 0, a file name of another machine, corners from 0, exchanged, and on one pixel."""
    things = [("cat", (2.5, 3, 10, 12), 0), ("cat", (0, 5, 9, 9), 0), ("cat", (9, 9, 3, 12), 0), ("cat", (7, 7, 7, 7), 0)]
    (voc / "Annotations/a.xml").write_text(voc_xml("a", things, size=(0, 0), filename=r"C:\work\photo.jpg"))
    done = convert_voc(voc, tmp_path / "out")
    content = json.loads(done.files[0][1].read_text())
    assert content["images"] == [{"id": 1, "file_name": "a.png", "height": HEIGHT, "width": WIDTH}]
    assert [a["bbox"] for a in content["annotations"]] == [[1.5, 2, 8.5, 10], [-1, 4, 10, 5]]
    assert any(note.startswith("2 objects dropped") and "a, a" in note for note in done.notes)
    assert any(note.startswith("1 object with corners below 1") for note in done.notes)


LAUGHS = '<!DOCTYPE a [<!ENTITY x "ha"><!ENTITY y "&x;&x;&x;">]><annotation>&y;</annotation>'


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (LAUGHS, "has a DTD"),
        (LAUGHS.encode("utf-16"), "has a DTD"),
        ('<!DOCTYPE a SYSTEM "file:///etc/passwd"><annotation/>', "has a DTD"),
        ("<annotation>&laugh;</annotation>", "no XML that can be read"),
        ("<annotation>", "no XML that can be read"),
        ('<?xml version="1.0" encoding="no-such"?><annotation/>', "no XML that can be read"),
        ("<html/>", "expected <annotation>, found <html>"),
        (voc_xml("a", [("", (1, 1, 2, 2), 0)]), "expected an object's <name>"),
        (voc_xml("a", [("cat", ("x", 1, 2, 2), 0)]), "expected <xmin>, a number, found 'x'"),
        (voc_xml("a", [("cat", ("nan", 1, 2, 2), 0)]), "expected <xmin>, a number, found 'nan'"),
        (voc_xml("a", [("cat", (1, 1, "1e999", 2), 0)]), "expected <xmax>, a number"),
        (
            "<annotation><size><width>2</width><height>2</height></size><object><name>cat</name></object></annotation>",
            "expected <bndbox>, found none",
        ),
    ],
)
def test_bad_xml_is_an_error_that_names_the_file(voc, tmp_path, text, told):
    path = voc / "Annotations/a.xml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError) as error:
        convert_voc(voc, tmp_path / "out")
    assert str(error.value).startswith(f"{path}: ")
    assert told in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_folders_that_are_no_voc(voc, tmp_path):
    with pytest.raises(DataError, match=r"expected Pascal VOC.*; give one of VOC2007 in it"):
        convert_voc(tmp_path, tmp_path / "out")
    (voc / "ImageSets/Main/val.txt").write_text("b\nzebra\n")
    with pytest.raises(DataError, match=r"val.txt: 1 of its 2 names have no XML in Annotations: zebra"):
        convert_voc(voc, tmp_path / "out")
    (voc / "ImageSets/Main/val.txt").write_text("b\nb\n")
    with pytest.raises(DataError, match=r"val.txt: b stands there more than once"):
        convert_voc(voc, tmp_path / "out")
    (voc / "JPEGImages/a.png").unlink()
    with pytest.raises(DataError, match=r"a.xml: no image a.jpg in JPEGImages, nor a.png"):
        convert_voc(voc, tmp_path / "out")
