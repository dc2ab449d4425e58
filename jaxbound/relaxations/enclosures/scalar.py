"""The one scalar rule: lines around sigma(z) on [l, u] for any fused scalar function.

A line is a slope; its intercept is then exact,

    lower intercept(s) = min over z in [l, u] of sigma(z) - s z,

so every slope gives a sound line and methods differ only in the slopes they choose. The upper line is the lower line of
-sigma, negated. From the proved curvature of sigma (`curvature.analyse`) the minimum is at an end, at the border of a
piece, or in a convex piece where sigma'(z) = s. There a fixed number of bisections brackets the point; the tangent at
the bracket's end is below the convex piece, which makes the result rigorous, not merely close. Cells in which nothing
could be proved contribute their hull. By the envelope theorem the derivative is -z* in s and sigma'(z*) - s in the end
at which the minimum lies; it comes out by holding z* fixed.

The slope by default ("adaptive") is that of the convex hull of the graph at the midpoint of [l, u]: among all valid
lines the one with the smallest gap there, and in total. For ReLU it is CROWN's choice (the chord above; below 1 if
u > -l, else 0; Zhang et al. 2018), for S-shaped functions the chord or a tangent. It is found from chords between
sample points, moved to where they touch; what is left of their distance costs tightness, never soundness.

Rounding: intercepts are widened by a bound on the error of evaluating sigma and the line in floating point.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxbound.graph import Op
from jaxbound.relaxations.enclosures.curvature import Curvature, analyse
from jaxbound.relaxations.planes import Planes

Ends = tuple[jax.Array, jax.Array]

_SAMPLES = 8
"""Sample points on each side of the midpoint, for curved functions."""
_EVALUATION_ERROR = 8
"""Error of one evaluation of a curved function, in units of eps (1 + |z| + |sigma(z)|); tested per activation."""


def curvature_of(op: Op) -> Curvature:
    """What was proved of sigma when the graph was made."""
    curvature = analyse(op.program)
    assert curvature is not None
    return curvature


def interval(op: Op, inputs: Sequence[Ends], constants: Sequence) -> Ends:
    """The range of sigma on [l, u]."""
    ((lower, upper),) = inputs
    curvature = curvature_of(op)
    least = _least(op, curvature, 1, lower, upper, constants)
    return least, -_least(op, curvature, -1, lower, upper, constants)


def is_exact(op: Op, inputs: Sequence[Ends]) -> jax.Array:
    """Where [l, u] lies within one linear piece, so that tighter ends cannot improve the lines."""
    ((lower, upper),) = inputs
    linear = [piece for piece in curvature_of(op).pieces if piece.kind == "linear"]
    inside = [(lower >= piece.left) & (upper <= piece.right) for piece in linear]
    return jnp.any(jnp.stack(inside), axis=0) if inside else jnp.zeros(jnp.shape(lower), bool)


def planes(op: Op, inputs: Sequence[Ends], constants: Sequence, lower_slope: str, slopes=None) -> Planes:
    """Lines with the chosen (or given) slopes and exact intercepts."""
    ((lower, upper),) = inputs
    curvature = curvature_of(op)
    finite = jnp.isfinite(lower) & jnp.isfinite(upper)
    low, high = jnp.where(finite, lower, 0), jnp.where(finite, upper, 0)
    if slopes is None:
        above = -hull_slope(op, curvature, -1, low, high, constants)
        below = _lower_slope(lower_slope, op, curvature, low, high, constants, above)
    else:
        below, above = slopes
    below, above = jnp.where(finite, below, 0), jnp.where(finite, above, 0)
    least, most = interval(op, inputs, constants)
    floor = intercept(op, curvature, 1, below, low, high, constants)
    ceiling = -intercept(op, curvature, -1, -above, low, high, constants)
    return Planes((below,), jnp.where(finite, floor, least), (above,), jnp.where(finite, ceiling, most))


def intercept(op: Op, curvature: Curvature, sign: int, slope, lower, upper, constants) -> jax.Array:
    """A lower bound, exact up to rounding, of min over [lower, upper] of sign * sigma(z) - slope * z."""

    def gap(z):
        return sign * op.program(z, *constants) - slope * z

    held = jax.lax.stop_gradient((slope, lower, upper, tuple(constants)))
    found = [_bisect(op, sign, piece, *held) for piece in curvature.pieces if piece.kind == _convex(sign)]
    points = [lower, upper, *(jnp.clip(p, lower, upper) for p in _borders(curvature)), *(z for z, _ in found)]
    values = [gap(z) for z in points]
    attained = jnp.min(jnp.stack(values), axis=0)
    rigorous = jnp.min(jnp.stack(values[: len(values) - len(found)] + [bound for _, bound in found]), axis=0)
    for cell in curvature.cells:
        left, right = jnp.clip(cell.left, lower, upper), jnp.clip(cell.right, lower, upper)
        hull = (cell.lower if sign > 0 else -cell.upper) - jnp.maximum(slope * left, slope * right)
        rigorous = jnp.minimum(rigorous, jnp.where(_meets(cell, lower, upper), hull, jnp.inf))
    reach = jnp.maximum(jnp.abs(lower), jnp.abs(upper))
    size = jnp.max(jnp.abs(jnp.stack(values)), axis=0) + 2 * jnp.abs(slope) * reach
    rigorous = rigorous - _error(curvature, reach, size)
    rigorous = jnp.where(jnp.isnan(rigorous), -jnp.inf, rigorous)
    known = jnp.isfinite(attained)
    return jnp.where(known, attained + jax.lax.stop_gradient(jnp.where(known, rigorous - attained, 0)), rigorous)


def hull_slope(op: Op, curvature: Curvature, sign: int, lower, upper, constants) -> jax.Array:
    """The slope, at the midpoint, of the convex hull of the graph of sign * sigma from below."""
    middle = lower / 2 + upper / 2
    left, right = _samples(curvature, lower, middle), _samples(curvature, upper, middle)

    def value(z):
        return sign * op.program(z, *constants)

    z_left, z_right = left[:, None], right[None]
    valid = (z_left < middle) & (z_right > middle)
    slope = (value(right)[None] - value(left)[:, None]) / jnp.where(valid, z_right - z_left, 1)
    height = jnp.where(valid, value(left)[:, None] + slope * (middle - z_left), jnp.inf)
    best = jnp.argmin(height.reshape(-1, *jnp.shape(middle)), axis=0)[None]
    start = jnp.take_along_axis(left, best // len(right), axis=0)[0]
    stop = jnp.take_along_axis(right, best % len(right), axis=0)[0]
    if not curvature.is_piecewise_linear:
        start, stop = _touch(op, sign, start, stop, (lower, middle, upper), constants)
    open_ = (start < middle) & (stop > middle)
    chord = (value(stop) - value(start)) / jnp.where(open_, stop - start, 1)
    bridged = open_ & (value(start) + chord * (middle - start) <= value(middle))
    tangent = _derivative(op, sign, middle, constants)
    return _within(curvature, sign, jnp.where(bridged, chord, tangent))


def _touch(op: Op, sign: int, start, stop, ends, constants) -> Ends:
    """Move two sample points to where the line through them touches the graph, or to the ends of the interval.

    Newton's steps on sigma'(z) = slope, each kept near its sample; a point off by d tilts the line by order d squared.
    """
    lower, middle, upper = jax.lax.stop_gradient(ends)
    held = jax.lax.stop_gradient(tuple(constants))
    reach = (upper - lower) / (2 * _SAMPLES)
    first, last = jax.lax.stop_gradient((start, stop))
    near_first, near_last = first, last

    def move(z, near, slope):
        def rise(t):
            return _derivative(op, sign, t, held)

        steepness, bend = jax.jvp(rise, (z,), (jnp.ones_like(z),))
        step = (steepness - slope) / jnp.maximum(jnp.abs(bend), jnp.finfo(z.dtype).tiny)
        return jnp.clip(z - jnp.clip(step, -reach, reach), near - reach, near + reach)

    for _ in range(4):
        rise = sign * (op.program(last, *held) - op.program(first, *held))
        slope = rise / jnp.where(last > first, last - first, 1)
        first = jnp.clip(move(first, near_first, slope), lower, middle)
        last = jnp.clip(move(last, near_last, slope), middle, upper)
    # a point at an end moves with it; elsewhere the line does not change with its point of contact
    return jnp.clip(first, ends[0], ends[1]), jnp.clip(last, ends[1], ends[2])


def support_range(op: Op, curvature: Curvature, sign: int, lower, upper, constants) -> Ends:
    """The slopes of the convex hull of sign * sigma at the two ends: slopes outside gain nothing."""
    points = jnp.concatenate([_samples(curvature, lower, upper), _samples(curvature, upper, lower)])
    values = sign * op.program(points, *constants)
    ends = []
    for end, choose in ((lower, jnp.min), (upper, jnp.max)):
        at_end = sign * op.program(end, *constants)
        away = points != end
        chords = (values - at_end) / jnp.where(away, points - end, 1)
        tangent = _derivative(op, sign, end, constants)
        ends.append(_within(curvature, sign, choose(jnp.where(away, chords, tangent), axis=0)))
    return ends[0], jnp.maximum(ends[0], ends[1])


def _lower_slope(rule: str, op: Op, curvature: Curvature, lower, upper, constants, above) -> jax.Array:
    if rule == "adaptive":
        return hull_slope(op, curvature, 1, lower, upper, constants)
    if rule == "parallel":
        return above
    flattest, steepest = support_range(op, curvature, 1, lower, upper, constants)
    return jnp.clip({"zero": 0.0, "one": 1.0}[rule], flattest, steepest).astype(jnp.result_type(lower))


def _least(op: Op, curvature: Curvature, sign: int, lower, upper, constants) -> jax.Array:
    """A lower bound of sign * sigma on [lower, upper]."""
    points = [lower, upper]
    if not curvature.is_monotone:
        points += [jnp.clip(p, lower, upper) for p in (*_borders(curvature), *curvature.critical)]
    values = jnp.stack([sign * op.program(z, *constants) for z in points])
    least = jnp.min(values, axis=0)
    least = least - jax.lax.stop_gradient(
        _error(curvature, jnp.maximum(jnp.abs(lower), jnp.abs(upper)), jnp.abs(least))
    )
    for cell in curvature.cells:
        hull = cell.lower if sign > 0 else -cell.upper
        least = jnp.where(_meets(cell, lower, upper), jnp.minimum(least, hull), least)
    return jnp.where(jnp.isnan(least), -jnp.inf, least)


def _bisect(op: Op, sign: int, piece, slope, lower, upper, constants) -> Ends:
    """Near the minimum of sign * sigma(z) - slope * z over a convex piece: the point, and a bound of the minimum."""
    low, high = jnp.clip(piece.left, lower, upper), jnp.clip(piece.right, lower, upper)
    steps = 40 if jnp.result_type(lower) == jnp.float64 else 22

    def gap_and_slope(z):
        value, derivative = jax.jvp(lambda t: op.program(t, *constants), (z,), (jnp.ones_like(z),))
        return sign * value - slope * z, sign * derivative - slope

    def step(_, state):
        low, high, bound_low, bound_high, slope_low, slope_high = state
        middle = low / 2 + high / 2
        value, rise = gap_and_slope(middle)
        up = rise > 0
        return (
            jnp.where(up, low, middle), jnp.where(up, middle, high),
            jnp.where(up, bound_low, value), jnp.where(up, value, bound_high),
            jnp.where(up, slope_low, rise), jnp.where(up, rise, slope_high),
        )  # fmt: skip

    shape = jnp.broadcast_shapes(jnp.shape(slope), jnp.shape(lower))
    unknown, flat = jnp.full(shape, -jnp.inf, low.dtype), jnp.zeros(shape, low.dtype)
    start = jnp.broadcast_to(low, shape), jnp.broadcast_to(high, shape), unknown, unknown, flat, flat
    low, high, bound_low, bound_high, slope_low, slope_high = jax.lax.fori_loop(0, steps, step, start)
    # a convex function is above its tangents; only slopes met inside the piece count, its ends may be kinks
    bound = jnp.maximum(bound_low + slope_low * (high - low), bound_high - slope_high * (high - low))
    return jnp.where(bound_low > bound_high, low, high), bound


def _samples(curvature: Curvature, end, other) -> jax.Array:
    """Points from an end towards (not including) another: the end, the borders between, and, if curved, a few more."""
    low, high = jnp.minimum(end, other), jnp.maximum(end, other)
    points = [end, *(jnp.clip(p, low, high) for p in _borders(curvature))]
    if not curvature.is_piecewise_linear:
        points += [end + (other - end) * (k / _SAMPLES) for k in range(1, _SAMPLES)]
    return jnp.stack(points)


def _borders(curvature: Curvature) -> tuple[float, ...]:
    """The finite ends of the pieces, each once."""
    ends = {end for piece in curvature.pieces for end in (piece.left, piece.right)}
    return tuple(sorted(end for end in ends if abs(end) < float("inf")))


def _derivative(op: Op, sign: int, z, constants) -> jax.Array:
    return sign * jax.jvp(lambda t: op.program(t, *constants), (z,), (jnp.ones_like(z),))[1]


def _within(curvature: Curvature, sign: int, slope) -> jax.Array:
    """Slopes of difference quotients are noisy on short intervals; they stay within those of sigma."""
    low, high = curvature.slope_range if sign > 0 else (-curvature.slope_range[1], -curvature.slope_range[0])
    slope = jnp.clip(slope, low, high)
    return jnp.where(jnp.isfinite(slope), slope, 0)


def _convex(sign: int) -> str:
    return "convex" if sign > 0 else "concave"


def _meets(cell, lower, upper) -> jax.Array:
    return (lower <= cell.right) & (upper >= cell.left)


def _error(curvature: Curvature, reach, size) -> jax.Array:
    """A bound on the rounding error of values of this size at points of this reach."""
    eps = jnp.finfo(jnp.result_type(size)).eps
    if curvature.is_piecewise_linear:
        return 2 * eps * size
    return _EVALUATION_ERROR * eps * (1 + reach + size) + curvature.slack
