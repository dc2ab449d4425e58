"""Whether a value is defined: what equations such as `x != x`, `is_finite(x)` and `x < inf` ask.

A node is bounded where it is defined, and by nothing (infinitely) where a region reaches beyond, so a boolean about
just that cannot be read off its bounds. It is known where nothing that the value is made of can be undefined, and
within a scalar function, whose proof knows its domain; anything else is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np

from jaxbound.curvature.functions import facts
from jaxbound.graph import operations
from jaxbound.graph.primitives import AFFINE, ELEMENTWISE, NONLINEAR
from jaxbound.graph.values import Literal, Operand, Value

Rewrite = tuple[Callable, Sequence]

_OF_ITSELF = {"ne": False, "eq": True, "le": True, "ge": True, "is_finite": True}
"""What a real number gives, compared with itself; what is undefined (NaN) gives the opposite."""

_UNKNOWN, NOT_NEGATIVE, POSITIVE = range(3)
_STRUCTURE = frozenset({
    "broadcast_in_dim", "concatenate", "cumsum", "expand_dims", "reduce_max", "reduce_min", "reduce_sum",
    "reduce_window_sum", "reshape", "rev", "slice", "squeeze", "transpose",
})  # fmt: skip
"""Primitives of whole arrays whose result has the least sign of their operands."""


def rule(name: str) -> Callable[[dict, Sequence], Rewrite | None]:
    """The rule for a comparison, or `is_finite`, by its name."""

    def rewrite(_params: dict, operands: Sequence) -> Rewrite | None:
        x = next(operand for operand in operands if isinstance(operand, Value))
        itself = name in _OF_ITSELF and all(operand is x for operand in operands)
        infinite = any(isinstance(operand, Literal) and np.isinf(operand.value) for operand in operands)
        if not (itself or infinite) or not jnp.issubdtype(x.dtype, jnp.floating):
            return None
        is_infinite = x.infinite if name == "is_finite" else infinite and x.root.infinite
        if itself and is_total(x) and not is_infinite:
            return lambda x: jnp.full(x.shape, _OF_ITSELF[name]), [Literal(x.dtype.type(0), x.shape)]
        return None if is_total(x.root) and not is_infinite else (operations.is_defined, [x])

    return rewrite


def is_total(value: Value) -> bool:
    """Whether nothing that a value is made of can be undefined, as far as signs tell."""
    seen, stack = set(), [value]
    while stack:
        made = stack.pop()
        known = made.primitive is None or made.name in ELEMENTWISE or made.name in AFFINE or made.name in NONLINEAR
        if not known or leaves_domain(made):
            return False
        seen.add(made)
        stack.extend(operand for operand in made.dependent if operand not in seen)
    return True


def leaves_domain(made: Value) -> bool:
    """Whether the equation that makes a value may be undefined at what it reads, as far as signs tell."""
    return may_leave(made.name, made.params, made.operands)


def may_leave(name: str, params: dict, operands: Sequence) -> bool:
    """The same of an equation whose result is not there yet."""
    row = facts(name)
    if not row.is_partial or (name == "integer_pow" and params["y"] >= 0):
        return False
    last = operands[-1 if name == "div" else 0]
    if name == "div" and isinstance(last, Literal):
        return last.value == 0
    return row.defined_from is None or _sign(last) < row.defined_from


def sign_of(name: str, params: dict, operands: Sequence, shape: tuple[int, ...]) -> int:
    """What is certain of the sign of a value, wherever it is defined, from how it is made.

    Of an infinite operand what is positive for all real numbers may be 0: `exp(-inf)`, `1 / inf`.
    """
    if 0 in shape:
        return _UNKNOWN
    sign = _sign_of(name, params, operands)
    vanishes = any(isinstance(operand, Value) and operand.infinite for operand in operands)
    return min(sign, NOT_NEGATIVE) if vanishes and facts(name).vanishes else sign


def _sign_of(name: str, params: dict, operands: Sequence) -> int:
    signs = [_sign(operand) for operand in operands]
    if facts(name).sign:
        return facts(name).sign
    even = name == "integer_pow" and params["y"] % 2 == 0
    if even or (name == "mul" and operands[0] is operands[1]):
        return max(NOT_NEGATIVE, signs[0])
    if name in ("add", "add_any"):
        return max(signs) if all(signs) else _UNKNOWN
    if name == "select_n":
        fixed = isinstance(operands[0], Literal)
        return signs[1 + int(operands[0].value)] if fixed else min(signs[1:])
    if name == "pow":
        return POSITIVE if signs[0] == POSITIVE else _UNKNOWN
    if name in ("max", "meet"):
        return max(signs)
    return min(signs) if facts(name).keeps_sign or name in _STRUCTURE else _UNKNOWN


def _sign(operand: Operand) -> int:
    if isinstance(operand, Literal):
        return int(operand.value >= 0) + int(operand.value > 0)
    if isinstance(operand, Value):
        return operand.sign
    known = operand.known
    if known is None or np.iscomplexobj(known) or known.size == 0 or not np.all(known >= 0):
        return _UNKNOWN
    least = jnp.finfo(known.dtype).tiny if jnp.issubdtype(known.dtype, jnp.floating) else 1
    return POSITIVE if np.all(known >= least) else NOT_NEGATIVE
