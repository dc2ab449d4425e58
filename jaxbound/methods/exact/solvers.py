"""The solvers: HiGHS for linear programs, Clarabel for those with l_2 balls.

`multipliers` proposes a dual solution for one objective after another over one program; `program.lower_bound` turns it
into a bound that holds whatever the solver did. HiGHS starts each objective from the last basis.
"""

from __future__ import annotations

import importlib
from typing import Any, Protocol

import numpy as np

from jaxbound import errors
from jaxbound.methods.exact.program import Array, Multipliers, Program

_TOLERANCE = 1e-9
"""Feasibility and optimality of HiGHS."""


class Solver(Protocol):
    """Dual solutions for many objectives over one program."""

    def multipliers(self, column: int, sign: float) -> Multipliers | None:
        """For the minimum of `sign * v[column]`; None where there is none."""
        ...


def solver_of(program: Program) -> Solver:
    """A solver that knows everything in the program."""
    return Cones(program) if program.balls else Linear(program)


def needed(name: str) -> Any:
    """A solver's module.

    Raises:
        UnsupportedError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise errors.UnsupportedError(
            f"LP and MILP need the package {name}, which is not installed; install jaxbound with its extra: "
            "pip install 'jaxbound[exact]'"
        ) from error


class Linear:
    """HiGHS's simplex method, in units in which columns and rows are of size 1: it drops small entries of a matrix.

    `values` is where the last minimum is attained, `ray` are multipliers that prove that there is none; None otherwise.
    """

    values: Array | None = None
    ray: Multipliers | None = None

    def __init__(self, program: Program):
        reach = np.maximum(np.abs(program.lower), np.abs(program.upper))
        self._unit = _power_of_two(np.where(np.isfinite(reach), reach, 1))
        width, height = len(program.lower), len(program.rows.lower)
        starts, index, values = _by_rows(program)
        values = values * self._unit[index]
        row, peak = np.repeat(np.arange(height), np.diff(starts)), np.zeros(height)
        np.maximum.at(peak, row, np.abs(values))
        self._weight = 1 / _power_of_two(peak)
        self._highs, self._model = needed("highspy"), _highs()
        columns, rows = self._ends(program)
        self._model.passModel(
            width, height, len(values), 2, 1, 0.0, np.zeros(width), *columns, *rows,
            starts, index, values * self._weight[row], np.zeros(width, np.int32),
        )  # fmt: skip

    def _ends(self, program: Program) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
        lower = np.where(program.stated, program.lower, -np.inf)
        upper = np.where(program.stated, program.upper, np.inf)
        rows = program.rows.lower * self._weight, program.rows.upper * self._weight
        return (lower / self._unit, upper / self._unit), rows

    def narrow(self, program: Program) -> None:
        """Solve this program from now on, which has other ends of columns and rows."""
        columns, rows = self._ends(program)
        for change, ends in ((self._model.changeColsBounds, columns), (self._model.changeRowsBounds, rows)):
            change(len(ends[0]), np.arange(len(ends[0]), dtype=np.int32), *ends)

    def multipliers(self, column: int, sign: float) -> Multipliers | None:
        """For the minimum of `sign * v[column]`."""
        model, status = self._model, self._highs.HighsModelStatus
        model.changeColCost(column, sign)
        model.run()
        found, ended = model.getSolution(), model.getModelStatus()
        self.values = np.array(found.col_value, np.float64) * self._unit if ended == status.kOptimal else None
        _, exists, ray = model.getDualRay() if ended == status.kInfeasible else (None, False, None)
        self.ray = self._of_rows(ray, 1.0) if exists else None
        model.changeColCost(column, 0.0)
        return self._of_rows(found.row_dual, self._unit[column])

    def _of_rows(self, found: Any, unit: float) -> Multipliers | None:
        found = np.array(found, np.float64)
        if found.shape != self._weight.shape or not np.all(np.isfinite(found)):
            return None
        return Multipliers(found * self._weight * unit, ())


class Cones:
    """Clarabel's interior-point method."""

    def __init__(self, program: Program):
        sparse = needed("scipy.sparse")
        self._module, self._program = needed("clarabel"), program
        rows, boxes = _equations(program.rows.lower, program.rows.upper), _equations(program.lower, program.upper)
        width = len(program.lower)
        self._rows = [np.flatnonzero(mask) for mask in rows]
        stated = [np.flatnonzero(mask & program.stated) for mask in boxes]
        matrix = sparse.csr_array((program.rows.value, program.rows[:2]), shape=(len(program.rows.lower), width))
        unit = sparse.eye_array(width, format="csr")
        same, above, below = self._rows
        parts = [
            (matrix[same], program.rows.lower[same]), (unit[stated[0]], program.lower[stated[0]]),
            (matrix[above], program.rows.upper[above]), (-matrix[below], -program.rows.lower[below]),
            (unit[stated[1]], program.upper[stated[1]]), (-unit[stated[2]], -program.lower[stated[2]]),
        ]  # fmt: skip
        equal = len(same) + len(stated[0])
        self._cones = [self._module.ZeroConeT(equal)]
        self._cones.append(self._module.NonnegativeConeT(sum(len(ends) for _, ends in parts[2:])))
        for ball in program.balls:
            parts += [(0 * unit[:1], np.array([ball.radius])), (-unit[ball.columns], -ball.center)]
            self._cones.append(self._module.SecondOrderConeT(len(ball.columns) + 1))
        self._matrix = sparse.csc_matrix(sparse.vstack([part for part, _ in parts]))
        self._matrix.eliminate_zeros()
        self._ends = np.concatenate([ends for _, ends in parts])
        self._offsets = np.cumsum([0, *(len(ends) for _, ends in parts)])
        self._quadratic = sparse.csc_matrix((width, width))

    def multipliers(self, column: int, sign: float) -> Multipliers | None:
        """For the minimum of `sign * v[column]`."""
        settings = self._module.DefaultSettings()
        settings.verbose, settings.direct_solve_method = False, "qdldl"
        settings.tol_gap_abs = settings.tol_gap_rel = settings.tol_feas = 1e-10
        cost = np.zeros(len(self._program.lower))
        cost[column] = sign
        solver = self._module.DefaultSolver(self._quadratic, cost, self._matrix, self._ends, self._cones, settings)
        dual = np.array(solver.solve().z)
        if not np.all(np.isfinite(dual)):
            return None
        parts = [dual[first:stop] for first, stop in zip(self._offsets, self._offsets[1:], strict=False)]
        found = np.zeros(len(self._program.rows.lower))
        for index, factor, part in zip(self._rows, (-1, -1, 1), (parts[0], parts[2], parts[3]), strict=True):
            found[index] += factor * part
        return Multipliers(found, tuple(parts[7::2]))


