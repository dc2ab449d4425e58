"""Cells of a partition joined to spans on which the second derivative has one sign."""

import dataclasses
import math

import numpy as np

from jaxbound.curvature.enclosing import enclose
from jaxbound.curvature.intervals import Interval
from jaxbound.curvature.partition import (
    CONCAVE,
    CONVEX,
    FLAT,
    LEVELS,
    LINEAR,
    OPEN,
    SMALLEST,
    TOLERANCE,
    Partition,
    is_whole,
    least_size,
    magnitude,
    split,
    width_of,
)

KINDS = ("", "linear", "convex", "concave")

MOST_PIECES = 12

_APART = 2.0**-21  # relative distance at which sums with two numbers stay two in float32


@dataclasses.dataclass(frozen=True)
class Span:
    """Consecutive cells `first..last` of one kind; the ends may lie inside neighbouring flat cells."""

    kind: int
    first: int
    last: int
    left: float
    right: float
    slack: float = 0.0


def _spans(cells: Partition) -> list[Span]:
    """Maximal runs of one kind: curved ones with smooth joints, the others without jumps."""
    kind, value = cells.kind, cells.proof.orders[0, 0]
    tight = np.digitize(width_of(value), (1e-9, 1e-3, np.inf)) + is_whole(
        value
    )  # keeps tight hulls apart from wide ones
    cut = np.where(np.isin(kind[1:], (OPEN, FLAT)), cells.broken[1:-1] & (kind[1:] == FLAT), ~cells.smooth[1:-1])
    cut |= (kind[1:] != kind[:-1]) | (kind[1:] == OPEN) & (tight[1:] != tight[:-1])
    firsts = np.concatenate([[0], np.flatnonzero(cut) + 1])
    lasts = np.concatenate([firsts[1:], [kind.size]]) - 1
    return [
        Span(int(kind[i]), int(i), int(j), float(cells.left[i]), float(cells.right[j]))
        for i, j in zip(firsts, lasts, strict=True)
    ]


def _slope(cells: Partition, span: Span, side: int) -> Interval:
    """The one-sided slope at the left (1) or right (2) end of a span."""
    return cells.proof.orders[1, side, span.first if side == 1 else span.last]


def _prolongation(cells: Partition, run: Span, slope: Interval, after: bool) -> float:
    """How far a line of this slope, prolonging a span over the flat run after or before it, leaves sigma, in scale."""
    cut, step = slice(run.first, run.last + 1), 1 if after else -1
    left, right, gaps = cells.left[cut], cells.right[cut], cells.gap[run.first + 1 : run.last + 1]
    value, slopes = cells.proof.orders[0, 0, cut], cells.proof.orders[1, 0, cut]
    drift = np.maximum(slopes.upper - slope.lower, slope.upper - slopes.lower)
    tilt = float(np.max(drift, where=cells.proof.smooth[cut], initial=0.0))
    drift = np.where(cells.proof.continuous[cut], drift, np.inf)[::step]
    error = drift * (right - left)[::step] + np.concatenate([[0.0], gaps[::step]])
    near = np.maximum(1.0, least_size(left, right))[::step]
    jump = value.upper.max() - value.lower.min() + float(magnitude(slope)) * (run.right - run.left)
    total = np.fmin(np.cumsum([0.0, *error]), jump)
    outward = run.left >= 0 if after else run.right <= 0
    leaves = total[:-1] / near + np.fmin(error / near, drift) if outward else total[1:] / near.min()
    return tilt + float(np.max(np.where(np.isnan(leaves), np.inf, leaves)))


def _gaps(cells: Partition, first: int, last: int) -> float:
    """The mismatch at the joints `first..last`, over `scale(z)`."""
    at = cells.left[first : last + 1]
    return float(np.sum(cells.gap[first : last + 1] / np.maximum(1.0, np.abs(at))))


def _attach(cells: Partition, span: Span, run: Span | None, end: float) -> Span | None:
    """The span prolonged over a neighbouring run of flat cells up to `end`; None where the run is not flat enough."""
    if run is None:
        return span
    after = run.first > span.last
    slack = _prolongation(cells, run, _slope(cells, span, 2 if after else 1), after)
    slack += _gaps(cells, *((run.first, run.first) if after else (run.last + 1, run.last + 1)))
    if not slack <= TOLERANCE * cells.steepness:
        return None
    ends = {"right": end, "last": run.last} if after else {"left": end, "first": run.first}
    return dataclasses.replace(span, slack=span.slack + slack, **ends)


