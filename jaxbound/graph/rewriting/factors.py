"""Products and sums regrouped, so that all that one value bends becomes one scalar function.

Reverse-mode derivatives multiply a cotangent g by one factor of the chain rule after another, repeated for every
output: `(g * a(z)) * b(z)`, `g * a(z) + g * b(z)`. Relaxed in that order, each product is a product of two bounded
values; as `g * (a b)(z)` and `g * (a + b)(z)` one of them is left, and the factor is a function of one variable.

* Elementwise operations move before a broadcast that all their operands share.
* A product is flattened, and factors that are functions of one root are multiplied first.
* In a sum, or a choice, of two products that differ in the functions of one root only, the others are factored out.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxbound._compat import Primitive
from jaxbound.graph import operations
from jaxbound.graph.primitives import ELEMENTWISE
from jaxbound.graph.values import Literal, Operand, Value, made_by

Rewrite = tuple[Callable, Sequence]

_MOST = 16
"""Factors of two operands, above which nothing is regrouped."""


Factor = tuple[Any, str]
"""An operand, and how it takes part: "times", "over", or, for booleans, "if" (1 where true) and "unless" (0 there)."""


def before_broadcast(primitive: Primitive, params: dict, operands: Sequence) -> Rewrite | None:
    """An elementwise operation on values that are all repeated in one way: before they are."""
    values = [operand for operand in operands if isinstance(operand, Value)]
    first = made_by(values[0], "broadcast_in_dim")
    if primitive.name not in ELEMENTWISE or first is None or any(_repeat(v) != _repeat(first) for v in values):
        return None
    if not all(isinstance(operand, (Value, Literal)) for operand in operands):
        return None
    (source,) = first.operands
    if not isinstance(source, Value):
        return None
    shape, axes = first.params["shape"], first.params["broadcast_dimensions"]
    inner = [o.operands[0] if isinstance(o, Value) else Literal(o.value, source.shape) for o in operands]
    return lambda *parts: jax.lax.broadcast_in_dim(primitive.bind(*parts, **params), shape, axes), inner


def product(_params: dict, operands: Sequence) -> Rewrite | None:
    """A product whose two sides share a root, below other factors."""
    left, right = map(_factors, operands)
    shared = set(map(_key, left)) & set(map(_key, right)) - {None}
    if not shared or not 3 <= len(left) + len(right) <= _MOST:
        return None
    groups: dict = {}
    for position, factor in enumerate((*left, *right)):
        groups.setdefault(_key(factor) or position, []).append(factor)
    if len(groups) == 1:
        return None
    built = _built(lambda *parts: functools.reduce(operator.mul, parts), list(groups.values()), operands[0])
    built[0].only_reorders = all(how == "times" for _, how in (*left, *right))
    return built


def total(name: str) -> Callable[[dict, Sequence], Rewrite | None]:
    """The rule for a sum of two, by the primitive's name."""
    combine = operator.sub if name == "sub" else operator.add
    return lambda _params, operands: _factored(combine, operands)


def choice(_params: dict, operands: Sequence) -> Rewrite | None:
    """A choice between two multiples of one value is a multiple of a choice."""
    which, *cases = operands
    if len(cases) != 2 or not isinstance(which, Value):
        return None
    return _conjunction(operands) or _factored(lambda no, yes, which: jax.lax.select_n(which, no, yes), cases, which)


def _conjunction(operands: Sequence) -> Rewrite | None:
    """0 unless one thing holds, and there 0 unless another does."""
    outer = _zeroed(operands)
    inner = made_by(outer[2], "select_n") if outer else None
    nested = _zeroed(inner.operands) if inner else None
    if outer is None or nested is None or not isinstance(nested[0], Value):
        return None
    flips = outer[1], nested[1]

    def function(first: jax.Array, second: jax.Array, x: jax.Array):
        holds = [~which if flip else which for which, flip in zip((first, second), flips, strict=True)]
        return jax.lax.select_n(holds[0] & holds[1], jnp.zeros_like(x), x)

    return function, [outer[0], nested[0], nested[2]]


def _zeroed(operands: Sequence) -> tuple | None:
    """`(which, flipped, x)` of a choice between 0 and x."""
    which, *cases = operands
    for flipped, (zero, x) in enumerate((cases, cases[::-1])):
        if len(cases) == 2 and isinstance(zero, Literal) and zero.value == 0:
            return which, bool(flipped), x
    return None


