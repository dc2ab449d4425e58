"""The linear coefficients that a backward pass carries, one interface with several representations.

Coefficients are R linear functions ("rows") of one value. They are used through

* `dense(c)`             the array, rows first, then the value's own shape;
* `pull(op, c, ...)`     coefficients of an affine node's inputs;
* `add(c, d)`            the sum, where a value is read twice;
* `scale(c, low, high)`  entry by entry, the positive ones times `low` and the negative ones times `high`;
* `total(c, low, high)`  each row's sum of these products;
* `dot(c, values)`       each row's sum of c times values;
* `size(c, values)`      each row's sum of |c| times values; `charge(c, values)` the same with room for underflow;
* `minimum(c, region)`   each row's least value over a region.

`Identity` is where a pass starts: row r is a multiple of entry `index[r]` of the value. Operations on entries alone
keep it, and a Dense layer's kernel turns it into its own columns without a product. `Windowed` rows read a small box
each (`windows`): what a convolution makes of an identity. `Dense` is an array. Nothing outside this file knows which is
which. Coefficients of one pass have one `index`: row r starts at the same entry in all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np

from jaxbound import regions
from jaxbound.graph import Op, primitives
from jaxbound.graph.values import plain
from jaxbound.relaxations import affine, windows
from jaxbound.relaxations.planes import by_sign, times
from jaxbound.relaxations.windows import Windowed


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Identity:
    """Row r is `weight[r]` times entry `index[r]` of the flattened value; a weight of 0 makes an empty row."""

    index: jax.Array
    weight: jax.Array
    shape: tuple[int, ...] = field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Dense:
    """An array of shape (rows, *value shape)."""

    values: jax.Array


Coefficients = Identity | Windowed | Dense


def dense(coefficients: Coefficients) -> jax.Array:
    """The coefficients as an array, rows first."""
    if isinstance(coefficients, Dense):
        return coefficients.values
    if isinstance(coefficients, Windowed):
        return windows.whole(coefficients).values
    size = int(np.prod(coefficients.shape))
    hot = coefficients.index[:, None] == jnp.arange(size, dtype=coefficients.index.dtype)
    rows = jnp.where(hot, coefficients.weight[:, None], 0).astype(coefficients.weight.dtype)
    return rows.reshape(-1, *coefficients.shape)


def add(first: Coefficients, second: Coefficients) -> Coefficients:
    """The sum of two sets of rows of one pass on one value."""
    if isinstance(first, Identity) and isinstance(second, Identity):
        return replace(first, weight=first.weight + second.weight)
    found = None
    if not isinstance(first, Dense) and not isinstance(second, Dense):
        found = windows.add(_windowed(first), _windowed(second))
    return Dense(dense(first) + dense(second)) if found is None else _simplest(found)


def pull(op: Op, coefficients: Coefficients, constants: Sequence) -> Sequence[Coefficients]:
    """Coefficients of an affine node's inputs; wider ones than the node's own meet its constants in their precision."""
    dtype = _held(coefficients).dtype
    if dtype != op.dtype and jnp.promote_types(dtype, op.dtype) == dtype:
        constants = [plain(c).astype(dtype) if jnp.issubdtype(plain(c).dtype, jnp.floating) else c for c in constants]
    found = None
    if not isinstance(coefficients, Dense) and coefficients.shape:
        found = _pull_few(op, coefficients, constants)
    return [Dense(rows) for rows in affine.pull(op, dense(coefficients), constants)] if found is None else found


def scale(coefficients: Coefficients, low: jax.Array, high: jax.Array) -> Coefficients:
    """Positive coefficients times `low`, negative ones times `high`, which may have rows of their own.

    Both have the value's shape; further axes among those of an array repeat its coefficients.
    """
    held = _held(coefficients)
    values = held * by_sign(held, _seen(coefficients, low), _seen(coefficients, high))
    name = "weight" if isinstance(coefficients, Identity) else "values"
    return replace(coefficients, **{name: values})


def total(coefficients: Coefficients, low: jax.Array, high: jax.Array) -> jax.Array:
    """Per row, the sum of positive coefficients times `low` and negative ones times `high`.

    These may have rows of their own. A coefficient of zero ignores an infinite value.
    """
    held = _held(coefficients)
    return _sum(times(held, by_sign(held, _seen(coefficients, low), _seen(coefficients, high))))


def dot(coefficients: Coefficients, values: jax.Array) -> jax.Array:
    """Per row, the sum of coefficients times finite values of the value's own shape."""
    if isinstance(coefficients, Dense):
        return jnp.tensordot(coefficients.values, values, values.ndim, precision=jax.lax.Precision.HIGHEST)
    return _sum(_held(coefficients) * _seen(coefficients, values))


def size(coefficients: Coefficients, values: jax.Array) -> jax.Array:
    """Per row, the sum of absolute coefficients times values; a coefficient of zero ignores an infinite one."""
    return _sum(times(jnp.abs(_held(coefficients)), _seen(coefficients, values)))


