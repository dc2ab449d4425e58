"""Operations that JAX has no primitive for: rewrites are written with them, and enclosures relax them as a whole."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxbound._compat import Primitive, ShapedArray, run_as


def select(indicator: jax.Array, no: jax.Array, yes: jax.Array) -> jax.Array:
    """`no` where the indicator is 0, `yes` where it is 1, and what lies between where it does; all of one shape."""
    return _select.bind(indicator, no, yes)


def meet(*expressions: jax.Array) -> jax.Array:
    """Several expressions of one value: equal as real numbers, each bounded in its own way."""
    return _meet.bind(*expressions)


def logsumexp(x: jax.Array, axes: tuple[int, ...], mask: jax.Array | None = None) -> jax.Array:
    """`log(sum(exp(x)))` over the axes; of the entries where a fixed mask is true."""
    return _logsumexp.bind(*((x,) if mask is None else (x, mask)), axes=axes)


def in_order_of(keys: jax.Array, values: jax.Array) -> jax.Array:
    """Values sorted by keys, of which nothing is known: which one stands where depends on the region."""
    return _in_order_of.bind(keys, values)


def known_up_to(value: jax.Array, error: jax.Array) -> jax.Array:
    """A constant that stands for real numbers at most `error` away, which counts where rounding does."""
    return _known_up_to.bind(value, error)


def is_defined(x: jax.Array) -> jax.Array:
    """Whether a value is a real number, of which nothing is known."""
    return _is_defined.bind(x)


def pairwise(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`x_j - x_i` over the last axis in row i and column j, and where j = i (there interval arithmetic is not 0)."""
    count = x.shape[-1]
    columns = jax.lax.broadcast_in_dim(x, (*x.shape, count), (*range(x.ndim - 1), x.ndim))
    rows = jax.lax.broadcast_in_dim(x, (*x.shape, count), tuple(range(x.ndim)))
    return columns - rows, jnp.broadcast_to(jnp.eye(count, dtype=bool), columns.shape)


def over_last_axis(function: Callable, *arrays: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """A function of arrays of one shape that acts along their last axis, applied over some of their axes."""
    moved = [jnp.moveaxis(x, axes, range(-len(axes), 0)) for x in arrays]
    shape = moved[0].shape
    result = function(*(x.reshape(*shape[: len(shape) - len(axes)], -1) for x in moved))
    return jnp.moveaxis(result.reshape(shape), range(-len(axes), 0), axes)


def between(x: jax.Array | float, chosen: jax.Array, no: jax.Array | float, yes: jax.Array | float) -> jax.Array:
    """`no x` where a choice between 0 and x fell on 0, else `yes x`; what `yes - no` rounds away is added back."""
    rise = yes - no
    part = rise - yes
    rest = (yes - (rise - part)) - (no + part)  # Knuth's error-free difference
    return no * x + rise * chosen + rest * chosen


_select, _meet, _logsumexp = map(Primitive, ("select", "meet", "logsumexp"))
_in_order_of, _is_defined, _known_up_to = map(Primitive, ("in_order_of", "is_defined", "known_up_to"))
wrapped = Primitive("whole_number_arithmetic")
"""Arithmetic on integers by `primitive` with `params` that may not be that on real numbers."""

_select.def_impl(lambda indicator, no, yes: no + indicator * (yes - no))
_select.def_abstract_eval(lambda indicator, no, yes: ShapedArray(no.shape, no.dtype))
_meet.def_impl(lambda *expressions: expressions[0])
_meet.def_abstract_eval(lambda first, *_: ShapedArray(first.shape, first.dtype))
_logsumexp.def_impl(lambda x, *mask, axes: jnp.log(jnp.sum(jnp.exp(x), axes, where=mask[0] if mask else None)))
_logsumexp.def_abstract_eval(lambda x, *_, axes: ShapedArray(tuple(np.delete(x.shape, axes)), x.dtype))
_in_order_of.def_impl(lambda keys, values: values)
_in_order_of.def_abstract_eval(lambda keys, values: ShapedArray(values.shape, values.dtype))
run_as(_known_up_to, lambda value, error: value)
_known_up_to.def_abstract_eval(lambda value, error: ShapedArray(value.shape, value.dtype))
_is_defined.def_impl(jnp.isfinite)
_is_defined.def_abstract_eval(lambda x: ShapedArray(x.shape, np.dtype(bool)))
