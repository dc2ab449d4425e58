"""Splits of neurons: the input of a nonlinearity is held on one side of a point, with a multiplier for what that says.

A domain is a clause and, for every neuron z, where it was cut: low <= z <= high, infinite where it was not. ReLUs are
cut at 0 and linear then; other functions of one number are cut wherever their planes are loose, as often as it takes
(Shi et al. 2024, "Neural network verification with branch-and-bound for general nonlinearities"). What else a cut says
enters the one backward pass through a multiplier of either sign (see `passes`): above 0 it counts the lower end, below
0 the upper one. Lower slopes of ReLUs and multipliers are tuned together by gradient steps, each row keeps the best
that it has seen, and the bound that counts is one more pass with rounding. Children start with what their parents had.

Which neuron to cut: of those whose planes are furthest apart, weighed by the coefficient that meets them, the best few
are tried on both sides without tuning, and the one whose worse side is best is taken (filtered smart branching, De
Palma et al. 2021).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxbound.certificates.proofs.files import STEPS
from jaxbound.search import tuning
from jaxbound.search.clipping import Functions, clipped_by_cuts, clipped_by_rows
from jaxbound.search.goals import Goal
from jaxbound.search.logs import Log
from jaxbound.search.queue import Queue
from jaxbound.search.skeletons import Skeleton
from jaxbound.search.tuning import Cuts, Tuned

Array = np.ndarray

_RATE, _DECAY = 0.1, 0.97
_AT_ONCE = 5
"""Neurons that are cut at once, at most."""
_TRIED = 3
"""Neurons that are tried on both sides."""
_LONG = 5
"""Times as many steps for the first domains, and for those that cannot be split any more."""
_HELD = 1 << 23
"""How many numbers a batch may hold in slopes, multipliers and moments."""
_PRODUCTS = 1 << 26
"""How many products a pass of a batch takes: enough to be worth its start, few enough to begin soon."""
_DEEP = 1e-3
"""Part of a neuron's interval on the whole region below which it is not cut again."""


