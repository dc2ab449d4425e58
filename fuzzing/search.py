"""Bounds against values: one program, many parameters, regions, methods and points."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxbound as jb
from fuzzing import cases
from fuzzing.evaluation import Reference, UndefinedError
from fuzzing.programs import Line, Program
from fuzzing.runs import Runs
from jaxbound import errors

METHODS = (
    "IBP()", "Crown()", "CrownIBP()", "FastLin()", "Forward()", "Crown(intersect=False)", "Crown(lower_slope='zero')",
    "Crown(lower_slope='one')", "Crown(lower_slope='parallel')", "Best(IBP(), Crown())", "Frown(steps=2)",
    "Crown(pre_activation=Forward())", "LP(pre_activation=Crown())", "MILP(pre_activation=Crown(), time_limit=2.0)",
)  # fmt: skip
_SHARES = [0.4, 0.3, *[0.3 / (len(METHODS) - 2)] * (len(METHODS) - 2)]
"""What is drawn how often: each method compiles steps of its own."""
_EXECUTED = 0.2
"""How often it is bounded as it runs, where it can be."""
_COMPILED = 0.95
"""How often the whole call is compiled: tracing is what a program costs, and eager steps are traced again for each
number of rows that is left to bound."""
_KINDS = [0.4, 0.12, 0.12, 0.12, 0.08, 0.08, 0.08]
"""How often each kind of region is drawn."""
_POINTS = 10


@dataclasses.dataclass
class Case:
    """One call of `bound`."""

    program: Program
    method: str
    rounding: bool | str
    params: list[np.ndarray]
    region: Any


@dataclasses.dataclass
class Tally:
    """What has been done."""

    structures: int = 0
    """Programs with a case that was bounded."""
    cases: int = 0
    compiled: int = 0
    """Cases bounded by one compiled program."""
    finite: int = 0
    """Cases whose bounds are all finite."""
    comparisons: int = 0
    exact: int = 0
    """Comparisons with rational numbers."""
    executed: int = 0
    """Cases bounded as they run."""
    refused: int = 0
    violations: int = 0


@dataclasses.dataclass
class Violation:
    """A value outside its bounds."""

    case: Case
    point: np.ndarray
    entry: int
    value: str
    found: tuple[float, float]


def dtype_of(region: Any) -> np.dtype:
    """The dtype of a region, and so of a case."""
    return np.asarray(jax.tree.leaves(region)[0]).dtype


def function_of(program: Program):
    """The program in JAX."""
    space: dict[str, Any] = {"jax": jax, "jnp": jnp}
    exec(compile(program.source(), "<program>", "exec"), space)
    return space["fn"]


def method_of(name: str):
    """A method from how it is written."""
    return eval(name, {key: getattr(jb, key) for key in jb.__all__})


@dataclasses.dataclass(frozen=True)
class Plan:
    """How the cases of a program are bounded: what compiles anew is the same for all of them."""

    method: str
    compiled: bool
    """Whether the whole call is jitted, once; else JAX compiles steps, anew for each number of rows that is left."""
    roundings: tuple[bool | str, ...]
    kinds: tuple[str, ...]
    """Kinds of regions."""


def planned(program: Program, rng: np.random.Generator) -> Plan:
    """One method; compiled for one kind of region and of rounding, most often."""
    method = METHODS[int(rng.choice(len(METHODS), p=_SHARES))]
    if method.startswith("MILP") and not program.has_linear_pieces:
        method = "Crown()"
    rounding: bool | str = "execution" if rng.random() < _EXECUTED else bool(rng.random() < 0.85)
    compiled = not method.startswith(("LP", "MILP")) and bool(rng.random() < _COMPILED)
    kind = str(rng.choice(cases.KINDS, p=_KINDS))
    if compiled:
        return Plan(method, True, (rounding,), (kind,))
    return Plan(method, False, tuple({rounding, True}), cases.KINDS)


def run(program: Program, rng: np.random.Generator, dtype, count: int, tally: Tally) -> Iterator[Violation]:
    """Check `count` cases of a program."""
    plan, before = planned(program, rng), tally.cases
    calls = {rounding: _call(program, plan, rounding) for rounding in plan.roundings}
    reference = Reference(program, dtype)
    for _ in range(count):
        style = str(rng.choice(cases.STYLES, p=[0.3, 0.3, 0.3, 0.1]))
        rounding = list(calls)[int(rng.integers(len(calls)))]
        if not rounding and style not in ("small integers", "normal"):
            style = "normal"
        params = [cases.numbers(rng, shape, style, dtype) for shape in program.shapes()]
        kind = str(rng.choice(plan.kinds))
        where = cases.region(rng, program.size, str(rng.choice([style, "normal"])), dtype, kind)
        case = Case(program, plan.method, rounding, params, where)
        found = bounds(case, calls[rounding])
        if found is None:
            tally.refused += 1
            del calls[rounding]
            if not calls:
                break
            continue
        tally.cases += 1
        tally.executed += rounding == "execution"
        tally.compiled += plan.compiled
        tally.finite += bool(np.all(np.isfinite(found)))
        if violation := _first_outside(case, found, reference, rng, tally):
            tally.violations += 1
            yield violation
    tally.structures += tally.cases > before


def _call(program: Program, plan: Plan, rounding: bool | str):
    call = jb.bound(function_of(program), method_of(plan.method), rounding=rounding)
    return jax.jit(call) if plan.compiled else call


def bounds(case: Case, call=None) -> tuple[np.ndarray, np.ndarray] | None:
    """The bounds of a case; None where jaxbound refuses the program, the method or the region."""
    call = call or jb.bound(function_of(case.program), method_of(case.method), rounding=case.rounding)
    try:
        found = call([jnp.asarray(p) for p in case.params], case.region)
    except errors.JaxboundError:
        return None
    return np.asarray(found.lower).reshape(-1), np.asarray(found.upper).reshape(-1)


def _first_outside(case: Case, found, reference: Reference, rng, tally: Tally) -> Violation | None:
    where, size = case.region, found[0].size
    for number, x in enumerate(cases.points(rng, where, _POINTS)):
        tried = [x]
        if number % 5 == 4 and not case.program.derivative:
            entry, sign = int(rng.integers(size)), float(rng.choice([-1, 1]))
            tried.append(cases.better(reference, case.params, where, x, entry, sign, rng))
        for point in tried:
            tally.comparisons += size
            tally.exact += size * (case.program.is_rational and case.rounding is True)
            if outside := check(case, found, reference, point):
                return Violation(case, point, *outside, (float(found[0][outside[0]]), float(found[1][outside[0]])))
    return None


def check(case: Case, found, reference: Reference, x: np.ndarray) -> tuple[int, str] | None:
    """The first entry of a value outside its bounds, and the value."""
    low, high = found
    if bad := np.flatnonzero(np.isnan(low) | np.isnan(high)).tolist():
        return bad[0], "NaN"
    if case.rounding == "execution":
        return _executed(case, low, high, x)
    if case.program.is_rational and case.rounding:
        try:
            values = reference.exact(case.params, x).reshape(-1)
        except UndefinedError:
            return None
        for k, value in enumerate(map(Fraction, values)):
            if (low[k] != -np.inf and value < _exactly(low[k])) or (high[k] != np.inf and value > _exactly(high[k])):
                return k, str(value)
        return None
    values, slack = _approximate(case, reference, x)
    wrong = np.flatnonzero((values < low - slack) | (values > high + slack)).tolist() if np.isfinite(slack) else []
    return (wrong[0], repr(float(values[wrong[0]]))) if wrong else None


@functools.lru_cache(maxsize=8)
def _runs(program: Program) -> Runs:
    return Runs(function_of(program))


def _executed(case: Case, low, high, x: np.ndarray) -> tuple[int, str] | None:
    near = x.astype(dtype_of(case.region))
    if not cases.contains(case.region, near.astype(np.float64)):
        return None
    for values in _runs(case.program)(case.params, near):
        if wrong := np.flatnonzero(
            ((low > -np.inf) & ~(values >= low)) | ((high < np.inf) & ~(values <= high))
        ).tolist():
            return wrong[0], repr(float(values[wrong[0]]))
    return None


def _exactly(end) -> Fraction:
    """An end of a bound: an infinite one on the wrong side is larger than anything."""
    return Fraction(float(end)) if np.isfinite(end) else Fraction(10) ** 400 * (1 if end > 0 else -1)


def _approximate(case: Case, reference: Reference, x: np.ndarray) -> tuple[np.ndarray, float]:
    """A value, and how far it may be from exact: by the sizes on the way, generously."""
    dtype = dtype_of(case.region)
    if case.program.derivative:
        narrow = x.astype(dtype)
        if not cases.contains(case.region, narrow.astype(np.float64)):
            return np.zeros(()), np.inf
        values = np.asarray(function_of(case.program)([jnp.asarray(p) for p in case.params], jnp.asarray(narrow)))
        inner = Reference(dataclasses.replace(case.program, derivative=False), dtype.type)
        size = inner.approximate(case.params, x)[1] * (1 + sum(float(np.max(np.abs(p))) for p in case.params)) ** 2
        values, unit = values.astype(np.float64).reshape(-1), float(np.finfo(dtype).eps)
        return values, (1e3 * unit * (1 + size + np.max(np.abs(values))) if np.all(np.isfinite(values)) else np.inf)
    values, size = reference.approximate(case.params, x)
    size *= (1 + size) if case.program.lines and size < 1e100 else 1
    unit = np.finfo(np.float64).eps if case.rounding else float(np.finfo(dtype).eps)
    return values.reshape(-1), 1e3 * unit * (1 + size) if np.all(np.isfinite(values)) else np.inf


# --- making a failure smaller -----------------------------------------------------------------------------------------


def shrink(violation: Violation, most: int = 60) -> Violation:
    """A smaller failure of the same kind: fewer lines, a shorter vector, simpler numbers, the point alone."""
    best = violation
    for _ in range(most):
        for case, point in _smaller(best.case, best.point):
            if smaller := _still(case, point):
                best = smaller
                break
        else:
            return best
    return best


def _still(case: Case, point: np.ndarray) -> Violation | None:
    try:
        found = bounds(case)
        reference = Reference(case.program, dtype_of(case.region).type)
        outside = None if found is None else check(case, found, reference, point)
    except Exception:  # another failure than the one that is made smaller
        return None
    if found is None or outside is None:
        return None
    return Violation(case, point, *outside, (float(found[0][outside[0]]), float(found[1][outside[0]])))


def _smaller(case: Case, point: np.ndarray) -> Iterator[tuple[Case, np.ndarray]]:
    program, region = case.program, case.region
    for k in range(len(program.lines)):  # without line k: what reads it reads its input
        move = lambda value, k=k: program.lines[k].x if value == k + 1 else value - (value > k + 1)  # noqa: E731
        lines = [Line(line.name, move(line.x), move(line.y)) for j, line in enumerate(program.lines) if j != k]
        if lines:
            used = [len(dataclasses.replace(program, lines=program.lines[:j]).shapes()) for j in (k, k + 1)]
            params = [p for j, p in enumerate(case.params) if not used[0] <= j < used[1]]
            smaller = dataclasses.replace(program, lines=tuple(lines))
            yield dataclasses.replace(case, program=smaller, params=params), point
    near = point.astype(dtype_of(region))
    if not isinstance(region, jb.Box) or not np.array_equal(region.lower, region.upper):
        yield dataclasses.replace(case, region=jb.Box(near, near)), near.astype(np.float64)
    if isinstance(region, jb.Box) and program.size > 1:
        for keep in range(program.size):
            index = np.delete(np.arange(program.size), keep)
            params = [p[np.ix_(*[index] * p.ndim)] for p in case.params]
            box = jb.Box(*(np.asarray(end)[index] for end in (region.lower, region.upper)))
            smaller = dataclasses.replace(program, size=program.size - 1)
            yield dataclasses.replace(case, program=smaller, params=params, region=box), point[index]
    for j, p in enumerate(case.params):
        for other in (np.zeros_like(p), np.ones_like(p), *(_simpler(p, k) for k in range(p.size))):
            if not np.array_equal(other, p):
                yield dataclasses.replace(case, params=[*case.params[:j], other, *case.params[j + 1 :]]), point


def _simpler(values: np.ndarray, k: int) -> np.ndarray:
    changed = values.copy()
    flat = changed.reshape(-1)
    flat[k] = 0 if abs(flat[k]) < 1 else np.round(flat[k]) if abs(flat[k]) < 1e6 else flat[k]
    return changed


def _kind(case: Case) -> str:
    return "as it ran" if case.rounding == "execution" else "exactly" if case.program.is_rational else "in float64"


def script(violation: Violation) -> str:
    """A script that exits with 1 while the value is outside its bounds."""
    case, dtype = violation.case, dtype_of(violation.case.region)
    array = lambda value: f"np.array({np.asarray(value).tolist()}, np.{dtype})"  # noqa: E731
    if isinstance(case.region, jb.Box):
        where = f"jb.Box({array(case.region.lower)}, {array(case.region.upper)})"
    else:
        clip = (
            "" if case.region.clip is None else f", clip=({array(case.region.clip[0])}, {array(case.region.clip[1])})"
        )
        norm = "np.inf" if case.region.norm == np.inf else case.region.norm
        where = f"jb.LpBall({array(case.region.center)}, np.{dtype}({float(case.region.radius)!r}), {norm}{clip})"
    lines = [
        f'"""{case.method}, rounding={case.rounding}: entry {violation.entry} is outside its bounds at a point."""',
        "import sys", "from fractions import Fraction", "",
        "import jax", "import jax.numpy as jnp", "import numpy as np", "", "import jaxbound as jb",
        f"from jaxbound import {', '.join(sorted({part for part in jb.__all__ if part + '(' in case.method}))}", "",
        f'jax.config.update("jax_enable_x64", {dtype == np.float64})', "", "", case.program.source(), "", "",
        f"params = [{', '.join(map(array, case.params))}]", f"region = {where}",
        f"x = np.array({violation.point.tolist()})",
        f"found = jb.bound(fn, {case.method}, rounding={case.rounding!r})([jnp.asarray(p) for p in params], region)",
        f"low, high = (float(end.reshape(-1)[{violation.entry}]) for end in (found.lower, found.upper))",
    ]  # fmt: skip
    if violation.value == "NaN":
        lines += ["print(low, high)", "sys.exit(low != low or high != high)"]
    else:
        value = f"Fraction({violation.value!r})"
        lines += [
            f"value = {value}  # of the function at x, {_kind(case)}",
            'print("bounds", low, high, "value", float(value))',
            "sys.exit(bool((low > -np.inf and value < Fraction(low)) or (high < np.inf and value > Fraction(high))))",
        ]
    return "\n".join(lines) + "\n"


def write(violation: Violation, folder: Path) -> Path:
    """The script in a file named by what it holds."""
    text = script(violation)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"violation_{hashlib.sha256(text.encode()).hexdigest()[:10]}.py"
    path.write_text(text, encoding="utf-8")
    return path
