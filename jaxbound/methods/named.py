"""Methods by name, for configurations and the command line."""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxbound.methods import IBP, Best, Crown, CrownIBP, FastLin, Forward, Method
from jaxbound.methods.frown import Frown
from jaxbound.methods.polytope import ConvexPolytope

_KEY: Any = np.zeros(2, np.uint32)  # a raw key in NumPy: importing this starts no device; each step draws anew
METHODS: dict[str, Method] = {
    "ibp": IBP(),
    "crown_ibp": CrownIBP(),
    "crown_ibp_alone": CrownIBP(intersect=False),
    "crown": Crown(),
    "fastlin": FastLin(),
    "forward": Forward(),
    "crown_zero": Crown(lower_slope="zero"),
    "crown_alone": Crown(intersect=False),
    "convex_polytope": ConvexPolytope(),
    "convex_polytope_50": ConvexPolytope(projections=50, key=_KEY),
    "frown": Frown(),
    "best": Best(IBP(), CrownIBP()),
}
"""Bounds by name. "crown_ibp_alone" and "crown_alone" keep nothing of what interval arithmetic says of the margins, as
in the CROWN-IBP paper's equation 9 and Table 1; "convex_polytope_50" estimates, which makes a loss and no certificate;
"best" is, margin by margin, the better one of IBP and CROWN-IBP."""
