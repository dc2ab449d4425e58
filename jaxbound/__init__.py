"""jaxbound: guaranteed bounds for JAX functions, as function transformations.

`bound(fn, method)` maps regions to bounds as `fn` maps points to values; `crown(params, x, eps)` and its kin do it for
Flax networks; `certify` turns bounds into certificates. See README.md.

Importing it sets the flags that JAX reads when it starts (`_flags`), and nothing else: JAX and the public names, which
`_public` gathers, are imported when one of them is first asked for, so that `jaxbound --help` answers at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from jaxbound import _flags as _flags
from jaxbound._version import __version__ as __version__

if TYPE_CHECKING:
    from jaxbound._public import *

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
    "Known",
    "LinearBounds",
    "LpBall",
    "Method",
    "Polytope",
    "Zonotope",
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
    "clear_caches",
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


def __getattr__(name: str) -> Any:
    """A public name, or a module of the package."""
    if name in __all__:
        public = importlib.import_module("jaxbound._public")
        globals().update({each: getattr(public, each) for each in __all__})
        return globals()[name]
    if not name.startswith("_"):
        try:
            return importlib.import_module(f"jaxbound.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"jaxbound.{name}":
                raise
    raise AttributeError(f"module 'jaxbound' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
