"""From a graph's nodes to rows of a program, one example at a time.

* A region leaf is its box; an l_1 ball is `x = center + p - n` with `sum(p + n) <= radius` and p, n >= 0, an l_2 ball
  is stated as it is; with a radius per feature both are of `u`, where `x = center + radius * u`. A polytope's rows are
  rows, a zonotope is `x = center + sum of u_k generators_k`.
* An affine node is equations, its matrix the one affine rule applied to identity rows. Each of its entries is a
  constant times 1 plus zeros, so it is exact; a quotient's equation is multiplied by the divisor.
* A nonlinear node lies between planes (`families`).
* For an exact answer a piecewise linear function has an option for each piece, on which it lies between that piece's
  lines, and a maximum one for each entry that it may be.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxbound import regions
from jaxbound._compat import eager_jit
from jaxbound.backend.caches import kept
from jaxbound.graph import Node, Op
from jaxbound.methods.exact.program import Array, Builder, Option
from jaxbound.relaxations import affine, enclosures
from jaxbound.relaxations.planes import Planes

Ends = tuple[Array, Array]
Triplets = tuple[Array, Array, Array]

_ENTRIES = 1 << 22
"""The most entries of a block of identity rows."""


class Encoding:
    """One example: the program so far, and the columns that hold each node."""

    def __init__(self, *, stated: bool):
        self.builder, self.columns, self._stated = Builder(), {}, stated

    def add_region(self, number: int, region: regions.Region, ends: Ends) -> None:
        """A region leaf."""
        if not isinstance(region, regions.LpBall) or regions.is_box(region):
            self.columns[number] = self.builder.add_columns(*ends)
            if isinstance(region, regions.Polytope):
                self._add_half_spaces(self.columns[number], region)
            elif isinstance(region, regions.Zonotope):
                self._add_generators(self.columns[number], region)
            return
        if np.ndim(region.radius) == np.ndim(region.center) > region.batch_ndim:
            self.columns[number] = self.builder.add_columns(*ends)
            self._add_weighted(self.columns[number], region)
            return
        stated = region.norm != 2 or region.clip is not None or any(radius == 0 for _, _, radius in _balls(region))
        columns = self.columns[number] = self.builder.add_columns(*ends, stated=stated)
        for part, center, radius in _balls(region):
            if math.isinf(radius) or radius == 0:
                continue  # the box says it all
            if region.norm == 2:
                self.builder.add_ball(columns[part], center, radius)
            else:
                self._add_cross(columns[part], center, radius)

    def _add_half_spaces(self, columns: Array, region: regions.Polytope) -> None:
        for places, matrix, offsets in _parts_of_batch(region.batch_ndim, columns, region.A, region.b):
            told = np.flatnonzero(offsets < np.inf)
            entry = np.broadcast_to(np.arange(len(told))[:, None], (len(told), len(places)))
            parts = [(entry, np.broadcast_to(places, entry.shape), matrix[told])]
            self.builder.add_rows(parts, np.full(len(told), -np.inf), offsets[told])

    def _add_generators(self, columns: Array, region: regions.Zonotope) -> None:
        center = np.asarray(region.center)
        for places, generators, middle in _parts_of_batch(region.batch_ndim, columns, region.generators, center):
            own = self.builder.add_columns(-np.ones(len(generators)), np.ones(len(generators)))
            entry = np.broadcast_to(np.arange(len(places)), generators.shape)
            parts = [(np.arange(len(places)), places, np.ones(len(places)))]
            parts.append((entry, np.broadcast_to(own[:, None], entry.shape), -generators))
            self.builder.add_rows(parts, middle, middle)

    def _add_weighted(self, columns: Array, region: regions.LpBall) -> None:
        """A ball with a radius per feature."""
        for places, radius, center in _parts_of_batch(region.batch_ndim, columns, region.radius, region.center):
            radius, center = radius.reshape(-1), center.reshape(-1)
            if not np.all(np.isfinite(radius)):
                continue  # the box says it all
            size = len(places)
            unit = self.builder.add_columns(-np.ones(size), np.ones(size))
            index, ones = np.arange(size), np.ones(size)
            self.builder.add_rows([(index, places, ones), (index, unit, -radius)], center, center)
            if region.norm == 2:
                self.builder.add_ball(unit, np.zeros(size), 1.0)
            else:
                self._add_cross(unit, np.zeros(size), 1.0)

    def _add_cross(self, columns: Array, center: Array, radius: float) -> None:
        """An l_1 ball."""
        size, index = len(columns), np.arange(len(columns))
        up, down = (self.builder.add_columns(np.zeros(size), np.full(size, radius)) for _ in range(2))
        ones = np.ones(size)
        self.builder.add_rows([(index, columns, ones), (index, up, -ones), (index, down, ones)], center, center)
        both = np.concatenate([up, down])
        self.builder.add_rows([(0 * both, both, np.ones(2 * size))], np.array([-np.inf]), np.array([radius]))

    def add_node(self, number: int, ends: Ends) -> Array:
        """Columns of a value."""
        self.columns[number] = self.builder.add_columns(*ends, stated=self._stated)
        return self.columns[number]

    def add_affine(self, number: int, node: Node, equations: Equations, ends: Ends) -> None:
        """`divisor * value - sum of matrix @ input = shift`, within the slack."""
        own, index = self.add_node(number, ends), np.arange(node.op.size)
        shift, slack = equations.shift, equations.slack
        parts = [(index, own, equations.divisor)]
        for source, (row, column, value) in zip(node.inputs, equations.matrices, strict=True):
            parts.append((row, self.columns[source][column], -value))
        lower, upper = (
            np.where(slack > 0, np.nextafter(shift + side * slack, side * np.inf), shift) for side in (-1, 1)
        )
        self.builder.add_rows(parts, lower, upper)

    def add_planes(self, number: int, node: Node, planes: Planes, keep: tuple[Array, Array] | None = None) -> None:
        """A plane on each side of a nonlinear node; `keep` says for which entries."""
        own = self.columns[number]
        sides = (planes.lower_slopes, planes.lower_intercept, 1), (planes.upper_slopes, planes.upper_intercept, -1)
        for side, (slopes, intercept, sign) in enumerate(sides):
            ends = np.asarray(intercept, np.float64).reshape(-1)
            steep = [np.broadcast_to(np.asarray(slope, np.float64), shape).reshape(-1)
                     for slope, shape in zip(slopes, node.op.read_shapes, strict=True)]  # fmt: skip
            used = np.isfinite(ends) if keep is None else np.isfinite(ends) & keep[side]
            place = np.cumsum(used) - 1
            parts = [(place[used], own[used], np.ones(int(used.sum())))]
            for source, slope in zip(node.inputs, steep, strict=True):
                entry = _entries(node.op)
                mine = used[entry]
                parts.append((place[entry[mine]], self.columns[source][mine], -slope[mine]))
            open_end = np.full(int(used.sum()), sign * np.inf)
            self.builder.add_rows(parts, *((ends[used], open_end) if sign > 0 else (open_end, ends[used])))

    def add_equal(self, number: int, node: Node) -> None:
        """Every expression of a meet is its value."""
        own, index, ones = self.columns[number], np.arange(node.op.size), np.ones(node.op.size)
        for source in node.inputs:
            zeros = np.zeros(node.op.size)
            self.builder.add_rows([(index, own, ones), (index, self.columns[source], -ones)], zeros, zeros)

    def add_pieces(self, number: int, node: Node, pieces: Planes, left: Array, right: Array) -> None:
        """The pieces of a piecewise linear function; leading axes are the pieces', each on `[left, right]`."""
        (below,), (above,) = pieces.lower_slopes, pieces.upper_slopes
        floor, ceiling = pieces.lower_intercept, pieces.upper_intercept
        flat = [np.asarray(a, np.float64).reshape(len(left), -1) for a in (left, right, below, above, floor, ceiling)]
        own, source = self.columns[number], self.columns[node.inputs[0]]
        for entry in map(int, np.flatnonzero(np.sum(flat[1] > flat[0], axis=0) > 1)):
            open_ = flat[1][:, entry] > flat[0][:, entry]
            first, last, below, above, floor, ceiling = (values[open_, entry] for values in flat)
            size = len(first)
            index, y, z = np.arange(size), np.full(size, own[entry]), np.full(size, source[entry])
            lower = self._optional([(index, y, np.ones(size)), (index, z, -below)], size)
            upper = self._optional([(index, y, np.ones(size)), (index, z, -above)], size)
            rows, infinite = np.stack([lower, upper], 1), np.full(size, np.inf)
            ends = np.stack([floor, -infinite], 1), np.stack([infinite, ceiling], 1)
            self.builder.add_split(own[entry], [
                Option(z[[k]], (first[[k]], last[[k]]), rows[k], (ends[0][k], ends[1][k])) for k in range(size)
            ])  # fmt: skip

    def _optional(self, triplets: Sequence[Triplets], size: int) -> Array:
        """Rows that only options give ends."""
        return self.builder.add_rows(triplets, np.full(size, -np.inf), np.full(size, np.inf))

    def add_choice(self, number: int, node: Node, ends: Ends) -> None:
        """A maximum is one of its entries."""
        own, source, entries = self.columns[number], self.columns[node.inputs[0]], _entries(node.op)
        low, high = (np.asarray(end, np.float64).reshape(-1) for end in ends)
        none = np.zeros(0, np.int64), (np.zeros(0), np.zeros(0))
        for entry in range(node.op.size):
            group = np.flatnonzero(entries == entry)
            group = group[high[group] >= np.max(low[group])]
            size = len(group)
            index, ones = np.arange(size), np.ones(size)
            rows = self._optional([(index, np.full(size, own[entry]), ones), (index, source[group], -ones)], size)
            ends_ = np.full(1, -np.inf), np.zeros(1)
            self.builder.add_split(own[entry], [Option(*none, rows[[k]], ends_) for k in range(size)])


