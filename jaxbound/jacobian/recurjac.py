"""RecurJac and Fast-Lip: bounds of the Jacobian of a chain, from ranges of its derivatives.

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

Only the sign of Y matters, so sigma' may be negative (GELU, SiLU). Every result is cut with the plain step's, so
RecurJac is never wider than plain steps all the way, which are Fast-Lip. *Forward*: the same for the transposed chain,
from the first layer. With `shift` the recursion leaves out the layer where it starts, which is put back by one plain
step: the rows of the recursion are then that layer's values (in place of all inputs, forward).

Rows of the recursion never meet, so they are taken in chunks that fit into memory. With `rounding`, every end is
widened by a bound on its rounding error: `gamma_n` of the sums of absolute values, where the error of a folded column
is charged at the largest value that it can be multiplied with.

Length: the two methods, their recursion and its steps; a third is documentation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbound import errors
from jaxbound.driver import Constants, Run
from jaxbound.graph import Graph
from jaxbound.jacobian import slopes
from jaxbound.jacobian.chains import Chain, Layer, chain_of
from jaxbound.methods import Bounded, Crown, Method, Request, check_method
from jaxbound.relaxations import interval
from jaxbound.relaxations.affine import gamma

Ends = tuple[jax.Array, jax.Array]

MEMORY, MOST = 1 << 28, 1 << 33
"""Bytes that one array of columns should take (rows are taken in chunks of that size), and the most that it may."""


class JacobianMethod(Method):
    """A method that bounds the Jacobian of a chain itself, not through `jax.jacrev`.

    >>> JacobianMethod().guarantee
    'certified'
    """

    def jacobian(self, graph: Graph, leaves: Sequence, request: Request) -> Bounded:
        """Bounds of the Jacobian, of shape (outputs, inputs), both flattened; a batch stands before."""
        raise errors.no_such_answer(type(self).__name__, "Jacobian bounds")

    def row_sums(self, graph: Graph, leaves: Sequence, request: Request) -> jax.Array:
        """Upper bounds of the sums of absolute values in each row of the Jacobian; a batch stands before."""
        return absolute_sums(self.jacobian(graph, leaves, request))

    def bound(self, graph: Graph, leaves: Sequence, request: Request) -> list[Bounded]:
        """Refused: it bounds derivatives, not values."""
        raise errors.no_such_answer(
            type(self).__name__, "bounds of values", "call jaxbound.jacobian_bounds or jaxbound.lipschitz with it"
        )


def absolute_sums(found: Bounded) -> jax.Array:
    """Upper bounds of the sums of absolute values along the last axis."""
    assert found.upper is not None
    low, high = found.lower - found.lower_rounding, found.upper + found.upper_rounding
    total = jnp.sum(jnp.maximum(-low, high), axis=-1)
    return total * (1 + gamma(low.shape[-1] + 2, low.dtype))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RecurJac(JacobianMethod):
    """RecurJac: recursive bounds of the Jacobian of a chain.

    `lower <= J(x) <= upper` for the Jacobian J at every x in the region, Clarke's at kinks; by `jacobian_bounds`.

    Args:
        direction: "backward" from the output (a row of work per output) or "forward" from the input (a row per input,
            often a little tighter, much dearer). Static.
        shift: 1 to put the layer at which the recursion starts back by a plain step. Static.
        pre_activation: the method that bounds the inputs of the nonlinearities.

    Reference: Zhang et al., "RecurJac: an efficient recursive algorithm for bounding Jacobian matrix of neural networks
    and its applications", 2019, algorithms 1 and 2.

    >>> import jax.numpy as jnp
    >>> from jaxbound.jacobian.composition import jacobian_bounds
    >>> layers = [(jnp.eye(2), jnp.ones(2)), (jnp.ones((2, 1)), jnp.zeros(1))]
    >>> jacobian_bounds(layers, jnp.zeros((1, 2)), 0.5, method=RecurJac()).lower
    Array([[[1., 1.]]], dtype=float32)
    """

    direction: str = field(default="backward", metadata={"static": True})
    shift: int = field(default=0, metadata={"static": True})
    pre_activation: Method = field(default_factory=Crown)

    def jacobian(self, graph: Graph, leaves: Sequence, request: Request) -> Bounded:
        """Bounds of the Jacobian, of shape (outputs, inputs), both flattened; a batch stands before."""
        return self._solve(graph, leaves, request)[0]

    def row_sums(self, graph: Graph, leaves: Sequence, request: Request) -> jax.Array:
        """Upper bounds of the sums of absolute values in each row: entries of known sign are bounded together.

        Reference: Zhang et al. 2019, algorithm 2.
        """
        found, problem = self._solve(graph, leaves, request)
        plain = absolute_sums(found)
        if problem is None or len(problem.chain.layers) == 1:
            return plain
        low, high = found.lower - found.lower_rounding, _upper(found) + found.upper_rounding
        signs = jnp.where(low >= 0, 1, jnp.where(high <= 0, -1, 0)).astype(low.dtype)
        unsure = jnp.sum(jnp.where(signs == 0, jnp.maximum(-low, high), 0), axis=-1)
        together = problem.signed_sums(signs, forward=self.direction == "forward")
        size = low.shape[-1] + problem.chain.layers[0].segment.sizes[1]
        return jnp.fmin(plain, (together + unsure) * (1 + gamma(size + 2, low.dtype)))

    def _solve(self, graph: Graph, leaves: Sequence, request: Request) -> tuple[Bounded, _Problem | None]:
        if self.direction not in ("backward", "forward"):
            raise errors.unknown_option("direction", self.direction, ("backward", "forward"))
        if self.shift not in (0, 1):
            raise errors.argument("shift", f"is {self.shift!r}", "pass 0 or 1")
        problem = _problem(self, self.pre_activation, graph, leaves, request)
        if problem is None:
            return _constant(graph, leaves, request), None
        turn = self.direction == "forward"
        own = problem.flipped if turn else problem
        found = own.shifted() if self.shift and len(own.chain.layers) > 1 else own.recursive()
        return problem.finished(_transposed(found) if turn else found), problem


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FastLip(JacobianMethod):
    """Fast-Lip: bounds of the Jacobian of a chain layer by layer, from the output, without recursion.

    `lower <= J(x) <= upper` for the Jacobian J at every x in the region, Clarke's at kinks; by `jacobian_bounds`.

    Args:
        pre_activation: the method that bounds the inputs of the nonlinearities.

    Reference: Weng et al., "Towards fast computation of certified robustness for ReLU networks", 2018, section 3.4.
    """

    pre_activation: Method = field(default_factory=Crown)

    def jacobian(self, graph: Graph, leaves: Sequence, request: Request) -> Bounded:
        """Bounds of the Jacobian, of shape (outputs, inputs), both flattened; a batch stands before."""
        problem = _problem(self, self.pre_activation, graph, leaves, request)
        if problem is None:
            return _constant(graph, leaves, request)
        return problem.finished(problem.plain())


def _problem(
    method: Method, pre_activation: Method, graph: Graph, leaves: Sequence, request: Request
) -> _Problem | None:
    check_method("pre_activation", pre_activation)
    if pre_activation.guarantee != "certified":
        raise errors.estimate_refused(type(pre_activation).__name__)
    run = Run(graph, leaves, outward=request.rounding)
    chain = chain_of(run, type(method).__name__)
    if chain is None:
        return None
    known = pre_activation.pre_activations(graph, leaves, request) if chain.scalars else {}
    ranges = []
    for scalar in chain.scalars:
        static = scalar.op, scalar.used
        ranges.append(run.call(_slopes, static, scalar.constants, known[scalar.number]))
    return _Problem(run, chain, tuple(ranges))


def _constant(graph: Graph, leaves: Sequence, request: Request) -> Bounded:
    """The Jacobian of a function that does not depend on the region."""
    run = Run(graph, leaves, outward=request.rounding)
    ((_, number),) = graph.structure.outputs
    value = graph.constants[number]
    batched = graph.axes is not None and graph.axes[number] is not None
    outputs = value.size // (value.shape[0] if batched else 1)
    zeros = jnp.zeros((*(() if run.batch is None else (run.batch,)), outputs, graph.nodes[0].op.size), value.dtype)
    return Bounded(zeros, zeros, zeros, zeros)


def _upper(found: Bounded) -> jax.Array:
    assert found.upper is not None
    return found.upper


def _transposed(ends: Ends) -> Ends:
    return jnp.swapaxes(ends[0], -1, -2), jnp.swapaxes(ends[1], -1, -2)


# --- the recursion ----------------------------------------------------------------------------------------------------


class _Problem(NamedTuple):
    """A chain over a region, with the ranges of its derivatives.

    Layers count from 0. The level p of a recursion is the derivative of the output by the input of layer p.
    """

    run: Run
    chain: Chain
    ranges: tuple[Ends, ...]

    @property
    def flipped(self) -> _Problem:
        """The transposed problem."""
        return _Problem(self.run, self.chain.flipped, self.ranges[::-1])

    def finished(self, ends: Ends) -> Bounded:
        """Nothing is certified over an empty region, nor where a bound is undefined."""
        low, high = self.run.call(_finished, None, ((), ()), ends, self.run.void)
        zeros = jnp.zeros_like(low)
        return Bounded(low, high, zeros, zeros)

    def plain(self) -> Ends:
        """Bounds of the Jacobian by plain steps alone."""
        ends = self._last_rows()
        for layer, ranges in zip(self.chain.layers[-2::-1], self.ranges[::-1], strict=True):
            ends = self._plain_step(layer, ends, ranges)
        return ends

    def recursive(self) -> Ends:
        """Bounds of the Jacobian by the recursion."""
        return self._in_chunks(lambda rows: self._levels(rows)[0], self._last_rows())

    def shifted(self) -> Ends:
        """Bounds of the Jacobian: of the chain without its last layer, and this one by a plain step."""
        layers, last = self.chain.layers[:-1], self.chain.layers[-1]
        inner = _Problem(self.run, Chain(layers, self.chain.scalars[:-1]), self.ranges[:-1]).recursive()
        return _transposed(self._plain_step(last.flipped, _transposed(inner), self.ranges[-1]))

    def signed_sums(self, signs: jax.Array, *, forward: bool) -> jax.Array:
        """Upper bounds of each row's sum of its entries times signs, both of shape (outputs, inputs)."""
        first, outward = self.chain.layers[0], self.run.outward
        static = first.segment, outward
        column, error = self.run.call(_signed, static, _joined(first.matrix, first.magnitude), signs)
        if forward:  # the column is a last row of the transposed chain, for one output of it
            turned = self.flipped
            ends = turned._in_chunks(lambda rows: turned._levels(rows)[0], (column - error, column + error))
            return jnp.diagonal(ends[1], axis1=-2, axis2=-1)

        def sums(part):
            rows, *start = part
            levels = self._levels(rows)
            state = self.run.call(_start, None, ((), ()), *start, levels[1], self.ranges[0])
            return self._pass(0, levels, state)[1][..., 0]

        return self._in_chunks(sums, (self._last_rows(), column, error))

    # --- levels and passes ------------------------------------------------------------------------------------------

    def _levels(self, rows: Ends) -> list[Ends]:
        """Bounds of every level, from those of the last."""
        count = len(self.chain.layers)
        levels: list = [None] * (count - 1) + [rows]
        for p in range(count - 2, -1, -1):
            plain = self._plain_step(self.chain.layers[p], levels[p + 1], self.ranges[p])
            levels[p] = plain if p == count - 2 else self._pass(p, levels, known=plain)
        return levels

    def _pass(self, p: int, levels: list, state: _State | None = None, known: Ends | None = None) -> Ends:
        """The recursive bound of level p, or of other columns in place of its matrix, cut with what is known."""
        layers, last, outward = self.chain.layers, len(self.chain.layers) - 2, self.run.outward
        for m in range(p, last):
            layer = layers[m + 1]
            constants = _joined(layer.constants, layer.magnitude)
            if state is None:
                constants = _joined(constants, layers[p].matrix, layers[p].magnitude)
            static = layer.segment, layers[p].segment.terms if state is None else None, outward
            beyond = levels[m + 2], self.ranges[m + 1]
            state = self.run.call(_fold, static, constants, state, levels[m + 1], self.ranges[m], beyond)
        return self.run.call(_total, outward, ((), ()), state, levels[last + 1], self.ranges[last], known)

    def _plain_step(self, layer: Layer, ends: Ends, ranges: Ends) -> Ends:
        static = layer.segment.terms, self.run.outward
        return self.run.call(_plain, static, _joined(layer.matrix, layer.magnitude), ends, ranges)

    def _last_rows(self) -> Ends:
        """The last level, which is known."""
        layer = self.chain.layers[-1]
        static = layer.segment.terms, self.run.outward
        return self.run.call(_last_rows, static, _joined(layer.matrix, layer.magnitude), self.run.void)

    # --- chunks -----------------------------------------------------------------------------------------------------

    def _in_chunks(self, function: Callable, rows):
        """A function of rows, so many at a time that the columns fit into memory."""
        axis = 0 if self.run.batch is None else 1
        total = jax.tree.leaves(rows)[0].shape[axis]
        size = min(total, self._chunk())
        index = np.minimum(np.arange(-(-total // size) * size), total - 1).reshape(-1, size)
        if len(index) == 1:
            return function(rows)

        def one(chosen):
            return function(jax.tree.map(lambda leaf: jnp.take(leaf, chosen, axis), rows))

        if self.run.eager:
            parts = [one(chosen) for chosen in index]
            joined = jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis), *parts)
        else:
            stacked = jax.lax.map(one, jnp.asarray(index))
            joined = jax.tree.map(lambda leaf: jnp.concatenate(list(leaf), axis), stacked)
        return jax.tree.map(lambda leaf: jax.lax.slice_in_dim(leaf, 0, total, axis=axis), joined)

    def _chunk(self) -> int:
        """How many rows may be carried at once."""
        sizes = [layer.segment.sizes for layer in self.chain.layers]
        numbers = [sizes[p][0] * max(out for _, out in sizes[p:-1]) for p in range(len(sizes) - 1)]
        item = jnp.dtype(self.chain.layers[0].segment.dtype).itemsize
        row = 2 * (self.run.batch or 1) * item * max(numbers, default=1)
        if row > MOST:
            raise errors.UnsupportedError(
                f"RecurJac needs {row / 2**30:.3g} GiB for the columns of one row: pass fewer examples at once, or use "
                "method=FastLip(), or method=Crown()"
            )
        return max(1, MEMORY // row)


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


def _slopes(static, constants, ends):
    op, used = static
    low, high = slopes.slope_range(op, [constants[k] for k in used], ends)
    return low.reshape(-1), high.reshape(-1)


def _last_rows(static, constants, _void):
    terms, outward = static
    value = constants[0].T
    error = gamma(terms, value.dtype) * constants[1].T if outward else 0
    return value - error, value + error


def _signed(static, constants, signs):
    segment, outward = static
    column = _dot("jk,kn->jn", signs, constants[0])
    if not outward:
        return column, jnp.zeros_like(column)
    terms = segment.terms + signs.shape[-1] + 2
    return column, gamma(terms, column.dtype) * _dot("jk,kn->jn", jnp.abs(signs), constants[1])


def _plain(static, constants, ends, ranges):
    terms, outward = static
    low, high = _corners(ends, ranges)
    plus, minus = jnp.maximum(constants[0], 0), jnp.minimum(constants[0], 0)
    lower, upper = _dot("sjn,kn->sjk", jnp.stack([low, high]), plus) + _dot(
        "sjn,kn->sjk", jnp.stack([high, low]), minus
    )
    if not outward:
        return lower, upper
    size = _dot("jn,kn->jk", jnp.maximum(-low, high), constants[1])
    return _widened(lower, upper, gamma(terms + low.shape[-1] + 6, size.dtype) * size)


def _start(_static, _constants, column, error, ends, ranges):
    largest = jnp.maximum(*map(jnp.abs, _corners(ends, ranges)))
    columns = jnp.stack([column, column])[:, :, None]
    charged = _dot("jn,jn->j", largest, error)[:, None]
    return _State(columns, jnp.zeros(columns.shape[:-1], columns.dtype), charged)


def _fold(static, constants, state, ends, ranges, beyond):
    """One layer of a pass: values of known sign or range go into the columns, the others are met by plain steps."""
    segment, start_terms, outward = static
    known = (ends[0] >= 0) | (ends[1] <= 0)
    nearest = jnp.clip(0, *ranges)
    rest = _corners(ends, (ranges[0] - nearest, ranges[1] - nearest))
    open_low, open_high = (jnp.where(known, 0, end) for end in rest)
    columns = constants[-2 if outward else -1][None, None] if state is None else state.columns
    met = _met(open_low, open_high, columns)
    total, error = (met, jnp.zeros_like(met[0])) if state is None else (state.total + met, state.error)
    worst = jnp.stack([ranges[0], ranges[1]])[:, None, None], jnp.stack([ranges[1], ranges[0]])[:, None, None]
    aligned = (columns > 0) == (ends[0] >= 0)[:, None]
    folded = columns * jnp.where(known[:, None], jnp.where(aligned, *worst), nearest)
    moved = jax.vmap(lambda column: segment.linear(constants, column))(folded.reshape(-1, folded.shape[-1]))
    if outward:
        dtype, count = folded.dtype, folded.shape[-1]
        error = error + gamma(count + 6, dtype) * _largest_sum(jnp.maximum(-open_low, open_high), columns)
        further = jnp.maximum(*map(jnp.abs, _corners(*beyond)))
        magnitude = constants[-1 if state is not None else -3]
        charge = _dot("jm,nm->jn", further, magnitude)
        error = error + gamma(segment.terms + 3, dtype) * _largest_sum(charge, folded)
        error = error + gamma(3, dtype) * jnp.max(jnp.abs(total), axis=0)
        if state is None:
            largest = jnp.maximum(*map(jnp.abs, _corners(ends, ranges)))
            error = error + gamma(start_terms, dtype) * _dot("jn,kn->jk", largest, constants[-1])
    return _State(moved.reshape(*folded.shape[:-1], -1), total, error)


def _total(outward, _constants, state, ends, ranges, known):
    """The end of a pass, cut with what is known."""
    low, high = _corners(ends, ranges)
    lower, upper = state.total + _met(low, high, state.columns)
    if outward:
        size = _largest_sum(jnp.maximum(-low, high), state.columns)
        error = state.error + gamma(low.shape[-1] + 6, size.dtype) * size
        lower, upper = _widened(lower, upper, error)
    return (lower, upper) if known is None else interval.intersect(known, (lower, upper))


def _finished(_static, _constants, ends, void):
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
    """The larger of both columns' sums of absolute values times sizes."""
    return jnp.max(jnp.sum(size[:, None] * jnp.abs(columns), axis=-1), axis=0)


def _widened(lower: jax.Array, upper: jax.Array, error: jax.Array) -> Ends:
    """Ends moved apart by an error and the rounding of doing so."""
    unit = jnp.finfo(error.dtype).eps
    return lower - (1.01 * error + unit * jnp.abs(lower)), upper + (1.01 * error + unit * jnp.abs(upper))


def _dot(spec: str, *operands: jax.Array) -> jax.Array:
    return jnp.einsum(spec, *operands, precision=jax.lax.Precision.HIGHEST)
