"""Families of planes around a nonlinear node: every plane holds by itself, so more are tighter and none can be wrong.

The first is CROWN's own. With `lines` > 1 there are more:

* a piecewise linear function has all edges of its graph's convex hull (for ReLU the triangle), which are among the
  chords between its kinks and the ends of the interval;
* a curved function has `lines` slopes from one end of the hull to the other on each side, with exact intercepts;
* a product has all four McCormick planes, a choice and a staircase their extreme ones;
* a maximum is at least every entry. (A meet is stated as equations, see `encoding`.)

Lines that are nowhere the best on their interval are dropped (`facets`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbound.driver import Run
from jaxbound.graph import Op
from jaxbound.methods.exact.program import Array
from jaxbound.relaxations import enclosures
from jaxbound.relaxations.enclosures import maximum, scalar
from jaxbound.relaxations.planes import Planes
from jaxbound.relaxations.slopes import Given

Ends = tuple[Array, Array]
Pair = tuple[jax.Array, jax.Array]

_SAMPLES = 32
"""Parts of an interval between whose ends the hull of a curved function is looked for."""
_EXTREME = ("product", "select", "staircase")
"""Kinds of nodes whose planes at both ends of the range of places are worth stating."""


def family(run: Run, number: int, lines: int) -> Planes:
    """Planes around a nonlinear node, CROWN's own first; the leading axis (after a batch axis) counts them."""
    node, block = _block(run, number)
    ends = [run.ends[source] for source in node.inputs]
    return run.call(_family, (block.template.nodes[0], lines), run.constants(block), ends)


def pieces(run: Run, number: int) -> tuple[Planes, jax.Array, jax.Array]:
    """Lines on each linear piece of a scalar node's input, and the pieces' ends."""
    node, block = _block(run, number)
    return run.call(_pieces, block.template.nodes[0], run.constants(block), run.ends[node.inputs[0]])


def _block(run: Run, number: int):
    return run.graph.nodes[number], next(block for block in run.graph.blocks if block.start == number)


def _family(static: Any, constants: Sequence, inputs: Sequence[Pair]) -> Planes:
    (op, _, used), lines = static
    read, enclosure = [constants[k] for k in used], enclosures.of(op)

    def along(slopes: Any) -> Planes:
        return jax.vmap(lambda pair: enclosure.planes(op, inputs, read, Given(*pair)))(slopes)

    if op.kind == "scalar" and lines > 1:
        return along(_slopes(op, inputs[0], read, lines))
    own = jax.tree.map(lambda array: array[None], enclosure.planes(op, inputs, read))
    if op.kind in _EXTREME and lines > 1:
        ends = jnp.stack([jnp.full(op.shape, end, op.dtype) for end in enclosure.PLACES])
        return jax.tree.map(lambda *parts: jnp.concatenate(parts), own, along((ends, ends)))
    if op.kind == "maximum" and lines > 1:
        entries = _one_entry(op)
        floor, ceiling = jnp.zeros((len(entries), *op.shape), op.dtype), jnp.full((len(entries), *op.shape), jnp.inf)
        above = (jnp.zeros_like(entries),), ceiling.astype(op.dtype)  # nothing new there
        return jax.tree.map(lambda *parts: jnp.concatenate(parts), own, Planes((entries,), floor, *above))
    return own


def _slopes(op: Op, ends: Pair, constants: Sequence, lines: int) -> tuple[jax.Array, jax.Array]:
    """Slopes of lines around a scalar function, below and above: CROWN's own first."""
    finite = jnp.isfinite(ends[0]) & jnp.isfinite(ends[1])
    low, high = (jnp.where(finite, end, 0) for end in ends)
    own = scalar.hull_slopes(op, low, high, constants)
    if scalar.curvature_of(op).is_piecewise_linear:
        others = [_edges(op, (low, high), constants, own[0])] * 2
    else:
        others = [
            jnp.stack([first + (last - first) * share for share in np.linspace(0, 1, lines)])
            for first, last in _ranges(op, (low, high), constants)
        ]
    return jnp.concatenate([own[0][None], others[0]]), jnp.concatenate([own[1][None], others[1]])


