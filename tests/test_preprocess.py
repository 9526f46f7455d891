"""Evaluation preprocessing against the official code's golden arrays, torchvision's, and the fast transform against the reference."""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import center_crop, resize

import triscale as ts
from triscale.data.decode import decode
from triscale.data.fast import evaluate_into
from triscale.data.transform import evaluate_transform, plan, resize_tf, resized, square
from triscale.recipe import UNIT_MEAN, UNIT_STD, Preprocess

PLAIN = {"mean": (0.0,) * 3, "std": (1.0,) * 3}
NAMES = ("panda", "goldfish", "retriever")


def fast(image, preprocess):
    out = torch.empty(preprocess.size, preprocess.size, preprocess.channels)
    evaluate_into(out, image, preprocess)
    return out.permute(2, 0, 1).numpy()


@pytest.fixture(scope="module")
def golden(shared):
    return dict(np.load(shared / "golden/preprocess_eval.npz"))


@pytest.fixture(scope="module")
def b0(shared):
    return ts.load_weights(ts.build(ts.arch("efficientnet_b0")).eval(), shared / "golden/b0_ckpt/model.ckpt.index")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [224, 300])
def test_tensorflows_resize(golden, name, size):
    crop, want = golden[f"{name}_crop"], golden[f"{name}_{size}"]
    assert np.abs(resize_tf(crop, size, size) - want).max() <= 1e-3
    whole = Preprocess(size, 0, interpolation="bicubic-tf", **PLAIN)
    assert np.abs(fast(crop, whole).transpose(1, 2, 0) - want).max() <= 1e-3
    assert want.min() < 0 or want.max() > 255  # it overshoots, and is not clipped


@pytest.mark.parametrize("name", NAMES)
def test_the_official_crop(golden, name):
    """Which rows and columns: exact, on a picture of the golden crop in a frame as large as the JPEG."""
    height, width = decode(golden[f"{name}_jpeg"].tobytes()).shape[:2]
    crop = golden[f"{name}_crop"]
    (top, left, high, wide), _, _ = plan((height, width, 3), Preprocess(224))
    assert (high, wide) == crop.shape[:2]
    assert plan((height, width, 3), Preprocess(300, 43))[0] == (top, left, high, wide)  # the later official file's padding at 300
    frame = np.zeros((height, width, 3), np.uint8)
    frame[top : top + high, left : left + wide] = crop
    whole = Preprocess(224, interpolation="bicubic-tf", **PLAIN)
    assert np.abs(resized(frame, whole) - golden[f"{name}_224"]).max() <= 1e-3


@pytest.mark.parametrize("advprop", [False, True])
def test_from_pixels_to_the_official_probabilities(shared, b0, advprop):
    file = np.load(shared / f"golden/b0_{'advprop_' * advprop}eval.npz")
    pixels = np.load(shared / "golden/b0_eval.npz")["images_0_255"]
    given = Preprocess(224, mean=UNIT_MEAN, std=UNIT_STD) if advprop else Preprocess(224)
    x = torch.from_numpy((pixels - np.float32(given.mean)) / np.float32(given.std)).permute(0, 3, 1, 2)
    assert np.abs(x.permute(0, 2, 3, 1).numpy() - file["input"]).max() <= 1e-6
    with torch.no_grad():
        ours = b0(x).softmax(1)
    assert float((ours - torch.from_numpy(file["logits_ema"]).softmax(1)).abs().max()) <= 1e-7


@pytest.mark.parametrize(("advprop", "limit"), [(False, 0.02), (True, 0.005)])
@pytest.mark.parametrize("way", [fast, evaluate_transform])
def test_from_jpeg_bytes_to_the_official_probabilities(shared, golden, b0, way, advprop, limit):
    """Another JPEG decoder than TensorFlow's moves the log-probabilities a little, swapped channels more: the test can tell."""
    end = np.load(shared / "golden/b0_end_to_end.npz")
    given = replace(Preprocess(224, interpolation="bicubic-tf"), **({"mean": UNIT_MEAN, "std": UNIT_STD} if advprop else {}))
    images = [decode(golden[f"{name}_jpeg"].tobytes()) for name in end["order"].tolist()]
    want = np.log(end[f"probs_ema_{'advprop' if advprop else 'standard'}"])

    def apart(pictures):
        with torch.no_grad():
            logits = b0(torch.from_numpy(np.stack([way(p, given) for p in pictures])))
        return np.sqrt(np.square(logits.log_softmax(1).numpy() - want).mean())

    assert apart(images) <= limit < apart([np.ascontiguousarray(image[:, :, ::-1]) for image in images])


