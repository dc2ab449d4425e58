"""Planes around the maximum over some axes, `y = max_k x_k` with x_k in [l_k, u_k].

Let k* be the entry with the largest lower bound and m that bound. Below, `y >= x_k*`. Above, two planes are valid:

    y <= max_k u_k                                              (a constant), and
    y <= x_k* + sum over k != k* of chord of relu(x_k - m)      (since y <= m + sum_k relu(x_k - m), and x_k* >= m).

The one that is lower at the middle of the box is taken. Where k* dominates (m is at least every other upper bound) the
second is `x_k*` itself, so the relaxation is exact there. Averages are valid too, of two entries below and of the two
planes above, if a place between them is given.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxbound.graph import Op
from jaxbound.relaxations.enclosures.meet import among
from jaxbound.relaxations.planes import Planes, is_wide
from jaxbound.relaxations.slopes import ADAPTIVE, Freedom, Places, SlopeRule

Ends = tuple[jax.Array, jax.Array]


def axes(op: Op) -> tuple[int, ...]:
    """The axes over which a node reduces."""
    return tuple(dict(op.params)["axes"])


def describe(op: Op) -> str:
    """How it is relaxed."""
    return "one entry below, chords above"


def interval(op: Op, inputs: Sequence[Ends], constants: Sequence) -> Ends:
    """The maximum is monotone in every entry."""
    ((lower, upper),) = inputs
    return jnp.max(lower, axis=axes(op)), jnp.max(upper, axis=axes(op))


def is_exact(op: Op, position: int, ends: Ends) -> jax.Array:
    """Entries that certainly are not the maximum need no tighter bounds."""
    lower, upper = ends
    return upper < jnp.max(lower, axis=axes(op), keepdims=True)


def planes(op: Op, inputs: Sequence[Ends], constants: Sequence, rule: SlopeRule = ADAPTIVE) -> Planes:
    """One entry below; above the better of a constant and a sum of chords.

    Places are in [0, 1]: below among the entries by their lower bounds, above from the constant to the chords.
    """
    ((lower, upper),) = inputs
    reduced = axes(op)
    finite = jnp.all(jnp.isfinite(lower) & jnp.isfinite(upper), axis=reduced, keepdims=True)
    low, high = jnp.where(finite, lower, 0), jnp.where(finite, upper, 0)
    chosen = _first_largest(low, reduced)
    floor = jnp.max(low, axis=reduced, keepdims=True)
    width = high - low
    # too flat a chord would underflow
    wide = is_wide(width) & (high - floor >= 2 * jnp.finfo(op.dtype).tiny * jnp.maximum(width, 1))
    chord = jnp.where(wide, jnp.clip((high - floor) / jnp.where(wide, width, 1), 0, 1), 0)
    slope = jnp.where(chosen, 1, jnp.where(high > floor, chord, 0)).astype(low.dtype)
    # the chord of relu(x - m) from (l, 0) to (u, u - m); for u <= m it is 0; else it is flat where too short
    risen = jnp.where(chosen, 0, jnp.where(wide, -chord * low, high - floor))
    intercept = jnp.sum(jnp.where(high > floor, risen, 0), axis=reduced)
    ceiling = jnp.max(high, axis=reduced)
    tilted = (jnp.sum(slope * (low + high) / 2, axis=reduced) + intercept < ceiling).astype(low.dtype)
    zeros = jnp.zeros(op.shape, op.dtype)
    below, above = Places.within(0, 1, lambda: (zeros, tilted)).chosen(rule)
    weights = _weights(op, low, below)
    reach = jnp.sum(slope * jnp.maximum(jnp.abs(low), jnp.abs(high)), axis=reduced) + jnp.abs(ceiling)
    error = jax.lax.stop_gradient((8 + jnp.ndim(low)) * jnp.finfo(op.dtype).eps * reach)
    exact = (above == 0) | ((above == 1) & (jnp.sum(slope, axis=reduced) == 1))
    lost = jnp.where(jnp.max(weights, axis=reduced) < 1, 4 * error, 0)  # weights sum to 1 up to rounding
    least, most = interval(op, inputs, constants)
    known = jnp.squeeze(finite, reduced)
    return Planes(
        (jnp.where(finite, weights, 0),), jnp.where(known, -lost, least).astype(low.dtype),
        (jnp.where(finite, jnp.expand_dims(above, reduced) * slope, 0),),
        jnp.where(known, above * intercept + (1 - above) * ceiling + jnp.where(exact, 0, error), most),
    )  # fmt: skip


def freedom(op: Op, inputs: Sequence[Ends], constants: Sequence, rule: SlopeRule = ADAPTIVE) -> Freedom:
    """From the entry with the largest lower bound to that with the smallest; from the constant to the chords."""
    (sloped,) = planes(op, inputs, constants, rule).upper_slopes
    zeros = jnp.zeros(op.shape, op.dtype)
    tilted = jnp.any(sloped != 0, axis=axes(op)).astype(op.dtype)
    count = math.prod(op.input_shapes[0][axis] for axis in axes(op))
    return Freedom.linear(zeros, zeros + 1, (zeros, tilted), count=max(count, 2))


def _weights(op: Op, low: jax.Array, share: jax.Array) -> jax.Array:
    """Weights of the entries; at share 0 the first with the largest lower bound has all."""
    reduced = axes(op)
    last = range(-len(reduced), 0)
    moved = jnp.moveaxis(low, reduced, last)
    flat = moved.reshape(*moved.shape[: -len(reduced)], -1)
    return jnp.moveaxis(among(share, -flat, -1).reshape(moved.shape), last, reduced)


def _first_largest(values: jax.Array, reduced: tuple[int, ...]) -> jax.Array:
    """A mask with one entry over the axes: the first that is largest."""
    moved = jnp.moveaxis(values, reduced, range(-len(reduced), 0))
    flat = moved.reshape(*moved.shape[: -len(reduced)], -1)
    hot = jax.nn.one_hot(jnp.argmax(flat, axis=-1), flat.shape[-1], dtype=bool)
    return jnp.moveaxis(hot.reshape(moved.shape), range(-len(reduced), 0), reduced)
