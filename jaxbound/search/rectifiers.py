"""ReLUs in closed form: which nodes they are, and planes around them."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxbound.graph import Op
from jaxbound.relaxations.planes import Planes


def is_rectifier(op: Op) -> bool:
    """Whether a node is max(z, 0) of its one input."""
    if op.kind != "scalar" or len(op.program.instructions) != 1:
        return False
    ((name, _, operands),) = op.program.instructions
    literals = [operand[1] for operand in operands if operand[0] == "lit"]
    return name == "max" and len(literals) == 1 and float(literals[0]) == 0


def rectifier_planes(lower: jax.Array, upper: jax.Array, slope: jax.Array | None = None) -> Planes:
    """Planes around max(z, 0): a line through 0 below, with a slope in [0, 1], and the chord above.

    `slope * z <= max(z, 0) <= chord * z + intercept` on [lower, upper], for every slope in [0, 1]; by default the slope
    is 1 where upper > -lower, else 0. The intercept is widened by its own rounding.
    """
    limits = jnp.finfo(lower.dtype)
    unstable = (lower < 0) & (upper > 0)
    finite = unstable & jnp.isfinite(lower) & jnp.isfinite(upper)
    low, high = jnp.where(finite, lower, -1), jnp.where(finite, upper, 1)
    chord = jnp.clip(high / (high - low), 0, 1)
    height = jnp.maximum(-chord * low, high - chord * high)
    height = height + 4 * limits.eps * (height + high) + 4 * limits.tiny
    active = lower >= 0
    above = jnp.where(finite, chord, active.astype(lower.dtype))
    height = jnp.where(finite, height, jnp.where(unstable, upper, 0))
    default = (upper > -lower).astype(lower.dtype)
    below = jnp.clip(default if slope is None else slope, 0, 1)
    below = jnp.where(active, 1, jnp.where(unstable, below, 0))
    return Planes((below,), jnp.zeros_like(height), (above,), height)
