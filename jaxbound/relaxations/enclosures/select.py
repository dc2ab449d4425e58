"""Planes around a choice between two values, `y = (1 - s) a + s b` with s in [s_l, s_u], a part of [0, 1].

y lies between its values at s_l and s_u, and with d = a - b in [d_l, d_u] every k in [0, 1] gives a plane on each side:

    y  >=  (1 - w) a + w b + (s_u - s_l) h,     w = (1 - k) s_l + k s_u,     h = min(h(d_l), h(d_u)),
    y  <=  (1 - w) a + w b - (s_u - s_l) h,     w = k s_l + (1 - k) s_u,

where h(d) = -(1 - k) d for d >= 0 and k d for d < 0 is what separates a plane from the minimum of a and b: it is
concave on each side of 0 and largest there, so least in an end. `k = d_u / (d_u - d_l)`, the chord of relu(d), makes
both ends equal; for `step * y` these are the chords u (y - l) / (u - l) and l (u - y) / (u - l). Where s is decided
(s_l = s_u) the plane is the value itself. A constant case is its own interval.

The dependence on s is given up: a linear bound on a step says little.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxbound.graph import Op
from jaxbound.graph.values import plain
from jaxbound.relaxations.planes import Planes, is_wide, times
from jaxbound.relaxations.slopes import ADAPTIVE, Freedom, Places, SlopeRule

Ends = tuple[jax.Array, jax.Array]

PLACES = (0.0, 1.0)
"""The values of k."""


def describe(op: Op) -> str:
    """How it is relaxed."""
    return "one case, or planes around both"


def interval(op: Op, inputs: Sequence[Ends], constants: Sequence) -> Ends:
    """The hull over both ends of s."""
    share, a, b = _operands(op, inputs, constants)
    share = _within(share)
    ends = [[times(1 - s, x) + times(s, y) for s in share] for x, y in zip(a, b, strict=True)]
    low, high = jnp.minimum(*ends[0]), jnp.maximum(*ends[1])
    whole = [(s == 0) | (s == 1) for s in share]
    reach = sum(jnp.maximum(jnp.abs(x), jnp.abs(y)) for x, y in (a, b))
    error = jax.lax.stop_gradient(jnp.where(whole[0] & whole[1], 0, 4 * jnp.finfo(op.dtype).eps * reach))
    return low - error, high + error


def is_exact(op: Op, position: int, ends: Ends) -> jax.Array:
    """A linear bound on a step hardly decides it; the cases' bounds always matter."""
    return jnp.full(jnp.shape(ends[0]), op.operands[0] == ("input", position))


def planes(op: Op, inputs: Sequence[Ends], constants: Sequence, rule: SlopeRule = ADAPTIVE) -> Planes:
    """A plane on each side; their places are k."""
    share, *cases = _operands(op, inputs, constants)
    low_s, high_s = _within(share)
    finite = jnp.all(jnp.stack([jnp.isfinite(end) for ends in cases for end in ends]), axis=0)
    (low_a, high_a), (low_b, high_b) = [tuple(jnp.where(finite, end, 0) for end in ends) for ends in cases]
    least, most = low_a - high_b, high_a - low_b
    chord = _chord(least, most)
    below, above = Places.within(*PLACES, lambda: (chord, chord)).chosen(rule)
    reach = sum(jnp.maximum(jnp.abs(low), jnp.abs(high)) for low, high in ((low_a, high_a), (low_b, high_b)))
    whole = ((low_s == 1) | (high_s == 0)).astype(op.dtype)
    error = jax.lax.stop_gradient((1 - whole) * 16 * jnp.finfo(op.dtype).eps * reach)
    spread = high_s - low_s
    decided = whole == 1
    floor = jnp.where(decided, 0, spread * _separation(below, least, most) - error)
    ceiling = jnp.where(decided, 0, error - spread * _separation(above, least, most))
    known = decided | finite
    bottom, top = interval(op, inputs, constants)

    def shares(weight: jax.Array):
        parts = jnp.zeros_like(weight), 1 - weight, weight
        return [jnp.where(known, part, 0).astype(op.dtype) for part in parts]

    lower, floor = _split(op, shares(low_s + below * spread), floor, constants)
    upper, ceiling = _split(op, shares(high_s - above * spread), ceiling, constants)
    return Planes(lower, jnp.where(known, floor, bottom), upper, jnp.where(known, ceiling, top))


def freedom(op: Op, inputs: Sequence[Ends], constants: Sequence, rule: SlopeRule = ADAPTIVE) -> Freedom:
    """k from 0 over the chord to 1; h is linear in k on both sides of it."""
    _, (low_a, high_a), (low_b, high_b) = _operands(op, inputs, constants)
    chord = _chord(low_a - high_b, high_a - low_b)
    table, middle = jnp.stack([0 * chord, chord, 0 * chord + 1]), jnp.full_like(chord, 0.5)
    return Freedom((table, table), (middle, middle))


def _chord(least: jax.Array, most: jax.Array) -> jax.Array:
    width = most - least
    share = jnp.clip(most / jnp.where(is_wide(width), width, 1), 0, 1)
    return jnp.where(jnp.isfinite(share), share, 0)


def _within(share: Ends) -> Ends:
    """s lies in [0, 1] whatever rounding has made of its bounds."""
    return jnp.clip(share[0], 0, 1), jnp.clip(share[1], 0, 1)


def _separation(share: jax.Array, least: jax.Array, most: jax.Array) -> jax.Array:
    ends = [jnp.where(d >= 0, -(1 - share) * d, share * d) for d in (least, most)]
    return jnp.minimum(*ends)


def _operands(op: Op, inputs: Sequence[Ends], constants: Sequence) -> list[Ends]:
    """The intervals of indicator, a and b."""
    found = []
    for operand in op.operands:
        value = inputs[operand[1]] if operand[0] == "input" else _constant(op, operand, constants)
        found.append(value if operand[0] == "input" else (value, value))
    return found


def _constant(op: Op, operand: tuple, constants: Sequence) -> jax.Array:
    return jnp.broadcast_to(plain(constants[operand[1]]) if operand[0] == "constant" else operand[1], op.shape)


def _split(op: Op, shares: list, intercept: jax.Array, constants: Sequence) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """Shares of the operands that are inputs; what the constant ones add goes into the intercept."""
    slopes = []
    for operand, share in zip(op.operands, shares, strict=True):
        if operand[0] == "input":
            slopes.append(share)
        else:
            intercept = intercept + share * _constant(op, operand, constants)
    return tuple(slopes), intercept
