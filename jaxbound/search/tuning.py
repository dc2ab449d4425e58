"""Bounds of domains whose neurons are cut, with slopes and multipliers that are tuned: compiled steps for a batch.

A multiplier above 0 counts the lower end of what a neuron was cut to, one below 0 the upper end:

    row  >=  <C, z> + c   implies   row  >=  <C - m, z> + c + m point,   point = low where m > 0, high where m < 0.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxbound._compat import eager_jit
from jaxbound.certificates.proofs.files import STEPS
from jaxbound.relaxations import affine
from jaxbound.relaxations.planes import Planes
from jaxbound.search import passes
from jaxbound.search.passes import Domain
from jaxbound.search.rectifiers import rectifier_planes
from jaxbound.search.skeletons import Skeleton


class Tuned(NamedTuple):
    """Slopes of ReLUs (of no use to others) and multipliers, (domains, rows, neurons)."""

    slopes: Any
    multipliers: Any


class Cuts(NamedTuple):
    """Between which points neurons were cut, (domains, neurons); infinite where they were not."""

    low: Any
    high: Any


class Result(NamedTuple):
    """Of each domain: certain lower bounds (rows,), scores of neurons, the point where the best row is least."""

    lower: jax.Array
    scores: jax.Array
    points: jax.Array


class Ready(NamedTuple):
    """What does not change while a domain is tuned."""

    ends: dict
    planes: dict
    scale: jax.Array
    """What a multiplier is measured in, (rows, neurons)."""


class State(NamedTuple):
    """A tuning: parameters, moments, and the best of each row."""

    parameters: Tuned
    moments: optax.OptState
    best: jax.Array
    kept: Tuned


_OPTIMIZER = optax.scale_by_adam()


def _cut(skeleton: Skeleton, known: dict, cuts: Cuts) -> dict:
    """What is known of values, and of the cuts."""
    known = dict(known)
    lows, highs = (_parts(skeleton, part) for part in cuts)
    for k, z in enumerate(skeleton.place_inputs):
        low, high = known[z]
        known[z] = jnp.maximum(low, lows[k]), jnp.minimum(high, highs[k])
    return known


def _parts(skeleton: Skeleton, flat: jax.Array) -> list[jax.Array]:
    """The entries of every value that may be cut, from flat ones (..., neurons)."""
    shapes = [skeleton.nodes[z].op.shape for z in skeleton.place_inputs]
    sizes = np.cumsum([int(np.prod(shape)) for shape in shapes])[:-1]
    parts = jnp.split(flat, sizes, axis=-1)
    return [part.reshape(*part.shape[:-1], *shape) for part, shape in zip(parts, shapes, strict=True)]


def _made(skeleton: Skeleton, arrays, cuts: Cuts, tuned: Tuned, *, outward: bool) -> Domain:
    """A domain from its box and what is known."""
    constants, box, known = arrays
    known = _cut(skeleton, {0: box, **known}, cuts)
    slopes = dict(zip(skeleton.places, _parts(skeleton, tuned.slopes), strict=True))
    domain = Domain(skeleton, constants, known[0], outward=outward)
    for block in skeleton.structure.blocks:
        domain.add(block, known, slopes.get(block.start))
    return domain


def _usable(multipliers: jax.Array, cuts: Cuts) -> jax.Array:
    """Multipliers of ends that there are: 0 instead of others."""
    held = jnp.where(multipliers > 0, cuts.low, jnp.where(multipliers < 0, cuts.high, jnp.inf))
    return jnp.where(jnp.isfinite(held), multipliers, 0)


def _held(multipliers: jax.Array, cuts: Cuts) -> jax.Array:
    """The points that usable multipliers hold neurons to, or would, if they are 0."""
    below = (multipliers < 0) | (multipliers == 0) & jnp.isinf(cuts.low)
    held = jnp.where(below, cuts.high, cuts.low)
    return jnp.where(jnp.isfinite(held), held, 0)


def _added(skeleton: Skeleton, multipliers: jax.Array) -> dict:
    """What multipliers add to the coefficients of values."""
    added: dict = {}
    for z, part in zip(skeleton.place_inputs, _parts(skeleton, multipliers), strict=True):
        added[z] = -part if z not in added else added[z] - part
    return added


def _lower(skeleton: Skeleton, arrays, cuts: Cuts, rows, ready: Ready, tuned: Tuned) -> jax.Array:
    domain = Domain(skeleton, arrays[0], ready.ends[0], outward=False)
    domain.ends, domain.planes = ready.ends, dict(ready.planes)
    slopes = _parts(skeleton, tuned.slopes)
    for number, z, slope in zip(skeleton.places, skeleton.place_inputs, slopes, strict=True):
        if number in skeleton.rectifiers:
            low, high = ready.ends[z]
            domain.planes[number] = rectifier_planes(low, high, slope)
    multipliers = tuned.multipliers * ready.scale
    start, intercept = passes.started(skeleton, rows)
    intercept = intercept + jnp.sum(multipliers * _held(multipliers, cuts), axis=1)
    return domain.bound(start, intercept, _added(skeleton, multipliers)).lower


def _batched(function, axes):
    """A step for a batch of domains, compiled for every network and option."""
    return functools.lru_cache(64)(
        lambda *static: eager_jit(jax.vmap(functools.partial(function, *static), in_axes=axes))
    )


def _ready_one(skeleton, arrays, cuts, rows, tuned):
    domain = _made(skeleton, arrays, cuts, tuned, outward=False)
    start, intercept = passes.started(skeleton, rows)
    met = domain.bound(start, intercept, watch=True).met
    scale = []
    for number in skeleton.places:
        rows_there = jnp.abs(met[number]).reshape(met[number].shape[0], -1)
        largest = jnp.max(rows_there, axis=1, keepdims=True)
        scale.append(jnp.broadcast_to(largest, rows_there.shape))
    scale = jnp.maximum(jnp.concatenate(scale, axis=1), 1e-6)
    planes = {k: planes for k, planes in domain.planes.items() if k not in skeleton.rectifiers}
    return Ready(domain.ends, planes, scale)


def _start_one(_skeleton, tuned: Tuned, ready: Ready):
    parameters = Tuned(tuned.slopes, tuned.multipliers / ready.scale)
    best = jnp.full(tuned.slopes.shape[0], -jnp.inf, tuned.slopes.dtype)
    return State(parameters, _OPTIMIZER.init(parameters), best, tuned)


def _ascend_one(skeleton, arrays, cuts, rows, ready: Ready, state: State, rate):
    def loss(parameters):
        lower = _lower(skeleton, arrays, cuts, rows, ready, parameters)
        return -jnp.sum(jnp.where(jnp.isfinite(lower), lower, 0)), lower

    (_, lower), gradient = jax.value_and_grad(loss, has_aux=True)(state.parameters)
    now = Tuned(state.parameters.slopes, state.parameters.multipliers * ready.scale)
    better = lower > state.best
    kept = jax.tree.map(lambda new, old: jnp.where(better[:, None], new, old), now, state.kept)
    gradient = jax.tree.map(lambda leaf: jnp.where(jnp.isfinite(leaf), leaf, 0), gradient)
    updates, moments = _OPTIMIZER.update(gradient, state.moments)
    moved = jax.tree.map(lambda old, update: old - rate * update, state.parameters, updates)
    moved = Tuned(jnp.clip(moved.slopes, 0, 1), _usable(moved.multipliers, cuts))
    return State(moved, moments, jnp.where(better, lower, state.best), kept)


def _certain_one(skeleton, outward, arrays, cuts, rows, tuned: Tuned):
    multipliers = _usable(tuned.multipliers, cuts)
    tuned = Tuned(jnp.round(tuned.slopes * STEPS) / STEPS, multipliers)  # as certificates store them
    domain = _made(skeleton, arrays, cuts, tuned, outward=outward)
    start, intercept = passes.started(skeleton, rows)
    held = _held(multipliers, cuts)
    intercept = intercept + jnp.sum(multipliers * held, axis=1)
    if outward:  # 0 where all points are
        size = jnp.sum(affine.enlarged(multipliers) * affine.enlarged(held), axis=1)
        intercept = intercept - 2 * affine.gamma(multipliers.shape[1] + 4, size.dtype) * size
    found = domain.bound(start, intercept, _added(skeleton, multipliers), watch=True)
    best = jnp.argmax(found.lower)
    scores = []
    for number, z in zip(skeleton.places, skeleton.place_inputs, strict=True):
        row, planes = jnp.take(found.met[number], best, axis=0), domain.planes[number]
        if number in skeleton.rectifiers:
            height = planes.upper_intercept
            height = height if height.ndim == row.ndim else jnp.take(height, best, axis=0)  # slopes of rows' own
            scores.append(jnp.ravel(jnp.maximum(-row, 0) * height))
        else:
            scores.append(jnp.ravel(jnp.abs(row) * _gap(planes, domain.ends[z])))
    slope = jnp.take(found.inputs, best, axis=0)
    return Result(found.lower, jnp.concatenate(scores), jnp.where(slope > 0, *arrays[1]))


def _gap(planes: Planes, ends) -> jax.Array:
    """How far planes are apart in the middle of an interval."""
    middle = ends[0] / 2 + ends[1] / 2
    gap = (planes.upper_slopes[0] - planes.lower_slopes[0]) * middle + planes.upper_intercept - planes.lower_intercept
    return jnp.where(jnp.isfinite(gap), jnp.maximum(gap, 0), 0)


ready = _batched(_ready_one, (None, 0, 0, 0))
start = _batched(_start_one, (0, 0))
ascend = _batched(_ascend_one, (None, 0, 0, 0, 0, None))
certain = _batched(_certain_one, (None, 0, 0, 0))