def _balls(region: regions.LpBall) -> Iterator[tuple[Array, Array, float]]:
    """The balls of a leaf: places in the flattened leaf, center, radius."""
    center = np.asarray(region.center, np.float64)
    count = math.prod(center.shape[: region.batch_ndim])
    radius = np.broadcast_to(np.asarray(region.radius, np.float64), center.shape[: region.batch_ndim]).reshape(-1)
    places = np.arange(center.size).reshape(count, -1)
    for k in range(count):
        yield places[k], center.reshape(-1)[places[k]], float(radius[k])


def _parts_of_batch(
    batch_ndim: int, columns: Array, rows: ArrayLike, rest: ArrayLike
) -> Iterator[tuple[Array, Array, Array]]:
    """Per example of a leaf: its columns, `rows` with their last axes flattened to the features, and the rest."""
    rows, rest = np.asarray(rows, np.float64), np.asarray(rest, np.float64)
    count = math.prod(rows.shape[:batch_ndim])
    places = columns.reshape(count, -1)
    yield from zip(places, rows.reshape(count, -1, places.shape[1]), rest.reshape(count, -1), strict=True)


def _entries(op: Op) -> Array:
    """For each entry of a nonlinear node's input, the entry of its value that it belongs to."""
    own = np.expand_dims(np.arange(op.size).reshape(op.shape), enclosures.reduced_axes(op))
    return np.broadcast_to(own, op.input_shapes[0]).reshape(-1)


