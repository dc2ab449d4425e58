"""From a graph's nodes to rows of a program, one example at a time.

* A region leaf is its box; an l_1 ball is `x = center + p - n` with `sum(p + n) <= radius` and p, n >= 0, an l_2 ball
  is stated as it is.
* An affine node is equations, its matrix the one affine rule applied to identity rows. Each of its entries is a
  constant times 1 plus zeros, so it is exact; but for a division, whose reciprocals are taken in float64.
* A nonlinear node lies between planes (`families`).
* For an exact answer a piecewise linear function is split at its kinks: with `b_p` whole and `sum b_p = 1`,

      z = sum z_p,    t_p b_p <= z_p <= t_(p+1) b_p,    y between the sums of `slope_p z_p + intercept_p b_p`,

  and a maximum picks one entry, `y <= x_k + (u - l_k) (1 - b_k)` with `sum b_k = 1`, u the largest upper bound.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from jaxbound import regions
from jaxbound._compat import eager_jit
from jaxbound.exact.program import Array, Builder
from jaxbound.graph import Node, Op
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
        if isinstance(region, regions.Box) or regions.is_box(region):
            self.columns[number] = self.builder.add_columns(*ends)
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

    def add_affine(self, number: int, node: Node, matrices: Sequence[Triplets], shift: Array, ends: Ends) -> None:
        """`value - sum of matrix @ input = shift`."""
        own, index = self.add_node(number, ends), np.arange(node.op.size)
        parts = [(index, own, np.ones(node.op.size))]
        for source, (row, column, value) in zip(node.inputs, matrices, strict=True):
            parts.append((row, self.columns[source][column], -value))
        self.builder.add_rows(parts, shift, shift)

    def add_planes(self, number: int, node: Node, planes: Planes, keep: tuple[Array, Array] | None = None) -> None:
        """A plane on each side of a nonlinear node; `keep` says for which entries."""
        own = self.columns[number]
        sides = (planes.lower_slopes, planes.lower_intercept, 1), (planes.upper_slopes, planes.upper_intercept, -1)
        for side, (slopes, intercept, sign) in enumerate(sides):
            ends = np.asarray(intercept, np.float64).reshape(-1)
            steep = [np.broadcast_to(np.asarray(slope, np.float64), shape).reshape(-1)
                     for slope, shape in zip(slopes, node.op.input_shapes, strict=True)]  # fmt: skip
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
        for entry in map(int, np.flatnonzero(np.sum(flat[1] > flat[0], axis=0) > 1)):
            open_ = flat[1][:, entry] > flat[0][:, entry]
            self._add_split(number, node, entry, [values[open_, entry] for values in flat])

    def _add_split(self, number: int, node: Node, entry: int, parts: Sequence[Array]) -> None:
        left, right, below, above, floor, ceiling = parts
        size, infinite = len(left), np.array([np.inf])
        zero, first, none = np.zeros(size, int), np.zeros(1, int), np.zeros(1)
        own, source = self.columns[number][[entry]], self.columns[node.inputs[0]][[entry]]
        which = self.builder.add_columns(np.zeros(size), np.ones(size), whole=True)
        share = self.builder.add_columns(np.minimum(left, 0), np.maximum(right, 0))
        index, ones, one = np.arange(size), np.ones(size), np.ones(1)
        self.builder.add_rows([(zero, which, ones)], one, one)
        self.builder.add_rows([(first, source, one), (zero, share, -ones)], none, none)
        self.builder.add_rows([(index, share, ones), (index, which, -left)], np.zeros(size), np.full(size, np.inf))
        self.builder.add_rows([(index, share, ones), (index, which, -right)], np.full(size, -np.inf), np.zeros(size))
        lower = [(first, own, one), (zero, share, -below), (zero, which, -floor)]
        upper = [(first, own, one), (zero, share, -above), (zero, which, -ceiling)]
        self.builder.add_rows(lower, none, infinite)
        self.builder.add_rows(upper, -infinite, none)

    def add_choice(self, number: int, node: Node, ends: Ends) -> None:
        """A maximum is one of its entries."""
        own, (source,), entries = self.columns[number], node.inputs, _entries(node.op)
        low, high = (np.asarray(end, np.float64).reshape(-1) for end in ends)
        for entry in range(node.op.size):
            group = np.flatnonzero(entries == entry)
            group = group[high[group] >= np.max(low[group])]
            size = len(group)
            if size == 1:
                same = [(np.zeros(1, int), own[[entry]], np.ones(1))]
                same.append((np.zeros(1, int), self.columns[source][group], -np.ones(1)))
                self.builder.add_rows(same, np.zeros(1), np.zeros(1))
                continue
            which = self.builder.add_columns(np.zeros(size), np.ones(size), whole=True)
            index, ones = np.arange(size), np.ones(size)
            self.builder.add_rows([(0 * index, which, ones)], np.ones(1), np.ones(1))
            gap = np.nextafter(np.max(high[group]) - low[group], np.inf)
            parts = [(index, np.full(size, own[entry]), ones), (index, self.columns[source][group], -ones)]
            self.builder.add_rows([*parts, (index, which, gap)], np.full(size, -np.inf), gap)


def _balls(region: regions.LpBall) -> Iterator[tuple[Array, Array, float]]:
    """The balls of a leaf: places in the flattened leaf, center, radius."""
    center = np.asarray(region.center, np.float64)
    count = math.prod(center.shape[: region.batch_ndim])
    radius = np.broadcast_to(np.asarray(region.radius, np.float64), center.shape[: region.batch_ndim]).reshape(-1)
    places = np.arange(center.size).reshape(count, -1)
    for k in range(count):
        yield places[k], center.reshape(-1)[places[k]], float(radius[k])


def _entries(op: Op) -> Array:
    """For each entry of a nonlinear node's input, the entry of its value that it belongs to."""
    own = np.expand_dims(np.arange(op.size).reshape(op.shape), enclosures.reduced_axes(op))
    return np.broadcast_to(own, op.input_shapes[0]).reshape(-1)


# --- affine nodes -----------------------------------------------------------------------------------------------------


def matrices(op: Op, constants: Sequence[jax.Array]) -> list[Triplets]:
    """The matrix of an affine node for each of its inputs, in triplets."""
    shapes = [op.input_shapes[i] for i, operand in enumerate(op.operands) if operand[0] == "input"]
    if op.facts.order_preserving:
        index = np.arange(op.size)
        return [(index, index, np.ones(op.size)) for _ in shapes]
    if op.name == "div":
        return [_reciprocals(op, constants)]
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


def _reciprocals(op: Op, constants: Sequence[jax.Array]) -> Triplets:
    index, operand = np.arange(op.size), op.operands[1]
    divisor = constants[operand[1]] if operand[0] == "constant" else operand[1]
    divisor = np.broadcast_to(np.asarray(divisor, np.float64), op.shape).reshape(-1)
    return index, index, 1 / divisor


@functools.lru_cache(maxsize=256)
def _pulled(op: Op) -> Callable:
    return eager_jit(lambda rows, constants: affine.pull(op, rows, constants))


def shift(op: Op, constants: Sequence[jax.Array]) -> Array:
    """What an affine node adds."""
    found = affine.offset(op, constants)
    return np.zeros(op.size) if found is None else np.asarray(found, np.float64).reshape(-1)
