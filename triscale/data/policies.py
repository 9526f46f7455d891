"""AutoAugment v0 and RandAugment as tables, and what each image of a batch gets.

Operations, levels and constants are the official code's: autoaugment.py of tensorflow/tpu, models/official/efficientnet.
Distances (translations, cutout) are in pixels whatever the image's size, as they are there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from triscale.recipe import Recipe

# In the order of the official RandAugment, which is the order that `Choices.operations` counts in.
OPERATIONS = (
    "AutoContrast",
    "Equalize",
    "Invert",
    "Rotate",
    "Posterize",
    "Solarize",
    "Color",
    "Contrast",
    "Brightness",
    "Sharpness",
    "ShearX",
    "ShearY",
    "TranslateX",
    "TranslateY",
    "Cutout",
    "SolarizeAdd",
)
GEOMETRIC = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY")
SIGNED = GEOMETRIC  # their argument is negated for half of the images
MAX_LEVEL = 10.0  # levels beyond it (RandAugment's 17 and 28) extrapolate
FILL = 128


@dataclass(frozen=True)
class Argument:
    """An operation's argument at a level: level / MAX_LEVEL * scale + offset, cut to a whole number where `whole`."""

    scale: float
    offset: float = 0.0
    whole: bool = False

    def at(self, level: float) -> float:
        value = (level / MAX_LEVEL) * self.scale + self.offset
        return int(value) if self.whole else value


# degrees; bits kept; threshold; addition; factors (1: unchanged); pixels a row or column; pixels; half the side in pixels
_ARGUMENTS = {
    "Rotate": Argument(30.0),
    "Posterize": Argument(4, whole=True),
    "Solarize": Argument(256, whole=True),
    "SolarizeAdd": Argument(110, whole=True),
    "Color": Argument(1.8, 0.1),
    "Contrast": Argument(1.8, 0.1),
    "Brightness": Argument(1.8, 0.1),
    "Sharpness": Argument(1.8, 0.1),
    "ShearX": Argument(0.3),
    "ShearY": Argument(0.3),
}
AUTOAUGMENT = _ARGUMENTS | {"TranslateX": Argument(250.0), "TranslateY": Argument(250.0), "Cutout": Argument(100, whole=True)}
RANDAUGMENT = _ARGUMENTS | {"TranslateX": Argument(100.0), "TranslateY": Argument(100.0), "Cutout": Argument(40, whole=True)}

# AutoAugment v0: (operation, probability, level) twice a sub-policy, applied in order.
Step = tuple[str, float, int]
V0: tuple[tuple[Step, Step], ...] = (
    (("Equalize", 0.8, 1), ("ShearY", 0.8, 4)),
    (("Color", 0.4, 9), ("Equalize", 0.6, 3)),
    (("Color", 0.4, 1), ("Rotate", 0.6, 8)),
    (("Solarize", 0.8, 3), ("Equalize", 0.4, 7)),
    (("Solarize", 0.4, 2), ("Solarize", 0.6, 2)),
    (("Color", 0.2, 0), ("Equalize", 0.8, 8)),
    (("Equalize", 0.4, 8), ("SolarizeAdd", 0.8, 3)),
    (("ShearX", 0.2, 9), ("Rotate", 0.6, 8)),
    (("Color", 0.6, 1), ("Equalize", 1.0, 2)),
    (("Invert", 0.4, 9), ("Rotate", 0.6, 0)),
    (("Equalize", 1.0, 9), ("ShearY", 0.6, 3)),
    (("Color", 0.4, 7), ("Equalize", 0.6, 0)),
    (("Posterize", 0.4, 6), ("AutoContrast", 0.4, 7)),
    (("Solarize", 0.6, 8), ("Color", 0.6, 9)),
    (("Solarize", 0.2, 4), ("Rotate", 0.8, 9)),
    (("Rotate", 1.0, 7), ("TranslateY", 0.8, 9)),
    (("ShearX", 0.0, 0), ("Solarize", 0.8, 4)),
    (("ShearY", 0.8, 0), ("Color", 0.6, 4)),
    (("Color", 1.0, 0), ("Rotate", 0.6, 2)),
    (("Equalize", 0.8, 4), ("Equalize", 0.0, 8)),
    (("Equalize", 1.0, 4), ("AutoContrast", 0.6, 2)),
    (("ShearY", 0.4, 7), ("SolarizeAdd", 0.6, 7)),
    (("Posterize", 0.8, 2), ("Solarize", 0.6, 10)),
    (("Solarize", 0.6, 8), ("Equalize", 0.6, 1)),
    (("Color", 0.8, 6), ("Rotate", 0.4, 5)),
)


