r"""Boxes cut by half-spaces, {x : lower <= x <= upper, A x <= b}: the support function by Lagrange multipliers.

For every y >= 0, since y.(A x - b) <= 0 in the polytope,

    min over the polytope of s.x  >=  min over the box of (s + A^T y).x  -  y.b,

with equality for the best y, the dual solution of a linear program. A y that is not the best costs tightness, never
soundness, so it is found in floating point: in units where the box is [-1, 1]^n and rows have 1-norm 1, the right side
is -||s + W^T y||_1 - y.beta, and each y_i in turn is moved to its best place by bisection of the derivative
W_i.u - beta_i, u = -sign(s + W^T y), which falls as y_i grows. That stops at kinks where no single multiplier can move
alone, so signs are smoothed, u = clip(-(s + W^T y) / mu, -1, 1), with mu smaller at every turn. What the chosen y gives
is then evaluated as it stands, less a bound on the rounding of the evaluation (Higham 2002, section 3.1), and the box
alone is a bound as well. With s = 0, a positive bound proves that the polytope is empty (Farkas).

The enclosing box is tightened by each row: what the other coordinates leave of b_i bounds each one.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxbound import errors
from jaxbound._compat import eager_jit
from jaxbound.backend.tracing import rolled
from jaxbound.regions.rounding import cast_to, is_subnormal, next_number, without_subnormals

HIGHEST = jax.lax.Precision.HIGHEST

_TURNS = 20  # of all multipliers; one suffices for a single row
_NEARLY = 1e-5  # a row that leaves less than this of the box is not followed further


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Polytope:
    """The set of every `x` in a box with `sum(A[i] * x) <= b[i]` for every row i.

    Args:
        A: floating, `(rows, *leaf shape)`; with `batch_ndim`, `(*batch, rows, *rest of the leaf's shape)`.
        b: `(rows,)`; with `batch_ndim`, `(*batch, rows)`. +inf says nothing.
        box: a `Box` of the leaf, which may be infinite where the rows are not.
        batch_ndim: the number of leading axes of the leaf that index separate polytopes (static).

    An empty polytope is an error, or gives infinite bounds, where the multipliers prove it; else what is bounded holds
    for each of its points, of which there are none.

    >>> from jaxbound.regions import Box, minimum
    >>> half = Polytope(jnp.array([[1.0, 1.0]]), jnp.array([1.0]), Box(jnp.zeros(2), jnp.ones(2)))
    >>> minimum(half, jnp.array([-1.0, -2.0])).round(3)  # at (0, 1), where the box alone says -3
    Array(-2., dtype=float32)
    """

    A: ArrayLike
    b: ArrayLike
    box: Any
    batch_ndim: int = dataclasses.field(default=0, kw_only=True, metadata={"static": True})

    def struct(self) -> jax.ShapeDtypeStruct:
        """The shape and dtype of the leaf."""
        return jax.ShapeDtypeStruct(np.shape(self.box.lower), jnp.result_type(self.box.lower, self.box.upper))

    def parts(self) -> dict[str, ArrayLike]:
        """Every array by name."""
        if not hasattr(self.box, "lower") or not hasattr(self.box, "upper"):
            raise errors.argument_type("Polytope's box", f"is a {type(self.box).__name__}", "pass a jaxbound.Box")
        return {"A": self.A, "b": self.b, "lower": self.box.lower, "upper": self.box.upper}

    def check_shapes(self, name: str) -> None:
        """Refuse parts that do not fit."""
        lower, upper, batch_ndim = np.shape(self.box.lower), np.shape(self.box.upper), self.batch_ndim
        if lower != upper:
            raise errors.argument(f"{name}.box", f"has ends of shapes {lower} and {upper}", "broadcast both")
        if not 0 <= batch_ndim <= len(lower):
            raise errors.argument(f"{name}.batch_ndim", f"is {batch_ndim}", f"the box has {len(lower)} axes")
        rows, offsets = np.shape(self.A), np.shape(self.b)
        if len(rows) != len(lower) + 1 or (*rows[:batch_ndim], *rows[batch_ndim + 1 :]) != lower:
            wanted = ", ".join(map(str, (*lower[:batch_ndim], "rows", *lower[batch_ndim:])))
            raise errors.argument(f"{name}.A", f"has shape {rows}", f"pass shape ({wanted}) for a box of {lower}")
        if offsets != rows[: batch_ndim + 1]:
            raise errors.argument(f"{name}.b", f"has shape {offsets}", f"pass shape {rows[: batch_ndim + 1]}")

    def canonical(self) -> Polytope:
        """Parts of the leaf's dtype, without subnormal numbers: the box and b are rounded outward, b for A as well."""
        dtype = self.struct().dtype
        wide: Any = self.A if isinstance(self.A, jax.Array) else np.asarray(self.A)
        matrix, exact = cast_to(wide, dtype, 0), np.asarray(wide.dtype == dtype)
        box = dataclasses.replace(
            self.box, lower=cast_to(self.box.lower, dtype, -1), upper=cast_to(self.box.upper, dtype, +1)
        )
        own = dataclasses.replace(self, A=matrix, b=cast_to(self.b, dtype, +1), box=box)
        return _rounded(own, exact)

    def per_example(self) -> Polytope:
        """A stack of polytopes of one example."""
        return dataclasses.replace(self.canonical(), batch_ndim=self.batch_ndim - 1)

    def ends(self, dtype: np.dtype) -> tuple[jax.Array, jax.Array]:
        """A box around it, rounded outward."""
        shape = np.shape(self.box.lower)
        low, high, _ = _tightened(self._flat())
        return cast_to(low.reshape(shape), dtype, -1), cast_to(high.reshape(shape), dtype, +1)

    def is_empty(self) -> jax.Array:
        """Whether it is known to be empty, or a part is undefined."""
        rows = self._flat()
        low, high, void = _tightened(rows)
        undefined = jnp.any(jnp.isnan(rows.offsets)) | jnp.any(~jnp.isfinite(rows.matrix))
        undefined = undefined | jnp.any(~((low <= high) & (low < jnp.inf) & (high > -jnp.inf)))
        rows = rows._replace(low=low, high=high)
        value, _ = _lagrangian(rows, jnp.zeros(low.shape, low.dtype))
        return undefined | jnp.any(void) | jnp.any(value > 0)

    def terms(self) -> int:
        """How many rounded operations the box's minimum passes through; the multipliers' are charged here."""
        return self.struct().size + 8

    def minimum(self, slope: jax.Array) -> jax.Array:
        """The least values of rows `(*leading, *leaf shape)`, or less."""
        rows = self._flat()
        low, high, _ = _tightened(rows)
        rows = rows._replace(low=low, high=high)
        leading = slope.shape[: slope.ndim - len(np.shape(self.box.lower))]
        value, alone = _lagrangian(rows, slope.reshape(*leading, *low.shape))
        found = jnp.maximum(value, alone)
        found = jnp.sum(found, axis=tuple(range(len(leading), found.ndim)))
        return jnp.where(jnp.isfinite(found), found, -jnp.inf)

    def _flat(self) -> Rows:
        own = self.canonical()
        shape = np.shape(self.box.lower)
        batch, size = shape[: self.batch_ndim], math.prod(shape[self.batch_ndim :])
        count = np.shape(self.b)[-1]
        low, high = (jnp.reshape(end, (*batch, size)) for end in (own.box.lower, own.box.upper))
        return Rows(jnp.reshape(own.A, (*batch, count, size)), jnp.asarray(own.b), low, high)


