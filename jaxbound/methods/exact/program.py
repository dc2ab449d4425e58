r"""Programs over the values of a network, and lower bounds of them that no solver has to be trusted for.

A program minimises one column of

    rows.lower <= A v <= rows.upper,    lower <= v <= upper,    ||v[ball] - center||_2 <= radius for some columns.

Every v that the network can attain satisfies all of it. So for *any* multipliers y of the rows (of the sign that their
finite ends allow) and w of the balls, with the reduced cost d = c - A^T y - w,

    c.v  =  y.(A v) + w.v + d.v  >=  sum_i (y_i > 0 ? y_i rows.lower_i : y_i rows.upper_i)
                                     + sum over balls of (w.center - radius ||w||_2)
                                     + sum_j min(d_j lower_j, d_j upper_j),

the Lagrangian over the box of all columns (Neumaier and Shcherbina, "Safe bounds in linear and mixed-integer linear
programming", 2004, section 3). A solver only proposes y and w; where they are poor the bound is loose, never wrong.

An exact program also has splits: every v satisfies one of the options of each, which narrows columns and rows.
Multipliers of the narrowed program bound that part of the values (`tree`).

Rounding: no term above passes through more than n = (entries of A's fullest column) + rows + 2 columns + 2 balls + 16
operations, so `lower_bound` subtracts `2 gamma_n` times the sum of all terms' absolute values (Higham 2002, section
3.1). A product of x and y that underflows is wrong by at most t (1 + |x|), t the smallest normal number, also where a
processor takes a subnormal y for 0; every product's absolute value is taken t / eps (1 + |x|) larger, and 2 gamma_n is
at least n eps. Multipliers that are subnormal themselves are not used.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from jaxbound.relaxations.affine import gamma

Array = np.ndarray
_LIMITS = np.finfo(np.float64)


class Ball(NamedTuple):
    """Columns that lie in an l_2 ball."""

    columns: Array
    center: Array
    radius: float


class Rows(NamedTuple):
    """Rows of a matrix as triplets, with what they lie between; triplets of one place add up."""

    row: Array
    column: Array
    value: Array
    lower: Array
    upper: Array


class Option(NamedTuple):
    """What one case of a split says: smaller boxes of some columns, other ends of some rows."""

    columns: Array
    column_ends: tuple[Array, Array]
    rows: Array
    row_ends: tuple[Array, Array]


class Split(NamedTuple):
    """Every v satisfies one of these options; they say what `column` is."""

    column: int
    options: tuple[Option, ...]


class Program(NamedTuple):
    """See the module's head; in float64, every number as the network has it."""

    lower: Array
    upper: Array
    stated: Array
    """Whether a column's box is part of the program; it holds in any case."""
    rows: Rows
    balls: tuple[Ball, ...]
    splits: tuple[Split, ...] = ()


class Multipliers(NamedTuple):
    """What a solver proposes for one objective."""

    rows: Array
    balls: tuple[Array, ...]


def narrowed(program: Program, options: Iterable[Option]) -> Program:
    """The part of the program in which these options hold."""
    lower, upper, low, high = (end.copy() for end in (program.lower, program.upper, *program.rows[3:]))
    for option in options:
        lower[option.columns] = np.maximum(lower[option.columns], option.column_ends[0])
        upper[option.columns] = np.minimum(upper[option.columns], option.column_ends[1])
        low[option.rows], high[option.rows] = option.row_ends
    return program._replace(lower=lower, upper=upper, rows=program.rows._replace(lower=low, upper=high))


def is_empty(program: Program, multipliers: Multipliers) -> bool:
    """Whether multipliers prove that the program has no value: they bound zero by a positive number."""
    return bool(np.any(program.lower > program.upper)) or _lagrangian(program, 0, 0.0, multipliers) > 0


def lower_bound(program: Program, column: int, sign: float, multipliers: Multipliers | None = None) -> float:
    """A number below `sign * v[column]` for every v of the program, whatever the multipliers; -inf if it is undefined.

    Without multipliers: what the column's own box says.
    """
    if multipliers is None:
        return sign * float(program.lower[column] if sign > 0 else program.upper[column])
    return _lagrangian(program, column, sign, multipliers)


