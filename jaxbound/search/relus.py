"""ReLU splits: a neuron is fixed to one of its sides, with a multiplier for what that says (beta-CROWN).

A domain is a clause and a sign for every ReLU: +1 where its input is at least 0, -1 where it is at most 0, else 0.
Fixed neurons are linear, and what else their sides say enters the one backward pass through multipliers beta >= 0 (see
`passes`). Lower slopes and multipliers are tuned together by gradient steps, each row keeps the best that it has seen,
and the bound that counts is one more pass with rounding. Children start with their parents' slopes and multipliers.

Which neuron to fix: of those whose planes are furthest apart, weighed by the coefficient that meets them, the best few
are tried on both sides without tuning, and the one whose worse side is best is taken (filtered smart branching, De
Palma et al. 2021).
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
from jaxbound.search import passes
from jaxbound.search.goals import Goal
from jaxbound.search.logs import Log
from jaxbound.search.passes import Domain
from jaxbound.search.queue import Queue
from jaxbound.search.rectifiers import rectifier_planes
from jaxbound.search.skeletons import Skeleton

Array = np.ndarray

_RATE, _DECAY = 0.1, 0.97
_TRIED = 3
"""Neurons that are tried on both sides."""
_LONG = 5
"""Times as many steps for the first domains, and for those that cannot be split any more."""
_HELD = 1 << 23
"""How many numbers a batch may hold in slopes, multipliers and moments."""


class Tuned(NamedTuple):
    """Slopes and multipliers, (domains, rows, neurons)."""

    slopes: Any
    multipliers: Any


class ReluSplits(Queue):
    """The domains that are left."""

    def __init__(
        self, skeleton: Skeleton, constants, goal: Goal, box, known: dict, lower: Array, steps: int, *, batch, outward,
        log: Log | None = None,
    ):  # fmt: skip
        super().__init__()
        self.log = log
        self.skeleton, self.constants, self.goal, self.steps, self.outward = skeleton, constants, goal, steps, outward
        self.box = tuple(map(jnp.asarray, box))
        self.known = known
        ends = [known[z] for z in skeleton.rectified_inputs]
        low, high = (np.concatenate([np.ravel(end[side]) for end in ends]) for side in (0, 1))
        self.unstable = (low < 0) & (high > 0)
        self.rows = goal.of(np.arange(goal.count))[0].shape[1]
        self.size = len(low)
        widest = max(self.size * self.rows * 12, sum(node.op.size for node in skeleton.nodes) * self.rows * 4)
        self.batch = batch or int(np.clip(_HELD // widest, 2, 256))
        self.clause = np.flatnonzero(~(lower > 0))
        count = len(self.clause)
        self.signs = np.zeros((count, self.size), np.int8)
        default = np.broadcast_to((high > -low).astype(box[0].dtype), (count, self.rows, self.size))
        self.tuned = Tuned(default.copy(), np.zeros_like(default))
        self.level = np.full(count, -np.inf)
        self.proved = lower[lower > 0].min(initial=np.inf)
        self.number = self.clause

    def step(self, stop) -> Array:
        """Bound a batch of the worst domains, split what is not proved; returns possible counterexamples."""
        taken, rest = self.worst()
        count = len(taken)
        padded = taken[np.concatenate([np.arange(count), np.zeros(self.batch - count, int)])]
        clause, signs = self.clause[padded], self.signs[padded]
        start = Tuned(*(jnp.asarray(part[padded]) for part in self.tuned))
        final = ~(self.unstable & (signs[:count] == 0)).any(axis=1)
        first = np.isinf(self.level[taken]).any() or final.any()
        found, tuned = self._bounded(clause, signs, start, self.steps * (_LONG if first else 1), stop)
        lower = np.asarray(found.lower).max(axis=1)[:count]
        lower = np.where(np.isnan(lower), -np.inf, lower)
        self.nodes += count
        open_ = np.flatnonzero(~(lower > 0))
        self.proved = min(self.proved, lower[lower > 0].min(initial=np.inf))
        points = np.asarray(found.points).reshape(self.batch, -1)[open_]
        number = self.number[taken]
        if self.log is not None and len(open_) < count:
            self._note_leaves(np.setdiff1d(np.arange(count), open_), number, np.asarray(found.lower), tuned)
        scores = np.where(self.unstable & (signs == 0), np.asarray(found.scores), -1)
        fresh: list = []
        final = scores[open_].max(axis=1, initial=-1) < 0
        self.given_up = min(self.given_up, lower[open_[final]].min(initial=np.inf))
        open_ = open_[~final]
        if len(open_):
            others = len(rest)
            fill = self.batch / (len(open_) + others)
            times = int(np.clip(np.log2(max(fill, 2)), 1, 5))
            order = self._order(clause, signs, tuned, scores, open_, times)
            fresh = self._children(clause, signs, tuned, lower, open_, order, number)
        parts = self.clause, self.signs, *self.tuned, self.level, self.number
        made = list(zip(*fresh, strict=True)) if fresh else [()] * len(parts)
        parts = [np.concatenate([old[rest], *new]) for old, new in zip(parts, made, strict=True)]
        self.clause, self.signs, slopes, multipliers, self.level, self.number = parts
        self.tuned = Tuned(slopes, multipliers)
        return points

    def _bounded(self, clause, signs, start: Tuned, steps: int, stop):
        """Tuned bounds with rounding."""
        rows = [None if r is None else jnp.asarray(r) for r in self.goal.of(clause)]
        arrays = self.constants, self.box, self.known
        signs = jnp.asarray(signs)
        ready = _ready(self.skeleton)(arrays, signs, rows, start)
        state = _start(self.skeleton)(start, ready)
        for number in range(steps):
            if number % 5 == 4 and (stop() or bool((jnp.max(state.best, axis=1) > 0).all())):
                break
            rate = jnp.asarray(_RATE * _DECAY**number, jnp.float32)
            state = _ascend(self.skeleton)(arrays, signs, rows, ready, state, rate)
        return _certain(self.skeleton, self.outward)(arrays, signs, rows, state.kept), state.kept

    def _order(self, clause, signs, tuned: Tuned, scores: Array, open_: Array, times: int) -> Array:
        """For every open domain, the neurons to fix: the best ones by trial or by score."""
        best = np.argsort(-scores[open_], axis=1)[:, : max(_TRIED, times)]
        if times > 1 or best.shape[1] < 2:
            return best[:, :times]
        rows = [None if r is None else jnp.asarray(r) for r in self.goal.of(clause)]
        worse = []
        for k in range(best.shape[1]):
            sides = []
            for sign in (1, -1):
                tried = signs.copy()
                tried[open_, best[:, k]] = sign
                lower = _certain(self.skeleton, self.outward)(
                    (self.constants, self.box, self.known), jnp.asarray(tried), rows, tuned
                ).lower
                sides.append(np.asarray(lower).max(axis=1)[open_])
            worse.append(
                np.where(scores[open_, best[:, k]] > 0, np.minimum(*sides) + 1e-2 * np.maximum(*sides), -np.inf)
            )
        chosen = np.argmax(np.nan_to_num(np.stack(worse, axis=1), nan=-np.inf), axis=1)
        return best[np.arange(len(open_)), chosen][:, None]

    def _note_leaves(self, leaves: Array, number: Array, lower: Array, tuned: Tuned) -> None:
        """What proves domains: the best row, its slopes where they matter, and its multipliers."""
        assert self.log is not None
        best = np.where(np.isnan(lower), -np.inf, lower).argmax(axis=1)
        slopes, multipliers = map(np.asarray, tuned)
        for k in leaves:
            steps = np.round(slopes[k, best[k], self.unstable] * STEPS).astype(np.uint8)
            self.log.leaf(int(number[k]), int(best[k]), steps, multipliers[k, best[k]])

    def _children(self, clause, signs, tuned: Tuned, lower, open_, order: Array, number: Array) -> list:
        """Every combination of sides."""
        own = [np.asarray(part)[open_] for part in tuned]
        made = [signs[open_]]
        usable = self.unstable[order] & (signs[open_[:, None], order] == 0)
        index = np.arange(len(open_))
        alive = [np.ones(len(open_), bool)]
        for k in range(order.shape[1]):
            now, lives = [], []
            for part, live in zip(made, alive, strict=True):
                for sign in (1, -1):
                    one = part.copy()
                    one[index[usable[:, k]], order[usable[:, k], k]] = sign
                    now.append(one)
                    lives.append(live & (usable[:, k] | (sign > 0)))
            made, alive = now, lives
        numbers = [np.zeros(live.sum(), int) for live in alive]
        if self.log is not None:
            nothing = np.zeros(len(open_), bool)
            flat = self.log.split(number[open_], nothing, order, usable, np.stack(alive))
            numbers = np.split(flat, np.cumsum([live.sum() for live in alive])[:-1])
        return [
            (clause[open_][live], part[live], *(o[live] for o in own), lower[open_][live], fresh)
            for part, live, fresh in zip(made, alive, numbers, strict=True)
        ]


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


def _signed(skeleton: Skeleton, known: dict, signs: jax.Array) -> dict:
    """What is known of values, cut by signs."""
    known = dict(known)
    for z, sign in zip(skeleton.rectified_inputs, _parts(skeleton, signs), strict=True):
        low, high = known[z]
        known[z] = jnp.where(sign > 0, jnp.maximum(low, 0), low), jnp.where(sign < 0, jnp.minimum(high, 0), high)
    return known


def _parts(skeleton: Skeleton, flat: jax.Array) -> list[jax.Array]:
    """The entries of every rectified input, from flat ones (..., neurons)."""
    shapes = [skeleton.nodes[z].op.shape for z in skeleton.rectified_inputs]
    sizes = np.cumsum([int(np.prod(shape)) for shape in shapes])[:-1]
    parts = jnp.split(flat, sizes, axis=-1)
    return [part.reshape(*part.shape[:-1], *shape) for part, shape in zip(parts, shapes, strict=True)]


def _made(skeleton: Skeleton, arrays, signs, tuned: Tuned, *, outward: bool) -> Domain:
    """A domain from its box and what is known."""
    constants, box, known = arrays
    known = _signed(skeleton, known, signs)
    slopes = dict(zip(skeleton.rectifiers, _parts(skeleton, tuned.slopes), strict=True))
    domain = Domain(skeleton, constants, box, outward=outward)
    for block in skeleton.structure.blocks:
        domain.add(block, known, slopes.get(block.start))
    return domain


def _multipliers(skeleton: Skeleton, signs, multipliers) -> dict:
    return dict(zip(skeleton.rectified_inputs, _parts(skeleton, -multipliers * signs), strict=True))


def _lower(skeleton: Skeleton, arrays, signs, rows, ready: Ready, tuned: Tuned) -> jax.Array:
    domain = Domain(skeleton, arrays[0], arrays[1], outward=False)
    domain.ends, domain.planes = ready.ends, dict(ready.planes)
    slopes = _parts(skeleton, tuned.slopes)
    for number, z, slope in zip(skeleton.rectifiers, skeleton.rectified_inputs, slopes, strict=True):
        low, high = ready.ends[z]
        domain.planes[number] = rectifier_planes(low, high, slope)
    multipliers = _multipliers(skeleton, signs, tuned.multipliers * ready.scale)
    return domain.bound(*passes.started(skeleton, rows), multipliers).lower


def _batched(function, axes):
    """A step for a batch of domains, compiled for every network and option."""
    return functools.lru_cache(64)(
        lambda *static: eager_jit(jax.vmap(functools.partial(function, *static), in_axes=axes))
    )


def _ready_one(skeleton, arrays, signs, rows, tuned):
    domain = _made(skeleton, arrays, signs, tuned, outward=False)
    start, intercept = passes.started(skeleton, rows)
    met = domain.bound(start, intercept, watch=True).met
    scale = []
    for number in skeleton.rectifiers:
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


def _ascend_one(skeleton, arrays, signs, rows, ready: Ready, state: State, rate):
    def loss(parameters):
        lower = _lower(skeleton, arrays, signs, rows, ready, parameters)
        return -jnp.sum(jnp.where(jnp.isfinite(lower), lower, 0)), lower

    (_, lower), gradient = jax.value_and_grad(loss, has_aux=True)(state.parameters)
    now = Tuned(state.parameters.slopes, state.parameters.multipliers * ready.scale)
    better = lower > state.best
    kept = jax.tree.map(lambda new, old: jnp.where(better[:, None], new, old), now, state.kept)
    gradient = jax.tree.map(lambda leaf: jnp.where(jnp.isfinite(leaf), leaf, 0), gradient)
    updates, moments = _OPTIMIZER.update(gradient, state.moments)
    moved = jax.tree.map(lambda old, update: old - rate * update, state.parameters, updates)
    moved = Tuned(jnp.clip(moved.slopes, 0, 1), jnp.where(signs != 0, jnp.maximum(moved.multipliers, 0), 0))
    return State(moved, moments, jnp.where(better, lower, state.best), kept)


def _certain_one(skeleton, outward, arrays, signs, rows, tuned: Tuned):
    multipliers = jnp.where((signs != 0) & (tuned.multipliers >= 0), tuned.multipliers, 0)
    tuned = Tuned(jnp.round(tuned.slopes * STEPS) / STEPS, multipliers)  # as certificates store them
    domain = _made(skeleton, arrays, signs, tuned, outward=outward)
    start, intercept = passes.started(skeleton, rows)
    found = domain.bound(start, intercept, _multipliers(skeleton, signs, multipliers), watch=True)
    best = jnp.argmax(found.lower)
    scores = []
    for number in skeleton.rectifiers:
        row, height = jnp.take(found.met[number], best, axis=0), domain.planes[number].upper_intercept
        height = height if height.ndim == row.ndim else jnp.take(height, best, axis=0)  # rows have slopes of their own
        scores.append(jnp.ravel(jnp.maximum(-row, 0) * height))
    slope = jnp.take(found.inputs, best, axis=0)
    return Result(found.lower, jnp.concatenate(scores), jnp.where(slope > 0, *arrays[1]))


_ready = _batched(_ready_one, (None, 0, 0, 0))
_start = _batched(_start_one, (0, 0))
_ascend = _batched(_ascend_one, (None, 0, 0, 0, 0, None))
_certain = _batched(_certain_one, (None, 0, 0, 0))
