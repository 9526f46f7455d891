"""Real checkpoints into networks: the official TensorFlow one against its golden outputs, real weights, broken files."""

import argparse
import json
import shutil
import warnings
import zipfile

import h5py
import numpy as np
import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file, save_file

import triscale as ts
from triscale.recipe import IMAGENET_MEAN, IMAGENET_STD
from triscale.weights.dialects import WeightsError, dialect_of, names
from triscale.weights.keras import read_keras
from triscale.weights.open import open_model
from triscale.weights.readers import open_tensors
from triscale.weights.tensorflow import CheckpointError, read

# The golden values' own rounding: the same network in float64 differs from them by 1.43e-5 in the last block and 1.38e-5
# after the head convolution, whose inputs no float32 computation gets nearer to; the logits average it out (4.1e-6).
BOUNDS = {"reduction_1": 1e-5, "reduction_2": 1e-5, "reduction_3": 1e-5, "reduction_4": 1e-5, "reduction_5": 2e-5}


def read_whole(path):
    stored = open_tensors(path)
    return {name: stored.take(name) for name in stored.shapes}


def relative(ours, golden):
    ours = ours.permute(0, 2, 3, 1) if ours.ndim == 4 else ours
    return float((ours - torch.from_numpy(golden)).abs().max() / np.abs(golden).max())


@pytest.fixture(scope="module")
def golden(shared):
    return dict(np.load(shared / "golden/b0_eval.npz"))


@pytest.mark.parametrize("raw", [True, False])
def test_official_b0_gives_the_official_outputs(shared, golden, raw):
    net = ts.load_weights(ts.build(ts.arch("efficientnet_b0")).eval(), shared / "golden/b0_ckpt/model.ckpt.index", raw=raw)
    x = torch.from_numpy(golden["input"]).permute(0, 3, 1, 2)
    for context in (torch.no_grad(), torch.enable_grad()):  # folded batch norm, and not
        with context:
            assert relative(net(x).detach(), golden["logits" if raw else "logits_ema"]) <= 1e-5
            if raw:
                stages = net.stages(x)
                for i, (name, bound) in enumerate(BOUNDS.items(), 1):
                    assert relative(stages[f"stride{2**i}"].detach(), golden[name]) <= bound, name
                assert relative(net.features(x).detach(), golden["head_1x1"]) <= 2e-5


def test_advprop_normalisation(shared):
    golden = dict(np.load(shared / "golden/b0_advprop_eval.npz"))
    net = ts.load_weights(ts.build(ts.arch("efficientnet_b0")).eval(), shared / "golden/b0_ckpt", raw=True)
    with torch.no_grad():
        assert relative(net(torch.from_numpy(golden["input"]).permute(0, 3, 1, 2)), golden["logits"]) <= 1e-5


def test_every_variable_of_the_checkpoint_has_the_listed_shape(shared):
    listed = {v["name"]: tuple(v["shape"]) for v in json.loads((shared / "golden/b0_ckpt_variables.json").read_text())}
    raw, average = (read(shared / "golden/b0_ckpt/model.ckpt", raw=r) for r in (True, False))
    assert len(raw) == 311
    assert all(listed[f"efficientnet-b0/{name}"] == value.shape for name, value in raw.items())
    assert all(not np.array_equal(raw[name], average[name]) for name in raw)


def test_broken_tensorflow_files_are_refused_by_name(shared, tmp_path):
    source = shared / "golden/b0_ckpt"
    for name in ("model.ckpt.index", "model.ckpt.data-00000-of-00001"):
        shutil.copy(source / name, tmp_path / name)
    index, data = tmp_path / "model.ckpt.index", tmp_path / "model.ckpt.data-00000-of-00001"
    whole = index.read_bytes()
    data.write_bytes(data.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="cut short"):
        read(index)
    rng = np.random.default_rng(0)
    for _ in range(60):
        bad = bytearray(whole)
        for at in rng.integers(0, len(bad), 3):
            bad[at] = rng.integers(0, 256)
        index.write_bytes(bad[: int(rng.integers(10, len(bad)))] if rng.random() < 0.3 else bad)
        with pytest.raises((CheckpointError, WeightsError)):  # the data file is cut, so that none can be read whole
            read_whole(index)
    data.unlink()
    index.write_bytes(whole)
    with pytest.raises(CheckpointError, match="data-00000-of-00001"):
        read(index)


