"""Ranges of derivatives: `sigma'(z)` for every z in [l, u], for any fused scalar function.

The derivative of a scalar program is a scalar program again (JAX makes it), and its range over an interval is what
interval arithmetic says of it: exact up to rounding wherever its own curvature could be proved. Where sigma has a kink
its derivative jumps, and an interval that meets the kink gets the hull of both sides: Clarke's derivative (Clarke 1983,
theorem 2.5.1). That hull, and the one of sigma' over the whole line, are proved from sigma's own program, of which no
branch is undecided on one side of a kink; the latter also rescues ends at infinity.

All this speaks of sigma only where sigma is continuous: a step's derivative is 0 almost everywhere and says nothing of
its jumps. So functions that are not proved to be continuous are refused (`check`), and where only a part of the line
was proved, an interval that leaves it has an infinite range.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxbound import errors
from jaxbound.backend.caches import kept
from jaxbound.curvature import enclosing
from jaxbound.curvature.analysis import Cell, Curvature, Program, analyse
from jaxbound.graph import Node, Op, tracing
from jaxbound.relaxations import interval
from jaxbound.relaxations.enclosures import scalar

Ends = tuple[jax.Array, jax.Array]

_LARGEST = float(np.finfo(np.float32).max)
"""Nothing is claimed of numbers beyond: the analysis of the line ends there."""


def check(node: Node, method: str) -> None:
    """Refuse a scalar function whose derivative does not tell how it changes.

    Raises:
        UnsupportedError: it was not proved to be continuous.
    """
    curvature = analyse(node.op.program)
    if curvature is None or not curvature.is_continuous:
        reason = "it may jump, and no derivative says how far"
        raise errors.unsupported(
            node.op.name, [node.op.shape], node.source, reason, method=method, way_out="use a continuous function"
        )


def slope_range(op: Op, constants: Sequence[jax.Array], ends: Ends) -> Ends:
    """Bounds of sigma' over [l, u], entry by entry, Clarke's at kinks.

    `lower <= sigma'(z) <= upper` for every z in [l, u] where sigma' exists; infinite where nothing is proved.
    """
    low, high = _by_intervals(op, constants, ends)
    left, right, least, most = _extent(op.program)
    least, most = scalar.rounded(least, low, -1), scalar.rounded(most, low, 1)
    low = jnp.where(low >= least, low, least)  # NaN included
    high = jnp.where(high <= most, high, most)
    for first, last, slope in _lines(op.program):
        on_line = (ends[0] > first) & (ends[1] < last)
        low, high = jnp.where(on_line, slope, low), jnp.where(on_line, slope, high)
    inside = (ends[0] >= left) & (ends[1] <= right)
    return jnp.where(inside, low, -jnp.inf), jnp.where(inside, high, jnp.inf)


def _by_intervals(op: Op, constants: Sequence[jax.Array], ends: Ends) -> Ends:
    """What interval arithmetic says of the derivative's program."""

    def derivative(z: jax.Array, *arrays: jax.Array):
        return jax.jvp(lambda t: op.program(t, *arrays), (z,), (jnp.ones_like(z),))[1]

    avals = [jax.ShapeDtypeStruct(op.shape, op.dtype), *(jax.ShapeDtypeStruct(c.shape, c.dtype) for c in constants)]
    try:
        structure = tracing.build(derivative, avals, [True, *(False for _ in constants)])
    except errors.UnsupportedError:  # the hull over the line is left
        return jnp.full(op.shape, -jnp.inf, op.dtype), jnp.full(op.shape, jnp.inf, op.dtype)
    arrays = structure.constants(dict(enumerate(constants, 1)))
    ((kind, number),) = structure.outputs
    if kind == "constant":
        return arrays[number], arrays[number]
    if len(structure.nodes) == 2 and structure.nodes[1].op.kind == "scalar":
        made = structure.nodes[1]
        refined, used = _refined(op.program, made.op.program), [arrays[k] for k in made.constants]
        least = functools.partial(scalar.extreme, made.op, refined)
        return least(1, *ends, used), -least(-1, *ends, used)
    known = {0: ends}
    for block in structure.blocks:
        read = [known[k] for k in block.outer]
        found = interval.propagate(block.template, read, [arrays[k] for k in block.constants], outward=True)
        known.update(zip(range(block.start, block.stop), found, strict=True))
    return known[number]


@kept(1024)
def _extent(program: Program) -> tuple[float, float, float, float]:
    """The part of the line where sigma is proved to be continuous, and a hull of sigma' over it, rounded outward."""
    curvature = analyse(program)
    assert curvature is not None
    ends, slopes = list(curvature.domain), [curvature.slope_range]
    for side, infinity in enumerate((-math.inf, math.inf)):
        if abs(ends[side]) >= _LARGEST:
            ends[side] = infinity
            continue
        tail = sorted((ends[side], infinity))
        proof = enclosing.enclose(program.instructions, np.array(tail[:1]), np.array(tail[1:]))
        if proof.continuous[0]:
            ends[side] = infinity
            slopes.append((float(proof.orders.lower[1, 0, 0]), float(proof.orders.upper[1, 0, 0])))
    least, most = min(low for low, _ in slopes), max(high for _, high in slopes)
    return ends[0], ends[1], least, most


@kept(1024)
def _refined(program: Program, derivative: Program) -> Curvature:
    """What was proved of the derivative, with the hulls around its jumps proved from both sides of sigma's kinks."""
    own, found = analyse(program), analyse(derivative)
    assert own is not None and found is not None
    joints = sorted({end for piece in own.pieces for end in (piece.left, piece.right)} | set(own.switches))
    return dataclasses.replace(found, cells=tuple(_hull_of_slopes(program, cell, joints) for cell in found.cells))


def _hull_of_slopes(program: Program, cell: Cell, joints: Sequence[float]) -> Cell:
    """A cell with sigma' in place of what is known of its program, where that is less."""
    points = np.array([cell.left, *(point for point in joints if cell.left < point < cell.right), cell.right])
    proof = enclosing.enclose(program.instructions, points[:-1], points[1:])
    if not proof.continuous.all():
        return cell
    low, high = float(proof.orders.lower[1, 0].min()), float(proof.orders.upper[1, 0].max())
    return dataclasses.replace(cell, lower=max(cell.lower, low), upper=min(cell.upper, high))


@kept(1024)
def _lines(program: Program) -> tuple[tuple[float, float, float], ...]:
    """The open intervals on which sigma is a line, and its slope where this is proved to be one number of float32."""
    curvature = analyse(program)
    pieces = [piece for piece in curvature.pieces if piece.kind == "linear"] if curvature else []
    found = []
    for piece in pieces:
        proof = enclosing.enclose(program.instructions, np.array([piece.left]), np.array([piece.right]))
        low, high = float(proof.orders.lower[1, 0, 0]), float(proof.orders.upper[1, 0, 0])
        if low == high == float(np.float32(low)) and proof.continuous[0]:
            found.append((piece.left, piece.right, low))
    return tuple(found)
