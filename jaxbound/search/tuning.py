"""Bounds of domains whose neurons are cut, with lines and multipliers that are tuned: compiled steps for a batch.

Which lines is said by shares in [0, 1]. A ReLU's share is the slope of its lower line. Another function's are places in
tables of lines around it, below and above; steps take averages of a table's lines, and the bound that counts takes
lines with those slopes.

A multiplier above 0 counts the lower end of what a neuron was cut to, one below 0 the upper end:

    row  >=  <C, z> + c   implies   row  >=  <C - m, z> + c + m point,   point = low where m > 0, high where m < 0.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxbound._compat import eager_jit
from jaxbound.backend.tracing import inlined
from jaxbound.certificates.proofs.files import STEPS
from jaxbound.methods.ascent import mixed
from jaxbound.relaxations import affine
from jaxbound.relaxations.planes import Planes, between
from jaxbound.search import passes
from jaxbound.search.passes import Domain
from jaxbound.search.rectifiers import rectifier_planes
from jaxbound.search.skeletons import Skeleton

Ends = tuple[jax.Array, jax.Array]
Rows = Sequence[jax.Array | None]
Arrays = tuple[Sequence[jax.Array], Sequence[jax.Array], dict[int, Ends]]
"""Constants, the ends of the region, and what is known of other values."""


class Tuned(NamedTuple):
    """What is tuned, (domains, rows, neurons); a share that is NaN is CROWN's own."""

    below: Any
    """Shares of all neurons."""
    above: Any
    """Shares of those that are not ReLUs."""
    multipliers: Any


class Cuts(NamedTuple):
    """Between which points neurons were cut, infinite where they were not; and between which they lie, for whatever
    reason; (domains, neurons)."""

    low: Any
    high: Any
    least: Any
    most: Any


class Result(NamedTuple):
    """Of each domain: certain lower bounds (rows,), scores of neurons; the best row's slopes, and where it is least."""

    lower: jax.Array
    scores: jax.Array
    slopes: jax.Array
    points: jax.Array


class Ready(NamedTuple):
    """What does not change while a domain is tuned."""

    ends: dict
    planes: dict
    tables: dict
    """Of functions that are not ReLUs: planes in tables, and which of them CROWN takes."""
    scale: jax.Array
    """What a multiplier is measured in, (rows, neurons)."""


class State(NamedTuple):
    """A tuning: parameters, moments, and the best of each row."""

    parameters: Tuned
    moments: optax.OptState
    best: jax.Array
    kept: Tuned


_OPTIMIZER = optax.scale_by_adam()


def _known_one(skeleton: Skeleton, known: dict, cuts: Cuts) -> dict:
    """What is known of values, and of the cuts."""
    known = dict(known)
    lows, highs = (_parts(skeleton, part) for part in (cuts.least, cuts.most))
    for k, z in enumerate(skeleton.place_inputs):
        low, high = known[z]
        known[z] = jnp.maximum(low, lows[k]), jnp.minimum(high, highs[k])
    return known


def _parts(skeleton: Skeleton, flat: jax.Array, places: tuple[int, ...] | None = None) -> list[jax.Array]:
    """The entries of every place (or of some), from flat ones (..., neurons)."""
    shapes = [skeleton.nodes[number].op.shape for number in (skeleton.places if places is None else places)]
    sizes = np.cumsum([int(np.prod(shape)) for shape in shapes])[:-1]
    parts = jnp.split(flat, sizes, axis=-1) if shapes else []
    return [part.reshape(*part.shape[:-1], *shape) for part, shape in zip(parts, shapes, strict=True)]


def _shares(skeleton: Skeleton, tuned: Tuned) -> dict[int, tuple]:
    """Of every place, below and above; of a ReLU below alone."""
    below = dict(zip(skeleton.places, _parts(skeleton, tuned.below), strict=True))
    above = zip(skeleton.curved, _parts(skeleton, tuned.above, skeleton.curved), strict=True)
    return {number: (share,) for number, share in below.items()} | {k: (below[k], share) for k, share in above}


def _slopes_one(skeleton: Skeleton, tables: dict, tuned: Tuned) -> dict[int, tuple]:
    """Of every place, what `Domain.relax` takes; those of ReLUs as certificates store them."""
    shares = _shares(skeleton, tuned)
    found: dict[int, tuple] = {k: (jnp.round(shares[k][0] * STEPS) / STEPS,) for k in skeleton.rectifiers}
    for number, (table, _) in tables.items():
        below, above = shares[number]
        found[number] = between(table.lower_slopes[0], below), between(table.upper_slopes[0], above)
    return found


def _bounded(skeleton: Skeleton, arrays: Arrays, cuts: Cuts, *, outward: bool) -> tuple[Domain, dict]:
    """Domains that know nothing yet, and what is known of them."""
    constants, box, known = arrays
    known = _known(skeleton)({0: box, **known}, cuts)
    return Domain(skeleton, constants, known[0], outward=outward), known


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


