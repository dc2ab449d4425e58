"""Numbers moved outward: the one place where an end of a region is rounded, to its dtype and past subnormal numbers."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxbound._compat import owned


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def next_number(value: jax.Array, direction: int) -> jax.Array:
    """The next number up or down, with the identity's derivative (a step of `nextafter` has none)."""
    return _stepped(value, direction, jnp)


next_number.defjvp(lambda direction, primals, tangents: (next_number(*primals, direction), *tangents))


def _stepped(value: jax.Array | np.ndarray, direction: int, xp: Any = np):
    """The next number up or down, by NumPy or by `jax.numpy`."""
    stepped = xp.nextafter(value, xp.asarray(direction * xp.inf, value.dtype))
    # XLA flushes subnormals to zero, so a step below the smallest normal number would be lost.
    tiny = jnp.finfo(value.dtype).tiny
    return xp.where(xp.abs(stepped) <= tiny, xp.asarray(direction * tiny, value.dtype), stepped)


def is_subnormal(value: jax.Array) -> jax.Array:
    """Whether a number is below the smallest normal one, but not 0; by its bits, since it may compare as 0."""
    kind = np.dtype(f"uint{8 * value.dtype.itemsize}")
    least = np.asarray(jnp.finfo(value.dtype).tiny, value.dtype).view(kind)
    sign = kind.type(1) << kind.type(8 * value.dtype.itemsize - 1)
    bits = jax.lax.bitcast_convert_type(jax.lax.stop_gradient(value), kind) & ~sign
    return (bits > 0) & (bits < least)


def without_subnormals(value: jax.Array, direction: int) -> jax.Array:
    """A subnormal number moved down (-1) or up (+1), to one that processors do not take for 0."""
    beyond = jnp.where(jnp.signbit(value) == (direction < 0), direction * jnp.finfo(value.dtype).tiny, 0)
    return jnp.where(is_subnormal(value), beyond.astype(value.dtype), value)


def cast_to(value: ArrayLike, dtype: np.dtype, direction: int) -> jax.Array:
    """`value` in `dtype`, rounded down (-1), up (+1) or to nearest (0)."""
    by_jax = isinstance(value, jax.Array)
    xp, step = (jnp, next_number) if by_jax else (np, _stepped)
    array: Any = xp.asarray(value)
    if array.dtype == dtype:
        return owned(array)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        narrow = array.astype(dtype)
        if direction == 0:
            return owned(narrow)
        back = _rounded(array, dtype) if by_jax else narrow.astype(array.dtype)
        wrong = back > array if direction < 0 else back < array
        return owned(xp.where(wrong, step(narrow, direction), narrow))


def _rounded(value: jax.Array, dtype: np.dtype) -> jax.Array:
    """What `dtype` makes of a wider value. (XLA for GPU takes a cast there and back for nothing.)"""
    if not jnp.issubdtype(value.dtype, jnp.floating) or jnp.finfo(value.dtype).nmant <= jnp.finfo(dtype).nmant:
        return value.astype(dtype).astype(value.dtype)
    limits = jnp.finfo(dtype)
    return jax.lax.reduce_precision(value, limits.nexp, limits.nmant)
