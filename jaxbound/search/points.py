"""Counterexamples: points of the region, rounded inward, at which the network itself violates the property.

An attack goes down, for every clause, the largest of its rows `outputs @ y + inputs @ x - offsets`: all hold where it
is not positive. What counts is the network as the user runs it: every candidate is run once more by itself, and the
property decides in exact arithmetic.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxbound._compat import eager_jit
from jaxbound.backend.caches import kept
from jaxbound.certificates.properties import Property
from jaxbound.regions import Box, LpBall, Region
from jaxbound.relaxations import affine, interval
from jaxbound.search.goals import Goal
from jaxbound.search.skeletons import Skeleton

Array = np.ndarray

_SHORTEST, _FINEST = 0.01, 1e-4
"""The last step of an attack, as a part of the first; and of a search for the least value."""
_TOGETHER = 64
"""Points that one run of a program takes."""


class Ends(NamedTuple):
    """The floats within a region whose ends are float64; where there is none, the nearest one."""

    lower: Array
    upper: Array
    inside: bool
    """Whether every coordinate has one inside."""


def inward(lower: Array, upper: Array, dtype: DTypeLike) -> Ends:
    """The ends of a region in a dtype, rounded inward."""
    low, high = lower.astype(dtype), upper.astype(dtype)
    low = np.where(low < lower, np.nextafter(low, np.array(np.inf, dtype)), low)
    high = np.where(high > upper, np.nextafter(high, np.array(-np.inf, dtype)), high)
    nearest = (lower / 2 + upper / 2).astype(dtype)
    void = low > high
    return Ends(np.where(void, nearest, low), np.where(void, nearest, high), not bool(void.any()))


def exact_ends(region: Region) -> tuple[Array, Array]:
    """The ends of a box in float64, of a ball rounded inward where float64 does not hold them."""
    if isinstance(region, Box):
        return np.asarray(region.lower, np.float64), np.asarray(region.upper, np.float64)
    assert isinstance(region, LpBall)
    center, radius = np.asarray(region.center, np.float64), np.asarray(region.radius, np.float64)
    radius = radius.reshape(radius.shape + (1,) * (center.ndim - radius.ndim))
    low, high = -_sum_down(-center, radius), _sum_down(center, radius)
    if region.clip is not None:
        low, high = np.maximum(low, np.asarray(region.clip[0], np.float64)), np.minimum(high, region.clip[1])
    return low, high


def _sum_down(a: Array, b: Array) -> Any:
    """`a + b` rounded down, by Knuth's error-free sum."""
    total = a + b
    rest = total - a
    error = (a - (total - rest)) + (b - rest)
    return np.where(error < 0, np.nextafter(total, -np.inf), total)


def value(skeleton: Skeleton, constants: Sequence[jax.Array], x: jax.Array) -> jax.Array:
    """The network's value at a point, up to rounding."""
    values = [x]
    for node in skeleton.nodes[1:]:
        own, read = [constants[k] for k in node.constants], [values[k] for k in node.inputs]
        if node.op.kind == "affine":
            values.append(affine.apply(node.op, read, own))
        elif node.op.kind == "scalar":
            values.append(node.op.program(read[0], *own))
        else:
            values.append(interval.node(node.op, [(part, part) for part in read], own, outward=False)[0])
    return values[skeleton.output]


@kept(64)
def _compiled_value(skeleton: Skeleton) -> Callable:
    return eager_jit(functools.partial(value, skeleton))


Counterexample = tuple[Array, Array]
"""A point and the network's outputs there."""


