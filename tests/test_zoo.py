"""The table of published checkpoints against the libraries that publish them, and networks made from it."""

import importlib.util
import io
import math
import re
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from local_server import Served, serving
from safetensors.torch import save

import triscale as ts
from triscale.naming import UnknownNameError
from triscale.recipe import IMAGENET_MEAN, UNIT_MEAN, Preprocess
from triscale.weights import create, tables
from triscale.weights.create import create_model
from triscale.weights.dialects import WeightsError
from triscale.weights.load import WeightsWarning
from triscale.weights.parts import tensors
from triscale.weights.zoo import entries, find

ROWS = entries()
COMMON = {"imagenet", "imagenet-aa", "imagenet-advprop", "imagenet-ns", "imagenet21k", "imagenet21k-ft", ""}
# OpenMMLab's measurements of the official checkpoints, B0 to B8.
OFFICIAL_TOP1 = {
    "imagenet": (76.74, 78.68, 79.64, 81.01, 82.57, 83.18),
    "imagenet-aa": (77.26, 79.20, 80.21, 81.58, 82.95, 83.82, 84.05, 84.38),
    "imagenet-advprop": (77.53, 79.52, 80.45, 81.81, 83.25, 84.21, 84.74, 85.14, 85.38),
    "imagenet-ns": (77.63, 81.44, 82.47, 84.02, 85.25, 86.08, 86.47, 86.83),
}


def of(source):
    return [entry for entry in ROWS if entry.source == source]


def test_every_row_is_whole():
    assert len(ROWS) == 280
    for unique in ("name", "where"):
        assert len({getattr(e, unique) for e in ROWS}) == len(ROWS)
    tagged = [(e.arch, e.source, e.tag) for e in ROWS if e.tag]
    assert len(set(tagged)) == len(tagged)
    assert {e.arch for e in ROWS} == set(ts.names())
    for e in ROWS:
        assert e.tag in COMMON, e.name
        assert re.fullmatch(r"sha256:[0-9a-f]{8}|md5:[0-9a-f]{32}|", e.hash), e.name
        assert re.fullmatch(r"https://[^ ]+\.(pth|h5|tgz|tar\.gz)" if e.is_url else r"timm/[a-z0-9_.]+", e.where), e.name
        assert e.classes in (1000, 21843, 11821), e.name
        assert e.top1 is None or 65 < e.top1 < 89, e.name
        assert e.top5 is None or e.top1 < e.top5 < 99, e.name
        assert e.preprocess == Preprocess.from_dict(e.preprocess.to_dict()), e.name
        assert e.network().topology == ts.arch(e.arch).topology
        if e.hash.startswith("sha256:"):
            assert e.where.endswith(f"-{e.hash[7:]}.pth"), e.name


def names_of(dialect, arch):
    try:
        return dialect.names(arch, tensors(arch))
    except WeightsError:
        return None


def test_rows_and_dialects_agree_on_names_and_numerics():
    for e in ROWS:
        arch = ts.arch(e.arch)
        fitting = [dialect for dialect in tables.DIALECTS if dialect.project == e.source and names_of(dialect, arch)]
        assert fitting, e.name
        if not e.where.startswith("timm/tf_"):  # their names are those of timm's own networks, their numerics are not
            numerics = {(n.padding, n.norm_eps) for n in (dialect.computes(arch).numerics for dialect in fitting)}
            assert (e.network().numerics.padding, e.network().numerics.norm_eps) in numerics, e.name


def test_timms_rows_are_its_registrys():
    from timm.models._registry import _model_pretrained_cfgs as registry

    known = {f"timm/{name}": cfg for name, cfg in registry.items() if cfg.hf_hub_id == f"timm/{name}"}
    for e in of("timm"):
        cfg, p = known[e.where], e.preprocess
        assert p.size == (cfg.test_input_size or cfg.input_size)[1], e.name
        assert p.size + p.crop_padding == math.floor(p.size / (cfg.test_crop_pct or cfg.crop_pct)), e.name
        assert p.crop == {"center": "after", "squash": "squash"}[cfg.crop_mode], e.name
        assert p.interpolation == cfg.interpolation, e.name
        assert p.mean == tuple(255 * m for m in cfg.mean), e.name
        assert p.std == tuple(255 * s for s in cfg.std), e.name
        assert e.classes == cfg.num_classes, e.name
        assert e.where.endswith(f".{e.own}")


