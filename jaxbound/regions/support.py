"""What bounds ask of a region: the least value of a linear function, where it is taken, and points inside.

The support function of a box is taken at an end per coordinate; that of a ball is s.center - radius * ||s||_q with
1/p + 1/q = 1; a ball and a clip box together have a Lagrangian bound (see `balls`).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxbound import errors
from jaxbound._compat import owned
from jaxbound.regions import balls
from jaxbound.regions.polytopes import Polytope
from jaxbound.regions.rounding import cast_to
from jaxbound.regions.sets import SHAPED, Box, LpBall, Region, box_ends, enclosing_box, flat_ball, is_box, leaf_struct
from jaxbound.regions.zonotopes import Zonotope

_REACH = 1000.0  # how far `sample` goes where a region has no end


def minimum(region: Region, slope: ArrayLike) -> jax.Array:
    """The least value of a linear function: how linear bounds become numbers ("concretize").

    `minimum(region, slope) <= sum(slope * x)` for every `x` in the region, with equality for some `x`.

    Args:
        region: any non-empty region; the minima of separate balls (`batch_ndim`) add up.
        slope: floating, shape `(*leading, *leaf shape)`; any other shape raises a ValueError.

    Returns:
        Shape `(*leading)`. A coefficient that is exactly 0 ignores an unbounded coordinate; whatever is unbounded,
        overflows or is undefined gives -inf, never NaN.

    Rounding: up to gamma_n of the sums, over |slope||x|. A ball with a clip box is widened by (4 + log2 n) units of
        rounding, which covers the error of the measured distance when the two barely meet.

    Reference: Hoelder's inequality; with a clip box, Lagrangian duality (module docstring).

    >>> minimum(LpBall(jnp.zeros(3), 1.0, 1), jnp.array([[1.0, -3.0, 2.0], [0.0, 0.0, 0.0]]))
    Array([-3.,  0.], dtype=float32)
    """
    slope, leading = _rows(region, slope)
    if isinstance(region, SHAPED):
        return region.minimum(slope)
    if is_box(region):
        return _box_minimum(*enclosing_box(region), slope, slope.ndim - len(leading))
    assert isinstance(region, LpBall)
    ball = flat_ball(region)
    slope = slope.reshape(leading + ball.center.shape)
    finite = jnp.isfinite(ball.radius)
    if region.clip is None:
        weights = slope if ball.share is None else slope * ball.share
        spread = -balls.vector_norm(weights, balls.dual_exponent(region.norm))
        unbounded = jnp.where(spread == 0, 0, -jnp.inf)
    else:
        spread = balls.clipped_spread(ball, slope, region.norm)
        unbounded = _box_minimum(ball.low - ball.center, ball.high - ball.center, slope, 1)
    around = jnp.where(finite, jnp.where(finite, ball.radius, 0) * spread, unbounded)
    if region.clip is not None:
        around = around - jnp.where(finite, balls.underflow(ball, slope), 0)
        # The clip box alone is a bound too: that of a large ball, whose units hide it.
        around = jnp.where((ball.radius > 0) & (unbounded > around), unbounded, around)
    value = jnp.sum(slope * ball.center, axis=-1) + around
    value = jnp.where((ball.radius >= 0) & jnp.isfinite(value), value, -jnp.inf)
    return jnp.sum(value, axis=tuple(range(len(leading), value.ndim)))


def minimizer(region: Region, slope: ArrayLike) -> jax.Array:
    """A point of the region where `sum(slope * x)` is least: it attains `minimum` up to rounding.

    The shape is that of `slope`, `(*leading, *leaf shape)` (a ValueError otherwise), and the point is inside as
    `project` states it; +-inf where the region has no end. A zero coefficient leaves a box's coordinate in the middle.

    >>> minimizer(LpBall(jnp.zeros(2), 5.0, 1), jnp.array([3.0, 4.0]))
    Array([ 0., -5.], dtype=float32)
    """
    slope, leading = _rows(region, slope)
    if isinstance(region, Zonotope):
        return region.minimizer(slope)
    if is_box(region):
        return _box_end(*box_ends(region, slope.dtype, outward=False), slope)
    _refuse_points(region)
    assert isinstance(region, LpBall)
    ball = flat_ball(region)
    rows = slope.reshape(leading + ball.center.shape)
    unit = balls.least_point(ball, rows, region.norm)
    radius = jnp.where(jnp.isfinite(ball.radius), ball.radius, 0)[..., None]
    unit = unit if ball.share is None else unit * ball.share
    points = balls.into_ball(ball, jnp.clip(ball.center + radius * unit, ball.low, ball.high), region.norm)
    endless = jnp.isinf(ball.radius)[..., None]
    return jnp.where(endless, _box_end(ball.low, ball.high, rows), points).reshape(slope.shape)


def project(region: Region, x: ArrayLike) -> jax.Array:
    """The point of the region nearest to `x`, for a box and for p = 1, 2 (clip box included).

    For other p: where the segment from `x` to the center, each point cut to the clip box, enters the region.

    `x` is finite, of shape `(*leading, *leaf shape)` (a ValueError otherwise), and comes back unchanged where it is
    inside: projecting twice changes nothing.

    Rounding: inside the clip box as the dtype holds it; `||result - center||_p <= radius * (1 + (4 + log2 n) eps)`.

    Reference: Duchi et al. 2008 for p = 1; the threshold or scale of the KKT conditions is found by bisection.

    >>> project(LpBall(jnp.zeros(2), 1.0, 1), jnp.array([2.0, 0.5])).round(3)
    Array([1., 0.], dtype=float32)
    """
    x, leading = _rows(region, x)
    _refuse_points(region, Zonotope)
    if is_box(region):
        return jnp.clip(x, *box_ends(region, x.dtype, outward=False))
    assert isinstance(region, LpBall)
    ball = flat_ball(region)
    return balls.into_ball(ball, x.reshape(leading + ball.center.shape), region.norm).reshape(x.shape)


def sample(region: Region, key: jax.Array, shape: tuple[int, ...] = (), *, extremes: bool = False) -> jax.Array:
    """Random points of the region: uniform for a box or a ball; with a clip box the ball's points are projected.

    Args:
        region: any non-empty region; a side without end is sampled a thousand units far.
        key: a typed or raw PRNG key.
        shape: the result is `(*shape, *leaf shape)`, inside the region as `project` states it.
        extremes: points where a random direction is least instead: corners of a box, faces' centers, the surface of a
            ball, its poles; half of the directions see a single coordinate of each ball (or of the box).

    >>> sample(Box(jnp.zeros(3), jnp.ones(3)), jax.random.key(0), (5,)).shape
    (5, 3)
    """
    _refuse_points(region)
    region, struct = _truncated(region), leaf_struct(region)
    whole = (*shape, *struct.shape)
    if extremes:
        direction_key, coin_key = jax.random.split(key)
        direction = jax.random.normal(direction_key, whole, struct.dtype)
        batch_ndim = 0 if isinstance(region, Box) else region.batch_ndim
        axes = tuple(range(len(shape) + batch_ndim, len(whole)))
        largest = jnp.abs(direction) == jnp.max(jnp.abs(direction), axis=axes, keepdims=True)
        dense = jax.random.bernoulli(coin_key, shape=(*shape, *(1,) * len(struct.shape)))
        return minimizer(region, jnp.where(dense | largest, direction, 0))
    if isinstance(region, Zonotope):
        return region.sample(key, shape)
    if is_box(region):
        lower, upper = box_ends(region, struct.dtype, outward=False)
        part = jax.random.uniform(key, whole, struct.dtype)
        return jnp.clip(lower * (1 - part) + upper * part, lower, upper)
    assert isinstance(region, LpBall)
    ball = flat_ball(region)
    *batch, features = ball.center.shape
    unit = jax.random.ball(key, features, region.norm, (*shape, *batch), struct.dtype)
    unit = unit if ball.share is None else unit * ball.share
    return balls.into_ball(ball, ball.center + ball.radius[..., None] * unit, region.norm).reshape(whole)


def terms(region: Region) -> int:
    """How many rounded operations an entry of `minimum` passes through; for `gamma` of them."""
    return region.terms() if isinstance(region, SHAPED) else leaf_struct(region).size + 10


def _refuse_points(region: Region, *others: type) -> None:
    """Refuse regions of which no points are drawn."""
    if isinstance(region, (Polytope, *others)):
        kind = type(region).__name__
        raise errors.argument("the region", f"is a {kind}, of which no points are found", "use a Box or an LpBall")


def _rows(region: Region, values: ArrayLike) -> tuple[jax.Array, tuple[int, ...]]:
    """The values as an array that ends in the leaf's shape, and its leading shape."""
    struct = leaf_struct(region)
    values = owned(values, jnp.promote_types(jnp.result_type(values), struct.dtype))
    leading = values.ndim - len(struct.shape)
    if leading < 0 or values.shape[leading:] != struct.shape:
        raise errors.ArgumentError(
            f"shape {values.shape} does not end in {struct.shape}, the shape of the region's leaf"
        )
    return values, values.shape[:leading]


