"""Name maps: every tensor of every network has one name in timm's code, and translation is strict."""

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import meta_build
from strategies import archs

import triscale as ts
from triscale.weights.dialects import dialect_of, names
from triscale.weights.load import translate
from triscale.weights.match import identify
from triscale.weights.parts import tensors
from triscale.weights.tables import DIALECTS, TIMM, TRISCALE

OPENMMLAB = Path(__file__).parent / "data" / "openmmlab.json.gz"


def timm_names(arch):
    return names(arch, dialect_of("timm", arch))


PAIRS = {
    "tf_efficientnet_b1": "efficientnet_b1",
    "tf_efficientnetv2_b3": "efficientnetv2_b3",
    "tf_efficientnetv2_s": "efficientnetv2_s",
    "tf_efficientnet_lite4": "efficientnet_lite4",
    "mobilenetv1_100": "mobilenet_v1",
    "mobilenetv2_100": "mobilenet_v2",
    "semnasnet_100": "mnasnet_a1",
    "resnet18": "resnet18",
    "resnet34": "resnet34",
    "resnet152": "resnet152",
}


@pytest.mark.parametrize("name", PAIRS)
def test_every_tensor_of_timms_networks_is_found(name):
    """Names and shapes of timm's own modules, so the tables are held to its code and not to a copy of them."""
    arch = ts.arch(PAIRS[name])
    with torch.device("meta"):
        state = timm.create_model(name).state_dict()
    ours = translate(state, arch)
    expected = meta_build(arch).state_dict()
    assert {key: t.shape for key, t in ours.items()} == {key: t.shape for key, t in expected.items()}
    theirs = timm_names(arch)
    back = {theirs[key]: t for key, t in ours.items()}
    assert back.keys() == {key for key in state if not key.endswith("num_batches_tracked")}
    assert all(back[key] is state[key] for key in back)


@pytest.mark.parametrize("kind", ["missing", "left over", "another shape", "twice"])
def test_translate_is_strict(kind):
    arch = ts.arch("mobilenet_v2")
    state = {name: torch.zeros(()).expand(shape) for name, shape in zip(timm_names(arch).values(), shapes_of(arch), strict=True)}
    assert len(translate(state, arch)) == len(state)
    if kind == "missing":
        for name in [n for n in state if ".bn1." in n][:12]:
            del state[name]
        expected = r"12 missing: blocks\.0\.0\.bn1\.weight, .*, \.\.\. and 2 more"
    elif kind == "left over":
        state |= {"aux.weight": torch.zeros(3), "blocks.9.0.bn1.weight": torch.zeros(3)}
        expected = r"2 left over: aux\.weight, blocks\.9\.0\.bn1\.weight$"
    elif kind == "another shape":
        state["classifier.weight"] = torch.zeros(10, 1280)
        expected = r"1 of another shape: classifier\.weight \(10, 1280\) instead of \(1000, 1280\)"
    else:  # both names of one layer: the one that isn't this dialect's is left over
        state["stem.conv.bias"] = state["conv_stem.weight"]
        expected = r"1 left over: stem\.conv\.bias"
    with pytest.raises(ValueError, match=expected):
        translate(state, arch)


def shapes_of(arch):
    return [t.shape for t in meta_build(arch).state_dict().values()]


def test_translate_drops_batch_counters_and_reads_our_own_names():
    arch = ts.arch("resnet18")
    state = timm.create_model("resnet18").state_dict()
    assert "bn1.num_batches_tracked" in state
    ours = translate(state, arch)
    assert "stem.conv.weight" in ours
    again = translate(ours, arch)
    assert all(again[key] is ours[key] for key in ours)
    assert len(set(timm_names(arch).values())) == len(ours)
    with pytest.raises(ValueError, match="no known dialect"):
        translate({"backbone.conv.weight": torch.zeros(1)}, arch)


def test_a_part_without_a_name_is_refused():
    squeezed_conv = replace(ts.arch("resnet18"), stages=(ts.Stage("conv", 3, 1, 1, 0.25, "none", 64, 1),))
    with pytest.raises(ValueError, match="timm names have none for 'se' in a block 'conv'"):
        timm_names(squeezed_conv)


def test_templates_count_from_one_where_they_say_so():
    """What other code bases need: a running block index, stages from 1, another separator and other leaf names."""
    flat = replace(
        TIMM, name="flat", block="b{index1}_s{stage1}_{layer1}.", leaves={"norm.running_var": "/moving_variance", "depthwise.weight": "/dw"}
    )
    got = names(ts.arch("efficientnet_b0"), flat)
    assert got["body.1.1.expand.norm.running_var"] == "b3_s2_2.bn1/moving_variance"
    assert got["body.1.1.depthwise.conv.weight"] == "b3_s2_2.conv_dw/dw"
    assert got["body.1.1.expand.conv.weight"] == "b3_s2_2.conv_pw.weight"
    assert got["body.1.1.se.expand.bias"] == "b3_s2_2.se.conv_expand.bias"


@pytest.mark.parametrize("name", ["efficientnet_b0", "efficientnetv2_b0", "mobilenet_v1", "resnet18", "resnet50"])
def test_our_own_names_map_to_themselves(name):
    assert all(key == value for key, value in names(ts.arch(name), TRISCALE).items())