@given(
    shape=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    size=st.integers(1, 48),
    padding=st.integers(0, 20),
    crop=st.sampled_from(("before", "after", "squash")),
    interpolation=st.sampled_from(("bicubic", "bicubic-tf", "bilinear", "nearest")),
    grey=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=300, deadline=None)
def test_the_fast_transform_agrees_with_the_reference(shape, size, padding, crop, interpolation, grey, seed):
    image = np.random.default_rng(seed).integers(0, 256, (*shape, 3), np.uint8)
    preprocess = Preprocess(size, padding, crop, interpolation, **({"mean": (0.0,), "std": (1.0,)} if grey else PLAIN))
    want, got = evaluate_transform(image, preprocess), fast(image, preprocess)
    assert got.shape == want.shape == (preprocess.channels, size, size)
    # On noise, the worst case: torch's weights have fewer bits than Pillow's 8-bit filters.
    assert np.abs(got - want).max() <= (1e-3 if interpolation == "bicubic-tf" else 0 if interpolation == "nearest" else 3)


def test_the_fast_transform_on_photographs(golden):
    for name in NAMES:
        image = decode(golden[f"{name}_jpeg"].tobytes())
        for crop in ("before", "after", "squash"):
            preprocess = Preprocess(224, 32, crop, **PLAIN)
            apart = np.abs(fast(image, preprocess) - evaluate_transform(image, preprocess))
            assert apart.max() <= 2
            assert apart.mean() < 0.02


@pytest.mark.parametrize(("filter_", "mode"), [("bicubic", InterpolationMode.BICUBIC), ("bilinear", InterpolationMode.BILINEAR)])
@pytest.mark.parametrize("shape", [(300, 500), (613, 696), (257, 256), (31, 900)])
def test_crop_after_the_resize_is_torchvisions(shape, filter_, mode):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    want = np.array(center_crop(resize(Image.fromarray(image), 256, mode), 224))
    assert np.array_equal(square(image, Preprocess(224, 32, "after", filter_)), want)


def test_squash_is_timms():
    from timm.data import create_transform

    image = np.random.default_rng(0).integers(0, 256, (300, 500, 3), np.uint8)
    settings_ = {"interpolation": "bicubic", "mean": (0.0,) * 3, "std": (1.0,) * 3, "crop_pct": 0.9, "crop_mode": "squash"}
    theirs = create_transform(300, is_training=False, **settings_)(Image.fromarray(image))
    ours = evaluate_transform(image, Preprocess(300, 33, "squash", **PLAIN)) / 255
    assert np.abs(ours - theirs.numpy()).max() < 1e-6


def test_a_decoded_file_of_bytes_and_a_path_are_the_same(golden, tmp_path):
    data = golden["panda_jpeg"].tobytes()
    (tmp_path / "a.jpg").write_bytes(data)
    assert np.array_equal(decode(data), decode(tmp_path / "a.jpg"))
    assert np.array_equal(decode(data), np.array(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "nearest"])
@pytest.mark.parametrize("shape", [(2, 900), (900, 3), (40, 500)])
def test_of_thin_images_only_what_is_kept_is_made(monkeypatch, interpolation, shape):
    """A 1x65535 image of a few bytes would be resized to 13 GB. The same pixels as of the whole, to rounding."""
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    preprocess = Preprocess(64, 8, "after", interpolation, **PLAIN)
    whole = square(image, preprocess).astype(int)
    monkeypatch.setattr("triscale.data.transform.LARGEST", 0)
    monkeypatch.setattr("triscale.data.fast.LARGEST", 0)
    assert np.abs(square(image, preprocess) - whole).max() <= 1
    assert np.abs(fast(image, preprocess).transpose(1, 2, 0) - whole).max() <= 1


def test_a_thin_image_takes_little_memory():
    image = np.zeros((1, 65535, 3), np.uint8)
    image[0, 32767] = 200
    got = square(image, Preprocess(224, 32, "after"))
    assert got.shape == (224, 224, 3)
    assert got.max() == 200
