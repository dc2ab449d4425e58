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


def planes(op: Op, inputs: Sequence[Ends], constants: Sequence, lower_slope: str, slopes=None) -> Planes:
    """One expression on each side; `slopes` holds the shares of all of them (summing to 1) instead."""
    if slopes is None:
        lows, highs = jnp.stack([low for low, _ in inputs]), jnp.stack([high for _, high in inputs])
        numbers = jnp.arange(len(inputs)).reshape(-1, *[1] * len(op.shape))
        slopes = [(best == numbers).astype(op.dtype) for best in (jnp.argmax(lows, 0), jnp.argmin(highs, 0))]
    zeros = jnp.zeros(op.shape, op.dtype)
    return Planes(tuple(slopes[0]), zeros, tuple(slopes[1]), zeros)
