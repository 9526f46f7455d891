"""The dialects: one table for each code base and kind of module."""

from __future__ import annotations

from triscale.weights.dialects import Dialect, Names

_SAME = {"padding": "same", "norm_eps": 1e-3}
_OFFICIAL = {**_SAME, "running_variance": "biased"}
_TORCH = {"padding": "symmetric", "norm_eps": 1e-5}

_OURS = ("conv", "depthwise", "pointwise", "expand", "project", "conv1", "conv2", "conv3", "shortcut")
_OUR_PARTS: Names = {part: (f"{part}.conv", f"{part}.norm") for part in _OURS} | {"se": ("se.reduce", "se.expand")}
_KINDS = ("conv", "separable", "mbconv", "mbconv1", "plain_mbconv", "plain_mbconv1", "fused_mbconv", "basic", "bottleneck")

TRISCALE = Dialect(
    "triscale",
    "triscale",
    r"stem\.conv\.weight",
    {"stem": ("stem.conv", "stem.norm"), "head": ("head.conv", "head.norm"), "classifier": ("classifier", "")},
    "body.{stage}.{layer}.",
    dict.fromkeys(_KINDS, _OUR_PARTS),
)

_TIMM_SE = ("se.conv_reduce", "se.conv_expand")
_TIMM_MB1: Names = {"depthwise": ("conv_dw", "bn1"), "se": _TIMM_SE, "project": ("conv_pw", "bn2")}
_TIMM_MB: Names = {"expand": ("conv_pw", "bn1"), "depthwise": ("conv_dw", "bn2"), "se": _TIMM_SE, "project": ("conv_pwl", "bn3")}

# timm's EfficientNet builder: EfficientNet, V2, Lite, MobileNetV1 and V2, MnasNet. Its tf_ and its own networks share names
# and differ in numerics, which a file's name has to tell.
TIMM = Dialect(
    "timm",
    "timm",
    r"conv_stem\.weight",
    {"stem": ("conv_stem", "bn1"), "head": ("conv_head", "bn2"), "classifier": ("classifier", "")},
    "blocks.{stage}.{layer}.",
    {
        "conv": {"conv": ("conv", "bn1")},
        "separable": {"depthwise": ("conv_dw", "bn1"), "pointwise": ("conv_pw", "bn2")},
        "mbconv1": _TIMM_MB1,
        "mbconv": _TIMM_MB,
        "plain_mbconv1": _TIMM_MB1,
        "plain_mbconv": _TIMM_MB,
        "fused_mbconv": {"expand": ("conv_exp", "bn1"), "se": _TIMM_SE, "project": ("conv_pwl", "bn2")},
    },
    numerics=(("efficientnet.*", _TORCH),),
)


def _resnet(name: str, project: str, prefix: str, classifier: str) -> Dialect:
    parts: Names = {f"conv{i}": (f"conv{i}", f"bn{i}") for i in (1, 2, 3)} | {"shortcut": ("downsample.0", "downsample.1")}
    trunk = {"stem": (f"{prefix}conv1", f"{prefix}bn1"), "classifier": (classifier, "")}
    mark = rf"{prefix}layer1\.0\.conv1\.weight"
    return Dialect(name, project, mark, trunk, prefix + "layer{stage1}.{layer}.", {"basic": parts, "bottleneck": parts})


RESNET = _resnet("ResNet", "timm", "", "fc")
RESNET_TORCHVISION = _resnet("torchvision ResNet", "torchvision", "", "fc")  # the same names; found as RESNET, written as either

_TV_SE = ("fc1", "fc2")
_TV_TRUNK: Names = {"stem": ("features.0.0", "features.0.1"), "classifier": ("classifier.1", "")}

TORCHVISION = Dialect(
    "torchvision",
    "torchvision",
    r"features\.1\.0\.block\.0\.0\.weight",
    {**_TV_TRUNK, "head": ("features.{stage1}.0", "features.{stage1}.1")},
    "features.{stage1}.{layer}.block.",
    {
        "conv": {"conv": ("0.0", "0.1")},
        "mbconv1": {"depthwise": ("0.0", "0.1"), "se": ("1.fc1", "1.fc2"), "project": ("2.0", "2.1")},
        "mbconv": {"expand": ("0.0", "0.1"), "depthwise": ("1.0", "1.1"), "se": ("2.fc1", "2.fc2"), "project": ("3.0", "3.1")},
        "fused_mbconv": {"expand": ("0.0", "0.1"), "project": ("1.0", "1.1")},
    },
    numerics=(("efficientnet_b[0-4]", _TORCH), ("efficientnet.*", {"padding": "symmetric", "norm_eps": 1e-3})),
)