@eager_jit
def _rounded(own: Polytope, exact: ArrayLike) -> Polytope:
    """Without subnormal numbers, and with room in b for what A lost where it was rounded."""
    matrix: Any = own.A
    limits, tiny = jnp.finfo(matrix.dtype), is_subnormal(matrix)
    lower, upper = without_subnormals(own.box.lower, -1), without_subnormals(own.box.upper, +1)
    # A cast to nearest moves by half a unit in the last place, or by less than the smallest normal number below it.
    moved = jnp.where(exact, 0, limits.eps * jnp.abs(matrix) + limits.tiny)
    moved = moved + jnp.where(tiny, limits.tiny, 0)
    reach = jnp.expand_dims(jnp.maximum(jnp.abs(lower), jnp.abs(upper)), own.batch_ndim)
    axes = tuple(range(own.batch_ndim + 1, matrix.ndim))
    slack = jnp.sum(jnp.where(moved == 0, 0, moved * reach + limits.tiny), axis=axes)
    slack = slack * (1 + 4 * matrix.size * limits.eps)
    offsets = without_subnormals(jnp.asarray(own.b), +1)
    offsets = jnp.where(slack == 0, offsets, next_number(offsets + slack, 1))
    box = dataclasses.replace(own.box, lower=lower, upper=upper)
    return dataclasses.replace(own, A=jnp.where(tiny, 0, matrix), b=offsets, box=box)


