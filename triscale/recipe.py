"""How a network is trained and what it is fed, as data.

`Recipe` and `Preprocess` are frozen; a field that doesn't exist is an error that names the nearest one. Both round-trip
through JSON with `"format": 1`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args, get_type_hints

from triscale.naming import unknown

FORMAT = 1
Interpolation = Literal["bicubic", "bicubic-tf", "bilinear", "nearest"]
Crop = Literal["before", "after", "squash"]
Optimizer = Literal["sgd", "adamw", "rmsprop"]
Schedule = Literal["cosine", "staircase", "steps"]
Augment = Literal["none", "autoaugment", "randaugment"]

MAX_SIZE = 4096  # pixels: 200 MB an image as float32, for files that nobody vouches for
IMAGENET_MEAN = (0.485 * 255, 0.456 * 255, 0.406 * 255)
IMAGENET_STD = (0.229 * 255, 0.224 * 255, 0.225 * 255)
UNIT_MEAN = UNIT_STD = (127.5, 127.5, 127.5)  # to -1..1: AdvProp, timm's "inception"
CENTRED_MEAN = CENTRED_STD = (128.0, 128.0, 128.0)  # EfficientNetV2-S, M, L as the official code and Keras have them
LITE_MEAN, LITE_STD = (127.0, 127.0, 127.0), (128.0, 128.0, 128.0)  # Lite, EdgeTPU, CondConv


class RecipeError(ValueError):
    """A setting that doesn't exist or makes no sense. The message names the field."""


@dataclass(frozen=True)
class Preprocess:
    """From a decoded image to the network's input, for evaluation.

    crop: where the centre square is cut out.
      before  the resize: a square of side int(size / (size + crop_padding) x shorter side), resized to size x size; the
              official code's and OpenMMLab's
      after   the resize of the shorter side to size + crop_padding; timm's and torchvision's
      squash  the resize of the whole image, whatever its shape, to a square of side size + crop_padding
    crop_padding: 32 is the official evaluation; 0 takes the whole shorter side.
    interpolation: bicubic, bilinear and nearest are Pillow's, antialiased but for nearest; bicubic-tf is TensorFlow 1's,
    which the official code evaluates with: not antialiased, no half-pixel centres.
    Then (x - mean) / std per channel on the 0..255 scale. channels: 3 (RGB) or 1 (grey). Source: official preprocessing.py.
    """

    size: int
    crop_padding: int = 32
    crop: Crop = "before"
    interpolation: Interpolation = "bicubic"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            value = getattr(self, name)
            if not isinstance(value, (tuple, list)) or not all(type(v) in (int, float) for v in value):
                raise RecipeError(f"Preprocess.{name}: expected 1 or 3 numbers, found {value!r}"[:200])
            object.__setattr__(self, name, tuple(map(float, value)))
        if type(self.size) is not int or not 1 <= self.size <= MAX_SIZE:
            raise RecipeError(f"Preprocess.size: expected a whole number from 1 to {MAX_SIZE}, found {self.size!r}")
        if type(self.crop_padding) is not int or self.crop_padding < 0:
            raise RecipeError(f"Preprocess.crop_padding: expected a whole number from 0, found {self.crop_padding!r}")
        for name, known in (("crop", get_args(Crop)), ("interpolation", get_args(Interpolation))):
            if getattr(self, name) not in known:
                raise RecipeError(f"Preprocess.{name}: {unknown(name, getattr(self, name), known)}")
        if len(self.mean) not in (1, 3) or len(self.mean) != len(self.std) or not all(math.isfinite(v) for v in self.mean + self.std):
            raise RecipeError(f"Preprocess: expected 1 or 3 finite means and as many stds, found {self.mean!r} and {self.std!r}")
        if min(self.std) <= 0:
            raise RecipeError(f"Preprocess.std: expected numbers above 0, found {self.std!r}")

    @property
    def channels(self) -> int:
        return len(self.mean)

    def to_dict(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self)}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Preprocess:
        return _from_dict(Preprocess, data)


