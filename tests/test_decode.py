"""Image files, good, odd and hostile, to pixels; and pixels to a network's input."""

import io
import json
import os
import struct
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from triscale.data.decode import IMAGE_SUFFIXES, MAX_PIXELS, BadImage, decode
from triscale.data.transform import evaluate_transform
from triscale.recipe import Preprocess

ROOT = Path(__file__).resolve().parent.parent

# Decodes each file that it is given and prints what came of it, the peak of its memory, and whether torch was loaded.
CHILD = """
import json, resource, sys
from triscale.data.decode import BadImage, decode
results = {}
for path in sys.argv[1:]:
    try:
        image = decode(path)
        results[path] = {"size": [image.shape[1], image.shape[0]], "mean": image.mean((0, 1)).tolist()}
    except BadImage as error:
        results[path] = {"error": str(error)}
try:  # of this program alone; getrusage counts the parent's pages up to exec
    peak = next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmHWM"))
except OSError:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << (0 if sys.platform == "darwin" else 10)
print(json.dumps({"results": results, "peak": peak, "torch": any(m in sys.modules for m in ("torch", "torchvision"))}))
"""


def ramp(height: int, width: int) -> np.ndarray:
    """A picture without symmetry, smooth enough for JPEG."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // width, y * 255 // height, (x + y) * 255 // (width + height)], axis=2).astype(np.uint8)


def encode(image: Image.Image | np.ndarray, kind: str, **options) -> bytes:
    out = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(out, kind, **options)
    return out.getvalue()


def tiff(width: int, height: int, data: bytes, order: str = "<", **tags: int) -> bytes:
    """A TIFF of one grey strip, from TIFF 6.0, so that Pillow's writer has no part in it."""
    values = {0x0100: width, 0x0101: height, 0x0102: tags.get("bits", 16), 0x0103: 1, 0x0106: tags.get("photometric", 1)}
    values |= {0x0111: 8, 0x0112: tags.get("orientation", 1), 0x0115: 1, 0x0116: height, 0x0117: len(data), 0x0153: tags.get("format", 1)}
    entries = b"".join(struct.pack(f"{order}HHI", tag, 4, 1) + struct.pack(f"{order}I", value) for tag, value in values.items())
    data += b"\0" * (len(data) % 2)
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8 + len(data))
    return head + data + struct.pack(f"{order}H", len(values)) + entries + b"\0\0\0\0"


def refusal(source, **options) -> str:
    with pytest.raises(BadImage) as caught:
        decode(source, **options)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.fixture