def _lower(skeleton: Skeleton, arrays: Arrays, cuts: Cuts, rows: Rows, ready: Ready, tuned: Tuned) -> jax.Array:
    domain = Domain(skeleton, arrays[0], ready.ends[0], outward=False)
    ends = {number: ready.ends[z] for number, z in zip(skeleton.places, skeleton.place_inputs, strict=True)}
    domain.learn(ready.planes | _planes(skeleton, ready.tables, ends, tuned), ready.ends)
    multipliers = tuned.multipliers * ready.scale
    start, intercept = passes.started(skeleton, rows)
    intercept = intercept + jnp.sum(multipliers * _held(multipliers, cuts), axis=1)
    return domain.bound(start, intercept, _added(skeleton, multipliers)).lower


def _batched(function: Callable, axes: tuple):
    """A step for a batch of domains, compiled for every network and option."""
    return functools.lru_cache(64)(
        lambda *static: eager_jit(inlined(jax.vmap(functools.partial(function, *static), in_axes=axes)))
    )


def ready(skeleton: Skeleton, arrays: Arrays, cuts: Cuts, rows: Rows, tuned: Tuned) -> tuple[Ready, State]:
    """What does not change while domains are tuned, and where tuning begins."""
    domain, tables, tuned = _relaxed(skeleton, arrays, cuts, tuned)
    met = domain.bound(*passes.started(skeleton, rows), watch=True).met
    met = {number: met[number] for number in skeleton.places}
    planes = {number: planes for number, planes in domain.planes.items() if number not in skeleton.places}
    return _begun(skeleton)(domain.ends, planes, tables, met, tuned)


def tried(skeleton: Skeleton, arrays: Arrays, cuts: Cuts, rows: Rows, tuned: Tuned) -> jax.Array:
    """Lower bounds without a step of tuning, and without rounding."""
    domain, _, tuned = _relaxed(skeleton, arrays, cuts, tuned)
    added, intercept = _held_rows(skeleton, False)(cuts, rows, tuned.multipliers)
    start, _ = passes.started(skeleton, rows)
    return domain.bound(start, intercept, added, watch=True).lower


def _relaxed(skeleton: Skeleton, arrays: Arrays, cuts: Cuts, tuned: Tuned) -> tuple[Domain, dict, Tuned]:
    """Domains with averages of the tables' lines, the tables, and no share that is NaN."""
    domain, known = _bounded(skeleton, arrays, cuts, outward=False)
    tables = {}
    for block in skeleton.structure.blocks:
        if block.start in skeleton.curved:
            tables[block.start] = domain.table(block)
        domain.add(block, known, relax=block.start not in skeleton.places)
    ends = {number: domain.ends[z] for number, z in zip(skeleton.places, skeleton.place_inputs, strict=True)}
    tuned, planes = _own(skeleton)(tables, ends, tuned)
    domain.learn(planes)
    return domain, tables, tuned


def _own_one(skeleton: Skeleton, tables: dict, ends: dict, tuned: Tuned) -> tuple[Tuned, dict]:
    """Shares with CROWN's instead of NaN, and the planes of all places."""
    below, above = (
        jnp.where(jnp.isnan(given), _flat(skeleton, places, {k: own[side] for k, (_, own) in tables.items()}), given)
        for side, (places, given) in enumerate(((skeleton.places, tuned.below), (skeleton.curved, tuned.above)))
    )
    tuned = Tuned(below, above, tuned.multipliers)
    return tuned, _planes(skeleton, tables, ends, tuned)


def _planes(skeleton: Skeleton, tables: dict, ends: dict, tuned: Tuned) -> dict[int, Planes]:
    """Around every place, by its shares."""
    shares = _shares(skeleton, tuned)
    found = {number: rectifier_planes(*ends[number], *shares[number]) for number in skeleton.rectifiers}
    for number, (table, _) in tables.items():
        found[number] = mixed(skeleton.nodes[number].op, table, shares[number])
    return found


def _begun_one(
    skeleton: Skeleton,
    ends: dict[int, Ends],
    planes: dict[int, Planes],
    tables: dict[int, Any],
    met: dict[int, Any],
    tuned: Tuned,
) -> tuple[Ready, State]:
    scale = []
    for number in skeleton.places:
        rows = jnp.abs(met[number]).reshape(met[number].shape[0], -1)
        scale.append(jnp.broadcast_to(jnp.max(rows, axis=1, keepdims=True), rows.shape))
    scale = jnp.maximum(jnp.concatenate(scale, axis=1), 1e-6)
    parameters = tuned._replace(multipliers=tuned.multipliers / scale)
    best = jnp.full(scale.shape[0], -jnp.inf, scale.dtype)
    return Ready(ends, planes, tables, scale), State(parameters, _OPTIMIZER.init(parameters), best, tuned)


