"""Rewrites of gathers and scatters: what happens out of bounds, and entries that are overwritten or multiplied.

As in `rewrites`, each gives a plain JAX function that equals the primitive for every real input.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from jaxbound.graph.values import Value

Rewrite = tuple[Callable, Sequence]

_Mode = jax.lax.GatherScatterMode


def gather(params: dict, operands: Sequence) -> Rewrite | None:
    """What is out of bounds is filled with a constant: gathering with zeros there is linear, and the constant adds.

    Indices that are promised to be in bounds are cut to them, as XLA does where the promise is broken: JAX's transpose
    drops what is not.
    """
    indices = operands[1]
    if params["mode"] == _Mode.PROMISE_IN_BOUNDS:
        return functools.partial(jax.lax.gather, **{**params, "mode": _Mode.CLIP}), operands
    if params["mode"] != _Mode.FILL_OR_DROP or params["fill_value"] == 0 or isinstance(indices, Value):
        return None
    gather = functools.partial(jax.lax.gather, **{k: v for k, v in params.items() if k != "fill_value"})

    def function(x: jax.Array, indices: jax.Array):
        filled = gather(jnp.zeros(x.shape, x.dtype), indices, fill_value=params["fill_value"])
        return gather(x, indices, fill_value=0) + filled

    return function, operands


def scatter_add(params: dict, operands: Sequence) -> Rewrite | None:
    """Indices promised to be in bounds are dropped where they are not, as in XLA; JAX's transpose cuts them."""
    if params["mode"] != _Mode.PROMISE_IN_BOUNDS:
        return None
    options = {k: params[k] for k in ("dimension_numbers", "indices_are_sorted", "unique_indices")}
    return functools.partial(jax.lax.scatter_add, **options, mode=_Mode.FILL_OR_DROP), operands


def scatter(params: dict, operands: Sequence) -> Rewrite | None:
    """Entries overwritten at known places: a choice between what was there and what is put there.

    Of several for one place the last one counts, as on CPU; JAX leaves open which.
    """
    if isinstance(operands[1], Value) or params["update_jaxpr"] is not None:
        return None
    options = {k: params[k] for k in ("dimension_numbers", "indices_are_sorted", "unique_indices", "mode")}

    def function(x: jax.Array, indices: jax.Array, updates: jax.Array):
        numbers = 1 + jnp.arange(updates.size).reshape(updates.shape)
        place = jax.lax.scatter_max(jnp.zeros(x.shape, numbers.dtype), indices, numbers, **options)
        return jnp.where(place > 0, jnp.take(updates.ravel(), jnp.maximum(place - 1, 0), mode="clip"), x)

    return function, operands


def scatter_multiply(params: dict, operands: Sequence) -> Rewrite | None:
    """Entries multiplied by constants at known places."""
    if isinstance(operands[1], Value) or isinstance(operands[2], Value):
        return None
    options = {k: params[k] for k in ("dimension_numbers", "indices_are_sorted", "unique_indices", "mode")}
    return lambda x, *where: x * jax.lax.scatter_mul(jnp.ones(x.shape, x.dtype), *where, **options), operands
