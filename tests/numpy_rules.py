"""Further primitives for `oracles.exactly`, in NumPy: importing this module adds them to its table."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable

import jax
import numpy as np
import oracles
import scipy.special as special
from jax.lax import GatherScatterMode

Array = np.ndarray


def _gather(equation, x, indices):
    """What does not fit is filled."""
    params = equation.params
    found = _kept_inside(equation, x, indices)
    if params["mode"] != GatherScatterMode.FILL_OR_DROP:
        return found
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    most = np.array([x.shape[axis] - sizes[axis] for axis in numbers.start_index_map])
    fits = np.all((indices >= 0) & (indices <= most), axis=-1)
    fits = np.expand_dims(fits, tuple(axis for axis in range(found.ndim) if axis in numbers.offset_dims))
    return np.where(fits, found, np.nan if params["fill_value"] is None else params["fill_value"])


_kept_inside = oracles._RULES["gather"]


def _cumulative(accumulate: Callable) -> Callable:
    def rule(equation, x):
        axis = equation.params["axis"]
        if equation.params["reverse"]:
            return np.flip(accumulate(np.flip(x, axis), axis), axis)
        return accumulate(x, axis)

    return rule


def _sort(equation, *arrays):
    axis = equation.params["dimension"]
    order = np.argsort(arrays[0], axis, kind="stable")
    return [np.take_along_axis(array, order, axis) for array in arrays]


def _top_k(equation, x):
    axis, k = equation.params.get("axis", -1), equation.params["k"]
    places = np.take(np.argsort(-x, axis, kind="stable"), range(k), axis)
    return [np.take_along_axis(x, places, axis), places]


def _round(equation, x):
    if equation.params["rounding_method"].name == "TO_NEAREST_EVEN":
        return np.round(x)
    return np.where(np.abs(x - np.trunc(x)) == 0.5, np.trunc(x) + np.sign(x), np.round(x))


def _scan(equation, *arguments):
    params = equation.params
    names = [params["num_consts"], params["num_consts"] + params["num_carry"]]
    fixed, carry, rows = arguments[: names[0]], list(arguments[names[0] : names[1]]), arguments[names[1] :]
    made: list = [None] * params["length"]
    for k in reversed(range(params["length"])) if params["reverse"] else range(params["length"]):
        results = oracles._run(params["jaxpr"].jaxpr, params["jaxpr"].consts, [*fixed, *carry, *(r[k] for r in rows)])
        carry, made[k] = results[: len(carry)], results[len(carry) :]
    return [*carry, *(np.stack(parts) for parts in zip(*made, strict=True))]


def _branch(equation, index, operands):
    branches = equation.params["branches"]
    chosen = branches[int(np.clip(index, 0, len(branches) - 1))]
    return oracles._run(chosen.jaxpr, chosen.consts, operands)


def _bits(equation, x):
    """The bits are those of the number in the dtype that the program has it in."""
    return np.asarray(x, equation.invars[0].aval.dtype).view(equation.params["new_dtype"])


def _reduce(reduce: Callable) -> Callable:
    return lambda equation, x: reduce(x, axis=tuple(equation.params["axes"]))


def _plain(function: Callable) -> Callable:
    return lambda _, *operands: function(*operands)


def needed(function: Callable, *args) -> list[Array]:
    """`oracles.exactly`, without the equations that the result does not need (unused random keys, say)."""
    closed = jax.make_jaxpr(function)(*args)
    wanted, kept = {v for v in closed.jaxpr.outvars if not hasattr(v, "val")}, []
    for equation in reversed(closed.jaxpr.eqns):
        if not wanted.isdisjoint(equation.outvars):
            kept.append(equation)
            wanted.update(v for v in equation.invars if not hasattr(v, "val"))
    consts = [
        oracles._wide(np.asarray(c)) if v in wanted else None
        for v, c in zip(closed.jaxpr.constvars, closed.consts, strict=True)
    ]
    known = {v: c for v, c in zip(closed.jaxpr.constvars, consts, strict=True) if c is not None}
    jaxpr = types.SimpleNamespace(
        constvars=list(known), invars=closed.jaxpr.invars, eqns=kept[::-1], outvars=closed.jaxpr.outvars
    )
    flat = [oracles._wide(np.asarray(leaf)) for leaf in jax.tree.leaves(args)]
    with np.errstate(all="ignore"):
        return oracles._run(jaxpr, list(known.values()), flat)


oracles._RULES.update(
    {
        "scatter-add": oracles._scatter(np.add),
        "scatter-mul": oracles._scatter(np.multiply),
        "scatter_mul": oracles._scatter(np.multiply),
        "gather": _gather,
        "tile": lambda equation, x: np.tile(x, equation.params["reps"]),
        "cummax": _cumulative(np.maximum.accumulate),
        "cummin": _cumulative(np.minimum.accumulate),
        "cumprod": _cumulative(np.cumprod),
        "bitcast_convert_type": _bits,
        "cumlogsumexp": _cumulative(np.logaddexp.accumulate),
        "sort": _sort,
        "top_k": _top_k,
        "round": _round,
        "shift_right_arithmetic": _plain(np.right_shift),
        "scan": _scan,
        "reduce_prod": _reduce(np.prod),
        "reduce_or": _reduce(np.any),
        "reduce_and": _reduce(np.all),
        "xor": _plain(np.logical_xor),
        "ceil": _plain(np.ceil),
        "cosh": _plain(np.cosh),
        "tan": _plain(np.tan),
        "asin": _plain(np.arcsin),
        "acos": _plain(np.arccos),
        "atanh": _plain(np.arctanh),
        "acosh": _plain(np.arccosh),
        "cbrt": _plain(np.cbrt),
        "erf_inv": _plain(special.erfinv),
        "clamp": _plain(lambda low, x, high: np.minimum(np.maximum(x, low), high)),
        "argmax": lambda equation, x: np.argmax(x, equation.params["axes"][0]),
        "argmin": lambda equation, x: np.argmin(x, equation.params["axes"][0]),
        "nextafter": _plain(np.nextafter),
        "rem": _plain(np.fmod),
        "unstack": lambda equation, x: list(np.moveaxis(x, equation.params["axis"], 0)),
        "cond": lambda equation, index, *operands: _branch(equation, index, operands),
        "logsumexp": lambda equation, x: special.logsumexp(x, axis=tuple(equation.params["axes"])),
        "select": _plain(lambda indicator, no, yes: no + indicator * (yes - no)),
        "meet": _plain(lambda *expressions: functools.reduce(lambda first, _: first, expressions)),
    }
)
