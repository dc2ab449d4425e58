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
"""

import dataclasses
import functools
import math
from typing import Protocol

import numpy as np

from jaxbound.curvature.enclosing import enclose
from jaxbound.curvature.intervals import Array, Interval
from jaxbound.curvature.jets import UnsupportedError
from jaxbound.curvature.partition import (
    LINEAR,
    OPEN,
    SMALLEST,
    TOLERANCE,
    Partition,
    partition,
    torn,
)
from jaxbound.curvature.spans import KINDS, MOST_PIECES, Span, assemble, trim, turn, values_over

_MOST_GAPS = 16


class Program(Protocol):
    """A scalar program: `(name, params, operands)` each; operands: ("z",), ("var", i), ("lit", x), ("lit", x,
    (a, b)) for a rounded number whose real value lies in [a, b], ("const", k)."""

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
            pieces, holes = trim(*assemble(cells))
            turns = [turn(cells, piece) for piece in pieces]
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
    cells: Partition, pieces: list[Span], holes: list[tuple[float, float]], turns: list[tuple[list[float], float]]
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
        pieces=tuple(Piece(piece.left, piece.right, KINDS[piece.kind]) for piece in pieces),
        cells=tuple(Cell(left, right, *map(float, values_over(cells, left, right))) for left, right in holes),
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
    """A cell or point on which sigma is not proved to be defined may still hold numbers for which it is."""
    proofs = cells.proof, cells.points
    left, right = np.concatenate([cells.left, cells.left[1:]]), np.concatenate([cells.right, cells.left[1:]])
    unsure = ~np.concatenate([proof.defined for proof in proofs])
    parts = [proof.orders[0, 0, proof.defined] for proof in proofs]
    if unsure.any():
        parts.append(enclose(cells.instructions, left[unsure], right[unsure], within=True).orders[0, 0])
    lower, upper = (np.concatenate([getattr(part, end) for part in parts]) for end in ("lower", "upper"))
    return float(lower.min()), float(upper.max())


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
    if len(merged) > _MOST_GAPS:  # those nearest to 0, and on each side one around all that are farther away
        by_distance = sorted(merged, key=lambda gap: max(gap[0], -gap[1]))
        nearest, farther = by_distance[: _MOST_GAPS - 2], by_distance[_MOST_GAPS - 2 :]
        sides = [gap for gap in farther if gap[0] < 0], [gap for gap in farther if gap[0] >= 0]
        merged = sorted([*nearest, *((min(side)[0], max(right for _, right in side)) for side in sides if side)])
    return tuple(merged)


def _switches(cells: Partition, pieces: list[Span]) -> tuple[float, ...]:
    """The joints that are not smooth within pieces; the nearest to zero if there are many."""
    inside = [i for piece in pieces for i in range(piece.first + 1, piece.last + 1) if not cells.smooth[i]]
    points = sorted({float(cells.left[i]) for i in inside}, key=abs)
    return tuple(sorted(points[:MOST_PIECES]))


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
