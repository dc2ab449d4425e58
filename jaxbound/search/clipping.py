"""Neurons clipped by the property: where a counterexample may be, their inputs lie in smaller intervals.

Over the whole box CROWN knows linear functions below every neuron's input z, and below -z: z >= f(x). On a domain a
row of the clause has one too, row(x) >= g(x), and the row is at most 0 at a counterexample, so that g(x) <= 0 there.
Where a neuron was cut, z <= end, its own function less the end is such a g. For every one

    z  >=  f(x)  >=  f(x) + m g(x)  >=  min over the box of (f + m g)      for every multiplier m >= 0,

the Lagrangian of the least f where g <= 0. It is concave in m, so a few bisections by its slope come near its largest
value, and the best that was seen counts. What is found holds for the domain's clause alone, and there for all that
comes of the domain.

Reference: Zhou et al. 2025, "Clip-and-verify: linear constraint-driven domain clipping for accelerating neural network
verification".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbound._compat import eager_jit
from jaxbound.backend.caches import kept
from jaxbound.backend.tracing import inlined
from jaxbound.relaxations import affine

Array = np.ndarray

_BISECTIONS = 7
_OCTAVES = 6
"""Multipliers are between 2**-6 and 2**6 times what makes both functions as wide as each other."""


class Functions(NamedTuple):
    """Linear functions below neurons, and below their negatives, of the inputs that are not fixed over the box:
    slopes @ x + constants."""

    slopes: jax.Array
    """(2, neurons, free inputs)."""
    constants: jax.Array
    """(2, neurons)."""
    low: jax.Array
    """The ends of the free inputs, (free inputs,)."""
    high: jax.Array
    free: jax.Array
    """Their numbers among all inputs."""


def functions_of(free: Array, slopes: Array, lower: Array, box: tuple[Array, Array]) -> Functions:
    """Functions with these slopes in the free inputs whose least values over a box are `lower`, (2, neurons)."""
    ends = [np.ravel(end)[free] for end in box]
    low, high = (end.astype(np.float64) for end in ends)
    wide = slopes.astype(np.float64)
    size = np.abs(wide) @ np.maximum(np.abs(low), np.abs(high)) + np.abs(lower)
    least = np.maximum(wide, 0) @ low + np.minimum(wide, 0) @ high
    constants = lower - least - 1e-15 * (4 * len(low) + 8) * size
    near = constants.astype(slopes.dtype)
    down = np.nextafter(near, np.array(-np.inf, near.dtype))
    found = slopes, np.where(near > constants, down, near), *ends, free
    return Functions(*map(jnp.asarray, found))


def clipped_by_rows(functions: Functions, lower: jax.Array, slopes: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Between which ends neurons are where a row may be 0 or less, (domains, neurons), rounding counted.

    Args:
        functions: below all neurons, over the whole box.
        lower: the least value of a linear function below the row of every domain, (domains,).
        slopes: its slopes, (domains, *input).
    """
    return _batched(_by_row)(functions, lower, slopes)


def clipped_by_cuts(functions: Functions, index: jax.Array, ends: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Between which ends neurons are where one of them was cut.

    Args:
        functions: below all neurons, over the whole box.
        index: which one, (domains,): that of z if it is cut to z <= end, the number of neurons more if to -z <= end.
        ends: where, (domains,); infinite where there is no cut.
    """
    return _batched(_by_cut)(functions, index, ends)


@kept(64)
def _batched(step: Callable) -> Callable:
    return eager_jit(inlined(jax.vmap(step, in_axes=(None, 0, 0))))


def _by_row(functions: Functions, lower: jax.Array, slope: jax.Array):
    slope, low, high = jnp.take(jnp.ravel(slope), functions.free), functions.low, functions.high
    size = jnp.sum(jnp.abs(slope) * jnp.maximum(jnp.abs(low), jnp.abs(high))) + jnp.abs(lower)
    constant = lower - jnp.sum(slope * jnp.where(slope > 0, low, high))
    lost = affine.gamma(2 * slope.size + 16, lower.dtype) * (size + affine.enlargement(lower.dtype))
    return _where_negative(functions, slope, constant - lost)


def _by_cut(functions: Functions, index: jax.Array, end: jax.Array):
    slope = jnp.take(functions.slopes.reshape(-1, functions.slopes.shape[-1]), index, axis=0)
    constant = jnp.take(jnp.ravel(functions.constants), index)
    lost = affine.gamma(4, end.dtype) * (jnp.abs(constant) + jnp.abs(end) + affine.enlargement(end.dtype))
    return _where_negative(functions, slope, constant - end - lost)


def _where_negative(functions: Functions, slope: jax.Array, constant: jax.Array):
    """The ends of neurons where slope @ x + constant <= 0."""
    low, high = functions.low, functions.high
    middle, radius = low / 2 + high / 2, high / 2 - low / 2
    reach = jnp.abs(middle) + radius
    gamma, room = affine.gamma(2 * slope.size + 32, low.dtype), affine.enlargement(low.dtype)
    spread = jnp.sum(jnp.abs(slope) * radius)
    weight = jnp.sum(jnp.abs(slope) * reach) + jnp.abs(constant) + room
    own = jnp.sum(jnp.abs(functions.slopes) * radius, axis=-1)
    weights = jnp.sum(jnp.abs(functions.slopes) * reach, axis=-1) + jnp.abs(functions.constants) + room
    centers = jnp.sum(functions.slopes * middle, axis=-1) + functions.constants
    center = jnp.sum(slope * middle) + constant
    scale = jnp.clip(own, 1e-30, 1e30) / jnp.clip(spread, 1e-30, 1e30)

    def at(octave: jax.Array):
        """The Lagrangian at a multiplier, less its rounding, and its slope."""
        multiplier = scale * jnp.exp2(octave)
        joint = functions.slopes + multiplier[..., None] * slope
        least = centers + multiplier * center - jnp.sum(jnp.abs(joint) * radius, axis=-1)
        slopes = center - jnp.sum(jnp.sign(joint) * (slope * radius), axis=-1)
        return least - gamma * (weights + multiplier * weight), slopes

    best, octave = jnp.full(scale.shape, -jnp.inf, low.dtype), jnp.zeros_like(scale)
    for number in range(_BISECTIONS):
        least, rising = at(octave)
        best = jnp.fmax(best, least)
        octave = octave + jnp.where(rising > 0, 1, -1) * (_OCTAVES / 2 ** (number + 1))
    best = jnp.where(jnp.isfinite(best), best, -jnp.inf)
    return best[0], -best[1]
