"""Forward linear bounds: linear functions of the region below and above every node, carried from input to output.

For each node, lower and upper slopes (one leading axis over the region's coordinates) and intercepts. An affine node
treats the pair as interval propagation treats two ends, coefficient by coefficient; a nonlinear node puts the pair into
its planes, the lower function where a slope is positive and the upper one where it is negative. The pair gives each
node an interval by the region's support function, which is where the next relaxation comes from.

Cheaper than backward bounds where the input is small, looser where it is large (Xu et al. 2020, appendix A).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxbound import regions
from jaxbound.graph import Op, Template
from jaxbound.relaxations import affine, backward, coefficients, enclosures, interval
from jaxbound.relaxations.coefficients import Coefficients
from jaxbound.relaxations.planes import Planes, times
from jaxbound.relaxations.slopes import SlopeRule

Ends = tuple[jax.Array, jax.Array]
HIGHEST = jax.lax.Precision.HIGHEST


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Pair:
    """Two linear functions of the region leaves: `slopes[leaf] = (lower, upper)`, each (leaf size, *node shape).

    `error` bounds how far rounding may have put the functions on the wrong side.
    """

    slopes: tuple[Ends, ...]
    intercepts: Ends
    error: jax.Array


def start(leaves: Sequence[regions.Region]) -> list[Pair]:
    """Every region leaf is itself."""
    structs = [regions.leaf_struct(leaf) for leaf in leaves]
    pairs = []
    for own in structs:
        slopes = []
        for other in structs:
            shape = (other.size, *own.shape)
            eye = jnp.eye(own.size, dtype=own.dtype).reshape(shape) if other is own else jnp.zeros(shape, own.dtype)
            slopes.append((eye, eye))
        zeros = jnp.zeros(own.shape, own.dtype)
        pairs.append(Pair(tuple(slopes), (zeros, zeros), zeros))
    return pairs


def affine_node(op: Op, inputs: Sequence[Pair], constants: Sequence, sizes: Sequence[jax.Array]) -> Pair:
    """An affine node of pairs; `sizes` are the magnitudes of the leaves, flattened."""
    slopes = []
    for leaf in range(len(inputs[0].slopes)):
        columns = [pair.slopes[leaf] for pair in inputs]
        slopes.append(jax.vmap(lambda *ends: affine.interval_slopes(op, ends, constants))(*columns))
    intercepts = affine.interval_functions(op, [pair.intercepts for pair in inputs], constants)
    error = affine.absolute(op, [pair.error for pair in inputs], constants)
    rounded = affine.rounding(op, [_size(pair, sizes) for pair in inputs], constants)
    return Pair(tuple(slopes), intercepts, error if rounded is None else error + 2 * rounded)


def nonlinear_node(op: Op, inputs: Sequence[Pair], planes: Planes, sizes: Sequence[jax.Array]) -> Pair:
    """A nonlinear node: its planes, with the inputs' linear functions in place of the inputs."""
    axes = enclosures.reduced_axes(op)
    reduced = tuple(axis - len(op.input_shapes[0]) for axis in axes)

    def combine(slopes: jax.Array, below: jax.Array, above: jax.Array):
        positive, negative = jnp.maximum(slopes, 0), jnp.minimum(slopes, 0)
        return jnp.sum(times(positive, below) + times(negative, above), axis=reduced)

    leaves = []
    for leaf in range(len(inputs[0].slopes)):
        low, high = 0.0, 0.0
        for pair, below, above in zip(inputs, planes.lower_slopes, planes.upper_slopes, strict=True):
            low = low + combine(below, *pair.slopes[leaf])
            high = high + combine(above, *pair.slopes[leaf][::-1])
        leaves.append((low, high))
    low, high, error = planes.lower_intercept, planes.upper_intercept, jnp.zeros(op.shape, op.dtype)
    size = jnp.maximum(jnp.abs(low), jnp.abs(high))
    for pair, below, above in zip(inputs, planes.lower_slopes, planes.upper_slopes, strict=True):
        low = low + combine(below, *pair.intercepts)
        high = high + combine(above, *pair.intercepts[::-1])
        steepest = affine.enlarged(jnp.maximum(jnp.abs(below), jnp.abs(above)))
        error = error + jnp.sum(times(steepest, pair.error), axis=reduced)
        size = size + jnp.sum(times(steepest, _size(pair, sizes)), axis=reduced)
    terms = 4 * len(inputs) + op.input_shapes[0][0] if axes else 8
    return Pair(tuple(leaves), (low, high), error + affine.gamma(terms, op.dtype) * size)


