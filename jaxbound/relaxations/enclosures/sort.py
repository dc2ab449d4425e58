"""Bounds of sorted entries: the k-th smallest of x rises with every entry, so its ends are those of the sorted ends."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxbound.graph import Op
from jaxbound.relaxations.planes import Planes
from jaxbound.relaxations.slopes import ADAPTIVE, Freedom, SlopeRule

Ends = tuple[jax.Array, jax.Array]


def describe(op: Op) -> str:
    """How it is relaxed."""
    return "constants"


def interval(op: Op, inputs: Sequence[Ends], constants: Sequence) -> Ends:
    """The sorted ends."""
    axis = dict(op.params)["dimension"]
    ((lower, upper),) = inputs
    return jnp.sort(lower, axis), jnp.sort(upper, axis)


def is_exact(op: Op, position: int, ends: Ends) -> jax.Array:
    """Never."""
    return jnp.zeros(jnp.shape(ends[0]), bool)


def planes(op: Op, inputs: Sequence[Ends], constants: Sequence, rule: SlopeRule = ADAPTIVE) -> Planes:
    """The interval: which entry stands where is not known."""
    lower, upper = interval(op, inputs, constants)
    zeros = jnp.zeros(op.shape, op.dtype)
    return Planes((zeros,), lower, (zeros,), upper)


def freedom(op: Op, inputs: Sequence[Ends], constants: Sequence, rule: SlopeRule = ADAPTIVE) -> Freedom:
    """None."""
    zeros = jnp.zeros(op.shape, op.dtype)
    return Freedom((zeros[None], zeros[None]), (None, None))
