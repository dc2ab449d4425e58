"""Where a scalar function is linear, convex or concave: found once at trace time, and proved.

A chain of elementwise operations on one value is one function sigma of one real variable. Its exact relaxation needs to
know where sigma bends which way, where its kinks, jumps and poles are, and where it turns. `analyse` proves this by the
interval jets of `jets.py`, in four steps.

1. *Cells.* The line is cut at 0 and at powers of two, and a cell is split until one of these is proved on it: the
   second derivative is 0 (linear), not negative (convex), not positive (concave); or the cell is *flat*: its slopes
   differ by some 1e-14 at most. Flat cells are what is left around an inflection, around a kink at a number that
   floating point cannot name, and in tails that underflow. Cells that get nowhere stay open.
2. *Joints.* Two cells meet smoothly where both sides and the point between took the same decisions; anywhere else the
   one-sided limits and the value at the point are compared: equal up to rounding is a kink, the rest is a jump.
   Where they are certainly different, by however little, sigma is not continuous.
3. *Pieces.* Neighbours of one kind merge where they meet smoothly or where their slopes are ordered the right way (up:
   convex; down: concave). Lines keep to themselves unless a curved neighbour can swallow them.
4. *Turns.* In a convex or concave piece the slope changes its sign once, at a point found by section.

What is claimed. On every piece there is a function g that is exactly linear, convex or concave, with values and slopes
close to those of sigma. So, for z and z0 in a convex piece, z0 more than 16 units in the last place from its ends,

    sigma(z) >= sigma(z0) + sigma'(z0) (z - z0) - slack * max(1, |z|, |z0|),

the reverse in a concave piece, both in a linear one. The slack is 0 where everything was proved outright. It pays for
flat cells (g prolongs its neighbour over them by a line: the error is the integral of `sigma' - slope`), for joints
whose equality is only known up to rounding, and for turning points, known up to some units in the last place w: there
sigma differs from its extreme value by at most `|sigma''| w^2`, and between them it is monotone up to the slack.

Steps 1 and 2 are in `partition`.

Length: pieces and turns are one proof; each step reads what the one before has left.
"""

import dataclasses
import functools
import math
from typing import Protocol

import numpy as np

from jaxbound.curvature.jets import Array, Interval, UnsupportedError, enclose
from jaxbound.curvature.partition import CONCAVE, CONVEX, FLAT, LEVELS, LINEAR, OPEN, SMALLEST, TOLERANCE, Partition, is_whole, least_size, magnitude, partition, split, torn, width_of

_KINDS = ("", "linear", "convex", "concave")
_MOST_PIECES, _MOST_GAPS = 12, 16
_APART = 2.0**-22  # relative distance at which two numbers stay two in float32


class Program(Protocol):
    """A scalar program: `(name, params, operands)` each; operands: ("z",), ("var", i), ("lit", x), ("const", k)."""

    @property
    def instructions(self) -> tuple:
        """In order; the last one is the result."""
        ...


@dataclasses.dataclass(frozen=True)
class Piece:
    """The closed interval `[left, right]` on which sigma is of one kind: "linear", "convex" or "concave"."""

    left: float
    right: float
    kind: str


@dataclasses.dataclass(frozen=True)
class Cell:
    """The open interval `(left, right)` on which only `lower <= sigma <= upper` is known, where sigma is defined."""

    left: float
    right: float
    lower: float
    upper: float


