"""JAX's own functions that look things up where a region says, and others whose steps hide what they compute.

`jnp.interp` and `map_coordinates` round a place to an index and gather there, which no bound survives. Both are sums of
hats or ramps of the place. A call is taken for one of them only if its jaxpr is, letter by letter, what JAX traces for
that function on these shapes, so that neither a name nor a version of JAX can mislead.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbound import _compat
from jaxbound.graph import operations
from jaxbound.graph.rewriting import roundings
from jaxbound.graph.values import Literal, Value

Rewrite = tuple[Callable, Sequence]

_MOST_KNOTS = 11
"""Knots up to which an interpolation is one scalar function, which has at most 12 pieces (`curvature.spans`)."""
_DEPTH = 2
"""How many times a function may have been mapped over its places by `vmap`."""


def match(name: str, callee: _compat.ClosedJaxpr, operands: Sequence) -> Rewrite | None:
    """The function and operands that replace a call, or None to read it equation by equation.

    Args:
        name: of the called function.
        callee: what it was traced to.
        operands: literals, constants and values.
    """
    if name not in _FUNCTIONS or callee.consts or not all(jnp.issubdtype(o.dtype, jnp.floating) for o in operands):
        return None
    out, find, traced = callee.out_avals[0], _FUNCTIONS[name], str(callee)
    if any(isinstance(o, Value) and jnp.promote_types(o.dtype, out.dtype) != out.dtype for o in operands):
        return None  # it rounds
    arguments = tuple(jax.ShapeDtypeStruct(a.shape, a.dtype, weak_type=a.weak_type) for a in callee.in_avals)
    for reference, moving, function in find(callee, operands):
        for depth in range(_DEPTH + 1):
            mapped = reference
            for _ in range(depth):
                mapped = jax.vmap(mapped, in_axes=tuple(0 if k in moving else None for k in range(len(operands))))
            if _traces_to(mapped, name, arguments, traced):
                return lambda *read, function=function: function(*(a.astype(out.dtype) for a in read)), operands
    return None


def is_logaddexp(callee: _compat.ClosedJaxpr) -> bool:
    """Whether a call is JAX's own logaddexp, which asks whether the difference of its arguments is NaN."""
    if len(callee.in_avals) != 2 or all(equation.primitive.name != "ne" for equation in callee.jaxpr.eqns):
        return False
    arguments = tuple(jax.ShapeDtypeStruct(a.shape, a.dtype, weak_type=a.weak_type) for a in callee.in_avals)
    return _traces_to(jnp.logaddexp, None, arguments, str(callee))


def _traces_to(reference: Callable, name: str | None, arguments: Sequence, traced: str) -> bool:
    """Whether JAX traces a function of these arguments to just this call, of this name if one is given."""
    try:
        equations = jax.make_jaxpr(reference)(*arguments).eqns
    except (TypeError, ValueError, IndexError, NotImplementedError):  # it has no meaning for these arguments
        return False
    if len(equations) != 1 or name not in (None, equations[0].params.get("name")):
        return False
    return str(_compat.call_jaxpr(equations[0])) == traced


# --- jnp.interp -------------------------------------------------------------------------------------------------------

_Candidate = tuple[Callable, Sequence[int], Callable]
_SIDES = (None, "extrapolate", "value")


def _interp(_callee: _compat.ClosedJaxpr, operands: Sequence) -> Iterator[_Candidate]:
    x, knots = operands[:2]
    if not isinstance(x, Value) or isinstance(knots, Value) or len(knots.shape) != 1 or knots.shape[0] < 2:
        return
    numbers = [getattr(operand, "known", None) for operand in operands[1:3]]
    if numbers[0] is not None and not np.all(np.diff(numbers[0]) > _least_gap(knots.dtype)):
        return
    few = knots.shape[0] <= _MOST_KNOTS and all(array is not None for array in numbers)
    function = _few_interpolated if few else _interpolated
    for left, right in itertools.product(_SIDES, _SIDES):
        if (left == "value") + (right == "value") != len(operands) - 3:
            continue

        def reference(
            x: jax.Array, xp: jax.Array, fp: jax.Array, *ends: jax.Array, left: Any = left, right: Any = right
        ):
            rest = iter(ends)
            left, right = (next(rest) if side == "value" else side for side in (left, right))
            return jnp.interp(x, xp, fp, left=left, right=right)

        yield reference, (0,), functools.partial(function, left=left, right=right, known=numbers)


def _least_gap(dtype: np.dtype) -> float:
    """Knots that are no farther apart are one for `jnp.interp`."""
    return float(np.spacing(np.finfo(dtype).eps))


def _interpolated(
    x: jax.Array, xp: jax.Array, fp: jax.Array, *ends: jax.Array, left: str | None, right: str | None, known: Sequence
):
    """Linear between knots; beyond them the last value, another one, or the last line."""
    inner = x if left == "extrapolate" else jnp.maximum(x, xp[0])
    inner = inner if right == "extrapolate" else jnp.minimum(inner, xp[-1])
    value = _by_arrays(inner, xp, fp)
    if "extrapolate" not in (left, right):
        value = operations.meet(value, jnp.clip(value, jnp.min(fp), jnp.max(fp)))
    if known[0] is None:  # what is not in order has no bounds
        value = value + jnp.sum(jnp.where(jnp.diff(xp) > _least_gap(xp.dtype), 0, jnp.nan).astype(value.dtype))
    return _with_ends(value, x, xp, ends, left, right)


