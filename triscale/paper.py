"""The numbers that the EfficientNet paper prints, as rows: Tables 1, 2, 3, 5 and 7.

Costs are texts, exactly as printed, because the digits that the paper keeps are part of what it says ("0.39", "19"):
parameters in millions, MACs in billions. The paper calls MACs (multiply-adds) "FLOPS". Accuracies are percentages on the
ImageNet validation set. None: the paper gives no such number, or it isn't kept here.

Source: Tan & Le, ICML 2019 (arXiv 1905.11946, version 5).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StageRow:
    """Table 1. `resolution`: of the stage's input. `stride`: of its first layer (not printed in the table; from the text and code)."""

    operator: str
    resolution: int
    channels: int
    layers: int
    stride: int


TABLE1: tuple[StageRow, ...] = (
    #        operator                px channels layers stride
    StageRow("Conv 3x3", 224, 32, 1, 2),
    StageRow("MBConv1 k3", 112, 16, 1, 1),
    StageRow("MBConv6 k3", 112, 24, 2, 2),
    StageRow("MBConv6 k5", 56, 40, 2, 2),
    StageRow("MBConv6 k3", 28, 80, 3, 2),
    StageRow("MBConv6 k5", 14, 112, 3, 1),
    StageRow("MBConv6 k5", 14, 192, 4, 2),
    StageRow("MBConv6 k3", 7, 320, 1, 1),
    StageRow("Conv 1x1, pooling, FC", 7, 1280, 1, 1),
)


@dataclass(frozen=True)
class NetworkRow:
    """Table 2. `arch`: the name under which `families.arch` knows the network, None where it has no rows there."""

    name: str
    params: str
    macs: str | None
    arch: str | None = None
    top1: float | None = None
    top5: float | None = None


TABLE2: tuple[NetworkRow, ...] = (
    NetworkRow("EfficientNet-B0", "5.3", "0.39", "efficientnet_b0", 77.1, 93.3),
    NetworkRow("EfficientNet-B1", "7.8", "0.70", "efficientnet_b1", 79.1, 94.4),
    NetworkRow("EfficientNet-B2", "9.2", "1.0", "efficientnet_b2", 80.1, 94.9),
    NetworkRow("EfficientNet-B3", "12", "1.8", "efficientnet_b3", 81.6, 95.7),
    NetworkRow("EfficientNet-B4", "19", "4.2", "efficientnet_b4", 82.9, 96.4),
    NetworkRow("EfficientNet-B5", "30", "9.9", "efficientnet_b5", 83.6, 96.7),
    NetworkRow("EfficientNet-B6", "43", "19", "efficientnet_b6", 84.0, 96.8),
    NetworkRow("EfficientNet-B7", "66", "37", "efficientnet_b7", 84.3, 97.0),
    NetworkRow("ResNet-50", "26", "4.1", "resnet50", 76.0),  # top-1 as in Table 3; that of the rows below isn't kept here
    NetworkRow("ResNet-152", "60", "11", "resnet152"),
    NetworkRow("DenseNet-169", "14", "3.5"),
    NetworkRow("DenseNet-264", "34", "6.0"),
    NetworkRow("Inception-v3", "24", "5.7"),
    NetworkRow("Xception", "23", "8.4"),
    NetworkRow("Inception-v4", "48", "13"),
    NetworkRow("Inception-ResNet-v2", "56", "13"),
    NetworkRow("ResNeXt-101", "84", "32"),
    NetworkRow("PolyNet", "92", "35"),
    NetworkRow("SENet", "146", "42"),
    NetworkRow("NASNet-A", "89", "24"),
    NetworkRow("AmoebaNet-A", "87", "23"),
    NetworkRow("PNASNet", "86", "23"),
    NetworkRow("AmoebaNet-C", "155", "41"),
    NetworkRow("GPipe (AmoebaNet-B)", "557", None),
)


@dataclass(frozen=True)
class ScaledRow:
    """Tables 3 and 7. `scaling`: the (depth, width, resolution) multipliers, None where the paper doesn't give them."""

    name: str
    arch: str
    macs: str
    top1: float
    scaling: tuple[float, float, float] | None = (1, 1, 1)


