"""Weights to and from the peers' own code: equal outputs one way, their own strict loaders the other way."""

import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
import timm
import torch
import torchvision
from efficientnet_pytorch import EfficientNet
from networks import assert_alive, error, images, randomise

from triscale.weights.convert import write_as
from triscale.weights.open import open_model

SIZE = 75  # SAME and symmetric padding differ


PEERS = {
    **{f"timm/tf_efficientnet_b{i}": f"efficientnet_b{i}" for i in range(5)},
    **{f"timm/efficientnet_b{i}": f"efficientnet_b{i}" for i in (0, 3)},
    "timm/tf_efficientnetv2_b1": "efficientnetv2_b1",
    "timm/tf_efficientnet_lite1": "efficientnet_lite1",
    "timm/mobilenetv2_100": "mobilenet_v2",
    "timm/resnet50": "resnet50",
    **{f"torchvision/efficientnet_b{i}": f"efficientnet_b{i}" for i in range(6)},
    "torchvision/efficientnet_v2_s": "efficientnetv2_s",
    "torchvision/mobilenet_v2": "mobilenet_v2",
    "torchvision/resnet18": "resnet18",
    **{f"lukemelas/efficientnet-b{i}": f"efficientnet_b{i}" for i in range(5)},
}


def peer(name):
    project, own = name.split("/")
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if project == "timm":
            return timm.create_model(own)
        if project == "torchvision":
            return getattr(torchvision.models, own)()
        net = EfficientNet.from_name(own)
        net.set_swish(memory_efficient=False)
        return net


@pytest.mark.parametrize("name", PEERS)
def test_the_peers_own_network_both_ways(name, tmp_path):
    theirs = peer(name)
    randomise(theirs, images(2, (128, 128), seed=0))
    path = tmp_path / f"{name.split('/')[1]}.pth"  # timm's tf_ in a file's name tells its numerics
    torch.save(theirs.state_dict(), path)
    ours, card = open_model(path)
    assert card.arch.name == PEERS[name]
    # lukemelas' padding is fixed to the native size when it is built
    size = card.arch.resolution if name.startswith("lukemelas") else SIZE
    x = images(2, (size, size), seed=1)
    with torch.no_grad():
        before = theirs(x)
        assert_alive(before)
        assert error(ours(x), before) <= 1e-5
    fresh = peer(name)
    project = name.split("/")[0]
    said = write_as(tmp_path / "back.pth", ours, card, project)
    assert bool(said) == ("timm/tf_" in name)
    # strict; torch alone would accept batch counters that are missing, so the names are compared as well
    state = torch.load(tmp_path / "back.pth", weights_only=True)
    assert state.keys() == {key for key in fresh.state_dict() if not key.endswith("num_batches_tracked")}
    counters = {k: v for k, v in fresh.state_dict().items() if k.endswith("num_batches_tracked")}
    fresh.load_state_dict({**state, **counters}, strict=True)
    with torch.no_grad():
        assert torch.equal(fresh.eval()(x), before)


KERAS = {
    **{f"EfficientNetB{i}": f"efficientnet_b{i}" for i in range(5)},
    "EfficientNetV2B0": "efficientnetv2_b0",
    "EfficientNetV2S": "efficientnetv2_s",
    "MobileNetV2": "mobilenet_v2",
}
START = """
import os, sys
os.environ["KERAS_BACKEND"] = "torch"
import keras, numpy as np, torch
torch.set_num_threads(1)
keras.utils.set_random_seed(0)
folder, names = sys.argv[1], sys.argv[2:]
x = np.random.default_rng(0).uniform(0, 255, (4, 64, 64, 3)).astype("float32")

def build(name):
    net = getattr(keras.applications, name)(weights=None, input_shape=(64, 64, 3))
    for layer in net.layers:
        if isinstance(layer, keras.layers.Normalization) and layer.input_mean is None:
            layer.adapt_mean.assign([0.485, 0.456, 0.406])
            layer.adapt_variance.assign([0.229**2, 0.224**2, 0.225**2])
            layer.finalize_state()
    return net

def outputs(name, net):
    with torch.no_grad():  # MobileNetV2's preprocessing is no layer of it
        return keras.ops.convert_to_numpy(net(x / 127.5 - 1 if name == "MobileNetV2" else x, training=False))
"""
WRITE = (
    START
    + """
rng = np.random.default_rng(1)
for name in names:
    net = build(name)
    norms = [layer for layer in net.layers if isinstance(layer, keras.layers.BatchNormalization)]
    for norm in norms:
        norm.gamma.assign(rng.uniform(0.5, 1.5, norm.gamma.shape))
        norm.beta.assign(rng.normal(0.5, 0.5, norm.beta.shape))
        norm.momentum = 0.0  # the statistics of the images below, so that the signal stays alive
    with torch.no_grad():
        net(x, training=True)
    net.save(f"{folder}/{name}.keras")
    net.save(f"{folder}/{name}.h5")
    net.save_weights(f"{folder}/{name}.weights.h5")
    np.save(f"{folder}/{name}.npy", outputs(name, net))
np.save(f"{folder}/x.npy", x)
"""
)
READ = (
    START
    + """
for name in names:
    net = build(name)
    with np.load(f"{folder}/{name}.back.npz") as file:
        own = {w.path: w for w in net.weights if not w.path.startswith("normalization")}
        assert own.keys() == set(file.files), own.keys() ^ set(file.files)
        for path, w in own.items():
            assert tuple(w.shape) == file[path].shape, path
            w.assign(file[path])
    want = np.load(f"{folder}/{name}.npy")
    error = abs(outputs(name, net) - want).max() / abs(want).max()
    assert error < 1e-6, (name, error)
"""
)


def run_keras(code, folder):
    """In a process of its own: Keras reads its backend when it is imported."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run([sys.executable, "-c", code, str(folder), *KERAS], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope="module")
def keras_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keras")
    run_keras(WRITE, folder)
    return folder


@pytest.mark.parametrize("name", KERAS)
def test_keras_files_give_keras_outputs(keras_files, name):
    """Pixels in, probabilities out: its normalisation layers are part of what is read."""
    x, want = (torch.from_numpy(np.load(keras_files / f)) for f in ("x.npy", f"{name}.npy"))
    assert_alive(want)
    for suffix in (".keras", ".h5", ".weights.h5"):
        net, card = open_model(keras_files / f"{name}{suffix}")
        assert card.arch.name == KERAS[name]
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (card.preprocess.mean, card.preprocess.std))
        with torch.no_grad():
            got = net((x.permute(0, 3, 1, 2) - mean) / std).softmax(1)
        assert error(got, want) <= 1e-5, suffix
    assert write_as(keras_files / f"{name}.back.npz", net, card, "keras-npz") == []
    again, _ = open_model(keras_files / f"{name}.back.npz")
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in net.state_dict().items())


def test_keras_networks_take_back_what_was_written(keras_files):
    """Every weight of theirs once, of its shape, and the same outputs."""
    for name in KERAS:
        if not (keras_files / f"{name}.back.npz").exists():
            net, card = open_model(keras_files / f"{name}.keras")
            write_as(keras_files / f"{name}.back.npz", net, card, "keras-npz")
    run_keras(READ, keras_files)