@dataclasses.dataclass(frozen=True)
class Curvature:
    """What is proved of a scalar function; the module's head says up to what `slack`.

    Attributes:
        domain: from the first piece's left to the last one's right end. The flags and `slope_range` speak of it alone.
        pieces: in order; together with `cells` they cover the line.
        cells: in order; open intervals around jumps and poles, where sigma is undefined, where nothing was proved, and
            the tails beyond the domain. A cell matters for `[l, u]` if `left < u` and `right > l`, with strict signs:
            jumps lie well inside their cells, also in float32, and ends belong to the pieces.
        critical: between neighbours among these, the ends of pieces and of cells, sigma is monotone.
        switches: points within pieces where the program takes another branch, so that its derivative as computed there
            may not be sigma's (`|z|` inside softplus, at 0).
        slack: what convexity and monotonicity may lack, to be multiplied by `max(1, |l|, |u|)`; some 1e-14, more for
            functions that are steep around 0.
        wobble: what `is_monotone` may lack, likewise, but for the `kinks`: points where sigma may jump by so much.
        is_piecewise_linear: every piece is linear, there are no cells.
        is_monotone: +1 not decreasing, -1 not increasing, 0 neither or not proved.
        is_continuous: there are no jumps, of any height, and no poles in the domain, up to rounding.
        slope_range: a hull of sigma' over the domain, almost everywhere; infinite where sigma jumps.
        value_range: a hull of sigma over the line, where it is defined.
        undefined: open intervals outside of which sigma certainly has a real value, and so has all that it is made of.
    """

    domain: tuple[float, float]
    pieces: tuple[Piece, ...]
    cells: tuple[Cell, ...]
    critical: tuple[float, ...]
    switches: tuple[float, ...]
    slack: float
    wobble: float
    kinks: tuple[tuple[float, float], ...]
    is_piecewise_linear: bool
    is_monotone: int
    is_continuous: bool
    slope_range: tuple[float, float]
    value_range: tuple[float, float]
    undefined: tuple[tuple[float, float], ...]


# 3. Pieces ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Span:
    """Consecutive cells `first..last` of one kind; the ends may lie inside neighbouring flat cells."""

    kind: int
    first: int
    last: int
    left: float
    right: float
    slack: float = 0.0


def _spans(cells: Partition) -> list[_Span]:
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
        _Span(int(kind[i]), int(i), int(j), float(cells.left[i]), float(cells.right[j]))
        for i, j in zip(firsts, lasts, strict=True)
    ]


def _slope(cells: Partition, span: _Span, side: int) -> Interval:
    """The one-sided slope at the left (1) or right (2) end of a span."""
    return cells.proof.orders[1, side, span.first if side == 1 else span.last]


def _prolongation(cells: Partition, run: _Span, slope: Interval, after: bool) -> float:
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


def _attach(cells: Partition, span: _Span, run: _Span | None, end: float) -> _Span | None:
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


def _common_kind(cells: Partition, a: _Span, b: _Span, touching: bool) -> int | None:
    """The kind of two neighbours as one; two lines are one only if they are the same line."""
    if a.kind == b.kind == LINEAR:
        ends = np.array([*_slope(cells, a, 2), *_slope(cells, b, 1)])
        return LINEAR if (touching and cells.smooth[b.first]) or (ends[0] == ends).all() else None
    if LINEAR in (a.kind, b.kind):
        return max(a.kind, b.kind)
    return a.kind if a.kind == b.kind else None


def _join(cells: Partition, a: _Span, run: _Span | None, b: _Span) -> _Span | None:
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
    return _Span(kind, a.first, b.last, a.left, b.right, slack + 2.0 * kink)


def _separate(
    cells: Partition, a: _Span, run: _Span | None, b: _Span
) -> tuple[_Span, _Span, list[tuple[float, float]]]:
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


def _assemble(cells: Partition) -> tuple[list[_Span], list[tuple[float, float]]]:
    """Pieces, and the holes that they leave; a jump is a hole of width 0."""
    pieces: list[_Span] = []
    holes: list[tuple[float, float]] = []
    current, run = None, None

    def close(current: _Span | None, run: _Span | None) -> None:
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


def _trim(pieces: list[_Span], holes: list[tuple[float, float]]) -> tuple[list[_Span], list[tuple[float, float]]]:
    """At most `_MOST_PIECES` pieces, those nearest to zero, and holes that float32 can tell from their neighbours."""
    wide = []
    for left, right in sorted(holes):
        margin = max(SMALLEST, _APART * min(abs(left), abs(right)))
        left, right = (left - margin, right + margin) if right - left < margin else (left, right)
        if wide and left < wide[-1][1]:
            left, right = wide.pop()[0], right
        wide.append((left, right))
    dropped = [False, False]
    while len(pieces) > _MOST_PIECES:
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


