"""Branch and bound over linear programs: an exact range without trust in a solver.

A leaf of the tree is a choice of options for some splits (`program`), and its bound the Lagrangian of the program that
they narrow, at multipliers that the solver proposes. Every value of the network lies in some leaf, so the least bound
of all leaves is a bound, whenever the search ends. The leaf with the least bound is branched on next, one child for
each option of the split that its solution violates and that the multipliers depend on most; where it violates none, the
bound is (nearly) attained, and the search is over. A child without values is dropped where multipliers prove that it
has none.
"""

from __future__ import annotations

import heapq
import itertools
import math
import time

import numpy as np

from jaxbound.methods.exact.program import Array, Program, is_empty, lower_bound, narrowed
from jaxbound.methods.exact.solvers import Linear

_SOLVED = 1e-7
"""How much a solution may violate the options of a split, relative to the sizes of the columns."""


class Tree:
    """Lower bounds of one objective after another over one program."""

    def __init__(self, program: Program, time_limit: float | None):
        self._program, self._time_limit = program, time_limit
        self._solver, self._violations = Linear(program), _Violations(program)

    def lower_bound(self, column: int, sign: float) -> float:
        """A number below `sign * v[column]`, as near as the time limit allows."""
        deadline = math.inf if self._time_limit is None else time.monotonic() + self._time_limit
        count = itertools.count()
        leaves = [self._leaf((), -math.inf, column, sign, next(count))]
        while leaves:
            bound, _, decided, split = leaves[0]
            if split is None or time.monotonic() > deadline:
                return bound
            heapq.heappop(leaves)
            for option in range(len(self._program.splits[split].options)):
                leaf = self._leaf((*decided, (split, option)), bound, column, sign, next(count))
                if leaf[0] < math.inf:
                    heapq.heappush(leaves, leaf)
        return -math.inf  # not one value: the program is not that of a network

    def _leaf(self, decided: tuple[tuple[int, int], ...], bound: float, column: int, sign: float, number: int):
        """Its bound, which is at least that of the leaf above; its number, what is decided, what to branch on."""
        splits, solver = self._program.splits, self._solver
        program = narrowed(self._program, [splits[split].options[option] for split, option in decided])
        solver.narrow(program)
        proposed = solver.multipliers(column, sign)
        ray = solver.ray
        if ray is not None and any(is_empty(program, ray._replace(rows=side * ray.rows)) for side in (1, -1)):
            return math.inf, number, decided, None
        found = -math.inf if proposed is None else lower_bound(program, column, sign, proposed)
        split = None
        if proposed is not None and solver.values is not None:
            split = self._violations.worst(solver.values, proposed.rows, [split for split, _ in decided])
        return max(bound, found), number, decided, split


class _Violations:
    """How far a solution is from the options of each split."""

    def __init__(self, program: Program):
        options = [option for split in program.splits for option in split.options]
        self._rows, self._columns = program.rows, np.array([split.column for split in program.splits])
        self._starts = np.cumsum([0, *(len(split.options) for split in program.splits)])[:-1]
        reach = np.maximum(np.abs(program.lower), np.abs(program.upper))
        self._unit = unit = np.where(np.isfinite(reach) & (reach > 0), reach, 1)
        scale = np.zeros(len(program.rows.lower))
        np.maximum.at(scale, program.rows.row, np.abs(program.rows.value) * unit[program.rows.column])
        self._parts = [
            _Part([o.columns for o in options], [o.column_ends for o in options], unit),
            _Part([o.rows for o in options], [o.row_ends for o in options], scale),
        ]

    def worst(self, values: Array, multipliers: Array, decided: list[int]) -> int | None:
        """The split, not decided yet, all of whose options are violated, and that the bound depends on most."""
        rows = self._rows
        attained = np.bincount(rows.row, rows.value * values[rows.column], len(rows.lower))
        violations = np.maximum(*(part.of(v) for part, v in zip(self._parts, (values, attained), strict=True)))
        least = np.minimum.reduceat(violations, self._starts)
        least[decided] = 0
        weight = np.bincount(rows.column, np.abs(rows.value * multipliers[rows.row]), len(self._unit)) * self._unit
        score = np.where(least > _SOLVED, least * weight[self._columns], -1)
        split = int(np.argmax(score))
        return split if score[split] >= 0 else None


class _Part:
    """The ends of columns, or of rows, that options have, and how far values are from them in these units."""

    def __init__(self, places: list[Array], ends: list[tuple[Array, Array]], unit: Array):
        self._option = np.repeat(np.arange(len(places)), [len(part) for part in places])
        self._place, self._count = np.concatenate(places).astype(np.int64), len(places)
        self._lower, self._upper = (np.concatenate([pair[side] for pair in ends]) for side in (0, 1))
        self._unit = unit[self._place]

    def of(self, values: Array) -> Array:
        """For each option, the most by which it is violated."""
        here, found = values[self._place], np.zeros(self._count)
        np.maximum.at(found, self._option, np.maximum(self._lower - here, here - self._upper) / self._unit)
        return found
