"""Regions of a batch: as a stack for `jax.vmap`, some of their examples, one example as a batch of one."""

from __future__ import annotations

import jax.numpy as jnp

from jaxbound import errors
from jaxbound.regions.rounding import cast_to
from jaxbound.regions.sets import SHAPED, Box, Constants, LpBall, Region, enclosing_box, leaf_struct


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
