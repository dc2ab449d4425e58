"""Bounds of Jacobians, and what follows from them: Lipschitz constants, radii without stationary points, robustness."""

from jaxbound.jacobian.composition import jacobian_bounds
from jaxbound.jacobian.integral import LipschitzIntegral
from jaxbound.jacobian.landscape import landscape_radius
from jaxbound.jacobian.lipschitz import lipschitz
from jaxbound.jacobian.recurjac import FastLip, RecurJac
from jaxbound.jacobian.spectral import spectral_lipschitz

__all__ = [
    "FastLip",
    "LipschitzIntegral",
    "RecurJac",
    "jacobian_bounds",
    "landscape_radius",
    "lipschitz",
    "spectral_lipschitz",
]