def _common_kind(cells: Partition, a: Span, b: Span, touching: bool) -> int | None:
    """The kind of two neighbours as one; two lines are one only if they are the same line."""
    if a.kind == b.kind == LINEAR:
        ends = np.array([*_slope(cells, a, 2), *_slope(cells, b, 1)])
        return LINEAR if (touching and cells.smooth[b.first]) or (ends[0] == ends).all() else None
    if LINEAR in (a.kind, b.kind):
        return max(a.kind, b.kind)
    return a.kind if a.kind == b.kind else None


def _join(cells: Partition, a: Span, run: Span | None, b: Span) -> Span | None:
    """Two spans, and the flat run between, as one of a common kind; None where that is not proved."""
    kind = _common_kind(cells, a, b, run is None)
    if kind is None:
        return None
    slack, kink = a.slack + b.slack, 0.0
    if run is not None or not cells.smooth[b.first]:
        one, other = (_slope(cells, a, 2), _slope(cells, b, 1))[:: -1 if kind == CONCAVE else 1]
        kink = 0.0 if kind == LINEAR else float(np.maximum(one.upper - other.lower, 0.0))
    if run is not None:
        prolonged = _attach(cells, a, run, run.right), _attach(cells, b, run, run.left)
        costs = [span.slack - base.slack for span, base in zip(prolonged, (a, b), strict=True) if span is not None]
        slack += min(costs, default=math.inf)
    slack += _gaps(cells, a.last + 1, a.last + 1) + _gaps(cells, b.first, b.first)
    size = max(cells.steepness, float(least_size(*_slope(cells, a, 2))))
    if not (kink <= TOLERANCE * size and slack <= a.slack + b.slack + TOLERANCE * size):
        return None
    return Span(kind, a.first, b.last, a.left, b.right, slack + 2.0 * kink)


def _separate(cells: Partition, a: Span, run: Span | None, b: Span) -> tuple[Span, Span, list[tuple[float, float]]]:
    """Two spans of different kinds with their border in the flat run between; a hole where neither explains the run."""
    if run is None:
        gap = _gaps(cells, b.first, b.first)
        return dataclasses.replace(a, slack=a.slack + gap), dataclasses.replace(b, slack=b.slack + gap), []
    border = _simplest(run.left, run.right)
    left, right = _attach(cells, a, run, border), _attach(cells, b, run, border)
    if left is not None and right is not None:
        return left, right, []
    if left is not None:
        return dataclasses.replace(left, right=run.right), b, []
    if right is not None:
        return a, dataclasses.replace(right, left=run.left), []
    return a, b, [(run.left, run.right)]


def _simplest(left: float, right: float) -> float:
    """The shortest decimal number in `[left, right]`."""
    if left <= 0.0 <= right:
        return 0.0
    middle = left + 0.5 * (right - left)
    return next((x for x in (float(f"{middle:.{digits}g}") for digits in range(1, 17)) if left <= x <= right), middle)


def assemble(cells: Partition) -> tuple[list[Span], list[tuple[float, float]]]:
    """Pieces, and the holes that they leave; a jump is a hole of width 0."""
    pieces: list[Span] = []
    holes: list[tuple[float, float]] = []
    current, run = None, None

    def close(current: Span | None, run: Span | None) -> None:
        closed = _attach(cells, current, run, run.right) if current and run else current
        if run and (current is None or closed is None):
            holes.append((run.left, run.right))
        pieces.extend([closed or current] if current else [])

    for span in _spans(cells):
        if cells.broken[span.first] and (current or run) and span.kind != OPEN:
            close(current, run)
            holes.append((span.left, span.left))
            current, run = None, None
        if span.kind == FLAT:
            run = span
            continue
        if span.kind == OPEN:
            close(current, run)
            holes.append((span.left, span.right))
            current = None
        elif current is None:
            current = _attach(cells, span, run, run.left if run else span.left)
            holes.extend([(run.left, run.right)] if run and current is None else [])
            current = current or span
        elif (merged := _join(cells, current, run, span)) is not None:
            current = merged
        else:
            before, current, unexplained = _separate(cells, current, run, span)
            pieces.append(before)
            holes.extend(unexplained)
        run = None
    close(current, run)
    return pieces, holes