class NeuronSplits(Queue):
    """The domains that are left."""

    def __init__(
        self, skeleton: Skeleton, constants: Sequence[jax.Array], goal: Goal, box: Sequence[Array | jax.Array],
        known: dict, lower: Array, steps: int, *, batch: int | None, outward: bool,
        log: Log | None = None, functions: Functions | None = None,
    ):  # fmt: skip
        super().__init__()
        self.log = log
        self.skeleton, self.constants, self.goal, self.steps, self.outward = skeleton, constants, goal, steps, outward
        self.box = tuple(map(jnp.asarray, box))
        self.known, self.functions = known, functions
        ends = [known[z] for z in skeleton.place_inputs]
        low, high = (np.concatenate([np.ravel(end[side]) for end in ends]) for side in (0, 1))
        self.whole = high - low
        sizes = [int(np.prod(np.shape(end[0]))) for end in ends]
        found = skeleton.turns
        most = max(len(points) for points, _ in found)
        turns = np.stack([np.append(points, np.full(most - len(points), np.nan)) for points, _ in found])
        self.turns = np.repeat(turns, sizes, axis=0).astype(low.dtype)
        """Where functions turn, (neurons, most), NaN where there are fewer."""
        self.linear = np.repeat([linear for _, linear in found], sizes)
        """Whether they are linear between."""
        self.unstable = (low < 0) & (high > 0)
        self.rows = goal.of(np.arange(goal.count))[0].shape[1]
        self.size = len(low)
        widest = max(self.size * self.rows * 12, sum(node.op.size for node in skeleton.nodes) * self.rows * 4)
        fitting = min(_HELD // widest, _PRODUCTS // (skeleton.products * self.rows))
        self.batch = batch or int(np.clip(fitting, 4, 256))
        self.clause = np.flatnonzero(~(lower > 0))
        count = len(self.clause)
        self.cuts = Cuts(
            *(np.tile(end, (count, 1)) for end in (np.full_like(low, -np.inf), np.full_like(low, np.inf), low, high))
        )
        sizes = dict(zip(skeleton.places, sizes, strict=True))
        curved = np.concatenate([np.full(sizes[k], k in skeleton.curved) for k in skeleton.places])
        self.curved = np.flatnonzero(curved)
        """Which neurons are not ReLUs."""
        default = np.where(curved, np.nan, high > -low).astype(box[0].dtype)
        self.tuned = Tuned(*(
            np.broadcast_to(part, (count, self.rows, part.size)).copy()
            for part in (default, default[self.curved], np.zeros_like(default))
        ))  # fmt: skip
        self.level = np.full(count, -np.inf)
        self.proved = lower[lower > 0].min(initial=np.inf)
        self.number = self.clause
        self.recent = np.full((count, _AT_ONCE), -1)
        """The neurons that were cut last: k where its input was cut from above, the number of neurons more if below."""

    def step(self, stop: Callable[[], bool]) -> Array:
        """Bound a batch of the worst domains, split what is not proved; returns possible counterexamples."""
        taken, rest = self.worst()
        count = len(taken)
        padded = taken[np.concatenate([np.arange(count), np.zeros(self.batch - count, int)])]
        clause, cuts = self.clause[padded], Cuts(*(part[padded] for part in self.cuts))
        cuts, void = self._clipped_by_cuts(cuts, self.recent[padded])
        start = Tuned(*(jnp.asarray(part[padded]) for part in self.tuned))
        loose = self._loose(cuts)
        final = ~(loose | void[:, None])[:count].any(axis=1)
        first = np.isinf(self.level[taken]).any() or final.any()
        found, tuned = self._bounded(clause, cuts, start, self.steps * (_LONG if first else 1), stop)
        lower = np.asarray(found.lower).max(axis=1)[:count]
        lower = np.fmax(lower, self.level[taken])  # what held for a parent
        lower[void[:count]] = np.inf
        self.nodes += count
        open_ = np.flatnonzero(~(lower > 0))
        self.proved = min(self.proved, lower[lower > 0].min(initial=np.inf))
        points = np.asarray(found.points).reshape(self.batch, -1)[open_]
        number = self.number[taken]
        if self.log is not None and len(open_) < count:
            self._note_leaves(np.setdiff1d(np.arange(count), open_), number, np.asarray(found.lower), tuned)
        scores = np.where(loose, np.asarray(found.scores), -1)
        fresh: list = []
        final = scores[open_].max(axis=1, initial=-1) < 0
        self.given_up = min(self.given_up, lower[open_[final]].min(initial=np.inf))
        open_ = open_[~final]
        if self.functions is not None and len(open_):
            cuts, void = self._clipped_by_rows(cuts, found)
            open_ = open_[~void[open_]]
            scores = np.where(self._loose(cuts), scores, -1)  # of what is not loose any more, a bound is next
        if len(open_):
            others = len(rest)
            fill = self.batch / (len(open_) + others)
            times = int(np.clip(np.log2(max(fill, 2)), 1, _AT_ONCE))
            order = self._order(clause, cuts, tuned, scores, open_, times)
            fresh = self._children(clause, cuts, tuned, lower, open_, order, number)
        made = list(zip(*fresh, strict=True)) if fresh else [()] * len(self.parts)
        self.parts = [np.concatenate([old[rest], *new]) for old, new in zip(self.parts, made, strict=True)]
        return points

    @property
    def parts(self) -> tuple[Array, ...]:
        """All arrays over the domains that are left."""
        return self.clause, *self.cuts, *self.tuned, self.level, self.number, self.recent

    @parts.setter
    def parts(self, parts: Sequence[Array]) -> None:
        self.clause, low, high, least, most, *tuned, self.level, self.number, self.recent = parts
        self.cuts, self.tuned = Cuts(low, high, least, most), Tuned(*tuned)

    def _clip(self, cuts: Cuts, ends: tuple) -> tuple[Cuts, Array]:
        """Cuts at tighter ends, and which domains have none between them, and so no counterexample."""
        least, most = np.maximum(ends[0], cuts.least), np.minimum(ends[1], cuts.most)
        low, high = np.where(np.isinf(cuts.low), cuts.low, least), np.where(np.isinf(cuts.high), cuts.high, most)
        self.proved = min(self.proved, float(np.finfo(low.dtype).tiny))  # margins there are positive, no more is known
        return Cuts(low, high, least, most), np.any(least > most, axis=1)

    def _clipped_by_cuts(self, cuts: Cuts, recent: Array) -> tuple[Cuts, Array]:
        """Cuts at what those leave that were made last."""
        void = np.zeros(len(recent), bool)
        if self.functions is None:
            return cuts, void
        for index in recent.T[(recent >= 0).any(axis=0)]:
            ends = np.concatenate([cuts.high, -cuts.low], axis=1)[np.arange(len(index)), index]
            ends, places = np.where(index < 0, np.inf, ends), np.maximum(index, 0)
            found = clipped_by_cuts(self.functions, jnp.asarray(places), jnp.asarray(ends, cuts.low.dtype))
            cuts, empty = self._clip(cuts, found)
            void = void | empty
        return cuts, void

    def _clipped_by_rows(self, cuts: Cuts, found: tuning.Result) -> tuple[Cuts, Array]:
        """Cuts at what the property leaves."""
        assert self.functions is not None
        return self._clip(cuts, clipped_by_rows(self.functions, jnp.max(found.lower, axis=1), found.slopes))

    def _loose(self, cuts: Cuts) -> Array:
        """Where domains may be cut."""
        low, high, whole = cuts.least, cuts.most, self.whole
        bent = np.zeros(low.shape, bool)
        for turn in self.turns.T:
            bent |= (low < turn) & (turn < high)
        return np.where(self.linear, bent, (high - low > _DEEP * whole) & (whole < np.inf))

    def _points(self, cuts: Cuts, index: Array, neurons: Array) -> Array:
        """Where some domains would be cut at some neurons: at the turn next to the middle, or there if none is near."""
        low, high = cuts.least[index, neurons], cuts.most[index, neurons]
        with np.errstate(invalid="ignore"):  # an unbounded neuron is never cut
            middle = low / 2 + high / 2
        if not self.turns.shape[1]:
            return middle
        turns = self.turns[neurons]
        inside = (low[:, None] < turns) & (turns < high[:, None])
        away = np.where(inside, np.abs(turns - middle[:, None]), np.inf)
        nearest = away.argmin(axis=1)
        away, turn = (np.take_along_axis(part, nearest[:, None], axis=1)[:, 0] for part in (away, turns))
        near = np.where(self.linear[neurons], away < np.inf, away <= high / 4 - low / 4)
        return np.where(near, turn, middle)

    def _bounded(self, clause: Array, cuts: Cuts, start: Tuned, steps: int, stop: Callable[[], bool]):
        """Bounds with rounding, and what was tuned for them."""
        rows = [None if r is None else jnp.asarray(r) for r in self.goal.of(clause)]
        arrays = self.constants, self.box, self.known
        cuts = Cuts(*map(jnp.asarray, cuts))
        ready, state = tuning.ready(self.skeleton, arrays, cuts, rows, start)
        for number in range(steps):
            if number % 5 == 4 and (stop() or bool((jnp.max(state.best, axis=1) > 0).all())):
                break
            rate = jnp.asarray(_RATE * _DECAY**number, jnp.float32)
            state = tuning.ascend(self.skeleton)(arrays, cuts, rows, ready, state, rate)
        slopes = tuning.slopes(self.skeleton)(ready.tables, state.kept)
        chosen = slopes, state.kept.multipliers
        return tuning.certain(self.skeleton, arrays, cuts, rows, *chosen, outward=self.outward), state.kept

    def _order(self, clause: Array, cuts: Cuts, tuned: Tuned, scores: Array, open_: Array, times: int) -> Array:
        """For every open domain, the neurons to cut: the best ones by trial or by score."""
        best = np.argsort(-scores[open_], axis=1)[:, : max(_TRIED, times)]
        if times > 1 or best.shape[1] < 2:
            return best[:, :times]
        rows = [None if r is None else jnp.asarray(r) for r in self.goal.of(clause)]
        arrays, worse = (self.constants, self.box, self.known), []
        for k in range(best.shape[1]):
            sides = []
            points = self._points(cuts, open_, best[:, k])
            mask = np.zeros((self.batch, self.size), bool)
            mask[open_, best[:, k]] = True
            own = self._renewed(tuned, mask)
            for side in (0, 1):
                tried = Cuts(*(part.copy() for part in cuts))
                for part in tried[side], tried[side + 2]:
                    part[open_, best[:, k]] = points
                lower = tuning.tried(self.skeleton, arrays, Cuts(*map(jnp.asarray, tried)), rows, own)
                sides.append(np.asarray(lower).max(axis=1)[open_])
            worse.append(
                np.where(scores[open_, best[:, k]] > 0, np.minimum(*sides) + 1e-2 * np.maximum(*sides), -np.inf)
            )
        chosen = np.argmax(np.nan_to_num(np.stack(worse, axis=1), nan=-np.inf), axis=1)
        return best[np.arange(len(open_)), chosen][:, None]

    def _renewed(self, tuned: Tuned, mask: Array) -> Tuned:
        """With CROWN's lines around neurons that are cut: others than before."""
        if not len(self.curved):
            return tuned
        mask, below = mask[:, None, self.curved], np.array(tuned.below)
        below[:, :, self.curved] = np.where(mask, np.nan, below[:, :, self.curved])
        return tuned._replace(below=below, above=np.where(mask, np.nan, tuned.above))

    def _note_leaves(self, leaves: Array, number: Array, lower: Array, tuned: Tuned) -> None:
        """What proves domains: the best row, its slopes where they matter, and its multipliers."""
        assert self.log is not None
        best = np.where(np.isnan(lower), -np.inf, lower).argmax(axis=1)
        slopes, multipliers = np.asarray(tuned.below), np.asarray(tuned.multipliers)
        for k in leaves:
            steps = np.round(slopes[k, best[k], self.unstable] * STEPS).astype(np.uint8)
            self.log.leaf(int(number[k]), int(best[k]), steps, np.abs(multipliers[k, best[k]]))

    def _children(
        self, clause: Array, cuts: Cuts, tuned: Tuned, lower: Array, open_: Array, order: Array, number: Array
    ) -> list:
        """Every combination of sides."""
        made = [Cuts(*(part[open_] for part in cuts))]
        usable = np.take_along_axis(self._loose(made[0]), order, axis=1)
        index = np.arange(len(open_))
        mask = np.zeros(made[0].low.shape, bool)
        np.put_along_axis(mask, order, usable, axis=1)
        own = self._renewed(Tuned(*(np.asarray(part)[open_] for part in tuned)), mask)
        points = np.stack([self._points(made[0], index, order[:, k]) for k in range(order.shape[1])], axis=1)
        alive, recent = [np.ones(len(open_), bool)], [np.full((len(open_), _AT_ONCE), -1)]
        for k in range(order.shape[1]):
            now, lives, cut = [], [], []
            where = index[usable[:, k]], order[usable[:, k], k]
            for parts, live, last in zip(made, alive, recent, strict=True):
                for side in (0, 1):  # above the point, below it
                    one = Cuts(*(part.copy() for part in parts))
                    for part in one[side], one[side + 2]:
                        part[where] = points[usable[:, k], k]
                    now.append(one)
                    lives.append(live & (usable[:, k] | (side == 0)))
                    cut.append(last.copy())
                    cut[-1][where[0], k] = where[1] + self.size * (side == 0)
            made, alive, recent = now, lives, cut
        numbers = [np.zeros(live.sum(), int) for live in alive]
        if self.log is not None:
            nothing = np.zeros(len(open_), bool)
            flat = self.log.split(number[open_], nothing, order, usable, np.stack(alive))
            numbers = np.split(flat, np.cumsum([live.sum() for live in alive])[:-1])
        return [
            (
                clause[open_][live],
                *(part[live] for part in parts),
                *(o[live] for o in own),
                lower[open_][live],
                fresh,
                last[live],
            )
            for parts, live, fresh, last in zip(made, alive, numbers, recent, strict=True)
        ]
