"""The fast way from an image file's bytes to a square, against the reference: decode whole, Pillow's filters."""

import csv
import io
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from triscale.data import jpeg
from triscale.data.decode import BadImage, decode
from triscale.data.jpeg import RandomCrop, crop_plan, read_square, size_of
from triscale.data.jpeg_cuda import decode_on_gpu
from triscale.data.jpeg_header import cut, header
from triscale.data.transform import square
from triscale.recipe import Preprocess

SUBSAMPLINGS = ("4:4:4", "4:2:2", "4:2:0")
WHOLE = RandomCrop(0.08, np.ones((10, 4)))  # no try fits any picture but thin ones: the centre
TOP = RandomCrop(0.08, np.tile((0.1, 0.5, 0.0, 0.5), (10, 1)))  # a tenth of the area and more, from the first row on


def picture(height, width, seed=0):
    """Waves and edges, sharper in brightness than in colour, as photographs are."""
    y, x = np.mgrid[:height, :width] / max(32, min(height, width))
    g = np.random.default_rng(seed)
    grey, *waves = [sum(np.sin(a * x + b * y + c) for a, b, c in g.uniform(-w, w, (4, 3))) for w in (20, 8, 8, 8)]
    return (127.5 + 15 * np.stack(waves, 2) + (20 * grey + 8 * np.sign(np.sin(9 * x)))[..., None]).clip(0, 255).astype(np.uint8)


def encode(image, kind="JPEG", **options):
    out = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(out, kind, **options)
    return out.getvalue()


def read(data, box, size=64, channels=3, **options):
    out = np.zeros((size, size, channels), np.uint8)
    read_square(data, out, box, **options)
    return out


def tried(*args, **options):
    """The square, or what is said of the image."""
    try:
        return read(*args, **options), ""
    except BadImage as error:
        return None, str(error)


def difference(one, other):
    """Mean and largest."""
    apart = np.abs(one.astype(int) - other)
    return apart.mean(), apart.max()


def refusal(function, *args, **options):
    with pytest.raises(BadImage) as caught:
        function(*args, **options)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


crops = st.integers(0, 1 << 30).map(lambda seed: RandomCrop(0.08, np.random.default_rng(seed).random((10, 4))))


def test_the_fast_libraries_are_here():
    """Else the tests below would hold Pillow to Pillow."""
    assert jpeg.missing() is None


# ---- geometry


def test_crop_by_hand():
    """Area 0.08 + 0.92 x 0.5 = 0.54 of 200 x 100, aspect 1: side 103.9 doesn't fit; the second try, area 0.264, aspect 4/3, does."""
    numbers = np.array([(0.5, 0.5, 0, 0), (0.2, 1.0, 0.5, 0.25), *[(0.0,) * 4] * 8])
    high, wide = round((0.264 * 20000 * 0.75) ** 0.5), round((0.264 * 20000 / 0.75) ** 0.5)
    assert (high, wide) == (63, 84)
    assert crop_plan((100, 200), RandomCrop(0.08, numbers), 32) == ((int(0.5 * 38), int(0.25 * 117), 63, 84), (32, 32), (0, 0, 32, 32))


def test_the_centre_where_no_try_fits():
    """Official `_decode_and_center_crop`: int(224 / 256 x 100) = 87 from row (100 - 87 + 1) // 2."""
    assert crop_plan((100, 1000), WHOLE, 224).cut == (7, 457, 87, 87)
    assert crop_plan((1, 1), RandomCrop(0.08, np.ones((10, 4))), 224).cut == (0, 0, 1, 1)


@given(crops, st.integers(1, 900), st.integers(1, 900), st.floats(0.01, 1))
def test_crops_lie_inside_and_keep_to_area_and_aspect(crop, height, width, low):
    (top, left, high, wide), *_ = plan = crop_plan((height, width), crop._replace(low=low), 8)
    assert 0 <= top <= top + high <= height
    assert 0 <= left <= left + wide <= width
    if plan != crop_plan((height, width), WHOLE, 8):  # a half pixel of rounding either way
        assert (wide + 0.5) * (high + 0.5) >= low * height * width
        assert (wide + 0.5) / (high - 0.5) >= 3 / 4
        assert (wide - 0.5) / (high + 0.5) <= 4 / 3


