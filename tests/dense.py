"""Dense checks of enclosures of several inputs: intervals and planes around a node, as numbers, at many points."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxbound.graph import Op, tracing
from jaxbound.relaxations import enclosures
from jaxbound.relaxations.planes import Planes
from jaxbound.relaxations.slopes import ADAPTIVE, Given

Array = np.ndarray
Ends = tuple[Array, Array]


def node(function: Callable, shapes: Sequence[tuple[int, ...]], dtype, kind: str, bounded: Sequence[bool] = ()) -> Op:
    """The one node of a kind that a function of arrays makes; all of them are bounded unless said otherwise."""
    arguments = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    structure = tracing.build(function, arguments, bounded or [True] * len(shapes))
    (op,) = [made.op for made in structure.nodes if made.op.kind == kind]
    return op


def boxes(rng: np.random.Generator, shape: tuple[int, ...], dtype) -> Ends:
    """Intervals of all sizes, some single points, some dyadic (so that ends meet each other and 0)."""
    center = rng.normal(size=shape) * 10 ** rng.uniform(-2, 2, shape)
    radius = 10 ** rng.uniform(-6, 2, shape) * rng.choice([0.0, 1.0, 1.0, 1.0], shape)
    lower, upper = (center - radius).astype(dtype), (center + radius).astype(dtype)
    whole = rng.random(shape) < 0.25
    lower, upper = np.where(whole, np.round(lower), lower), np.where(whole, np.round(upper), upper)
    return np.minimum(lower, upper).astype(dtype), np.maximum(lower, upper).astype(dtype)


def points(rng: np.random.Generator, ends: Ends, count: int) -> Array:
    """Corners, faces and points inside, in float64; where an end is infinite, points far out."""
    lower, upper = (end.astype(np.float64) for end in ends)
    lower, upper = np.maximum(lower, np.minimum(upper, 0) - 300), np.minimum(upper, np.maximum(lower, 0) + 300)
    share = rng.random((count, *lower.shape))
    share = np.where(rng.random(share.shape) < 0.4, np.round(share), share)
    return np.clip(lower + (upper - lower) * share, lower, upper)


def heights(op: Op, planes: Planes, at: Sequence[Array]) -> tuple[Array, Array]:
    """The lower and the upper plane at points of the inputs, in float64."""
    axes = tuple(axis + 1 for axis in enclosures.reduced_axes(op))
    found = []
    for slopes, intercept in (
        (planes.lower_slopes, planes.lower_intercept), (planes.upper_slopes, planes.upper_intercept)
    ):  # fmt: skip
        total = np.asarray(intercept, np.float64)[None]
        for slope, x in zip(slopes, at, strict=True):
            total = total + (np.asarray(slope, np.float64) * x).sum(axis=axes)
        found.append(total)
    return found[0], found[1]


def check(
    op: Op, function: Callable, inputs: Sequence[Ends], at: Sequence[Array], *, constants: Sequence = (), slopes=None,
    slack: float = 0.0,
) -> Planes:  # fmt: skip
    """Interval and planes contain the function at the points, up to `slack` units of float64; returns the planes."""
    enclosure = enclosures.of(op)
    inputs = [tuple(map(jnp.asarray, ends)) for ends in inputs]
    values = function(*at)
    size = 1 + np.abs(values).max(axis=0)
    low, high = (np.asarray(end, np.float64) for end in enclosure.interval(op, inputs, constants))
    planes = enclosure.planes(op, inputs, constants, Given(*slopes) if slopes else ADAPTIVE)
    assert not any(np.isnan(leaf).any() for leaf in jax.tree.leaves((low, high, planes)))
    assert np.all(low - slack * np.finfo(np.float64).eps * size <= values)
    assert np.all(values <= high + slack * np.finfo(np.float64).eps * size)
    assert all(leaf.dtype == op.dtype for leaf in jax.tree.leaves(planes))
    below, above = heights(op, planes, at)
    reach = sum(
        np.asarray(
            np.abs(np.asarray(slope, float) * x).sum(axis=tuple(axis + 1 for axis in enclosures.reduced_axes(op)))
        )
        for slope, x in zip((*planes.lower_slopes, *planes.upper_slopes), (*at, *at), strict=True)
    )
    allowed = 32 * np.finfo(np.float64).eps * (np.abs(values) + reach)
    assert np.all(below <= values + allowed), float((below - values - allowed).max())
    assert np.all(above >= values - allowed), float((values - above - allowed).max())
    return planes
