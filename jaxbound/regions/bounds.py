"""What methods return: intervals, estimates of them and linear bounds, as pytrees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxbound import errors
from jaxbound.regions.sets import is_region
from jaxbound.regions.support import minimum


@dataclass(frozen=True)
class _Ends:
    """A lower and an upper end of every entry; `upper` is None where only lower ones were asked for.

    `lower, upper = bounds` takes both.
    """

    lower: jax.Array
    upper: jax.Array | None

    def __iter__(self):
        return iter((self.lower, self.upper))

    @property
    def width(self) -> jax.Array:
        """`upper - lower`."""
        return self._upper - self.lower

    @property
    def center(self) -> jax.Array:
        """The midpoint."""
        return self.lower / 2 + self._upper / 2

    @property
    def _upper(self) -> jax.Array:
        if self.upper is None:
            raise errors.ArgumentError('only lower bounds were asked for: pass sides="both"')
        return self.upper


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Interval(_Ends):
    """Elementwise bounds: `lower <= value <= upper`.

    `upper` is None where only lower bounds were asked for.

    >>> import jax.numpy as jnp
    >>> Interval(jnp.zeros(2), jnp.ones(2)).width
    Array([1., 1.], dtype=float32)
    """


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Estimate(_Ends):
    """What a method whose guarantee is "estimate" says in place of an `Interval`: either end may be on the wrong side.

    >>> import jax.numpy as jnp
    >>> isinstance(Estimate(jnp.zeros(2), jnp.ones(2)), Interval)
    False
    """


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LinearBounds:
    """Linear functions of the region below and above a value.

    For every `x` in the region, with sums over all region leaves,

        <lower_slope, x> + lower_intercept  <=  value(x)  <=  <upper_slope, x> + upper_intercept.

    Slopes are pytrees like the arguments (a pair, `(args, kwargs)`, where there are keywords): shape
    `value shape + leaf shape`, and None at leaves that are not regions.
    Coordinates are absolute (not relative to a centre).

    >>> import jax.numpy as jnp, jaxbound as jb
    >>> box = jb.Box(jnp.zeros(1), jnp.ones(1))
    >>> jb.linear_bounds(lambda x: 2 * x + 1, jb.Crown())(box).concretize(box).upper
    Array([3.], dtype=float32)
    """

    lower_slope: object
    lower_intercept: jax.Array
    upper_slope: object
    upper_intercept: jax.Array

    def concretize(self, *args: Any, **kwargs: Any) -> Interval:
        """The interval that the linear functions give over the regions among the function's own arguments."""
        leaves = jax.tree.leaves((args, kwargs), is_leaf=is_region)
        low = jax.tree.leaves(self.lower_slope, is_leaf=lambda leaf: leaf is None)
        high = jax.tree.leaves(self.upper_slope, is_leaf=lambda leaf: leaf is None)
        lower, upper = self.lower_intercept, -self.upper_intercept
        for region, below, above in zip(leaves, low, high, strict=True):
            if is_region(region):
                lower = lower + minimum(region, below)
                upper = upper + minimum(region, -above)
        return Interval(*(sign * jnp.where(end < jnp.inf, end, -jnp.inf) for end, sign in ((lower, 1), (upper, -1))))
