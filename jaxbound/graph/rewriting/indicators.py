"""Truth values as numbers: what a boolean that depends on a region is worth where it meets floating point.

Nodes carry floating-point bounds, so a boolean is never a node. Where one is converted to a number, or chooses between
two numbers, the equation that made it is rewritten, one equation at a time, until the conversion stands right after a
comparison with 0, which is one scalar function (a step):

    x > y           step of x - y                       a & b       max(a + b - 1, 0)
    any, all        of the sum over the axes            a | b       min(a + b, 1)
    structure       the same structure of numbers       ~a, a ^ b   1 - a, |a - b|

A choice by such a number is jaxbound's own operation `select`. Small integers (counts) are rewritten alike.

JAX's derivative of a maximum asks which entries equal it, and divides by how many do. Which entries are largest is a
conjunction of comparisons, undecided (between 0 and 1) wherever a tie is possible. Where such an indicator is divided
by the number of ties, this hull contains the quotient, and the division is left out: so `indicator / ties` is bounded,
and with it the Clarke Jacobian (Clarke 1983, section 2.6).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbound._compat import Primitive
from jaxbound.graph import operations
from jaxbound.graph.primitives import AFFINE, ELEMENTWISE
from jaxbound.graph.rewriting import integers
from jaxbound.graph.rewriting.roundings import cast
from jaxbound.graph.values import Literal, Operand, Value, made_by, put_back, unbroadcast

Rewrite = tuple[Callable, Sequence]

_COMPARISONS: dict[str, Callable] = {
    "gt": jnp.greater, "ge": jnp.greater_equal, "lt": jnp.less, "le": jnp.less_equal, "eq": jnp.equal,
    "ne": jnp.not_equal,
}  # fmt: skip
_LOGIC: dict[str, Callable] = {
    "not": lambda a: 1 - a,
    "and": lambda a, b: jnp.maximum(a + b - 1, 0),
    "or": lambda a, b: jnp.minimum(a + b, 1),
    "xor": lambda a, b: jnp.abs(a - b),
}
_STRUCTURE = frozenset({"clamp", "max", "min", "mul"} | {name for name, facts in AFFINE.items() if not facts.scales})


def number(params: dict, operands: Sequence) -> Rewrite | None:
    """A boolean or integer converted to floating point."""
    (truth,), dtype = operands, params["new_dtype"]
    if not (isinstance(truth, Value) and _is_float(dtype) and not _is_float(truth.dtype)):
        return None
    if _is_float(decided := precision(truth)) and decided != dtype:
        return lambda x: x.astype(decided).astype(dtype), operands
    name, own, primitive, whole = truth.name, truth.params, truth.primitive, _same
    if name == operations.wrapped.name:
        primitive, own, whole = own["primitive"], dict(own["params"]), integers.wrapping(truth, dtype)
        if whole is None:
            return None
        name = primitive.name
    if name in _COMPARISONS:
        return _comparison(truth, dtype)
    if name in _LOGIC and truth.dtype == bool:
        return lambda *parts: _LOGIC[name](*(part.astype(dtype) for part in parts)), truth.operands
    if name == "reduce_or":
        return lambda x: jnp.minimum(jnp.sum(x.astype(dtype), own["axes"]), 1), truth.operands
    if name == "reduce_and":
        return lambda x: 1 - jnp.minimum(jnp.sum(1 - x.astype(dtype), own["axes"]), 1), truth.operands
    if name == "convert_element_type" and _is_float(truth.operands[0].dtype):
        (source,) = truth.operands
        return (lambda x: (x != 0).astype(dtype), [source]) if truth.dtype == bool else cast(source, truth.dtype, dtype)
    if name not in _STRUCTURE or (name == "convert_element_type" and truth.dtype == bool):
        return None
    fixed = AFFINE[name].fixed if name in AFFINE else range(0)
    assert primitive is not None

    def function(*parts: jax.Array):
        numbers = [part if position in fixed else part.astype(dtype) for position, part in enumerate(parts)]
        return whole(numbers[0] if name == "convert_element_type" else primitive.bind(*numbers, **own))

    return function, truth.operands


def precision(value: Value):
    """The dtype of a value, or of the one that decides it if it is no floating-point number itself."""
    root = value.root
    return value.dtype if root is None or _is_float(value.dtype) else root.dtype


def _same(x: jax.Array):
    return x


def through_another(params: dict, operands: Sequence) -> Rewrite | None:
    """A boolean as a number of a narrow dtype, then of another: 0 and 1 are numbers of both."""
    source = made_by(operands[0], "convert_element_type")
    if source is None or source.operands[0].dtype != bool:
        return None
    decided = precision(source.operands[0])
    if _is_float(decided) and jnp.promote_types(decided, source.dtype) == source.dtype:
        return None
    return lambda x: x.astype(params["new_dtype"]), source.operands


def _comparison(truth: Value, dtype: np.dtype) -> Rewrite | None:
    if (largest := _largest_entries(truth)) is not None:
        return lambda x: largest[1](x).astype(dtype), [largest[0]]
    compare, wide = _COMPARISONS[truth.name], truth.operands[0].dtype
    literal = any(isinstance(operand, Literal) for operand in truth.operands)
    if (literal and _is_float(wide)) or truth.operands[0] is truth.operands[1]:
        return None  # was a scalar function, if anything
    wide = wide if _is_float(wide) else dtype
    return lambda x, y: compare(x.astype(wide) - y.astype(wide), 0).astype(dtype), truth.operands


def selection(_params: dict, operands: Sequence) -> Rewrite | None:
    """A choice by a boolean that depends on a region."""
    which, *cases = operands
    if not isinstance(which, Value) or which.dtype != bool or len(cases) != 2:
        return None
    if any(isinstance(case, Value) or (isinstance(case, Literal) and not np.isfinite(case.value)) for case in cases):
        return lambda which, no, yes: operations.select(_as(which, no), no, yes), operands
    return _between, operands


def _between(which: jax.Array, no: jax.Array, yes: jax.Array):
    """One of two constants, as an affine function of the indicator."""
    return operations.between(1, _as(which, no), no, yes)


def _as(which: jax.Array, case: jax.Array):
    return jnp.broadcast_to(which, case.shape).astype(case.dtype)


def gated(_params: dict, operands: Sequence) -> Rewrite | None:
    """A value times one of two numbers, or a share in [0, 1] made of such, is a choice between multiples."""
    for share, other in (operands, operands[::-1]):
        if not isinstance(other, Value):
            continue
        source = unbroadcast(share)
        if (choice := _one_of_two(source)) is not None:
            which, no, yes = choice

            def function(
                which: jax.Array,
                x: jax.Array,
                share: Value = share,
                source: Value = source,
                no: Any = no,
                yes: Any = yes,
            ):
                chosen = _arranged(which.astype(x.dtype), share, source)
                return operations.between(x, operations.select(chosen, jnp.zeros_like(x), x), no, yes)

            return function, [which, other]
        if _is_share(source):
            return lambda s, x: operations.select(s, jnp.zeros_like(x), x), [share, other]
    return None


def choice_of_results(primitive: Primitive, params: dict, operands: Sequence) -> Rewrite | None:
    """A function of choices by one boolean, and of numbers, is a choice between its two results."""
    bare = not any(made_by(operand, "select_n") for operand in operands)  # an affine image of an indicator stays one
    if bare or primitive.name not in ELEMENTWISE or not _is_float(operands[-1].dtype):
        return None
    found = [(None, o, o) if isinstance(o, Literal) else _choice(o) for o in operands]
    choices = [choice for choice in found if choice is not None]
    which, *others = {choice[0] for choice in choices} - {None} or {None}
    if others or len(choices) < len(found):
        return None

    def function(which: jax.Array, *cases: jax.Array):
        no, yes = (primitive.bind(*half, **params) for half in (cases[: len(operands)], cases[len(operands) :]))
        return jax.lax.select_n(jnp.broadcast_to(which, no.shape), no, yes)

    return function, [which, *(choice[1] for choice in choices), *(choice[2] for choice in choices)]


def _choice(operand: Operand) -> tuple[Value, Any, Any] | None:
    """`(boolean, case where false, case where true)` of a choice between what no region reaches."""
    if made := made_by(operand, "select_n"):
        which, *cases = made.operands
        known = isinstance(which, Value) and which.dtype == bool and not any(isinstance(c, Value) for c in cases)
        return (which, *cases) if known else None
    made = made_by(operand, "convert_element_type")
    if made is None or made.operands[0].dtype != bool or not _is_float(made.dtype):
        return None
    (which,), (no, yes) = made.operands, (Literal(made.dtype.type(k), made.shape) for k in (0, 1))
    negated = made_by(which, "not")
    return (negated.operands[0], yes, no) if negated else (which, no, yes)


def _one_of_two(operand: Operand) -> tuple[Value, Any, Any] | None:
    """`(boolean, number where false, number where true)` of a choice between two numbers."""
    choice = _choice(operand)
    if choice is None or not all(isinstance(case, Literal) for case in choice[1:]):
        return None
    return choice[0], choice[1].value, choice[2].value


def _is_share(operand: Operand) -> bool:
    """Whether a number is made of choices between numbers, and lies in [0, 1]."""
    if choice := _one_of_two(operand):
        return all(0 <= number <= 1 for number in choice[1:])
    made = made_by(operand, "div")
    if made is None or not _is_share(made.operands[0]):
        return False
    over = _one_of_two(made.operands[1])
    return over is not None and all(number >= 1 for number in over[1:])


# --- which entries are largest ----------------------------------------------------------------------------------------


def equals_larger(_params: dict, operands: Sequence) -> Rewrite | None:
    """`x == max(x, y)` is `x - y >= 0`, and the same for the other operand and for the minimum."""
    for x, other in (operands, operands[::-1]):
        made = made_by(other, "max", "min")
        if made is not None and any(x is o for o in made.operands) and made.operands[0] is not made.operands[1]:
            rises = (made.name == "max") == (made.operands[0] is x)
            return lambda x, y, rises=rises: (x - y >= 0) if rises else (x - y <= 0), made.operands
    return None


def at_least_one(_params: dict, operands: Sequence) -> Rewrite | None:
    """A quotient by the number of entries that equal the maximum: there is one."""
    total = made_by(unbroadcast(operands[1]), "reduce_sum")
    if total is None or _counted(total, total.operands[0]) is None:
        return None
    return lambda x, ties: x / jnp.maximum(ties, 1), operands


def shared_product(_params: dict, operands: Sequence) -> Rewrite | None:
    """`(g / ties) * largest` (reverse mode): see the module's head."""
    for spread, largest in (operands, operands[::-1]):
        quotient, equal = made_by(unbroadcast(spread), "div"), unbroadcast(largest)
        ties = _counted(quotient.operands[1], equal) if quotient else None
        if quotient is None or ties is None:
            continue
        entries = _places(largest, equal)
        own = np.broadcast_to(np.expand_dims(_numbers(ties), ties.params["axes"]), equal.shape).ravel()
        if np.array_equal(own[entries], _places(quotient.operands[1], ties).ravel()[_places(spread, quotient)]):
            arrange = functools.partial(_arranged, operand=spread, source=quotient)
            repeat = functools.partial(jnp.broadcast_to, shape=quotient.shape)
            product = lambda g, largest, a=arrange, r=repeat: a(r(g)) * largest  # noqa: E731
            return product, [quotient.operands[0], largest]
    return None


