"""Further primitives for `oracles.exactly`, in NumPy: importing this module adds them to its table."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import numpy as np
import oracles
import scipy.special as special
from jax.lax import GatherScatterMode

Array = np.ndarray


def _scatter(combine: Callable[[Array, Array], Array]) -> Callable:
    """Windows put together with what is there; those that do not fit are dropped, unless the mode says otherwise."""

    def rule(equation, x, indices, updates):
        numbers, x, mode = equation.params["dimension_numbers"], x.copy(), equation.params["mode"]
        places = [axis for axis in range(updates.ndim) if axis not in numbers.update_window_dims]
        dropped = (*numbers.inserted_window_dims, *numbers.operand_batching_dims)
        for place in np.ndindex(*(updates.shape[axis] for axis in places)):
            start = np.zeros(x.ndim, int)
            start[list(numbers.scatter_dims_to_operand_dims)] = indices[place]
            for axis, mine in zip(numbers.operand_batching_dims, numbers.scatter_indices_batching_dims, strict=True):
                start[axis] = place[mine]
            at = dict(zip(places, place, strict=True))
            window = np.expand_dims(updates[tuple(at.get(axis, slice(None)) for axis in range(updates.ndim))], dropped)
            most = np.array(x.shape) - window.shape
            if mode == GatherScatterMode.CLIP:
                start = np.clip(start, 0, most)
            if np.all((start >= 0) & (start <= most)):
                where = tuple(slice(s, s + n) for s, n in zip(start, window.shape, strict=True))
                x[where] = combine(x[where], window)
        return x

    return rule


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
        results = _run(params["jaxpr"].jaxpr, params["jaxpr"].consts, [*fixed, *carry, *(r[k] for r in rows)])
        carry, made[k] = results[: len(carry)], results[len(carry) :]
    return [*carry, *(np.stack(parts) for parts in zip(*made, strict=True))]


def _branch(equation, index, operands):
    branches = equation.params["branches"]
    chosen = branches[int(np.clip(index, 0, len(branches) - 1))]
    return _run(chosen.jaxpr, chosen.consts, operands)


def _reduce(reduce: Callable) -> Callable:
    return lambda equation, x: reduce(x, axis=tuple(equation.params["axes"]))


def _plain(function: Callable) -> Callable:
    return lambda _, *operands: function(*operands)


def _run(jaxpr, consts, args) -> list[Array]:
    """Equation by equation; what has a rule is not taken for a call, though it has a jaxpr (loops)."""
    known = dict(zip(jaxpr.invars, args, strict=True))
    known.update(zip(jaxpr.constvars, [oracles._wide(np.asarray(c)) for c in consts], strict=True))

    def read(atom):
        return oracles._wide(np.asarray(atom.val)) if hasattr(atom, "val") else known[atom]

    for equation in jaxpr.eqns:
        rule, operands = oracles._RULES.get(equation.primitive.name), [read(atom) for atom in equation.invars]
        if rule is not None:
            results = rule(equation, *operands)
        else:
            inner = next((equation.params[k] for k in ("jaxpr", "call_jaxpr") if k in equation.params), None)
            if inner is None:
                raise KeyError(equation.primitive.name)
            results = _run(getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()), operands)
        known.update(zip(equation.outvars, results if isinstance(results, list) else [results], strict=True))
    return [read(atom) for atom in jaxpr.outvars]


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
    jaxpr = closed.jaxpr.replace(eqns=kept[::-1], constvars=list(known))
    flat = [oracles._wide(np.asarray(leaf)) for leaf in jax.tree.leaves(args)]
    with np.errstate(all="ignore"):
        return _run(jaxpr, list(known.values()), flat)


oracles._RULES.update(
    {
        "scatter": _scatter(lambda _, new: new),
        "scatter-add": _scatter(np.add),
        "scatter-mul": _scatter(np.multiply),
        "scatter_mul": _scatter(np.multiply),
        "gather": _gather,
        "tile": lambda equation, x: np.tile(x, equation.params["reps"]),
        "cummax": _cumulative(np.maximum.accumulate),
        "cummin": _cumulative(np.minimum.accumulate),
        "cumprod": _cumulative(np.cumprod),
        "cumlogsumexp": _cumulative(np.logaddexp.accumulate),
        "sort": _sort,
        "top_k": _top_k,
        "round": _round,
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