TABLE3: tuple[ScaledRow, ...] = (
    ScaledRow("MobileNetV1 base", "mobilenet_v1", "0.6", 70.6),
    ScaledRow("MobileNetV1 w=2", "mobilenet_v1", "2.2", 74.2, (1, 2, 1)),
    ScaledRow("MobileNetV1 r=2", "mobilenet_v1", "2.2", 72.7, (1, 1, 2)),
    ScaledRow("MobileNetV1 compound", "mobilenet_v1", "2.3", 75.6, (1.4, 1.2, 1.3)),
    ScaledRow("MobileNetV2 base", "mobilenet_v2", "0.3", 72.0),
    ScaledRow("MobileNetV2 d=4", "mobilenet_v2", "1.2", 76.8, (4, 1, 1)),
    ScaledRow("MobileNetV2 w=2", "mobilenet_v2", "1.1", 76.4, (1, 2, 1)),
    ScaledRow("MobileNetV2 r=2", "mobilenet_v2", "1.2", 74.8, (1, 1, 2)),
    ScaledRow("MobileNetV2 compound", "mobilenet_v2", "1.3", 77.4, None),
    ScaledRow("ResNet-50 base", "resnet50", "4.1", 76.0),
    ScaledRow("ResNet-50 d=4", "resnet50", "16.2", 78.1, (4, 1, 1)),
    ScaledRow("ResNet-50 w=2", "resnet50", "14.7", 77.7, (1, 2, 1)),
    ScaledRow("ResNet-50 r=2", "resnet50", "16.4", 77.5, (1, 1, 2)),
    ScaledRow("ResNet-50 compound", "resnet50", "16.7", 78.8, None),
)

TABLE7: tuple[ScaledRow, ...] = (
    ScaledRow("EfficientNet-B0 base", "efficientnet_b0", "0.4", 77.3),
    ScaledRow("EfficientNet-B0 d=4", "efficientnet_b0", "1.8", 79.0, (4, 1, 1)),
    ScaledRow("EfficientNet-B0 w=2", "efficientnet_b0", "1.8", 78.9, (1, 2, 1)),
    ScaledRow("EfficientNet-B0 r=2", "efficientnet_b0", "1.9", 79.1, (1, 1, 2)),
    ScaledRow("EfficientNet-B0 compound", "efficientnet_b0", "1.8", 81.1, (1.4, 1.2, 1.3)),
)


@dataclass(frozen=True)
class TransferResult:
    """A network's accuracy on a data set. `params`: in millions; None: not kept here."""

    model: str
    accuracy: str
    params: str | None = None


@dataclass(frozen=True)
class TransferRow:
    """Table 5. dataset: the name that `train` knows. Against the best public and against the best reported results."""

    name: str
    dataset: str
    public: TransferResult
    public_ours: TransferResult
    reported: TransferResult
    reported_ours: TransferResult


def _transfer(name: str, dataset: str, *results: tuple[str, str, str | None]) -> TransferRow:
    public, public_ours, reported, reported_ours = (TransferResult(*r) for r in results)
    return TransferRow(name, dataset, public, public_ours, reported, reported_ours)


_B = "EfficientNet-B"
TABLE5: tuple[TransferRow, ...] = (
    _transfer("CIFAR-10", "cifar10", ("NASNet-A", "98.0", "85"), (_B + "0", "98.1", "4"), ("GPipe", "99.0", "556"), (_B + "7", "98.9", "64")),
    _transfer("CIFAR-100", "cifar100", ("NASNet-A", "87.5", "85"), (_B + "0", "88.1", "4"), ("GPipe", "91.3", None), (_B + "7", "91.7", None)),
    _transfer("Birdsnap", "birdsnap", ("Inception-v4", "81.8", "41"), (_B + "5", "82.0", "28"), ("GPipe", "83.6", None), (_B + "7", "84.3", None)),
    _transfer(
        "Stanford Cars", "stanford-cars", ("Inception-v4", "93.4", "41"), (_B + "3", "93.6", "10"), ("DAT", "94.8", None), (_B + "7", "94.7", None)
    ),
    _transfer("Flowers", "flowers102", ("Inception-v4", "98.5", "41"), (_B + "5", "98.5", "28"), ("DAT", "97.7", None), (_B + "7", "98.8", None)),
    _transfer(
        "FGVC Aircraft", "fgvc-aircraft", ("Inception-v4", "90.9", "41"), (_B + "3", "90.7", "10"), ("DAT", "92.9", None), (_B + "7", "92.9", None)
    ),
    _transfer(
        "Oxford-IIIT Pets",
        "oxford-iiit-pet",
        ("ResNet-152", "94.5", "58"),
        (_B + "4", "94.8", "17"),
        ("GPipe", "95.9", None),
        (_B + "6", "95.4", "41"),
    ),
    _transfer("Food-101", "food101", ("Inception-v4", "90.8", "41"), (_B + "4", "91.5", "17"), ("GPipe", "93.0", None), (_B + "7", "93.0", None)),
)