def _factored(combine: Callable, cases: Sequence, which: Value | None = None) -> Rewrite | None:
    """The common factors of two cases, times the combination of the functions of one root in which they differ."""
    roots = [id(case.root) if isinstance(case, Value) else None for case in cases]
    if any(isinstance(case, Literal) for case in cases) or len(set(roots)) == 1:
        return None
    left, right = map(_factors, cases)
    if len(left) + len(right) > _MOST:
        return None
    for key in dict.fromkeys(filter(None, map(_key, (*left, *right)))):
        (own, others), (other, same) = _parted(left, key), _parted(right, key)
        if _identities(others) == _identities(same) != [] and (which is None or _key((which, "if")) == key):
            tail = [] if which is None else [[(which, "times")]]
            return _built(lambda base, *parts: base * combine(*parts), [others, own, other, *tail], cases[0])
    (own, others), (other, same) = _parted(left, None), _parted(right, None)
    if which is not None and _identities(others) == _identities(same) and max(len(own), len(other)) <= 1:
        return _gated(own, other, others, which)
    return None


def _gated(no: list[Factor], yes: list[Factor], factors: list[Factor], which: Value) -> Rewrite | None:
    """`no * x` or `yes * x`, for numbers no and yes, is `no * x + (yes - no) * (0 or x)`."""
    if any(how != "times" for _, how in (*no, *yes)):
        return None
    like = factors[0][0].dtype.type
    low, high = (like(part[0][0].value if part else 1) for part in (no, yes))
    if not (math.isfinite(low) and math.isfinite(high) and math.isfinite(high - low)):
        return None

    def function(x: jax.Array, which: jax.Array):
        return operations.between(x, jax.lax.select_n(which, jnp.zeros_like(x), x), low, high)

    return _built(function, [factors, [(which, "times")]], which)


def _built(function: Callable, groups: Sequence[list[Factor]], like: Value) -> Rewrite:
    """A function of the products of groups of factors; an empty group is 1."""
    operands = [Literal(o.value, ()) if isinstance(o, Literal) else o for group in groups for o, _ in group]

    def from_operands(*parts: jax.Array):
        rest = iter(parts)
        products = []
        for group in groups:
            factors = [_FACTORS[how](next(rest), like.dtype) for _, how in group]
            products.append(functools.reduce(operator.mul, factors) if factors else jnp.ones(like.shape, like.dtype))
        return function(*products)

    return from_operands, operands


_FACTORS: dict[str, Callable] = {
    "times": lambda x, _: x,
    "over": lambda x, _: 1 / x,
    "if": lambda which, dtype: jnp.where(which, dtype.type(1), dtype.type(0)),
    "unless": lambda which, dtype: jnp.where(which, dtype.type(0), dtype.type(1)),
}
_INVERSE = {"times": "over", "over": "times"}


def _factors(operand: Operand) -> list[Factor]:
    """A product as its factors; numbers stay apart (their product would be rounded), functions of one root whole."""
    if isinstance(operand, Value):
        if operand.name == "neg":
            return [(Literal(operand.dtype.type(-1), ()), "times"), *_factors(operand.operands[0])]
        choice = _zeroed(operand.operands) if operand.name == "select_n" and operand.root is operand else None
        if choice is not None and isinstance(choice[0], Value) and choice[0].dtype == bool:
            return [(choice[0], "unless" if choice[1] else "if"), *_factors(choice[2])]
        literal = any(isinstance(o, Literal) for o in operand.operands)
        if operand.name in ("mul", "div") and (operand.root is operand or (literal and not operand.bends)):
            left, right = map(_factors, operand.operands)
            if operand.name == "mul":
                return [*left, *right]
            if all(how in _INVERSE for _, how in right):
                return [*left, *((factor, _INVERSE[how]) for factor, how in right)]
    return [(operand, "times")]


def _parted(factors: list[Factor], key: tuple | None) -> tuple[list[Factor], list[Factor]]:
    """The numbers and the functions of one root, and the other factors."""
    own = [factor for factor in factors if isinstance(factor[0], Literal) or (key and _key(factor) == key)]
    return own, [factor for factor in factors if factor not in own]


def _identities(factors: list[Factor]) -> list[tuple]:
    return sorted((getattr(o, "number", -1), id(o) if isinstance(o, Value) else 0, how) for o, how in factors)


def _key(factor: Factor) -> tuple | None:
    """What functions of one root have in common; None for constants."""
    operand = factor[0]
    if not isinstance(operand, Value):
        return None
    repeats = []
    while made_by(operand, "broadcast_in_dim"):
        repeats.append(_repeat(operand))
        operand = operand.operands[0]
    return id(operand.root), *repeats


def _repeat(value: Value) -> tuple | None:
    """How a value was repeated."""
    if value.name != "broadcast_in_dim":
        return None
    return tuple(value.params["shape"]), tuple(value.params["broadcast_dimensions"]), value.operands[0].shape
