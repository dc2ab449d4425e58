"""Rewrites: what a primitive, or a group of them, is in terms of simpler ones.

Each rewrite is a plain JAX function that equals what it replaces for every real input; it is traced and inlined in its
place, so the interpreters never hear of it. Two kinds:

* `match` looks at an equation as it is read: primitives with several outputs or odd parameters, and the groups that
  have no name in a jaxpr. Softmax, log-softmax and logsumexp are `exp`, `sum` and `div` (or `log`) around any shift;
  their value does not depend on it, so `softmax(x)_i = 1 / sum_j exp(x_j - x_i)` is used. LayerNorm's fast variance
  `E[x^2] - E[x]^2` becomes `E[(x - E[x])^2]`, whose interval cannot be negative.
* `parts` says what to do with a nonlinear equation of several bounded operands that is not one scalar function:
  `max(x, y) = y + relu(x - y)`, `x / y = x * (1 / y)`, a selection by a bounded predicate a product with a step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxbound._compat import jaxpr_as_fun, scan_counts
from jaxbound.values import Literal, Value

Rewrite = tuple[Callable, Sequence]


def match(name: str, params: dict, operands: Sequence) -> Rewrite | None:
    """The function and operands that replace an equation, or None to keep it."""
    rule = _MATCHES.get(name)
    return rule(params, operands) if rule else None


def parts(name: str, operands: Sequence) -> Rewrite | None:
    """The function of the same operands that a nonlinear equation is made of, or None if none is known."""
    function = _PARTS.get(name)
    if name == "select_n" and (len(operands) != 3 or not any(isinstance(case, Value) for case in operands[1:])):
        return None  # more than two cases, or a step that is no function of one value
    return (function, operands) if function else None


_PARTS: dict[str, Callable] = {
    "max": lambda x, y: y + jax.nn.relu(x - y),
    "min": lambda x, y: x - jax.nn.relu(x - y),
    "div": lambda x, y: x * jax.lax.reciprocal(y),
    "clamp": lambda low, x, high: jnp.minimum(jnp.maximum(x, low), high),
    "select_n": lambda which, no, yes: no + jnp.where(which, jnp.ones_like(no), jnp.zeros_like(no)) * (yes - no),
}


# --- primitives with odd parameters -----------------------------------------------------------------------------------


def _split(params: dict, operands: Sequence) -> Rewrite:
    stops = np.cumsum(params["sizes"])
    axis = params["axis"]

    def function(x):
        starts = [0, *stops[:-1]]
        return [jax.lax.slice_in_dim(x, int(i), int(j), axis=axis) for i, j in zip(starts, stops, strict=True)]

    return function, operands


def _reshape(params: dict, operands: Sequence) -> Rewrite | None:
    """A reshape that reads its operand's axes in another order is a transpose first."""
    axes, shape = params["dimensions"], params["new_sizes"]
    return None if axes is None else (lambda x: jnp.reshape(jnp.transpose(x, axes), shape), operands)


def _pad(params: dict, operands: Sequence) -> Rewrite | None:
    """A bounded padding value is a product with where it is put (its transpose is broken in JAX)."""
    if not isinstance(operands[1], Value):
        return None
    pad = functools.partial(jax.lax.pad, padding_config=params["padding_config"])

    def function(x, value):
        zero, one = jnp.zeros((), x.dtype), jnp.ones((), x.dtype)
        return pad(x, zero) + value * pad(jnp.zeros_like(x), one)

    return function, operands


def _gather(params: dict, operands: Sequence) -> Rewrite | None:
    """What is out of bounds is filled with a constant: gathering with zeros there is linear, and the constant adds."""
    if params["mode"] != jax.lax.GatherScatterMode.FILL_OR_DROP or params["fill_value"] == 0:
        return None
    gather = functools.partial(jax.lax.gather, **{k: v for k, v in params.items() if k != "fill_value"})

    def function(x, indices):
        filled = gather(jnp.zeros(x.shape, x.dtype), indices, fill_value=params["fill_value"])
        return gather(x, indices, fill_value=0) + filled

    return function, operands


def _scan(params: dict, operands: Sequence) -> Rewrite:
    """A loop of fixed length, unrolled."""
    step, length = jaxpr_as_fun(params["jaxpr"]), params["length"]
    fixed, carried = scan_counts(params)

    def function(*arguments):
        constants, carry, rows = arguments[:fixed], arguments[fixed : fixed + carried], arguments[fixed + carried :]
        made = [None] * length
        for k in reversed(range(length)) if params["reverse"] else range(length):
            results = step(*constants, *carry, *(jax.lax.index_in_dim(row, k, keepdims=False) for row in rows))
            carry, made[k] = results[:carried], results[carried:]
        return [*carry, *(jnp.stack(parts) for parts in zip(*made, strict=True))]

    return function, operands


