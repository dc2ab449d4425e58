"""jaxbound: guaranteed bounds for JAX functions, as function transformations.

`bound(fn, method)` maps regions to bounds as `fn` maps points to values; `crown(params, x, eps)` and its kin do it for
Flax networks; `certify` turns bounds into certificates. See README.md.
"""

from jaxbound.attack import Attack, pgd
from jaxbound.bounds import Estimate, Interval, LinearBounds
from jaxbound.certify import certify, check_against_attack, margin_spec, margins
from jaxbound.compilation import compilation_cache
from jaxbound.errors import (
    ArgumentError,
    ArgumentTypeError,
    AssumedNetworkWarning,
    HostLoopError,
    JaxboundError,
    JaxboundWarning,
    MiscompilationError,
    MiscompilationWarning,
    SoundnessError,
    UnsupportedError,
)
from jaxbound.exact import LP, MILP
from jaxbound.explanation import Explanation
from jaxbound.frontends import onnx, vnnlib
from jaxbound.jacobian import (
    FastLip,
    LipschitzIntegral,
    RecurJac,
    jacobian_bounds,
    landscape_radius,
    lipschitz,
    spectral_lipschitz,
)
from jaxbound.methods import IBP, Best, Crown, CrownIBP, FastLin, Forward, Method
from jaxbound.model import Model
from jaxbound.network import cap, crown, crown_ibp, fastlin, forward, frown, ibp
from jaxbound.polytope import ConvexPolytope
from jaxbound.properties import Clause, Property
from jaxbound.quadratic import Quadratic
from jaxbound.radius import certified_radius
from jaxbound.regions import Box, LpBall
from jaxbound.report import Report
from jaxbound.search import BranchAndBound, Verdict, verify
from jaxbound.transform import bound, explain, linear_bounds, pre_activation_bounds
from jaxbound.tuning import Frown, tune

__version__ = "0.1.0"

__all__ = [
    "IBP",
    "ArgumentError",
    "ArgumentTypeError",
    "AssumedNetworkWarning",
    "Attack",
    "Best",
    "Box",
    "Clause",
    "ConvexPolytope",
    "Crown",
    "CrownIBP",
    "Estimate",
    "Explanation",
    "FastLin",
    "Forward",
    "Frown",
    "HostLoopError",
    "Interval",
    "JaxboundError",
    "JaxboundWarning",
    "LinearBounds",
    "LpBall",
    "Method",
    "Model",
    "MiscompilationError",
    "MiscompilationWarning",
    "Report",
    "Property",
    "SoundnessError",
    "UnsupportedError",
    "bound",
    "cap",
    "certified_radius",
    "certify",
    "check_against_attack",
    "compilation_cache",
    "crown",
    "crown_ibp",
    "explain",
    "fastlin",
    "forward",
    "frown",
    "ibp",
    "linear_bounds",
    "margin_spec",
    "margins",
    "pgd",
    "verify",
    "BranchAndBound",
    "Verdict",
    "pre_activation_bounds",
    "tune",
    "LP",
    "MILP",
    "Quadratic",
    "FastLip",
    "LipschitzIntegral",
    "RecurJac",
    "jacobian_bounds",
    "landscape_radius",
    "lipschitz",
    "spectral_lipschitz",
    "onnx",
    "vnnlib",
]