# ---- cutting bytes


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 150), st.integers(1, 150), st.integers(1, 150), st.sampled_from((*SUBSAMPLINGS, "grey")), st.integers(0, 5))
def test_rows_above_a_cut_decode_as_in_the_whole(height, width, bottom, subsampling, restart):
    image = Image.fromarray(np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8))
    options = {} if subsampling == "grey" else {"subsampling": subsampling}
    data = encode(image.convert("L") if subsampling == "grey" else image, quality=70, restart_marker_blocks=restart, **options)
    head, bottom = header(data), min(bottom, height)
    assert (head.height, head.width, head.plain) == (height, width, True)
    assert head.unit == (16 if subsampling == "4:2:0" else 8)
    upper, rows = cut(data, head, bottom)
    assert bottom <= rows <= max(height, bottom + 2 + 15)
    assert rows == height or rows % head.unit == 0
    assert np.array_equal(decode(upper)[:bottom], decode(data)[:bottom])


# ---- pixels


@settings(max_examples=40, deadline=None)
@given(st.integers(64, 500), st.integers(64, 500), crops, st.sampled_from(SUBSAMPLINGS), st.sampled_from((32, 64, 160)), st.integers(0, 9))
def test_random_crops_are_near_the_reference(height, width, crop, subsampling, size, seed):
    data = encode(picture(height, width, seed), quality=95, subsampling=subsampling)
    fast, slow = read(data, crop, size), read(data, crop, size, reference=True)
    mean, most = difference(fast, slow)
    (_, _, high, wide), *_ = crop_plan((height, width), crop, size)
    assert mean <= (6 if min(high, wide) >= 2 * size else 1.2)  # scaled decoding moves the edges by up to half a pixel of the square
    assert most <= 40
    assert abs(fast.mean() - slow.mean()) <= 2


@settings(max_examples=50, deadline=None)
@given(
    st.integers(1, 140),
    st.integers(1, 140),
    st.sampled_from(("before", "after", "squash")),
    st.sampled_from(("bicubic", "bilinear", "nearest", "bicubic-tf")),
    st.sampled_from((0, 8)),
    st.sampled_from((1, 3)),
)
def test_evaluation_is_the_reference_but_for_rounding(height, width, crop, interpolation, padding, channels):
    assume(max(height, width) < 20 * min(height, width))
    box = Preprocess(72, padding, crop, interpolation, (0.0,) * channels, (1.0,) * channels)
    for data in (encode(picture(height, width), quality=90), encode(picture(height, width), "PNG"), picture(height, width)):
        whole = decode(data) if isinstance(data, bytes) else data
        mean, most = difference(read(data, box, 72, channels), square(whole, box))
        assert most <= (0 if interpolation in ("nearest", "bicubic-tf") else 2)
        assert mean <= 0.15


def test_scaled_decoding_is_used_and_near_the_reference(monkeypatch):
    data, asked = encode(picture(1000, 1200), quality=95), []
    real = jpeg._decoded
    monkeypatch.setattr(jpeg, "_decoded", lambda *args: asked.append(args[3]) or real(*args))
    for size, scale in ((500, 2), (501, 1), (250, 4), (251, 2), (125, 8), (60, 8)):
        box = Preprocess(size, 0)
        mean, most = difference(read(data, box, size), square(decode(data), box))
        assert asked.pop() == scale
        assert 0 <= mean <= 1.5
        assert most <= 24


def test_shifts_of_a_pixel_are_seen():
    """The tolerances above are narrower than an error of the geometry."""
    image = picture(300, 300)
    crop = RandomCrop(0.5, np.tile((0.0, 0.5, 0.5, 0.5), (10, 1)))
    right, wrong = read(image, crop), read(np.roll(image, 3, 1), crop)
    assert difference(right, read(image, crop, reference=True))[0] < 1.2 < 3 < difference(right, wrong)[0]


