"""Planes: linear functions below and above one nonlinear node, as functions of its inputs.

    sum_i <lower_slopes[i], x_i> + lower_intercept  <=  node(x)  <=  sum_i <upper_slopes[i], x_i> + upper_intercept

for all inputs within the intervals that the planes were made for. Slopes have the inputs' shapes; the products are
entry by entry, then summed over the axes that the node itself reduces (the maximum over an axis; none otherwise).
Constant planes have no slopes: they are what interval propagation knows.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Planes:
    """See the module's head. Leading axes beyond the node's own belong to rows (or groups of rows)."""

    lower_slopes: tuple[jax.Array, ...]
    lower_intercept: jax.Array
    upper_slopes: tuple[jax.Array, ...]
    upper_intercept: jax.Array

    @classmethod
    def constant(cls, lower: jax.Array, upper: jax.Array) -> Planes:
        """What an interval says."""
        return cls((), lower, (), upper)


def between(table: Any, share: jax.Array | None):
    """Averages of neighbours in a pytree of tables (first axis), at shares of [0, 1] with the shape of their entries.

    The average of two valid planes is valid, up to rounding. There is no gather: all is one fused loop. A share of None
    is the only entry.
    """

    def entry(k: int):
        return jax.tree.map(lambda leaf: leaf[k], table)

    if share is None:
        return entry(0)
    count = len(jax.tree.leaves(table)[0])
    position = share * (count - 1)
    first, second, part = entry(0), entry(min(1, count - 1)), position
    for k in range(1, count - 1):
        past = position >= k
        choose = lambda new, old, past=past: jnp.where(past, new, old)  # noqa: E731
        part = choose(position - k, part)
        first, second = jax.tree.map(choose, entry(k), first), jax.tree.map(choose, entry(k + 1), second)
    return jax.tree.map(lambda one, other: one + part * (other - one), first, second)


def spread(values: jax.Array, sides: int, rows: int) -> jax.Array:
    """From groups to rows: on each side, neighbours share what belongs to their group."""
    split = values.reshape(sides, -1, *values.shape[1:])
    shared = -(-rows // split.shape[1])
    return jnp.repeat(split, shared, axis=1)[:, :rows].reshape(sides * rows, *values.shape[1:])


def cut(places: jax.Array, least: float, most: float) -> jax.Array:
    """Given places, cut to the range in which planes are valid; NaN is the least. At the ends the derivative is 1."""
    return jnp.where(places > most, most, jnp.where(places >= least, places, least))


def is_wide(width: jax.Array) -> jax.Array:
    """Whether a chord over an interval of this width has a derivative, which divides by the square of the width."""
    return width > 2 * float(jnp.finfo(width.dtype).tiny) ** 0.5


def least_of(values: jax.Array | Sequence[jax.Array]) -> jax.Array:
    """`jnp.min` over the first axis, to be differentiated: NaN stays, and those that tie share the derivative.

    `jnp.min` finds the least among the values again to share it. Where XLA computes these twice and rounds them apart
    (a product and a sum have two forms, fused or not) it may find none: the derivative is NaN then.
    """

    def lesser(one: jax.Array, other: jax.Array):
        same = jnp.isinf(one) & (one == other)
        tie = one + jnp.where(same, 0, other - one) / 2
        return jnp.where(other < one, other, jnp.where(one < other, one, tie))

    return functools.reduce(lesser, values)


def picked(values: jax.Array, index: jax.Array) -> jax.Array:
    """`values[index]` over the first axis, where every entry has an index of its own, and maybe several.

    The derivative is a select; that of a gather is a scatter, which XLA for CPU works off entry by entry.
    """
    positions = jnp.arange(len(values)).reshape(-1, *[1] * index.ndim)
    several = values.reshape(len(values), *[1] * (index.ndim + 1 - values.ndim), *values.shape[1:])
    return jnp.sum(jnp.where(positions == index, several, 0), axis=0)


def by_sign(coefficients: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    """`low` where a coefficient is positive, `high` where it is negative; at 0 their mean, which derivatives see."""
    return jnp.where(coefficients > 0, low, jnp.where(coefficients < 0, high, low / 2 + high / 2))


def times(coefficients: jax.Array, values: jax.Array) -> jax.Array:
    """The product in which a coefficient of zero ignores what is not finite; elsewhere also its derivative is exact."""
    return coefficients * jnp.where((coefficients == 0) & ~jnp.isfinite(values), 0, values)
