"""Counterexamples: points of the region, rounded inward, at which the network itself violates the property.

An attack goes down, for every clause, the largest of its rows `outputs @ y + inputs @ x - offsets`: all hold where it
is not positive. What counts is the network as the user runs it: every candidate is run once more by itself, and the
property decides in exact arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbound._compat import eager_jit
from jaxbound.backend.caches import kept
from jaxbound.certificates.properties import Property
from jaxbound.relaxations import affine
from jaxbound.search.goals import Goal
from jaxbound.search.skeletons import Skeleton

Array = np.ndarray

_SHORTEST = 0.01
"""The last step of an attack, as a part of the first."""


class Ends(NamedTuple):
    """The floats within a region whose ends are float64; where there is none, the nearest one."""

    lower: Array
    upper: Array
    inside: bool
    """Whether every coordinate has one inside."""


def inward(lower: Array, upper: Array, dtype) -> Ends:
    """The ends of a region in a dtype, rounded inward."""
    low, high = lower.astype(dtype), upper.astype(dtype)
    low = np.where(low < lower, np.nextafter(low, np.array(np.inf, dtype)), low)
    high = np.where(high > upper, np.nextafter(high, np.array(-np.inf, dtype)), high)
    nearest = (lower / 2 + upper / 2).astype(dtype)
    void = low > high
    return Ends(np.where(void, nearest, low), np.where(void, nearest, high), not bool(void.any()))


def value(skeleton: Skeleton, constants, x: jax.Array) -> jax.Array | None:
    """The network's value at a point; None if it has other nodes than affine and scalar ones."""
    values = [x]
    for node in skeleton.nodes[1:]:
        own, read = [constants[k] for k in node.constants], [values[k] for k in node.inputs]
        if node.op.kind == "affine":
            values.append(affine.apply(node.op, read, own))
        elif node.op.kind == "scalar":
            values.append(node.op.program(read[0], *own))
        else:
            return None
    return values[skeleton.output]


Counterexample = tuple[Array, Array]
"""A point and the network's outputs there."""


class Attack:
    """Looks for counterexamples of one property over one region."""

    def __init__(self, fn: Callable, prop: Property, goal: Goal, ends: Ends, shape, skeleton: Skeleton, constants):
        self.fn, self.prop, self.goal, self.ends, self.shape = fn, prop, goal, ends, tuple(shape)
        self.arrays = (constants, *(None if a is None else jnp.asarray(a) for a in goal[:3]))
        known = jax.eval_shape(lambda c: value(skeleton, c, jnp.zeros(shape, ends.lower.dtype)), constants)
        self.network = (skeleton, None) if known is not None else (None, fn)

    def confirmed(self, point: Array) -> Counterexample | None:
        """A point and the network's outputs there, if they violate the property; both of the network's dtype."""
        x = np.clip(point.reshape(self.shape), self.ends.lower, self.ends.upper).astype(self.ends.lower.dtype)
        y = np.asarray(self.fn(jnp.asarray(x)))
        return (x, y) if self.prop.violated(x, y) else None

    def among(self, points: Array) -> Counterexample | None:
        """The first confirmed counterexample among some points, best first."""
        margins = np.asarray(_margins(*self.network, self.shape)(self.arrays, points, jnp.asarray(self.goal.clause)))
        for k in np.argsort(margins)[:3]:
            if margins[k] <= _near(self.goal):
                found = self.confirmed(points[k])
                if found is not None:
                    return found
        return None

    def descend(self, key: jax.Array, steps: int, starts: int, stop: Callable[[], bool]) -> Counterexample | None:
        """Descend from random points, some for every clause."""
        size = self.ends.lower.size
        clause = np.arange(starts) % self.goal.count
        low, high = (end.reshape(size) for end in self.ends[:2])
        generator = np.random.default_rng(np.asarray(jax.random.key_data(key)).tolist())
        part = generator.random((starts, size))
        part[: self.goal.count] = 0.5
        x = jnp.asarray(np.clip(low + part * (high - low), low, high).astype(low.dtype))
        state = x, x, np.full(starts, np.inf, low.dtype)
        step, rows = _descend(*self.network, self.shape), jnp.asarray(self.goal.clause)
        for number in range(steps):
            if stop():
                break
            length = np.asarray(0.25 * _SHORTEST ** (number / max(1, steps - 1)), low.dtype)
            state = step(self.arrays, (low, high), rows, clause, length, state)
            if number % 10 == 9 or number == steps - 1:
                best, margins = np.asarray(state[1]), np.asarray(state[2])
                for k in np.argsort(margins)[:3]:
                    found = self.confirmed(best[k]) if margins[k] <= _near(self.goal) else None
                    if found is not None:
                        return found
        return None


def _near(goal: Goal) -> float:
    """How far above zero a computed margin may be that exact arithmetic still calls a violation."""
    return 1e-6 * (1 + float(np.abs(goal.offsets).max()))


def _rows(network, fn, shape, arrays, x):
    constants, outputs, inputs, offsets = arrays
    x = x.reshape(shape)
    y = fn(x) if network is None else value(network, constants, x)
    assert y is not None
    rows = outputs @ jnp.ravel(y) - offsets
    return rows if inputs is None else rows + inputs @ jnp.ravel(x)


@kept(64)
def _margins(network, fn, shape) -> Callable:
    def margin(arrays, x, clause):
        rows = _rows(network, fn, shape, arrays, x)
        most = jax.ops.segment_max(rows, clause, num_segments=len(rows))
        return jnp.min(jnp.where(jnp.arange(len(rows)) <= clause[-1], most, jnp.inf))

    return eager_jit(jax.vmap(margin, in_axes=(None, 0, None)))


@kept(64)
def _descend(network, fn, shape) -> Callable:
    def loss(x, arrays, rows, clause):
        values = _rows(network, fn, shape, arrays, x)
        own = rows == clause
        margin = jnp.max(jnp.where(own, values, -jnp.inf))
        return margin + jnp.sum(jnp.where(own, jnp.maximum(values, 0), 0)), margin

    def step(arrays, box, rows, clause, length, state):
        x, best, least = state
        (_, margin), gradient = jax.value_and_grad(loss, has_aux=True)(x, arrays, rows, clause)
        better = margin < least
        best, least = jnp.where(better, x, best), jnp.where(better, margin, least)
        moved = x - length * (box[1] - box[0]) * jnp.sign(jnp.where(jnp.isfinite(gradient), gradient, 0))
        return jnp.clip(moved, *box), best, least

    return eager_jit(jax.vmap(step, in_axes=(None, None, None, 0, None, 0)))