@dataclass(frozen=True, eq=False)
class Choices:
    """What each of B images gets: up to `slots` operations, one after the other. `choices[part]` takes a slice of the images.

    size: (height, width) of the images. operations: (B, slots) int8, a place in OPERATIONS or -1 for none. arguments:
    (B, slots) float64, as `Argument.at` gives them, with their sign; 0 where the operation has none. centres: (B, slots, 2)
    int32, row and column of Cutout's square.
    """

    size: tuple[int, int]
    operations: np.ndarray
    arguments: np.ndarray
    centres: np.ndarray

    def __len__(self) -> int:
        return len(self.operations)

    @property
    def slots(self) -> int:
        return self.operations.shape[1]

    def __getitem__(self, part: slice) -> Choices:
        return replace(self, operations=self.operations[part], arguments=self.arguments[part], centres=self.centres[part])

    def check(self, shape: tuple[int, ...]) -> None:
        """Raises ValueError unless there is one choice for each image of a batch of this shape, (B, 1 or 3, H, W)."""
        if len(shape) != 4 or shape[1] not in (1, 3):
            raise ValueError(f"augmentation: expected images (B, 1 or 3, H, W), found {tuple(shape)}")
        if shape[0] != len(self) or tuple(shape[2:]) != self.size:
            expected = f"{len(self)} images of {self.size[0]}x{self.size[1]} (height x width)"
            raise ValueError(f"augmentation: choices were drawn for {expected}, found images {tuple(shape)}")


def argument(name: str, level: float, maps: dict[str, Argument]) -> float:
    """The argument of an operation at a level, positive; 0 for one that has none. maps: AUTOAUGMENT or RANDAUGMENT."""
    return maps[name].at(level) if name in maps else 0.0


def draw(recipe: Recipe, count: int, size: tuple[int, int], generator: torch.Generator) -> Choices:
    """Choices for `count` images of `size` (height, width), by recipe.augment.

    autoaugment: one of V0's 25 sub-policies an image, each operation with its probability. randaugment: recipe.rand_ops
    operations an image, each any of the 16 and always applied, at recipe.rand_magnitude; the official code samples a
    probability too and ignores it. Arguments of SIGNED are negated with probability 0.5; Cutout's centre is any pixel.
    The same count of random numbers is drawn whatever they turn out to be, from a generator on the CPU. Raises ValueError
    for a recipe without a policy.
    """
    if recipe.augment not in ("autoaugment", "randaugment"):
        raise ValueError(f"policies.draw: expected a recipe with augment autoaugment or randaugment, found {recipe.augment!r}")
    slots = 2 if recipe.augment == "autoaugment" else recipe.rand_ops
    # One uniform number for the sub-policy, then for each slot: which or whether, sign, row, column.
    numbers = torch.rand((count, 1 + 4 * slots), generator=generator, dtype=torch.float64).numpy()
    uniform = numbers[:, 1:].reshape(count, slots, 4)
    if recipe.augment == "autoaugment":
        policy = (numbers[:, 0] * len(V0)).astype(np.int64)
        operations, probabilities, arguments = (table[policy] for table in _V0_TABLES)
        operations = np.where(uniform[..., 0] < probabilities, operations, np.int8(-1))
    else:
        operations = (uniform[..., 0] * len(OPERATIONS)).astype(np.int8)
        level = float(recipe.rand_magnitude)
        arguments = np.array([argument(name, level, RANDAUGMENT) for name in OPERATIONS], dtype=np.float64)[operations]
    arguments = np.where(_IS_SIGNED[operations] & (uniform[..., 1] < 0.5), -arguments, arguments)
    arguments = np.where(operations < 0, 0.0, arguments)
    return Choices(size, operations, arguments, (uniform[..., 2:] * np.array(size)).astype(np.int32))


def _v0_tables() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """V0 as arrays (25, 2): operations int8, probabilities and arguments float64."""
    operations = np.array([[OPERATIONS.index(name) for name, _, _ in pair] for pair in V0], dtype=np.int8)
    probabilities = np.array([[probability for _, probability, _ in pair] for pair in V0])
    arguments = np.array([[argument(name, level, AUTOAUGMENT) for name, _, level in pair] for pair in V0], dtype=np.float64)
    return operations, probabilities, arguments


_V0_TABLES = _v0_tables()
_IS_SIGNED = np.array([name in SIGNED for name in OPERATIONS] + [False])  # [-1]: none