# --- affine nodes -----------------------------------------------------------------------------------------------------


class Equations(NamedTuple):
    """What an affine node says: `divisor * value = sum of matrix @ input + shift`, entry by entry.

    All numbers are exact, but for a shift that is itself a sum (a scatter): it may be wrong by the slack.
    """

    divisor: Array
    matrices: list[Triplets]
    shift: Array
    slack: Array


def equations(op: Op, constants: Sequence[jax.Array]) -> Equations:
    """The equations of an affine node."""
    index, ones = np.arange(op.size), np.ones(op.size)
    shapes = [op.input_shapes[i] for i, operand in enumerate(op.operands) if operand[0] == "input"]
    if op.name == "div":
        operand = op.operands[1]
        divisor = np.asarray(constants[operand[1]] if operand[0] == "constant" else operand[1], np.float64)
        divisor = np.broadcast_to(divisor, op.shape).reshape(-1)
        return Equations(divisor, [(index, index, 1.0 * (divisor != 0))], 0 * ones, 0 * ones)  # x / 0 says nothing
    parts = _parts(op, constants) if op.facts.scales or affine.adds(op) else [(op, list(constants), 1.0)]
    shift = np.zeros(op.size)
    for own, read, size in parts if affine.adds(op) else ():
        shift += np.asarray(affine.offset(own, read), np.float64).reshape(-1) * size
    slack = _slack(op, constants)
    if op.facts.order_preserving:
        return Equations(ones, [(index, index, ones) for _ in shapes], shift, slack)
    if not op.facts.scales:
        return Equations(ones, _triplets(op, constants, shapes), shift, slack)
    found = [(part, size) for own, read, size in parts for part in _triplets(own, read, shapes)]
    columns = zip(*((row, column, value * size) for (row, column, value), size in found), strict=True)
    return Equations(ones, [tuple(np.concatenate(column) for column in columns)], shift, slack)  # pyright: ignore


