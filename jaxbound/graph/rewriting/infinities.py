"""Infinite numbers that a function writes down: where they may go, and where they may make what is undefined.

In real arithmetic nothing overflows, so a value is infinite only where a literal is: minus infinity masks scores, or a
running maximum begins with it. It is defined while it is compared, chosen, or put into exp. But `inf - inf`, `0 * inf`
and a softmax of masked scores alone are not (NaN). An equation that may make such is *doubtful*; it stays as it is
written, and what is made of it is bounded by nothing unless bounds say that its operands are finite
(`methods.domains`). A literal NaN is treated alike; as one case of a choice it counts where it may be chosen.

At infinity a function takes its limit, which no real number may give: `exp(-inf)` is 0, and `log` or a quotient of it
is infinite in turn, though it is proved to be defined for all real numbers.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence

import numpy as np

from jaxbound.curvature.functions import facts
from jaxbound.graph.primitives import AFFINE
from jaxbound.graph.rewriting import definedness
from jaxbound.graph.values import Literal, Operand, Value

MINUS, PLUS = 1, 2
"""What a value may be beside real numbers, added up."""
_BOTH = MINUS | PLUS

_RISING = frozenset({
    "cumlogsumexp", "cummax", "cummin", "logsumexp", "reduce_max", "reduce_min", "reduce_window_max",
    "reduce_window_min", "sort", "top_k",
})  # fmt: skip
"""Primitives of whole arrays that are infinite where an operand is, with its sign; of elementwise ones their row says
it. They are defined there, or known not to be (`definedness`)."""
_CHOICES = frozenset({"select", "select_n"})
_SUMS = frozenset({"cumsum", "reduce_sum", "reduce_window_sum", "scatter-add"})
CALLS = frozenset({"cond", "scan"})
"""They are read equation by equation."""


def of(operand: Operand) -> int:
    """What an operand may be beside real numbers."""
    if isinstance(operand, Literal):
        return MINUS * bool(operand.value == -np.inf) + PLUS * bool(operand.value == np.inf)
    return operand.infinite if isinstance(operand, Value) else 0


def of_result(name: str, params: dict, operands: Sequence) -> int:
    """What the result of an equation may be beside real numbers."""
    if (
        not facts(name).closed
        and definedness.may_leave(name, params, operands)
        and _is_limit(operands[-1 if name == "div" else 0])
    ):
        return _BOTH
    given = list(map(of, operands))
    if not any(given) or facts(name).at_infinity == "finite":
        return 0
    if name in ("exp", "exp2", "expm1"):
        return given[0] & PLUS
    if name in ("abs", "cosh", "square"):
        return PLUS
    if name == "integer_pow":
        return 0 if params["y"] <= 0 else PLUS if params["y"] % 2 == 0 else given[0]
    if name in _RESULTS:
        return _RESULTS[name](given)
    if name in ("mul", "div"):
        return _scaled(given[0], operands[1]) | (_scaled(given[1], operands[0]) if name == "mul" else 0)
    if _rises(name):
        return given[0]
    return _union(given[1:] if name in _CHOICES else given) if _moves(name) or name in _SUMS else _BOTH


def is_doubtful(name: str, operands: Sequence) -> bool:
    """Whether infinite or undefined literals may make the result of an equation undefined."""
    if any(isinstance(o, Literal) and o.value != o.value for o in operands):
        return name not in _CHOICES
    if name == "div" and _is_limit(operands[1]) and not any(map(_is_nonzero, operands)):
        return True
    given = list(map(of, operands))
    if not any(given) or facts(name).at_infinity == "finite" or _rises(name) or name in CALLS:
        return False
    if name in ("add", "add_any", "sub"):
        first, second = given[0], _flipped(given[1]) if name == "sub" else given[1]
        return bool(first & _flipped(second))
    if name in _SUMS:
        return _union(given) == _BOTH
    if name == "mul":
        return any(mine and not _is_nonzero(other) for mine, other in zip(given, operands[::-1], strict=True))
    if name == "div":
        return bool(given[0]) and (bool(given[1]) or not _is_nonzero(operands[1]))
    return not (
        name in _RESULTS or name in ("abs", "cosh", "exp", "exp2", "expm1", "integer_pow", "square") or _moves(name)
    )


def _is_limit(operand: Operand) -> bool:
    """Whether an operand is a function of what may be infinite, entry by entry."""
    return isinstance(operand, Value) and any(root.infinite for root in operand.lineage)


def _rises(name: str) -> bool:
    """Whether a primitive is infinite where its operand is, with its sign."""
    return name in _RISING or facts(name).at_infinity == "rising"


def _moves(name: str) -> bool:
    """Whether a primitive only moves or chooses entries."""
    return name in _CHOICES or name == "meet" or (name in AFFINE and not AFFINE[name].scales)


def _flipped(infinite: int) -> int:
    return (infinite & MINUS) * PLUS + (infinite & PLUS) // PLUS


def _union(given: Sequence[int]) -> int:
    return functools.reduce(operator.or_, given, 0)


def _larger(given: Sequence[int]) -> int:
    """Of a maximum: minus infinity only where all are."""
    return functools.reduce(operator.and_, given, MINUS) | _union(given) & PLUS


def _smaller(given: Sequence[int]) -> int:
    return _flipped(_larger(list(map(_flipped, given))))


def _is_nonzero(operand: Operand) -> bool:
    if isinstance(operand, Literal):
        return operand.value != 0
    return isinstance(operand, Value) and operand.sign == definedness.POSITIVE


def _scaled(infinite: int, factor: Operand) -> int:
    if infinite and isinstance(factor, Literal):
        return infinite if factor.value > 0 else _flipped(infinite)
    return _BOTH if infinite and not _is_nonzero(factor) else infinite


_RESULTS: dict[str, Callable[[Sequence[int]], int]] = {
    "max": _larger,
    "min": _smaller,
    "clamp": lambda given: _smaller([_larger(given[:2]), given[2]]),
    "neg": lambda given: _flipped(given[0]),
    "sub": lambda given: given[0] | _flipped(given[1]),
    "meet": lambda given: functools.reduce(operator.and_, given),
}
