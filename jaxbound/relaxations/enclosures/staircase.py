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
from jaxbound.relaxations.slopes import ADAPTIVE, Freedom, Places, SlopeRule

Ends = tuple[jax.Array, jax.Array]

PLACES = (0.0, 1.0)
"""From the constant to the line."""
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


def planes(op: Op, inputs: Sequence[Ends], constants: Sequence, rule: SlopeRule = ADAPTIVE) -> Planes:
    """On each side a constant (place 0) or a line of slope 1 (place 1), the better by default, or their average."""
    ((low, high),) = inputs
    lower, upper = interval(op, inputs, constants)
    finite = jnp.isfinite(low) & jnp.isfinite(high)
    reach = jnp.where(finite, jnp.maximum(jnp.abs(low), jnp.abs(high)) + 1, 0)
    below, above = _OFFSETS[op.name]
    places = Places.within(*PLACES, lambda: _chosen(op, inputs)).chosen(rule)
    rising, falling = [jnp.where(finite, place, 0) for place in places]

    def mixed(slope: jax.Array, offset: float, end: jax.Array, sign: int):
        average = jnp.where(slope > 0, slope * offset, 0) + jnp.where(slope < 1, (1 - slope) * end, 0)
        return average + sign * jnp.where((slope == 0) | (slope == 1), 0, 8 * jnp.finfo(op.dtype).eps * reach)

    return Planes((rising,), mixed(rising, below, lower, -1), (falling,), mixed(falling, above, upper, 1))


def freedom(op: Op, inputs: Sequence[Ends], constants: Sequence, rule: SlopeRule = ADAPTIVE) -> Freedom:
    """From the constant to the line of slope 1."""
    zeros = jnp.zeros(op.shape, op.dtype)
    return Freedom.linear(zeros, zeros + 1, _chosen(op, inputs))


def _chosen(op: Op, inputs: Sequence[Ends]) -> tuple[jax.Array, jax.Array]:
    """1 where the line is better than the constant at the middle."""
    ((low, high),) = inputs
    lower, upper = interval(op, inputs, ())
    finite = jnp.isfinite(low) & jnp.isfinite(high)
    middle = jnp.where(finite, low / 2 + high / 2, 0)
    below, above = _OFFSETS[op.name]
    return (
        (finite & (middle + below > lower)).astype(op.dtype),
        (finite & (middle + above < upper)).astype(op.dtype),
    )