def shared_sum(_params: dict, operands: Sequence) -> Rewrite | None:
    """`sum(g * largest) / ties` (forward mode): see the module's head."""
    total = made_by(operands[0], "reduce_sum")
    product = made_by(total.operands[0], "mul") if total else None
    if total is None or product is None:
        return None
    for largest in product.operands:
        equal = unbroadcast(largest)
        if _counted(operands[1], equal) and largest is equal and operands[1] is unbroadcast(operands[1]):
            return (lambda x: x, operands[:1]) if operands[1].params["axes"] == total.params["axes"] else None
    return None


def _counted(operand: Operand, equal: Operand) -> Value | None:
    """The sum that a number repeats, if it counts the entries that equal a maximum, which `equal` marks."""
    ties, marks = _total(operand), made_by(equal, "convert_element_type")
    if ties is None or marks is None or ties.operands[0] is not marks or not isinstance(marks.operands[0], Value):
        return None
    found = _largest_entries(marks.operands[0])
    return ties if found is not None and found[2] == tuple(ties.params["axes"]) else None


def _total(operand: Operand) -> Value | None:
    """The sum that an operand repeats, if it is one, or the larger of it and 1 (`at_least_one`)."""
    larger = made_by(unbroadcast(operand), "max")
    if larger and isinstance(larger.operands[1], Literal) and larger.operands[1].value == 1:
        operand = larger.operands[0]
    return made_by(unbroadcast(operand), "reduce_sum")


