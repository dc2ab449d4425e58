"""The line cut into cells on each of which a scalar function is of one proved kind, and what is proved between them.

The first two steps of the proof of which `curvature` holds the rest: *cells* and *joints*; its head describes them.
"""

import dataclasses
import math

import numpy as np

from jaxbound.curvature.enclosing import Enclosure, enclose
from jaxbound.curvature.intervals import Array, Interval

OPEN, LINEAR, CONVEX, CONCAVE, FLAT = range(5)
_FLATNESS = 1e-14  # by how much the slopes on a flat cell may differ
TOLERANCE = 1e-13  # what one joint or one run of flat cells may add to the slack
LEVELS = 32
_CROWD = 2048  # instructions times open cells kept on one level, those nearest to 1 in size; 64 to 128
_WORK = 150_000  # cells times instructions after which what is open stays open
SMALLEST = 2.0**-126  # float32's smallest normal number: compiled code may flush what is below to zero

# 1. Cells -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Partition:
    """The finished cells from left to right, and the points between them."""

    instructions: tuple
    steepness: float  # at least 1; the unit in which rounding is measured
    left: Array
    right: Array
    kind: Array
    proof: Enclosure
    points: Enclosure
    smooth: Array  # (cells + 1,): joint i is the left end of cell i
    gap: Array  # (cells + 1,): how far value and limits differ there
    broken: Array  # (cells + 1,): too far for a kink
    apart: Array  # (cells + 1,): certainly different there, by however little: a jump


def _grid() -> Array:
    powers = [2.0**k for k in (-126, -32, -8, -2, -1, 0, 1, 2, 3, 4, 5, 6, 8, 16, 32, 64)]
    positive = np.array(sorted([*powers, 3.0, 6.0, float(np.finfo(np.float32).max), math.inf]))
    return np.concatenate([-positive[::-1], [0.0], positive])


def least_size(left: Array, right: Array) -> Array:
    """The least absolute value in intervals."""
    return np.where((left < 0) & (right > 0), 0.0, np.minimum(np.abs(left), np.abs(right)))


def width_of(x: Interval) -> Array:
    """How wide an interval is; infinite where an end is."""
    return np.where(np.isfinite(x.lower) & np.isfinite(x.upper), x.upper - x.lower, np.inf)


def is_whole(x: Interval) -> Array:
    """Where nothing is known."""
    return np.isinf(x.lower) & np.isinf(x.upper)


def magnitude(x: Interval) -> Array:
    """The largest absolute value."""
    return np.maximum(np.abs(x.lower), np.abs(x.upper))


def _classify(left: Array, right: Array, proof: Enclosure, last: Array, steepness: float) -> Array:
    value, slope, bend = (proof.orders[k, 0] for k in range(3))
    scale = np.maximum(1.0, least_size(left, right))
    size = np.maximum(steepness, least_size(*value) / scale)
    flat = proof.continuous & (width_of(slope) <= _FLATNESS * size)
    flat |= last & np.isfinite(right - left) & (width_of(value) <= TOLERANCE * size * scale)
    convex, concave = proof.continuous & (bend.lower >= 0), proof.continuous & (bend.upper <= 0)
    return np.select([convex & concave, convex, concave, flat], [LINEAR, CONVEX, CONCAVE, FLAT], OPEN)


def _noisy(proof: Enclosure) -> Array:
    """Where slope and bend are as uncertain at both ends as between: rounding, which splitting does not mend."""
    width = width_of(proof.orders[1:])
    noisy = np.isfinite(width[:, 0]) & (width[:, 1:].min(axis=1) >= 0.5 * width[:, 0])
    return noisy.all(axis=0) & (width[0, 0] > _FLATNESS)