@pytest.mark.parametrize("kind", ["progressive", "cmyk", "grey", "PNG", "WebP", "grey16", "exif", "narrow", "thin", "one"])
def test_what_is_no_plain_jpeg_takes_the_reference_decoder(kind):
    image = Image.fromarray(picture(96, 128))
    exif = Image.Exif()
    exif[0x0112] = 6
    data = {
        "progressive": lambda: encode(image, progressive=True, quality=95),
        "cmyk": lambda: encode(image.convert("CMYK"), quality=95),
        "grey": lambda: encode(image.convert("L"), quality=95),
        "PNG": lambda: encode(image, "PNG"),
        "WebP": lambda: encode(image, "WebP", lossless=True),
        "grey16": lambda: encode(np.asarray(image.convert("L")).astype(np.uint16) * 257, "PNG"),
        "exif": lambda: encode(image, exif=exif, quality=95),
        "narrow": lambda: encode(picture(500, 3), quality=95),
        "thin": lambda: encode(picture(2, 4000), quality=95),
        "one": lambda: encode(picture(1, 1), quality=95),
    }[kind]()
    assert size_of(data) == decode(data).shape[:2]
    for crop in (TOP, WHOLE, RandomCrop(0.3, np.random.default_rng(1).random((10, 4)))):
        assert difference(read(data, crop), read(data, crop, reference=True))[0] <= 2.5
        grey = difference(read(data, crop, channels=1), np.asarray(Image.fromarray(read(data, crop)).convert("L"))[..., None])
        assert grey == (0, 0)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WebP"])