def _numbers(value: Value) -> np.ndarray:
    return np.arange(int(np.prod(value.shape))).reshape(value.shape)


def _places(operand: Value, source: Value) -> np.ndarray:
    """Which entry of the source each entry of an operand is."""
    with jax.ensure_compile_time_eval():
        return np.asarray(_arranged(jnp.asarray(_numbers(source)), operand, source))


def _arranged(x: jax.Array, operand: Value, source: Value):
    """What was done to the source to make the operand, done to x."""
    if operand is source:
        return x
    inner, params = operand.operands[0], operand.params
    x = _arranged(x, inner, source)
    if operand.name == "broadcast_in_dim":
        return jax.lax.broadcast_in_dim(x, params["shape"], params["broadcast_dimensions"])
    return x.reshape(operand.shape)


def _largest_entries(truth: Value) -> tuple[Value, Callable, tuple[int, ...]] | None:
    """`(x, function, axes)` if a boolean, this function of x, says which entries equal the maximum over the axes."""
    if truth.name != "eq":
        return None
    for x, other in (truth.operands, truth.operands[::-1]):
        largest = made_by(unbroadcast(other), "reduce_max", "reduce_min")
        if largest is None or largest.operands[0] is not x:
            continue
        axes = tuple(largest.params["axes"])
        if put_back(other, largest, axes, x.shape):
            find = _is_largest if largest.name == "reduce_max" else lambda x: _is_largest(-x)
            return x, functools.partial(operations.over_last_axis, find, axes=axes), axes
    return None


def _is_largest(x: jax.Array):
    """Along the last axis, whether no other entry is larger: comparisons of differences with 0."""
    difference, same = operations.pairwise(x)
    return jnp.all(jnp.where(same, -1, difference) <= 0, axis=-1)


def _is_float(dtype: np.dtype) -> bool:
    return jnp.issubdtype(dtype, jnp.floating)
