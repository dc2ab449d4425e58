"""Whether a value is defined: what equations such as `x != x`, `is_finite(x)` and `x < inf` ask.

A node is bounded where it is defined, and by nothing (infinitely) where a region reaches beyond, so a boolean about
just that cannot be read off its bounds. It is known where nothing that the value is made of can be undefined, and
within a scalar function, whose proof knows its domain; anything else is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np

from jaxbound import operations
from jaxbound.primitives import AFFINE, ELEMENTWISE, NONLINEAR, PARTIAL
from jaxbound.values import Literal, Value

Rewrite = tuple[Callable, Sequence]

_OF_ITSELF = {"ne": False, "eq": True, "le": True, "ge": True, "is_finite": True}
"""What a real number gives, compared with itself; what is undefined (NaN) gives the opposite."""

_UNKNOWN, _NOT_NEGATIVE, _POSITIVE = range(3)
_DEFINED_FROM = {
    "div": _POSITIVE, "integer_pow": _POSITIVE, "log": _POSITIVE, "log1p": _NOT_NEGATIVE, "pow": _POSITIVE,
    "rsqrt": _POSITIVE, "sqrt": _NOT_NEGATIVE,
}  # fmt: skip
"""Partial primitive -> a sign of its operand (the denominator of a quotient) with which it is defined."""
_ALWAYS = {
    "abs": _NOT_NEGATIVE, "cosh": _POSITIVE, "exp": _POSITIVE, "exp2": _POSITIVE, "logistic": _POSITIVE,
    "rsqrt": _POSITIVE, "square": _NOT_NEGATIVE,
}  # fmt: skip
_OF_OPERANDS = {
    "max": max, "meet": max, "mul": min, "div": min, "min": min, "reduce_max": min, "reduce_sum": min, "sqrt": min,
    "broadcast_in_dim": min, "reshape": min, "squeeze": min, "transpose": min, "slice": min, "copy": min,
    "stop_gradient": min, "convert_element_type": min,
}  # fmt: skip


def rule(name: str) -> Callable[[dict, Sequence], Rewrite | None]:
    """The rule for a comparison, or `is_finite`, by its name."""

    def rewrite(_params: dict, operands: Sequence) -> Rewrite | None:
        x = next(operand for operand in operands if isinstance(operand, Value))
        itself = name in _OF_ITSELF and all(operand is x for operand in operands)
        infinite = any(isinstance(operand, Literal) and np.isinf(operand.value) for operand in operands)
        if not (itself or infinite) or not jnp.issubdtype(x.dtype, jnp.floating):
            return None
        if itself and is_total(x):
            return lambda x: jnp.full(x.shape, _OF_ITSELF[name]), [Literal(x.dtype.type(0), x.shape)]
        return None if is_total(x.root) else (operations.is_defined, [x])

    return rewrite


def is_total(value: Value) -> bool:
    """Whether nothing that a value is made of can be undefined, as far as signs tell."""
    seen, stack, signs = set(), [value], {}
    while stack:
        made = stack.pop()
        known = made.primitive is None or made.name in ELEMENTWISE or made.name in AFFINE or made.name in NONLINEAR
        if not known or (made.name in PARTIAL and not _has_its_domain(made, signs)):
            return False
        seen.add(made)
        stack.extend(operand for operand in made.dependent if operand not in seen)
    return True


def _has_its_domain(made: Value, signs: dict[Value, int]) -> bool:
    if made.name == "integer_pow" and made.params["y"] >= 0:
        return True
    last = made.operands[-1 if made.name == "div" else 0]
    if made.name == "div" and isinstance(last, Literal):
        return last.value != 0
    return made.name in _DEFINED_FROM and _sign(last, signs) >= _DEFINED_FROM[made.name]


def _sign(operand, signs: dict[Value, int]) -> int:
    """What is certain of the sign of a value, from how it is made; `signs` holds what is known already."""
    if isinstance(operand, Literal):
        return int(operand.value >= 0) + int(operand.value > 0)
    if not isinstance(operand, Value) or 0 in operand.shape:
        return _UNKNOWN
    if operand not in signs:
        signs[operand] = _sign_of_result(operand, signs)
    return signs[operand]


def _sign_of_result(made: Value, signs: dict[Value, int]) -> int:
    if made.name in _ALWAYS:
        return _ALWAYS[made.name]
    even = made.name == "integer_pow" and made.params["y"] % 2 == 0
    if even or (made.name == "mul" and made.operands[0] is made.operands[1]):
        return _NOT_NEGATIVE
    if made.name not in ("add", "add_any", *_OF_OPERANDS):
        return _UNKNOWN
    parts = [_sign(part, signs) for part in made.operands]
    if made.name in ("add", "add_any"):
        return max(parts) if all(parts) else _UNKNOWN
    return _OF_OPERANDS[made.name](parts)
