"""Methods by name, for configurations and the command line."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from jaxbound import errors
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
    "convex_polytope_10": ConvexPolytope(projections=10, key=_KEY),
    "convex_polytope_50": ConvexPolytope(projections=50, key=_KEY),
    "frown": Frown(),
    "best": Best(IBP(), CrownIBP()),
}
"""Bounds by name. "crown_ibp_alone" and "crown_alone" keep nothing of what interval arithmetic says of the margins, as
in the CROWN-IBP paper's equation 9 and Table 1; those of "convex_polytope" with a number estimate, by so many random
projections, which makes a loss and no certificate;
"best" is, margin by margin, the better one of IBP and CROWN-IBP."""


def method_named(name: str, *, lower_slope: str = "", intersect: bool = True) -> Method:
    """A method by its name, with options of its own changed.

    Args:
        name: of `METHODS`.
        lower_slope: "adaptive", "parallel" (same-slope), "zero" (zero-lb) or "one" (one-lb); empty for its own.
        intersect: False to keep nothing of what interval arithmetic says of a value.

    Raises:
        ArgumentError: no such name, or a method that has no such option.

    >>> method_named("crown_ibp", lower_slope="zero", intersect=False).lower_slope
    'zero'
    """
    if name not in METHODS:
        raise errors.unknown_option("method", name, METHODS)
    found: Any = METHODS[name]
    changes = {"lower_slope": lower_slope} if lower_slope else {}
    changes |= {} if intersect else {"intersect": False}
    for option, value in changes.items():
        if option not in {field.name for field in dataclasses.fields(found)}:
            having = [known for known, method in METHODS.items() if hasattr(method, option)]
            raise errors.argument(option, f"is {value!r}, but {name} has no such option", f"use {', '.join(having)}")
    return dataclasses.replace(found, **changes) if changes else found