def test_size_from_the_header_is_upright(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(picture(20, 30), kind, exif=exif)
    assert size_of(data) == decode(data).shape[:2] == ((30, 20) if orientation >= 5 else (20, 30))


def test_bad_images(shared):
    """As the manifest says for each; and the square of a good one is the reference's."""
    folder = shared / "data/bad-images"
    seen = {"decode": 0, "error": 0, "either": 0}
    for entry in json.loads((folder / "manifest.json").read_text())["files"]:
        if entry["kind"] != "image":
            continue
        data, seen[entry["expect"]] = (folder / entry["file"]).read_bytes(), seen[entry["expect"]] + 1
        for box in (TOP, WHOLE, Preprocess(64)):
            wanted, said = tried(data, box, reference=True, name=entry["file"])
            got, message = tried(data, box, name=entry["file"])
            assert message == said
            assert entry["expect"] in ("either", "error" if said else "decode")
            if said:
                assert said.startswith(entry["file"])
            else:
                assert difference(got, wanted)[0] <= 3
                assert size_of(data) == (entry["height"], entry["width"])
    assert seen["decode"] >= 10
    assert seen["error"] >= 5


# ---- damage


DAMAGED = encode(picture(200, 150), quality=80, subsampling="4:2:0")


@settings(max_examples=80, deadline=None)
@given(st.integers(0, len(DAMAGED) - 1))
def test_a_file_cut_short_is_refused_wherever_the_crop_lies(end):
    data = DAMAGED[:end]
    assert refusal(read, data, TOP, name="a.jpg") == refusal(decode, data, name="a.jpg")


@settings(max_examples=80, deadline=None)
@given(st.integers(0, len(DAMAGED) - 1), st.binary(min_size=1, max_size=40), crops)
def test_damage_gives_a_square_or_the_references_message(at, junk, crop):
    data = DAMAGED[:at] + junk + DAMAGED[at + len(junk) :]
    _, said = tried(data, crop)
    if said:
        assert said == refusal(decode, data)
    else:
        size_of(data)


def test_pixels_are_limited_and_told_from_the_header():
    data = encode(picture(40, 50))
    assert "50x40 pixels, more than the limit of 1999" in refusal(read, data, TOP, max_pixels=1999)
    assert read(data, TOP, max_pixels=2000).any()
    assert size_of(data) == (40, 50)
    for junk in (b"", b"no image", DAMAGED[:100]):
        assert refusal(size_of, junk, name="x.jpg").startswith("x.jpg: ")


def test_wrong_room_is_refused():
    data = encode(picture(40, 50))
    for shape, kind, box in (((8, 9, 3), np.uint8, TOP), ((8, 8, 3), np.float32, TOP), ((8, 8, 3), np.uint8, Preprocess(9))):
        with pytest.raises(ValueError, match="read_square: expected room"):
            read_square(data, np.zeros(shape, kind), box)
    with pytest.raises(ValueError, match="expected an image"):
        read(np.zeros((4, 4)), TOP)


def test_room_that_is_not_contiguous():
    data, channels_first = encode(picture(90, 80)), np.zeros((3, 64, 64), np.uint8)
    read_square(data, channels_first.transpose(1, 2, 0), TOP)
    assert np.array_equal(channels_first.transpose(1, 2, 0), read(data, TOP))


# ---- without the fast libraries, and without torch

CHILD = """
import sys, warnings
sys.modules.update(dict.fromkeys(sys.argv[2:]))  # None: can't be imported
import numpy as np
from triscale.data.jpeg import RandomCrop, read_square
out, data = np.zeros((2, 64, 64, 3), np.uint8), open(sys.argv[1], "rb").read()
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    for one in out:
        read_square(data, one, RandomCrop(0.08, np.full((10, 4), 0.5)))
print(len(said), "torch" in sys.modules, out[1].tobytes().hex(), *[w.message for w in said])
"""


@pytest.mark.parametrize("absent", [(), ("simplejpeg",), ("simplejpeg", "cv2")])
def test_without_the_libraries_it_is_slower_and_says_so_once(tmp_path, absent):
    data, crop = encode(picture(301, 399), quality=95), RandomCrop(0.08, np.full((10, 4), 0.5))
    (tmp_path / "a.jpg").write_bytes(data)
    run = subprocess.run([sys.executable, "-c", CHILD, tmp_path / "a.jpg", *absent], capture_output=True, text=True, check=True, cwd=ROOT)
    times, torch_too, pixels, *said = run.stdout.split(maxsplit=3)
    assert (times, torch_too) == ("1" if absent else "0", "False")
    assert "".join(said).startswith("without " + " and ".join(absent).replace("cv2", "opencv-python-headless") if absent else "")
    found = np.frombuffer(bytes.fromhex(pixels), np.uint8).reshape(64, 64, 3)
    assert difference(found, read(data, crop, reference=True))[0] <= 2


# ---- a batch at a time


def test_a_batch_on_a_device():
    """On the CPU, where the same calls run: plain JPEGs by the batched decoder, the others one by one, bad ones told."""
    good = [encode(picture(h, w, h), quality=95) for h, w in ((90, 120), (200, 70), (64, 64))]
    exif = Image.Exif()
    exif[0x0112] = 6
    refused = bytearray(good[0])
    refused[refused.index(b"\xff\xc4") + 4] = 0x0F  # a Huffman table of no number
    datas = [*good, encode(picture(50, 60), "PNG"), encode(picture(50, 60), exif=exif), good[0][:900], bytes(refused)]
    boxes = [TOP, WHOLE, Preprocess(48), TOP, TOP, TOP, TOP]
    squares = decode_on_gpu(datas, boxes, 48, "cpu", names=[f"{i}.jpg" for i in range(len(datas))])
    assert squares.on_cpu == (3, 4, 5, 6)
    assert {i: str(e) for i, e in squares.bad.items()} == {i: refusal(read, datas[i], TOP, name=f"{i}.jpg") for i in (5, 6)}
    assert squares.images.shape == (7, 3, 48, 48)
    for i in range(5):
        mean, most = difference(squares.images[i].permute(1, 2, 0).numpy(), read(datas[i], boxes[i], 48, reference=True))
        assert mean <= (0.6 if i < 3 else 2)
        assert most <= (2 if i < 3 else 64)
    assert not squares.images[5:].any()


# ---- real weights


def test_scaled_decoding_keeps_the_accuracy_of_real_weights(shared):
    """V2-B0 on 256 ImageNet files: it sees those whose squares differ by more than rounding, either way."""
    from triscale.data.normalising import normalise
    from triscale.weights.open import open_model

    net, card = open_model(shared / "weights/efficientnetv2_b0/tf_efficientnetv2_b0.timm.safetensors")
    folder, box = shared / "data/imagenet-samples", card.preprocess
    with open(folder / "labels.csv", encoding="utf-8") as file:
        index = {row["wnid"]: int(row["index"]) for row in csv.DictReader(file)}
    labels, pairs, files = [], [], sorted(folder.rglob("*.JPEG"))
    for path in files:
        data = path.read_bytes()
        pair = [read(data, box, box.size, reference=slow) for slow in (False, True)]
        if difference(*pair)[1] > 1:
            assert min(decode(data).shape[:2]) >= 2 * (box.size + box.crop_padding)  # decoded at 1/2 or less
            pairs.append(pair)
            labels.append(index[path.parent.name])
    images = torch.from_numpy(np.array(pairs)).permute(1, 0, 4, 2, 3)
    with torch.inference_mode():
        right = [(net(normalise(part.contiguous(), box)).argmax(1) == torch.tensor(labels)).sum() for part in images]
    print(f"{len(files)} files, {len(labels)} of them decoded at 1/2 or less: right {right[0]}, by the reference {right[1]}")
    assert len(files) == 256
    assert len(labels) >= 5
    assert abs(right[0] - right[1]) <= 1
