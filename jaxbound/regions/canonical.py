"""Regions with parts of their own dtype and without subnormal numbers: what interpreters are given."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp

from jaxbound._compat import eager_jit
from jaxbound.backend.tracing import inlined
from jaxbound.regions import balls
from jaxbound.regions.rounding import cast_to, is_subnormal, next_number, without_subnormals
from jaxbound.regions.sets import SHAPED, Box, Constants, Region, is_box, leaf_struct, parts_of


def canonical(region: Region) -> Region:
    """The region with parts of its own dtype: wider ones are rounded outward, a wider center to nearest.

    It has no subnormal numbers, which processors may take for 0: ends are moved outward, and a ball whose center has
    some grows by as much as they move.

    >>> import jax.numpy as jnp, jaxbound as jb, numpy as np
    >>> canonical(jb.LpBall(jnp.zeros(2), np.float64(0.1), 2)).radius.dtype
    dtype('float32')
    """
    if isinstance(region, SHAPED):
        return region.canonical()
    dtype = leaf_struct(region).dtype
    if isinstance(region, Box):
        return _moved(Box(cast_to(region.lower, dtype, -1), cast_to(region.upper, dtype, +1)))
    center, radius, clip = cast_to(region.center, dtype, 0), cast_to(region.radius, dtype, +1), region.clip
    if clip is not None and not isinstance(clip, Constants):
        clip = cast_to(clip[0], dtype, -1), cast_to(clip[1], dtype, +1)
    return _moved(dataclasses.replace(region, center=center, radius=radius, clip=clip))


@functools.partial(eager_jit, level=0)
@inlined
def _moved(region: Any) -> Any:
    """A region with parts of its own dtype, without subnormal numbers."""
    parts: dict[str, Any] = parts_of(region)
    if isinstance(region, Box):
        return Box(without_subnormals(parts["lower"], -1), without_subnormals(parts["upper"], +1))
    center, radius, clip = parts["center"], without_subnormals(parts["radius"], +1), region.clip
    if clip is not None and not isinstance(clip, Constants):
        clip = without_subnormals(parts["clip[0]"], -1), without_subnormals(parts["clip[1]"], +1)
    moved, dtype = is_subnormal(center), center.dtype
    if radius.ndim == center.ndim > region.batch_ndim and not is_box(region):
        radius = balls.grown(radius, moved, region.batch_ndim)
        return dataclasses.replace(region, center=jnp.where(moved, 0, center), radius=radius, clip=clip)
    count = moved if radius.ndim == center.ndim else jnp.sum(moved, axis=tuple(range(radius.ndim, center.ndim)))
    grown = next_number(radius + count * jnp.finfo(dtype).tiny, +1)
    radius = jnp.where(count > 0, grown, radius)
    return dataclasses.replace(region, center=jnp.where(moved, 0, center), radius=radius, clip=clip)
