"""jaxbound: guaranteed bounds for JAX functions, as function transformations.

`bound(fn, method)` maps regions to bounds as `fn` maps points to values; `crown(params, x, eps)` and its kin do it for
Flax networks. See README.md.
"""

from jaxbound.attack import pgd
from jaxbound.bounds import Interval, LinearBounds
from jaxbound.methods import IBP, Best, Crown, CrownIBP, FastLin, Forward, Method
from jaxbound.network import crown, crown_ibp, fastlin, forward, ibp
from jaxbound.regions import Box, LpBall
from jaxbound.transform import bound, explain, linear_bounds, pre_activation_bounds

__version__ = "0.1.0"

__all__ = [
    "IBP",
    "Best",
    "Box",
    "Crown",
    "CrownIBP",
    "FastLin",
    "Forward",
    "Interval",
    "LinearBounds",
    "LpBall",
    "Method",
    "bound",
    "crown",
    "crown_ibp",
    "explain",
    "fastlin",
    "forward",
    "ibp",
    "linear_bounds",
    "pgd",
    "pre_activation_bounds",
]