def test_every_checkpoint_of_timm_that_fits_is_there():
    from timm.models._registry import _model_pretrained_cfgs as registry

    ours = {"mobilenetv1_100": "mobilenet_v1", "mobilenetv2_100": "mobilenet_v2", "semnasnet_100": "mnasnet_a1"} | {n: n for n in ts.names()}
    theirs = {
        cfg.hf_hub_id
        for name, cfg in registry.items()
        if "." in name and cfg.hf_hub_id and cfg.num_classes and name.split(".")[0].removeprefix("tf_") in ours
    }
    assert theirs - {e.where for e in of("timm")} == set()


@pytest.mark.parametrize(
    "name", ["tf_efficientnet_b0.aa_in1k", "efficientnet_b1.ft_in1k", "tf_efficientnetv2_b0.in1k", "mobilenetv1_100.ra4_e3600_r224_in1k"]
)
def test_numerics_are_those_of_timms_modules(name):
    import timm
    from timm.layers import Conv2dSame

    entry = next(e for e in ROWS if e.where == f"timm/{name}")
    with torch.device("meta"):
        net = timm.create_model(name.split(".")[0])
    numerics = entry.network().numerics
    assert {m.eps for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)} == {numerics.norm_eps}
    assert any(isinstance(m, Conv2dSame) for m in net.modules()) == (numerics.padding == "same")


def test_torchvisions_rows_are_its_enums():
    from torchvision.models import get_model, get_model_weights

    for e in of("torchvision"):
        name = re.sub("^efficientnetv2_", "efficientnet_v2_", e.arch)
        weights = get_model_weights(name)[e.own]
        shown, p = weights.transforms(), e.preprocess
        assert e.where == weights.url
        assert ([p.size], [p.size + p.crop_padding]) == (shown.crop_size, shown.resize_size), e.name
        assert (p.crop, p.interpolation) == ("after", shown.interpolation.value), e.name
        assert p.mean == tuple(255 * m for m in shown.mean), e.name
        assert p.std == tuple(255 * s for s in shown.std), e.name
        assert e.classes == len(weights.meta["categories"]), e.name
        assert {"acc@1": e.top1, "acc@5": e.top5} == weights.meta["_metrics"]["ImageNet-1K"], e.name
        with torch.device("meta"):
            net = get_model(name)
        numerics = e.network().numerics
        assert {m.eps for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)} == {numerics.norm_eps}, e.name
        assert numerics.padding == "symmetric", e.name
    listed = {(e.arch, e.own) for e in of("torchvision")}
    for name in {e.arch for e in of("torchvision")}:
        assert {(name, w.name) for w in get_model_weights(re.sub("^efficientnetv2_", "efficientnet_v2_", name))} <= listed


def test_kerass_rows_are_its_sources():
    spec = importlib.util.find_spec("keras")  # read, not imported: that takes a backend and seconds
    if spec is None:
        pytest.skip("keras is not installed")
    for file, family in (("efficientnet", "efficientnet_"), ("efficientnet_v2", "efficientnetv2_")):
        text = (Path(spec.origin).parent / "src" / "applications" / f"{file}.py").read_text()
        base = re.search(r'BASE_WEIGHTS_PATH = "([^"]+)"', text)[1]
        hashes = {family + name.strip("-"): "md5:" + md5 for name, md5 in re.findall(r'"(-?\w+)": \(\s*"(\w{32})"', text)}
        rows = {e.arch: e for e in of("keras") if e.arch.startswith(family)}
        assert {name: e.hash for name, e in rows.items()} == hashes
        for name, e in rows.items():
            assert e.where == base + name.replace("efficientnet_", "efficientnet").replace("_", "-") + ".h5"