def _values(cells: Partition, left: float, right: float) -> Interval:
    """The hull of sigma on an open interval."""
    if right - left <= 4.0 * max(SMALLEST, _APART * abs(left)):
        return enclose(cells.instructions, np.array([left]), np.array([right])).orders[0, 0, 0]
    inside = (cells.left < right) & (cells.right > left)
    between = (cells.right[:-1] < right) & (cells.right[:-1] > left)
    ranges = cells.proof.orders[0, 0, inside], cells.points.orders[0, 0, between]
    return Interval(min(r.lower.min(initial=np.inf) for r in ranges), max(r.upper.max(initial=-np.inf) for r in ranges))


# 4. Turns -------------------------------------------------------------------------------------------------------------


def _turn(cells: Partition, piece: _Span) -> tuple[list[float], float]:
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
    wobble = min(float(np.sum(np.maximum(side, 0.0) * share)) for side in (-body.lower, body.upper))
    turns = start > piece.left and end < piece.right
    if wobble <= TOLERANCE * cells.steepness:
        return [_simplest(start, end)] if turns and wobble else [], wobble
    return _section(cells, piece, start, end)


def _rising(slopes: Interval, kind: int) -> Interval:
    return slopes if kind == CONVEX else Interval(-slopes.upper, -slopes.lower)


def _section(cells: Partition, piece: _Span, start: float, end: float) -> tuple[list[float], float]:
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


# All together ---------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1024)
def analyse(program: Program) -> Curvature | None:
    """Prove where a scalar program is linear, convex or concave, where it turns and what its values are elsewhere.

    `sigma(z) >= sigma(z0) + sigma'(z0) (z - z0) - slack * max(1, |z|, |z0|)` in every convex piece, the reverse in
    every concave one, both in linear ones; `lower <= sigma(z) <= upper` in every cell where sigma is defined.

    Args:
        program: hashable; one real variable, floating point literals, finite unknown constants.

    Returns:
        The `Curvature`, or None where an instruction has no rule or nothing could be proved: relax the parts instead.

    Rounding: of real arithmetic, not of the program's own evaluation, whose error the caller adds.

    >>> import collections
    >>> relu = collections.namedtuple("P", "instructions")((("max", (), (("z",), ("lit", 0.0))),))
    >>> [(piece.left, piece.right, piece.kind) for piece in analyse(relu).pieces]
    [(-inf, 0.0, 'linear'), (0.0, inf, 'linear')]
    """
    try:
        with np.errstate(all="ignore"):
            cells = partition(program.instructions)
            pieces, holes = _trim(*_assemble(cells))
            turns = [_turn(cells, piece) for piece in pieces]
            if not pieces or not all(wobble <= TOLERANCE * cells.steepness for _, wobble in turns):
                return None
            found = _describe(cells, pieces, holes, turns)
            inside = [c for c in found.cells if found.domain[0] < c.left and c.right < found.domain[1]]
            jumps = any(math.isinf(cell.upper - cell.lower) for cell in inside)
            return None if jumps and _has_constants(program) else found  # how far depends on the constants
    except UnsupportedError:
        return None


def _has_constants(program: Program) -> bool:
    return any(operand[0] == "const" for _, _, operands in program.instructions for operand in operands)