def _truncated(region: Region) -> Region:
    """The region without its infinite parts, for sampling."""
    dtype = leaf_struct(region).dtype
    if isinstance(region, Zonotope):
        return region
    if isinstance(region, LpBall):
        return dataclasses.replace(region, radius=jnp.minimum(cast_to(region.radius, dtype, 0), _REACH))
    lower, upper = enclosing_box(region)
    low, high = (jnp.where(jnp.isfinite(end), end, 0) for end in (lower, upper))
    return Box(jnp.where(low == lower, low, high - _REACH), jnp.where(high == upper, high, low + _REACH))


def _box_end(lower: jax.Array, upper: jax.Array, slope: jax.Array) -> jax.Array:
    """The end of each interval where slope * x is least; at slope 0 a finite point between the ends."""
    middle = 0.5 * lower + 0.5 * upper
    resting = jnp.clip(jnp.zeros_like(lower), lower, upper)
    resting = jnp.where(jnp.isfinite(middle), middle, jnp.where(jnp.isfinite(resting), resting, 0))
    return jnp.where(slope > 0, lower, jnp.where(slope < 0, upper, resting))


def _box_minimum(lower: jax.Array, upper: jax.Array, slope: jax.Array, leaf_ndim: int) -> jax.Array:
    """min <slope, x> over a box, summed over the last `leaf_ndim` axes."""
    end = _box_end(lower, upper, slope)
    finite = jnp.isfinite(end)
    terms = jnp.where(finite, slope * jnp.where(finite, end, 0), -jnp.inf)
    total = jnp.sum(terms, axis=tuple(range(slope.ndim - leaf_ndim, slope.ndim)))
    return jnp.where(jnp.isfinite(total), total, -jnp.inf)