def _ranges(op: Op, ends: Pair, constants: Sequence) -> list[tuple[jax.Array, jax.Array]]:
    """The slopes of the convex and of the concave hull of the graph at the ends, from chords to sample points."""
    shares = [low + (high - low) * k / _SAMPLES for low, high in [ends] for k in range(1, _SAMPLES)]
    points = jnp.stack([*shares, *(jnp.clip(kink, *ends) for kink in _kinks(op))])
    values = op.program(points, *constants)
    chords = []
    for end, other in (ends, ends[::-1]):
        away = points != end
        whole = (op.program(other, *constants) - op.program(end, *constants)) / jnp.where(other != end, other - end, 1)
        slopes = (values - op.program(end, *constants)) / jnp.where(away, points - end, 1)
        chords.append(jnp.concatenate([jnp.where(away, slopes, whole), whole[None]]))
    least, most = ([choose(side, axis=0) for side in chords] for choose in (jnp.min, jnp.max))
    return [(least[0], most[1]), (least[1], most[0])]


def _one_entry(op: Op) -> jax.Array:
    """For every entry of the groups that a maximum reduces, 1 there and 0 elsewhere: `y >= x_k`."""
    shape, reduced = op.input_shapes[0], maximum.axes(op)
    count = math.prod(shape[axis] for axis in reduced)
    unit = np.eye(count).reshape(count, *(size if axis in reduced else 1 for axis, size in enumerate(shape)))
    return jnp.asarray(np.broadcast_to(unit, (count, *shape)), op.dtype)


def _edges(op: Op, ends: Pair, constants: Sequence, otherwise: jax.Array) -> jax.Array:
    """The slopes of all chords between kinks and ends: the convex hull of a piecewise linear graph has no others."""
    points = jnp.stack([ends[0], *(jnp.clip(kink, *ends) for kink in _kinks(op)), ends[1]])
    values = op.program(points, *constants)
    slopes = []
    for i in range(len(points)):
        for j in range(i + 1, len(points)):
            run = points[j] - points[i]
            slope = (values[j] - values[i]) / jnp.where(run > 0, run, 1)
            slopes.append(jnp.where((run > 0) & jnp.isfinite(slope), slope, otherwise))
    return jnp.stack(slopes)


def _kinks(op: Op) -> list[float]:
    found = scalar.curvature_of(op).pieces
    return sorted({end for piece in found for end in (piece.left, piece.right) if math.isfinite(end)})


def _pieces(node: tuple[Op, tuple, tuple[int, ...]], constants: Sequence, ends: Pair):
    op, _, used = node
    read = [constants[k] for k in used]
    points = jnp.stack([ends[0], *(jnp.clip(kink, *ends) for kink in _kinks(op)), ends[1]])
    left, right = points[:-1], points[1:]
    lines = jax.vmap(lambda low, high: scalar.planes(op, [(low, high)], read))(left, right)
    return lines, left, right


def facets(planes: Planes, ends: Ends) -> tuple[Array, Array]:
    """Which lines of a family, on each side, are needed: CROWN's own, and those that are best somewhere on `[l, u]`."""
    low, high = (np.asarray(end, np.float64).reshape(-1) for end in ends)
    found = []
    for slopes, intercepts, sign in (
        (planes.lower_slopes[0], planes.lower_intercept, 1), (planes.upper_slopes[0], planes.upper_intercept, -1),
    ):  # fmt: skip
        slope, height = (sign * np.asarray(a, np.float64).reshape(len(a), -1) for a in (slopes, intercepts))
        first, last = np.broadcast_to(low, slope.shape).copy(), np.broadcast_to(high, slope.shape).copy()
        lost = np.zeros(slope.shape, bool)
        with np.errstate(all="ignore"):
            for other in range(len(slope)):
                steeper = slope - slope[other]
                meeting = (height[other] - height) / steeper
                first = np.where(steeper > 0, np.maximum(first, meeting), first)
                last = np.where(steeper < 0, np.minimum(last, meeting), last)
                before = np.arange(len(slope))[:, None] > other
                lost |= (steeper == 0) & ((height < height[other]) | ((height == height[other]) & before))
            keep = ~lost & (first + 1e-9 * (high - low) < last)  # less is rounding
        keep[0] = True
        found.append(keep)
    return found[0], found[1]
