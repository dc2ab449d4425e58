"""Lines around a rounding to whole numbers: floor, ceil and round.

On one step the function is constant. Elsewhere, with r(z) the rounding and `r(z) - z` in [a, b] (floor: [-1, 0], ceil:
[0, 1], round: [-1/2, 1/2]), the lines z + a and z + b hold everywhere. On [l, u] with r(u) = r(l) + 1, steps of height
1 over a narrow interval, the constants r(l) and r(u) are closer: whichever is closer at the middle is taken.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxbound._compat import bind
from jaxbound.graph import Op
from jaxbound.relaxations.planes import Planes

Ends = tuple[jax.Array, jax.Array]

_OFFSETS = {"floor": (-1.0, 0.0), "ceil": (0.0, 1.0), "round": (-0.5, 0.5)}


def describe(op: Op) -> str:
    """How it is relaxed."""
    return "constants or lines of slope 1"


def interval(op: Op, inputs: Sequence[Ends], constants: Sequence) -> Ends:
    """The rounded ends."""
    ((lower, upper),) = inputs
    return bind(op.primitive, [lower], dict(op.params)), bind(op.primitive, [upper], dict(op.params))


def is_exact(op: Op, position: int, ends: Ends) -> jax.Array:
    """Where both ends lie on one step."""
    lower, upper = interval(op, [ends], ())
    return lower == upper


def planes(op: Op, inputs: Sequence[Ends], constants: Sequence, lower_slope: str, slopes=None) -> Planes:
    """On each side the better of a constant and a line of slope 1; `slopes` are 0 or 1 if given."""
    ((low, high),) = inputs
    lower, upper = interval(op, inputs, constants)
    finite = jnp.isfinite(low) & jnp.isfinite(high)
    middle = jnp.where(finite, low / 2 + high / 2, 0)
    below, above = _OFFSETS[op.name]
    if slopes is None:
        slopes = finite & (middle + below > lower), finite & (middle + above < upper)
    rising, falling = (jnp.asarray(slope, op.dtype) for slope in slopes)
    return Planes(
        (rising,), jnp.where(rising == 1, below, lower),
        (falling,), jnp.where(falling == 1, above, upper),
    )  # fmt: skip
