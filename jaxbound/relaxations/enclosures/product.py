"""Planes around x * y on a box: the McCormick envelope (McCormick 1976, section 4).

With midpoints m and radii r, `(x - m_x)(y - m_y)` is at least `-(r_x r_y)`, attained in two corners, and every convex
combination of the two lower McCormick planes is a valid lower plane:

    x y  >=  (m_y - t r_y) x + (m_x - t r_x) y - ...,        t in [-1, 1],

t = 1 being the plane through the lower corner (l_x, l_y) and t = -1 the one through (u_x, u_y). All have the same
height at the middle of the box, hence the same gap in total. What differs is how steep they are: where x and y move on
their own, the plane falls by |m_y - t r_y| r_x + |m_x - t r_x| r_y, which is least for every t between m_x / r_x and
m_y / r_y (cut to [-1, 1]). Of these the one is taken that is flattest in y if the sign of x is the more certain, else
in x: a gate's value is then multiplied by as little as it must be. Above, x stands for -x. Other t may be given (the
node's slopes).

Where more is known of the product than its factors say (`Op.reach`: an entry over the norm), the interval is cut to it,
and a plane that is worse at the middle than that constant is the constant.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from jaxbound.graph import Op
from jaxbound.relaxations import affine
from jaxbound.relaxations.planes import Planes, least_of
from jaxbound.relaxations.slopes import ADAPTIVE, Freedom, Places, SlopeRule

Ends = tuple[jax.Array, jax.Array]

PLACES = (-1.0, 1.0)
"""The values of t."""


def describe(op: Op) -> str:
    """How it is relaxed."""
    return "McCormick planes"


def interval(op: Op, inputs: Sequence[Ends], constants: Sequence) -> Ends:
    """The range of x * y: the extreme corners."""
    (low_x, high_x), (low_y, high_y) = inputs
    corners = jnp.stack([_times(x, y) for x in (low_x, high_x) for y in (low_y, high_y)])
    low, high = least_of(corners), -least_of(-corners)
    limits = jnp.finfo(op.dtype)
    lost = sum(jnp.where(jnp.isfinite(reach), limits.tiny * (1 + reach), 0) for reach in _reaches(inputs))  # underflow
    error = jax.lax.stop_gradient(limits.eps * jnp.maximum(jnp.abs(low), jnp.abs(high)) + lost)
    low, high = low - error, high + error
    low, high = jnp.where(jnp.isnan(low), -jnp.inf, low), jnp.where(jnp.isnan(high), jnp.inf, high)
    most = _most(op)
    return jnp.where(low < -most, -most, low), jnp.where(high > most, most, high)


def _most(op: Op) -> float:
    """What the product's size does not pass, rounded up."""
    return op.reach * (1 + 2 * float(jnp.finfo(op.dtype).eps))


def is_exact(op: Op, position: int, ends: Ends) -> jax.Array:
    """Never: either factor's bounds are the slopes of the other."""
    return jnp.zeros(jnp.shape(ends[0]), bool)


def planes(op: Op, inputs: Sequence[Ends], constants: Sequence, rule: SlopeRule = ADAPTIVE) -> Planes:
    """A plane below and one above; their places are the parameters t in [-1, 1]."""
    finite = jnp.all(jnp.stack([jnp.isfinite(end) for ends in inputs for end in ends]), axis=0)
    boxes = [(jnp.where(finite, low, 0), jnp.where(finite, high, 0)) for low, high in inputs]
    (m_x, r_x), (m_y, r_y) = [((low + high) / 2, (high - low) / 2) for low, high in boxes]
    below, above = Places.within(*PLACES, lambda: _flattest(boxes)).chosen(rule)
    low_slopes = tuple(map(_normal, (m_y - below * r_y, m_x - below * r_x)))
    high_slopes = tuple(map(_normal, (m_y - above * r_y, m_x + above * r_x)))
    floor = _extreme(boxes, low_slopes, jnp.less)
    ceiling = _extreme(boxes, high_slopes, jnp.greater)
    room = affine.enlargement(op.dtype)
    reach_x, reach_y = (reach + room for reach in _reaches(boxes))
    error = jax.lax.stop_gradient(16 * jnp.finfo(op.dtype).eps * reach_x * reach_y)
    least, most = interval(op, inputs, constants)
    rising, falling = finite, finite
    if op.reach < math.inf:
        below, above = (m_x * slopes[0] + m_y * slopes[1] for slopes in (low_slopes, high_slopes))
        rising, falling = rising & (below + floor > -_most(op)), falling & (above + ceiling < _most(op))
    return Planes(
        tuple(jnp.where(rising, s, 0) for s in low_slopes), jnp.where(rising, floor - error, least),
        tuple(jnp.where(falling, s, 0) for s in high_slopes), jnp.where(falling, ceiling + error, most),
    )  # fmt: skip


def freedom(op: Op, inputs: Sequence[Ends], constants: Sequence, rule: SlopeRule = ADAPTIVE) -> Freedom:
    """t from -1 to 1."""
    ones = jnp.ones(op.shape, op.dtype)
    finite = jnp.all(jnp.stack([jnp.isfinite(end) for ends in inputs for end in ends]), axis=0)
    boxes = [(jnp.where(finite, low, 0), jnp.where(finite, high, 0)) for low, high in inputs]
    return Freedom.linear(-ones, ones, _flattest(boxes))


def _flattest(boxes: Sequence[Ends]) -> tuple[jax.Array, jax.Array]:
    """The parameters of the planes below and above (see the module's head)."""
    x, y = (_certainty(low / 2 + high / 2, high / 2 - low / 2) for low, high in boxes)
    first = jnp.abs(x) >= jnp.abs(y)
    return jnp.where(first, x, y), jnp.where(first, -x, y)


def _certainty(middle: jax.Array, radius: jax.Array) -> jax.Array:
    """The middle over the radius, cut to [-1, 1]; 1 or -1 where the sign is certain."""
    inner = (jnp.abs(middle) < radius) & (radius > math.sqrt(jnp.finfo(radius.dtype).tiny))
    return jnp.where(inner, middle / jnp.where(inner, radius, 1), jnp.where(middle < 0, -1, 1))


def _extreme(boxes: Sequence[Ends], slopes: Sequence[jax.Array], better: Callable) -> jax.Array:
    """x y minus a plane is extreme in a corner, since it is linear in each variable.

    Two corners tie. `jnp.min` would look for its result among them to share the derivative, and where XLA computes a
    corner twice with other roundings (a b - c d has two forms with a fused multiply-add) it may find none. A corner
    that overflows to NaN stays, as in `jnp.min`: nothing is known then.
    """
    (low_x, high_x), (low_y, high_y) = boxes
    corners = [x * y - slopes[0] * x - slopes[1] * y for x in (low_x, high_x) for y in (low_y, high_y)]
    choose = lambda best, corner: jnp.where(better(best, corner) | jnp.isnan(best), best, corner)  # noqa: E731
    return functools.reduce(choose, corners)


def _reaches(boxes: Sequence[Ends]) -> list[jax.Array]:
    return [jnp.maximum(jnp.abs(low), jnp.abs(high)) for low, high in boxes]


def _normal(slope: jax.Array) -> jax.Array:
    """A subnormal slope may count as 0, so it is 0: the plane is sound for every slope."""
    return jnp.where(jnp.abs(slope) < jnp.finfo(slope.dtype).tiny, 0, slope)


def _times(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.where((x == 0) | (y == 0), 0, x * y)
