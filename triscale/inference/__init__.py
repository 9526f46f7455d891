"""Fast inference: a network lowered to folded steps, and the engines that run them."""

from triscale.inference.network import Optimized, optimize
from triscale.inference.notices import OptimizeWarning

__all__ = ["OptimizeWarning", "Optimized", "optimize"]