def _lagrangian(program: Program, column: int, sign: float, multipliers: Multipliers) -> float:
    rows, reach = program.rows, np.maximum(np.abs(program.lower), np.abs(program.upper))
    width, room = len(program.lower), _LIMITS.tiny / _LIMITS.eps
    with np.errstate(all="ignore"):
        y = np.where(rows.lower == -np.inf, np.minimum(multipliers.rows, 0), multipliers.rows)
        y = _normal(np.where(rows.upper == np.inf, np.maximum(y, 0), y))
        attained, charged = _times(y, np.where(y > 0, rows.lower, rows.upper)), room * (1 + np.abs(y)) * (y != 0)
        pulled, entry = rows.value * y[rows.row], charged[rows.row]
        reduced = -np.bincount(rows.column, pulled, width)
        size = np.bincount(rows.column, np.abs(pulled) + entry, width)
        reduced[column] += sign
        size[column] += abs(sign)
        constants, extra = [*attained], float(np.sum(charged))
        for ball, part in zip(program.balls, multipliers.balls, strict=True):
            w = _normal(part)
            peak = np.max(np.abs(w), initial=0)
            length = peak * np.sqrt(np.sum(np.square(w / peak))) if peak else 0.0
            reduced[ball.columns] -= w
            size[ball.columns] += np.abs(w)
            constants += [*(w * ball.center), -ball.radius * length]
            extra += room * (1 + len(w) + np.sum(np.abs(w)) + length) * (peak > 0)
        ends = _times(reduced, np.where(reduced > 0, program.lower, program.upper))
        most = np.bincount(rows.column, minlength=width).max(initial=0)
        terms = most + len(rows.lower) + 2 * width + 2 * len(program.balls) + 16
        magnitude = (
            np.sum(np.abs(constants)) + np.sum(_times(size, reach)) + extra + room * np.sum((1 + size) * (size != 0))
        )
        value = np.sum(constants) + np.sum(ends) - 2 * gamma(int(terms), np.float64) * magnitude
    return float(value) if value < np.inf else -np.inf


def _normal(values: Array) -> Array:
    """Multipliers without subnormal ones."""
    return np.where(np.abs(values) < _LIMITS.tiny, 0.0, values)


def _times(factors: Array, values: Array) -> Array:
    """The product in which a factor of zero ignores an infinite value."""
    return np.where(factors == 0, 0.0, factors * np.where(factors == 0, 0.0, values))


class Builder:
    """A program that grows: nodes are added in order, and boxes tightened."""

    def __init__(self):
        self._columns: list[tuple[Array, Array, Array]] = []
        self._rows: list[Rows] = []
        self._balls: list[Ball] = []
        self._splits: list[Split] = []
        self._width = self._height = 0

    def add_columns(self, lower: Array, upper: Array, *, stated: bool = True) -> Array:
        """New columns in their boxes; returns their numbers."""
        lower, upper = np.asarray(lower, np.float64).reshape(-1), np.asarray(upper, np.float64).reshape(-1)
        size = len(lower)
        self._columns.append((lower.copy(), upper.copy(), np.full(size, stated)))
        self._width += size
        return np.arange(self._width - size, self._width)

    def add_rows(self, triplets: Sequence[tuple[Array, Array, Array]], lower: Array, upper: Array) -> Array:
        """New rows from triplets (row, column, value), counted from 0, entries of 0 left out; returns their numbers."""
        row, column, value = (np.concatenate([np.ravel(part[k]) for part in triplets]) for k in range(3))
        used = value != 0
        shifted = row[used].astype(np.int64) + self._height
        self._rows.append(Rows(shifted, column[used].astype(np.int64), value[used].astype(np.float64), lower, upper))
        self._height += len(lower)
        return np.arange(self._height - len(lower), self._height)

    def add_ball(self, columns: Array, center: Array, radius: float) -> None:
        """Columns that lie in an l_2 ball."""
        self._balls.append(Ball(columns, center, radius))

    def add_split(self, column: int, options: Sequence[Option]) -> None:
        """One of these holds."""
        self._splits.append(Split(int(column), tuple(options)))

    def tighten(self, columns: Array, lower: Array, upper: Array) -> None:
        """Other boxes for columns that were added together."""
        for number, (first, *_) in enumerate(self._starts()):
            if first == columns[0]:
                self._columns[number][0][:] = np.ravel(lower)
                self._columns[number][1][:] = np.ravel(upper)

    def _starts(self) -> list[tuple[int, int]]:
        stops = np.cumsum([len(part[0]) for part in self._columns])
        return [(int(stop) - len(part[0]), int(stop)) for stop, part in zip(stops, self._columns, strict=True)]

    def program(self) -> Program:
        """The program as it stands."""
        lower, upper, stated = (np.concatenate([part[k] for part in self._columns]) for k in range(3))
        none = Rows(np.zeros(0, np.int64), np.zeros(0, np.int64), *(np.zeros(0) for _ in range(3)))
        rows = Rows(*(np.concatenate(parts) for parts in zip(none, *self._rows, strict=True)))
        return Program(lower, upper, stated, rows, tuple(self._balls), tuple(self._splits))
