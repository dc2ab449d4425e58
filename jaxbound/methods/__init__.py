"""The methods: where bounds of pre-activations come from, how slopes are chosen, how the output is bounded.

In: a graph over regions and a `Request`. Out: `Bounded` results, linear functions, bounds of pre-activations. One
file a method; `base` says what a method is, `passes` what several share, `domains` keeps undefined values out of
all of them. It imports the driver.
"""

from jaxbound.methods.base import (
    Bounded,
    Method,
    Request,
    better,
    check_certified,
    check_method,
    output_nodes,
    rounding_mode,
    targets,
)
from jaxbound.methods.best import Best
from jaxbound.methods.crown import Crown, CrownIBP, FastLin
from jaxbound.methods.forward import Forward
from jaxbound.methods.ibp import IBP
from jaxbound.relaxations.slopes import SlopeRule

__all__ = [
    "IBP", "Best", "Bounded", "Crown", "CrownIBP", "FastLin", "Forward", "Method", "Request", "SlopeRule", "better",
    "check_certified", "check_method", "output_nodes", "rounding_mode", "targets",
]  # fmt: skip