def _few_interpolated(
    x: jax.Array, xp: jax.Array, fp: jax.Array, *ends: jax.Array, left: str | None, right: str | None, known: Sequence
):
    """The same with numbers in the place of arrays: one function of x."""
    knots, values = ([jnp.asarray(k, a.dtype) for k in row.tolist()] for row, a in zip(known, (xp, fp), strict=True))
    inner = x if left == "extrapolate" else jnp.maximum(x, knots[0])
    inner = inner if right == "extrapolate" else jnp.minimum(inner, knots[-1])
    return _with_ends(_by_numbers(inner, knots, values), x, knots, ends, left, right)


def _with_ends(
    value: jax.Array,
    x: jax.Array,
    knots: jax.Array | Sequence[jax.Array],
    ends: Sequence,
    left: str | None,
    right: str | None,
):
    """The value, with numbers of their own beyond the knots."""
    rest = iter(ends)
    for side, beyond in ((left, x < knots[0]), (right, x > knots[-1])):
        value = jnp.where(beyond, next(rest), value) if side == "value" else value
    return value


def _by_numbers(x: jax.Array, xp: Sequence, fp: Sequence):
    """A line, and at every inner knot the change of slope times what lies beyond it."""
    slopes = [(fp[k + 1] - fp[k]) / (xp[k + 1] - xp[k]) for k in range(len(xp) - 1)]
    value = fp[0] + slopes[0] * (x - xp[0])
    for knot, before, after in zip(xp[1:-1], slopes[:-1], slopes[1:], strict=True):
        value = value + (after - before) * jax.nn.relu(x - knot)
    return value


def _by_arrays(x: jax.Array, xp: jax.Array, fp: jax.Array):
    slopes = jnp.diff(fp) / jnp.diff(xp)
    ramps = jax.nn.relu(x[..., None] - xp[1:-1])
    return fp[0] + slopes[0] * (x - xp[0]) + jnp.sum(jnp.diff(slopes) * ramps, axis=-1)


# --- map_coordinates --------------------------------------------------------------------------------------------------


def _map_coordinates(callee: _compat.ClosedJaxpr, operands: Sequence) -> Iterator[_Candidate]:
    image, *places = operands
    if not any(isinstance(place, Value) for place in places) or len(image.shape) != len(places):
        return
    atoms = [atom for equation in callee.jaxpr.eqns for atom in equation.invars if isinstance(atom, _compat.Literal)]
    literals = {float(atom.val) for atom in atoms if isinstance(np.asarray(atom.val)[()], np.floating)}
    for mode, outside in (("nearest", 0.0), *(("constant", number) for number in sorted(literals | {0.0}))):

        def reference(image: jax.Array, *places: jax.Array, mode: str = mode, outside: float = outside):
            return jax.scipy.ndimage.map_coordinates(image, places, 1, mode, outside)

        yield (
            reference,
            range(1, len(operands)),
            functools.partial(_blended, mode=mode, outside=outside, is_fixed=not isinstance(image, Value)),
        )


def _blended(image: jax.Array, *places: jax.Array, mode: str, outside: float, is_fixed: bool):
    """Linear interpolation: the image, less what is outside, weighted by a hat around the place on every axis."""
    image = image - outside
    least, most = jnp.min(image, initial=0), jnp.max(image, initial=0)
    for axis, place in enumerate(places):
        rank = place.ndim
        size = image.shape[rank if axis else 0]
        place = jnp.clip(place, 0, size - 1) if mode == "nearest" else place
        hats = jax.nn.relu(1 - jnp.abs(place[..., None] - jnp.arange(size, dtype=place.dtype)))
        if axis == 0:
            image = jnp.tensordot(hats, image, 1)
        else:
            image = jnp.sum(hats.reshape(*hats.shape, *(1,) * (image.ndim - rank - 1)) * image, axis=rank)
    if is_fixed:  # the weights add up to at most 1
        image = operations.meet(image, jnp.clip(image, least, most))
    return image + outside


# --- remainders -------------------------------------------------------------------------------------------------------


def _by_constants(reference: Callable, function: Callable) -> Callable[..., Iterator[_Candidate]]:
    def find(_callee: _compat.ClosedJaxpr, operands: Sequence) -> Iterator[_Candidate]:
        y = operands[1]
        if not (isinstance(y, Value) or (isinstance(y, Literal) and y.value == 0)):
            yield reference, (), lambda x, y: function(x, jnp.broadcast_to(y, x.shape))

    return find


# --- lengths ----------------------------------------------------------------------------------------------------------


def _hypot(_callee: _compat.ClosedJaxpr, _operands: Sequence) -> Iterator[_Candidate]:
    """JAX divides the smaller side by the larger one: no overflow, but bounds of the two are of two points."""
    for moving in ((), (0,), (1,)):
        yield jnp.hypot, moving, lambda x, y: jnp.sqrt(jnp.square(x) + jnp.square(y))


_FUNCTIONS: dict[str, Callable[..., Iterator[_Candidate]]] = {
    "_interp": _interp,
    "_map_coordinates": _map_coordinates,
    "hypot": _hypot,
    "remainder": _by_constants(jnp.remainder, roundings.remainder),
    "floor_divide": _by_constants(jnp.floor_divide, lambda x, y: jnp.floor(x / y)),
    "divmod": _by_constants(jnp.divmod, lambda x, y: [jnp.floor(x / y), roundings.remainder(x, y)]),
}
"""Name of JAX's function -> what it may be: a reference, which arguments `vmap` may have mapped, what equals it."""