def _slack(op: Op, constants: Sequence[jax.Array]) -> Array:
    """How far the sum of several constants may be from exact."""
    terms, limits = op.facts.terms(op.input_shapes, op.shape, dict(op.params)), jnp.finfo(op.dtype)
    if not affine.adds(op) or terms < 2:
        return np.zeros(op.size)
    sizes = [jnp.abs(value) if jnp.issubdtype(value.dtype, jnp.floating) else value for value in constants]
    total = np.asarray(affine.offset(op, sizes), np.float64).reshape(-1)
    return (total > 0) * (affine.gamma(terms + 3, op.dtype) * total + terms * float(limits.tiny))


def _triplets(op: Op, constants: Sequence[jax.Array], shapes: Sequence[tuple[int, ...]]) -> list[Triplets]:
    found: list[list[Triplets]] = [[] for _ in shapes]
    height = max(1, _ENTRIES // max(op.size, *(math.prod(shape) for shape in shapes)))
    for first in range(0, op.size, height):
        rows = np.zeros((min(height, op.size), op.size), op.dtype)
        index = np.arange(first, min(first + height, op.size))
        rows[index - first, index] = 1
        pulled = _pulled(op)(rows.reshape(-1, *op.shape), tuple(constants))
        for parts, part in zip(found, pulled, strict=True):
            dense = np.asarray(part).reshape(len(rows), -1)
            row, column = np.nonzero(dense)
            parts.append((row + first, column, dense[row, column].astype(np.float64)))
    return [tuple(np.concatenate(column) for column in zip(*parts, strict=True)) for parts in found]  # pyright: ignore


def _parts(op: Op, constants: Sequence[jax.Array]) -> list[tuple[Op, list, float]]:
    """A node that is linear in its constants as a sum of nodes without subnormal ones, each with a factor.

    Processors may take a subnormal number for 0; when it is larger by a power of two, they do not.
    """
    limits, values = jnp.finfo(op.dtype), [np.asarray(value) for value in constants]
    free = [operand for position, operand in enumerate(op.operands) if position not in op.facts.fixed]
    factor = 2.0 ** (limits.nmant + 1)

    def is_small(value: ArrayLike) -> Array:
        value = np.asarray(value, op.dtype)
        return (value != 0) & (np.abs(value) < limits.tiny)

    def kept(operand: tuple, small: bool) -> np.ndarray:
        value = np.asarray(values[operand[1]] if operand[0] == "constant" else operand[1], op.dtype)
        return np.where(is_small(value) == small, value * factor if small else value, np.zeros((), op.dtype))

    held = [operand for operand in free if operand[0] != "input"]
    if not any(np.any(is_small(values[o[1]] if o[0] == "constant" else o[1])) for o in held):
        return [(op, list(constants), 1.0)]
    parts = []
    for small in (False, True):
        literals = {o: ("literal", kept(o, small)[()], *o[2:]) for o in held if o[0] == "literal"}
        others = {o[1]: kept(o, small) for o in held if o[0] == "constant"}
        own = dataclasses.replace(op, operands=tuple(literals.get(operand, operand) for operand in op.operands))
        parts.append((own, [others.get(k, value) for k, value in enumerate(values)], 1 / factor if small else 1.0))
    return parts


@kept(256)
def _pulled(op: Op) -> Callable:
    return eager_jit(lambda rows, constants: affine.pull(op, rows, constants))