def strict():
    """Pillow's warnings become errors, and so wrong results."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.fixture(scope="module")
def hostile(shared, tmp_path_factory):
    """What a child process made of shared/data/bad-images: (manifest entries, its answer, the folder it ran in)."""
    folder, below = shared / "data" / "bad-images", tmp_path_factory.mktemp("outer") / "inner"
    below.mkdir()
    entries = json.loads((folder / "manifest.json").read_text())["files"]
    command = [sys.executable, "-W", "error", "-c", CHILD, *(str(folder / entry["file"]) for entry in entries)]
    done = subprocess.run(command, cwd=below, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    answer["results"] = {Path(path).name: result for path, result in answer["results"].items()}
    return entries, answer, below


def test_bad_images_do_what_their_manifest_expects(hostile):
    entries, answer, _ = hostile
    assert len(entries) >= 20
    for entry in entries:
        result = answer["results"][entry["file"]]
        if "error" in result:
            assert entry["expect"] in ("error", "either"), result
            assert entry["file"] + ": " in result["error"]
            assert len(result["error"].splitlines()) == 1
        else:
            assert entry["expect"] in ("decode", "either"), (entry["file"], result)
            assert result["size"] == [entry["width"], entry["height"]], entry["file"]
            assert np.abs(np.subtract(result["mean"], entry["rgb_mean"])).max() <= entry["rgb_tol"], entry["file"]


def test_bad_images_say_what_is_wrong(hostile):
    results = hostile[1]["results"]
    for name, words in {
        "zero_byte.jpg": "empty file",
        "truncated.jpg": "truncated",
        "text_named.jpg": "not an image that can be read",
        "garbage.heic": "not an image that can be read",
        "bad_crc_ihdr.png": "corrupt",
        "bomb_claimed.png": f"30000x30000 pixels, more than the limit of {MAX_PIXELS} (raise max_pixels to allow it)",
    }.items():
        assert words in results[name]["error"]


def test_bad_images_take_no_memory_load_no_torch_and_write_nothing(hostile):
    _, answer, below = hostile
    assert answer["peak"] < 1 << 30
    assert not answer["torch"]
    assert not list(below.parent.rglob("*PWNED*"))
    assert not list(below.iterdir())


def test_bad_images_turned_and_upright_twin_agree(shared):
    folder = shared / "data" / "bad-images"
    turned, upright = (decode(folder / name).astype(int) for name in ("exif_rot6.jpg", "exif_rot6_upright.jpg"))
    assert turned.shape == upright.shape
    assert np.abs(turned - upright).mean() < 4  # two compressions of one picture, their colours halved along either axis
    for wrong in (upright[::-1], upright[:, ::-1], upright[::-1, ::-1]):
        assert np.abs(turned - wrong).mean() > 20


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_orientation_is_what_pillow_makes_of_it(kind, orientation, strict):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encode(ramp(12, 20), kind, exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(content))))
    assert np.array_equal(decode(content), expected)
    assert expected.shape == ((20, 12, 3) if orientation > 4 else (12, 20, 3))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_nonsense_orientation_is_upright(kind, strict):
    plain = decode(encode(ramp(12, 20), kind))
    entry = b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0%b\0\0\0\0\0\0"
    blocks = [b"Exif\0\0" + entry % struct.pack("<H", value) for value in (0, 9, 65535)]
    blocks += [b"Exif\0\0" + block for block in (b"nonsense", b"II*\0\xff\xff\xff\xff", (entry % b"\x06\0")[:18], b"MM\0*\0\0\0\x08\xff\xff", b"II")]
    for block in blocks:
        assert np.array_equal(decode(encode(ramp(12, 20), kind, exif=block)), plain), block
    assert decode(encode(ramp(12, 20), kind, exif=b"Exif\0\0" + entry % b"\x06\0")).shape == (20, 12, 3)


def test_sixteen_bits_become_eight_exactly(strict):
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    exact = np.floor(np.arange(65536) / 257 + 0.5).astype(np.uint8).reshape(256, 256)  # no ties: 257 is odd
    files = {
        "PNG": encode(Image.fromarray(values), "PNG"),
        "PGM": b"P5 256 256 65535\n" + values.astype(">u2").tobytes(),
        "TIFF, little end first": tiff(256, 256, values.tobytes()),
        "TIFF, big end first": tiff(256, 256, values.astype(">u2").tobytes(), ">"),
        "TIFF, white is zero": tiff(256, 256, (65535 - values).tobytes(), photometric=0),
        "TIFF, packed": encode(Image.fromarray(values), "TIFF", compression="tiff_deflate"),
    }
    for name, content in files.items():
        image = decode(content)
        assert image.shape == (256, 256, 3), name
        assert all(np.array_equal(image[:, :, channel], exact) for channel in range(3)), name


def test_twelve_bits_become_eight_exactly():
    values = np.arange(4096)
    packed = np.stack([values[::2] >> 4, (values[::2] & 15) << 4 | values[1::2] >> 8, values[1::2] & 255], axis=1).astype(np.uint8)
    image = decode(tiff(64, 64, packed.tobytes(), bits=12))
    assert np.array_equal(image[:, :, 0].ravel(), np.rint(values * (255 / 4095)).astype(np.uint8))


def test_pixels_without_a_known_range_are_refused():
    assert "floating point" in refusal(tiff(2, 1, np.array([0.5, 1.0], "<f4").tobytes(), bits=32, format=3), name="x.tif")
    assert "integers from -5 to 70000" in refusal(tiff(2, 1, np.array([-5, 70000], "<i4").tobytes(), bits=32, format=2), name="x.tif")


def test_alpha_is_dropped_and_grey_and_palette_are_expanded(strict):
    colours = ramp(9, 7)
    alpha = np.full((9, 7, 1), 3, np.uint8)
    assert np.array_equal(decode(encode(np.concatenate([colours, alpha], axis=2), "PNG")), colours)
    grey = colours[:, :, :1]
    assert np.array_equal(decode(encode(np.concatenate([grey, alpha], axis=2), "PNG")), np.repeat(grey, 3, axis=2))
    assert np.array_equal(decode(encode(grey[:, :, 0], "PNG", transparency=0)), np.repeat(grey, 3, axis=2))
    assert np.array_equal(decode(encode(colours, "PNG", transparency=(0, 0, 0))), colours)
    palette = Image.fromarray(colours).quantize(16)
    expected = np.asarray(palette.convert("RGB"))
    assert np.array_equal(decode(encode(palette, "PNG", transparency=bytes(range(16)))), expected)
    assert np.array_equal(decode(encode(palette, "GIF", transparency=2)), expected)
    black_white = Image.fromarray(grey[:, :, 0] > 128)
    assert np.array_equal(decode(encode(black_white, "PNG")), np.repeat((grey > 128) * np.uint8(255), 3, axis=2))


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "GIF", "WEBP"])
def test_lossless_formats_keep_every_pixel(kind, tmp_path, strict):
    colours = np.asarray(Image.fromarray(ramp(33, 21)).quantize(200).convert("RGB"))
    options = {"GIF": {"save_all": True, "append_images": [Image.new("RGB", (21, 33))]}, "WEBP": {"lossless": True, "exact": True}}
    content = encode(colours, kind, **options.get(kind, {}))
    path = tmp_path / "named_wrongly.jpg"
    path.write_bytes(content)
    for source in (content, path, str(path)):
        image = decode(source)
        assert np.array_equal(image, colours)
        assert (image.dtype, image.flags.c_contiguous, image.flags.writeable) == (np.uint8, True, True)


def test_what_is_no_regular_file_is_refused_by_its_name(tmp_path):
    assert refusal(tmp_path).startswith(f"{tmp_path}: expected an image file, found a folder")
    assert refusal(tmp_path / "none.jpg").startswith(f"{tmp_path / 'none.jpg'}: cannot be opened (No such file")
    assert refusal("zero\0byte.jpg").startswith("zero\\x00byte.jpg: ")
    assert refusal(tmp_path / "two\nlines.jpg", name="two\nlines.jpg").startswith("two\\nlines.jpg: ")
    assert refusal(b"") == "image: empty file"
    assert refusal(b"", name="upload.png") == "upload.png: empty file"
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.jpg")  # nobody writes: opening it would hang
        assert "expected an image file, found a device" in refusal(tmp_path / "pipe.jpg")


def test_a_huge_file_is_not_read(tmp_path):
    limit = f"{8 << 30} bytes, more than the limit of {8 * MAX_PIXELS + (64 << 20)}"
    for start, words in ((b"RIFF\xff\xff\xff\xffWEBPVP8 ", limit), (b"\x89PNG\r\n\x1a\n", limit), (b"\0", "not an image that can be read")):
        with open(tmp_path / "huge", "wb") as file:  # sparse: takes no room
            file.write(start)
            file.truncate(8 << 30)
        assert refusal(tmp_path / "huge", name="huge").startswith(f"huge: {words}")


def claims(width: int, height: int) -> dict[str, bytes]:
    """Small files of each format that claim to be width x height."""
    animated = bytearray(encode(ramp(8, 8), "WEBP", save_all=True, append_images=[Image.new("RGB", (8, 8))]))
    animated[24:30] = (min(width, 16383) - 1).to_bytes(3, "little") + (min(height, 16383) - 1).to_bytes(3, "little")
    jpeg = bytearray(encode(ramp(8, 8), "JPEG"))
    at = jpeg.index(b"\xff\xc0\0\x11\x08") + 5
    jpeg[at : at + 4] = struct.pack(">2H", height, width)
    bmp = bytearray(encode(ramp(8, 8), "BMP"))
    bmp[18:26] = struct.pack("<2i", width, height)
    screen, frame = (bytearray(encode(ramp(8, 8), "GIF")) for _ in range(2))
    screen[6:10] = struct.pack("<2H", width, height)
    at = frame.index(b",") + 5
    frame[at : at + 4] = struct.pack("<2H", width, height)
    grey = tiff(width, height, b"\0" * 64, bits=8)
    return {"webp": animated, "jpeg": jpeg, "bmp": bmp, "gif": screen, "gif frame": frame, "tiff": grey, "ppm": b"P6 %d %d 255\n" % (width, height)}


@pytest.mark.parametrize("side", [10_000, 30_000])  # between Pillow's warning and its error; above both
def test_claimed_sizes_are_refused_without_a_warning(side, strict):
    for name, content in claims(side, side).items():
        assert f"more than the limit of {MAX_PIXELS}" in refusal(bytes(content), name=name), name


def test_the_limit_is_the_callers(strict, monkeypatch):
    content = encode(np.zeros((40, 50), np.uint8), "TIFF")
    assert refusal(content, max_pixels=1999) == "image: 50x40 pixels, more than the limit of 1999 (raise max_pixels to allow it)"
    assert decode(content, max_pixels=2000).shape == (40, 50, 3)
    # A limit above Pillow's holds too: for TIFF, whose plugin asks Pillow's limit again, here low enough for a small file.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert decode(content, max_pixels=MAX_PIXELS + 1).shape == (40, 50, 3)
    assert Image.MAX_IMAGE_PIXELS == 10


def test_pillow_keeps_its_own_limit_after_many_threads():
    before = Image.MAX_IMAGE_PIXELS
    content, bomb, shapes = encode(ramp(30, 30), "GIF"), bytes(claims(60_000, 60_000)["gif frame"]), []

    def work():
        for _ in range(30):
            shapes.append(decode(content).shape)
            refusal(bomb)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert shapes == [(30, 30, 3)] * 120
    assert before == Image.MAX_IMAGE_PIXELS


def test_a_truncated_jpeg_is_never_an_image(shared):
    photos = [p for p in (shared / "data" / "imagenet-samples").rglob("*") if p.suffix.lower() in (".jpg", ".jpeg")]
    path = min(photos, key=lambda p: (p.stat().st_size, p.name))
    real = path.read_bytes()
    assert decode(real).ndim == 3
    last = len(real) if real.endswith(b"\xff\xd9") else real.rindex(b"\xff\xd9") + 2
    for cut in {*range(0, 64), *range(64, last, max(1, last // 60)), *range(last - 32, last)}:
        refusal(real[:cut])


@pytest.mark.parametrize(
    ("kind", "options"),
    [("JPEG", {"progressive": True}), ("PNG", {}), ("GIF", {}), ("BMP", {}), ("WEBP", {}), ("PPM", {}), ("TIFF", {})],
)
def test_a_truncated_file_is_refused_or_loses_no_pixel(kind, options):
    """Where only what follows the last pixel is gone (PNG's end marker), the whole picture may come back."""
    whole = encode(ramp(24, 31), kind, **options)
    picture, kept = decode(whole), []
    for cut in range(len(whole)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a TIFF's torn directory
            try:
                image = decode(whole[:cut])
            except BadImage:
                continue
        assert np.array_equal(image, picture), cut
        kept.append(cut)
    assert all(cut >= len(whole) - 24 for cut in kept)
    assert not (kind == "JPEG" and kept)


def attempt(content: bytes) -> np.ndarray | str:
    """The image or BadImage's message; any other exception is raised, and a warning fails."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result = decode(content, name="any.png", max_pixels=1 << 20)
        except BadImage as error:
            result = str(error)
    assert not caught or content.startswith((b"II", b"MM"))  # Pillow warns of a TIFF's torn directory
    return result


def array_or_bad_image(content: bytes) -> None:
    result = attempt(content)
    if isinstance(result, str):
        assert result.startswith("any.png: ")
        assert len(result.splitlines()) == 1
    else:
        assert (result.dtype, result.ndim, result.shape[2], result.flags.c_contiguous) == (np.uint8, 3, 3, True)
        assert 0 < result.shape[0] * result.shape[1] <= 1 << 20


SIGNATURES = [
    b"",
    b"\xff\xd8\xff",
    b"\x89PNG\r\n\x1a\n",
    b"RIFF\x10\0\0\0WEBPVP8 ",
    b"GIF89a",
    b"BM",
    b"P6 3 3 255\n",
    b"P1 2 2 ",
    b"II*\0\x08\0\0\0",
]


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(SIGNATURES), st.binary(max_size=400))
def test_random_bytes_give_an_array_or_bad_image(start, rest):
    array_or_bad_image(start + rest)


SMALL = [
    encode(ramp(11, 13), "PNG"),
    encode(ramp(11, 13), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"),
    encode(ramp(11, 13), "JPEG", progressive=True),
    encode(ramp(11, 13), "GIF"),
    encode(ramp(11, 13), "BMP"),
    encode(ramp(11, 13), "WEBP"),
    encode(ramp(11, 13), "PPM"),
]


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(SMALL), st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(1, 255)), min_size=1, max_size=8))
def test_flipped_bytes_give_an_array_or_bad_image(content, flips):
    changed = bytearray(content)
    for at, mask in flips:
        changed[at % len(changed)] ^= mask
    array_or_bad_image(bytes(changed))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the system does not limit a process's memory")
def test_a_lack_of_memory_is_not_a_bad_image(tmp_path):
    (tmp_path / "large.png").write_bytes(encode(Image.new("1", (9000, 9000)), "PNG"))  # 81 MB, and 324 MB as RGB
    program = """
import resource
from triscale.data.decode import decode
used = next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmSize"))
resource.setrlimit(resource.RLIMIT_AS, (used + (50 << 20), resource.RLIM_INFINITY))
try:
    decode("large.png")
except MemoryError:
    print("MemoryError")
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout == "MemoryError\n", done.stderr


def test_suffixes_are_lower_case_and_cover_what_is_decoded():
    assert all(suffix == suffix.lower() and suffix.startswith(".") for suffix in IMAGE_SUFFIXES)
    assert Path("PHOTO.JPEG").suffix.lower() in IMAGE_SUFFIXES
    assert ".heic" not in IMAGE_SUFFIXES


# ---- pixels to a network's input

PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def resize_weights(source: int, target: int, interpolation: str) -> np.ndarray:
    """(target, source) float64: each output as a weighted sum of inputs, the filter as wide as the step when it shrinks."""
    step = source / target
    if interpolation == "nearest":
        return np.eye(source)[[int((i + 0.5) * step) for i in range(target)]]
    distance = np.abs((np.arange(source)[None] + 0.5 - (np.arange(target)[:, None] + 0.5) * step) / max(step, 1))
    if interpolation == "bilinear":
        weights = np.clip(1 - distance, 0, None)
    else:  # Keys' cubic, a = -0.5
        near, far = 1.5 * distance**3 - 2.5 * distance**2 + 1, -0.5 * (distance**3 - 5 * distance**2 + 8 * distance - 4)
        weights = np.where(distance < 1, near, np.where(distance < 2, far, 0))
    return weights / weights.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "nearest"])