class Attack:
    """Looks for counterexamples of one property over one region."""

    def __init__(
        self,
        fn: Callable | None,
        prop: Property,
        goal: Goal,
        ends: Ends,
        shape: tuple[int, ...],
        skeleton: Skeleton,
        constants: Sequence[jax.Array],
    ):
        self.fn = fn or functools.partial(_compiled_value(skeleton), constants)
        self.prop, self.goal, self.ends, self.shape = prop, goal, ends, tuple(shape)
        self.arrays = (constants, *(None if a is None else jnp.asarray(a) for a in goal[:3]))
        self.skeleton = skeleton

    def confirmed(self, point: Array) -> Counterexample | None:
        """A point and the network's outputs there, if they violate the property; both of the network's dtype."""
        x = np.clip(point.reshape(self.shape), self.ends.lower, self.ends.upper).astype(self.ends.lower.dtype)
        y = np.asarray(self.fn(jnp.asarray(x)))
        return (x, y) if self.prop.violated(x, y) else None

    def among(self, points: Array) -> Counterexample | None:
        """The first confirmed counterexample among some points, best first."""
        program, rows = _margins(self.skeleton, self.shape), jnp.asarray(self.goal.clause)
        parts = [(part, program(self.arrays, _filled(part), rows)) for part in _parts(points)]
        margins = np.concatenate([np.asarray(found)[: len(part)] for part, found in parts])
        for k in np.argsort(margins)[:3]:
            if margins[k] <= _near(self.goal):
                found = self.confirmed(points[k])
                if found is not None:
                    return found
        return None

    def descend(self, key: jax.Array, steps: int, starts: int, stop: Callable[[], bool]) -> Counterexample | None:
        """Descend from random points, some for every clause, until one is a counterexample."""
        for best, margins in self._descents(key, steps, starts, stop):
            for k in np.argsort(margins)[:3]:
                found = self.confirmed(best[k]) if margins[k] <= _near(self.goal) else None
                if found is not None:
                    return found
        return None

    def least(self, key: jax.Array, steps: int, starts: int, stop: Callable[[], bool]) -> Array:
        """The least margin of every clause that descents from random points came to, up to rounding; (clauses,)."""
        starts = max(starts, 2 * self.goal.count)
        least = np.full(self.goal.count, np.inf)
        for _, margins in self._descents(key, steps, starts, stop, _FINEST):
            np.minimum.at(least, np.arange(starts) % self.goal.count, margins)
        return least

    def _descents(self, key: jax.Array, steps: int, starts: int, stop: Callable[[], bool], shortest: float = _SHORTEST):
        """The best points and their margins, now and then; start k belongs to clause k modulo their number."""
        size = self.ends.lower.size
        clause = np.arange(starts) % self.goal.count
        low, high = (end.reshape(size) for end in self.ends[:2])
        generator = np.random.default_rng(np.asarray(jax.random.key_data(key)).tolist())
        part = generator.random((starts, size))
        part[: self.goal.count] = 0.5
        x = np.clip(low + part * (high - low), low, high).astype(low.dtype)
        clauses = [jnp.asarray(_filled(own)) for own in _parts(clause)]
        states = [(own := jnp.asarray(_filled(some)), own, np.full(_TOGETHER, np.inf, low.dtype)) for some in _parts(x)]
        step, rows = _descend(self.skeleton, self.shape), jnp.asarray(self.goal.clause)
        for number in range(steps):
            if stop():
                break
            length = np.asarray(0.25 * shortest ** (number / max(1, steps - 1)), low.dtype)
            pairs = zip(clauses, states, strict=True)
            states = [step(self.arrays, (low, high), rows, own, length, state) for own, state in pairs]
            if number % 10 == 9 or number == steps - 1:
                yield tuple(np.concatenate([state[k] for state in states])[:starts] for k in (1, 2))


def _parts(array: Array) -> list[Array]:
    """Rows of an array, so many at once: points come in any number, and programs are compiled for one."""
    return [array[start : start + _TOGETHER] for start in range(0, len(array), _TOGETHER)]


def _filled(part: Array) -> Array:
    return part[np.arange(_TOGETHER) % len(part)]


def _near(goal: Goal) -> float:
    """How far above zero a computed margin may be that exact arithmetic still calls a violation."""
    return 1e-6 * (1 + float(np.abs(goal.offsets).max()))


def _rows(skeleton: Skeleton, shape: tuple[int, ...], arrays: tuple, x: jax.Array):
    constants, outputs, inputs, offsets = arrays
    x = x.reshape(shape)
    y = value(skeleton, constants, x)
    rows = outputs @ jnp.ravel(y) - offsets
    return rows if inputs is None else rows + inputs @ jnp.ravel(x)


@kept(64)
def _margins(skeleton: Skeleton, shape: tuple[int, ...]) -> Callable:
    def margin(arrays: tuple, x: jax.Array, clause: jax.Array):
        rows = _rows(skeleton, shape, arrays, x)
        most = jax.ops.segment_max(rows, clause, num_segments=len(rows))
        return jnp.min(jnp.where(jnp.arange(len(rows)) <= clause[-1], most, jnp.inf))

    return eager_jit(jax.vmap(margin, in_axes=(None, 0, None)))


@kept(64)
def _descend(skeleton: Skeleton, shape: tuple[int, ...]) -> Callable:
    def loss(x: jax.Array, arrays: tuple, rows: jax.Array, clause: jax.Array):
        values = _rows(skeleton, shape, arrays, x)
        own = rows == clause
        margin = jnp.max(jnp.where(own, values, -jnp.inf))
        return margin + jnp.sum(jnp.where(own, jnp.maximum(values, 0), 0)), margin

    def step(
        arrays: tuple,
        box: tuple[jax.Array, jax.Array],
        rows: jax.Array,
        clause: jax.Array,
        length: jax.Array,
        state: tuple,
    ):
        x, best, least = state
        (_, margin), gradient = jax.value_and_grad(loss, has_aux=True)(x, arrays, rows, clause)
        better = margin < least
        best, least = jnp.where(better, x, best), jnp.where(better, margin, least)
        moved = x - length * (box[1] - box[0]) * jnp.sign(jnp.where(jnp.isfinite(gradient), gradient, 0))
        return jnp.clip(moved, *box), best, least

    return eager_jit(jax.vmap(step, in_axes=(None, None, None, 0, None, 0)))
