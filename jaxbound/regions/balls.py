r"""l_p balls cut by a box, on flattened axes: norms, the support function and projection.

For a ball and a clip box together, put u = (x - center) / radius and let [a, b] be the clip box in those units, cut to
[-1, 1]. For every multiplier m >= 0

    min over u in [a, b], ||u||_p <= 1 of s.u  >=  sum_i min over u_i in [a_i, b_i] of (s_i u_i + m |u_i|^p / p) - m / p

because the extra term is never positive inside the ball. The right side separates: each u_i is the unconstrained
minimiser, -sign(s_i) (|s_i| / m)^(1 / (p - 1)), cut to [a_i, b_i] (for p = 1: the nearest point to 0 where |s_i| <= m,
else an end). Both sides are equal at the best m, which bisection on log m finds because ||u||_p falls as m grows; this
includes centres outside the clip box. A multiplier that is a little wrong costs tightness, never soundness, and by the
envelope theorem the value is differentiated with the multiplier held.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxbound.backend.tracing import rolled


class Ball(NamedTuple):
    """An `LpBall` with its norm axes flattened to one."""

    center: jax.Array  # (*batch, features), as low and high
    radius: jax.Array  # (*batch)
    low: jax.Array
    high: jax.Array
    share: jax.Array | None = None
    """Where radii differ between features, (*batch, features): each as a part of the largest, which `radius` is."""


def weighted(radii: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The largest radius of each ball, and the others as parts of it, rounded up; (*batch, features)."""
    radius, limits = jnp.max(radii, axis=-1, initial=0), jnp.finfo(radii.dtype)
    plain = (radius > 0) & jnp.isfinite(radius)  # an endless ball is endless in every direction
    ratio = radii / jnp.where(plain, radius, 1)[..., None]
    rounded = jnp.maximum(ratio * (1 + 2 * limits.eps), limits.tiny)
    part = jnp.where(radii == 0, 0, jnp.minimum(rounded, 1))
    return jnp.where(jnp.any(jnp.isnan(radii), axis=-1), jnp.nan, radius), jnp.where(plain[..., None], part, 1)


def unweighted(ball: Ball, offset: jax.Array) -> jax.Array:
    """An offset in units in which all radii are the largest; 0 where a radius is 0."""
    if ball.share is None:
        return offset
    return jnp.where(ball.share == 0, 0, offset / jnp.where(ball.share == 0, 1, ball.share))


def grown(radius: jax.Array, moved: jax.Array, batch_ndim: int) -> jax.Array:
    """Radii per feature that still hold the ball when some of its center's coordinates move by subnormal numbers.

    With m of them moved by d_i, and r'_i = (1 + 2 m eps) max(r_i, tiny / eps) there, ||(x - center + d) / r'|| is at
    most 1 / (1 + 2 m eps) + m eps <= 1.
    """
    limits = jnp.finfo(radius.dtype)
    count = jnp.sum(moved, axis=tuple(range(batch_ndim, moved.ndim)), keepdims=True)
    wide = jnp.where(moved, jnp.maximum(radius, limits.tiny / limits.eps), radius)
    return jnp.where(count > 0, wide * (1 + (2 * count + 2) * limits.eps), radius)


def dual_exponent(norm: float) -> float:
    """q with 1/p + 1/q = 1."""
    return math.inf if norm == 1 else norm / (norm - 1)


def slack(values: jax.Array) -> float:
    """The relative error allowed to a distance measured over the last axis; XLA sums in blocks, hence log n, not n."""
    return (4 + math.log2(max(values.shape[-1], 1))) * float(jnp.finfo(values.dtype).eps)


def vector_norm(values: jax.Array, order: float) -> jax.Array:
    """The norm over the last axis, scaled so that it neither overflows nor underflows; its gradient at 0 is 0."""
    if order in (1, math.inf):
        size = jnp.abs(values)
        return jnp.sum(size, axis=-1) if order == 1 else jnp.max(size, axis=-1, initial=0)
    weights, peak = normalised(values)
    total = jnp.sum(jnp.abs(weights) ** order, axis=-1)
    return peak * jnp.where(peak == 0, 1, total) ** (1 / order)


