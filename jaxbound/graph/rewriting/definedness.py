"""Whether a value is defined: what equations such as `x != x`, `is_finite(x)` and `x < inf` ask.

A node is bounded where it is defined, and by nothing (infinitely) where a region reaches beyond, so a boolean about
just that cannot be read off its bounds. It is known where nothing that the value is made of can be undefined, and
within a scalar function, whose proof knows its domain; anything else is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np

from jaxbound.graph import operations
from jaxbound.graph.primitives import AFFINE, ELEMENTWISE, NONLINEAR, PARTIAL
from jaxbound.graph.values import Literal, Value

Rewrite = tuple[Callable, Sequence]

_OF_ITSELF = {"ne": False, "eq": True, "le": True, "ge": True, "is_finite": True}
"""What a real number gives, compared with itself; what is undefined (NaN) gives the opposite."""

_UNKNOWN, NOT_NEGATIVE, POSITIVE = range(3)
_DEFINED_FROM = {
    "div": POSITIVE, "integer_pow": POSITIVE, "log": POSITIVE, "log1p": NOT_NEGATIVE, "pow": POSITIVE,
    "rsqrt": POSITIVE, "sqrt": NOT_NEGATIVE,
}  # fmt: skip
"""Partial primitive -> a sign of its operand (the denominator of a quotient) with which it is defined."""
_ALWAYS = {
    "abs": NOT_NEGATIVE, "cosh": POSITIVE, "exp": POSITIVE, "exp2": POSITIVE, "logistic": POSITIVE,
    "rsqrt": POSITIVE, "square": NOT_NEGATIVE,
}  # fmt: skip
_OF_OPERANDS = {
    "max": max, "meet": max,
    **dict.fromkeys((
        "asinh", "atan", "broadcast_in_dim", "cbrt", "clamp", "concatenate", "convert_element_type", "copy", "cumsum",
        "div", "erf", "expm1", "expand_dims", "integer_pow", "log1p", "min", "mul", "reduce_max", "reduce_min",
        "reduce_sum", "reduce_window_sum", "reshape", "rev", "sinh", "slice", "sqrt", "squeeze", "stop_gradient",
        "tanh", "transpose",
    ), min),
}  # fmt: skip
"""Primitive -> which of its operands' signs its result has for certain."""


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
    if made.name not in PARTIAL or (made.name == "integer_pow" and made.params["y"] >= 0):
        return False
    last = made.operands[-1 if made.name == "div" else 0]
    if made.name == "div" and isinstance(last, Literal):
        return last.value == 0
    return made.name not in _DEFINED_FROM or _sign(last) < _DEFINED_FROM[made.name]


def sign_of(name: str, params: dict, operands: Sequence, shape: tuple[int, ...]) -> int:
    """What is certain of the sign of a value, wherever it is defined, from how it is made."""
    if 0 in shape:
        return _UNKNOWN
    signs = [_sign(operand) for operand in operands]
    if name in _ALWAYS:
        return _ALWAYS[name]
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
    return _OF_OPERANDS[name](signs) if name in _OF_OPERANDS else _UNKNOWN


def _sign(operand) -> int:
    if isinstance(operand, Literal):
        return int(operand.value >= 0) + int(operand.value > 0)
    return operand.sign if isinstance(operand, Value) else _UNKNOWN
