"""Planes around `y = log(sum_k exp(x_k))` over some axes, a convex function that rises in every entry.

Below, the tangent plane at a point c: `y >= y(c) + sum_k p_k (x_k - c_k)` with p = softmax(c). Above, the chords of the
exponentials and a tangent of the logarithm (Wei et al. 2023, "Convex bounds on the softmax function with applications
to robustness verification"): with `sum_k exp(x_k) <= S(x)`, affine in x, and any other point c,

    y  <=  log S(c) + (S(x) - S(c)) / S(c).

Both points are the middle of the box by default, and on its diagonal if given. Entries that a mask leaves out count as
minus infinity: they add nothing, and their slopes are 0. Of an entry without a lower bound nothing is left below, and
the constant `exp(u_k)` above.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxbound.graph import Op
from jaxbound.relaxations.enclosures.maximum import axes
from jaxbound.relaxations.planes import Planes, times
from jaxbound.relaxations.slopes import ADAPTIVE, Freedom, Places, SlopeRule

Ends = tuple[jax.Array, jax.Array]

_POINTS = 9
"""Tangent planes among which tuning chooses."""
_LEAST = 1 / 16
"""The lowest place of c above: there S is at least this part of its largest value, and its logarithm has a tangent."""


def describe(op: Op) -> str:
    """How it is relaxed."""
    return "tangent plane below, chords above"


def interval(op: Op, inputs: Sequence[Ends], constants: Sequence) -> Ends:
    """The values at the ends."""
    ((lower, upper),) = inputs
    ends, mask = [], _mask(op, constants)
    for end, sign in ((lower, -1), (upper, 1)):
        value = jax.nn.logsumexp(end, axes(op), where=mask)
        shifted = value + sign * _error(op, jnp.abs(jnp.where(jnp.isfinite(value), value, 0)))
        ends.append(jnp.where(jnp.isnan(value), sign * jnp.inf, shifted))
    return ends[0], ends[1]


def is_exact(op: Op, position: int, ends: Ends) -> jax.Array:
    """Never."""
    return jnp.zeros(jnp.shape(ends[0]), bool)


def planes(op: Op, inputs: Sequence[Ends], constants: Sequence, rule: SlopeRule = ADAPTIVE) -> Planes:
    """A tangent plane below, chords under a tangent above; places of c are on the diagonal, in [0, 1]."""
    ((lower, upper),) = inputs
    reduced, mask = axes(op), _mask(op, constants)
    if mask is not None:
        lower, upper = jnp.where(mask, lower, 0), jnp.where(mask, upper, 0)
    bounded = jnp.isfinite(lower)
    counts = bounded if mask is None else bounded & mask
    finite = jnp.all(jnp.isfinite(upper) & (lower < jnp.inf), reduced, keepdims=True)
    finite &= jnp.any(counts, reduced, keepdims=True)
    low, high = jnp.where(finite, jnp.where(bounded, lower, upper), 0), jnp.where(finite, upper, 0)
    halves = jnp.full(op.shape, 0.5, op.dtype)
    width = high - low
    places = Places(lambda: (halves, halves), ((0, 1), (_LEAST, 1))).chosen(rule)
    below, above = [low + jnp.expand_dims(place, reduced) * width for place in places]
    counts |= ~finite
    at_below = jax.nn.logsumexp(below, reduced, keepdims=True, where=counts)
    share = _exp(below - at_below, counts)
    largest = jnp.max(high, axis=reduced, keepdims=True, where=mask, initial=None if mask is None else -jnp.inf)
    shift = jax.lax.stop_gradient(largest)
    size_low, size_high = _exp(low - shift, mask), _exp(high - shift, mask)
    wide = width > 1e-3  # below, the quotient cancels; any slope makes a line above an exponential
    chord = jnp.where(bounded, jnp.where(wide, (size_high - size_low) / jnp.where(wide, width, 1), size_high), 0)
    lines = jnp.maximum(size_low + chord * (above - low), size_high - chord * (high - above))
    total = jnp.sum(lines, reduced, keepdims=True)
    slope = chord / total
    known = jnp.squeeze(finite, reduced)
    value = jnp.squeeze(at_below, reduced)
    ceiling = jnp.squeeze(shift + jnp.log(total), reduced)
    # an entry counts by its slope, so that a score of -1e38, which masks it, adds nothing
    away = jnp.abs(below - at_below)  # whose rounding is the relative error of a share
    reach = jnp.maximum(jnp.abs(below), jnp.abs(above)) + (1 + away) * width + jnp.abs(at_below)
    reach = jnp.sum(times(jnp.maximum(share, slope), reach), reduced)
    lost = jnp.finfo(op.dtype).tiny * jnp.sum(width, reduced)  # slopes that underflow
    error = _error(op, jnp.abs(value) + jnp.abs(ceiling) + reach) + jax.lax.stop_gradient(lost)
    least, most = interval(op, inputs, constants)
    return Planes(
        (jnp.where(finite, share, 0),), jnp.where(known, value - jnp.sum(share * below, reduced) - error, least),
        (jnp.where(finite, slope, 0),), jnp.where(known, ceiling - jnp.sum(slope * above, reduced) + error, most),
    )  # fmt: skip


def freedom(op: Op, inputs: Sequence[Ends], constants: Sequence, rule: SlopeRule = ADAPTIVE) -> Freedom:
    """Points along the diagonal of the box."""
    zeros = jnp.zeros(op.shape, op.dtype)
    (below, _), (half, _) = Freedom.linear(zeros, zeros + 1, (zeros + 0.5, zeros), count=_POINTS)
    (above, _), (other, _) = Freedom.linear(zeros + _LEAST, zeros + 1, (zeros + 0.5, zeros), count=_POINTS)
    return Freedom((below, above), (half, other))


def _mask(op: Op, constants: Sequence) -> jax.Array | None:
    """Which entries count; None for all."""
    if len(op.operands) == 1:
        return None
    kind, mask, *_ = op.operands[1]
    return constants[mask] if kind == "constant" else jnp.full(op.input_shapes[0], mask)


def _exp(x: jax.Array, mask: jax.Array | None) -> jax.Array:
    return jnp.exp(x) if mask is None else jnp.where(mask, jnp.exp(x), 0)


def _error(op: Op, size: jax.Array) -> jax.Array:
    """What rounding adds: the sum of n exponentials, its logarithm, and the products with slopes."""
    shape = op.input_shapes[0]
    count = 1
    for axis in axes(op):
        count *= shape[axis]
    return jax.lax.stop_gradient((4 * count + 32) * jnp.finfo(op.dtype).eps * (1 + size))