TORCHVISION_MOBILENET = Dialect(
    "torchvision MobileNetV2",
    "torchvision",
    r"features\.1\.conv\.0\.0\.weight",
    {**_TV_TRUNK, "head": ("features.{index1}.0", "features.{index1}.1")},
    "features.{index1}.conv.",
    {
        "plain_mbconv1": {"depthwise": ("0.0", "0.1"), "project": ("1", "2")},
        "plain_mbconv": {"expand": ("0.0", "0.1"), "depthwise": ("1.0", "1.1"), "project": ("2", "3")},
    },
)

_LUKE_MB: Names = {
    "expand": ("_expand_conv", "_bn0"),
    "depthwise": ("_depthwise_conv", "_bn1"),
    "se": ("_se_reduce", "_se_expand"),
    "project": ("_project_conv", "_bn2"),
}

LUKEMELAS = Dialect(
    "lukemelas EfficientNet-PyTorch",
    "lukemelas",
    r"_conv_stem\.weight",
    {"stem": ("_conv_stem", "_bn0"), "head": ("_conv_head", "_bn1"), "classifier": ("_fc", "")},
    "_blocks.{index}.",
    dict.fromkeys(("mbconv", "mbconv1"), _LUKE_MB),
    numerics=((".*", _SAME),),
)

_MM_MB: Names = {
    "expand": ("expand_conv.conv", "expand_conv.bn"),
    "depthwise": ("depthwise_conv.conv", "depthwise_conv.bn"),
    "se": ("se.conv1.conv", "se.conv2.conv"),
    "project": ("linear_conv.conv", "linear_conv.bn"),
}
_MM_OTHERS = ("neck.", "bbox_head.", "rpn_head.", "roi_head.", "data_preprocessor.")
_MM_STEM: Names = {"stem": ("backbone.layers.0.conv", "backbone.layers.0.bn"), "classifier": ("head.fc", "")}

# mmpretrain's classifiers and mmdetection's backbones have the same names.
OPENMMLAB = Dialect(
    "OpenMMLab EfficientNet",
    "openmmlab",
    r"backbone\.layers\.1\.0\.depthwise_conv\.conv\.weight",
    {**_MM_STEM, "head": ("backbone.layers.{group1}.conv", "backbone.layers.{group1}.bn")},
    "backbone.layers.{group1}.{place}.",
    dict.fromkeys(("mbconv", "mbconv1"), _MM_MB),
    others=_MM_OTHERS,
    numerics=((".*", _SAME),),
)

OPENMMLAB_V2 = Dialect(
    "OpenMMLab EfficientNetV2",
    "openmmlab",
    r"backbone\.layers\.1\.0\.conv\.weight",
    {**_MM_STEM, "head": ("backbone.layers.{stage1}.conv", "backbone.layers.{stage1}.bn")},
    "backbone.layers.{stage1}.{layer}.",
    {
        "conv": {"conv": ("conv", "bn")},
        "mbconv": _MM_MB,
        "fused_mbconv": {"expand": ("conv1.conv", "conv1.bn"), "project": ("conv2.conv", "conv2.bn")},
    },
    others=_MM_OTHERS,
    numerics=((".*", _SAME),),
)

_MM_CONVS = [(f"{i}.conv", f"{i}.bn") for i in range(3)]

OPENMMLAB_MOBILENET = Dialect(
    "OpenMMLab MobileNetV2",
    "openmmlab",
    r"backbone\.layer1\.0\.conv\.0\.conv\.weight",
    {
        "stem": ("backbone.conv1.conv", "backbone.conv1.bn"),
        "head": ("backbone.conv2.conv", "backbone.conv2.bn"),
        "classifier": ("head.fc", ""),
    },
    "backbone.layer{stage1}.{layer}.conv.",
    {
        "plain_mbconv1": dict(zip(("depthwise", "project"), _MM_CONVS, strict=False)),
        "plain_mbconv": dict(zip(("expand", "depthwise", "project"), _MM_CONVS, strict=True)),
    },
    others=_MM_OTHERS,
)

OPENMMLAB_RESNET = _resnet("OpenMMLab ResNet", "openmmlab", "backbone.", "head.fc")

