"""What a network is asked about: its inputs as they are given, one array or region or a pytree of them, and weights.

"Inputs" below are a region, or a pytree in which leaves are regions or arrays that stay as they are. All of them have
the batch as their first axis where the network is batched. Several regions mean every combination of their points.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxbound import _compat, errors, regions
from jaxbound.regions import LpBall, is_region

Inputs = Any
Clip = tuple[ArrayLike, ArrayLike] | None


def is_several(x: Inputs) -> bool:
    """Whether x holds several inputs."""
    return isinstance(x, tuple | list | Mapping)


def leaves_of(tree: Any) -> list:
    """The arrays and regions of inputs or variables."""
    return jax.tree.leaves(tree, is_leaf=is_region)


def struct_of(leaf: Any) -> jax.ShapeDtypeStruct:
    """The shape and dtype of an array, or of what a region stands for."""
    return regions.leaf_struct(leaf) if is_region(leaf) else jax.ShapeDtypeStruct(np.shape(leaf), jnp.result_type(leaf))


def structs(tree: Any):
    """The same tree with shapes and dtypes for leaves."""
    return jax.tree.map(struct_of, tree, is_leaf=is_region)


def example_structs(inputs: Inputs, *, batched: bool):
    """One example of what inputs stand for."""
    first = 1 if batched else 0
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape[first:], s.dtype), structs(inputs))


def batch_of(inputs: Inputs) -> int:
    """How many examples there are."""
    return struct_of(leaves_of(inputs)[0]).shape[0]


def per_example(inputs: Inputs) -> Inputs:
    """Inputs with stacks of regions of one example, for `jax.vmap` over first axes."""
    return jax.tree.map(lambda leaf: regions.per_example(leaf) if is_region(leaf) else leaf, inputs, is_leaf=is_region)


def evaluated_at(tree: Any, point: Callable = regions.middle):
    """A tree in which a point stands for each region."""
    return jax.tree.map(lambda leaf: point(leaf) if is_region(leaf) else leaf, tree, is_leaf=is_region)


def region_around(params: Any, x: Inputs, eps: Any, norm: float, clip: Clip, *, batched: bool) -> Inputs:
    """One ball per example around each input, or the regions that x already is.

    Raises:
        ArgumentError: x is an array and eps is missing, or x is a region and eps is given.
    """
    if is_several(x):
        return _around_several(params, x, eps, norm, clip)
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
    if eps is None and any(map(is_region, leaves_of(params))):
        return _compat.owned(x)  # the weights alone vary
    check_types(x, eps)
    if not isinstance(norm, int | float | np.number):
        raise errors.argument("norm", f"is {norm!r}", "pass a number p >= 1, such as 1, 2 or jnp.inf")
    if batched and np.shape(x)[:1] == (0,):
        raise errors.argument("x", "is a batch of no examples", "pass at least one")
    given = jnp.result_type(x)
    if jnp.issubdtype(given, jnp.complexfloating):
        raise errors.argument_type("x", f"has dtype {given}, which has no order", "pass its real and imaginary parts")
    if not jnp.issubdtype(given, jnp.floating):
        raise errors.ArgumentTypeError(
            f"x has dtype {given}: integers have no neighbourhood; divide images by 255 first"
        )
    floats = [leaf for leaf in jax.tree.leaves(params) if jnp.issubdtype(jnp.result_type(leaf), jnp.floating)]
    dtype = jnp.result_type(*floats, x)
    x = _compat.owned(x, dtype)
    assert eps is not None
    eps = radii(eps, x.shape, batched=batched)
    region = LpBall(x, eps, norm, clip=clip, batch_ndim=1 if batched else 0)
    regions.validate(region, "x and eps", regions.X_AND_EPS)
    return regions.canonical(region)


def _around_several(params: Any, x: Inputs, eps: Any, norm: float, clip: Clip) -> Inputs:
    found = []
    for name, leaf, own in paired(x, eps):
        if is_region(leaf):
            regions.validate(leaf, name)
            found.append(regions.canonical(leaf))
        elif own is None:
            found.append(_compat.owned(leaf))
        else:
            found.append(region_around(params, leaf, own, norm, clip, batched=True))
    check_batch(found)
    if not any(map(is_region, [*found, *leaves_of(params)])):
        raise errors.argument("eps", "is None and x holds no region", "pass a radius, or one per input")
    return jax.tree.unflatten(jax.tree.structure(x, is_leaf=is_region), found)


def paired(x: Inputs, eps: Any) -> list[tuple[str, Any, Any]]:
    """Each of several inputs: what it is called, itself, and its radius; None for one that stays as it is.

    >>> [own for _, _, own in paired({"image": np.zeros((2, 3)), "label": np.zeros(2, int)}, 0.1)]
    [0.1, None]
    """
    leaves, tree = jax.tree_util.tree_flatten_with_path(x, is_leaf=is_region)
    if not leaves:
        raise errors.argument("x", "holds no arrays", "pass at least one input")
    own = [eps if not is_region(leaf) and _is_floating(leaf) else None for _, leaf in leaves]
    if is_several(eps):
        try:
            own = tree.flatten_up_to(eps)
        except (ValueError, TypeError) as error:
            raise errors.argument("eps", "has another structure than x", "pass one radius, or one per input") from error
    names = [f"x{jax.tree_util.keystr(path)}" for path, _ in leaves]
    for name, (_, leaf), radius in zip(names, leaves, own, strict=True):
        if is_region(leaf) and radius is not None:
            raise errors.argument(name, "is a region and has an eps", "leave its eps None")
        if not is_region(leaf) and not hasattr(leaf, "dtype"):
            raise errors.argument_type(name, f"is a {type(leaf).__name__}", "pass arrays or regions as inputs")
    return [(name, leaf, radius) for name, (_, leaf), radius in zip(names, leaves, own, strict=True)]


def check_batch(leaves: list) -> None:
    """Refuse inputs that do not hold the same number of examples."""
    shapes = [struct_of(leaf).shape for leaf in leaves]
    if any(shape[:1] != shapes[0][:1] or not shape for shape in shapes):
        raise errors.argument("x", f"has inputs of shapes {shapes}", "the first axis of each is the batch")


def _is_floating(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)


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
        examples, some = shape[0] if batched else 1, ", some of them 1, as per channel"
        raise errors.ArgumentError(
            f"eps has shape {given}: pass one radius, or one per example, ({examples},), or per feature, {features}"
            f"{some if len(features) > 2 else ''}"
        )
    xp = jnp if isinstance(eps, jax.Array) else np
    return xp.broadcast_to(eps if batched else xp.reshape(eps, own)[0], shape)


def check_types(x: Any, eps: Any) -> None:
    """Refuse inputs and radii that are no arrays."""
    if eps is None:
        raise errors.ArgumentError("pass eps, the radius of the ball around each example, or a region as x")
    if is_several(x):
        raise errors.argument_type("x", f"is a {type(x).__name__}", "pass one array of points")
    for name, value in (("x", x), ("eps", eps)):
        if not hasattr(value, "dtype") and (name == "x" or not isinstance(value, int | float)):
            raise errors.argument_type(name, f"is a {type(value).__name__}", "pass an array")
