"""Regions of a batch: as a stack for `jax.vmap`, some of their examples, one example as a batch of one."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxbound import errors
from jaxbound._compat import eager_jit
from jaxbound.backend.tracing import inlined
from jaxbound.regions.polytopes import Polytope
from jaxbound.regions.rounding import cast_to
from jaxbound.regions.sets import SHAPED, Box, Constants, LpBall, Region, enclosing_box, leaf_struct
from jaxbound.regions.zonotopes import Zonotope


def per_example(region: Region) -> Region:
    """The same set as a stack of one-example regions: the first axis of every array leaf is the batch, for `jax.vmap`.

    Args:
        region: a `Box`, or another region with `batch_ndim >= 1`; the result's is one less.

    Raises:
        ValueError: for `batch_ndim=0`, which couples the examples.

    >>> from jaxbound.regions import minimum
    >>> balls = LpBall(jnp.zeros((3, 2)), 0.5, 2, batch_ndim=1)
    >>> jax.vmap(minimum)(per_example(balls), jnp.ones((3, 2))).shape
    (3,)
    """
    if isinstance(region, Box):
        return Box(*enclosing_box(region))
    if region.batch_ndim > 0 and isinstance(region, SHAPED):
        return region.per_example()
    shape, dtype = leaf_struct(region).shape, leaf_struct(region).dtype
    if region.batch_ndim < 1 or not isinstance(region, LpBall):
        kind = "ball" if isinstance(region, LpBall) else type(region).__name__
        raise errors.ArgumentError(f"batch_ndim=0 makes {shape} one {kind} over the whole batch: pass batch_ndim=1")
    radius, clip = cast_to(region.radius, dtype, +1), region.clip
    radius = jnp.broadcast_to(radius, shape[: max(radius.ndim, region.batch_ndim)])
    if clip is not None and not isinstance(clip, Constants):
        low, high = cast_to(clip[0], dtype, -1), cast_to(clip[1], dtype, +1)
        clip = jnp.broadcast_to(low, shape), jnp.broadcast_to(high, shape)
    return LpBall(cast_to(region.center, dtype, 0), radius, region.norm, clip=clip, batch_ndim=region.batch_ndim - 1)


def take(region: Region, index: np.ndarray) -> Region:
    """Some of the examples' regions, as NumPy arrays."""
    shape = leaf_struct(region).shape
    if isinstance(region, LpBall):
        radius, clip = np.asarray(region.radius), region.clip
        if jax.tree.leaves(clip):  # arrays; numbers are static
            clip = tuple(np.broadcast_to(end, shape)[index] for end in clip or ())
        radius = radius[index] if radius.ndim else radius
        return dataclasses.replace(region, center=np.asarray(region.center)[index], radius=radius, clip=clip)
    return jax.tree.map(lambda part: np.asarray(part)[index], region)


def with_batch_axis(region: Region) -> Region:
    """One example as a batch of one."""
    region = jax.tree.map(lambda leaf: np.asarray(leaf)[None], region)
    return region if isinstance(region, Box) else dataclasses.replace(region, batch_ndim=region.batch_ndim + 1)


@eager_jit
@inlined
def middle(region: Region) -> jax.Array:
    """The center, or the middle of the box."""
    if isinstance(region, LpBall | Zonotope):
        return jnp.asarray(region.center)
    box = region if isinstance(region, Box) else region.box
    return jnp.asarray(box.lower) / 2 + jnp.asarray(box.upper) / 2


@eager_jit
@inlined
def inside(region: Region) -> jax.Array:
    """A point of the region, near its middle; NaN where none is known."""
    if isinstance(region, LpBall):
        center = jnp.asarray(region.center)
        return center if region.clip is None else jnp.clip(center, *region.clip).astype(center.dtype)
    point = middle(region)
    if not isinstance(region, Polytope):
        return point
    axes = tuple(range(region.batch_ndim + 1, point.ndim + 1))
    rows = jnp.sum(jnp.asarray(region.A) * jnp.expand_dims(point, region.batch_ndim), axis=axes)
    kept = jnp.all(rows <= jnp.asarray(region.b), axis=-1)
    return jnp.where(kept.reshape(kept.shape + (1,) * (point.ndim - kept.ndim)), point, jnp.nan)