def test_the_official_family_is_there_from_three_sources():
    for tag, values in OFFICIAL_TOP1.items():
        for i, top1 in enumerate(values):
            assert find(f"efficientnet_b{i}", f"openmmlab/{tag}").top1 == top1
            assert abs(find(f"efficientnet_b{i}", f"official/{tag}").top1 - top1) < 1.2
            assert find(f"efficientnet_b{i}", f"timm/{tag}").source == "timm"
    assert find("efficientnet_l2", "openmmlab/imagenet-ns").top1 == 88.33
    assert {find(name, "official/imagenet-ns").preprocess.size for name in ("efficientnet_l2", "efficientnet_l2_475")} == {800, 475}
    for e in of("official") + of("openmmlab"):
        if re.match(r"efficientnet_(b|l2)", e.arch):
            p = e.preprocess
            assert (p.size, p.crop, p.crop_padding) == (ts.arch(e.arch).resolution, "before", 32), e.name
            assert p.interpolation == ("bicubic-tf" if e.source == "official" else "bicubic"), e.name
            assert p.mean == (UNIT_MEAN if e.tag == "imagenet-advprop" else IMAGENET_MEAN), e.name
            numerics = e.network().numerics
            assert (numerics.padding, numerics.norm_eps) == ("same", 1e-3), e.name


def test_short_names_and_full_names():
    assert find("efficientnet_b0", "imagenet-aa").where == "timm/tf_efficientnet_b0.aa_in1k"
    assert find("efficientnet_b0", "timm/aa_in1k") == find("efficientnet_b0", "timm/imagenet-aa")
    assert find("efficientnet_b0", "official/imagenet-aa").where.endswith("/ckptsaug/efficientnet-b0.tar.gz")
    assert find("mobilenet_v2", "imagenet").name == "mobilenet_v2:torchvision/IMAGENET1K_V1"
    assert find("efficientnetv2_b0", "keras/imagenet").hash == "md5:21ecbf6da12460d5c40bb2f29ceb2188"
    for tag in ("imagenet21k", "imagenet21k-ft"):
        assert find("efficientnetv2_s", tag).source == "timm"
    assert entries("efficientnet_b8") == tuple(e for e in ROWS if e.arch == "efficientnet_b8")


@pytest.mark.parametrize("weights", ["imagenet-av", "timm/", "", "/", "official/imagenet", "IMAGENET1K_V1"])
def test_an_unknown_tag_tells_what_there_is(weights):
    with pytest.raises(UnknownNameError) as error:
        find("efficientnet_b8", weights)
    assert f"unknown weights for efficientnet_b8 '{weights}'" in str(error.value)
    assert "there are imagenet-advprop, timm/ap_in1k, timm/ra_in1k, openmmlab/3rdparty_8xb32-aa-advprop_in1k" in str(error.value)
    assert "\n" not in str(error.value)


def test_an_unknown_network():
    for ask in (lambda: find("efficientnet_b9", "imagenet"), lambda: entries("efficientnet_b9"), lambda: create_model("efficientnet_b9")):
        with pytest.raises(UnknownNameError, match="'efficientnet_b9'; nearest is 'efficientnet_b"):
            ask()


@pytest.fixture
def served(tmp_path, monkeypatch):
    """make(entry, content): create_model finds that entry, with its file (bytes, or a state dict) on a server of this machine."""
    monkeypatch.setenv("TRISCALE_HOME", str(tmp_path))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serving() as server:

        def make(entry, content, path="/model.safetensors"):
            data = content if isinstance(content, bytes) else save({k: v.contiguous() for k, v in content.items()})
            server.files[path] = Served(data, cuts=[1_000_000])
            monkeypatch.setattr(create, "find", lambda name, weights: replace(entry, where=server.url(path), hash=""))

        yield make


def apart(ours, theirs):
    return float((ours - theirs).abs().max() / theirs.abs().max())


def random_timm(name, **options):
    """A network of timm whose norms are no identities, so that numerics show."""
    import timm

    torch.manual_seed(0)
    net = timm.create_model(name, **options).eval()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_var, 0.3, 1.0)
            torch.nn.init.normal_(module.running_mean, std=0.1)
            torch.nn.init.uniform_(module.weight, 0.3, 0.7)
    return net


