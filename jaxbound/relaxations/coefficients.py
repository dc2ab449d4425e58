"""The linear coefficients that a backward pass carries, one interface with several representations.

Coefficients are R linear functions ("rows") of one value. They are used through

* `dense(c)`                  the array, rows first, then the value's own shape;
* `pull(op, c, constants)`    coefficients of an affine node's inputs;
* `add(c, d)`                 the sum, where a value is read twice;
* `split(c)`                  the positive and negative parts, for a relaxation's lower and upper lines.

`Identity` is where a pass starts: row r is plus or minus entry `index[r]` of the value. Operations that keep the order
of entries keep it, and a Dense layer's kernel turns it into its own columns without a product. `Dense` is an array. A
windowed representation for convolutions fits behind the same functions; nothing outside this file knows which is which.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from jaxbound.graph import Op
from jaxbound.relaxations import affine


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Identity:
    """Row r is `sign[r]` times entry `index[r]` of the flattened value; a sign of 0 makes an empty row."""

    index: jax.Array
    sign: jax.Array
    shape: tuple[int, ...] = field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Dense:
    """An array of shape (rows, *value shape)."""

    values: jax.Array


Coefficients = Identity | Dense


def both_sides(shape: tuple[int, ...], dtype) -> Identity:
    """Plus every entry, then minus every entry: the rows whose lower bounds bound a value on both sides."""
    size = int(np.prod(shape))
    index = np.arange(size, dtype=np.int32)
    sign = np.repeat(np.array([1, -1], dtype), size)
    return Identity(jnp.asarray(np.tile(index, 2)), jnp.asarray(sign), shape)


def dense(coefficients: Coefficients) -> jax.Array:
    """The coefficients as an array, rows first."""
    if isinstance(coefficients, Dense):
        return coefficients.values
    size = int(np.prod(coefficients.shape))
    hot = coefficients.index[:, None] == jnp.arange(size, dtype=coefficients.index.dtype)
    rows = jnp.where(hot, coefficients.sign[:, None], 0).astype(coefficients.sign.dtype)
    return rows.reshape(-1, *coefficients.shape)


def add(first: Coefficients, second: Coefficients) -> Coefficients:
    """The sum of two sets of rows on one value."""
    return Dense(dense(first) + dense(second))


def pull(op: Op, coefficients: Coefficients, constants: Sequence) -> list[Coefficients]:
    """Coefficients of an affine node's inputs."""
    if isinstance(coefficients, Identity):
        if op.facts.order_preserving:
            shapes = [op.input_shapes[i] for i, operand in enumerate(op.operands) if operand[0] == "input"]
            return [Identity(coefficients.index, coefficients.sign, shape) for shape in shapes]
        if _is_dense_layer(op):
            kernel = constants[op.operands[1][1]]
            columns = jnp.take(kernel, coefficients.index, axis=1, mode="clip").T
            rows = jnp.where(coefficients.sign[:, None] == 0, 0, columns * coefficients.sign[:, None])
            return [Dense(rows.reshape(-1, *op.input_shapes[0]))]
    return [Dense(rows) for rows in affine.pull(op, dense(coefficients), constants)]


def split(coefficients: Coefficients) -> tuple[jax.Array, jax.Array]:
    """The positive and the negative part."""
    values = dense(coefficients)
    return jnp.maximum(values, 0), jnp.minimum(values, 0)


def _is_dense_layer(op: Op) -> bool:
    """One vector times a constant matrix, (in,) or (1, in) by (in, out)."""
    if op.name != "dot_general" or op.operands[0][0] != "input" or op.operands[1][0] != "constant":
        return False
    vector, matrix = op.input_shapes
    contracting, batching = dict(op.params)["dimension_numbers"]
    plain = tuple(contracting[1]) == (0,) and tuple(contracting[0]) == (len(vector) - 1,) and not batching[0]
    return plain and len(matrix) == 2 and int(np.prod(vector[:-1])) == 1
