"""Input splits: a box is bisected where the bounds' planes are steepest, until every part is proved.

The domains of a batch are bounded by full backward passes each (`bound_boxes`). Coordinates are chosen by slope
times width, several at once while there are fewer domains than a batch holds. Parts share the split point, a float of
the region's dtype, so that together they are the whole.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxbound.search.goals import Goal
from jaxbound.search.logs import Log
from jaxbound.search.passes import Domain, Found, adaptive_slopes, started
from jaxbound.search.queue import Queue
from jaxbound.search.skeletons import Skeleton

Array = np.ndarray

_FLOOR = 0.05
"""Steepness counts for at least this part of the steepest one's: at a large box slopes say little of smaller ones."""
_CACHED = 1 << 21
"""How many coefficients a batch may hold on a value, so that passes stay in the processor's caches."""


class InputSplits(Queue):
    """The domains that are left, each a box with the clauses already refuted on it."""

    def __init__(
        self,
        skeleton: Skeleton,
        constants: Sequence[jax.Array],
        goal: Goal,
        box: tuple[Array, Array],
        *,
        batch: int | None = None,
        outward: bool = True,
        log: Log | None = None,
    ):
        super().__init__()
        self.log: Log | None = log
        self.number = np.zeros(1, int)
        self.skeleton, self.constants, self.goal, self.outward = skeleton, constants, goal, outward
        self.shape = box[0].shape
        self.batch = batch or self._fitting()
        rows = goal[:3]
        self.rows = [None if r is None else jnp.broadcast_to(jnp.asarray(r), (self.batch, *r.shape)) for r in rows]
        self.low, self.high = (end.reshape(1, -1) for end in box)
        self.refuted = np.zeros((1, goal.count), bool)
        self.level = np.full(1, -np.inf)

    def _fitting(self) -> int:
        nodes = self.skeleton.nodes
        largest = max((nodes[k].op.size for k in self.skeleton.loose), default=len(self.goal.offsets))
        per_domain = 2 * largest * max(node.op.size for node in nodes)
        return int(2 ** np.clip(np.log2(_CACHED / per_domain), 2, 9) // 1)

    def step(self, stop: Callable[[], bool]) -> Array:
        """Bound a batch of the worst domains, split what is not proved; returns possible counterexamples."""
        taken, rest = self.worst()
        count = len(taken)
        low, high, refuted = self.low[taken], self.high[taken], self.refuted[taken]
        padded = np.concatenate([np.arange(count), np.zeros(self.batch - count, int)])
        box = [jnp.asarray(end[padded].reshape(self.batch, *self.shape)) for end in (low, high)]
        ends = box[0], box[1]
        found, domain = bound_boxes(self.skeleton, self.constants, ends, self.rows, outward=self.outward)
        lower, slopes = np.asarray(found.lower)[:count], np.asarray(found.inputs)[:count]
        self.nodes += count
        number = self.number[taken]
        if self.log is not None:
            self.log.bounded(number, np.packbits(adaptive_slopes(domain)[:count], axis=1))
        best = self.goal.best(lower)
        before = refuted
        self.proved = min(self.proved, np.where(~refuted & (best > 0), best, np.inf).min(initial=np.inf))
        refuted = refuted | (best > 0)
        level = np.where(refuted, np.inf, best)
        open_ = ~refuted.all(axis=1)
        low, high, refuted, level, number = low[open_], high[open_], refuted[open_], level[open_], number[open_]
        useful = (refuted != before[open_]).any(axis=1)
        lower, slopes = lower[open_], slopes[open_].reshape(-1, len(self.goal.offsets), low.shape[1])
        whole = high - low
        low, high, refuted = self._clipped(low, high, lower, slopes, refuted)
        keep, clipped = ~refuted.all(axis=1), np.any(high - low < whole, axis=1)
        if clipped.any() or not keep.all():  # what is cut off has a positive margin, of which no more is known
            self.proved = min(self.proved, float(np.finfo(np.float64).tiny))
        useful |= clipped
        low, high, refuted, level, lower, slopes, clipped, number, useful = (
            part[keep] for part in (low, high, refuted, level, lower, slopes, clipped, number, useful)
        )
        worst = level.argmin(axis=1) if len(level) else np.zeros(0, int)
        own = self.goal.clause[None] == worst[:, None]
        row = np.where(own, lower, -np.inf).argmax(axis=1)
        slope = slopes[np.arange(len(row)), row]
        steep = np.abs(slopes * own[..., None]).sum(axis=1)
        points = np.where(slope > 0, low, high)
        kept = refuted, level.min(axis=1, initial=np.inf), number
        parts = self._split(low, high, steep, clipped, useful, kept, self.left - count)
        self.parts = [np.concatenate([old[rest], new]) for old, new in zip(self.parts, parts, strict=True)]
        return points

    @property
    def parts(self) -> tuple[Array, ...]:
        """All arrays over the domains that are left."""
        return self.low, self.high, self.refuted, self.level, self.number

    @parts.setter
    def parts(self, parts: Sequence[Array]) -> None:
        self.low, self.high, self.refuted, self.level, self.number = parts

    def _clipped(self, low: Array, high: Array, lower: Array, slopes: Array, refuted: Array):
        """Boxes without what the planes of the rows exclude, and what that refutes.

        With x* where the plane of a row is least, `row(x) >= lower + <slope, x - x*>`, and no term of the product is
        negative. So where the row is at most 0, `|slope_i| |x_i - x*_i| <= -lower` for every coordinate. All rows of a
        clause hold at its counterexamples; several clauses need the hull of their boxes.
        """
        with np.errstate(divide="ignore", invalid="ignore"):
            reach = -np.minimum(lower, 0).astype(np.float64)[..., None] / np.abs(slopes.astype(np.float64))
        wide_low, wide_high = (end.astype(np.float64)[:, None] for end in (low, high))
        spare = 1e-14 * (np.abs(wide_low) + np.abs(wide_high))  # the rounding of the quotient and of the sum
        reach = np.where((slopes == 0) | np.isnan(reach), np.inf, reach * (1 + 1e-12) + spare)
        above = np.where(slopes > 0, np.minimum(wide_low + reach, wide_high), wide_high)
        below = np.where(slopes < 0, np.maximum(wide_high - reach, wide_low), wide_low)
        lows, highs, refuted = [], [], refuted.copy()
        for clause in range(self.goal.count):
            own = self.goal.clause == clause
            least, most = below[:, own].max(axis=1), above[:, own].min(axis=1)
            least, most = _down(least, low.dtype), -_down(-most, low.dtype)
            refuted[:, clause] |= (least > most).any(axis=1)
            dead = refuted[:, clause, None]
            lows.append(np.where(dead, np.inf, least).astype(low.dtype))
            highs.append(np.where(dead, -np.inf, most).astype(low.dtype))
        low = np.maximum(low, np.min(lows, axis=0))
        return low, np.minimum(high, np.max(highs, axis=0)), refuted

    def _split(
        self,
        low: Array,
        high: Array,
        steep: Array,
        clipped: Array,
        useful: Array,
        kept: tuple[Array, Array, Array],
        others: int,
    ):
        """The halves, quarters, ... of boxes."""
        refuted, level, number = kept
        if not len(low):
            return low, high, refuted, level, number
        width = high - low
        middle = (low / 2 + high / 2).astype(low.dtype)
        divisible = (low < middle) & (middle < high)
        steep = np.nan_to_num(steep, nan=1, posinf=1e30)
        most = steep.max(axis=1, keepdims=True)
        steep = np.where(most > 0, np.maximum(steep, _FLOOR * most), 1)
        score = np.where(divisible, steep * width, -1)
        alive = divisible.any(axis=1) | clipped  # what is clipped is worth another bound
        self.given_up = min(self.given_up, level[~alive].min(initial=np.inf))
        low, high, middle, divisible, score, refuted, level, number, useful = (
            part[alive] for part in (low, high, middle, divisible, score, refuted, level, number, useful)
        )
        if not len(low):
            return low, high, refuted, level, number
        fill = self.batch / max(1, len(low) + others)
        times = int(np.clip(np.log2(max(fill, 2)), 1, min(low.shape[1], 6)))
        chosen = np.argsort(-score, axis=1)[:, :times]  # pyright: ignore[reportOperatorIssue]
        low, high = low[None], high[None]
        index = np.arange(len(chosen))
        possible = np.take_along_axis(divisible & (score >= 0), chosen, axis=1)
        for k in range(times):
            axis = chosen[:, k]
            usable = possible[:, k]
            parts = []
            for one, other in itertools.product(zip(low, high, strict=True), (0, 1)):
                ends = [one[0].copy(), one[1].copy()]
                ends[1 - other][index[usable], axis[usable]] = middle[index[usable], axis[usable]]
                if not usable.all() and other:  # nothing to halve: an empty twin, taken out below
                    ends[0][index[~usable]] = np.nan
                parts.append(ends)
            low, high = np.stack([p[0] for p in parts]), np.stack([p[1] for p in parts])
        count = len(low)
        low, high = low.reshape(-1, low.shape[-1]), high.reshape(-1, high.shape[-1])
        own = ~np.isnan(low).any(axis=1)
        if self.log is not None:
            points = np.take_along_axis(middle, chosen, axis=1)
            numbers = self.log.split(number, useful, chosen, possible, own.reshape(count, -1), points)
        else:
            numbers = np.zeros(own.sum(), int)
        return low[own], high[own], np.tile(refuted, (count, 1))[own], np.tile(level, count)[own], numbers


def _down(values: Array, dtype: DTypeLike) -> Array:
    """Float64 numbers in a dtype, rounded down."""
    near = values.astype(dtype)
    return np.where(near > values, np.nextafter(near, np.array(-np.inf, dtype)), near)


def bound_boxes(
    skeleton: Skeleton, constants: Sequence, box: tuple[jax.Array, jax.Array], goal: Sequence, *, outward: bool
) -> tuple[Found, Domain]:
    """Bound domains from their boxes: every loose value by backward passes, then the rows of a goal.

    Args:
        skeleton: the network.
        constants: its constants.
        box: the domains' ends.
        goal: rows `outputs @ y + inputs @ x - offsets`.
    """
    domain = Domain(skeleton, constants, box, outward=outward)
    for block in skeleton.structure.blocks:
        domain.add(block)
        for number in sorted(set(skeleton.loose) & set(range(block.start, block.stop))):
            domain.tighten(number)
    return domain.bound(*started(skeleton, goal)), domain
