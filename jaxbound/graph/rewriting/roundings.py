"""What rounds to whole numbers, in terms of `floor`: truncation, remainders by constants, casts to integers and back.

    trunc(x)      floor(relu(x)) - floor(relu(-x)), which rises with x
    mod(x, y)     x - y floor(x / y), between 0 and y
    rem(x, y)     r(relu(x)) - r(relu(-x)) with r(u) = u - |y| floor(u / |y|), between 0 and |y|

A cast of a real number to an integer is a truncation where the number fits: what lies beyond is not defined (compilers
differ) and has no bounds. For integers of 32 bits and more that begins at 2^30 already, so that what is computed with
such integers afterwards hardly ever leaves the range of its dtype (`integers`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxbound.graph import operations
from jaxbound.graph.rewriting import integers
from jaxbound.graph.values import Literal, Value, made_by

Rewrite = tuple[Callable, Sequence]

_WHOLE = ("ceil", "floor", "round")
_KEEPS_WHOLE = ("add", "broadcast_in_dim", "clamp", "copy", "max", "min", "neg", "reshape", "stop_gradient", "sub")


def truncated(x: jax.Array):
    """The whole number next to x towards 0."""
    return jnp.floor(jax.nn.relu(x)) - jnp.floor(jax.nn.relu(-x))


def remainder(x: jax.Array, y: jax.Array):
    """`jnp.mod`: of the sign of y."""
    return _cut(x - y * jnp.floor(x / y), jnp.minimum(y, 0), jnp.maximum(y, 0))


def _cut(value: jax.Array, low: ArrayLike, high: ArrayLike):
    """A value that is known to lie between two numbers."""
    return operations.meet(value, jnp.clip(value, low, high))


def truncated_remainder(_params: dict, operands: Sequence) -> Rewrite | None:
    """`lax.rem` by a constant: of the sign of x."""
    x, y = operands
    is_zero = isinstance(y, Literal) and y.value == 0
    if isinstance(y, Value) or is_zero or not jnp.issubdtype(x.dtype, jnp.floating):
        return None

    def function(x: jax.Array, y: jax.Array):
        y = jnp.broadcast_to(jnp.abs(y), x.shape)
        return remainder(jax.nn.relu(x), y) - remainder(jax.nn.relu(-x), y)

    return function, operands


def cast(x: Value, whole: np.dtype, dtype: np.dtype) -> Rewrite:
    """A real number converted to an integer dtype and then to a floating-point one."""
    fits = integers.fits_for_certain(x, whole)
    low, high = integers.range_of_cast(whole)
    rounded = _is_whole(x)

    def function(x: jax.Array):
        value = (x if rounded else truncated(x)).astype(dtype)
        for inside in () if fits else (x > low - 1, x < high + 1):
            value = jnp.where(inside, value, jnp.nan)
        return value

    return function, [x]


def _is_whole(operand: Any) -> bool:
    """Whether a real number is a whole one: rounded, and cut to whole numbers."""
    if isinstance(operand, Literal):
        return bool(operand.value == np.floor(operand.value))
    return made_by(operand, *_WHOLE) is not None or (
        made_by(operand, *_KEEPS_WHOLE) is not None and all(map(_is_whole, operand.operands))
    )