def _describe(
    cells: Partition, pieces: list[_Span], holes: list[tuple[float, float]], turns: list[tuple[list[float], float]]
) -> Curvature:
    low, high = pieces[0].left, pieces[-1].right
    inside = (cells.right > low) & (cells.left < high)
    slopes = cells.proof.orders[1, 0, inside]
    joints = inside[:-1] & inside[1:]
    kinked = 1 + np.flatnonzero(joints & (cells.gap[1:-1] > 0) & ~cells.broken[1:-1])
    unproved = inside & (cells.kind == OPEN)
    jumps = (cells.broken | cells.apart)[1:-1][joints].any() or torn(cells)[inside].any()
    continuous = not jumps and bool(cells.proof.continuous[unproved].all())
    slope_range = (float(slopes.lower.min()), float(slopes.upper.max())) if continuous else (-math.inf, math.inf)
    direction, wobble = (0, 0.0) if unproved.any() else _direction(cells, joints, slopes)
    slack = max(piece.slack + turn[1] for piece, turn in zip(pieces, turns, strict=True)) + wobble
    return Curvature(
        domain=(low, high),
        pieces=tuple(Piece(piece.left, piece.right, _KINDS[piece.kind]) for piece in pieces),
        cells=tuple(Cell(left, right, *map(float, _values(cells, left, right))) for left, right in holes),
        critical=tuple(point for turn in turns for point in turn[0]),
        switches=_switches(cells, pieces),
        slack=2.001 * slack,  # a line at z0 and its value at z
        wobble=2.001 * wobble,
        kinks=tuple((float(cells.left[i]), 1.001 * float(cells.gap[i])) for i in kinked),
        is_piecewise_linear=not holes and all(piece.kind == LINEAR for piece in pieces),
        is_monotone=direction,
        is_continuous=continuous,
        slope_range=slope_range,
        value_range=_value_range(cells),
        undefined=_undefined(cells),
    )


def _value_range(cells: Partition) -> tuple[float, float]:
    parts = cells.proof.orders[0, 0, cells.proof.defined], cells.points.orders[0, 0, cells.points.defined]
    lower, upper = np.concatenate([p.lower for p in parts]), np.concatenate([p.upper for p in parts])
    return (float(lower.min()), float(upper.max())) if lower.size else (-math.inf, math.inf)


def _undefined(cells: Partition) -> tuple[tuple[float, float], ...]:
    """Cells, and points between them, on which sigma is not proved to be defined, as at most `_MOST_GAPS` intervals."""
    parts = [(float(a), float(b)) for a, b in zip(cells.left, cells.right, strict=True)]
    borders = [
        (-SMALLEST, SMALLEST) if at == 0.0 else (math.nextafter(at, -math.inf), math.nextafter(at, math.inf))
        for at in cells.left[1:].tolist()
    ]
    found = [part for part, is_defined in zip(parts, cells.proof.defined, strict=True) if not is_defined]
    found += [border for border, is_defined in zip(borders, cells.points.defined, strict=True) if not is_defined]
    merged: list[tuple[float, float]] = []
    for left, right in sorted(found):
        if merged and left < merged[-1][1]:
            left, right = merged[-1][0], max(merged.pop()[1], right)
        merged.append((left, right))
    if len(merged) > _MOST_GAPS:  # those nearest to 0, and what is beyond
        nearest = sorted(merged, key=lambda gap: max(gap[0], -gap[1]))[: _MOST_GAPS - 2]
        low, high = min(gap[0] for gap in nearest), max(gap[1] for gap in nearest)
        merged = [(-math.inf, low), *sorted(nearest), (high, math.inf)]
    return tuple(merged)


def _switches(cells: Partition, pieces: list[_Span]) -> tuple[float, ...]:
    """The joints that are not smooth within pieces; the nearest to zero if there are many."""
    inside = [i for piece in pieces for i in range(piece.first + 1, piece.last + 1) if not cells.smooth[i]]
    points = sorted({float(cells.left[i]) for i in inside}, key=abs)
    return tuple(sorted(points[:_MOST_PIECES]))


def _direction(cells: Partition, joints: Array, slopes: Interval) -> tuple[int, float]:
    """Whether sigma rises (1) or falls (-1) throughout, and by what slope, lost in rounding, it may not."""
    joints = np.flatnonzero(joints & cells.broken[1:-1])
    before, at, after = (
        cells.proof.orders[0, 2, joints],
        cells.points.orders[0, 0, joints],
        cells.proof.orders[0, 1, joints + 1],
    )
    up = (before.upper <= at.lower) & (at.upper <= after.lower)
    down = (before.lower >= at.upper) & (at.lower >= after.upper)
    least, most = float(slopes.lower.min()), float(slopes.upper.max())
    if least >= -TOLERANCE * cells.steepness and up.all():
        return 1, max(0.0, -least)
    if most <= TOLERANCE * cells.steepness and down.all():
        return -1, max(0.0, most)
    return 0, 0.0
