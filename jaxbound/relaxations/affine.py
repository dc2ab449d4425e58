"""The one affine rule: everything the interpreters do with an affine node.

A node computes `z = L(x_1, ..., x_m) + b` with L linear, by binding one JAX primitive. From the primitive's facts:

* `linear`    the bind with zeros for the constants that add: L alone (`jax.linear_transpose` of an affine map would
              silently drop b, so it only ever sees this);
* `offset`    the bind at zero: b;
* `interval`  where L only moves and adds entries, the ends go through the bind itself; where constants scale, midpoint
              and radius do, the radius through `|L|`, the bind with the constants' absolute values;
* `pull`      `jax.linear_transpose`, vmapped over the rows of coefficients (or a faster form of it);
* `rounding`  `gamma_n (|L| |x| + |b|)`: a bound on the error of evaluating the node in floating point whatever the
              order of its sums (Higham, "Accuracy and stability of numerical algorithms", 2002, section 3.1).

Higham's gamma_n is `n u / (1 - n u)`; here it is `n u / (1 - 2 n u)`, since the magnitudes that it multiplies are sums
of as many computed terms, which may be too small by gamma_n of themselves.

Underflow. A computed product is `x y (1 + delta) + eta`. With t the smallest normal number, |eta| <= t where the result
underflows, gradually or to zero, and |eta| <= t |x| where a subnormal y is taken for zero. So that every charge
`gamma |x| |y|` has its eta, both factors are enlarged by h = sqrt(8 t / u), 1.3e-15 in float32 (`enlarged`):

    gamma (|x| + h) (|y| + h)  >=  gamma |x| |y| + 8 t (1 + |x| + |y|)      since gamma >= u and u h >= u h^2 = 8 t.

A factor that is exactly zero makes no error, and stays zero, since an infinite one may meet it.

Constants that were computed are not exact (`values.Inexact`): what their errors do to the value is added
(`inexactness`).

An infinite end may make NaN in midpoint-radius arithmetic (`0 * inf`); `interval.certain` makes it an infinite end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxbound._compat import bind
from jaxbound.graph import Op
from jaxbound.graph.values import Inexact, plain
from jaxbound.relaxations import convolutions, matrices

Ends = tuple[jax.Array, jax.Array]


def gamma(terms: int, dtype: DTypeLike) -> float:
    """The error of n rounded operations in a row, relative to magnitudes that took as many."""
    error = terms * float(jnp.finfo(dtype).eps) / 2
    return error / (1 - 2 * error) if error < 1 / 2 else float("inf")


def enlargement(dtype: DTypeLike) -> float:
    """What makes room for underflow in the factors of a charged product; the module's head says why."""
    limits = jnp.finfo(dtype)
    return math.sqrt(16 * float(limits.tiny) / float(limits.eps))


def enlarged(factor: jax.Array) -> jax.Array:
    """The magnitude of a factor with room for underflow; one that is exactly zero makes no error."""
    return jnp.where(factor == 0, 0, jnp.abs(factor) + enlargement(factor.dtype))


def apply(op: Op, inputs: Sequence, constants: Sequence):
    """The node's value."""
    return _bind(op, inputs, constants)


def linear(op: Op, inputs: Sequence, constants: Sequence):
    """The node's linear part at `inputs`."""
    return _bind(op, inputs, constants, additive=jnp.zeros_like)


def absolute(op: Op, inputs: Sequence, constants: Sequence):
    """`|L|` applied to nonnegative inputs."""
    signed = [x if sign > 0 else -x for x, sign in zip(inputs, _signs(op), strict=True)]
    return _bind(op, signed, constants, additive=jnp.zeros_like, scale=jnp.abs)


def offset(op: Op, constants: Sequence) -> jax.Array | None:
    """`b`, or None where the node adds no constant."""
    if not adds(op):
        return None
    zeros = [jnp.zeros(op.input_shapes[i], op.dtype) for i, role in enumerate(_roles(op)) if role == "input"]
    return _bind(op, zeros, constants)


def adds(op: Op) -> bool:
    """Whether a constant adds to the node's value."""
    return op.facts.additive and any(role != "input" and i not in op.facts.fixed for i, role in enumerate(_roles(op)))


