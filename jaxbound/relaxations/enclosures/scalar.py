"""The one scalar rule: lines around sigma(z) on [l, u] for any fused scalar function.

A line is a slope; its intercept is then exact,

    lower intercept(s) = min over z in [l, u] of sigma(z) - s z,

so every slope gives a sound line and methods differ only in the slopes they choose. The upper line is the lower line of
-sigma, negated. From the proved curvature of sigma (`curvature.analyse`) the minimum is at an end, at the border of a
piece, or within a convex piece, where a search from values alone bounds it rigorously (`search.minimize`). Cells in
which nothing could be proved contribute their hull. By the envelope theorem the derivative is -z* in s and
sigma'(z*) - s in the end at which the minimum lies; it comes out by holding z* fixed.

The slope by default ("adaptive") is that of the convex hull of the graph at the midpoint of [l, u]: among all valid
lines the one with the smallest gap there, and in total. For ReLU it is CROWN's choice (the chord above; below 1 if
u > -l, else 0; Zhang et al. 2018), for S-shaped functions the chord or a tangent. It is found from chords between
sample points, moved to where they touch; what is left of their distance costs tightness, never soundness. At a kink in
the middle the flattest slope between those of both sides is taken.

Rounding: intercepts are widened by a bound on the error of evaluating sigma (`evaluation.error`) and the line.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbound.backend.tracing import rolled
from jaxbound.curvature.analysis import Cell, Curvature, analyse
from jaxbound.curvature.enclosing import enclose
from jaxbound.graph import Op
from jaxbound.relaxations.enclosures import evaluation, search
from jaxbound.relaxations.planes import Planes, is_wide, least_of, picked
from jaxbound.relaxations.slopes import ADAPTIVE, Freedom, Lines, SlopeRule

Ends = tuple[jax.Array, jax.Array]

_CONVEX = {"convex": 1, "concave": -1}
"""The sign that makes a piece convex."""
_SAMPLES = 8
"""Sample points on each side of the midpoint, for curved functions."""
_FLAT = 16
"""Units in the last place of sigma's values within which its range is that of a constant."""
_LINES = 17
"""Lines among which tuning chooses, for functions with more than one kink."""
_CLOSE = 1 / 512
"""Part of the interval below which a point of contact is the midpoint: the line there is the tangent."""
_NEAR = 16
"""Units in the last place around a switch within which sigma's derivative is taken beside it."""


def curvature_of(op: Op) -> Curvature:
    """What was proved of sigma when the graph was made."""
    curvature = analyse(op.program)
    assert curvature is not None
    return curvature


def describe(op: Op) -> str:
    """How it is relaxed: the chain of operations, and the pieces of its curvature."""
    chain = " ".join(name for name, _, _ in op.program.instructions)
    pieces = ", ".join(piece.kind for piece in curvature_of(op).pieces)
    return f"two lines, exact intercepts ({chain}: {pieces})"


def interval(op: Op, inputs: Sequence[Ends], constants: Sequence) -> Ends:
    """The range of sigma on [l, u]."""
    ((lower, upper),) = inputs
    curvature = curvature_of(op)
    least = extreme(op, curvature, 1, lower, upper, constants)
    most = extreme(op, curvature, -1, lower, upper, constants)
    if not evaluation.makes_error(op.program, jnp.result_type(lower)):
        return least, -most
    low, high = curvature.value_range
    return _at_least(least, rounded(low, least, -1)), -_at_least(most, -rounded(high, most, 1))


def leaves_domain(op: Op, ends: Ends) -> jax.Array:
    """Where [l, u] is not proved to lie within the domain of sigma, ends that are not numbers included."""
    lower, upper = ends
    inside = lower <= upper
    for left, right in curvature_of(op).undefined:
        inside &= (upper <= rounded(left, lower, -1)) | (lower >= rounded(right, lower, 1))
    return ~inside


def is_exact(op: Op, position: int, ends: Ends) -> jax.Array:
    """Where [l, u] lies within one linear piece, so that tighter ends cannot improve the lines, or sigma is flat.

    A curved one is flat if its range on [l, u] is no wider than the rounding errors of its values: two lines at that
    distance are as good as tighter ends could make them. (What is not tightened keeps the ends that are known, which
    hold.)
    """
    lower, upper = ends
    linear = [piece for piece in curvature_of(op).pieces if piece.kind == "linear"]
    found = [(lower >= piece.left) & (upper <= piece.right) for piece in linear]
    if not curvature_of(op).is_piecewise_linear and not any(
        operand[0] == "const" for _, _, operands in op.program.instructions for operand in operands
    ):
        least, most = interval(op, [ends], ())
        size = jnp.maximum(jnp.abs(least), jnp.abs(most))
        found.append((most - least <= _FLAT * _unit(op) * size) & (size < jnp.inf))
    return jnp.any(jnp.stack(found), axis=0) if found else jnp.zeros(jnp.shape(lower), bool)


