"""Planes: linear functions below and above one nonlinear node, as functions of its inputs.

    sum_i <lower_slopes[i], x_i> + lower_intercept  <=  node(x)  <=  sum_i <upper_slopes[i], x_i> + upper_intercept

for all inputs within the intervals that the planes were made for. Slopes have the inputs' shapes; the products are
entry by entry, then summed over the axes that the node itself reduces (the maximum over an axis; none otherwise).
Constant planes have no slopes: they are what interval propagation knows.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Planes:
    """See the module's head. Leading axes beyond the node's own belong to rows (or groups of rows)."""

    lower_slopes: tuple[jax.Array, ...]
    lower_intercept: jax.Array
    upper_slopes: tuple[jax.Array, ...]
    upper_intercept: jax.Array

    @classmethod
    def constant(cls, lower: jax.Array, upper: jax.Array) -> Planes:
        """What an interval says."""
        return cls((), lower, (), upper)


def times(coefficients: jax.Array, values: jax.Array) -> jax.Array:
    """The product in which a coefficient of zero ignores an infinite value."""
    return jnp.where(coefficients == 0, 0, coefficients * values)