def test_files_of_every_format_and_wrapper_load_the_same(tmp_path):
    torch.manual_seed(0)
    arch = ts.arch("mobilenet_v2")
    net = ts.build(arch, 10).eval()
    state = {k: v.detach().contiguous() for k, v in net.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "a.pth")
    torch.save(state, tmp_path / "b.pt")
    save_file(state, tmp_path / "c.safetensors")
    np.savez(tmp_path / "d.npz", **{k: v.numpy() for k, v in state.items()})
    for name in ("a.pth", "b.pt", "c.safetensors", "d.npz"):
        again = ts.load_weights(ts.build(arch, 10), tmp_path / name).state_dict()
        assert all(torch.equal(again[k], v) for k, v in state.items()), name


def test_a_failure_leaves_the_network_as_it_was(shared, tmp_path):
    net = ts.build(ts.arch("efficientnetv2_b0"))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    state = load_file(shared / "weights/efficientnetv2_b0/tf_efficientnetv2_b0.timm.safetensors")
    del state["conv_head.weight"]
    state["blocks.0.0.conv.weight"] = state["blocks.0.0.conv.weight"][:8].contiguous()
    save_file(state, tmp_path / "part.safetensors")
    with pytest.raises(WeightsError, match=r"part.safetensors.*1 missing: conv_head.weight.*1 of another shape: blocks.0.0.conv.weight"):
        ts.load_weights(net, tmp_path / "part.safetensors")
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


@pytest.mark.parametrize(
    "name", ["malicious_pickle.pth", "malicious_pickle_legacy.pth", "shape_mismatch.pth", "corrupt_header.safetensors", "huge_header.safetensors"]
)
def test_bad_checkpoints_are_refused_and_run_nothing(shared, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WeightsError, match=name) as error:
        ts.load_weights(ts.build(ts.arch("resnet18")), shared / "data/bad-images" / name)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


PARTIAL = "weights/efficientnet_b0_partial/efficientnet_b0.lukemelas.partial.safetensors"


def test_the_partial_checkpoint_is_refused_and_serves_as_a_trunk(shared):
    net = ts.build(ts.arch("efficientnet_b0"), 37)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    lacking = ("_blocks.15._project_conv.weight", "_conv_head.weight", "_fc.weight")
    with pytest.raises(WeightsError, match=rf"3 missing: {', '.join(lacking)}$"):
        ts.load_weights(ts.build(ts.arch("efficientnet_b0")), shared / PARTIAL)
    with pytest.raises(WeightsError, match="3 missing"):
        open_model(shared / PARTIAL)
    with pytest.warns(UserWarning, match=rf"fresh, not from the checkpoint: the classifier of 37 classes, {lacking[0]}, {lacking[1]}$"):
        ts.load_weights(net, shared / PARTIAL, transfer=True)
    stored, after = read_whole(shared / PARTIAL), net.state_dict()
    fresh = {"body.6.0.project.conv.weight", "head.conv.weight", "classifier.weight", "classifier.bias"}
    assert all(torch.equal(after[k], before[k]) for k in fresh)
    named = names(net.arch, dialect_of("lukemelas", net.arch), after)
    assert all(torch.equal(after[k], stored[named[k]]) for k in after if k not in fresh)