def planes(op: Op, inputs: Sequence[Ends], constants: Sequence, rule: SlopeRule = ADAPTIVE) -> Planes:
    """Lines with the slopes that a rule chooses, and exact intercepts."""
    ((lower, upper),) = inputs
    finite = jnp.isfinite(lower) & jnp.isfinite(upper)
    low, high = jnp.where(finite, lower, 0), jnp.where(finite, upper, 0)
    hull = functools.partial(hull_slopes, op, low, high, constants)
    chosen = rule.lines(Lines(low, high, hull, functools.partial(support_range, op, low, high, constants)))
    below, above = [jnp.where(finite & (jnp.abs(s) >= jnp.finfo(op.dtype).tiny), s, 0) for s in chosen]
    floor, ceiling = intercepts(op, below, above, low, high, constants)
    least, most = interval(op, inputs, constants)
    floor = _at_least(floor, _outside(op, below, least, low, high))
    ceiling = -_at_least(-ceiling, _outside(op, -above, -most, low, high))
    return Planes((below,), jnp.where(finite, floor, least), (above,), jnp.where(finite, ceiling, most))


def _outside(op: Op, slope: jax.Array, least: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    """The intercept of a line below the whole range: the better one for flat lines far from 0."""
    steps = jnp.maximum(slope * low, slope * high)
    return least - steps - _unit(op) * (jnp.abs(least) + 2 * jnp.abs(steps)) - _lost(op, slope)


def _at_least(value: jax.Array, other: jax.Array | float) -> jax.Array:
    """The larger one; where they are equal the first, derivatives included."""
    return jnp.where(other > value, other, value)


def intercepts(
    op: Op, below: jax.Array, above: jax.Array, lower: jax.Array, upper: jax.Array, constants: Sequence
) -> Ends:
    """Bounds, exact up to rounding, of min sigma(z) - below * z and max sigma(z) - above * z over the interval.

    A subnormal slope may count as 0: `planes` leaves none.
    """
    curvature = curvature_of(op)
    shape = jnp.broadcast_shapes(jnp.shape(below), jnp.shape(above), jnp.shape(lower))
    lower, upper = jnp.broadcast_to(lower, shape), jnp.broadcast_to(upper, shape)
    sides = {1: jnp.broadcast_to(below, shape), -1: jnp.broadcast_to(above, shape)}
    curved = [(_CONVEX[piece.kind], piece) for piece in curvature.pieces if piece.kind in _CONVEX]
    within, bounds = _minima(op, curved, sides, lower, upper, constants)
    points = [lower, upper, *(jnp.clip(p, lower, upper) for p in _borders(curvature))]
    known = len(points)
    points += list(within)
    heights = _values(op, points, constants)
    error = _error(op, points, constants)
    reach = jnp.maximum(jnp.abs(lower), jnp.abs(upper))
    results = []
    for sign, slope in sides.items():
        own = [k for k, (side, _) in enumerate(curved) if side == sign]
        above_line = [sign * (height - slope * point) for height, point in zip(heights, points, strict=True)]
        attained = [*above_line[:known], *(above_line[known + k] for k in own)]
        least = functools.reduce(_lesser, attained)  # of equal ones the end, which moves, before held points
        largest = functools.reduce(jnp.maximum, map(jnp.abs, attained))
        loss = error + _unit(op) * (largest + 2 * jnp.abs(slope) * reach)
        loss = loss + _lost(op, slope)
        rigorous = functools.reduce(jnp.minimum, above_line[:known]) - loss
        if own:
            searched = jnp.min(bounds[np.array(own)], axis=0) - search.LOSS * loss
            rigorous = jnp.minimum(rigorous, searched)
        rigorous = rigorous - _scaled(curvature.slack, reach)
        for cell in curvature.cells:
            left = jnp.clip(rounded(cell.left, lower, -1), lower, upper)
            right = jnp.clip(rounded(cell.right, lower, 1), lower, upper)
            hull = _floor(cell, sign, lower) - jnp.maximum(sign * slope * left, sign * slope * right)
            hull = hull - _unit(op) * (jnp.abs(hull) + 2 * jnp.abs(slope) * reach)
            rigorous = jnp.minimum(rigorous, jnp.where(_meets(cell, lower, upper), hull, jnp.inf))
        rigorous = jax.lax.stop_gradient(jnp.where(jnp.isnan(rigorous), -jnp.inf, rigorous))
        finite = jnp.isfinite(least)
        exact = least + jax.lax.stop_gradient(jnp.where(finite, rigorous - least, 0))
        results.append(sign * jnp.where(finite, exact, rigorous))
    return results[0], results[1]


def hull_slopes(op: Op, lower: jax.Array, upper: jax.Array, constants: Sequence) -> Ends:
    """The slopes, at the midpoint, of the convex and the concave hull of the graph."""
    curvature = curvature_of(op)
    middle = lower / 2 + upper / 2
    if (pair := _two_slopes(op, bool(constants))) is not None:
        return _around_kink(op, pair, lower, middle, upper)
    left, right = _samples(curvature, lower, middle), _samples(curvature, upper, middle)

    def value(z: jax.Array):
        return op.program(z, *constants)

    z_left, z_right = left[:, None], right[None]
    valid = (z_left < middle) & (z_right > middle)
    slope = (value(right)[None] - value(left)[:, None]) / jnp.where(valid, z_right - z_left, 1)
    height = value(left)[:, None] + slope * (middle - z_left)
    pairs = (-1, *jnp.shape(middle))
    lowest = jnp.argmin(jnp.where(valid, height, jnp.inf).reshape(pairs), axis=0)
    highest = jnp.argmax(jnp.where(valid, height, -jnp.inf).reshape(pairs), axis=0)
    best = jnp.stack([lowest, highest])
    start, stop = picked(left, best // len(right)), picked(right, best % len(right))
    near = 0
    if not curvature.is_piecewise_linear:
        start, stop = _touch(op, start, stop, (lower, middle, upper), constants)
        near = _CLOSE * (upper - lower)
    apart = (start < middle - near) & (stop > middle + near) & is_wide(stop - start)
    chord = (value(stop) - value(start)) / jnp.where(apart, stop - start, 1)
    line, graph = value(start) + chord * (middle - start), value(middle)
    bridged = apart & jnp.stack([line[0] <= graph, line[1] >= graph])
    slopes = _within(curvature, jnp.where(bridged, chord, _flattest(op, middle, constants)))
    return slopes[0], slopes[1]


def _around_kink(op: Op, pair: tuple[float, float], lower: jax.Array, middle: jax.Array, upper: jax.Array) -> Ends:
    """The same for two lines: the hull on the kink's side is the line at the midpoint, the other one is the chord."""
    curvature, (left, right) = curvature_of(op), pair
    (kink,) = _borders(curvature)
    at_kink = min(max(0.0, min(pair)), max(pair))
    own = jnp.where(middle < kink, left, jnp.where(middle > kink, right, at_kink)).astype(jnp.result_type(lower))
    wide = is_wide(upper - lower)
    chord = (op.program(upper) - op.program(lower)) / jnp.where(wide, upper - lower, 1)
    chord = _within(curvature, jnp.where(wide, chord, own))
    return (own, chord) if left < right else (chord, own)


def _touch(
    op: Op, start: jax.Array, stop: jax.Array, ends: tuple[jax.Array, jax.Array, jax.Array], constants: Sequence
) -> Ends:
    """Move pairs of sample points to where the lines through them touch the graph, or to the ends of the interval.

    Newton's steps on sigma'(z) = slope, each kept near its sample. (A point off by d tilts the line by order d squared,
    and CROWN's bounds feel that.) `start` and `stop` hold a pair for the convex hull, then one for the concave hull.
    """
    lower, middle, upper = jax.lax.stop_gradient(ends)
    held = jax.lax.stop_gradient(tuple(constants))
    reach = (upper - lower) / (2 * _SAMPLES)
    near = jax.lax.stop_gradient(jnp.stack([start, stop]))
    low, high = jnp.stack([lower, middle])[:, None], jnp.stack([middle, upper])[:, None]
    downhill = jnp.array([1, -1], near.dtype).reshape(2, *[1] * jnp.ndim(lower))

    def move(_: jax.Array, points: jax.Array):
        rise = op.program(points, *held)
        slope = (rise[1] - rise[0]) / jnp.where(points[1] > points[0], points[1] - points[0], 1)
        steepness, bend = jax.jvp(lambda z: _derivative(op, z, held), (points,), (jnp.ones_like(points),))
        step = downhill * (steepness - slope) / jnp.maximum(jnp.abs(bend), jnp.finfo(points.dtype).tiny)
        moved = jnp.clip(points - jnp.clip(step, -reach, reach), near - reach, near + reach)
        return jnp.clip(moved, low, high)

    first, last = rolled(jax.lax.fori_loop)(0, 4, move, near)
    # a point at an end moves with it; elsewhere the line does not change with its point of contact
    return jnp.where(first <= lower, ends[0], first), jnp.where(last >= upper, ends[2], last)


def support_range(op: Op, lower: jax.Array, upper: jax.Array, constants: Sequence, sign: int = 1) -> Ends:
    """The slopes of the convex (sign 1) or concave (-1) hull of the graph at the ends: those outside gain nothing."""
    curvature = curvature_of(op)
    points = jnp.concatenate([_samples(curvature, lower, upper), _samples(curvature, upper, lower)])
    values = op.program(points, *constants)
    ends = []
    for end, choose in ((lower, jnp.min), (upper, jnp.max))[::sign]:
        away = is_wide(jnp.abs(points - end))
        chords = (values - op.program(end, *constants)) / jnp.where(away, points - end, 1)
        slopes = jnp.where(away, chords, _flattest(op, end, constants))
        extreme = choose if sign > 0 else {jnp.min: jnp.max, jnp.max: jnp.min}[choose]
        ends.append(_within(curvature, extreme(slopes, axis=0)))
    return ends[0], jnp.maximum(ends[0], ends[1])


def freedom(op: Op, inputs: Sequence[Ends], constants: Sequence, rule: SlopeRule = ADAPTIVE) -> Freedom:
    """Slopes between those of the hull's ends, closer where the function is flat: contact moves fast there.

    For a function with one kink, what is between two lines is their average. Where the hull is one chord on a side,
    there is no choice.
    """
    ((lower, upper),) = inputs
    finite = jnp.isfinite(lower) & jnp.isfinite(upper)
    low, high = jnp.where(finite, lower, 0), jnp.where(finite, upper, 0)
    chosen = planes(op, inputs, constants, rule)
    curvature = curvature_of(op)
    one_kink = curvature.is_piecewise_linear and len(curvature.pieces) <= 2 and not curvature.cells
    spaced, back = (lambda s: s, lambda s: s) if one_kink else (_root, _squared)
    tables, shares = [], []
    for sign, (own,) in ((1, chosen.lower_slopes), (-1, chosen.upper_slopes)):
        if _is_chord(op, constants, sign):
            tables.append(own[None])
            shares.append(None)
            continue
        ends = support_range(op, low, high, constants, sign)
        first, last = spaced(jnp.minimum(ends[0], own)), spaced(jnp.maximum(ends[1], own))
        (table, _), (share, _) = Freedom.linear(first, last, (spaced(own), first), count=2 if one_kink else _LINES)
        tables.append(back(table))
        shares.append(share)
    return Freedom((tables[0], tables[1]), (shares[0], shares[1]))


def tabulated(op: Op, lower: jax.Array, upper: jax.Array, constants: Sequence, count: int) -> list[jax.Array]:
    """Slopes below and above from one end of the hull to the other, closer where the function is flat."""
    found = []
    for sign in (1, -1):
        first, last = map(_root, support_range(op, lower, upper, constants, sign))
        (table, _), _ = Freedom.linear(first, last, (first, first), count=count)
        found.append(_squared(table))
    return found


def _is_chord(op: Op, constants: Sequence, sign: int) -> bool:
    """Whether the convex hull of the graph is known to be one chord everywhere below (sign 1) or above (-1)."""
    curvature = curvature_of(op)
    if curvature.cells or len(curvature.pieces) == 1:
        return not curvature.cells and curvature.pieces[0].kind == {1: "concave", -1: "convex"}[sign]
    pair = _two_slopes(op, bool(constants))
    return pair is not None and (pair[0] > pair[1]) == (sign > 0)


def _two_slopes(op: Op, has_constants: bool) -> tuple[float, float] | None:
    """The slopes of a function of two lines, left and right of its kink, if they are proved to differ; else None."""
    curvature = curvature_of(op)
    if not curvature.is_piecewise_linear or len(_borders(curvature)) != 1 or has_constants:
        return None
    (kink,) = _borders(curvature)
    ends = np.array([kink - 1, kink]), np.array([kink, kink + 1])
    slopes = enclose(op.program.instructions, *ends).orders[1, 0]
    apart = slopes.upper[0] < slopes.lower[1] or slopes.upper[1] < slopes.lower[0]
    left, right = map(float, slopes.lower / 2 + slopes.upper / 2)
    return (left, right) if apart else None


def _root(slope: jax.Array) -> jax.Array:
    """With its sign; at 0 its derivative is taken as 0."""
    return jnp.sign(slope) * jnp.sqrt(jnp.where(slope == 0, 1, jnp.abs(slope)))


def _squared(root: jax.Array) -> jax.Array:
    """The reverse."""
    return root * jnp.abs(root)


def extreme(
    op: Op, curvature: Curvature, sign: int, lower: jax.Array, upper: jax.Array, constants: Sequence
) -> jax.Array:
    """A lower bound of sign * sigma on [lower, upper]."""
    points = [lower, upper]
    if not curvature.is_monotone:
        points += [jnp.clip(p, lower, upper) for p in (*_borders(curvature), *curvature.critical)]
    elif curvature.is_piecewise_linear:
        points = points[:1] if sign * curvature.is_monotone > 0 else points[1:]
    held = points = jnp.broadcast_arrays(*points)
    if not curvature.is_piecewise_linear:  # an infinite end of a curve has no derivative, not NaN
        still = jax.lax.stop_gradient(points)
        finite = map(jnp.isfinite, _values(op, still, constants))
        held = [jnp.where(which, point, end) for which, point, end in zip(finite, points, still, strict=True)]
    least = least_of([sign * value for value in _values(op, held, constants)])
    reach = jnp.maximum(jnp.abs(lower), jnp.abs(upper))
    slack, kinks = (curvature.wobble, curvature.kinks) if curvature.is_monotone else (curvature.slack, ())
    loss = _error(op, points, constants) + _scaled(slack, reach)
    for point, gap in kinks:
        met = (lower <= rounded(point, lower, 1)) & (upper >= rounded(point, lower, -1))
        loss = loss + jnp.where(met, rounded(gap, lower, 1), 0)
    least = least - jax.lax.stop_gradient(loss)
    for cell in curvature.cells:
        hull = _floor(cell, sign, lower)
        least = jnp.where(_meets(cell, lower, upper), jnp.minimum(least, hull), least)
    nothing = functools.reduce(jnp.logical_or, map(jnp.isnan, (least, lower, upper)))
    return jnp.where(nothing, -jnp.inf, least)


def _minima(
    op: Op, curved: Sequence, sides: dict[int, jax.Array], lower: jax.Array, upper: jax.Array, constants: Sequence
) -> Ends:
    """Near the minima of sign * (sigma(z) - slope * z), each over one convex piece: the points, and bounds of them.

    All pieces are searched together; `curved` holds `(sign, piece)`, and a concave piece has the sign -1.
    """
    if not curved:
        return jnp.zeros((0, *lower.shape), lower.dtype), jnp.zeros((0, *lower.shape), lower.dtype)
    held = jax.lax.stop_gradient(tuple(constants))
    lower, upper = jax.lax.stop_gradient((lower, upper))
    column = lambda values: jnp.array(values, lower.dtype).reshape(-1, *[1] * lower.ndim)  # noqa: E731
    slopes = jax.lax.stop_gradient(jnp.stack([sides[sign] for sign, _ in curved]))
    signs = column([sign for sign, _ in curved])
    limits = (
        column([rounded(piece.left, lower, 1) for _, piece in curved]),
        column([rounded(piece.right, lower, -1) for _, piece in curved]),
    )
    return search.minimize(
        lambda z: signs * (op.program(z, *held) - slopes * z),
        jnp.clip(limits[0], lower, upper), jnp.clip(limits[1], lower, upper), limits,
    )  # fmt: skip


def _samples(curvature: Curvature, end: jax.Array, other: jax.Array) -> jax.Array:
    """Points from an end towards (not including) another: the end, the borders between, and, if curved, a few more."""
    low, high = jnp.minimum(end, other), jnp.maximum(end, other)
    points = [end, *(jnp.clip(p, low, high) for p in _borders(curvature))]
    if not curvature.is_piecewise_linear:
        points += [end + (other - end) * (k / _SAMPLES) for k in range(1, _SAMPLES)]
    return jnp.stack(points)


def _values(op: Op, points: Sequence[jax.Array], constants: Sequence) -> list[jax.Array]:
    """sigma at several points."""
    return _each(op, lambda z: op.program(z, *constants), points)


def _each(op: Op, function: Callable, points: Sequence[jax.Array]) -> list[jax.Array]:
    """What a function made of sigma says of several points: of all at once, for a curved one is much to compile.

    Of lines it is little, and XLA makes one loop of all that is not stacked.
    """
    one_by_one = curvature_of(op).is_piecewise_linear
    return [function(point) for point in points] if one_by_one else list(function(jnp.stack(points)))


def _lesser(one: jax.Array, other: jax.Array) -> jax.Array:
    """The smaller one, NaN if there is any; of equal ones the first, derivatives included."""
    return jnp.where((other < one) | jnp.isnan(other), other, one)


def _borders(curvature: Curvature) -> tuple[float, ...]:
    """The finite ends of the pieces, each once."""
    ends = {end for piece in curvature.pieces for end in (piece.left, piece.right)}
    return tuple(sorted(end for end in ends if abs(end) < float(np.finfo(np.float32).max)))


def _derivative(op: Op, z: jax.Array, constants: Sequence) -> jax.Array:
    return jax.jvp(lambda t: op.program(t, *constants), (z,), (jnp.ones_like(z),))[1]


def _flattest(op: Op, z: jax.Array, constants: Sequence) -> jax.Array:
    """The slope nearest to 0 between those on both sides of a point; the derivative where it is not at a switch."""
    curvature = curvature_of(op)
    switches = (*_borders(curvature), *curvature.switches)
    if not switches:
        return _derivative(op, z, constants)
    unit = _NEAR * _unit(op)
    scales = [jnp.where(jnp.abs(z - p) < unit * max(1, abs(p)), unit * max(1, abs(p)), 0) for p in switches]
    step = jax.lax.stop_gradient(functools.reduce(jnp.maximum, scales)).astype(z.dtype)
    one, other = _each(op, lambda z: _derivative(op, z, constants), [z - step, z + step])
    return jnp.clip(0, jnp.minimum(one, other), jnp.maximum(one, other))


def _within(curvature: Curvature, slope: jax.Array) -> jax.Array:
    """Slopes of difference quotients are noisy on short intervals; they stay within those of sigma."""
    flattest, steepest = curvature.slope_range
    slope = jnp.clip(slope, rounded(flattest, slope, -1), rounded(steepest, slope, 1))
    return jnp.where(jnp.isfinite(slope), slope, 0)


def _meets(cell: Cell, lower: jax.Array, upper: jax.Array) -> jax.Array:
    """Whether an interval meets a cell, which is open."""
    return (lower < rounded(cell.right, lower, 1)) & (upper > rounded(cell.left, lower, -1))


def _floor(cell: Cell, sign: int, like: Any) -> float:
    """A lower bound of sign * sigma in a cell."""
    return rounded(cell.lower, like, -1) if sign > 0 else -rounded(cell.upper, like, 1)


def rounded(value: float, like: Any, direction: int) -> float:
    """A float64 number in the dtype of an array, rounded down (-1) or up (+1) where it does not fit."""
    limits = jnp.finfo(jnp.result_type(like))
    if abs(value) > float(limits.max):
        return math.copysign(math.inf if value * direction > 0 else float(limits.max), value)
    rounded = np.asarray(value, limits.dtype)
    if (float(rounded) - value) * direction >= 0:
        return float(rounded)
    return float(np.nextafter(rounded, np.asarray(direction * np.inf, limits.dtype)))


def _error(op: Op, points: Sequence[jax.Array], constants: Sequence) -> jax.Array | float:
    """A bound on the error of evaluating sigma at any of these points."""
    if not evaluation.makes_error(op.program, jnp.result_type(points[0])):
        return 0.0
    still, held = jax.lax.stop_gradient((list(points), tuple(constants)))
    return functools.reduce(jnp.maximum, _each(op, lambda z: evaluation.error(op.program, z, held), still))


def _lost(op: Op, slope: jax.Array) -> jax.Array:
    """What a product with a slope may lose where it, or the other factor, is subnormal and counts as 0."""
    return jnp.finfo(op.dtype).tiny * (1 + jnp.abs(slope))


def _scaled(slack: float, reach: jax.Array):
    return slack * jnp.maximum(1, reach) if slack else 0.0


def _unit(op: Op) -> float:
    return float(jnp.finfo(op.dtype).eps)