@pytest.mark.parametrize("size", [24, 96])  # smaller and larger than the cut of 60
def test_transform_is_crop_then_resize_then_normalise(interpolation, size):
    image = np.random.default_rng(0).integers(0, 256, (71, 90, 3), np.uint8)
    padding = {24: 4, 96: 17}[size]  # int(24 / 28 x 71) = int(60.86) = 60 = int(96 / 113 x 71) = int(60.32)
    square = image[6:66, 15:75].astype(float)  # (71 - 60 + 1) // 2, (90 - 60 + 1) // 2
    weights = resize_weights(60, size, interpolation)
    across = np.clip(np.floor(np.einsum("os,rsc->roc", weights, square) + 0.5), 0, 255)  # Pillow rounds between the passes too
    expected = np.clip(np.floor(np.einsum("os,swc->owc", weights, across) + 0.5), 0, 255)
    preprocess = Preprocess(size, crop_padding=padding, interpolation=interpolation)
    result = evaluate_transform(image, preprocess)
    assert (result.shape, result.dtype, result.flags.c_contiguous) == ((3, size, size), np.float32, True)
    levels = result.transpose(1, 2, 0) * np.array(preprocess.std) + np.array(preprocess.mean)
    assert np.abs(levels - expected).max() <= 1.001  # Pillow's weights have a fixed point: one level where a sum is near a half
    assert np.abs(levels - expected).mean() < 0.02