def interval(op: Op, inputs: Sequence[Ends], constants: Sequence) -> Ends:
    """Bounds of the node's value from bounds of its inputs."""
    if not op.facts.scales:
        return apply(op, _ends(op, inputs, 0), constants), apply(op, _ends(op, inputs, 1), constants)
    middle, radius = zip(*map(_middle_radius, inputs), strict=True)
    center, spread = apply(op, middle, constants), absolute(op, radius, constants)
    return center - spread, center + spread


def interval_functions(op: Op, inputs: Sequence[Ends], constants: Sequence) -> Ends:
    """The same for pairs of functions' values, which need not be ordered."""
    low, high = interval_slopes(op, inputs, constants)
    shift = offset(op, constants)
    return (low, high) if shift is None else (low + shift, high + shift)


def interval_slopes(op: Op, inputs: Sequence[Ends], constants: Sequence) -> Ends:
    """The linear part alone, for pairs of coefficients of a lower and an upper function."""
    if not op.facts.scales:
        return linear(op, _ends(op, inputs, 0), constants), linear(op, _ends(op, inputs, 1), constants)
    center = linear(op, [(low + high) / 2 for low, high in inputs], constants)
    spread = _bind(op, [(high - low) / 2 for low, high in inputs], constants, scale=jnp.abs)
    return center - spread, center + spread


_FASTER = {"conv_general_dilated": convolutions.transpose, "dot_general": matrices.transpose}
"""Primitive name -> its transpose with one constant, or None, where there is a faster form than `linear_transpose`."""


def pull(op: Op, rows: jax.Array, constants: Sequence) -> list[jax.Array]:
    """Coefficients of the inputs from coefficients of the value; the leading axis holds the rows."""
    shapes = [shape for shape, role in zip(op.input_shapes, _roles(op), strict=True) if role == "input"]
    if op.keeps_order:
        return [rows.reshape(rows.shape[:1] + shape) for shape in shapes]
    if _roles(op) == ["input", "constant"] and op.name in _FASTER:
        found = _FASTER[op.name](op.input_shapes, dict(op.params), rows, plain(constants[op.operands[1][1]]))
        if found is not None:
            return [found]
    avals = [jax.ShapeDtypeStruct(shape, rows.dtype) for shape in shapes]
    transpose = jax.linear_transpose(lambda *inputs: linear(op, inputs, constants), *avals)
    return list(jax.vmap(transpose)(rows))


def rounding(op: Op, magnitudes: Sequence[jax.Array], constants: Sequence) -> jax.Array | None:
    """A bound on the error of evaluating the node at inputs of at most these magnitudes; None if it makes none."""
    count, carried = terms(op), inexactness(op, magnitudes, constants)
    if count == 0:
        return carried
    size = reach(op, magnitudes, constants) + enlargement(op.dtype)
    shift = offset(op, constants)
    own = gamma(count + 3, op.dtype) * (size if shift is None else size + jnp.abs(shift))
    return own if carried is None else own + carried


def inexactness(op: Op, magnitudes: Sequence[jax.Array], constants: Sequence) -> jax.Array | None:
    """How far constants that are not exact may move the value at such inputs; None if all are."""
    if not any(isinstance(constant, Inexact) for constant in constants):
        return None
    room = enlargement(op.dtype)
    if op.facts.scales:
        signed = [(x + room) * sign for x, sign in zip(magnitudes, _signs(op), strict=True)]
        moved = _bind(op, signed, constants, scale=_divided_error if op.facts.divides else _error, whole=True)
    else:
        zeros = [jnp.zeros_like(x) for x in magnitudes]
        moved = _bind(op, zeros, constants, additive=_error, whole=True)
    return (1 + gamma(terms(op) + 4, op.dtype)) * jnp.abs(moved) + room * room


def _error(constant: Any) -> jax.Array:
    return constant.error if isinstance(constant, Inexact) else jnp.zeros_like(constant)


def _divided_error(constant: Any) -> jax.Array:
    """What to divide by instead: `1 / c - 1 / (c + e)` is at most `e / (|c| (|c| - e))`, and a bit more as computed."""
    if not isinstance(constant, Inexact):
        return jnp.full_like(constant, jnp.inf)
    size = jnp.abs(constant.value)
    return 0.99 * size * jnp.maximum(size - constant.error, 0) / constant.error


def reach(op: Op, magnitudes: Sequence[jax.Array], constants: Sequence) -> jax.Array:
    """`|L| |x|` with both factors enlarged: what the error of a product is charged on."""
    room = enlargement(op.dtype)
    return widened(op, [x + room for x in magnitudes], [plain(constant) for constant in constants])