@pytest.mark.parametrize(
    ("theirs", "name", "weights"),
    [
        ("tf_efficientnet_b0", "efficientnet_b0", "imagenet-aa"),
        ("efficientnet_b0", "efficientnet_b0", "timm/ra_in1k"),
        ("mobilenetv2_100", "mobilenet_v2", "timm/ra_in1k"),
    ],
)
def test_a_fetched_network_gives_timms_logits(served, theirs, name, weights):
    reference = random_timm(theirs)
    entry = find(name, weights)
    served(entry, reference.state_dict())
    net = create_model(name, weights=weights)
    assert not net.training
    assert net.preprocess == entry.preprocess
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected, found = reference(x), net(x)
        other = ts.load_weights(ts.build(ts.arch(name).with_numerics(padding="symmetric", norm_eps=5e-4)).eval(), reference.state_dict())(x)
    assert apart(found, expected) <= 1e-5
    assert apart(other, expected) > 1e-4  # the comparison sees numerics


def test_a_fetched_official_archive_gives_the_official_logits(served, shared):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=0) as tar:
        tar.add(shared / "golden/b0_ckpt", "efficientnet-b0")
    served(find("efficientnet_b0", "official/imagenet-aa"), buffer.getvalue(), "/ckptsaug/efficientnet-b0.tar.gz")
    net = create_model("efficientnet_b0", "official/imagenet-aa")
    golden = dict(np.load(shared / "golden/b0_eval.npz"))
    with torch.no_grad():
        assert apart(net(torch.from_numpy(golden["input"]).permute(0, 3, 1, 2)), torch.from_numpy(golden["logits_ema"])) <= 1e-5
    assert net.preprocess.interpolation == "bicubic-tf"


def test_another_number_of_classes_is_said_once_and_the_trunk_is_there(served):
    reference = random_timm("mobilenetv2_100")
    served(find("mobilenet_v2", "timm/ra_in1k"), reference.state_dict())
    with pytest.warns(WeightsWarning, match="the classifier of 7 classes") as warned:
        net = create_model("mobilenet_v2", "timm/ra_in1k", num_classes=7)
    assert len(warned) == 1
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert net(x).shape == (1, 7)
        assert apart(net.features(x), reference.forward_features(x)) <= 1e-5
    assert create_model("mobilenet_v2", "timm/ra_in1k", num_classes=0, offline=True).classifier is None
    with pytest.raises(WeightsError, match="trained on 3 input channels, not 1"):
        create_model("mobilenet_v2", "timm/ra_in1k", in_channels=1, offline=True)


def test_a_file_in_place_of_a_tag(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    reference = random_timm("mobilenetv2_100", num_classes=5)
    path = tmp_path / "net.safetensors"
    path.write_bytes(save({k: v.contiguous() for k, v in reference.state_dict().items()}))
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for weights in (path, "net.safetensors"):
            net = create_model("mobilenet_v2", weights)
            assert apart(net(x), reference(x)) <= 1e-5
            assert (net.num_classes, net.preprocess.size, net.training) == (5, 224, False)
    with pytest.raises(WeightsError, match="holds mobilenet_v2, not mobilenet_v1"):
        create_model("mobilenet_v1", path)
    with pytest.warns(WeightsWarning, match="the classifier of 3 classes"):
        assert create_model("mobilenet_v2", path, num_classes=3).num_classes == 3
    (tmp_path / "imagenet").mkdir()  # a folder of images, most likely
    with pytest.raises(OSError, match="not in the cache, and offline"):
        create_model("mobilenet_v2", "imagenet", offline=True)


def test_without_weights_the_network_is_fresh_and_in_training_mode():
    net = create_model("mobilenet_v2", num_classes=3, in_channels=1)
    assert net.training
    assert (net.num_classes, net.in_channels, net.preprocess.channels) == (3, 1, 1)
    net = create_model("mobilenet_v2")
    assert (net.num_classes, net.preprocess) == (1000, Preprocess(224))