def charge(coefficients: Coefficients, values: jax.Array) -> jax.Array:
    """The same with coefficients enlarged: what the error of products with them is charged on (see `affine`).

    Where a window ends and what an identity leaves out is exactly zero.
    """
    return _sum(times(affine.enlarged(_held(coefficients)), _seen(coefficients, values)))


def minimum(coefficients: Coefficients, region: regions.Region) -> jax.Array:
    """Per row, the least value over a region."""
    if isinstance(coefficients, Dense) or not regions.is_box(region):
        return regions.minimum(region, dense(coefficients))
    low, high = (_seen(coefficients, end) for end in regions.enclosing_box(region))
    held = _held(coefficients)
    seen = regions.Box(jnp.broadcast_to(low, held.shape), jnp.broadcast_to(high, held.shape))
    return jax.vmap(regions.minimum)(seen, held)


def expand(coefficients: Coefficients, axes: Sequence[int]) -> Coefficients:
    """With new axes of length 1, counted from the last, for a node that reduces over them."""
    return Dense(jnp.expand_dims(dense(coefficients), axes)) if axes else coefficients


# --- representations --------------------------------------------------------------------------------------------------


def _held(coefficients: Coefficients) -> jax.Array:
    """The numbers that a representation holds, rows first."""
    return coefficients.weight if isinstance(coefficients, Identity) else coefficients.values


def _seen(coefficients: Coefficients, values: jax.Array) -> jax.Array:
    """The entries of some values that belong to the numbers held, to multiply with them."""
    if isinstance(coefficients, Windowed):
        return windows.cut(coefficients, values)
    if isinstance(coefficients, Dense):
        return values
    rank = len(coefficients.shape)
    values = jnp.broadcast_to(values, values.shape[: values.ndim - rank] + coefficients.shape)
    if values.ndim > rank:
        flat = values.reshape(values.shape[0], -1)
        return jnp.take_along_axis(flat, coefficients.index[:, None], axis=1, mode="clip")[:, 0]
    return jnp.take(values.reshape(-1), coefficients.index, mode="clip")


def _sum(products: jax.Array) -> jax.Array:
    return jnp.sum(products, axis=tuple(range(1, products.ndim)))


def _windowed(coefficients: Identity | Windowed) -> Windowed:
    if isinstance(coefficients, Windowed):
        return coefficients
    return windows.of_entries(coefficients.index, coefficients.weight, coefficients.shape)


def _simplest(rows: Windowed) -> Coefficients:
    return rows if rows.axes else Dense(rows.values)


def _pull_few(op: Op, coefficients: Identity | Windowed, constants: Sequence) -> Sequence[Coefficients] | None:
    """What `pull` finds without an array of all coefficients; None if it cannot."""
    shapes = [op.input_shapes[k] for k, operand in enumerate(op.operands) if operand[0] == "input"]
    if op.keeps_order:
        reshaped = [_reshape(coefficients, shape) for shape in shapes]
        found = [part for part in reshaped if part is not None]
        return found if len(found) == len(reshaped) else None
    if op.name in primitives.ELEMENTWISE and all(shape == op.shape for shape in shapes):
        factors = [_factor(op, k, len(shapes), constants) for k in range(len(shapes))]
        return [scale(coefficients, factor, factor) for factor in factors]
    if isinstance(coefficients, Identity) and is_dense_layer(op):
        kernel = plain(constants[op.operands[1][1]])
        columns = jnp.take(kernel, coefficients.index, axis=1, mode="clip").T
        rows = jnp.where(coefficients.weight[:, None] == 0, 0, columns * coefficients.weight[:, None])
        return [Dense(rows.reshape(-1, *op.input_shapes[0]))]
    found = windows.pull(op, _windowed(coefficients), constants)
    return None if found is None else [_simplest(part) for part in found]


def _reshape(coefficients: Identity | Windowed, shape: tuple[int, ...]) -> Identity | Windowed | None:
    return (
        replace(coefficients, shape=shape)
        if isinstance(coefficients, Identity)
        else windows.reshape(coefficients, shape)
    )


def _factor(op: Op, position: int, count: int, constants: Sequence) -> jax.Array:
    """What an operation on entries multiplies one of its inputs by."""
    ones = [jnp.full(op.shape, k == position, op.dtype) for k in range(count)]
    return affine.linear(op, ones, constants)


def is_dense_layer(op: Op) -> bool:
    """One vector times a constant matrix, (in,) or (1, in) by (in, out)."""
    if op.name != "dot_general" or op.operands[0][0] != "input" or op.operands[1][0] != "constant":
        return False
    vector, matrix = op.input_shapes
    contracting, batching = dict(op.params)["dimension_numbers"]
    plain = tuple(contracting[1]) == (0,) and tuple(contracting[0]) == (len(vector) - 1,) and not batching[0]
    return plain and len(matrix) == 2 and int(np.prod(vector[:-1])) == 1
