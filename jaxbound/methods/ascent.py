"""One tuning: lower bounds of some rows of one node, maximised over the slopes of every relaxation before it.

A slope is written as a share in [0, 1] of the range in which it can gain anything (`planes.Freedom`). Shares start at
CROWN's own choice, take optax steps along the projected gradient, and every row keeps the best bound that it has seen.
Steps use averages of lines from a table; the slopes that come out of them then get their exact intercepts once.
The whole loop is one step of the driver (`tuned`), compiled once per target and mapped over the batch; tables and exact
intercepts are steps of their own, which equal layers share.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxbound import regions
from jaxbound.backend.tracing import rolled
from jaxbound.driver import Rows, Run
from jaxbound.graph import Block, Graph, Op, Structure
from jaxbound.relaxations import enclosures, windows
from jaxbound.relaxations.coefficients import Coefficients
from jaxbound.relaxations.planes import Planes, between, spread, times
from jaxbound.relaxations.slopes import Freedom, Given
from jaxbound.relaxations.windows import Windowed

Ends = tuple[jax.Array, jax.Array]
Shares = dict[int, tuple[jax.Array | None, jax.Array | None]]
"""Per nonlinear node, below and above; the first axis is that of groups of rows. None where there is no choice."""

Slopes = dict[int, tuple[jax.Array, jax.Array]]
"""The same, of slopes."""

_PATIENCE = 5
"""Steps in a row that gain too little before tuning stops early."""


class Settings(NamedTuple):
    """How slopes are tuned; static."""

    optimizer: optax.GradientTransformation
    shared: int | None
    """Rows that share slopes; None for all on one side."""
    early_stop: float | None
    sides: str
    outward: bool


class _State(NamedTuple):
    """What a tuning carries from step to step."""

    step: jax.Array
    shares: Shares
    optimizer: optax.OptState
    best: Rows
    """The best bound of every row so far."""
    level: jax.Array
    """The largest sum of bounds of every group, and the shares that gave it."""
    kept: Shares
    gained: jax.Array
    stalled: jax.Array


def tuned(
    static: tuple[Structure, int, Settings],
    constants: Sequence,
    leaves: Sequence[regions.Region],
    ends: dict[int, Ends],
    tables: dict[int, Any],
    index: jax.Array,
) -> tuple[Slopes, Rows]:
    """The slopes with which every group's rows had their largest sum, and the best bound that every row had.

    Slopes have the derivative of the tables, but none of the shares: where these are best, bounds by them have all of
    theirs (the envelope theorem). The best bounds have none.

    Args:
        static: the graph, the node, and how to tune.
        constants: of the graph, then how many steps to take.
        leaves: the regions.
        ends: bounds of every node that a pass from the node may ask for.
        tables: `table_of` every nonlinear one that it may meet.
        index: the entries of the node to bound; -1 makes an empty row.
    """
    *constants, steps = constants
    problem = _Problem(static, jax.lax.stop_gradient((constants, leaves, ends, tables)), index)
    kept, best = _maximised(problem, steps)
    return problem.slopes(kept, tables), best


def better(_static: Any, _constants: Sequence, found: Rows, best: Rows) -> Rows:
    """The better bounds of every row, where the best ones seen have the derivatives of those found in the end."""
    return _where(_value(best) > _value(found), jax.tree.map(_moving, best, found), found)


class _Problem:
    """Lower bounds of some rows of one node as a function of shares.

    Where every row has slopes of its own and reads only a window of a node, its shares are those of the window.
    """

    def __init__(self, static: tuple[Structure, int, Settings], held: tuple, index: jax.Array):
        structure, self.number, self.how = static
        constants, leaves, ends, tables = held
        self.index = index
        run = Run.over(Graph(tuple(constants), structure, None), leaves, outward=self.how.outward)
        self.run = replace(run, knowledge=run.knowledge._replace(ends=dict(ends)))
        self.blocks = [block for block in structure.blocks if block.start in tables]
        self.windows = self._windows(tables) if self.how.shared == 1 else {}
        self.tables: dict[int, tuple[Planes, Freedom]] = dict(tables)
        for k, rows in self.windows.items():
            self.tables[k] = jax.tree.map(functools.partial(_cut, rows), tables[k])

    def start(self) -> Shares:
        """CROWN's own choice, for every group."""
        return {k: self._in_groups(k, freedom.shares) for k, (_, freedom) in self.tables.items()}

    def slopes(self, shares: Shares, tables: dict[int, tuple[Planes, Freedom]]) -> Slopes:
        """From shares to what `planes` may be given; CROWN's own where a row reads nothing."""

        def side(k: int, freedom: Freedom, number: int) -> jax.Array:
            table, share, default = freedom.slopes[number], shares[k][number], freedom.shares[number]
            if share is None or default is None:
                return self._repeated(between(table, None))
            if k in self.windows:
                share = _placed(self.windows[k], share, default)
            return between(table, share)

        return {k: (side(k, freedom, 0), side(k, freedom, 1)) for k, (_, freedom) in tables.items()}

    def _windows(self, tables: dict[int, Any]) -> dict[int, Windowed]:
        """The nodes of which each row reads a window, and the rows that arrive there."""
        found: dict[int, Windowed] = {}

        def note(block: Block, rows: Coefficients) -> Planes | None:
            if block.start not in tables:
                return None
            op, (table, freedom) = block.template.nodes[0][0], tables[block.start]
            leaves = jax.tree.leaves((table, freedom.slopes))
            if isinstance(rows, Windowed) and all(leaf.shape[1:] == op.shape for leaf in leaves):
                found[block.start] = rows
            return jax.tree.map(lambda leaf: leaf[0], table)

        self.run.walk_back(*self.run.start(self.number, self.index, self.how.sides), note)
        return found

    def _in_groups(self, k: int, values: Any):
        return values if k in self.windows else jax.tree.map(self._repeated, values)

    def _repeated(self, values: jax.Array) -> jax.Array:
        groups = len(self.per_group(jnp.zeros(self.count)))
        return jnp.broadcast_to(values, (groups, *values.shape))

    def rows(self, shares: Shares) -> Rows:
        """The lower bounds, from averages of the tables' lines."""
        planes = {
            block.start: mixed(
                block.template.nodes[0][0],
                self.tables[block.start][0],
                jax.tree.map(self.per_row, shares[block.start]),
            )
            for block in self.blocks
        }
        return self.run.learn(planes=planes).bound_rows(self.number, self.index, self.how.sides)

    @property
    def sides(self) -> int:
        """Which kinds of rows there are."""
        return 2 if self.how.sides == "both" else 1

    @property
    def count(self) -> int:
        """How many rows there are."""
        return self.sides * self.index.shape[0]

    def per_row(self, values: jax.Array) -> jax.Array:
        """What belongs to groups, for every row."""
        return values if self.how.shared == 1 else spread(values, self.sides, self.index.shape[0])

    def per_group(self, values: jax.Array) -> jax.Array:
        """Sums over the rows of each group."""
        if self.how.shared == 1:
            return values
        padding = -self.index.shape[0] % self._size
        split = jnp.pad(values.reshape(self.sides, -1), ((0, 0), (0, padding)))
        return split.reshape(-1, self._size).sum(axis=1)

    @property
    def _size(self) -> int:
        rows = self.index.shape[0]
        groups = 1 if self.how.shared is None else -(-rows // self.how.shared)
        return -(-rows // groups)


def _maximised(problem: _Problem, steps: jax.Array) -> tuple[Shares, Rows]:
    """The best shares of every group, and the best bound of every row."""
    how, start = problem.how, problem.start()
    optimizer = optax.with_extra_args_support(how.optimizer)

    def loss(shares: Any):
        rows = problem.rows(shares)
        return -jnp.sum(jnp.where(jnp.isfinite(_value(rows)), _value(rows), 0)), rows

    def step(state: _State) -> _State:
        (_, rows), gradient = jax.value_and_grad(loss, has_aux=True)(state.shares)
        best = _where(_value(rows) > _value(state.best), rows, state.best)
        level = problem.per_group(_value(rows))
        kept = _where(level > state.level, state.shares, state.kept)
        gain = jnp.sum(jnp.where(jnp.isfinite(state.level) & (level > state.level), level - state.level, 0))
        little = gain <= (how.early_stop or 0) * state.gained
        gradient = jax.tree.map(_projected, state.shares, gradient)
        progress = state.step / jnp.maximum(steps, 1)
        updates, state_of = optimizer.update(gradient, state.optimizer, state.shares, progress=progress)
        return _State(
            step=state.step + 1,
            shares=jax.tree.map(lambda share: jnp.clip(share, 0, 1), optax.apply_updates(state.shares, updates)),
            optimizer=state_of,
            best=best,
            level=jnp.maximum(level, state.level),
            kept=kept,
            gained=state.gained + gain,
            stalled=jnp.where(little & (state.step > 0), state.stalled + 1, 0),
        )

    def going_on(state: _State) -> jax.Array:
        going = state.step <= steps  # the last one only evaluates
        return going if how.early_stop is None else going & (state.stalled < _PATIENCE)

    shapes = jax.eval_shape(problem.rows, start)
    nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)._replace(
        lower=jnp.full(shapes.lower.shape, -jnp.inf, shapes.lower.dtype)
    )
    level, zero = problem.per_group(nothing.lower), jnp.zeros((), shapes.lower.dtype)
    state = _State(jnp.array(0), start, optimizer.init(start), nothing, level, start, zero, jnp.array(0))
    state = rolled(jax.lax.while_loop)(going_on, step, state)
    return state.kept, state.best


def _cut(rows: Windowed, values: jax.Array) -> jax.Array:
    """What every row sees of some values, or of a table of them."""
    if values.ndim > len(rows.shape):
        return jax.vmap(functools.partial(_cut, rows))(values)
    return windows.cut(rows, values)


def _placed(rows: Windowed, seen: jax.Array, default: jax.Array) -> jax.Array:
    """The reverse: per row, what it sees in its place, and the default around it."""
    put = lambda values: windows.whole(dataclasses.replace(rows, values=values)).values  # noqa: E731
    return jnp.where(put(jnp.ones_like(seen)) > 0, put(seen), jax.lax.stop_gradient(default))


def _value(rows: Rows) -> jax.Array:
    """A bound with its rounding counted."""
    return rows.lower if rows.rounding is None else rows.lower - rows.rounding


def _moving(value: jax.Array, like: jax.Array) -> jax.Array:
    """A value with the derivative of another; what is added is exactly 0."""
    return value + jnp.where(jnp.isfinite(like), like - jax.lax.stop_gradient(like), 0)


def _where(condition: jax.Array, new: Any, old: Any):
    """A choice along the first axis."""
    return jax.tree.map(lambda a, b: jnp.where(condition.reshape(-1, *[1] * (a.ndim - 1)), a, b), new, old)


def _projected(share: jax.Array, gradient: jax.Array) -> jax.Array:
    """Without what would leave [0, 1]: it must not weigh in an optimizer that looks at the whole."""
    leaves = ((share <= 0) & (gradient > 0)) | ((share >= 1) & (gradient < 0))
    return jnp.where(leaves | ~jnp.isfinite(gradient), 0, gradient)


def table_of(
    node: tuple[Op, tuple, tuple[int, ...]], constants: Sequence, inputs: Sequence[Ends]
) -> tuple[Planes, Freedom]:
    """Planes with the slopes of a node's freedom, widened by the rounding of their averages (and of places in them)."""
    op, _, used = node
    enclosure, own = enclosures.of(op), [constants[k] for k in used]
    freedom = enclosure.freedom(op, inputs, own)
    counts = [len(side) for side in freedom.slopes]
    pairs = [jnp.broadcast_to(side, (max(counts), *side.shape[1:])) for side in freedom.slopes]
    table = jax.vmap(lambda pair: enclosure.planes(op, inputs, own, Given(*pair)))(tuple(pairs))
    below = jax.tree.map(lambda leaf: leaf[: counts[0]], (table.lower_slopes, table.lower_intercept))
    above = jax.tree.map(lambda leaf: leaf[: counts[1]], (table.upper_slopes, table.upper_intercept))
    reaches = [jnp.maximum(jnp.abs(low), jnp.abs(high)) for low, high in inputs]
    widths = []
    for slopes, intercept in (below, above):
        products = [jnp.max(times(jnp.abs(s), reach), axis=0) for s, reach in zip(slopes, reaches, strict=True)]
        size = sum(jnp.sum(product, axis=enclosures.reduced_axes(op)) for product in products)
        size = size + jnp.max(jnp.abs(intercept), axis=0)
        width = (4 + 2 * len(intercept)) * jnp.finfo(op.dtype).eps * jnp.where(jnp.isfinite(size), size, 0)
        widths.append(jax.lax.stop_gradient(jnp.where(len(intercept) > 1, width, 0)))
    return Planes(below[0], below[1] - widths[0], above[0], above[1] + widths[1]), freedom


def mixed(op: Op, table: Planes, shares: tuple[jax.Array | None, jax.Array | None]) -> Planes:
    """The planes at some places of a table."""
    axes = enclosures.reduced_axes(op)
    kept = [axis - len(op.shape) - len(axes) for axis in axes]  # counted from the last: rows come first
    wide = [None if share is None else jnp.expand_dims(share, kept) for share in shares]
    return Planes(
        between(table.lower_slopes, wide[0]), between(table.lower_intercept, shares[0]),
        between(table.upper_slopes, wide[1]), between(table.upper_intercept, shares[1]),
    )  # fmt: skip
