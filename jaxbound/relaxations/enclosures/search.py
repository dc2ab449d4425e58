"""Rigorous minima of functions that are convex on an interval, from values alone.

Golden-section search (Kiefer 1953) keeps four points a <= c <= d <= b and the smaller of f(c), f(d) inside. No
derivative is asked for: that of a program is wrong where it takes another branch (`|z|` inside softplus, at 0), values
are not.

Let every value be known up to E. When f(c) < f(d) as computed, [d, b] is dropped; by convexity f is there at least

    f(d) + (f(d) - f(c)) / (d - c) * (z - d)  >=  f(d) - E - 2 E (b - d) / (d - c),

no less than the smallest computed value minus `LOSS` E while `b - d <= 2 (d - c)`; the search stops when rounding of
the points would break that. On what is left, [a, b], the chords prolonged beyond their points are below f.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxbound.backend.tracing import rolled

LOSS = 5
"""By how many times the error of one value the result may exceed the true minimum."""

_RATIO = (5**0.5 - 1) / 2
_STEPS = {16: 12, 32: 23, 64: 43}
"""By bits: until the bracket is 2^-8, 2^-16 and 2^-30 of the interval, as the error is of the order of its square."""
_NARROW = 64
"""Intervals of fewer floating-point numbers are searched with some of their surroundings."""


def minimize(
    function: Callable, lower: jax.Array, upper: jax.Array, limits: tuple[ArrayLike, ArrayLike]
) -> tuple[jax.Array, jax.Array]:
    """The least value of functions that are convex on `limits`, over `[lower, upper]`, entry by entry.

    Args:
        function: of points, entry by entry; leading axes are more points for the same entries.
        lower: left ends; floating.
        upper: right ends, of the same shape.
        limits: `(left, right)`, where the functions are convex; contains the intervals that are not single points.

    Returns:
        `(point, bound)`: a point of the interval near the minimum; `f >= bound - LOSS * E` on the interval.
    """
    spacing = jnp.finfo(lower.dtype).eps * jnp.maximum(jnp.abs(lower), jnp.abs(upper))
    pad = jnp.where((upper > lower) & (upper - lower < _NARROW * spacing), _NARROW / 4 * spacing, 0)
    a = jnp.where(pad > 0, jnp.maximum(lower - pad, limits[0]), lower)
    b = jnp.where(pad > 0, jnp.minimum(upper + pad, limits[1]), upper)
    c, d = _inner(a, b)

    def step(_: jax.Array, state: tuple):
        (a, c, d, b), (at_a, at_c, at_d, at_b) = state
        left = at_c < at_d
        first, last = jnp.where(left, a, c), jnp.where(left, d, b)
        low, high = _inner(first, last)
        new = jnp.where(left, low, high)
        value = function(new)
        points = first, jnp.where(left, new, d), jnp.where(left, c, new), last
        values = (
            jnp.where(left, at_a, at_c), jnp.where(left, value, at_d),
            jnp.where(left, at_c, value), jnp.where(left, at_d, at_b),
        )  # fmt: skip
        steady = 2 * (d - c) >= jnp.maximum(c - a, b - d)
        pick = lambda new, old: jnp.where(steady, new, old)  # noqa: E731
        return jax.tree.map(pick, (points, values), state)

    points = a, c, d, b
    state = points, tuple(function(jnp.stack(points)))
    (a, c, d, b), values = rolled(jax.lax.fori_loop)(0, _STEPS[jnp.finfo(lower.dtype).bits], step, state)
    point = jnp.clip(jnp.where(values[1] < values[2], c, d), lower, upper)
    return point, _below((a, c, d, b), values)


def _inner(a: jax.Array, b: jax.Array):
    reach = _RATIO * (b - a)
    return b - reach, a + reach


def _below(points: Sequence[jax.Array], values: Sequence[jax.Array]) -> jax.Array:
    """A lower bound of a convex function on `[a, b]`, from its values at four points."""
    (a, c, d, b), (at_a, at_c, at_d, at_b) = points, values
    fall, middle, rise = jnp.minimum(at_c - at_a, 0), at_d - at_c, jnp.maximum(at_b - at_d, 0)
    from_left = at_c + _scaled(fall, d - c, c - a)
    from_right = at_d - _scaled(rise, d - c, b - d)
    outside = jnp.minimum(
        at_c - _scaled(jnp.maximum(middle, 0), c - a, d - c), at_d + _scaled(jnp.minimum(middle, 0), b - d, d - c)
    )
    return jnp.minimum(jnp.minimum(at_c, at_d), jnp.minimum(jnp.maximum(from_left, from_right), outside))


def _scaled(change: jax.Array, to: jax.Array, known: jax.Array) -> jax.Array:
    """`change * to / known`; where the known distance is 0 nothing bounds it, unless there is no way to go."""
    prolonged = change * (to / jnp.where(known > 0, known, 1))
    beyond = jnp.where(change > 0, jnp.inf, jnp.where(change < 0, -jnp.inf, change))  # undefined where the change is
    return jnp.where(to > 0, jnp.where(known > 0, prolonged, beyond), 0)