def trim(pieces: list[Span], holes: list[tuple[float, float]]) -> tuple[list[Span], list[tuple[float, float]]]:
    """At most `MOST_PIECES` pieces, those nearest to zero, and holes that float32 can tell from their neighbours."""
    wide = []
    for left, right in sorted(holes):
        margin = max(SMALLEST, _APART * min(abs(left), abs(right)))
        left, right = (left - margin, right + margin) if right - left < margin else (left, right)
        if wide and left < wide[-1][1]:
            left, right = wide.pop()[0], right
        wide.append((left, right))
    dropped = [False, False]
    while len(pieces) > MOST_PIECES:
        side = int(-pieces[0].right <= pieces[-1].left)
        dropped[side] = True
        pieces = pieces[:-1] if side else pieces[1:]
    for left, right in wide:
        pieces = [dataclasses.replace(p, left=right) if left <= p.left < right else p for p in pieces]
        pieces = [dataclasses.replace(p, right=left) if left < p.right <= right else p for p in pieces]
    pieces = [piece for piece in pieces if piece.left < piece.right]
    if not pieces:
        return [], []
    low, high = pieces[0].left, pieces[-1].right
    inner = [hole for hole in wide if low < hole[1] and hole[0] < high]
    below = [hole for hole in wide if hole[1] <= low]
    above = [hole for hole in wide if hole[0] >= high]
    below, above = [(-math.inf, low)] if dropped[0] else below, [(high, math.inf)] if dropped[1] else above
    return pieces, below + inner + above


def values_over(cells: Partition, left: float, right: float) -> Interval:
    """The hull of sigma on an open interval."""
    if right - left <= 4.0 * max(SMALLEST, _APART * abs(left)):
        return enclose(cells.instructions, np.array([left]), np.array([right])).orders[0, 0, 0]
    inside = (cells.left < right) & (cells.right > left)
    between = (cells.right[:-1] < right) & (cells.right[:-1] > left)
    ranges = cells.proof.orders[0, 0, inside], cells.points.orders[0, 0, between]
    return Interval(min(r.lower.min(initial=np.inf) for r in ranges), max(r.upper.max(initial=-np.inf) for r in ranges))


def turn(cells: Partition, piece: Span) -> tuple[list[float], float]:
    """Where sigma turns in a piece, and how far, over `scale(z)`, it is from monotone on both sides."""
    if piece.kind == LINEAR:
        return [], 0.0
    cut = slice(piece.first, piece.last + 1)
    left, right = np.maximum(cells.left[cut], piece.left), np.minimum(cells.right[cut], piece.right)
    slopes = cells.proof.orders[1, :, cut]
    slopes = _rising(slopes, piece.kind)
    falls, rises = slopes.upper < 0, slopes.lower > 0
    start = np.max(np.concatenate([left[falls[0] | falls[1]], right[falls[0] | falls[2]]]), initial=piece.left)
    end = np.min(np.concatenate([left[rises[0] | rises[1]], right[rises[0] | rises[2]]]), initial=piece.right)
    if start >= end:
        return ([float(end)], 0.0) if piece.left < end < piece.right else ([], 0.0)
    between = (left < end) & (right > start)
    body, width = slopes[0, between], (right - left)[between]
    share = np.minimum(width / np.maximum(1.0, least_size(left[between], right[between])), 1.0)
    falls, rises = (float(np.sum(np.maximum(side, 0.0) * share)) for side in (-body.lower, body.upper))
    most = TOLERANCE * cells.steepness
    if min(falls, rises) <= most:
        at = _simplest(start, end) if max(falls, rises) <= most else start if falls <= rises else end
        return [at] if start > piece.left and end < piece.right else [], min(falls, rises)
    return _section(cells, piece, start, end)


def _rising(slopes: Interval, kind: int) -> Interval:
    return slopes if kind == CONVEX else Interval(-slopes.upper, -slopes.lower)


def _section(cells: Partition, piece: Span, start: float, end: float) -> tuple[list[float], float]:
    """Shrink `[start, end]` around the turning point by the signs of the slope at points in between."""
    for _ in range(LEVELS):
        at = split(np.array([start]), np.array([end]), 64)[0][1:]
        if not at.size:
            break
        proof = enclose(cells.instructions, at, at)
        slopes = _rising(proof.orders[1, 0], piece.kind)
        low = np.max(at[(slopes.upper < 0) & proof.continuous], initial=start)
        high = np.min(at[(slopes.lower > 0) & proof.continuous], initial=end)
        width, start, end = end - start, float(low), float(high)
        if end - start > 0.5 * width:
            break
    slope = enclose(cells.instructions, np.array([start]), np.array([end])).orders[1, 0, 0]
    wobble = float(magnitude(slope)) * (end - start) / max(1.0, float(least_size(np.array(start), np.array(end))))
    return [_simplest(start, end)], wobble
