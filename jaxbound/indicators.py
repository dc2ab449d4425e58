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

import jax
import jax.numpy as jnp
import numpy as np

from jaxbound import operations
from jaxbound.primitives import AFFINE
from jaxbound.values import Literal, Value, made_by, put_back, unbroadcast

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
_STRUCTURE = frozenset({"mul"} | {name for name, facts in AFFINE.items() if not facts.scales})


def number(params: dict, operands: Sequence) -> Rewrite | None:
    """A boolean or integer converted to floating point."""
    (truth,), dtype = operands, params["new_dtype"]
    if not (isinstance(truth, Value) and _is_float(dtype) and not _is_float(truth.dtype)):
        return None
    name, own = truth.name, truth.params
    if name in _COMPARISONS:
        return _comparison(truth, dtype)
    if name in _LOGIC and truth.dtype == bool:
        return lambda *parts: _LOGIC[name](*(part.astype(dtype) for part in parts)), truth.operands
    if name == "reduce_or":
        return lambda x: jnp.minimum(jnp.sum(x.astype(dtype), own["axes"]), 1), truth.operands
    if name == "reduce_and":
        return lambda x: 1 - jnp.minimum(jnp.sum(1 - x.astype(dtype), own["axes"]), 1), truth.operands
    if name == "convert_element_type" and (_is_float(truth.operands[0].dtype) or truth.dtype == bool):
        return None
    if name not in _STRUCTURE:
        return None
    fixed, primitive = AFFINE[name].fixed, truth.primitive
    assert primitive is not None

    def function(*parts):
        numbers = [part if position in fixed else part.astype(dtype) for position, part in enumerate(parts)]
        return numbers[0] if name == "convert_element_type" else primitive.bind(*numbers, **own)

    return function, truth.operands


def _comparison(truth: Value, dtype) -> Rewrite | None:
    if (largest := _largest_entries(truth)) is not None:
        return lambda x: largest[1](x).astype(dtype), [largest[0]]
    if any(isinstance(operand, Literal) for operand in truth.operands) or truth.operands[0] is truth.operands[1]:
        return None  # was a scalar function, if anything
    compare = _COMPARISONS[truth.name]
    return lambda x, y: compare(x.astype(dtype) - y.astype(dtype), 0).astype(dtype), truth.operands


def selection(_params: dict, operands: Sequence) -> Rewrite | None:
    """A choice by a boolean that depends on a region."""
    which, *cases = operands
    if not isinstance(which, Value) or which.dtype != bool or len(cases) != 2:
        return None
    if any(isinstance(case, Value) for case in cases):
        return lambda which, no, yes: operations.select(_as(which, no), no, yes), operands
    return _between, operands


def _between(which, no, yes):
    """One of two constants, as an affine function of the indicator; what `yes - no` rounds away is added back."""
    rise = yes - no
    part = rise - yes
    rest = (yes - (rise - part)) - (no + part)  # Knuth's error-free difference
    share = _as(which, no)
    return no + share * rise + share * rest


def _as(which, case):
    return jnp.broadcast_to(which, case.shape).astype(case.dtype)


def gated(params: dict, operands: Sequence) -> Rewrite | None:
    """A value times a share that jumps, somewhere in [0, 1], is a choice between 0 and the value."""
    for share, other in (operands, operands[::-1]):
        if isinstance(other, Value) and _is_share(unbroadcast(share)):
            return lambda s, x: operations.select(s, jnp.zeros_like(x), x), [share, other]
    return None


def _is_share(operand) -> bool:
    """Whether a number is made of choices between numbers, and lies in [0, 1]."""
    if made := made_by(operand, "convert_element_type"):
        return made.operands[0].dtype == bool
    if made := made_by(operand, "select_n"):
        return _chosen(made, 0, 1)
    made = made_by(operand, "div")
    return made is not None and _is_share(made.operands[0]) and _chosen(made.operands[1], 1, float("inf"))


def _chosen(operand, least: float, most: float) -> bool:
    """Whether an operand is a choice between numbers in a range."""
    made = made_by(operand, "select_n")
    return made is not None and all(isinstance(c, Literal) and least <= c.value <= most for c in made.operands[1:])


# --- which entries are largest ----------------------------------------------------------------------------------------


def equals_larger(_params: dict, operands: Sequence) -> Rewrite | None:
    """`x == max(x, y)` is `x - y >= 0`, and the same for the other operand and for the minimum."""
    for x, other in (operands, operands[::-1]):
        made = made_by(other, "max", "min")
        if made is not None and any(x is o for o in made.operands) and made.operands[0] is not made.operands[1]:
            rises = (made.name == "max") == (made.operands[0] is x)
            return lambda x, y, rises=rises: (x - y >= 0) if rises else (x - y <= 0), made.operands
    return None


def shared_product(_params: dict, operands: Sequence) -> Rewrite | None:
    """`(g / ties) * largest` (reverse mode): see the module's head."""
    for spread, largest in (operands, operands[::-1]):
        quotient, equal = made_by(unbroadcast(spread), "div"), unbroadcast(largest)
        if quotient is None or not _counts(quotient.operands[1], equal):
            continue
        ties = unbroadcast(quotient.operands[1])
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
        if _counts(operands[1], equal) and largest is equal and operands[1] is unbroadcast(operands[1]):
            return (lambda x: x, operands[:1]) if operands[1].params["axes"] == total.params["axes"] else None
    return None


def _counts(operand, equal) -> bool:
    """Whether a number counts the entries that equal a maximum, which `equal` marks."""
    ties, marks = made_by(unbroadcast(operand), "reduce_sum"), made_by(equal, "convert_element_type")
    return (
        ties is not None
        and marks is not None
        and ties.operands[0] is marks
        and isinstance(marks.operands[0], Value)
        and (found := _largest_entries(marks.operands[0])) is not None
        and found[2] == tuple(ties.params["axes"])
    )


def _numbers(value: Value) -> np.ndarray:
    return np.arange(int(np.prod(value.shape))).reshape(value.shape)


def _places(operand, source: Value) -> np.ndarray:
    """Which entry of the source each entry of an operand is."""
    with jax.ensure_compile_time_eval():
        return np.asarray(_arranged(jnp.asarray(_numbers(source)), operand, source))


def _arranged(x, operand, source: Value):
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


def _is_largest(x):
    """Along the last axis, whether no other entry is larger: comparisons of differences with 0."""
    difference, same = operations.pairwise(x)
    return jnp.all(jnp.where(same, -1, difference) <= 0, axis=-1)


def _is_float(dtype) -> bool:
    return jnp.issubdtype(dtype, jnp.floating)
