"""Quotients by a norm: no entry of `x / norm(x)` is beyond 1, whatever the bounds of its numerator and denominator say.

A factor m with `1 / |m| >= k sqrt(sum_i t_i^2)`, where some t_i is h itself, makes `|h m| <= 1 / k`: with the sum k is
1, with the mean of n squares 1 / sqrt(n) (RMSNorm). If the t_i of a sum are what is left of n values without their
mean, they add up to 0, so `h^2 <= (n - 1) / n sum_i t_i^2`: LayerNorm and GroupNorm are at most sqrt(n - 1).

That is read off the equations, whatever moves, repeats or groups entries on the way: each is followed by its number.
What only makes the denominator larger (a small number that is added, a maximum) may stand anywhere. In real arithmetic,
where the quotient is defined; whether it is, is decided elsewhere (`definedness`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from jaxbound.graph.values import Constant, Literal, Operand, Value, made_by

Rewrite = tuple[Callable, Sequence]

_LARGEST = 2**21
"""Entries above which nothing is followed."""
_FAR = Fraction(2**200)
"""Beyond which a square is not computed with."""
_LARGER = ("max", "add", "add_any")
_MOVES: dict[str, Callable[[dict, np.ndarray], np.ndarray]] = {
    "reshape": lambda params, ids: ids.reshape(params["new_sizes"]),
    "squeeze": lambda params, ids: np.squeeze(ids, tuple(params["dimensions"])),
    "transpose": lambda params, ids: ids.transpose(params["permutation"]),
    "broadcast_in_dim": lambda params, ids: _repeated(ids, params["shape"], params["broadcast_dimensions"]),
    "copy": lambda _, ids: ids,
    "stop_gradient": lambda _, ids: ids,
}


class _Moved(NamedTuple):
    """Entry j of an operand is `factor` times entry `ids[j]` of a value."""

    value: Value
    ids: np.ndarray
    factor: Fraction


class _Norm(NamedTuple):
    """The square of entry j is at least `factor` times the sum of the squares of the entries of a group of a value.

    The i-th square is that of entry `ids[i]` of the value, and it belongs to j's sum if `groups[i] == places[j]`.
    """

    value: Value
    ids: np.ndarray
    groups: np.ndarray
    places: np.ndarray
    factor: Fraction


class _Centered(NamedTuple):
    """Entry j is entry `ids[j]` of a value less `factor` times entry `sums[j]` of a sum."""

    value: Value
    ids: np.ndarray
    total: Value
    sums: np.ndarray
    factor: Fraction


def reach(name: str, operands: Sequence) -> float:
    """How large a product can be, as a value times the reciprocal of a norm that it is a part of; else infinity."""
    if name != "mul" or not all(isinstance(operand, Value) for operand in operands):
        return math.inf
    return min(_reach(x, y) for x, y in (operands, operands[::-1]))


def scaled(name: str) -> Callable[[dict, Sequence], Rewrite | None]:
    """The rule for `(c x) / n`, `(c x) m` and `x (c m)` with an array c: c times what has a reach."""

    def rule(_params: dict, operands: Sequence) -> Rewrite | None:
        for position, operand in enumerate(operands):
            product = made_by(operand, "mul")
            if product is None or (name == "div" and position):
                continue
            inner, array = product.operands[:: 1 if isinstance(product.operands[0], Value) else -1]
            if not isinstance(array, Constant):
                continue
            bare = [inner if k == position else o for k, o in enumerate(operands)]
            if inner.shape != operand.shape or not all(isinstance(o, Value) for o in bare):
                continue
            if (_quotient if name == "div" else reach)("mul", bare) < math.inf:
                return (lambda x, y, c: c * (x / y if name == "div" else x * y)), [*bare, array]
        return None

    return rule


def _quotient(_name: str, operands: Sequence) -> float:
    return _bound(operands[0], _norm(operands[1]))


def _reach(x: Value, m: Value) -> float:
    """Of x m."""
    found = _moved(m, "rsqrt", "integer_pow", "div")
    if found is None:
        return math.inf
    made, norm = found.value, None
    if made.name == "rsqrt":
        norm = _squares(made.operands[0])
    elif made.name == "integer_pow" and made.params["y"] == -1:
        norm = _norm(made.operands[0])
    elif made.name == "div" and isinstance(made.operands[0], Literal):
        norm, above = _norm(made.operands[1]), float(made.operands[0].value)
        if not math.isfinite(above) or above == 0:
            return math.inf
        norm = norm and norm._replace(factor=norm.factor / Fraction(above) ** 2)
    if norm is None or found.factor == 0:
        return math.inf
    return _bound(x, norm._replace(places=norm.places.ravel()[found.ids], factor=norm.factor / found.factor**2))


def _bound(x: Value, norm: _Norm | None) -> float:
    """The largest size of x divided by the norm, entry by entry."""
    found = _moved(x)
    if norm is None or found is None or found.factor == 0 or not norm.factor > 0:
        return math.inf
    if norm.places.shape != found.ids.shape:
        return math.inf
    square = found.factor**2 / norm.factor * _share(found, norm)
    if square < 0 or square > _FAR:
        return math.inf
    return math.sqrt(max(square, 1 / _FAR)) * (1 + 2**-40)


def _share(x: _Moved, norm: _Norm) -> Fraction:
    """What part of the sum of squares one of x may be: at most 1; negative where it is not among them."""
    own, other = _centered(x.value), _centered(norm.value)
    if own and other and own.value is other.value and own.total is other.total and own.factor == other.factor:
        mine = _pairs(own.ids.ravel()[x.ids], own.sums.ravel()[x.ids])
        theirs = _pairs(other.ids.ravel()[norm.ids], other.sums.ravel()[norm.ids])
        if _among(norm, mine, theirs):
            count = _count_of_rest(norm, other)
            return Fraction(count - 1, count) if count else Fraction(1)
    return Fraction(1 if x.value is norm.value and _among(norm, x.ids, norm.ids) else -1)


def _among(norm: _Norm, mine: np.ndarray, theirs: np.ndarray) -> bool:
    """Whether every entry is one of those whose squares its norm adds up."""
    return bool(np.isin(_pairs(norm.places, mine), _pairs(norm.groups, theirs)).all())


def _count_of_rest(norm: _Norm, centered: _Centered) -> int:
    """How many values, less their mean, each group holds; 0 where they do not add up to 0."""
    summed = _moved(centered.total.operands[0])
    if summed is None or summed.value is not centered.value or summed.factor != 1:
        return 0
    sums, of = centered.sums.ravel()[norm.ids], _groups(centered.total)
    groups, which, counts = np.unique(norm.groups, return_index=True, return_counts=True)
    if len(np.unique(sums)) != len(groups) or np.any(sums != sums[which][np.searchsorted(groups, norm.groups)]):
        return 0
    used = np.isin(of, sums)
    same = np.array_equal(
        np.sort(_pairs(sums, centered.ids.ravel()[norm.ids])), np.sort(_pairs(of[used], summed.ids.ravel()[used]))
    )
    count = int(counts[0])
    return count if same and np.all(counts == count) and centered.factor * count == 1 else 0


# --- reading equations ------------------------------------------------------------------------------------------------


def _moved(operand: Any, *names: str) -> _Moved | None:
    """An operand as entries of a value (made by one of these primitives, if any), moved and scaled by numbers."""
    factor, moves = Fraction(1), []
    while isinstance(operand, Value):
        if math.prod(operand.shape) > _LARGEST:
            return None
        first, *rest = operand.operands or (None,)
        number = next((o for o in operand.operands if isinstance(o, Literal)), None)
        if operand.name in _MOVES and not (operand.name == "reshape" and operand.params["dimensions"]):
            moves.append((operand.name, operand.params))
        elif number is None or not np.isfinite(number.value):
            break
        elif operand.name == "mul":
            (first,) = [o for o in operand.operands if o is not number]
            factor *= Fraction(float(number.value))
        elif operand.name == "div" and rest[0] is number and number.value != 0:
            factor /= Fraction(float(number.value))
        elif not (operand.name in ("add", "sub") and rest[0] is number and number.value == 0):
            break
        operand = first
    if (
        not isinstance(operand, Value)
        or math.prod(operand.shape) > _LARGEST
        or operand.name not in (names or [operand.name])
    ):
        return None
    ids = np.arange(math.prod(operand.shape)).reshape(operand.shape)
    for name, params in reversed(moves):
        ids = _MOVES[name](params, ids)
    return _Moved(operand, ids, factor)


def _repeated(ids: np.ndarray, shape: Sequence[int], axes: Sequence[int]) -> np.ndarray:
    own = dict(zip(axes, ids.shape, strict=True))
    return np.broadcast_to(ids.reshape([own.get(axis, 1) for axis in range(len(shape))]), shape)


def _norm(operand: Operand) -> _Norm | None:
    """A number that is not below a root of a sum of squares."""
    return _at_least(operand, "sqrt", lambda made: _squares(made.operands[0]), 2)


def _squares(operand: Operand) -> _Norm | None:
    """A number that is not below a sum of squares."""
    return _at_least(operand, "reduce_sum", _sum_of_squares, 1)


def _at_least(operand: Operand, name: str, read: Callable[[Value], _Norm | None], power: int) -> _Norm | None:
    """What `read` finds in a value of a name, moved, scaled, less what was added that is not negative, or a maximum."""
    found = _moved(operand, name, *_LARGER)
    if found is None or found.factor <= 0:
        return None
    made, norm = found.value, None
    if made.name == name:
        norm = read(made)
    else:
        for one, other in (made.operands, made.operands[::-1]):
            if made.name == "max" or _is_nonnegative(other):
                norm = norm or _at_least(one, name, read, power)
    if norm is None:
        return None
    return norm._replace(places=norm.places.ravel()[found.ids], factor=norm.factor * found.factor**power)


def _is_nonnegative(operand: Operand) -> bool:
    return operand.value >= 0 if isinstance(operand, Literal) else isinstance(operand, Value) and operand.sign > 0


def _sum_of_squares(made: Value) -> _Norm | None:
    squared = _moved(made.operands[0], "square", "integer_pow", "mul")
    if squared is None or squared.factor <= 0:
        return None
    square = squared.value
    if square.name == "mul" and square.operands[0] is not square.operands[1]:
        return None
    if square.name == "integer_pow" and square.params["y"] != 2:
        return None
    of = _moved(square.operands[0])
    if of is None:
        return None
    places = np.arange(math.prod(made.shape)).reshape(made.shape)
    return _Norm(of.value, of.ids.ravel()[squared.ids.ravel()], _groups(made), places, squared.factor * of.factor**2)


def _groups(total: Value) -> np.ndarray:
    """Into which entry of a sum each entry of its operand goes."""
    (inner,), axes = total.operands, total.params["axes"]
    kept = tuple(axis for axis in range(len(inner.shape)) if axis not in axes)
    return _repeated(np.arange(math.prod(total.shape)).reshape(total.shape), inner.shape, kept).ravel()


def _centered(value: Value) -> _Centered | None:
    if value.name != "sub" or not all(isinstance(operand, Value) for operand in value.operands):
        return None
    of, mean = map(_moved, value.operands)
    if of is None or mean is None or of.factor != 1 or mean.value.name != "reduce_sum":
        return None
    return _Centered(of.value, of.ids, mean.value, mean.ids, mean.factor)


def _pairs(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """One number for two, below `_LARGEST` each."""
    return first.astype(np.int64) * _LARGEST + second
