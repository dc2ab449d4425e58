"""Input sets, what bounding asks of them, and what bounds come back as.

In: a user's `Box` or `LpBall`. Out: least values of linear functions over it, points in it, and the classes `Interval`,
`Estimate` and `LinearBounds`. It imports `errors` and `_compat`. Every rounding of an end outward is in `rounding`.
"""

from jaxbound.regions.bounds import Estimate, Interval, LinearBounds
from jaxbound.regions.sets import (
    Box,
    LpBall,
    Region,
    canonical,
    enclosing_box,
    is_box,
    is_empty,
    is_region,
    leaf_struct,
    magnitude,
    per_example,
    validate,
)
from jaxbound.regions.support import minimizer, minimum, project, sample

__all__ = [
    "Box", "Estimate", "Interval", "LinearBounds", "LpBall", "Region", "canonical", "enclosing_box", "is_box",
    "is_empty", "is_region", "leaf_struct", "magnitude", "minimizer", "minimum", "per_example", "project", "sample",
    "validate",
]  # fmt: skip
