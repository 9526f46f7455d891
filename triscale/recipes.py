"""Named recipes. Each says its command, hardware, time and accuracy; what was not measured says "not run"."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from triscale.naming import unknown
from triscale.recipe import Recipe

# The paper's: Tan & Le 2019, section 5.2, in the official code's numerics (main.py, utils.py). AutoAugment comes with the
# paper's text, label smoothing and the weight average with the code. Command: torchrun ... triscale train imagenet --arch
# efficientnet_b0 --recipe paper. Theirs: TPU, 77.1 % for B0. Not run here.
PAPER = Recipe(
    epochs=350,
    batch_size=4096,
    optimizer="rmsprop",
    lr=0.016,
    lr_batch=256,
    schedule="staircase",
    warmup_epochs=5.0,
    weight_decay=1e-5,
    decay_biases=True,
    ema=0.9999,
    minival=25_022 / 1_281_167,  # 20 of the 1024 shards
    augment="autoaugment",
    crop_area=0.08,
    shift=0.0,
)

RECIPES: dict[str, Recipe] = {
    "paper": PAPER,
    # The same at a batch that one GPU holds; the learning rate goes with it. Not run.
    "paper-gpu": replace(PAPER, batch_size=256),
    # Xie et al. 2020 (arXiv 1911.09665): a second set of batch norms for adversarial images. Not run.
    "advprop": replace(PAPER, advprop=True),
    # Cubuk et al. 2020 (arXiv 1909.13719): two random operations an image. Not run.
    "randaugment": replace(PAPER, augment="randaugment"),
    # From ImageNet weights on a few thousand pictures: AdamW, the norms' statistics kept. triscale train cifar10-mini
    # --weights W --recipe finetune --resolution 144 --crop-padding 0: V2-B0 88.60 +- 0.20 % over three seeds, studies/transfer.
    "finetune": Recipe(
        epochs=8,
        batch_size=32,
        optimizer="adamw",
        lr=2e-4,
        warmup_epochs=0.5,
        weight_decay=0.01,
        clip=1.0,
        ema=0.99,
        shift=0.06,
        freeze_norms=True,
    ),
    # The paper's section 5.3 after Kornblith et al. 2019 (arXiv 1805.08974): the whole network, Nesterov momentum, cosine, batch
    # 256, a quarter of the ImageNet rate (the authors' answer). FINETUNE below has the epochs that make 20 000 steps. Not run.
    "transfer": Recipe(
        epochs=50,
        batch_size=256,
        lr=0.016 / 4,
        lr_batch=256,
        warmup_epochs=1.0,
        weight_decay=1e-5,
        label_smoothing=0.0,
        ema=0.999,
        crop_area=0.08,
        shift=0.0,
    ),
    # A first look at any folder. Not run as a benchmark.
    "quick": Recipe(),
    # A few thousand small photographs from scratch. triscale train cifar10-mini --arch resnet18 --resolution 32
    # --macs 40M --recipe small: 59.6 % of its 500 test images in 185 s on two cores (studies/README.md).
    "small": Recipe(epochs=45, erase=0.5, weight_decay=1e-3, ema=0.995),
    # CIFAR-10 on two cores: triscale train cifar10 --arch resnet18 --macs 40M --recipe cifar10 --precision bfloat16
    # 83.24 +- 0.20 % of its test images over three seeds, 490 s each (studies/README.md).
    "cifar10": Recipe(epochs=7, batch_size=128, lr=0.2, weight_decay=5e-4, warmup_epochs=1.0, ema=0.99),
    # What a search scores networks by (classify/proxy.py): the fewest epochs that rank them, in small steps, with running statistics
    # that follow fast; by B0's own momentum they lag, and two epochs end near chance. cifar10-mini at 32 px, 8 random networks of
    # 3 to 5 MMACs from the space around B0, 1 600 images to train on, 400 to score: the rank correlation with the accuracy after 7
    # epochs on its 500 test images is 0.86 and 0.79 over two seeds (3 epochs 0.83, 4 epochs 0.14, AdamW 0.74), and that of the 7
    # epochs' own two accuracies 0.81. 4 to 11 s of one EPYC core a network. With 8 networks, differences of 0.3 are chance.
    "proxy": Recipe(epochs=2, batch_size=32, lr=0.05, warmup_epochs=0.3, norm_momentum=0.1),
}


class Finetuning(NamedTuple):
    """One of the paper's eight transfer data sets: its training images, classes, and what its accuracy is: top1 or mean_per_class.

    Source: paper, Table 6; the kind of accuracy after Kornblith et al.
    """

    images: int
    classes: int
    accuracy: str

    def recipe(self, steps: int = 20_000) -> Recipe:
        """`transfer` with as many epochs as make `steps`, and Kornblith's weight of a step in the running statistics."""
        base = RECIPES["transfer"]
        per_epoch = max(1, self.images // base.batch_size)
        return replace(base, epochs=max(1, round(steps / per_epoch)), norm_momentum=min(10 / per_epoch, 0.1))


FINETUNE: dict[str, Finetuning] = {
    "cifar10": Finetuning(50_000, 10, "top1"),
    "cifar100": Finetuning(50_000, 100, "top1"),
    "birdsnap": Finetuning(47_386, 500, "top1"),
    "stanford-cars": Finetuning(8_144, 196, "top1"),
    "flowers102": Finetuning(2_040, 102, "mean_per_class"),
    "fgvc-aircraft": Finetuning(6_667, 100, "mean_per_class"),
    "oxford-iiit-pet": Finetuning(3_680, 37, "mean_per_class"),
    "food101": Finetuning(75_750, 101, "top1"),
}


def named(name: str) -> Recipe:
    """The named recipe. Raises UnknownNameError with the nearest name."""
    if name not in RECIPES:
        raise unknown("recipe", name, RECIPES)
    return RECIPES[name]
