"""The recursion of RecurJac, and the plain steps of Fast-Lip: bounds of a chain's Jacobian from ranges of derivatives.

For a chain (see `chains`) with `d_l` the range of sigma_l' at layer l, write Y_l for the derivative of the output by
the input of layer l, so that Y_H = W_H exactly, Y_l = Y_{l+1} S_l W_l, and Y_1 is the Jacobian.

*Plain step.* `Y_{l+1} S_l` lies in the four-corner product of their intervals, entry by entry, and W_l is known, so its
positive and negative entries pick the ends.

*Recursive bound.* One entry of Y_l is a sum over the values r of layer l of `Y_{l+1, r} s_r c_r`, with c a column of
W_l. Where the sign of `Y_{l+1, r}` is known, the s_r in its range that is worst for a lower bound is known too, by the
sign of c_r: it is multiplied into c_r, and what remains, `Y_{l+2} S_{l+1} (W_{l+1} c')`, is the same question one layer
further with a new column. All other values are split: the number of their range that is nearest to 0 is multiplied in
too, and the plain step meets what is left of the range. (The paper leaves them to the plain step whole, unless the
range is one number; for functions with a positive slope, such as tanh, this is much looser.)

Only the sign of Y matters, so sigma' may be negative (GELU, SiLU). Every result is cut with the plain step's.

Rows of the recursion never meet, nor do columns. So both are taken in chunks: columns of one number for all levels, so
that these share the steps of a layer, which are compiled once; rows as many as fit beside them. With `rounding`, every
end is widened by a bound on its rounding error: `gamma_n` of the sums of absolute values, where the error of a folded
column is charged at the largest value that it can be multiplied with. That charge, `max |Y_{l+1} S_l| |W_l|`, is what
the plain step of the same layer was widened by, and is kept from there.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbound.backend.tracing import rolled
from jaxbound.driver import Run
from jaxbound.graph import Constants
from jaxbound.jacobian.chains import Chain, Segment
from jaxbound.methods import Bounded
from jaxbound.relaxations import interval
from jaxbound.relaxations.affine import enlargement, gamma

Ends = tuple[jax.Array, jax.Array]

MEMORY = {"cpu": 1 << 22}
"""Bytes that one array of columns should take, by backend: so much stays in a CPU's cache."""
ELSEWHERE = 1 << 28
"""The same on all other backends."""
COLUMNS, FEWEST = 256, 16
"""The most columns at once, enough for products of matrices at full speed; and how few there may be for more rows."""


class Level(NamedTuple):
    """What is known of the derivative of the output by the input of a layer."""

    ends: Ends
    size: jax.Array | None
    """What it is a sum of, in absolute values, at most; None where rounding is not asked for, and at the last level."""