def interval_of(pair: Pair, leaves: Sequence[regions.Region], *, outward: bool) -> Ends:
    """The interval that a pair gives over the region; `outward` includes all rounding."""
    ends = []
    for side, sign in ((0, 1), (1, -1)):
        total = sign * pair.intercepts[side]
        for region, slopes in zip(leaves, pair.slopes, strict=True):
            columns = jnp.moveaxis(sign * slopes[side], 0, -1)
            shape = regions.leaf_struct(region).shape
            total = total + regions.minimum(region, columns.reshape(*columns.shape[:-1], *shape))
        ends.append(jnp.where(total < jnp.inf, total, -jnp.inf))
    empty = jnp.any(jnp.stack([regions.is_empty(region) for region in leaves]))
    low, high = jnp.where(empty, -jnp.inf, ends[0]), jnp.where(empty, jnp.inf, -ends[1])
    if not outward:
        return low, high
    sizes = leaf_sizes(leaves)
    error = pair.error + affine.gamma(sum(map(regions.terms, leaves)), low.dtype) * _size(pair, sizes)
    return interval.certain(low - error, high + error)


def substitute(
    rows: Coefficients, pair: Pair, carry: backward.Carry, leaves: Sequence[regions.Region]
) -> tuple[list[Coefficients], backward.Carry]:
    """Rows on a node become rows on the region leaves, by the node's linear functions.

    This merges an affine tail (a specification, say) with the last affine layer, where node by node would be looser.
    """
    held = coefficients.dense(rows)
    positive, negative = jnp.maximum(held, 0), jnp.minimum(held, 0)
    axes = tuple(range(1, positive.ndim))
    found = []
    for region, (below, above) in zip(leaves, pair.slopes, strict=True):
        lower_part = jnp.tensordot(positive, below, (axes, axes), precision=HIGHEST)
        upper_part = jnp.tensordot(negative, above, (axes, axes), precision=HIGHEST)
        shape = regions.leaf_struct(region).shape
        found.append(coefficients.Dense((lower_part + upper_part).reshape(-1, *shape)))
    low, high = pair.intercepts
    intercept = carry.intercept + coefficients.total(rows, low, high)
    rounding = carry.rounding
    if rounding is not None:
        size = affine.gamma(2 * low.size + 4, low.dtype) * _size(pair, leaf_sizes(leaves))
        rounding = rounding + coefficients.charge(rows, pair.error + size)
        rounding = rounding + affine.gamma(2, low.dtype) * (jnp.abs(intercept) + affine.enlargement(low.dtype))
    return found, backward.Carry(intercept, rounding)


def leaf_sizes(leaves: Sequence[regions.Region]) -> list[jax.Array]:
    """The largest absolute value of each coordinate of each leaf."""
    return [regions.magnitude(leaf).reshape(-1) for leaf in leaves]


def propagate(
    template: Template,
    constants: Sequence,
    outer: Sequence[tuple[Pair, Ends]],
    leaves: Sequence[regions.Region],
    rule: SlopeRule,
    *,
    outward: bool,
) -> list[tuple[Pair, Ends]]:
    """Pairs and intervals of a block's nodes from those of the values that it reads."""
    known: list[tuple[Pair, Ends]] = []
    sizes = leaf_sizes(leaves)
    for op, inputs, used in template.nodes:
        read = [outer[k] if where == "outer" else known[k] for where, k in inputs]
        pairs, ends, values = [r[0] for r in read], [r[1] for r in read], [constants[k] for k in used]
        if op.kind == "affine":
            pair = affine_node(op, pairs, values, sizes)
        else:
            pair = nonlinear_node(op, pairs, enclosures.of(op).planes(op, ends, values, rule), sizes)
        own = interval_of(pair, leaves, outward=outward)
        known.append((pair, interval.intersect(own, interval.node(op, ends, values, outward=outward))))
    return known


def _size(pair: Pair, sizes: Sequence[jax.Array]) -> jax.Array:
    """A bound on the absolute value of everything that a pair's value is summed from, with room for underflow."""
    room = affine.enlargement(pair.error.dtype)
    total = jnp.maximum(jnp.abs(pair.intercepts[0]), jnp.abs(pair.intercepts[1])) + room
    for (below, above), size in zip(pair.slopes, sizes, strict=True):
        steepest = affine.enlarged(jnp.maximum(jnp.abs(below), jnp.abs(above)))
        total = total + jnp.sum(times(steepest, size.reshape(-1, *[1] * (steepest.ndim - 1)) + room), axis=0)
    return total