def _cond(params: dict, operands: Sequence) -> Rewrite | None:
    """Branches chosen by what no region reaches: all of them, and a selection."""
    if isinstance(operands[0], Value):
        return None
    branches = [jaxpr_as_fun(branch) for branch in params["branches"]]

    def function(index, *arguments):
        results = [branch(*arguments) for branch in branches]
        index = jnp.clip(index, 0, len(branches) - 1)
        return [jax.lax.select_n(index, *parts) for parts in zip(*results, strict=True)]

    return function, operands


def _dot_general(params: dict, operands: Sequence) -> Rewrite | None:
    """A product of two bounded arrays is a sum of products, entry by entry: (*batch, left, right, contracted)."""
    if not all(isinstance(operand, Value) for operand in operands):
        return None
    contracting, batching = params["dimension_numbers"]

    def function(x, y):
        parts = []
        for array, contract, batch in zip((x, y), contracting, batching, strict=True):
            free = [axis for axis in range(array.ndim) if axis not in (*contract, *batch)]
            parts.append((jnp.transpose(array, (*batch, *free, *contract)), len(free)))
        (left, m), (right, n) = parts
        b, c = len(batching[0]), len(contracting[0])
        shape = (*left.shape[: b + m], *right.shape[b : b + n], *left.shape[left.ndim - c :])
        left = jax.lax.broadcast_in_dim(left, shape, (*range(b + m), *range(b + m + n, b + m + n + c)))
        right = jax.lax.broadcast_in_dim(right, shape, (*range(b), *range(b + m, b + m + n + c)))
        return jnp.sum(left * right, axis=tuple(range(b + m + n, b + m + n + c)))

    return function, operands


def _reduce_min(params: dict, operands: Sequence) -> Rewrite:
    axes = tuple(params["axes"])
    return lambda x: -jnp.max(-x, axis=axes), operands