@dataclass(frozen=True)
class Recipe:
    """Everything that training decides, and nothing of how or where it is computed."""

    epochs: int = 30
    """Passes over the training images."""
    batch_size: int = 64
    """Images a step, over all processes."""
    optimizer: Optimizer = "sgd"
    """sgd (Nesterov momentum), adamw, or rmsprop as TensorFlow has it."""
    lr: float = 0.1
    """Peak learning rate, for lr_batch images a step."""
    lr_batch: int = 0
    """The rate used is lr x batch_size / lr_batch; 0: lr as it stands."""
    schedule: Schedule = "cosine"
    """cosine: to 0 by half a cosine; staircase: x decay_factor every decay_epochs, counted from the first step; steps: x
    decay_factor at each epoch of decay_at."""
    decay_epochs: float = 2.4
    """Of staircase."""
    decay_factor: float = 0.97
    """Of staircase and steps."""
    decay_at: tuple[float, ...] = ()
    """Of steps: epochs after which the rate drops."""
    warmup_epochs: float = 2.0
    """Epochs in which the learning rate rises linearly from warmup_from."""
    warmup_from: float = 0.0
    """Share of the rate that the warm-up begins with; staircase begins with 0."""
    momentum: float = 0.9
    """Of sgd and rmsprop."""
    nesterov: bool = True
    """Nesterov's momentum, of sgd."""
    rms_decay: float = 0.9
    """Of rmsprop's mean square."""
    rms_eps: float = 1e-3
    """Of rmsprop, inside the square root."""
    weight_decay: float = 5e-4
    """On convolution and linear weights."""
    decay_biases: bool = False
    """Weight decay on the biases of squeeze-excitation and classifier too, as the official code has it; never on norms."""
    clip: float = 0.0
    """Largest norm of the gradient; 0 leaves it alone."""
    label_smoothing: float = 0.1
    """Share of the target that is spread over all classes."""
    ema: float = 0.0
    """Decay of a weight average that is evaluated and saved; 0 for none."""
    norm_batch: int = 0
    """Images that batch norm takes its statistics over; 0: those that a process has at a time."""
    norm_momentum: float = 0.0
    """Weight of a step's statistics in batch norm's running ones; 0: the network's own."""
    minival: float = 0.0
    """Share of the training images held out to choose the epoch by; the final number is on the untouched images. 0: the last epoch."""
    flip: bool = True
    """Mirror half of the images."""
    crop_area: float = 0.0
    """Smallest share of the picture that a random crop of aspect 3/4 to 4/3 takes (the paper's: 0.08); 0: evaluation's crop."""
    shift: float = 0.125
    """Random offset either way, as a share of the side; edges are repeated."""
    erase: float = 0.0
    """Side of a random square set to the mean in every image (cutout), as a share of the side; 0 for none."""
    random_erase: float = 0.0
    """Probability that a rectangle of 2 to 33 % of the area, aspect 0.3 to 3.3, is set to the mean (Zhong et al. 2020)."""
    augment: Augment = "none"
    """Learned augmentation policies: autoaugment (v0), randaugment."""
    rand_ops: int = 2
    """Operations an image of randaugment."""
    rand_magnitude: int = 10
    """Level of randaugment's operations, 0 to 30; the official code has 17 for B5, 28 for B7 and B8."""
    mixup: float = 0.0
    """Alpha of the Beta distribution that two images' shares are drawn from; 0 for none."""
    cutmix: float = 0.0
    """The same for pasting a box of one image into another; with both, each batch takes one of the two."""
    advprop: bool = False
    """Adversarial examples with batch norms of their own."""
    adv_epsilon: float = 4.0
    """Of advprop: the largest change of a pixel, on the 0..255 scale."""
    adv_steps: int = 5
    """Of advprop: steps of the attack; 0 takes the clean images."""
    adv_step: float = 1.0
    """Of advprop: the size of each, on the 0..255 scale."""
    freeze: bool = False
    """Train the classifier alone, a linear probe: the rest stays as loaded and runs as in evaluation."""
    freeze_norms: bool = False
    """Batch norms run by the statistics they were loaded with, which stay; their weights and biases are trained."""
    seed: int = 0
    """Of initial weights, order, augmentation and dropout."""

    def __post_init__(self) -> None:
        check_kinds(self)
        drops = self.decay_at
        if not isinstance(drops, (tuple, list)) or not all(type(at) in (int, float) and math.isfinite(at) and at > 0 for at in drops):
            raise RecipeError(f"Recipe.decay_at: expected epochs above 0, found {drops!r}"[:200])
        object.__setattr__(self, "decay_at", tuple(sorted(map(float, drops))))
        for name, known in (("optimizer", get_args(Optimizer)), ("schedule", get_args(Schedule)), ("augment", get_args(Augment))):
            if getattr(self, name) not in known:
                raise RecipeError(f"Recipe.{name}: {unknown(name, getattr(self, name), known)}")
        for name, low, high in (
            ("epochs", 1, 100_000),
            ("batch_size", 1, 1 << 20),
            ("label_smoothing", 0, 0.99),
            ("ema", 0, 0.999999),
            ("minival", 0, 0.5),
            ("decay_epochs", 1e-3, 1e6),
            ("decay_factor", 1e-6, 1),
            ("rms_decay", 0, 1),
            ("rms_eps", 1e-12, 1),
            ("seed", 0, 1 << 40),
            ("shift", 0, 1),
            ("erase", 0, 1),
            ("random_erase", 0, 1),
            ("crop_area", 0, 1),
            ("norm_momentum", 0, 1),
            ("warmup_from", 0, 1),
            ("rand_ops", 1, 16),
            ("rand_magnitude", 0, 30),
            ("mixup", 0, 100),
            ("cutmix", 0, 100),
            ("adv_epsilon", 0, 255),
            ("adv_steps", 0, 1000),
            ("adv_step", 0, 255),
        ):
            if not low <= getattr(self, name) <= high:
                raise RecipeError(f"Recipe.{name}: expected {low:g} to {high:g}, found {getattr(self, name)!r}")

    def to_dict(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self), "decay_at": list(self.decay_at)}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Recipe:
        return _from_dict(Recipe, data)


