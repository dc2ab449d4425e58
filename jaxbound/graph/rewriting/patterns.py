"""Rewrites: what a primitive, or a group of them, is in terms of simpler ones.

Each rewrite is a plain JAX function that equals what it replaces for every real input; it is traced and inlined in its
place, so the interpreters never hear of it. Two kinds:

* `match` looks at an equation as it is read: primitives with several outputs or odd parameters (`rewrites`), products
  and sums to regroup (`factors`), and the groups that have no name in a jaxpr. Softmax, log-softmax and logsumexp are
  `exp`, `sum` and `div` (or `log`) around any shift, on which their value does not depend. LayerNorm's fast variance
  `E[x^2] - E[x]^2` becomes `E[(x - E[x])^2]`, whose interval cannot be negative.
* `parts` says what to do with a nonlinear equation of several bounded operands that is not one scalar function:
  `x / y = x * (1 / y)`, and booleans as numbers (`indicators`). Where no one form is best, several meet: softmax is
  `1 / sum_j exp(x_j - x_i)` and `exp(x - logsumexp(x))`, a maximum of two `y + relu(x - y)` and one of two entries.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbound._compat import Primitive
from jaxbound.graph import operations
from jaxbound.graph.primitives import ELEMENTWISE
from jaxbound.graph.rewriting import (
    choices,
    definedness,
    factors,
    indexing,
    indicators,
    masked,
    normalisation,
    pairs,
    powers,
    rewrites,
    roundings,
)
from jaxbound.graph.values import Literal, Operand, Value, made_by, put_back, unbroadcast

Rewrite = tuple[Callable, Sequence]


def match(primitive: Primitive, params: dict, operands: Sequence, *, doubtful: bool = False) -> Rewrite | None:
    """The function and operands that replace an equation, or None to keep it.

    One that infinite numbers may make undefined is kept, unless it is a whole that knows of masks.
    """
    if not doubtful and (rewrite := pairs.match(primitive, params, operands)) is not None:
        return rewrite
    for rule in _MATCHES.get(primitive.name, ()):
        if doubtful and rule not in _OF_MASKS:
            continue
        if (rewrite := rule(params, operands)) is not None:
            return rewrite
    if doubtful:
        return None
    general = (factors.before_broadcast, masked.moved, indicators.choice_of_results)
    return next(filter(None, (rule(primitive, params, operands) for rule in general)), None)


def parts(name: str, params: dict, operands: Sequence) -> Rewrite | None:
    """The function of the same operands that a nonlinear equation is made of, or None if none is known."""
    rule = _PARTS.get(name)
    if rule and name in ELEMENTWISE:  # numbers have no shape of their own there
        shape = np.broadcast_shapes(*(operand.shape for operand in operands))
        operands = [Literal(o.value, shape) if isinstance(o, Literal) else o for o in operands]
    return rule(params, operands) if rule else None


def _always(function: Callable) -> Callable[[dict, Sequence], Rewrite]:
    return lambda _params, operands: (function, operands)


def _larger(x: jax.Array, y: jax.Array):
    """The maximum of two: tight for intervals as one of two entries, for lines as a function of the difference."""
    x, y = jnp.broadcast_arrays(x, y)  # one may be a single number
    return operations.meet(y + jax.nn.relu(x - y), jnp.max(jnp.stack([x, y]), axis=0))


_PARTS: dict[str, Callable[[dict, Sequence], Rewrite | None]] = {
    "max": _always(_larger),
    "min": _always(lambda x, y: -_larger(-x, -y)),
    "div": _always(lambda x, y: x * jax.lax.reciprocal(y)),
    "clamp": _always(lambda low, x, high: jnp.minimum(jnp.maximum(x, low), high)),
    "pow": powers.by_logarithm,
    "reduce_min": rewrites.reduce_min,
    "mul": indicators.gated,
    "select_n": indicators.selection,
    "convert_element_type": indicators.number,
}


# --- groups without a name --------------------------------------------------------------------------------------------


def _without_shift(value: Value, axes: Sequence[int]) -> Value:
    """`x` from `x - m` where m does not vary along the axes, and is defined (softmax subtracts the maximum)."""
    difference = made_by(value, "sub")
    if difference is None or not isinstance(difference.operands[0], Value):
        return value
    minuend, shift = difference.operands
    while made_by(shift, "stop_gradient"):
        shift = shift.operands[0]
    repeated = made_by(shift, "broadcast_in_dim")
    if repeated is None:
        return value
    kept = dict(zip(repeated.params["broadcast_dimensions"], repeated.operands[0].shape, strict=True))
    varies = any(kept.get(axis, 1) != 1 for axis in axes)
    return value if varies or not (definedness.is_total(repeated) or _is_peak(shift, minuend, axes)) else minuend


def _is_peak(shift: Value, x: Value, axes: Sequence[int]) -> bool:
    """Whether a shift is the maximum of x over the axes, put back along them: undefined only where x is."""
    while isinstance(source := unbroadcast(shift), Value) and put_back(shift, source, tuple(axes), x.shape):
        if source.name == "reduce_max":
            return masked.alike(source.operands[0], x) and sorted(source.params["axes"]) == sorted(axes)
        if source.name not in ("select_n", "max"):
            return False
        (shift, *others) = [case for case in source.operands[source.name == "select_n" :] if isinstance(case, Value)]
        if others:
            return False
    return False


def _summed_exp(operand: Operand) -> tuple[Value, tuple[int, ...], Value] | None:
    """`(exp, axes, sum)` if the operand is a sum of exponentials of a bounded value, perhaps repeated again."""
    total = made_by(unbroadcast(operand), "reduce_sum")
    if total is None or made_by(total.operands[0], "exp") is None:
        return None
    return total.operands[0], tuple(total.params["axes"]), total


def _softmax(_params: dict, operands: Sequence) -> Rewrite | None:
    numerator, denominator = made_by(operands[0], "exp"), operands[1]
    found = _summed_exp(denominator)
    if (
        numerator is None
        or found is None
        or found[0] is not numerator
        or not put_back(denominator, found[2], found[1], numerator.shape)
    ):
        return None
    over = functools.partial(operations.over_last_axis, _softmax_of, axes=found[1])
    return masked.reading(over, _without_shift(numerator.operands[0], found[1]), found[1])


def _log_softmax(_params: dict, operands: Sequence) -> Rewrite | None:
    shifted, total = operands[0], _logsumexp_of(operands[1])
    if total is None or total.operands[0] is not shifted:
        return None
    axes = total.params["axes"]
    if not put_back(operands[1], unbroadcast(operands[1]), axes, shifted.shape):
        return None
    over = functools.partial(operations.over_last_axis, _log_softmax_of, axes=axes)
    return masked.reading(over, _without_shift(shifted, axes), axes)


def _log_of_sum(_params: dict, operands: Sequence) -> Rewrite | None:
    """`log(sum(exp(x)))`."""
    size = made_by(operands[0], "abs")
    found = _summed_exp(size.operands[0] if size else operands[0])
    return _logsumexp_as(operands[0].shape, found[0].operands[0], found[1]) if found else None


def _log_of_logistic(_params: dict, operands: Sequence) -> Rewrite | None:
    """`log(logistic(x))` is minus softplus(-x), which does not underflow."""
    inner = made_by(operands[0], "logistic")
    return (lambda x: -jax.nn.softplus(-x), list(inner.operands)) if inner else None


def _log_of_softmax(_params: dict, operands: Sequence) -> Rewrite | None:
    """`log(softmax(x))` is defined also where the quotient underflows: of its two forms logarithms are known."""
    moved = made_by(operands[0], "transpose")
    met = made_by(moved.operands[0] if moved else operands[0], "meet")
    ratio, exponential = (*met.operands, None)[:2] if met else (None, None)
    ratio, exponential = made_by(ratio, "integer_pow"), made_by(exponential, "exp")
    if ratio is None or exponential is None or ratio.params["y"] != -1:
        return None
    order = moved.params["permutation"] if moved else range(len(ratio.shape))
    return (lambda t, r: operations.meet(-jnp.log(r), t).transpose(order)), [*exponential.operands, *ratio.operands]


def _times_its_logarithm(_params: dict, operands: Sequence) -> Rewrite | None:
    """`softmax(x) log_softmax(x)`, as in an entropy: one function of the logarithm, where bounds of both are of two."""
    for probability, logarithm in (operands, operands[::-1]):
        met, known = made_by(probability, "meet"), made_by(logarithm, "meet")
        exponential = made_by(met.operands[1], "exp") if met else None
        cut = made_by(exponential.operands[0], "min") if exponential else None
        if known is None or cut is None or not (isinstance(cut.operands[1], Literal) and cut.operands[1].value == 0):
            continue
        if any(form is known.operands[1] for form in (cut, cut.operands[0])):  # so both are of one t: exp(min(t, 0)), t
            return (lambda t: t * jnp.exp(jnp.minimum(t, 0))), [logarithm]
    return None


def _logsumexp(_params: dict, operands: Sequence) -> Rewrite | None:
    """`log(sum(exp(x - m))) + m` is `log(sum(exp(x)))` for any shift that is put back along the same axes."""
    for out, shift in (operands, operands[::-1]):
        total = _logsumexp_of(out)
        if total is None or out.shape != shift.shape:
            continue
        exponent, axes = total.operands[0], total.params["axes"]
        x = _without_shift(exponent, axes)
        if x is exponent:
            continue
        source, inner = unbroadcast(shift), exponent.operands[1]
        if unbroadcast(inner) is not source:
            continue
        if source.shape == () or all(put_back(o, source, axes, x.shape) for o in (inner, shift)):
            return _logsumexp_as(out.shape, x, axes)
    return None


def _logsumexp_as(shape: tuple[int, ...], x: Value, axes: tuple[int, ...]) -> Rewrite | None:
    """Of this shape: one function of all entries, and what it is composed of."""
    if np.prod(shape) != np.prod(np.delete(x.shape, axes)):
        return None

    def function(x: jax.Array, mask: jax.Array | None = None, _zeros: Any = None) -> jax.Array:
        terms = jnp.sum(1 * jnp.exp(x), axes, where=mask)  # the factor hides the sum from `_log_of_sum`
        return operations.meet(operations.logsumexp(x, axes, mask), jnp.log(terms)).reshape(shape)

    return masked.reading(function, x, axes)


def _logsumexp_of(operand: Operand) -> Value | None:
    """The node that `_logsumexp_as` has made, if it made the operand."""
    met = made_by(unbroadcast(operand), "meet")
    return made_by(met.operands[0], "logsumexp") if met else None


def _softmax_of(x: jax.Array, mask: jax.Array | None = None, zeros: jax.Array | float = 0) -> jax.Array:
    """Along the last axis: exact for intervals, and as an exponential of a concave function for planes."""
    quotient = jax.lax.reciprocal(_ratios(x, mask))
    found = operations.meet(quotient, jnp.exp(jnp.minimum(x - _repeated_logsumexp(x, mask), 0)))
    return found if mask is None else jnp.where(mask, found, zeros)


def _log_softmax_of(x: jax.Array, mask: jax.Array | None = None, zeros: jax.Array | float = 0) -> jax.Array:
    found = operations.meet(-jnp.log(_ratios(x, mask)), x - _repeated_logsumexp(x, mask))
    return found if mask is None else jnp.where(mask, found, zeros - jnp.inf)


def _ratios(x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """sum_j exp(x_j - x_i) for every i, along the last axis: at least 1, whatever rounding makes of its bounds."""
    difference, same = operations.pairwise(x)
    among = None if mask is None else mask[..., None, :]
    return jnp.maximum(jnp.sum(jnp.where(same, 1, jnp.exp(difference)), axis=-1, where=among), 1)


def _repeated_logsumexp(x: jax.Array, mask: jax.Array | None) -> jax.Array:
    return jnp.broadcast_to(operations.logsumexp(x, (x.ndim - 1,), mask)[..., None], x.shape)


def _mean_of(operand: Operand | None) -> tuple[Value, tuple[int, ...]] | None:
    """`(x, axes)` if the operand is sum(x) / count."""
    quotient = made_by(operand, "div", "mul")
    if quotient is None or not isinstance(quotient.operands[1], Literal):
        return None
    total = made_by(quotient.operands[0], "reduce_sum")
    if total is None or not math.isfinite(quotient.operands[1].value):
        return None
    x, axes = total.operands[0], tuple(total.params["axes"])
    count, factor = math.prod(x.shape[axis] for axis in axes), Fraction(float(quotient.operands[1].value))
    exact = factor == count if quotient.name == "div" else factor * count == 1  # a rounded 1 / n is another function
    return (x, axes) if exact else None


def _angle(_params: dict, operands: Sequence) -> Rewrite:
    """`arctan2(y, x)`: right of the origin, above or below it one arctangent, elsewhere a choice among them."""

    def right(y: jax.Array, x: jax.Array):
        return jnp.arctan(y / x)

    def above(y: jax.Array, x: jax.Array):
        return 2 * jnp.arctan(jnp.ones((), x.dtype)) - jnp.arctan(x / y)

    def below(y: jax.Array, x: jax.Array):
        return -above(-y, x)

    def anywhere(y: jax.Array, x: jax.Array):
        axis = jnp.where(x < 0, 4 * jnp.arctan(jnp.ones((), x.dtype)), 0)
        beside = jnp.where(y < 0, below(jnp.where(y < 0, y, -1), x), axis)
        value = jnp.where(y > 0, above(jnp.where(y > 0, y, 1), x), beside)
        return operations.meet(value, jnp.where(x > 0, right(y, jnp.where(x > 0, x, 1)), value))

    y, x = operands
    known = [(right, _certain_sign(x) > 0), (above, _certain_sign(y) > 0), (below, _certain_sign(y) < 0)]
    return next((function for function, holds in known if holds), anywhere), operands


def _certain_sign(operand: Operand) -> int:
    """1 above 0, -1 below, else 0."""
    if isinstance(operand, Literal):
        return int(operand.value > 0) - int(operand.value < 0)
    if isinstance(operand, Value):
        return int(operand.sign == definedness.POSITIVE)
    return 0 if operand.known is None else int(np.all(operand.known > 0)) - int(np.all(operand.known < 0))


def _squared(operand: Operand):
    made = made_by(operand, "square", "integer_pow", "mul")
    if made is None or (made.name == "integer_pow" and made.params["y"] != 2):
        return None
    return made.operands[0] if made.name != "mul" or made.operands[0] is made.operands[1] else None


def _fast_variance(_params: dict, operands: Sequence) -> Rewrite | None:
    second, first = _mean_of(operands[0]), _mean_of(_squared(operands[1]))
    if second is None or first is None or first[1] != second[1] or _squared(second[0]) is not first[0]:
        return None
    axes = first[1]
    return lambda x: jnp.mean(jax.lax.square(x - jnp.mean(x, axes, keepdims=True)), axes), [first[0]]


_OF_MASKS = (_softmax, _log_softmax, _logsumexp)

_SAME_ARITHMETIC = frozenset({
    "broadcast_in_dim", "cond", "conv_general_dilated", "convert_element_type", "cummax", "cummin", "dot_general",
    "gather", "integer_pow", "pad", "reduce_window_max", "reshape", "scan", "scatter", "scatter-add", "sort", "split",
    "top_k", "unstack",
})  # fmt: skip
"""Primitives whose rewrites make the same sums, products and choices, of entries that stand elsewhere."""


def keeps_arithmetic(name: str, rewrite: Rewrite) -> bool:
    """Whether a rewrite of a primitive rounds nothing that the primitive does not, and the other way round."""
    reorders = name == "mul" and getattr(rewrite[0], "only_reorders", False)
    return reorders or name in _SAME_ARITHMETIC or rewrite[0].__module__ == choices.__name__


_MATCHES: dict[str, Sequence[Callable[[dict, Sequence], Rewrite | None]]] = {
    "convert_element_type": [indicators.through_another],
    "reshape": [rewrites.reshape],
    "broadcast_in_dim": [rewrites.broadcast],
    "pad": [rewrites.pad],
    "gather": [indexing.gather],
    "scatter": [indexing.scatter],
    "scatter-add": [indexing.scatter_add],
    "scatter-mul": [indexing.scatter_multiply],
    "scan": [rewrites.scan],
    "cond": [rewrites.cond],
    "split": [rewrites.split],
    "unstack": [rewrites.unstack],
    "dot_general": [rewrites.dot_general],
    "conv_general_dilated": [rewrites.convolution],
    "reduce_prod": [rewrites.reduce_product],
    "reduce_window_max": [rewrites.window_max],
    "select_and_scatter_add": [rewrites.window_max_adjoint],
    "select_and_gather_add": [rewrites.window_max_tangent],
    "cummax": [rewrites.cumulative(jnp.max)],
    "cummin": [rewrites.cumulative(jnp.min)],
    "cumprod": [rewrites.cumulative(jnp.prod)],
    "cumlogsumexp": [rewrites.cumulative(jax.nn.logsumexp)],
    "sort": [rewrites.sort],
    "top_k": [rewrites.top_k],
    "integer_pow": [rewrites.integer_power],
    "pow": [powers.by_known_array],
    "rem": [roundings.truncated_remainder],
    "atan2": [_angle],
    "one_minus_square": [rewrites.one_minus_square],
    "polynomial": [rewrites.polynomial],
    "log": [_log_of_sum, _log_of_logistic, _log_of_softmax],
    "eq": [definedness.rule("eq"), indicators.equals_larger, choices.equals_index],
    **{name: [definedness.rule(name)] for name in ("ne", "lt", "le", "gt", "ge", "is_finite")},
    "mul": [_times_its_logarithm, normalisation.scaled("mul"), indicators.shared_product, factors.product],
    "div": [_softmax, normalisation.scaled("div"), indicators.shared_sum, indicators.at_least_one],
    "sub": [masked.added(-1), _log_softmax, _fast_variance, factors.total("sub")],
    "add": [masked.added(1), _logsumexp, factors.total("add")],
    "add_any": [masked.added(1), factors.total("add_any")],
    "select_n": [choices.decided, choices.same, choices.by_index, masked.exponential, factors.choice],
    "clamp": [choices.within],
}
