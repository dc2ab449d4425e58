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

Rounding: every product and sum above is one of at most n = (entries of A's fullest column) + rows + columns + 16 in a
row, so `lower_bound` subtracts `2 gamma_n` times the sum of all terms' absolute values (Higham 2002, section 3.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxbound.relaxations.affine import gamma

Array = np.ndarray


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


class Program(NamedTuple):
    """See the module's head; in float64, every number as the network has it."""

    lower: Array
    upper: Array
    stated: Array
    """Whether a column's box is part of the program; it holds in any case."""
    whole: Array
    """Whether a column is a whole number."""
    rows: Rows
    balls: tuple[Ball, ...]


class Multipliers(NamedTuple):
    """What a solver proposes for one objective."""

    rows: Array
    balls: tuple[Array, ...]


def lower_bound(program: Program, column: int, sign: float, multipliers: Multipliers | None = None) -> float:
    """A number below `sign * v[column]` for every v of the program, whatever the multipliers; -inf if it is undefined.

    Without multipliers: what the column's own box says.
    """
    if multipliers is None:
        return sign * float(program.lower[column] if sign > 0 else program.upper[column])
    rows, reach = program.rows, np.maximum(np.abs(program.lower), np.abs(program.upper))
    with np.errstate(all="ignore"):
        y = np.where(rows.lower == -np.inf, np.minimum(multipliers.rows, 0), multipliers.rows)
        y = np.where(rows.upper == np.inf, np.maximum(y, 0), y)
        attained = _times(y, np.where(y > 0, rows.lower, rows.upper))
        pulled = rows.value * y[rows.row]
        width = len(program.lower)
        reduced = -np.bincount(rows.column, pulled, width)
        size = np.bincount(rows.column, np.abs(pulled), width)
        reduced[column] += sign
        size[column] += 1
        constants = [*attained]
        for ball, w in zip(program.balls, multipliers.balls, strict=True):
            reduced[ball.columns] -= w
            size[ball.columns] += np.abs(w)
            constants += [*(w * ball.center), -ball.radius * np.sqrt(np.sum(w * w))]
        ends = _times(reduced, np.where(reduced > 0, program.lower, program.upper))
        terms = np.bincount(rows.column, minlength=width).max(initial=0) + len(rows.lower) + width + 16
        magnitude = np.sum(np.abs(constants)) + np.sum(_times(size, reach))
        value = np.sum(constants) + np.sum(ends) - 2 * gamma(int(terms), np.float64) * magnitude
    return float(value) if value < np.inf else -np.inf


def _times(factors: Array, values: Array) -> Array:
    """The product in which a factor of zero ignores an infinite value."""
    return np.where(factors == 0, 0.0, factors * np.where(factors == 0, 0.0, values))


class Builder:
    """A program that grows: nodes are added in order, and boxes tightened."""

    def __init__(self):
        self._columns: list[tuple[Array, Array, Array, Array]] = []
        self._rows: list[Rows] = []
        self._balls: list[Ball] = []
        self._width = self._height = 0

    def add_columns(self, lower: Array, upper: Array, *, stated: bool = True, whole: bool = False) -> Array:
        """New columns in their boxes; returns their numbers."""
        lower, upper = np.asarray(lower, np.float64).reshape(-1), np.asarray(upper, np.float64).reshape(-1)
        size = len(lower)
        self._columns.append((lower.copy(), upper.copy(), np.full(size, stated), np.full(size, whole)))
        self._width += size
        return np.arange(self._width - size, self._width)

    def add_rows(self, triplets: Sequence[tuple[Array, Array, Array]], lower: Array, upper: Array) -> None:
        """New rows from triplets (row, column, value), rows counted from 0; entries of 0 are left out."""
        row, column, value = (np.concatenate([np.ravel(part[k]) for part in triplets]) for k in range(3))
        used = value != 0
        shifted = row[used].astype(np.int64) + self._height
        self._rows.append(Rows(shifted, column[used].astype(np.int64), value[used].astype(np.float64), lower, upper))
        self._height += len(lower)

    def add_ball(self, columns: Array, center: Array, radius: float) -> None:
        """Columns that lie in an l_2 ball."""
        self._balls.append(Ball(columns, center, radius))

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
        lower, upper, stated, whole = (np.concatenate([part[k] for part in self._columns]) for k in range(4))
        none = Rows(np.zeros(0, np.int64), np.zeros(0, np.int64), *(np.zeros(0) for _ in range(3)))
        rows = Rows(*(np.concatenate(parts) for parts in zip(none, *self._rows, strict=True)))
        return Program(lower, upper, stated, whole, rows, tuple(self._balls))
