"""Interval propagation: bounds of every node of a block from bounds of what the block reads.

Nonlinear nodes by their enclosure, affine ones by the one affine rule. With `outward`, every affine result is widened
by the bound on its own rounding error, so that the intervals hold for exact arithmetic; with "execution" by the error
of the network that runs as well (see `execution`).
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxbound.graph import Op, Template
from jaxbound.relaxations import affine, enclosures, execution

Ends = tuple[jax.Array, jax.Array]


def propagate(template: Template, outer: Sequence[Ends], constants: Sequence, *, outward: bool | str) -> list[Ends]:
    """Bounds of the block's nodes, in order; `None` stands for region leaves, which have their own."""
    ends: list[Ends] = []
    for op, inputs, used in template.nodes:
        read = [outer[k] if where == "outer" else ends[k] for where, k in inputs]
        ends.append(node(op, read, [constants[k] for k in used], outward=outward))
    return ends


def node(op: Op, inputs: Sequence[Ends], constants: Sequence, *, outward: bool | str) -> Ends:
    """Bounds of one node from bounds of its inputs."""
    low, high = (_affine if op.kind == "affine" else _nonlinear)(op, inputs, constants, outward)
    if outward == execution.MODE:
        error = execution.error(op, inputs, constants)
        return low - error, high + error
    return (jnp.where(low < 0, 0, low) if op.nonnegative else low), high


def _nonlinear(op: Op, inputs: Sequence[Ends], constants: Sequence, _outward: bool | str) -> Ends:
    return enclosures.of(op).interval(op, inputs, constants)


def _affine(op: Op, inputs: Sequence[Ends], constants: Sequence, outward: bool | str) -> Ends:
    low, high = affine.interval(op, inputs, constants)
    if outward:
        # a sum's end is made of ends, so an infinite one makes it infinite, and no other end needs its error
        sizes = [magnitude(ends if op.facts.scales else _finite(ends)) for ends in inputs]
        error = affine.rounding(op, sizes, constants)
        if error is not None:
            low, high = low - error, high + error
    return (low, high) if affine.moves(op) else certain(low, high)


def certain(low: jax.Array, high: jax.Array) -> Ends:
    """Nothing is known where a bound is undefined, or infinite on the wrong side: a sum overflowed on its way."""
    return jnp.where(low < jnp.inf, low, -jnp.inf), jnp.where(high > -jnp.inf, high, jnp.inf)


def magnitude(ends: Ends) -> jax.Array:
    """The largest absolute value in an interval."""
    return jnp.maximum(jnp.abs(ends[0]), jnp.abs(ends[1]))


def _finite(ends: Ends) -> Ends:
    """The ends, with 0 for those that are infinite."""
    low, high = (jnp.where(jnp.isinf(end), 0, end) for end in ends)
    return low, high


def intersect(first: Ends, second: Ends) -> Ends:
    """What two sound intervals say together; where rounding makes them miss each other, their hull."""
    low, high = jnp.maximum(first[0], second[0]), jnp.minimum(first[1], second[1])
    missed = ~(low <= high)
    hull_low, hull_high = jnp.minimum(first[0], second[0]), jnp.maximum(first[1], second[1])
    return jnp.where(missed, hull_low, low), jnp.where(missed, hull_high, high)


def hull(ends: Ends) -> Ends:
    """Two ends in the right order: near radius 0 rounding may exchange them."""
    return jnp.minimum(*ends), jnp.maximum(*ends)