def _equations(lower: Array, upper: Array) -> tuple[Array, Array, Array]:
    """Which are equations, which have an upper end, which a lower one."""
    same = lower == upper
    return same, ~same & (upper < np.inf), ~same & (lower > -np.inf)


def _power_of_two(size: Array) -> Array:
    """Near a size; 1 for zero."""
    return np.exp2(np.round(np.log2(np.where(size > 0, np.clip(size, 1e-150, 1e150), 1))))


def _highs() -> Any:
    """HiGHS without a program."""
    model = needed("highspy").Highs()
    for option, value in {
        "output_flag": False, "threads": 1, "primal_feasibility_tolerance": _TOLERANCE,
        "dual_feasibility_tolerance": _TOLERANCE, "small_matrix_value": 1e-12,
    }.items():  # fmt: skip
        model.setOptionValue(option, value)
    return model


def _by_rows(program: Program) -> tuple[Array, Array, Array]:
    """The matrix row by row, each place once (its sum may be rounded: solvers only propose)."""
    width, height = len(program.lower), len(program.rows.lower)
    places, inverse = np.unique(program.rows.row * width + program.rows.column, return_inverse=True)
    values = np.bincount(inverse, program.rows.value, len(places))
    starts = np.searchsorted(places, np.arange(height + 1) * width)
    return starts.astype(np.int32), (places % width).astype(np.int32), values
