"""Where the public names come from: what `jaxbound.NAME` gives, imported when the first of them is asked for."""

from jaxbound.backend.caches import clear_caches
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
from jaxbound.methods.known import Known
from jaxbound.methods.polytope import ConvexPolytope
from jaxbound.methods.quadratic import Quadratic
from jaxbound.network.bounding import cap, crown, crown_ibp, fastlin, forward, frown, ibp
from jaxbound.network.model import Model
from jaxbound.regions import Box, LpBall, Polytope, Zonotope
from jaxbound.regions.bounds import Estimate, Interval, LinearBounds
from jaxbound.search import BranchAndBound, Verdict, verify
from jaxbound.transforms.bounding import bound, explain, linear_bounds, pre_activation_bounds
from jaxbound.transforms.explanation import Explanation
from jaxbound.transforms.tuning import tune