def _flat(skeleton: Skeleton, places: tuple[int, ...], given: dict) -> jax.Array:
    """Values of some places, 0 where none are given, flat: the reverse of `_parts`."""
    ops = {number: skeleton.nodes[number].op for number in places}
    parts = [
        jnp.zeros(op.size, op.dtype) if given.get(number) is None else jnp.ravel(given[number])
        for number, op in ops.items()
    ]
    return jnp.concatenate([jnp.zeros(0, skeleton.nodes[0].op.dtype), *parts])


def _ascend_one(
    skeleton: Skeleton, arrays: Arrays, cuts: Cuts, rows: Rows, ready: Ready, state: State, rate: jax.Array
):
    def loss(parameters: Tuned):
        lower = _lower(skeleton, arrays, cuts, rows, ready, parameters)
        return -jnp.sum(jnp.where(jnp.isfinite(lower), lower, 0)), lower

    (_, lower), gradient = jax.value_and_grad(loss, has_aux=True)(state.parameters)
    now = state.parameters._replace(multipliers=state.parameters.multipliers * ready.scale)
    better = lower > state.best
    kept = jax.tree.map(lambda new, old: jnp.where(better[:, None], new, old), now, state.kept)
    gradient = jax.tree.map(lambda leaf: jnp.where(jnp.isfinite(leaf), leaf, 0), gradient)
    updates, moments = _OPTIMIZER.update(gradient, state.moments)
    moved = jax.tree.map(lambda old, update: old - rate * update, state.parameters, updates)
    moved = Tuned(jnp.clip(moved.below, 0, 1), jnp.clip(moved.above, 0, 1), _usable(moved.multipliers, cuts))
    return State(moved, moments, jnp.where(better, lower, state.best), kept)


def certain(
    skeleton: Skeleton,
    arrays: Arrays,
    cuts: Cuts,
    rows: Rows,
    slopes: dict[int, tuple],
    multipliers: jax.Array,
    *,
    outward: bool,
) -> Result:
    """The bounds that count: with lines instead of averages of them, and rounding, if that is asked for."""
    added, intercept = _held_rows(skeleton, outward)(cuts, rows, multipliers)
    domain, known = _bounded(skeleton, arrays, cuts, outward=outward)
    for block in skeleton.structure.blocks:
        domain.add(block, known, slopes.get(block.start))
    start, _ = passes.started(skeleton, rows)
    found = domain.bound(start, intercept, added, watch=True)
    planes = {number: domain.planes[number] for number in skeleton.places}
    return _judged(skeleton)(found, planes, {z: domain.ends[z] for z in (0, *skeleton.place_inputs)})


def _held_rows_one(skeleton: Skeleton, outward: bool, cuts: Cuts, rows: Rows, multipliers: jax.Array):
    """What usable multipliers add to coefficients, and what rows begin with."""
    multipliers = _usable(multipliers, cuts)
    held = _held(multipliers, cuts)
    _, intercept = passes.started(skeleton, rows)
    intercept = intercept + jnp.sum(multipliers * held, axis=1)
    if outward:  # 0 where all points are
        size = jnp.sum(affine.enlarged(multipliers) * affine.enlarged(held), axis=1)
        intercept = intercept - 2 * affine.gamma(multipliers.shape[1] + 4, size.dtype) * size
    return _added(skeleton, multipliers), intercept


def _judged_one(skeleton: Skeleton, found: passes.Found, planes: dict[int, Planes], ends: dict[int, Ends]) -> Result:
    best = jnp.argmax(found.lower)
    scores = []
    for number, z in zip(skeleton.places, skeleton.place_inputs, strict=True):
        row = jnp.take(found.met[number], best, axis=0)
        own = jax.tree.map(lambda part, row=row: part if part.ndim == row.ndim else part[best], planes[number])
        if number in skeleton.rectifiers:
            scores.append(jnp.ravel(jnp.maximum(-row, 0) * own.upper_intercept))
        else:
            scores.append(jnp.ravel(jnp.abs(row) * _gap(own, ends[z])))
    slope = jnp.take(found.inputs, best, axis=0)
    return Result(found.lower, jnp.concatenate(scores), slope, jnp.where(slope > 0, *ends[0]))


def _gap(planes: Planes, ends: Ends) -> jax.Array:
    """How far planes are apart in the middle of an interval."""
    middle = ends[0] / 2 + ends[1] / 2
    gap = (planes.upper_slopes[0] - planes.lower_slopes[0]) * middle + planes.upper_intercept - planes.lower_intercept
    return jnp.where(jnp.isfinite(gap), jnp.maximum(gap, 0), 0)


_known = _batched(_known_one, (None, 0))
_own = _batched(_own_one, (0, 0, 0))
_begun = _batched(_begun_one, (0, 0, 0, 0, 0))
_held_rows = _batched(_held_rows_one, (0, 0, 0))
_judged = _batched(_judged_one, (0, 0, 0))
ascend = _batched(_ascend_one, (None, 0, 0, 0, 0, None))
slopes = _batched(_slopes_one, (0, 0))
