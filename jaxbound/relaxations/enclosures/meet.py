"""Several expressions of one value: whatever bounds one of them bounds all, so the best known one is taken.

The interval is the intersection. Below, the plane is the expression with the larger lower bound, above the one with the
smaller upper bound, entry by entry.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxbound.graph import Op
from jaxbound.relaxations.planes import Planes
from jaxbound.relaxations.slopes import ADAPTIVE, Freedom, Places, SlopeRule

Ends = tuple[jax.Array, jax.Array]


def describe(op: Op) -> str:
    """How it is relaxed."""
    return "the best of its inputs"


def interval(op: Op, inputs: Sequence[Ends], constants: Sequence) -> Ends:
    """What all expressions say together; their hull where rounding makes them miss each other."""
    return functools.reduce(_intersection, inputs)


def _intersection(first: Ends, second: Ends) -> Ends:
    low, high = jnp.maximum(first[0], second[0]), jnp.minimum(first[1], second[1])
    met = low <= high
    return (
        jnp.where(met, low, jnp.minimum(first[0], second[0])),
        jnp.where(met, high, jnp.maximum(first[1], second[1])),
    )


def is_exact(op: Op, position: int, ends: Ends) -> jax.Array:
    """Never: tighter bounds of one expression may change the choice."""
    return jnp.zeros(jnp.shape(ends[0]), bool)


def planes(op: Op, inputs: Sequence[Ends], constants: Sequence, rule: SlopeRule = ADAPTIVE) -> Planes:
    """One expression on each side, the best by default; places in [0, 1] lead from it to the worst."""
    zeros = jnp.zeros(op.shape, op.dtype)
    below, above = Places.within(0, 1, lambda: (zeros, zeros)).chosen(rule)
    lows, highs = (jnp.stack([ends[k] for ends in inputs]) for k in (0, 1))
    finite = jnp.all(jnp.isfinite(lows) & jnp.isfinite(highs), axis=0)  # else no average makes sense
    weights = [among(jnp.where(finite, share, 0), order, 0) for share, order in ((below, -lows), (above, highs))]
    reach = jnp.where(finite, jnp.sum(jnp.maximum(jnp.abs(lows), jnp.abs(highs)), axis=0), 0)
    error = 4 * len(inputs) * jnp.finfo(op.dtype).eps * reach  # weights sum to 1 up to rounding
    errors = [jax.lax.stop_gradient(jnp.where(jnp.max(w, axis=0) < 1, error, 0)) for w in weights]
    return Planes(tuple(weights[0]), -errors[0], tuple(weights[1]), errors[1])


def freedom(op: Op, inputs: Sequence[Ends], constants: Sequence, rule: SlopeRule = ADAPTIVE) -> Freedom:
    """From the best expression to the worst one."""
    zeros = jnp.zeros(op.shape, op.dtype)
    return Freedom.linear(zeros, zeros + 1, (zeros, zeros), count=len(inputs))


def among(share: jax.Array, order: jax.Array, axis: int) -> jax.Array:
    """Weights along an axis that sum to 1: at share 0 all on the smallest of `order`, at 1 all on the largest."""
    rank = jnp.argsort(jnp.argsort(order, axis=axis), axis=axis)
    place = jnp.expand_dims(share, axis) * (order.shape[axis] - 1)
    return jnp.maximum(1 - jnp.abs(place - rank.astype(share.dtype)), 0)