class Rows(NamedTuple):
    """A polytope with one axis of features."""

    matrix: jax.Array
    """(*batch, rows, features)"""
    offsets: jax.Array
    """(*batch, rows)"""
    low: jax.Array
    high: jax.Array


def _tightened(rows: Rows) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The box that each row leaves of the box, and whether one leaves none of it."""
    matrix, low, high, limits = rows.matrix, rows.low, rows.high, jnp.finfo(rows.matrix.dtype)
    if not rows.offsets.shape[-1]:
        return low, high, jnp.zeros(rows.offsets.shape[:-1], bool)
    unit = (rows.low.shape[-1] + 8) * limits.eps
    end = jnp.where(matrix > 0, low[..., None, :], high[..., None, :])
    least = jnp.where(matrix == 0, 0, matrix * jnp.where(matrix == 0, 0, end))
    size = jnp.sum(jnp.abs(least) + jnp.where(matrix == 0, 0, 2 * limits.tiny), axis=-1) + jnp.abs(rows.offsets)
    rest = rows.offsets - jnp.sum(least, axis=-1) + unit * size
    share = jnp.maximum(rest, 0)[..., None] / jnp.where(matrix == 0, 1, jnp.abs(matrix))
    share = share * (1 + 4 * limits.eps) + limits.tiny
    known = (matrix != 0) & jnp.isfinite(share) & jnp.isfinite(end)
    above = jnp.where(known & (matrix > 0), next_number(end + share, 1), jnp.inf)
    below = jnp.where(known & (matrix < 0), next_number(end - share, -1), -jnp.inf)
    void = jnp.any((rest < 0) | (rows.offsets == -jnp.inf), axis=-1)
    return jnp.maximum(low, jnp.max(below, axis=-2)), jnp.minimum(high, jnp.min(above, axis=-2)), void


def _lagrangian(rows: Rows, slope: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Per row of slopes, what chosen multipliers prove, less its rounding; and what the box alone says."""
    limits, (count, size) = jnp.finfo(slope.dtype), rows.matrix.shape[-2:]
    alone = _box_minimum(rows, slope)
    if not count:
        return jnp.full_like(alone, -jnp.inf), alone
    y = jax.lax.stop_gradient(_multipliers(*jax.lax.stop_gradient((rows, slope))))
    used = jnp.where(jnp.isfinite(rows.offsets), rows.offsets, 0)
    reduced = slope + jnp.einsum("...m,...mn->...n", y, rows.matrix, precision=HIGHEST)
    total = jnp.abs(slope) + jnp.einsum("...m,...mn->...n", y, jnp.abs(rows.matrix), precision=HIGHEST)
    value = _box_minimum(rows, reduced) - jnp.sum(y * used, axis=-1)
    reach = jnp.maximum(jnp.abs(rows.low), jnp.abs(rows.high))
    charged = jnp.where(total == 0, 0, (total + 4 * limits.tiny / limits.eps) * (reach + 1))
    magnitude = jnp.sum(charged, axis=-1) + jnp.sum(y * jnp.abs(used), axis=-1) + limits.tiny / limits.eps
    value = value - (size + count + 12) * limits.eps * jax.lax.stop_gradient(magnitude)
    # A bound that no point of the box attains proves that there is no point: it bounds nothing.
    value = jnp.where(value > -_box_minimum(rows, -slope), jnp.where(jnp.all(slope == 0), value, -jnp.inf), value)
    return jnp.where(jnp.isfinite(value), value, -jnp.inf), alone