def widened(op: Op, magnitudes: Sequence[jax.Array], constants: Sequence) -> jax.Array:
    """`|L| |x|` with the constant factors alone enlarged, which is linear.

    The error e of a factor that is not exact counts as e / u: charges are at least u times what they are made on.
    """
    room, unit = enlargement(op.dtype), float(jnp.finfo(op.dtype).eps) / 2
    signed = [x * sign for x, sign in zip(magnitudes, _signs(op), strict=True)]
    if op.facts.divides:  # the factor is the reciprocal
        found = absolute(op, signed, constants) + room * signed[0]
        if not any(isinstance(constant, Inexact) for constant in constants):
            return found
        return found + _bind(op, signed, constants, scale=_divided_error, whole=True) / unit
    scale = lambda c: jnp.abs(plain(c)) + room + _error(c) / unit  # noqa: E731
    return _bind(op, signed, constants, additive=jnp.zeros_like, scale=scale, whole=True)


def reads(op: Op, marks: Sequence[jax.Array], constants: Sequence) -> jax.Array:
    """The entries of the value that are computed from marked entries of its inputs, whatever the weights."""
    signed = [mask.astype(op.dtype) * sign for mask, sign in zip(marks, _signs(op), strict=True)]
    return _bind(op, signed, constants, additive=jnp.zeros_like, scale=jnp.ones_like) != 0


def moves(op: Op) -> bool:
    """Whether the node only moves or chooses entries: an infinite one is then itself, not an overflow."""
    return terms(op) == 0


def terms(op: Op) -> int:
    """How many rounded operations one entry of the value takes."""
    return op.facts.terms(op.input_shapes, op.shape, dict(op.params))


def copies(op: Op) -> int:
    """How many entries of the value may be made of one entry of an input; 0 for one of each."""
    return op.facts.adjoint_terms(op.input_shapes, op.shape, dict(op.params))


def pull_error(op: Op) -> float:
    """The relative error of one entry of the transposed product.

    Two more: a quotient may be a rounded factor, and in single precision GPUs round it in 1.2 units of the last place.
    """
    count = copies(op)
    return gamma(count + 2, op.dtype) if count else 0.0


def _roles(op: Op) -> list[str]:
    return [operand[0] for operand in op.operands]


def _signs(op: Op) -> list[int]:
    signs = op.facts.signs
    return [signs[min(i, len(signs) - 1)] for i, role in enumerate(_roles(op)) if role == "input"]


def _ends(op: Op, inputs: Sequence[Ends], side: int) -> list[jax.Array]:
    """The ends at which a sum of signed entries is least (side 0) or largest (side 1)."""
    return [ends[side if sign > 0 else 1 - side] for ends, sign in zip(inputs, _signs(op), strict=True)]


def _bind(
    op: Op,
    inputs: Sequence,
    constants: Sequence,
    additive: Callable = lambda c: c,
    scale: Callable = lambda c: c,
    *,
    whole: bool = False,
):
    values = []
    for position, operand in enumerate(op.operands):
        if operand[0] == "input":
            values.append(inputs[operand[1]])
            continue
        value = constants[operand[1]] if operand[0] == "constant" else np.broadcast_to(operand[1], operand[2])
        value = value if whole else plain(value)
        if op.facts.scales:
            value = scale(value)
        elif op.facts.additive and position not in op.facts.fixed:
            value = additive(value)
        values.append(plain(value))
    return _bound(op, values)


def _bound(op: Op, values: list) -> jax.Array:
    """The primitive of values, literals and result in the precision of what is wider than the node's own."""
    params, dtype = dict(op.params), jnp.result_type(*(v for v in values if jnp.issubdtype(v.dtype, jnp.floating)))
    if dtype != op.dtype and op.name != "convert_element_type":
        values = [v.astype(dtype) if jnp.issubdtype(v.dtype, jnp.floating) else v for v in values]
        if params.get("preferred_element_type") is not None:
            params["preferred_element_type"] = dtype
    return bind(op.primitive, values, params)


def _middle_radius(ends: Ends) -> Ends:
    low, high = ends
    finite = jnp.isfinite(low) & jnp.isfinite(high)
    middle = jnp.where(finite, low / 2 + high / 2, 0)
    return middle, jnp.where(finite, jnp.maximum(high - middle, middle - low), jnp.inf)
