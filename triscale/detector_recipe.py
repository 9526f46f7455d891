"""How a detector is trained, as data, and the named recipes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from triscale.naming import unknown
from triscale.recipe import FORMAT, Recipe, RecipeError, check_kinds

Optimizer = Literal["sgd", "adamw"]
Schedule = Literal["steps", "cosine"]
Keep = Literal["last", "best"]


@dataclass(frozen=True)
class DetectorRecipe:
    """Everything that a detector's training decides; the defaults are mmdetection's 1x schedule for retinanet_effb3_fpn_crop896_8x4_1x_coco."""

    epochs: int = 12
    """Passes over the training images."""
    batch_size: int = 32
    """Images a step, over all processes."""
    optimizer: Optimizer = "sgd"
    """sgd or adamw."""
    lr: float = 0.04
    """Peak learning rate, for lr_batch images a step."""
    lr_batch: int = 32
    """The rate used is lr x batch_size / lr_batch; 0: lr as it stands."""
    schedule: Schedule = "steps"
    """steps: x decay_factor at each epoch of decay_at; cosine: to 0 by half a cosine."""
    decay_at: tuple[float, ...] = (8.0, 11.0)
    """Of steps: epochs after which the rate drops."""
    decay_factor: float = 0.1
    """Of steps."""
    warmup_steps: int = 1000
    """Steps in which the rate rises linearly from warmup_from of it; at most a third of all steps, which is told."""
    warmup_from: float = 0.1
    """Share of the rate that the warm-up begins with."""
    momentum: float = 0.9
    """Of sgd."""
    nesterov: bool = False
    """Nesterov's momentum, of sgd."""
    weight_decay: float = 1e-4
    """On convolutions' weights and biases; never on norms."""
    clip: float = 0.0
    """Largest norm of the gradient; 0 leaves it alone."""
    ema: float = 0.0
    """Decay of a weight average that is evaluated and saved; 0 for none."""
    scale_from: float = 0.8
    """Smallest random resize, as a share of the input side; what exceeds the square is cropped at random, what lacks is padded."""
    scale_to: float = 1.2
    """Largest random resize."""
    flip: bool = True
    """Mirror half of the images."""
    empty_images: bool = True
    """Train on images without boxes too; mmdetection leaves them out."""
    sync_norms: bool = True
    """The backbone's batch norms over all processes' images, not each process's own."""
    freeze_norms: bool = False
    """The backbone's batch norms run by the statistics they were loaded with; their weights and biases are trained."""
    keep: Keep = "last"
    """The model of the last epoch, or the best by AP on val."""
    seed: int = 0
    """Of initial weights, order, views and drop connect."""

    def __post_init__(self) -> None:
        check_kinds(self)
        for name, known in (("optimizer", get_args(Optimizer)), ("schedule", get_args(Schedule)), ("keep", get_args(Keep))):
            if getattr(self, name) not in known:
                raise RecipeError(f"DetectorRecipe.{name}: {unknown(name, getattr(self, name), known)}")
        if not 0 < self.scale_from <= self.scale_to <= 10:
            raise RecipeError(f"DetectorRecipe.scale_from, scale_to: expected 0 < from <= to <= 10, found {self.scale_from!r} and {self.scale_to!r}")
        try:
            object.__setattr__(self, "decay_at", self.loop(1).decay_at)  # which checks the others
        except RecipeError as error:
            raise RecipeError(f"Detector{error}") from None

    @property
    def ratios(self) -> tuple[float, float]:
        return self.scale_from, self.scale_to

    def loop(self, steps_per_epoch: int) -> Recipe:
        """What the training loop reads of it, for so many steps an epoch. The warm-up takes at most a third of all steps."""
        warmup = min(self.warmup_steps / steps_per_epoch, self.epochs / 3)
        own = {f.name for f in fields(Recipe)}
        shared = {name: value for name, value in asdict(self).items() if name in own}
        return Recipe(**shared | {"warmup_epochs": warmup, "decay_biases": True, "label_smoothing": 0.0, "shift": 0.0})

    def to_dict(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self), "decay_at": list(self.decay_at)}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> DetectorRecipe:
        """Raises RecipeError, with the nearest field for one that doesn't exist."""
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            raise RecipeError(f'DetectorRecipe: expected an object with "format": {FORMAT}')
        values = {key: value for key, value in data.items() if key != "format"}
        known = [f.name for f in fields(DetectorRecipe)]
        for key in values:
            if key not in known:
                raise RecipeError(f"DetectorRecipe: {unknown('field', key, known)}")
        return DetectorRecipe(**values)


DETECTOR_RECIPES: dict[str, DetectorRecipe] = {
    # mmdetection's retinanet_effb3_fpn_crop896_8x4_1x_coco: 8 GPUs x 4 images, 40.5 box AP there. Not run here.
    "coco-1x": DetectorRecipe(empty_images=False),
    # A few hundred pictures, from a backbone that knows ImageNet.
    "finetune": DetectorRecipe(
        epochs=20,
        batch_size=8,
        optimizer="adamw",
        lr=1e-3,
        lr_batch=0,
        schedule="cosine",
        warmup_steps=50,
        weight_decay=0.02,
        clip=5.0,
        ema=0.99,
    ),
}


def detector_recipe(name: str) -> DetectorRecipe:
    """The named recipe. Raises UnknownNameError with the nearest name."""
    if name not in DETECTOR_RECIPES:
        raise unknown("recipe", name, DETECTOR_RECIPES)
    return DETECTOR_RECIPES[name]
