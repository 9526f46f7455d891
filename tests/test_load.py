"""Real checkpoints into networks: the official TensorFlow one against its golden outputs, real weights, broken files."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import triscale as ts
from triscale.weights.dialects import WeightsError
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