def normalised(values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The values over their largest size on the last axis, which is held constant, and that size."""
    peak = lax.stop_gradient(jnp.max(jnp.abs(values), axis=-1, initial=0))
    return values / jnp.where(peak == 0, 1, peak)[..., None], peak


def _bisect(outside: Callable[[jax.Array], jax.Array], low: jax.Array, high: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Halve [low, high], exponents of two, around where `outside` turns from true (low) to false (high)."""

    def halve(_: jax.Array, ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        middle = 0.5 * (ends[0] + ends[1])
        beyond = outside(middle)
        return jnp.where(beyond, middle, ends[0]), jnp.where(beyond, ends[1], middle)

    # The exponents span less than 2^6 bits' worth of mantissas: this many steps resolve the number itself.
    return rolled(lax.fori_loop)(0, jnp.finfo(low.dtype).nmant + 6, halve, (low, high))


def _unit_limits(ball: Ball) -> tuple[jax.Array, jax.Array]:
    """The clip box seen from the center in units of the radius, cut to [-1, 1] and rounded outward."""
    radius = jnp.where((ball.radius > 0) & jnp.isfinite(ball.radius), ball.radius, 1)[..., None]
    if ball.share is not None:
        radius = jnp.where(ball.share > 0, radius * ball.share, 1)

    def limit(end: jax.Array, side: int) -> jax.Array:
        cuts = side * (end - ball.center) < radius
        distance = jnp.where(cuts, end - ball.center, 0)
        ratio = lax.stop_gradient(distance / radius)
        limits = jnp.finfo(ratio.dtype)
        lost = jnp.where(distance == 0, 0, limits.tiny)  # where the quotient underflows
        outward = side * lax.stop_gradient(2 * limits.eps * jnp.abs(ratio) + lost)
        # The second term is 0 and has the ratio's derivative, without the square of a small radius.
        ratio = ratio + (distance - ratio * radius) / lax.stop_gradient(radius) + outward
        return side * jnp.where(cuts, jnp.minimum(side * ratio, 1), 1)

    return limit(ball.low, -1), limit(ball.high, +1)


def _step(weights: jax.Array, multiplier: jax.Array, low: jax.Array, high: jax.Array, norm: float) -> jax.Array:
    """Where weights * u + multiplier * |u|^norm / norm is least over [low, high]; constant between the ends."""
    size, multiplier = jnp.abs(weights), multiplier[..., None]
    length = jnp.where(size > multiplier, jnp.inf, 0) if norm == 1 else (size / multiplier) ** (1 / (norm - 1))
    free = jnp.where(size == 0, 0, -jnp.sign(weights) * length)
    return jnp.clip(lax.stop_gradient(free), low, high)


def _meet(outer: jax.Array, inner: jax.Array, norm: float) -> jax.Array:
    """Between an outer and an inner point, where the unit sphere is; the outer point if the ball holds it."""
    far, near = (jnp.sum(jnp.abs(point) ** norm, axis=-1, keepdims=True) for point in (outer, inner))
    share = jnp.clip((1 - near) / jnp.maximum(far - near, jnp.finfo(far.dtype).tiny), 0, 1)
    return inner + lax.stop_gradient(jnp.where(far <= 1, 1, share)) * (outer - inner)


@functools.partial(jax.jit, static_argnames="norm")
def _multipliers(weights: jax.Array, low: jax.Array, high: jax.Array, norm: float) -> tuple[jax.Array, jax.Array]:
    """Two multipliers that enclose the best one; the smaller is 0 where the box's own end lies in the ball."""
    weights, low, high = lax.stop_gradient((weights, low, high))
    dual = vector_norm(weights, dual_exponent(norm))
    bits = jnp.finfo(weights.dtype).nmant
    # Alone, the ball's multiplier is the dual norm; a cut ball's is smaller, unless the center is outside the box.
    first, last = jnp.full_like(dual, -bits - 8), jnp.full_like(dual, bits)

    def outside(exponent: jax.Array) -> jax.Array:
        point = _step(weights, dual * jnp.exp2(exponent), low, high, norm)
        return jnp.sum(jnp.abs(point) ** norm, axis=-1) > 1

    near, far = _bisect(outside, first, last)
    return jnp.where(near == first, 0, dual * jnp.exp2(near)), dual * jnp.exp2(far)


def clipped_spread(ball: Ball, slope: jax.Array, norm: float) -> jax.Array:
    """min <slope, u> over the unit ball cut by the clip box seen from the center (module docstring)."""
    weights, peak = normalised(slope if ball.share is None else slope * ball.share)
    low, high = _unit_limits(ball)
    near, far = _multipliers(weights, low, high, norm)
    choices = [(multiplier, _step(weights, multiplier, low, high, norm)) for multiplier in (near, far)]
    if norm == 1:
        # Piecewise linear in the multiplier: best at a corner, a weight's size, where that coordinate may go part way.
        size = lax.stop_gradient(jnp.abs(weights))
        corner = jnp.where(near == 0, 0, jnp.max(jnp.where(size <= far[..., None], size, 0), axis=-1, initial=0))
        below = corner * (1 - 2 * jnp.finfo(size.dtype).eps)
        choices = [(corner, _meet(*(_step(weights, m, low, high, norm) for m in (below, corner)), norm=norm))]

    def value(multiplier: jax.Array, point: jax.Array) -> jax.Array:
        excess = jnp.sum(jnp.abs(point) ** norm, axis=-1) - (1 + slack(point))
        return jnp.sum(weights * point, axis=-1) + multiplier * excess / norm

    ball_alone = -vector_norm(weights, dual_exponent(norm))
    least = functools.reduce(jnp.maximum, [value(*choice) for choice in choices], ball_alone)
    # Where ball and box meet in one point but for rounding, the value above can pass what that point attains.
    return peak * jnp.minimum(least, jnp.sum(weights * jnp.clip(0, low, high), axis=-1))


def underflow(ball: Ball, slope: jax.Array) -> jax.Array:
    """What products in units of the radius may lose below the smallest normal number, with the radius as a factor."""
    peak = jnp.max(jnp.abs(slope), axis=-1, initial=0)
    unit = 4 * slope.shape[-1] * float(jnp.finfo(slope.dtype).tiny)
    return lax.stop_gradient(jnp.where(peak == 0, 0, unit * jnp.maximum(ball.radius, 1) * jnp.maximum(peak, 1)))


def least_point(ball: Ball, slope: jax.Array, norm: float) -> jax.Array:
    """A point of the unit ball cut by the clip box, seen from the center, where `<slope, u>` is (nearly) least."""
    weights, _ = normalised(slope if ball.share is None else slope * ball.share)
    low, high = _unit_limits(ball)
    near, far = _multipliers(weights, low, high, norm)
    return _meet(_step(weights, near, low, high, norm), _step(weights, far, low, high, norm), norm)


@functools.partial(jax.jit, static_argnames="norm")
def into_ball(ball: Ball, points: jax.Array, norm: float) -> jax.Array:
    """`project` on flattened axes: points (*leading, *batch, features)."""
    offset = unweighted(ball, points - ball.center)
    size = vector_norm(offset, norm)
    inside = (size <= ball.radius * (1 + slack(offset))) & jnp.all(points == jnp.clip(points, ball.low, ball.high), -1)
    if ball.share is not None:
        inside = inside & jnp.all((ball.share > 0) | (points == ball.center), axis=-1)
    held, held_size = lax.stop_gradient((offset, size))
    bits = jnp.finfo(offset.dtype).nmant
    # log2 of the threshold over the largest offset for p = 1, else of what the offset is divided by.
    first = jnp.full_like(held_size, -bits - 8 if norm == 1 else 0)
    ratio = jnp.maximum(held_size / jnp.where(ball.radius > 0, ball.radius, 1), 1)
    last = jnp.zeros_like(held_size) if norm == 1 else jnp.log2(ratio) + bits

    def moved(offset: jax.Array, exponent: jax.Array) -> jax.Array:
        scale = jnp.exp2(exponent)[..., None]
        if norm == 1:
            threshold = jnp.max(jnp.abs(offset), axis=-1, keepdims=True, initial=0) * scale
            offset = jnp.sign(offset) * jnp.maximum(jnp.abs(offset) - threshold, 0)
        else:
            offset = offset / scale
        offset = offset if ball.share is None else offset * ball.share
        return jnp.clip(ball.center + offset, ball.low, ball.high)

    def outside(exponent: jax.Array) -> jax.Array:
        return vector_norm(unweighted(ball, moved(held, exponent) - ball.center), norm) > ball.radius

    _, far = _bisect(outside, first, last)
    far = jnp.where(far == last, jnp.inf, far)  # never inside: left is the clip box's nearest point to the center
    return jnp.where(inside[..., None], points, moved(offset, far))
