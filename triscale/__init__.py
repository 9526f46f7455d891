"""EfficientNet as a system: a network is data, scaling is a function on it, and everything reads it.

The public names are loaded when first used: `import triscale` loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from triscale.version import __version__

_HOME = {
    "Arch": "architecture",
    "ArchError": "architecture",
    "Head": "architecture",
    "Numerics": "architecture",
    "Stage": "architecture",
    "Stem": "architecture",
    "arch": "families",
    "names": "families",
    "Coefficients": "scaling",
    "Scaling": "scaling",
    "compound": "scaling",
    "fit_input": "scaling",
    "scale": "scaling",
    "Cost": "cost_model",
    "cost": "cost_model",
    "Fit": "budget",
    "Workload": "budget",
    "fit_budget": "budget",
    "Preprocess": "recipe",
    "Recipe": "recipe",
    "ConvNet": "model",
    "build": "model",
    "load_weights": "weights.load",
    "create_model": "weights.create",
    "open_model": "weights.open",
    "class_activation": "explain",
    "grad_cam": "explain",
    "time_callable": "latency",
    "optimize": "inference",
}

__all__ = [
    "Arch",
    "ArchError",
    "Coefficients",
    "ConvNet",
    "Cost",
    "Fit",
    "Head",
    "Numerics",
    "Preprocess",
    "Recipe",
    "Scaling",
    "Stage",
    "Stem",
    "Workload",
    "__version__",
    "arch",
    "build",
    "class_activation",
    "compound",
    "cost",
    "create_model",
    "fit_budget",
    "fit_input",
    "grad_cam",
    "load_weights",
    "names",
    "open_model",
    "optimize",
    "scale",
    "time_callable",
]

if TYPE_CHECKING:
    from triscale.architecture import Arch, ArchError, Head, Numerics, Stage, Stem
    from triscale.budget import Fit, Workload, fit_budget
    from triscale.cost_model import Cost, cost
    from triscale.explain import class_activation, grad_cam
    from triscale.families import arch, names
    from triscale.inference import optimize
    from triscale.latency import time_callable
    from triscale.model import ConvNet, build
    from triscale.recipe import Preprocess, Recipe
    from triscale.scaling import Coefficients, Scaling, compound, fit_input, scale
    from triscale.weights.create import create_model
    from triscale.weights.load import load_weights
    from triscale.weights.open import open_model


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'triscale' has no attribute '{name}'")
    value = getattr(import_module(f"triscale.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
