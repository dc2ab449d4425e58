"""What a search knows of one node of a domain: planes around it, tables of them, and what rounding costs there.

Every function here is one step, for one domain. See `passes` for how charges for rounding move forward.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxbound.graph import Op
from jaxbound.relaxations import affine, enclosures, interval
from jaxbound.relaxations.enclosures import scalar
from jaxbound.relaxations.planes import Planes, times
from jaxbound.relaxations.slopes import ADAPTIVE, Given
from jaxbound.search.rectifiers import is_rectifier, rectifier_planes

Ends = tuple[jax.Array, jax.Array]

_LINES = 5
"""Lines on each side of a function among which tuning chooses."""
SPARE = 1 + 1 / 64
"""Times the sum of all charges."""


def relax(static: Any, constants: Sequence, inputs: Sequence[Ends], behind: Any, slopes: tuple | None, room: Any):
    """Planes around a nonlinear node, which hold the rounding behind it, and room for underflow."""
    op, outward, terms = static
    if is_rectifier(op):
        planes = rectifier_planes(*inputs[0], *(slopes or ()))
    else:
        planes = enclosures.of(op).planes(op, inputs, constants, Given(*slopes) if slopes else ADAPTIVE)
    if not outward:
        return planes, room
    planes, charge = widened(op, planes, inputs, behind, terms)
    return planes, room + affine.enlargement(op.dtype) * jnp.sum(charge)


def table(op: Op, constants: Sequence, inputs: Sequence[Ends]):
    """Lines with slopes from one end of the graph's hull to the other, and the places of those highest in the middle.

    First come the places below.
    """
    ((low, high),) = inputs
    finite = jnp.isfinite(low) & jnp.isfinite(high)
    low, high = jnp.where(finite, low, 0), jnp.where(finite, high, 0)
    slopes = scalar.tabulated(op, low, high, constants, _LINES)
    table = jax.vmap(lambda *pair: scalar.planes(op, inputs, constants, Given(*pair)))(*slopes)
    middle = low / 2 + high / 2
    below = jnp.argmax(table.lower_slopes[0] * middle + table.lower_intercept, axis=0)
    above = jnp.argmin(table.upper_slopes[0] * middle + table.upper_intercept, axis=0)
    return table, (below.astype(op.dtype) / (_LINES - 1), above.astype(op.dtype) / (_LINES - 1))


def reach(ends: Ends) -> jax.Array:
    """The largest magnitude of a node, with room for underflow."""
    return interval.magnitude(ends) + affine.enlargement(ends[0].dtype)


def charge_of_affine(op: Op, constants: Sequence, inputs: Sequence[Ends], terms: int) -> jax.Array:
    """What a unit of coefficient on an affine node costs: its shift, and the transposed product."""
    shift, charge = affine.offset(op, constants), jnp.zeros(op.shape, op.dtype)
    if shift is not None:
        charge += affine.gamma(op.size + 2 + terms, op.dtype) * (jnp.abs(shift) + affine.enlargement(op.dtype))
    if affine.pull_error(op) > 0:
        charge += affine.pull_error(op) * affine.reach(op, list(map(interval.magnitude, inputs)), constants)
    carried = affine.inexactness(op, list(map(interval.magnitude, inputs)), constants)
    return charge if carried is None else charge + carried


def widened(op: Op, planes: Planes, inputs: Sequence[Ends], behind: Any, terms: int) -> tuple[Planes, jax.Array]:
    """Planes that hold all rounding behind them, and by how much they were widened."""
    room = affine.enlargement(op.dtype)
    height = jnp.maximum(jnp.abs(planes.lower_intercept), jnp.abs(planes.upper_intercept))
    charge = affine.gamma(op.size + 2 + terms, op.dtype) * (height + room)
    for low, high, ends, radius in zip(planes.lower_slopes, planes.upper_slopes, inputs, behind, strict=False):
        steepest = jnp.maximum(jnp.abs(low), jnp.abs(high)) + room
        size = times(steepest, affine.gamma(2, op.dtype) * reach(ends) + radius)
        charge += jnp.sum(size, axis=enclosures.reduced_axes(op))
    charge *= SPARE
    low, high = planes.lower_intercept - charge, planes.upper_intercept + charge
    return dataclasses.replace(planes, lower_intercept=low, upper_intercept=high), charge


def input_radius(static: Any, _constants: Sequence, box: Ends):
    """The error radius of the region leaf, and room for underflow."""
    terms, readers = static
    low, high = box
    size = reach(box)
    return with_sums(
        affine.gamma(low.size + 8 + terms, low.dtype) * size, 0.0, (low, high), readers, jnp.zeros((), low.dtype)
    )


def with_sums(own: jax.Array, behind: Any, ends: Ends, readers: int, room: Any):
    """A radius with the sums of rows of all readers, of a pass that begins there and of multipliers; room with it."""
    dtype = ends[0].dtype
    own = own + affine.gamma(readers + 2, dtype) * reach(ends)
    return SPARE * (own + behind), room + SPARE * affine.enlargement(dtype) * jnp.sum(own)