def test_other_classes_and_input_channels():
    arch = ts.arch("mobilenet_v2")
    theirs = timm_names(arch)
    state = {theirs[key]: t for key, t in meta_build(arch, 7, 1).state_dict().items()}
    assert translate(state, arch, 7, 1)["classifier.weight"].shape == (7, 1280)
    with pytest.raises(ValueError, match=r"3 of another shape: conv_stem\.weight \(32, 1, 3, 3\) instead of \(32, 3, 3, 3\)"):
        translate(state, arch)


@pytest.fixture(scope="module")
def openmmlab():
    """Names and shapes of OpenMMLab's own modules, written by studies/openmmlab/peer.py."""
    return {name: {k: tuple(s) for k, s in t.items()} for name, t in json.loads(gzip.decompress(OPENMMLAB.read_bytes())).items()}


def test_openmmlabs_tensors_both_ways(openmmlab):
    assert {f"efficientnet_b{i}" for i in range(5)} < openmmlab.keys()
    for name, shapes in openmmlab.items():
        assert identify(shapes).arch.name == name
        arch = ts.arch(name)
        dialect = dialect_of("openmmlab", arch)
        ours = tensors(arch)
        written = {theirs: dialect.shape(key, ours[key]) for key, theirs in dialect.names(arch, ours).items()}
        assert written == shapes, name


def detector(shapes):
    """A RetinaNet of mmdetection on this backbone: no head convolution, a neck and heads (a few of their names)."""
    backbone = {k: s for k, s in shapes.items() if not k.startswith(("backbone.layers.6.", "head."))}
    others = {"neck.lateral_convs.0.conv.weight": (256, 48, 1, 1), "neck.fpn_convs.0.bn.weight": (256,)}
    return backbone | others | {"bbox_head.cls_convs.0.0.bn.weight": (256,), "bbox_head.retina_cls.weight": (720, 256, 3, 3)}


def test_a_detectors_backbone_is_a_trunk(openmmlab):
    """retinanet_effb3_fpn_crop896_8x4_1x_coco: mmdetection leaves out the layer behind the outputs that it uses."""
    state = {k: torch.rand(s) for k, s in detector(openmmlab["efficientnet_b3"]).items()}
    assert identify({k: tuple(v.shape) for k, v in state.items()}).arch.name == "efficientnet_b3"
    net = ts.build(ts.arch("efficientnet_b3"), 7)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(ValueError, match=r"7 missing: backbone\.layers\.6\.conv\.weight.*4 left over: neck"):
        ts.load_weights(net, state)
    with pytest.warns(UserWarning, match=r"fresh, not from the checkpoint: the classifier of 7 classes, backbone\.layers\.6\.conv\.weight"):
        ts.load_weights(net, state, transfer=True)
    after = net.state_dict()
    assert torch.equal(after["body.5.3.depthwise.conv.weight"], state["backbone.layers.5.3.depthwise_conv.conv.weight"])
    assert torch.equal(after["body.6.1.project.norm.running_var"], state["backbone.layers.5.7.linear_conv.bn.running_var"])
    for key, value in after.items():
        assert torch.equal(value, before[key]) == key.startswith(("head.", "classifier.")), key


@given(archs(), st.integers(0, 5), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_names_and_shapes_by_arithmetic_are_the_modules(arch, classes, channels):
    built = {key: tuple(t.shape) for key, t in meta_build(arch, classes, channels).state_dict().items()}
    assert list(tensors(arch, classes, channels).items()) == list(built.items())


@pytest.mark.parametrize("name", ts.names())
def test_every_named_network_is_recognised_in_every_dialect_that_has_it(name):
    arch = ts.arch(name)
    ours = tensors(arch, 21)
    found = []
    for project in dict.fromkeys(d.project for d in DIALECTS):
        try:
            dialect = dialect_of(project, arch)
        except ValueError:
            continue
        shapes = {theirs: dialect.shape(key, ours[key]) for key, theirs in dialect.names(arch, ours).items()}
        assert len(shapes) == len(ours)
        identity = identify(shapes)
        same = {"efficientnet_l2_475": "efficientnet_l2"}.get(name, name)  # two sizes of one network
        assert (identity.arch.name, identity.num_classes, identity.in_channels) == (same, 21, 3), project
        assert identity.dialect is dialect or {identity.dialect.name, dialect.name} == {"ResNet", "torchvision ResNet"}
        found.append(project)
    assert {"triscale", "timm"} <= set(found)
    if name.startswith("efficientnet_b"):
        assert found == ["triscale", "timm", "torchvision", "lukemelas", "openmmlab", "official", "keras"]


def test_networks_of_no_name_need_their_architecture():
    arch = ts.scale(ts.arch("efficientnet_b0"), width=1.7, depth=0.6)
    theirs = timm_names(arch)
    shapes = {theirs[k]: s for k, s in tensors(arch).items()}
    with pytest.raises(ValueError, match=r"of no named network.*give its architecture"):
        identify(shapes)
    assert identify(shapes, arch, numerics_too=True).arch == arch