def test_another_number_of_classes_only_where_asked_for(shared):
    path = shared / "weights/efficientnetv2_b0/tf_efficientnetv2_b0.timm.safetensors"
    net = ts.build(ts.arch("efficientnetv2_b0"), 5)
    with pytest.raises(WeightsError, match=r"2 of another shape: classifier\.weight \(1000, 1280\) instead of \(5, 1280\)"):
        ts.load_weights(net, path)
    with pytest.warns(UserWarning, match="fresh, not from the checkpoint: the classifier of 5 classes$"):
        ts.load_weights(net, path, transfer=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing stays fresh, so nothing is said
        ts.load_weights(ts.build(net.arch), path, transfer=True)
    with pytest.raises(WeightsError, match="no trunk of resnet18"):
        ts.load_weights(
            ts.build(ts.arch("resnet18")),
            {"conv1.weight": torch.zeros(64, 3, 7, 7), "layer1.0.conv1.weight": torch.zeros(64, 64, 3, 3)},
            transfer=True,
        )


def test_moving_averages_are_preferred_in_every_training_scripts_file(tmp_path):
    net = ts.build(ts.arch("resnet18"), 3)
    state = {k: v.detach() for k, v in net.state_dict().items()}
    average = {k: v + 1 for k, v in state.items()}
    for key, value in (("state_dict_ema", average), ("model_ema", {"n_averaged": torch.tensor(7), **{f"module.{k}": v for k, v in average.items()}})):
        torch.save({"state_dict": state, key: value}, tmp_path / "a.pth")
        for raw, want in ((False, average), (True, state)):
            got = ts.load_weights(ts.build(net.arch, 3), tmp_path / "a.pth", raw=raw).state_dict()
            assert all(torch.equal(got[k], v) for k, v in want.items()), (key, raw)


@pytest.mark.parametrize("suffix", [".pth", ".npz", ".keras", ".h5", ".safetensors"])
def test_garbage_of_every_format_is_refused_in_one_line(tmp_path, suffix):
    rng = np.random.default_rng(0)
    for i, data in enumerate((b"", b"PK\x03\x04", rng.bytes(3000), b"\x89HDF\r\n\x1a\n" + rng.bytes(500), b'\x08\0\0\0\0\0\0\0{"a":1} ')):
        path = tmp_path / f"{i}{suffix}"
        path.write_bytes(data)
        with pytest.raises(WeightsError, match=f"{i}{suffix}") as error:
            open_model(path)
        assert "\n" not in str(error.value)


def test_files_that_unpack_to_far_more_than_weights_are_refused(tmp_path):
    with h5py.File(tmp_path / "bomb.h5", "w") as file:
        file.create_dataset("stem_conv/kernel", (1 << 15, 1 << 14), "f4", compression="gzip", fillvalue=0)
    np.savez_compressed(tmp_path / "bomb.npz", zeros=np.zeros(1 << 26, np.uint8))
    with zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(1 << 27))
    for name in ("bomb.h5", "bomb.npz", "bomb.pth"):
        if name == "bomb.npz":
            np.savez_compressed(tmp_path / name, zeros=np.zeros(1 << 27, np.uint8))
        with pytest.raises(WeightsError, match="unpacked"):
            open_model(tmp_path / name)


def test_links_out_of_a_keras_file_are_not_followed(tmp_path):
    with h5py.File(tmp_path / "secret.h5", "w") as file:
        file["stem_conv/stem_conv/kernel:0"] = np.ones((3, 3, 3, 32), np.float32)
    with h5py.File(tmp_path / "link.h5", "w") as file:
        file["stem_conv"] = h5py.ExternalLink("secret.h5", "/stem_conv")
    with pytest.raises(WeightsError, match="no layers with weights"):
        open_model(tmp_path / "link.h5")


def test_published_keras_weights_divide_twice_by_the_root_of_the_deviation(tmp_path):
    """keras/src/applications/efficientnet.py adds Rescaling(1 / sqrt(std)) behind a Normalization whose variance is std."""
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["normalization_2/normalization_2/mean:0"] = np.float32([0.485, 0.456, 0.406])
        file["normalization_2/normalization_2/variance:0"] = np.float32([0.229, 0.224, 0.225])
        file["normalization_2/normalization_2/count:0"] = 0
    _, about = read_keras(tmp_path / "a.h5")
    for key, want in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
        assert np.allclose(json.loads(about[key]), want, rtol=1e-6)


