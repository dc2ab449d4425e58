r"""Zonotopes, {center + sum_k u_k generators[k] : |u_k| <= 1}: boxes in other coordinates.

The least value of s.x is s.center - sum_k |s.generators[k]|; the enclosing box has sum_k |generators[k]| to each side.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxbound import errors
from jaxbound.regions.rounding import cast_to, is_subnormal, next_number

HIGHEST = jax.lax.Precision.HIGHEST


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Zonotope:
    """The set of every `center + sum_k u[k] * generators[k]` with `-1 <= u <= 1`.

    Parts wider than JAX's widest enabled dtype are rounded to it first.

    Args:
        center: floating, the shape of the leaf.
        generators: `(count, *center.shape)`; with `batch_ndim`, `(*batch, count, *rest of center.shape)`.
        batch_ndim: the number of leading axes that index separate zonotopes (static).

    >>> from jaxbound.regions import minimum
    >>> rotated = Zonotope(jnp.zeros(2), jnp.array([[1.0, 1.0], [1.0, -1.0]]))
    >>> minimum(rotated, jnp.array([1.0, 1.0]))
    Array(-2., dtype=float32)
    """

    center: ArrayLike
    generators: ArrayLike
    batch_ndim: int = dataclasses.field(default=0, kw_only=True, metadata={"static": True})

    def struct(self) -> jax.ShapeDtypeStruct:
        """The shape and dtype of the leaf."""
        return jax.ShapeDtypeStruct(np.shape(self.center), jnp.result_type(self.center, self.generators))

    def parts(self) -> dict[str, ArrayLike]:
        """Every array by name."""
        return {"center": self.center, "generators": self.generators}

    def check_shapes(self, name: str) -> None:
        """Refuse parts that do not fit."""
        shape, given, batch_ndim = np.shape(self.center), np.shape(self.generators), self.batch_ndim
        if not 0 <= batch_ndim <= len(shape):
            raise errors.argument(f"{name}.batch_ndim", f"is {batch_ndim}", f"center has {len(shape)} axes")
        if len(given) != len(shape) + 1 or (*given[:batch_ndim], *given[batch_ndim + 1 :]) != shape:
            wanted = ", ".join(map(str, (*shape[:batch_ndim], "count", *shape[batch_ndim:])))
            raise errors.argument(f"{name}.generators", f"have shape {given}", f"pass shape ({wanted})")

    def canonical(self) -> Zonotope:
        """Parts of the leaf's dtype."""
        dtype = self.struct().dtype
        center, generators = cast_to(self.center, dtype, 0), cast_to(self.generators, dtype, 0)
        return dataclasses.replace(self, center=center, generators=generators)

    def per_example(self) -> Zonotope:
        """A stack of zonotopes of one example."""
        return dataclasses.replace(self.canonical(), batch_ndim=self.batch_ndim - 1)

    def ends(self, dtype: np.dtype) -> tuple[jax.Array, jax.Array]:
        """The enclosing box, rounded outward."""
        own = self.canonical()
        center, generators = jnp.asarray(own.center), jnp.asarray(own.generators)
        eps = jnp.finfo(center.dtype).eps
        radius = jnp.sum(jnp.abs(generators), axis=self.batch_ndim) * (
            1 + (generators.shape[self.batch_ndim] + 4) * eps
        )
        radius = radius + 2 * _lost(own)
        exact = radius == 0
        low, high = (jnp.where(exact, center, next_number(center + side * radius, side)) for side in (-1, 1))
        return cast_to(low, dtype, -1), cast_to(high, dtype, +1)

    def is_empty(self) -> jax.Array:
        """Never, but for a NaN."""
        return jnp.any(jnp.isnan(jnp.asarray(self.center))) | jnp.any(jnp.isnan(jnp.asarray(self.generators)))

    def terms(self) -> int:
        """How many rounded operations an entry of `minimum` passes through."""
        return self.struct().size + np.shape(self.generators)[self.batch_ndim] + 12

    def minimum(self, slope: jax.Array) -> jax.Array:
        """The least values of rows `(*leading, *leaf shape)`."""
        center, generators, rows = self._flat(slope)
        swing = jnp.einsum("...n,...kn->...k", rows, generators, precision=HIGHEST)
        lost = _lost(self.canonical()).reshape(center.shape)
        found = jnp.sum(rows * center - 2 * jnp.abs(rows) * lost, axis=-1) - jnp.sum(jnp.abs(swing), axis=-1)
        found = jnp.sum(found, axis=tuple(range(found.ndim - self.batch_ndim, found.ndim)))
        return jnp.where(jnp.isfinite(found), found, -jnp.inf)

    def minimizer(self, slope: jax.Array) -> jax.Array:
        """Points where rows are least."""
        center, generators, rows = self._flat(slope)
        side = -jnp.sign(jnp.einsum("...n,...kn->...k", rows, generators, precision=HIGHEST))
        return (center + jnp.einsum("...k,...kn->...n", side, generators, precision=HIGHEST)).reshape(slope.shape)

    def sample(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Points with uniform u."""
        center, generators, _ = self._flat(jnp.zeros(np.shape(self.center)))
        part = jax.random.uniform(key, (*shape, *generators.shape[:-1]), center.dtype, -1, 1)
        points = center + jnp.einsum("...k,...kn->...n", part, generators, precision=HIGHEST)
        return points.reshape(*shape, *np.shape(self.center))

    def _flat(self, slope: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Center, generators and rows with one axis of features."""
        own = self.canonical()
        batch, rest = np.shape(self.center)[: self.batch_ndim], np.shape(self.center)[self.batch_ndim :]
        size, count = math.prod(rest), np.shape(self.generators)[self.batch_ndim]
        leading = slope.shape[: slope.ndim - len(batch) - len(rest)]
        return (
            jnp.reshape(own.center, (*batch, size)),
            jnp.reshape(own.generators, (*batch, count, size)),
            jnp.reshape(slope, (*leading, *batch, size)),
        )


def _lost(own: Zonotope) -> jax.Array:
    """What coordinates lose where processors take subnormal parts for 0."""
    center, generators = jnp.asarray(own.center), jnp.asarray(own.generators)
    count = is_subnormal(center).astype(center.dtype) + jnp.sum(is_subnormal(generators), axis=own.batch_ndim)
    return count * jnp.finfo(center.dtype).tiny
