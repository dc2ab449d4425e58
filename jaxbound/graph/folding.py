"""Numbers that a function makes of numbers, while it is read: computed as the function would, and what they really are.

In real arithmetic `sqrt(2.0)` is not the number that floating point makes of it. A number that is made without rounding
is a literal like those that are written. Any other one is a constant that is computed (`values.Computed`); within a
scalar function it stays a number, with the interval in which interval arithmetic has found its real value.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbound._compat import JaxprEqn, bind, is_tracer
from jaxbound.curvature import enclosing
from jaxbound.curvature.jets import UnsupportedError
from jaxbound.graph.primitives import ELEMENTWISE
from jaxbound.graph.values import Computed, Literal

_MOVES = ("broadcast_in_dim", "reshape", "squeeze")
_KEPT = frozenset({
    *_MOVES, "concatenate", "convert_element_type", "copy", "imag", "iota", "real", "rev", "select_n", "slice",
    "stack", "stop_gradient", "transpose",
})  # fmt: skip
_SMALL = 2**18
"""Entries up to which an array is known while a function is read."""
_COMPARISONS = {name: getattr(operator, name) for name in ("eq", "ge", "gt", "le", "lt", "ne")}
_EXACT = frozenset({"and", "ceil", "floor", "is_finite", "not", "or", "round", "sign", "xor"})
"""Not rounded, but not known to interval arithmetic as numbers."""
_WHOLE = frozenset({"add", "and", "max", "min", "mul", "neg", "not", "or", "sub", "xor", *_COMPARISONS})
"""Of whole numbers and booleans they are the same wherever they are computed."""
_POINT = np.zeros(1)


class Folded(NamedTuple):
    """A number as it is computed and, if it may be rounded, between what its real value lies."""

    value: Any
    real: tuple[float, float] | None


def fold(equation: JaxprEqn, operands: Sequence) -> Folded | None:
    """The number that an elementwise or broadcasting equation of numbers makes; None if it is not one number."""
    name, params = equation.primitive.name, equation.params
    if not operands or len(equation.outvars) != 1 or not all(isinstance(o, (Literal, Computed)) for o in operands):
        return None
    if name in _MOVES:
        return Folded(operands[0].value, getattr(operands[0], "real", None))
    if name not in ELEMENTWISE or any(np.iscomplexobj(operand.value) for operand in operands):
        return None
    if name in _COMPARISONS:  # a compiled one may take subnormal numbers for 0
        value = np.asarray(_COMPARISONS[name](*(operand.value for operand in operands)))[()]
    else:
        with jax.ensure_compile_time_eval(), jax.debug_nans(False):  # one that a user's function writes down
            value = np.asarray(equation.primitive.bind(*(o.value for o in operands), **params))[()]
    return Folded(value, _proved(name, params, operands, value))


def _proved(name: str, params: dict, operands: Sequence, value: Any) -> tuple[float, float] | None:
    """Between what the real result of an equation lies; None if that is the value itself."""
    exact = not any(isinstance(operand, Computed) for operand in operands)
    floats = [o.value for o in operands if np.issubdtype(o.dtype, np.inexact) or o.dtype.kind == "V"]
    if exact and (not all(map(np.isfinite, floats)) or (not floats and value.dtype.kind in "biu")):
        return None  # infinite numbers are what they are written as, and whole ones wrap around
    if exact and (name in _EXACT or name in _COMPARISONS):
        return None
    reads = tuple(("lit", o.value, o.real) if isinstance(o, Computed) else ("lit", o.value) for o in operands)
    try:
        orders = enclosing.enclose(((name, tuple(params.items()), reads),), _POINT, _POINT).orders
    except UnsupportedError:
        return -np.inf, np.inf
    ends = float(orders.lower[0, 0, 0]), float(orders.upper[0, 0, 0])
    return None if exact and ends == (float(value), float(value)) else ends


def small(array: Any) -> np.ndarray | None:
    """An array of numbers as NumPy knows it, if it is small."""
    if is_tracer(array) or jnp.issubdtype(array.dtype, jax.dtypes.extended) or np.size(array) > _SMALL:
        return None
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return None
    with jax.transfer_guard("allow"):
        return np.asarray(array)


def is_known(operands: Sequence) -> bool:
    """Whether all operands are numbers, or arrays that are known."""
    return all(isinstance(o, Literal) or getattr(o, "known", None) is not None for o in operands)


def move(equation: JaxprEqn, operands: Sequence) -> np.ndarray | None:
    """The array that an equation makes of known ones without rounding, if it is small.

    Its entries are those of the operands, or whole numbers, or say how entries compare, or are logarithms of 0 and 1.
    """
    name = equation.primitive.name
    made: Any = equation.outvars[0].aval
    if np.prod(made.shape) > _SMALL or not is_known(operands):
        return None
    known = [np.full(o.shape, o.value) if isinstance(o, Literal) else o.known for o in operands]
    whole = name in _WHOLE and made.dtype.kind in "biu" and all(array.dtype.kind in "biu" for array in known)
    compared = name in _COMPARISONS and not any(map(_may_be_flushed, known))
    masks = name == "log" and np.all(np.isin(known[0], (0, 1)))
    if name not in _KEPT and not whole and not compared and not masks:
        return None
    with jax.ensure_compile_time_eval():
        made = np.asarray(bind(equation.primitive, known, equation.params))
    if name == "convert_element_type":
        widened = np.real(made) if np.iscomplexobj(made) and not np.iscomplexobj(known[0]) else made
        return made if np.array_equal(widened.astype(known[0].dtype), known[0]) else None
    return made


def _may_be_flushed(array: np.ndarray) -> bool:
    """Whether an array has numbers that count as 0 on some processors."""
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return False
    return bool(np.any((array != 0) & (np.abs(array) < jnp.finfo(array.dtype).tiny)))
