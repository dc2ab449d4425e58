"""The solvers: HiGHS for linear and mixed-integer programs, Clarabel for those with l_2 balls.

`multipliers` proposes a dual solution for one objective after another over one program; `program.lower_bound` turns it
into a bound that holds whatever the solver did. HiGHS starts each objective from the last basis.

`integer_bound` returns what HiGHS's branch and bound proved, `mip_dual_bound`. Its relaxations are solved with duals
that may be infeasible by the tolerance, which costs at most that times the width of the box of all columns, and its
values are relative to another tolerance; both are subtracted. This bound rests on HiGHS being right up to them.
"""

from __future__ import annotations

import importlib
import math
from typing import Any, Protocol

import numpy as np

from jaxbound import errors
from jaxbound.exact.program import Array, Multipliers, Program

_TOLERANCE = 1e-9
"""Feasibility and optimality of HiGHS; the duals of its branch and bound take a tenth."""


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
    """HiGHS's simplex method."""

    def __init__(self, program: Program):
        self._model, self._height = _highs(program, integral=False), len(program.rows.lower)

    def multipliers(self, column: int, sign: float) -> Multipliers | None:
        """For the minimum of `sign * v[column]`."""
        self._model.changeColCost(column, sign)
        self._model.run()
        self._model.changeColCost(column, 0.0)
        found = np.array(self._model.getSolution().row_dual, np.float64)
        usable = found.shape == (self._height,) and bool(np.all(np.isfinite(found)))
        return Multipliers(found, ()) if usable else None


class Integer:
    """HiGHS's branch and bound."""

    def __init__(self, program: Program, time_limit: float | None):
        self._program, self._time_limit = program, time_limit
        widths = program.upper - program.lower
        self._slack = _TOLERANCE / 10 * float(np.sum(widths[np.isfinite(widths)]))

    def lower_bound(self, column: int, sign: float) -> float:
        """What was proved of the minimum of `sign * v[column]`, less the tolerances; -inf if nothing was."""
        known, model = needed("highspy").HighsModelStatus, _highs(self._program, integral=True)
        if self._time_limit is not None:
            model.setOptionValue("time_limit", float(self._time_limit))
        model.changeColCost(column, sign)
        model.run()
        proved = float(model.getInfo().mip_dual_bound)
        if model.getModelStatus() not in (known.kOptimal, known.kTimeLimit) or not math.isfinite(proved):
            return -math.inf
        return proved - self._slack - _TOLERANCE * (1 + abs(proved))


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


def _highs(program: Program, *, integral: bool) -> Any:
    """HiGHS with the program and no objective."""
    highs = needed("highspy")
    model = highs.Highs()
    for option, value in {
        "output_flag": False, "threads": 1, "primal_feasibility_tolerance": _TOLERANCE,
        "dual_feasibility_tolerance": _TOLERANCE, "mip_feasibility_tolerance": _TOLERANCE,
        "mip_rel_gap": 0.0, "mip_abs_gap": _TOLERANCE,
    }.items():  # fmt: skip
        model.setOptionValue(option, value)
    starts, index, values = _by_rows(program)
    width, height = len(program.lower), len(program.rows.lower)
    lower = np.where(program.stated, program.lower, -np.inf)
    upper = np.where(program.stated, program.upper, np.inf)
    whole = (program.whole & integral).astype(np.int32)
    model.passModel(
        width, height, len(values), 2, 1, 0.0, np.zeros(width), lower, upper,
        program.rows.lower, program.rows.upper, starts, index, values, whole,
    )  # fmt: skip
    return model


def _by_rows(program: Program) -> tuple[Array, Array, Array]:
    """The matrix row by row, each place once (its sum may be rounded: solvers only propose)."""
    width, height = len(program.lower), len(program.rows.lower)
    places, inverse = np.unique(program.rows.row * width + program.rows.column, return_inverse=True)
    values = np.bincount(inverse, program.rows.value, len(places))
    starts = np.searchsorted(places, np.arange(height + 1) * width)
    return starts.astype(np.int32), (places % width).astype(np.int32), values