def _box_minimum(rows: Rows, slope: jax.Array) -> jax.Array:
    end = jnp.where(slope > 0, rows.low, rows.high)
    terms = jnp.where(slope == 0, 0, slope * jnp.where(slope == 0, 0, end))
    total = jnp.sum(terms, axis=-1)
    return jnp.where(jnp.isfinite(total), total, -jnp.inf)


def _multipliers(rows: Rows, slope: jax.Array) -> jax.Array:
    """Multipliers of the rows for each row of slopes, (*leading, *batch, rows); the module's head says how."""
    low, high = rows.low, rows.high
    ended = jnp.isfinite(low) & jnp.isfinite(high)
    low, high = jnp.where(ended, low, 0), jnp.where(ended, high, 0)
    half, center = (high / 2 - low / 2), (high / 2 + low / 2)
    weights = rows.matrix * half[..., None, :]
    length = jnp.sum(jnp.abs(weights), axis=-1)
    unit = jnp.where(length > 0, length, 1)
    beta = (rows.offsets - jnp.sum(rows.matrix * center[..., None, :], axis=-1)) / unit
    endless = jnp.any((rows.matrix != 0) & ~ended[..., None, :], axis=-1)
    usable = jnp.isfinite(beta) & (length > 0) & (beta < 1) & ~endless & jnp.isfinite(length)
    weights = jnp.where(usable[..., None], weights / unit[..., None], 0)
    beta = jnp.where(usable, beta, 1)
    scaled = slope * half
    size = jnp.sum(jnp.abs(scaled), axis=-1, keepdims=True)
    scaled = scaled / jnp.where(size > 0, size, 1)
    smooth = jnp.mean(jnp.abs(weights)) + 1 / slope.shape[-1]
    count, turns = rows.offsets.shape[-1], _TURNS if rows.offsets.shape[-1] > 1 else 1

    def move(step: jax.Array, y: jax.Array) -> jax.Array:
        k, turn = step % count, step // count
        mu = jnp.where(turn == turns - 1, jnp.finfo(slope.dtype).tiny, smooth * 2.0 ** (1 - turn))
        mine = jnp.arange(count) == k
        row = jnp.sum(jnp.where(mine[:, None], weights, 0), axis=-2)
        level = jnp.sum(jnp.where(mine, beta, 0), axis=-1)
        others = scaled + jnp.einsum("...m,...mn->...n", jnp.where(mine, 0, y), weights)
        last = (2 * jnp.sum(jnp.abs(others), axis=-1) + 1) / jnp.maximum(1 + level, _NEARLY)

        def halve(_: jax.Array, ends: tuple[jax.Array, jax.Array]):
            middle = 0.5 * (ends[0] + ends[1])
            u = jnp.clip(-(others + middle[..., None] * row) / mu, -1, 1)
            rises = jnp.sum(row * u, axis=-1) > level
            return jnp.where(rises, middle, ends[0]), jnp.where(rises, ends[1], middle)

        near, _ = rolled(jax.lax.fori_loop)(0, jnp.finfo(slope.dtype).nmant + 3, halve, (jnp.zeros_like(last), last))
        return jnp.where(mine, near[..., None], y)

    start = jnp.broadcast_to(0 * size, (*slope.shape[:-1], count))
    y = rolled(jax.lax.fori_loop)(0, turns * count, move, start)
    y = y * jnp.where(size > 0, size, 1) / unit
    return jnp.where(jnp.isfinite(y) & usable & (y > jnp.finfo(y.dtype).tiny), y, 0)