def test_transform_of_224_keeps_seven_eighths():
    image = np.random.default_rng(1).integers(0, 256, (300, 256, 3), np.uint8)
    result = evaluate_transform(image, Preprocess(224, **PLAIN))  # 224 of 256: no resizing
    assert np.array_equal(result.transpose(1, 2, 0), image[38:262, 16:240])


def test_transform_of_a_constant_is_the_exact_constant():
    colour = np.array([200, 30, 90], np.uint8)
    for shape in ((1, 1), (2, 4000), (4000, 2), (37, 53)):
        preprocess = Preprocess(32)
        result = evaluate_transform(np.broadcast_to(colour, (*shape, 3)), preprocess)
        mean, std = (np.array(v, np.float32)[:, None, None] for v in (preprocess.mean, preprocess.std))
        assert np.array_equal(result, np.broadcast_to((colour[:, None, None].astype(np.float32) - mean) / std, (3, 32, 32)))


def test_transform_of_a_wide_image_takes_its_middle():
    image = np.zeros((2, 4000, 3), np.uint8)
    image[1, 2000] = 7, 8, 9  # the cut is one pixel: int(224 / 256 x 2) = 1, at (2 - 1 + 1) // 2 and (4000 - 1 + 1) // 2
    result = evaluate_transform(image, Preprocess(224, **PLAIN))
    assert np.array_equal(result, np.broadcast_to(np.float32([[[7]], [[8]], [[9]]]), (3, 224, 224)))


def test_transform_to_grey_weighs_the_colours():
    for colour, grey in (((255, 0, 0), 76), ((0, 255, 0), 150), ((0, 0, 255), 29), ((200, 200, 200), 200)):
        image = np.broadcast_to(np.array(colour, np.uint8), (40, 50, 3))
        result = evaluate_transform(image, Preprocess(16, mean=(100.0,), std=(50.0,)))
        assert np.array_equal(result, np.full((1, 16, 16), np.float32((grey - 100) / 50)))


@pytest.mark.parametrize("image", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((0, 4, 3), np.uint8), np.zeros((4, 4, 4), np.uint8)])
def test_transform_refuses_what_is_no_image(image):
    with pytest.raises(ValueError, match=r"expected an image \(H, W, 3\) uint8, found"):
        evaluate_transform(image, Preprocess(8))