def test_large_networks_are_read_one_tensor_at_a_time(shared, tmp_path, monkeypatch):
    path = shared / "weights/efficientnetv2_b0/tf_efficientnetv2_b0.timm.safetensors"
    whole = ts.load_weights(ts.build(ts.arch("efficientnetv2_b0")), path).state_dict()
    monkeypatch.setattr("triscale.weights.load.LARGE", 0)
    for source in (path, shared / "golden/b0_ckpt"):
        net = ts.build(ts.arch("efficientnetv2_b0" if source == path else "efficientnet_b0"))
        state = ts.load_weights(net, source).state_dict()
        if source == path:
            assert all(torch.equal(value, whole[key]) for key, value in state.items())
    for name in ("model.ckpt.index", "model.ckpt.data-00000-of-00001"):
        shutil.copy(shared / "golden/b0_ckpt" / name, tmp_path / name)
    data = tmp_path / "model.ckpt.data-00000-of-00001"
    data.write_bytes(data.read_bytes()[:-1000])
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(CheckpointError, match="cut short"):
        ts.load_weights(net, tmp_path, raw=True)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_the_half_that_mmengine_calls_ema_holds_the_weights_themselves(tmp_path):
    """Its hook exchanges the two before it saves, and counts in `steps`."""
    net = ts.build(ts.arch("resnet18"), 3)
    state = {k: v.detach() for k, v in net.state_dict().items()}
    swapped = {"steps": torch.tensor(5), **{f"module.{k}": v + 1 for k, v in state.items()}}
    torch.save({"state_dict": state, "ema_state_dict": swapped, "meta": {}}, tmp_path / "epoch_1.pth")
    for raw, want in ((False, 0), (True, 1)):
        got = ts.load_weights(ts.build(net.arch, 3), tmp_path / "epoch_1.pth", raw=raw).state_dict()
        assert all(torch.equal(got[k], v + want) for k, v in state.items())


def test_training_scripts_checkpoints_with_their_options(tmp_path):
    """timm's .pth.tar and torchvision's keep an argparse.Namespace; and a state dict in a wrapper, handed over as it was loaded."""
    net = ts.build(ts.arch("resnet18"), 3)
    body = {"state_dict": {f"module.{k}": v for k, v in net.state_dict().items()}, "epoch": 3, "args": argparse.Namespace(lr=0.1)}
    torch.save(body, tmp_path / "model_best.pth.tar")
    for source in (tmp_path / "model_best.pth.tar", body):
        got = ts.load_weights(ts.build(net.arch, 3), source).state_dict()
        assert all(torch.equal(got[k], v) for k, v in net.state_dict().items())


def test_tensors_that_claim_more_than_the_file_holds_are_refused(tmp_path):
    state = ts.build(ts.arch("mobilenet_v2"), 2).state_dict()
    state |= {"classifier.weight": torch.zeros(1).expand(10**7, 1280), "classifier.bias": torch.zeros(1).expand(10**7)}
    torch.save(state, tmp_path / "hollow.pth")
    with pytest.raises(WeightsError, match="unpacked"):
        open_model(tmp_path / "hollow.pth")


@pytest.mark.parametrize("change", [{"dtype": []}, {"data_offsets": 5}, {"data_offsets": [0]}, {"shape": "x"}, {"dtype": None}])
def test_strange_safetensors_headers_are_one_line(tmp_path, change):
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], **change}
    for header in ({"a": entry}, {"__metadata__": [1], "a": entry}):
        text = json.dumps(header).encode()
        (tmp_path / "a.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
        with pytest.raises(WeightsError, match=r"a\.safetensors") as error:
            open_model(tmp_path / "a.safetensors")
        assert "\n" not in str(error.value)


def test_a_named_architecture_leaves_the_numerics_to_the_code_base():
    """`--arch NAME` says which network, not how torchvision's weights were trained."""
    net = torchvision.models.efficientnet_b0().eval()
    found = [open_model(net.state_dict(), arch=a)[1].arch.numerics for a in (None, ts.arch("efficientnet_b0"))]
    assert found[0] == found[1]
    assert (found[0].padding, found[0].norm_eps) == ("symmetric", 1e-5)
    own = ts.arch("efficientnet_b0")
    assert open_model(net.state_dict(), arch=own, numerics="arch")[1].arch.numerics == own.numerics


def test_networks_of_grey_images_get_grey_preprocessing():
    net, card = open_model(timm.create_model("mobilenetv2_100", in_chans=1).state_dict())
    assert (net.in_channels, card.preprocess.channels) == (1, 1)