def _window_max(params: dict, operands: Sequence) -> Rewrite | None:
    """A pooled maximum is the maximum over a stack of strided slices, one per place in the window.

    Padding adds minus infinity, which never wins; repeating the edge does not change the maximum either and is finite.
    """
    window, strides, padding = params["window_dimensions"], params["window_strides"], params["padding"]
    dilated = any(d != 1 for d in (*params["base_dilation"], *params["window_dilation"]))
    if dilated or any(max(pad) >= size for pad, size in zip(padding, window, strict=True) if max(pad) > 0):
        return None

    def function(x):
        x = jnp.pad(x, padding, mode="edge") if np.any(padding) else x
        spans = [(n - w) // s * s + 1 for n, w, s in zip(x.shape, window, strides, strict=True)]
        places = [
            jax.lax.slice(x, place, [p + span for p, span in zip(place, spans, strict=True)], strides)
            for place in np.ndindex(*window)
        ]
        return jnp.max(jnp.stack(places), axis=0)

    return function, operands


def _integer_power(params: dict, operands: Sequence) -> Rewrite | None:
    return (jax.lax.square, operands) if params["y"] == 2 else None


# --- groups without a name --------------------------------------------------------------------------------------------


def _made_by(operand, *names: str) -> Value | None:
    """The operand if one of these primitives makes it."""
    return operand if isinstance(operand, Value) and operand.name in names else None


def _unbroadcast(operand):
    """What a value is before it was repeated or reshaped, without its gradient marks."""
    while _made_by(operand, "broadcast_in_dim", "reshape", "squeeze", "stop_gradient"):
        operand = operand.operands[0]
    return operand


def _without_shift(value: Value, axes: Sequence[int]) -> Value:
    """`x` from `x - m` where m does not vary along the axes (softmax subtracts the maximum)."""
    difference = _made_by(value, "sub")
    if difference is None or not isinstance(difference.operands[0], Value):
        return value
    minuend, shift = difference.operands
    while _made_by(shift, "stop_gradient"):
        shift = shift.operands[0]
    repeated = _made_by(shift, "broadcast_in_dim")
    if repeated is None:
        return value
    kept = dict(zip(repeated.params["broadcast_dimensions"], repeated.operands[0].shape, strict=True))
    return minuend if all(kept.get(axis, 1) == 1 for axis in axes) else value


def _summed_exp(operand) -> tuple[Value, tuple[int, ...]] | None:
    """`(exp, axes)` if the operand is a sum of exponentials of a bounded value, perhaps repeated again."""
    total = _made_by(_unbroadcast(operand), "reduce_sum")
    if total is None or _made_by(total.operands[0], "exp") is None:
        return None
    return total.operands[0], tuple(total.params["axes"])


def _same_axes(operand, axes: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether a reduced value was put back along just the axes that were summed, and no others were mixed."""
    rest = tuple(axis for axis in range(len(shape)) if axis not in axes)
    reduced = tuple(shape[axis] for axis in rest)
    kept = tuple(1 if axis in axes else n for axis, n in enumerate(shape))
    while operand.name != "reduce_sum":
        source = operand.operands[0]
        known = source.shape in (kept, reduced, shape) and operand.shape in (kept, reduced, shape)
        if operand.name == "broadcast_in_dim":
            expected = rest if len(source.shape) < len(shape) else tuple(range(len(shape)))
            known = known and tuple(operand.params["broadcast_dimensions"]) == expected
        elif operand.name == "reshape":
            known = source.shape == operand.shape or (known and shape not in (source.shape, operand.shape))
        if not known:
            return False
        operand = source
    return True


def _softmax(_params: dict, operands: Sequence) -> Rewrite | None:
    numerator, denominator = _made_by(operands[0], "exp"), operands[1]
    found = _summed_exp(denominator)
    if (
        numerator is None
        or found is None
        or found[0] is not numerator
        or not _same_axes(denominator, found[1], numerator.shape)
    ):
        return None
    axes = found[1]
    return lambda x: jax.lax.reciprocal(_ratios(x, axes)), [_without_shift(numerator.operands[0], axes)]


def _log_softmax_or_variance(_params: dict, operands: Sequence) -> Rewrite | None:
    return _log_softmax(operands) or _fast_variance(operands)


def _log_softmax(operands: Sequence) -> Rewrite | None:
    shifted = operands[0]
    log = _made_by(_unbroadcast(operands[1]), "log")
    found = _summed_exp(log.operands[0]) if log is not None else None
    if found is None or found[0].operands[0] is not shifted or not _same_axes(operands[1], found[1], shifted.shape):
        return None
    axes = found[1]
    return lambda x: -jnp.log(_ratios(x, axes)), [_without_shift(shifted, axes)]


def _logsumexp(_params: dict, operands: Sequence) -> Rewrite | None:
    """`log(sum(exp(x - m))) + m` is `log(sum(exp(x)))`, whose interval is exact (infinite where that overflows)."""
    for out, shift in (operands, operands[::-1]):
        log = _made_by(_unbroadcast(out), "log")
        if log is None:
            continue
        size = _made_by(log.operands[0], "abs")
        found = _summed_exp(size.operands[0] if size is not None else log.operands[0])
        if found is None:
            continue
        exponent, axes = found[0].operands[0], found[1]
        x = _without_shift(exponent, axes)
        if x is exponent or _unbroadcast(exponent.operands[1]) is not _unbroadcast(shift):
            continue
        if out.shape == shift.shape and np.prod(out.shape) == np.prod(np.delete(x.shape, axes)):
            return lambda x, axes=axes, shape=out.shape: jnp.log(jnp.sum(jnp.exp(x), axes)).reshape(shape), [x]
    return None


def _ratios(x, axes: tuple[int, ...]):
    """sum_j exp(x_j - x_i) for every i, j over the axes."""
    moved = jnp.moveaxis(x, axes, range(-len(axes), 0))
    flat = moved.reshape(*moved.shape[: -len(axes)], -1)
    count = flat.shape[-1]
    square = (*flat.shape, count)
    columns = jax.lax.broadcast_in_dim(flat, square, (*range(flat.ndim - 1), flat.ndim))
    rows = jax.lax.broadcast_in_dim(flat, square, tuple(range(flat.ndim)))
    total = jnp.sum(jnp.exp(columns - rows), axis=-1)
    return jnp.moveaxis(total.reshape(moved.shape), range(-len(axes), 0), axes)


def _mean_of(operand) -> tuple[Value, tuple[int, ...]] | None:
    """`(x, axes)` if the operand is sum(x) / count."""
    quotient = _made_by(operand, "div", "mul")
    if quotient is None or not isinstance(quotient.operands[1], Literal):
        return None
    total = _made_by(quotient.operands[0], "reduce_sum")
    if total is None:
        return None
    x, axes = total.operands[0], tuple(total.params["axes"])
    count = np.prod([x.shape[axis] for axis in axes])
    factor = float(quotient.operands[1].value)
    scale = 1 / factor if quotient.name == "div" else factor
    return (x, axes) if abs(scale * count - 1) <= 4 * float(jnp.finfo(x.dtype).eps) else None


def _squared(operand):
    made = _made_by(operand, "square", "integer_pow", "mul")
    if made is None or (made.name == "integer_pow" and made.params["y"] != 2):
        return None
    return made.operands[0] if made.name != "mul" or made.operands[0] is made.operands[1] else None


def _fast_variance(operands: Sequence) -> Rewrite | None:
    second, first = _mean_of(operands[0]), _mean_of(_squared(operands[1]))
    if second is None or first is None or first[1] != second[1] or _squared(second[0]) is not first[0]:
        return None
    axes = first[1]
    return lambda x: jnp.mean(jax.lax.square(x - jnp.mean(x, axes, keepdims=True)), axes), [first[0]]


_MATCHES: dict[str, Callable[[dict, Sequence], Rewrite | None]] = {
    "reshape": _reshape,
    "pad": _pad,
    "gather": _gather,
    "scan": _scan,
    "cond": _cond,
    "split": _split,
    "dot_general": _dot_general,
    "reduce_min": _reduce_min,
    "reduce_window_max": _window_max,
    "integer_pow": _integer_power,
    "div": _softmax,
    "sub": _log_softmax_or_variance,
    "add": _logsumexp,
}