class Problem(NamedTuple):
    """A chain over a region, with the ranges of its derivatives.

    Layers count from 0. The level p of a recursion is the derivative of the output by the input of layer p.
    """

    run: Run
    chain: Chain
    ranges: tuple[Ends, ...]

    @property
    def flipped(self) -> Problem:
        """The transposed problem."""
        return Problem(self.run, self.chain.flipped, self.ranges[::-1])

    def finished(self, ends: Ends) -> Bounded:
        """Nothing is certified over an empty region, nor where a bound is undefined."""
        low, high = self.run.call(_finished, None, ((), ()), ends, self.run.void)
        zeros = jnp.zeros_like(low)
        return Bounded(low, high, zeros, zeros)

    def plain(self) -> Ends:
        """Bounds of the Jacobian by plain steps alone."""
        ends = self._last_rows()
        for p in range(len(self.ranges) - 1, -1, -1):
            ends = self._plain_step(p, ends).ends
        return ends

    def recursive(self) -> Ends:
        """Bounds of the Jacobian by the recursion."""
        return self._in_chunks(lambda rows: self._levels(rows)[0].ends, self._last_rows())

    def shifted(self) -> Ends:
        """Bounds of the Jacobian: of the chain without its last layer, and this one by a plain step."""
        inner = Problem(self.run, Chain(self.chain.layers[:-1], self.chain.scalars[:-1]), self.ranges[:-1])
        return transposed(self.flipped._plain_step(0, transposed(inner.recursive())).ends)

    def signed_sums(self, signs: jax.Array, *, forward: bool) -> jax.Array:
        """Upper bounds of each row's sum of its entries times signs, both of shape (outputs, inputs)."""
        first, outward = self.chain.layers[0], self.run.outward
        static = first.segment, outward
        column, error = self.run.call(_signed, static, _joined(first.matrix, first.magnitude), signs)
        if forward:  # the column is a last row of the transposed chain, for one output of it
            turned = self.flipped
            ends = turned._in_chunks(lambda rows: turned._levels(rows)[0].ends, (column - error, column + error))
            return jnp.diagonal(ends[1], axis1=-2, axis2=-1)

        def sums(part: tuple):
            rows, *start = part
            levels = self._levels(rows)
            state = self.run.call(_start, self._width(rows), ((), ()), *start, levels[1].ends, self.ranges[0])
            return self._passed(0, levels, state)[1][..., 0]

        return self._in_chunks(sums, (self._last_rows(), column, error))

    # --- levels and passes ------------------------------------------------------------------------------------------

    def _levels(self, rows: Ends) -> list[Level]:
        """Bounds of every level, from those of the last."""
        count = len(self.chain.layers)
        levels: list = [None] * (count - 1) + [Level(rows, None)]
        for p in range(count - 2, -1, -1):
            levels[p] = self._plain_step(p, levels[p + 1].ends)
            if p < count - 2:
                levels[p] = levels[p]._replace(ends=self._level(p, levels))
        return levels

    def _level(self, p: int, levels: list[Level]) -> Ends:
        """The recursive bound of level p, cut with what is known of it."""
        layer, outward, known = self.chain.layers[p], self.run.outward, levels[p]
        total, width = layer.segment.sizes[0], self._width(known.ends)

        def one(first: jax.Array | np.integer) -> Ends:
            constants = _joined(layer.matrix, ((first,), None if self.run.batch is None else (None,)))
            state = self.run.call(_columns, (layer.segment.terms, width, outward), constants, known)
            return self._passed(p, levels, state)

        starts = np.minimum(np.arange(0, total, width), max(0, total - width)).astype(np.int32)
        if self.run.eager:
            parts = [one(first) for first in starts]
        else:
            stacked = rolled(jax.lax.map)(one, jnp.asarray(starts))
            parts = [jax.tree.map(lambda leaf, k=k: leaf[k], stacked) for k in range(len(starts))]
        return self.run.call(_cut, total, ((), ()), parts, known.ends)

    def _passed(self, p: int, levels: list[Level], state: _State) -> Ends:
        """Bounds of what columns at level p become."""
        last, outward = len(self.chain.layers) - 2, self.run.outward
        for m in range(p, last):
            layer = self.chain.layers[m + 1]
            state = self.run.call(
                _fold, (layer.segment, outward), layer.constants, state, levels[m + 1], self.ranges[m]
            )
        return self.run.call(_total, outward, ((), ()), state, levels[last + 1].ends, self.ranges[last])

    def _plain_step(self, p: int, ends: Ends) -> Level:
        layer = self.chain.layers[p]
        static = layer.segment.terms, self.run.outward
        return self.run.call(_plain, static, _joined(layer.matrix, layer.magnitude), ends, self.ranges[p])

    def _last_rows(self) -> Ends:
        """The last level, which is known."""
        layer = self.chain.layers[-1]
        static = layer.segment.terms, self.run.outward
        return self.run.call(_last_rows, static, _joined(layer.matrix, layer.magnitude), self.run.void)

    # --- chunks -----------------------------------------------------------------------------------------------------

    def _in_chunks(self, function: Callable, rows: Any):
        """A function of rows, so many at a time that their columns fit into memory."""
        axis = 0 if self.run.batch is None else 1
        total = jax.tree.leaves(rows)[0].shape[axis]
        size = min(total, max(1, _memory() // (min(FEWEST, self._most_columns()) * self._column())))
        index = np.minimum(np.arange(-(-total // size) * size), total - 1).reshape(-1, size)
        if len(index) == 1:
            return function(rows)

        def one(chosen: jax.Array):
            return function(jax.tree.map(lambda leaf: jnp.take(leaf, chosen, axis), rows))

        if self.run.eager:
            parts = [one(chosen) for chosen in index]
            joined = jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis), *parts)
        else:
            stacked = rolled(jax.lax.map)(one, jnp.asarray(index))
            joined = jax.tree.map(lambda leaf: jnp.concatenate(list(leaf), axis), stacked)
        return jax.tree.map(lambda leaf: jax.lax.slice_in_dim(leaf, 0, total, axis=axis), joined)

    def _width(self, rows: Ends) -> int:
        """How many columns of these rows are carried at once, at every level."""
        count = rows[0].shape[0 if self.run.batch is None else 1]
        return max(1, min(self._most_columns(), _memory() // (count * self._column())))

    def _most_columns(self) -> int:
        """Of equal chunks that the columns of the dearest level are cut into, the size."""
        sizes = [layer.segment.sizes for layer in self.chain.layers]
        costs = [(inputs * math.prod(after), inputs) for (inputs, _), after in itertools.pairwise(sizes)]
        _, total = max(costs, default=(0, 1))
        return -(-total // -(-total // COLUMNS))

    def _column(self) -> int:
        """The bytes of one column of one row, on both sides, where it is longest."""
        longest = max(max(layer.segment.sizes) for layer in self.chain.layers)
        return 2 * (self.run.batch or 1) * jnp.dtype(self.chain.layers[0].segment.dtype).itemsize * longest


def _memory() -> int:
    return MEMORY.get(jax.default_backend(), ELSEWHERE)


def transposed(ends: Ends) -> Ends:
    """The ends of the transposed matrix."""
    return jnp.swapaxes(ends[0], -1, -2), jnp.swapaxes(ends[1], -1, -2)


def _joined(*constants: Constants) -> Constants:
    arrays = tuple(array for held, _ in constants for array in held)
    axes = [held for _, held in constants if held is not None]
    return arrays, tuple(axis for held in axes for axis in held) if axes else None


# --- the steps, of one example ----------------------------------------------------------------------------------------


class _State(NamedTuple):
    """A pass under way: columns for lower and for upper bounds, what they have met so far, and its rounding."""

    columns: jax.Array
    """(2, rows, columns, values)."""
    total: jax.Array
    """(2, rows, columns)."""
    error: jax.Array
    """(rows, columns)."""


def _last_rows(static: tuple[int, bool], constants: Sequence[jax.Array], _void: jax.Array):
    terms, outward = static
    value = constants[0].T
    error = gamma(terms, value.dtype) * _magnitude(constants).T if outward else 0
    return value - error, value + error


def _magnitude(constants: Sequence[jax.Array]):
    """Above the absolute values of what a layer's matrix is the product of; its own where it is one array.

    With room for underflow, as everything that errors are charged on (see `affine`).
    """
    magnitude = constants[1] if len(constants) > 1 else jnp.abs(constants[0])
    return magnitude + enlargement(magnitude.dtype)


def _signed(static: tuple[Segment, bool], constants: Sequence[jax.Array], signs: jax.Array):
    segment, outward = static
    column = _dot("jk,kn->jn", signs, constants[0])
    if not outward:
        return column, jnp.zeros_like(column)
    terms = segment.terms + signs.shape[-1] + 2
    return column, gamma(terms, column.dtype) * _dot("jk,kn->jn", jnp.abs(signs), _magnitude(constants))


def _plain(static: tuple[int, bool], constants: Sequence[jax.Array], ends: Ends, ranges: Ends):
    terms, outward = static
    low, high = _corners(ends, ranges)
    plus, minus = jnp.maximum(constants[0], 0), jnp.minimum(constants[0], 0)
    lower, upper = _dot("sjn,kn->sjk", jnp.stack([low, high]), plus) + _dot(
        "sjn,kn->sjk", jnp.stack([high, low]), minus
    )
    if not outward:
        return Level((lower, upper), None)
    size = _dot("jn,kn->jk", _reach(ends, ranges), _magnitude(constants))
    return Level(_widened(lower, upper, gamma(terms + low.shape[-1] + 6, size.dtype) * size), size)


def _columns(static: tuple[int, int, bool], constants: Sequence[jax.Array], level: Level):
    """Some of a layer's columns, the same for every row; zeros where there are not so many."""
    terms, width, outward = static
    matrix, first = constants
    rows = level.ends[0].shape[0]

    def taken(array: Any, axis: int):
        padding = [(0, max(0, width - array.shape[k]) if k == axis else 0) for k in range(array.ndim)]
        return jax.lax.dynamic_slice_in_dim(jnp.pad(array, padding), first, width, axis)

    columns = jnp.broadcast_to(taken(matrix, 0), (2, rows, width, matrix.shape[1]))
    zeros = jnp.zeros((2, rows, width), matrix.dtype)
    return _State(columns, zeros, gamma(terms, matrix.dtype) * taken(level.size, 1) if outward else zeros[0])


def _start(width: int, _constants: Sequence[jax.Array], column: jax.Array, error: jax.Array, ends: Ends, ranges: Ends):
    """One column for each row, as often as there are columns elsewhere: so it shares their steps."""
    largest = _reach(ends, ranges)
    columns = jnp.broadcast_to(column[:, None], (2, column.shape[0], width, column.shape[1]))
    charged = jnp.broadcast_to(_dot("jn,jn->j", largest, error)[:, None], columns.shape[1:3])
    return _State(columns, jnp.zeros(columns.shape[:-1], columns.dtype), charged)


def _fold(static: tuple[Segment, bool], constants: Sequence[jax.Array], state: _State, level: Level, ranges: Ends):
    """One layer of a pass: values of known sign or range go into the columns, the others are met by plain steps."""
    segment, outward = static
    (columns, total, error), ends = state, level.ends
    known = (ends[0] >= 0) | (ends[1] <= 0)
    nearest = jnp.clip(0, *ranges)
    rest = _corners(ends, (ranges[0] - nearest, ranges[1] - nearest))
    open_low, open_high = (jnp.where(known, 0, end) for end in rest)
    total = total + _met(open_low, open_high, columns)
    worst = jnp.stack([ranges[0], ranges[1]])[:, None, None], jnp.stack([ranges[1], ranges[0]])[:, None, None]
    aligned = (columns > 0) == (ends[0] >= 0)[:, None]
    folded = columns * jnp.where(known[:, None], jnp.where(aligned, *worst), nearest)
    moved = jax.vmap(lambda column: segment.linear(constants, column))(folded.reshape(-1, folded.shape[-1]))
    if outward:
        dtype, count, room = folded.dtype, folded.shape[-1], enlargement(folded.dtype)
        lost = room * (jnp.maximum(*map(jnp.abs, ends)) + jnp.maximum(*map(jnp.abs, ranges)) + room)
        open_size = jnp.maximum(-open_low, open_high) + lost
        error = error + gamma(count + 6, dtype) * _largest_sum(open_size + room, columns)
        moved_size = jnp.abs(folded) + room * (jnp.abs(columns) + jnp.maximum(*map(jnp.abs, ranges)))
        error = error + gamma(segment.terms + 3, dtype) * _largest_sum(level.size + room, moved_size)  # pyright: ignore[reportOptionalOperand]
        error = error + gamma(3, dtype) * jnp.max(jnp.abs(total), axis=0)
    return _State(moved.reshape(*folded.shape[:-1], -1), total, error)


def _total(outward: bool, _constants: Sequence[jax.Array], state: _State, ends: Ends, ranges: Ends):
    """The end of a pass."""
    low, high = _corners(ends, ranges)
    lower, upper = state.total + _met(low, high, state.columns)
    if outward:
        size = _largest_sum(_reach(ends, ranges), state.columns)
        error = state.error + gamma(low.shape[-1] + 6, size.dtype) * size
        lower, upper = _widened(lower, upper, error)
    return lower, upper


def _cut(total: int, _constants: Sequence[jax.Array], parts: Sequence[Ends], known: Ends):
    """A level from its chunks of columns, of which the last may overlap the one before it, cut with what is known."""
    whole, width = len(parts) - 1, parts[0][0].shape[-1]
    rest = total - whole * width

    def joined(side: int):
        last = parts[-1][side][..., -rest:] if whole else parts[-1][side][..., :rest]
        return jnp.concatenate([*(part[side] for part in parts[:-1]), last], axis=-1)

    return interval.intersect(known, (joined(0), joined(1)))


def _finished(_static: None, _constants: Sequence[jax.Array], ends: Ends, void: jax.Array):
    low, high = interval.hull(ends)
    low, high = jnp.where(void | ~(low < jnp.inf), -jnp.inf, low), jnp.where(void | ~(high > -jnp.inf), jnp.inf, high)
    return low, high


def _corners(ends: Ends, ranges: Ends) -> Ends:
    """The interval of products; not a number where nothing is known."""
    first, second = [(end * ranges[0], end * ranges[1]) for end in ends]
    low = jnp.minimum(jnp.minimum(*first), jnp.minimum(*second))
    return low, jnp.maximum(jnp.maximum(*first), jnp.maximum(*second))


def _met(low: jax.Array, high: jax.Array, columns: jax.Array) -> jax.Array:
    """The least sums of products with the first columns, the largest with the second."""
    ahead, behind = jnp.stack([low, high])[:, :, None], jnp.stack([high, low])[:, :, None]
    return jnp.sum(jnp.where(columns > 0, ahead, behind) * columns, axis=-1)


def _largest_sum(size: jax.Array, columns: jax.Array) -> jax.Array:
    """The larger of both columns' sums of absolute values times sizes, with room for underflow."""
    return jnp.max(jnp.sum(size[:, None] * (jnp.abs(columns) + enlargement(columns.dtype)), axis=-1), axis=0)


def _reach(ends: Ends, ranges: Ends) -> jax.Array:
    """The largest absolute values of products, with both factors enlarged."""
    room = enlargement(ends[0].dtype)
    first, second = (jnp.maximum(jnp.abs(low), jnp.abs(high)) + room for low, high in (ends, ranges))
    return first * second


def _widened(lower: jax.Array, upper: jax.Array, error: jax.Array) -> Ends:
    """Ends moved apart by an error and the rounding of doing so."""
    unit, tiny = jnp.finfo(error.dtype).eps, jnp.finfo(error.dtype).tiny
    error = 1.01 * error + tiny
    return lower - (error + unit * jnp.abs(lower)), upper + (error + unit * jnp.abs(upper))


def _dot(spec: str, *operands: jax.Array) -> jax.Array:
    return jnp.einsum(spec, *operands, precision=jax.lax.Precision.HIGHEST)
