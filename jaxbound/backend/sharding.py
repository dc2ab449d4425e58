"""Bounds of arrays that are spread over devices as JAX writes it today: `shard_map` and meshes with explicit axes.

Both give every array a type that says how it is spread, and refuse operations on arrays of different types, so that a
user writes each change of it. What jaxbound computes between its arguments and its results has one spread, that of the
batch, and none of its steps talks to another device. So the types are left behind at its doors:

* under `shard_map` all arguments are made to vary as the most varied one does, the types are not checked inside, and
  results vary so again. Derivatives pass the same doors: where a replicated parameter was made to vary, its gradients
  are added up over the devices, as JAX does it.
* with explicit axes the computation runs with automatic ones, and results are spread as the batch is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxbound import _compat

F = TypeVar("F", bound=Callable)


def anywhere(function: F) -> F:
    """A function of arrays and static things that also runs under `shard_map` and on explicitly sharded arrays.

    Its results have the batch as their first axis, which is also that of its argument `x` (the second one).

    >>> anywhere(lambda params, x: params * x)(2.0, jnp.ones(2))
    Array([2., 2.], dtype=float32)
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any):
        leaves, tree = jax.tree.flatten((args, kwargs))
        places = [k for k, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)]
        arrays = [leaves[k] for k in places]
        varied = frozenset().union(*map(_compat.varying_axes, arrays))
        mesh = next((mesh for mesh in map(_explicit_mesh, arrays) if mesh is not None), None)
        if not varied and mesh is None:
            return function(*args, **kwargs)

        def run(*given: Any) -> Any:
            whole = list(leaves)
            for k, array in zip(places, given, strict=True):
                whole[k] = array
            again, named = jax.tree.unflatten(tree, whole)
            return function(*again, **named)

        if varied:
            return _unchecked(run, arrays, varied)
        x = kwargs.get("x", args[1] if len(args) > 1 else None)
        spread = next((spec[0] for spec in map(_spec, jax.tree.leaves(x)) if spec), None)
        if mesh is not None and _compat.is_tracing():
            return jax.sharding.auto_axes(run, out_sharding=NamedSharding(mesh, PartitionSpec(spread)))(*arrays)
        return run(*map(_with_automatic_axes, arrays))

    return call  # pyright: ignore[reportReturnType]


# --- shard_map --------------------------------------------------------------------------------------------------------


def _unchecked(run: Callable, arrays: Sequence[jax.Array], varied: frozenset) -> Any:
    arrays = [_varying(array, varied) for array in arrays]
    floats = [k for k, array in enumerate(arrays) if jnp.issubdtype(array.dtype, jnp.inexact)]

    def of_floats(*values: jax.Array):
        given = list(arrays)
        for k, value in zip(floats, values, strict=True):
            given[k] = value
        return run(*given)

    def outside(values: Any):
        return jax.tree.map(lambda leaf: _varying(leaf, varied), values)

    @jax.custom_vjp
    def value(*values: jax.Array):
        with _compat.unchecked_types():
            found = of_floats(*map(_untyped, values))
        return outside(found)

    def forward(*values: jax.Array):
        with _compat.unchecked_types():
            found, back = jax.vjp(of_floats, *map(_untyped, values))
        return outside(found), back

    def backward(back: Callable, cotangents: Any):
        with _compat.unchecked_types():
            found = back(jax.tree.map(_untyped, cotangents))
        return outside(found)

    value.defvjp(forward, backward)
    return value(*[arrays[k] for k in floats])


def _untyped(array: jax.Array) -> jax.Array:
    """The same numbers; where types are not checked, any operation forgets them."""
    return jnp.squeeze(jnp.expand_dims(array, 0), 0) if array.dtype != jax.dtypes.float0 else array


def _varying(array: jax.Array, axes: frozenset) -> jax.Array:
    missing = tuple(sorted(axes - _compat.varying_axes(array)))
    return jax.lax.pcast(array, missing, to="varying") if missing else array


# --- explicit axes ----------------------------------------------------------------------------------------------------


def _explicit_mesh(array: jax.Array):
    """The mesh over whose explicit axes an array may be spread, or None."""
    mesh = getattr(jax.typeof(array).sharding, "mesh", None)
    return mesh if mesh is not None and AxisType.Explicit in mesh.axis_types else None


def _spec(array: Any) -> tuple:
    return tuple(getattr(getattr(jax.typeof(array), "sharding", None), "spec", ()))


def _with_automatic_axes(array: jax.Array) -> jax.Array:
    if not isinstance(array.sharding, NamedSharding):
        return array
    mesh: Any = array.sharding.mesh
    automatic = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))
    return jax.device_put(array, NamedSharding(automatic, array.sharding.spec))
