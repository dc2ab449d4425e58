"""Input sets, what bounding asks of them, and what bounds come back as.

In: a user's `Box`, `LpBall`, `Polytope` or `Zonotope`. Out: least values of linear functions over it, points in it, and
the classes `Interval`, `Estimate` and `LinearBounds`. It imports `errors` and `_compat`. Every rounding of an end
outward is in `rounding`.
"""

from jaxbound.regions.bounds import Estimate, Interval, LinearBounds
from jaxbound.regions.canonical import canonical
from jaxbound.regions.examples import inside, middle, per_example, take, with_batch_axis
from jaxbound.regions.polytopes import Polytope
from jaxbound.regions.sets import (
    X_AND_EPS,
    Box,
    LpBall,
    Region,
    enclosing_box,
    is_box,
    is_empty,
    is_region,
    leaf_struct,
    magnitude,
    validate,
)
from jaxbound.regions.support import minimizer, minimum, project, sample, terms
from jaxbound.regions.zonotopes import Zonotope

__all__ = [
    "X_AND_EPS", "Box", "Estimate", "Interval", "LinearBounds", "LpBall", "Polytope", "Region", "Zonotope",
    "canonical", "enclosing_box", "inside", "is_box", "is_empty", "is_region", "leaf_struct", "magnitude", "middle",
    "minimizer", "minimum", "per_example", "project", "sample", "take", "terms", "validate", "with_batch_axis",
]  # fmt: skip