def check_kinds(recipe: Any) -> None:
    """Whole numbers given for a float field of a frozen recipe become floats. Raises RecipeError for another kind, or below 0."""
    hints = get_type_hints(type(recipe))
    for f in fields(recipe):
        value, kind = getattr(recipe, f.name), hints[f.name]
        if kind is float and type(value) is int:
            object.__setattr__(recipe, f.name, value := float(value))
        if kind in (int, float, bool) and (type(value) is not kind or not math.isfinite(value) or value < 0):
            raise RecipeError(f"{type(recipe).__name__}.{f.name}: expected a {kind.__name__} from 0, found {value!r}")


def override(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """`recipe` with these fields changed. Raises UnknownNameError for a field that doesn't exist, RecipeError for a bad value."""
    known = [f.name for f in fields(Recipe)]
    for key in changes:
        if key not in known:
            raise unknown("recipe field", key, known)
    return replace(recipe, **changes)


def _from_dict(kind: Any, data: Mapping[str, Any]) -> Any:
    if not isinstance(data, Mapping) or data.get("format") != FORMAT:
        raise RecipeError(f'{kind.__name__}: expected an object with "format": {FORMAT}')
    values = {key: value for key, value in data.items() if key != "format"}
    known = [f.name for f in fields(kind)]
    for key in values:
        if key not in known:
            raise RecipeError(f"{kind.__name__}: {unknown('field', key, known)}")
    try:
        return kind(**values)
    except TypeError as error:
        raise RecipeError(f"{kind.__name__}: {str(error).split('()')[-1].strip()}") from None


def from_json(kind: type[Recipe] | type[Preprocess], text: str) -> Any:
    """A Recipe or Preprocess from the JSON of its `to_dict`."""
    try:
        return _from_dict(kind, json.loads(text))
    except json.JSONDecodeError as error:
        raise RecipeError(f"{kind.__name__}: no JSON ({error})") from None
