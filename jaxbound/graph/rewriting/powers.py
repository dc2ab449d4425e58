"""Powers whose exponent is not one number: `x ** p` with an array p, or with a p that a region reaches.

An array that is known while the function is read holds few different numbers, and each makes `x ** number`, which is
one scalar function, defined wherever that is. Anything else is `exp(p log(x))`, which is defined for x > 0 alone; where
x may be 0 or negative it has no bounds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxbound.graph.values import Literal, Value

Rewrite = tuple[Callable, Sequence]

_MOST = 16
"""Different exponents of one array, each of which is a node."""
_WHOLE = 64
"""Exponents up to which a whole number is raised to by multiplication."""


def by_known_array(_params: dict, operands: Sequence) -> Rewrite | None:
    """A power with an array of few numbers as its exponent: a choice, entry by entry, among powers."""
    x, p = operands
    known = getattr(p, "known", None)
    if known is None or not isinstance(x, Value) or not np.all(np.isfinite(known)):
        return None
    first, *others = np.unique(known)
    if len(others) >= _MOST:
        return None

    def function(x: jax.Array):
        value = _power(x, first)
        for number in others:
            value = jnp.where(known == number, _power(x, number), value)
        return value

    return function, [x]


def _power(x: jax.Array, number: float):
    if number == int(number) and abs(number) <= _WHOLE:
        return jax.lax.integer_pow(x, int(number))
    return jax.lax.pow(x, jnp.asarray(number, x.dtype))


def by_logarithm(_params: dict, operands: Sequence) -> Rewrite | None:
    """A power as the exponential of a product; a fixed base that is not above 0 has no bounds."""
    x = operands[0]
    if isinstance(x, Literal) and not x.value > 0:
        return None
    dtype, is_fixed = x.dtype, not isinstance(x, Value)

    def function(x: jax.Array, p: jax.Array):
        base = jnp.where(x > 0, x, jnp.nan) if is_fixed else x
        return jnp.exp(p.astype(dtype) * jnp.log(base))

    return function, operands