_TF_SE, _TF_NORM = ("se/conv2d", "se/conv2d_1"), "tpu_batch_normalization"
_TF_LEAVES = {
    "conv.weight": "/kernel",
    "depthwise.weight": "/depthwise_kernel",
    "squeeze.weight": "/kernel",
    "squeeze.bias": "/bias",
    "classifier.weight": "/kernel",
    "classifier.bias": "/bias",
    "norm.weight": "/gamma",
    "norm.bias": "/beta",
    "norm.running_mean": "/moving_mean",
    "norm.running_var": "/moving_variance",
}
_TF_MB1: Names = {"depthwise": ("depthwise_conv2d", _TF_NORM), "se": _TF_SE, "project": ("conv2d", f"{_TF_NORM}_1")}
_TF_MB: Names = {
    "expand": ("conv2d", _TF_NORM),
    "depthwise": ("depthwise_conv2d", f"{_TF_NORM}_1"),
    "se": _TF_SE,
    "project": ("conv2d_1", f"{_TF_NORM}_2"),
}

# The official TensorFlow code's, without the network's own prefix; tf.layers numbers the layers of a scope as they are made.
OFFICIAL = Dialect(
    "official TensorFlow",
    "official",
    r"stem/conv2d/kernel",
    {"stem": ("stem/conv2d", f"stem/{_TF_NORM}"), "head": ("head/conv2d", f"head/{_TF_NORM}"), "classifier": ("head/dense", "")},
    "blocks_{index}/",
    {
        "mbconv1": _TF_MB1,
        "mbconv": _TF_MB,
        "plain_mbconv1": _TF_MB1,
        "plain_mbconv": _TF_MB,
        "fused_mbconv": {"expand": ("conv2d", _TF_NORM), "project": ("conv2d_1", f"{_TF_NORM}_1")},
        "conv": {"conv": ("conv2d", _TF_NORM)},
    },
    _TF_LEAVES,
    "tensorflow",
    numerics=((".*", _OFFICIAL),),
)

_KERAS_LEAVES = {**_TF_LEAVES, "depthwise.weight": "/kernel"}
_KERAS_SE = ("se_reduce", "se_expand")
_KERAS_TRUNK: Names = {"stem": ("stem_conv", "stem_bn"), "head": ("top_conv", "top_bn"), "classifier": ("predictions", "")}
_KERAS_MB: Names = {"expand": ("expand_conv", "expand_bn"), "se": _KERAS_SE, "project": ("project_conv", "project_bn")}
_KERAS_MB1: Names = {**_KERAS_MB, "depthwise": ("dwconv", "bn")}
_KERAS_MOBILE: Names = {p: (p, f"{p}_BN") for p in ("expand", "depthwise", "project")}
_PREPROCESSING = ("normalization",)  # a layer in front, which Keras numbers in a process that makes several: normalization_1

KERAS = Dialect(
    "Keras",
    "keras",
    r"block1a_dwconv/kernel",
    _KERAS_TRUNK,
    "block{stage1}{letter}_",
    dict.fromkeys(("mbconv", "mbconv1"), _KERAS_MB1),
    _KERAS_LEAVES,
    "tensorflow",
    _PREPROCESSING,
    numerics=((".*", _OFFICIAL),),
)

KERAS_V2 = Dialect(
    "Keras EfficientNetV2",
    "keras",
    r"block1a_project_conv/kernel",  # no block1a_dwconv: KERAS is asked first
    _KERAS_TRUNK,
    "block{stage1}{letter}_",
    {
        "conv": {"conv": ("project_conv", "project_bn")},
        "mbconv": {**_KERAS_MB, "depthwise": ("dwconv2", "bn")},
        "fused_mbconv": _KERAS_MB,
    },
    _KERAS_LEAVES,
    "tensorflow",
    _PREPROCESSING,
    numerics=((".*", _OFFICIAL),),
)

KERAS_MOBILENET = Dialect(
    "Keras MobileNetV2",
    "keras",
    r"expanded_conv_depthwise/kernel",
    {"stem": ("Conv1", "bn_Conv1"), "head": ("Conv_1", "Conv_1_bn"), "classifier": ("predictions", "")},
    "block_{index}_",
    dict.fromkeys(("plain_mbconv", "plain_mbconv1"), _KERAS_MOBILE),
    _KERAS_LEAVES,
    "tensorflow",
    first={(0, 0): "expanded_conv_"},
    numerics=((".*", _OFFICIAL),),
)

# In the order in which names are held to their marks.
DIALECTS = (
    TRISCALE,
    TIMM,
    RESNET,
    RESNET_TORCHVISION,
    TORCHVISION,
    TORCHVISION_MOBILENET,
    LUKEMELAS,
    OPENMMLAB,
    OPENMMLAB_V2,
    OPENMMLAB_MOBILENET,
    OPENMMLAB_RESNET,
    OFFICIAL,
    KERAS,
    KERAS_V2,
    KERAS_MOBILENET,
)