def split(left: Array, right: Array, parts: int) -> tuple[Array, Array]:
    """Cut cells into parts, evenly, or at powers of two where they span more than four octaves."""
    steps = np.linspace(0.0, 1.0, parts + 1)[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        low, high = np.log2(np.abs(left)), np.log2(np.abs(right))
        exponents = np.nan_to_num(np.round(low + steps * (high - low)), posinf=0.0, neginf=0.0)
        geometric = np.ldexp(np.sign(right + left), exponents.astype(int))
    edges = np.where(np.abs(high - low) > 4.0, geometric, left + steps * (right - left))
    edges[0], edges[-1] = left, right
    edges = np.clip(edges, left, right)
    left, right = edges[:-1].ravel(), edges[1:].ravel()
    return left[left < right], right[left < right]


def partition(instructions: tuple) -> Partition:
    """Cut the line until every cell is of a proved kind, or stays open."""
    edges, finished, work, steepness = _grid(), [], 0, 1.0
    crowd = max(64, min(128, _CROWD // len(instructions)))
    left, right = edges[:-1], edges[1:]
    for level in range(LEVELS):
        proof = enclose(instructions, left, right)
        if level == 0:
            typical = np.isin(np.abs(right), (0.25, 0.5, 1.0, 2.0))
            steepness = max(1.0, float(np.max(least_size(*proof.orders[1, 2, typical]))))
        work += left.size * len(instructions)
        last = (
            (np.nextafter(left, np.inf) >= right)
            | np.isinf(right - left)
            | (magnitude(Interval(left, right)) <= SMALLEST)
        )
        last |= _noisy(proof)
        kind = _classify(left, right, proof, last, steepness)
        active = np.flatnonzero((kind == OPEN) & ~last & (level < LEVELS - 1) & (work < _WORK))
        hopeless = is_whole(proof.orders[0][:, active]).all(0) & (level > 1)  # undefined at the ends and between
        active = active[~hopeless]
        octave = np.log2(magnitude(Interval(left[active], right[active])))
        active = active[np.argsort(np.maximum(octave, -octave / 8.0), kind="stable")[:crowd]]
        done = np.ones(left.size, bool)
        done[active] = False
        finished.append((left[done], right[done], kind[done], take(proof, done)))
        if not active.size:
            break
        left, right = split(left[active], right[active], 8)
    left, right, kind = (np.concatenate([part[k] for part in finished]) for k in range(3))
    order = np.argsort(left)
    proof = take(_concatenate([part[3] for part in finished]), order)
    return _with_joints(instructions, steepness, left[order], right[order], kind[order], proof)


def take(proof: Enclosure, index: Array | slice) -> Enclosure:
    """What is proved on some of the cells."""
    flags = proof.continuous[index], proof.smooth[index], proof.defined[index]
    return Enclosure(proof.orders[..., index], *flags, proof.decisions[:, index])


def _concatenate(proofs: list[Enclosure]) -> Enclosure:
    lower, upper = (np.concatenate(ends, axis=-1) for ends in zip(*(proof.orders for proof in proofs), strict=True))
    flags = (np.concatenate([getattr(proof, name) for proof in proofs], axis=-1) for name in Enclosure._fields[1:])
    return Enclosure(Interval(lower, upper), *flags)


# 2. Joints ------------------------------------------------------------------------------------------------------------


def _with_joints(
    instructions: tuple, steepness: float, left: Array, right: Array, kind: Array, proof: Enclosure
) -> Partition:
    at = right[:-1]
    points = enclose(instructions, at, at)
    before, after = take(proof, slice(None, -1)), take(proof, slice(1, None))
    alike = (before.decisions == points.decisions) & (after.decisions == points.decisions)
    smooth = alike.all(0) & points.smooth & points.continuous
    lower, upper = zip(before.orders[0, 2], after.orders[0, 1], points.orders[0, 0], strict=True)
    values = Interval(np.min(lower, axis=0), np.max(upper, axis=0))
    gap = np.where(smooth, 0.0, width_of(values))
    broken = ~(gap <= TOLERANCE * np.maximum(steepness, least_size(*values)))
    apart = ~smooth & (np.max(lower, axis=0) > np.min(upper, axis=0))
    ends = np.array([False]), np.array([math.inf]), np.array([True]), np.array([True])
    smooth, gap, broken, apart = (
        np.concatenate([end, inner, end]) for end, inner in zip(ends, (smooth, gap, broken, apart), strict=True)
    )
    return Partition(instructions, steepness, left, right, kind, proof, points, smooth, gap, broken, apart)


def torn(cells: Partition) -> Array:
    """Runs of cells not proved continuous whose neighbours differ by more than their slopes explain: they jump."""
    loose, found = ~cells.proof.continuous, np.zeros(cells.left.size, bool)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], loose, [False]]).astype(int)))
    for first, last in zip(edges[::2], edges[1::2] - 1, strict=True):
        run = slice(first, last + 1)
        start = cells.proof.orders[0, 2, first - 1] if first else cells.proof.orders[0, 1, first]
        end = cells.proof.orders[0, 1, last + 1] if last + 1 < loose.size else cells.proof.orders[0, 2, last]
        gap = max(start.lower - end.upper, end.lower - start.upper)
        reach = np.sum(magnitude(cells.proof.orders[1, 0, run]) * (cells.right - cells.left)[run])
        found[run] = not (np.isfinite(reach) and gap <= reach)
    return found
