"""jaxbound: guaranteed bounds for JAX functions, as function transformations.

`bound(fn, method)` maps regions to bounds as `fn` maps points to values; `crown(params, x, eps)` and its kin do it for
Flax networks; `certify` turns bounds into certificates. See README.md.
"""

from jaxbound.backend.compilation import compilation_cache
from jaxbound.certificates.attack import Attack, pgd
from jaxbound.certificates.certification import certify, check_against_attack
from jaxbound.certificates.margins import margin_spec, margins
from jaxbound.certificates.proofs import Proof, check_certificate
from jaxbound.certificates.properties import Clause, Property
from jaxbound.certificates.radius import certified_radius
from jaxbound.certificates.report import Report
from jaxbound.errors import (
    ArgumentError,
    ArgumentTypeError,
    AssumedNetworkWarning,
    CertificateError,
    HostLoopError,
    JaxboundError,
    JaxboundWarning,
    MiscompilationError,
    MiscompilationWarning,
    SoundnessError,
    UnsupportedError,
)
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
from jaxbound.methods.exact import LP, MILP
from jaxbound.methods.frown import Frown
from jaxbound.methods.polytope import ConvexPolytope
from jaxbound.methods.quadratic import Quadratic
from jaxbound.network.bounding import cap, crown, crown_ibp, fastlin, forward, frown, ibp
from jaxbound.network.model import Model
from jaxbound.regions import Box, LpBall
from jaxbound.regions.bounds import Estimate, Interval, LinearBounds
from jaxbound.search import BranchAndBound, Verdict, verify
from jaxbound.transforms.bounding import bound, explain, linear_bounds, pre_activation_bounds
from jaxbound.transforms.explanation import Explanation
from jaxbound.transforms.tuning import tune

__version__ = "0.1.0"

__all__ = [
    "IBP",
    "ArgumentError",
    "ArgumentTypeError",
    "AssumedNetworkWarning",
    "Attack",
    "Best",
    "Box",
    "CertificateError",
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
    "Proof",
    "Report",
    "Property",
    "SoundnessError",
    "UnsupportedError",
    "bound",
    "cap",
    "certified_radius",
    "certify",
    "check_against_attack",
    "check_certificate",
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
