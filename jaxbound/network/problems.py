"""A network, the region around its inputs and a specification, as the problem that a method is asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxbound import _compat, errors, regions
from jaxbound.backend.caches import kept
from jaxbound.methods import Request
from jaxbound.network.functions import Specified
from jaxbound.network.resolving import Network
from jaxbound.regions import LpBall, Region, is_region
from jaxbound.transforms.problems import Problem, prepare

MEMORY_LIMIT = 1 << 30
"""Bytes that the coefficients of one backward pass may take by default."""


def example_of(network: Network, region: Region) -> jax.ShapeDtypeStruct:
    """One example of what a region stands for."""
    struct = regions.leaf_struct(region)
    return jax.ShapeDtypeStruct(struct.shape[1:] if network.batched else struct.shape, struct.dtype)


def region_around(params, x, eps, norm: float, clip, *, batched: bool) -> Region:
    """One ball per example, or the region that x already is.

    Raises:
        ArgumentError: x is an array and eps is missing, or x is a region and eps is given.
    """
    if is_region(x):
        given = [
            name
            for name, set_ in (("eps", eps is not None), ("norm", norm != np.inf), ("clip", clip is not None))
            if set_
        ]
        if given:
            raise errors.ArgumentError(f"x is a region already: leave {' and '.join(given)} out")
        regions.validate(x, "x")
        return regions.canonical(x)
    check_types(x, eps)
    if not isinstance(norm, int | float | np.number):
        raise errors.argument("norm", f"is {norm!r}", "pass a number p >= 1, such as 1, 2 or jnp.inf")
    if batched and np.shape(x)[:1] == (0,):
        raise errors.argument("x", "is a batch of no examples", "pass at least one")
    given = jnp.result_type(x)
    if not jnp.issubdtype(given, jnp.floating):
        raise errors.ArgumentTypeError(
            f"x has dtype {given}: integers have no neighbourhood; divide images by 255 first"
        )
    floats = [leaf for leaf in jax.tree.leaves(params) if jnp.issubdtype(jnp.result_type(leaf), jnp.floating)]
    dtype = jnp.result_type(*floats, x)
    x = _compat.owned(x, dtype)
    eps = radii(eps, x.shape, batched=batched)
    region = LpBall(x, eps, norm, clip=clip, batch_ndim=1 if batched else 0)
    regions.validate(region, "x and eps")
    return regions.canonical(region)


def radii(eps: ArrayLike, shape: tuple[int, ...], *, batched: bool) -> ArrayLike:
    """Radii as a ball takes them: one, one per example, or, where eps has as many axes as x, one per feature.

    Args:
        eps: shape (), (batch,), or (1 or batch, *example shape), of which some axes may be 1 (per channel), not all.
        shape: that of x.
        batched: whether x has a batch axis.

    >>> radii(np.array([[0.5, 0.25]]), (3, 2), batched=True).shape
    (3, 2)
    """
    given, whole = np.shape(eps), shape if batched else (1, *shape)
    if given == () and batched and not isinstance(eps, jax.Array):
        return np.broadcast_to(eps, shape[:1])
    if given == () or (batched and given == shape[:1]):
        return eps
    own = given if batched or len(given) > len(shape) else (1, *given)
    fits = len(own) == len(whole) > 1 and all(size in (1, most) for size, most in zip(own, whole, strict=True))
    if not fits or (set(own[1:]) == {1} and set(whole[1:]) != {1}):
        features = (1, *whole[1:])
        raise errors.ArgumentError(
            f"eps has shape {given}: pass one radius, or one per example, ({whole[0]},), or per feature, {features}"
        )
    xp = jnp if isinstance(eps, jax.Array) else np
    return xp.broadcast_to(eps if batched else xp.reshape(eps, own)[0], shape)


def check_types(x, eps) -> None:
    """Refuse inputs and radii that are no arrays."""
    if eps is None:
        raise errors.ArgumentError("pass eps, the radius of the ball around each example, or a region as x")
    if isinstance(x, tuple | list | Mapping):
        raise errors.argument_type(
            "x", f"is a {type(x).__name__}", "pass an array; several inputs go through jaxbound.bound(fn, method)"
        )
    for name, value in (("x", x), ("eps", eps)):
        if not hasattr(value, "dtype") and (name == "x" or not isinstance(value, int | float)):
            raise errors.argument_type(name, f"is a {type(value).__name__}", "pass an array")


def problem_of(network: Network, region: Region, spec, *, rounding: bool = False) -> Problem:
    """The network over a canonical region, with a specification composed, for a method (see `transform.prepare`)."""
    region = regions.per_example(region) if network.batched else region
    arguments, batch = (network.variables, region), None
    if network.batched:
        batch = [False] * len(jax.tree.leaves(network.variables)) + [True]
    if spec is None:
        return prepare(network.function, arguments, batch, rounding=rounding, canonical=True)
    if np.ndim(spec) not in (2, 3):
        raise errors.ArgumentError(f"spec has shape {np.shape(spec)}: pass (specs, outputs) or (batch, specs, outputs)")
    _check_spec(network, region, np.shape(spec))
    batch = None if batch is None else [*batch, np.ndim(spec) == 3]
    return prepare(Specified(network.function), (*arguments, spec), batch, rounding=rounding, canonical=True)


def output_struct(network: Network, region: Region):
    """The shapes and dtypes of one example's outputs; traced once per function and shapes."""
    example = example_of(network, region)
    leaves, tree = jax.tree.flatten(network.variables)
    try:
        avals = tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves)
        return _output_struct(network.function, tree, avals, example, jnp.result_type(float))
    except (AttributeError, TypeError):  # a Python number among the variables, or an unhashable callable
        return jax.eval_shape(network.function, network.variables, example)


@kept(64)
def _output_struct(function: Callable, tree, avals: tuple, example: jax.ShapeDtypeStruct, _default_dtype):
    return jax.eval_shape(function, jax.tree.unflatten(tree, avals), example)


def _check_spec(network: Network, region: Region, shape: tuple[int, ...]) -> None:
    outputs = output_struct(network, region)
    size = int(np.prod(outputs.shape))
    if shape[-1] != size:
        raise errors.ArgumentError(f"spec has shape {shape}, but the network has {size} outputs")
    batch = jax.tree.leaves(region)[0].shape[:1] if network.batched else ()
    if len(shape) == 3 and shape[:1] != batch:
        raise errors.ArgumentError(f"spec has shape {shape}, but x has {batch[0] if batch else 'no'} examples")


def request_of(
    problem: Problem, memory_limit: int | None, *, sides: str = "both", rounding: bool | str = False
) -> Request:
    """How many rows fit into the memory limit."""
    limit = MEMORY_LIMIT if memory_limit is None else memory_limit
    graph = problem.graph
    batch = 1 if graph.axes is None else jax.tree.leaves(problem.leaves)[0].shape[0]
    row = max(node.op.size * node.op.dtype.itemsize for node in graph.nodes) * batch * 3
    return Request(sides, rounding, int(np.clip(limit // row, 16, 1 << 14)))
