"""Rewrites of single primitives: those with odd parameters, several outputs or loops, in terms of simpler ones.

Each takes an equation's parameters and operands and gives a plain JAX function that equals the primitive for every real
input, with the operands it takes; or None, to keep the equation.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxbound._compat import jaxpr_as_fun, scan_counts
from jaxbound.graph import operations
from jaxbound.graph.values import Value, made_by

Rewrite = tuple[Callable, Sequence]


def split(params: dict, operands: Sequence) -> Rewrite:
    """Slices."""
    stops = np.cumsum(params["sizes"])
    axis = params["axis"]

    def function(x: jax.Array):
        starts = [0, *stops[:-1]]
        return [jax.lax.slice_in_dim(x, int(i), int(j), axis=axis) for i, j in zip(starts, stops, strict=True)]

    return function, operands


def unstack(params: dict, operands: Sequence) -> Rewrite:
    """Slices without their axis."""
    axis = params["axis"]
    return lambda x: [jax.lax.index_in_dim(x, k, axis, keepdims=False) for k in range(x.shape[axis])], operands


def reshape(params: dict, operands: Sequence) -> Rewrite | None:
    """A reshape that reads its operand's axes in another order is a transpose first."""
    axes, shape = params["dimensions"], params["new_sizes"]
    return None if axes is None else (lambda x: jnp.reshape(jnp.transpose(x, axes), shape), operands)


def broadcast(params: dict, operands: Sequence) -> Rewrite | None:
    """Repeating what is repeated already, in one go."""
    inner = made_by(operands[0], "broadcast_in_dim")
    if inner is None:
        return None
    axes = tuple(params["broadcast_dimensions"][axis] for axis in inner.params["broadcast_dimensions"])
    return lambda x: jax.lax.broadcast_in_dim(x, params["shape"], axes), inner.operands[:1]


def pad(params: dict, operands: Sequence) -> Rewrite | None:
    """A bounded padding value is a product with where it is put (its transpose is broken in JAX)."""
    if not isinstance(operands[1], Value):
        return None
    pad = functools.partial(jax.lax.pad, padding_config=params["padding_config"])

    def function(x: jax.Array, value: jax.Array):
        zero, one = jnp.zeros((), x.dtype), jnp.ones((), x.dtype)
        return pad(x, zero) + value * pad(jnp.zeros_like(x), one)

    return function, operands


def scan(params: dict, operands: Sequence) -> Rewrite:
    """A loop of fixed length, unrolled."""
    step, length = jaxpr_as_fun(params["jaxpr"]), params["length"]
    fixed, carried = scan_counts(params)

    def function(*arguments: jax.Array):
        constants, carry, rows = arguments[:fixed], arguments[fixed : fixed + carried], arguments[fixed + carried :]
        made = [None] * length
        for k in reversed(range(length)) if params["reverse"] else range(length):
            results = step(*constants, *carry, *(jax.lax.index_in_dim(row, k, keepdims=False) for row in rows))
            carry, made[k] = results[:carried], results[carried:]
        if not length:
            return [*carry, *(jnp.zeros((0, *aval.shape), aval.dtype) for aval in params["jaxpr"].out_avals[carried:])]
        return [*carry, *(jnp.stack(parts) for parts in zip(*made, strict=True))]

    return function, operands


def cond(params: dict, operands: Sequence) -> Rewrite | None:
    """Branches chosen by what no region reaches: all of them, and a selection."""
    if isinstance(operands[0], Value):
        return None
    branches = [jaxpr_as_fun(branch) for branch in params["branches"]]

    def function(index: jax.Array, *arguments: jax.Array):
        results = [branch(*arguments) for branch in branches]
        index = jnp.clip(index, 0, len(branches) - 1)
        return [jax.lax.select_n(index, *parts) for parts in zip(*results, strict=True)]

    return function, operands


def dot_general(params: dict, operands: Sequence) -> Rewrite | None:
    """A product of two bounded arrays is a sum of products, entry by entry: (*batch, left, right, contracted)."""
    if not all(isinstance(operand, Value) for operand in operands):
        return None
    contracting, batching = params["dimension_numbers"]

    def function(x: jax.Array, y: jax.Array):
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


def reduce_min(params: dict, operands: Sequence) -> Rewrite:
    """A negated maximum."""
    axes = tuple(params["axes"])
    return lambda x: -jnp.max(-x, axis=axes), operands


def window_max(params: dict, operands: Sequence) -> Rewrite | None:
    """A pooled maximum is the maximum over a stack of strided slices, one per place in the window.

    Padding adds minus infinity, which never wins; repeating the edge does not change the maximum either and is finite.
    Windows that hold padding alone are minus infinity.
    """
    window, strides, padding = params["window_dimensions"], params["window_strides"], params["padding"]
    if any(d != 1 for d in (*params["base_dilation"], *params["window_dilation"])):
        return None

    def function(x: jax.Array):
        size = x.shape
        if np.any(padding):  # negative padding cuts
            cuts = [(max(-low, 0), n - max(-high, 0)) for n, (low, high) in zip(x.shape, padding, strict=True)]
            x = x[tuple(slice(*cut) for cut in cuts)]
            x = jnp.pad(x, [(max(low, 0), max(high, 0)) for low, high in padding], mode="edge")
        spans = [(n - w) // s * s + 1 for n, w, s in zip(x.shape, window, strides, strict=True)]
        places = [
            jax.lax.slice(x, place, [p + span for p, span in zip(place, spans, strict=True)], strides)
            for place in np.ndindex(*window)
        ]
        largest = jnp.max(jnp.stack(places), axis=0)
        empty = np.zeros(largest.shape, bool)
        for axis, (n, (low, _), w, s) in enumerate(zip(size, padding, window, strides, strict=True)):
            alone = np.all(_outside(n, low, w, s, largest.shape[axis]), axis=1)
            empty |= np.expand_dims(alone, [k for k in range(x.ndim) if k != axis])
        return jnp.where(empty, -jnp.inf, largest) if empty.any() else largest

    return function, operands


def _outside(size: int, low: int, window: int, stride: int, count: int) -> np.ndarray:
    """Along an axis, which places of every window are padding: (windows, places)."""
    places = np.arange(count)[:, None] * stride + np.arange(window) - low
    return (places < 0) | (places >= size)


def integer_power(params: dict, operands: Sequence) -> Rewrite | None:
    """A square by its own name."""
    return (jax.lax.square, operands) if params["y"] == 2 else None


def one_minus_square(params: dict, operands: Sequence) -> Rewrite:
    """Since JAX 0.12, in derivatives of tanh."""
    return lambda x: 1 - jnp.square(x), operands


def polynomial(params: dict, operands: Sequence) -> Rewrite:
    """Since JAX 0.12: Horner's rule."""

    def function(x: jax.Array, *coefficients: jax.Array):
        value = jnp.broadcast_to(coefficients[-1], jnp.broadcast_shapes(x.shape, *map(jnp.shape, coefficients)))
        for coefficient in coefficients[-2::-1]:
            value = coefficient + x * value
        return value

    return function, operands


def convolution(params: dict, operands: Sequence) -> Rewrite | None:
    """A convolution of two bounded arrays is a product of patches and kernels."""
    if not all(isinstance(operand, Value) for operand in operands):
        return None
    numbers = params["dimension_numbers"]
    if params["batch_group_count"] != 1:
        return None
    groups = params["feature_group_count"]

    def function(x: jax.Array, kernel: jax.Array):
        x = jnp.transpose(x, numbers.lhs_spec)
        kernel = jnp.transpose(kernel, numbers.rhs_spec)  # (out, in / groups, *window)
        patches = jax.lax.conv_general_dilated_patches(
            x, kernel.shape[2:], params["window_strides"], params["padding"], params["lhs_dilation"],
            params["rhs_dilation"], precision=jax.lax.Precision.HIGHEST,
        )  # fmt: skip
        batch, places = x.shape[0], patches.shape[2:]
        patches = patches.reshape(batch, groups, -1, int(np.prod(places)))
        kernel = kernel.reshape(groups, kernel.shape[0] // groups, -1)
        out = jnp.einsum("ngkp,gok->ngop", patches, kernel).reshape(batch, -1, *places)
        return jnp.transpose(out, tuple(np.argsort(numbers.out_spec)))

    return function, operands


def reduce_product(params: dict, operands: Sequence) -> Rewrite:
    """A product of entries, two halves at a time."""
    axes = tuple(params["axes"])

    def function(x: jax.Array):
        x = jnp.moveaxis(x, axes, range(len(axes)))
        x = x.reshape(-1, *x.shape[len(axes) :])
        while len(x) > 1:
            half, odd = len(x) // 2, x[len(x) - len(x) % 2 :]
            x = jnp.concatenate([x[:half] * x[half : 2 * half], odd])
        return x[0] if len(x) else jnp.ones(x.shape[1:], x.dtype)

    return function, operands


def cumulative(reduce: Callable) -> Callable[[dict, Sequence], Rewrite]:
    """The rule for running reductions: one reduction for every prefix."""

    def rule(params: dict, operands: Sequence) -> Rewrite:
        axis, backward = params["axis"], params["reverse"]

        def function(x: jax.Array):
            x = jnp.moveaxis(x, axis, 0)
            prefixes = [x[k:] if backward else x[: k + 1] for k in range(len(x))]
            return jnp.moveaxis(jnp.stack([reduce(prefix, axis=0) for prefix in prefixes]), 0, axis)

        return function, operands

    return rule


def sort(params: dict, operands: Sequence) -> Rewrite | None:
    """Of several arrays sorted by the first, only that one is known: the others go with an unknown order."""
    if len(operands) == 1:
        return None

    def function(first: jax.Array, *others: jax.Array):
        ordered = jax.lax.sort(first, dimension=params["dimension"], is_stable=params["is_stable"])
        return [ordered, *(operations.in_order_of(first, other) for other in others)]

    return function, operands


def top_k(params: dict, operands: Sequence) -> Rewrite:
    """The largest entries, and their unknown places."""
    k, axis = params["k"], params.get("axis", -1)

    def function(x: jax.Array):
        places = jnp.zeros(x.shape, jnp.int32)
        largest = -jax.lax.sort(-x, dimension=axis % x.ndim)
        both = largest, operations.in_order_of(x, places)
        return [jax.lax.slice_in_dim(part, 0, k, axis=axis) for part in both]

    return function, operands


def window_max_adjoint(params: dict, operands: Sequence) -> Rewrite | None:
    """The derivative of a pooled maximum: what comes from a window goes to the places that may be the largest in it."""
    cut = any(min(pad) < 0 for pad in params["padding"])
    if not isinstance(operands[1], Value) or params["select_prim"].name != "ge" or cut:
        return None

    def function(source: jax.Array, x: jax.Array):
        outer = [n + low + high for n, (low, high) in zip(x.shape, params["padding"], strict=True)]
        total = jnp.zeros(x.shape, x.dtype)
        for place, largest, span in _winners(x, params):
            share = jnp.where(largest, source, jnp.zeros((), x.dtype))
            sides = zip(place, params["padding"], outer, span, params["window_strides"], strict=True)
            spread = [(p - low, n - s - p - high, stride - 1) for p, (low, high), n, s, stride in sides]
            total = total + jax.lax.pad(share, jnp.zeros((), x.dtype), spread)
        return total

    return function, operands


def window_max_tangent(params: dict, operands: Sequence) -> Rewrite | None:
    """A derivative of a pooled maximum, forward: the tangent at the place that may be the largest in the window."""
    odd = any(d != 1 for d in (*params["base_dilation"], *params["window_dilation"]))
    odd = odd or any(min(pad) < 0 for pad in params["padding"])
    if not isinstance(operands[1], Value) or params["select_prim"].name != "ge" or odd:
        return None

    def function(tangent: jax.Array, x: jax.Array):
        padded = jnp.pad(tangent, params["padding"])
        shares = [jnp.where(won, _at(padded, place, span, params), 0) for place, won, span in _winners(x, params)]
        return functools.reduce(jnp.add, shares)

    return function, operands


def _winners(x: jax.Array, params: dict) -> Iterator[tuple[tuple[int, ...], jax.Array, list[int]]]:
    """For every place in the window: itself, in which windows its entry is the largest, and what windows span."""
    window, strides, padding = params["window_dimensions"], params["window_strides"], params["padding"]
    padded, inside = jnp.pad(x, padding), np.pad(np.ones(x.shape, bool), padding)
    span = [(n - w) // s * s + 1 for n, w, s in zip(padded.shape, window, strides, strict=True)]
    places = list(np.ndindex(*window))
    for place in places:
        rivals = [other for other in places if other != place]
        own = _at(padded, place, span, params)
        wins = [(own - _at(padded, other, span, params) >= 0) | ~_at(inside, other, span, params) for other in rivals]
        yield place, functools.reduce(jnp.logical_and, wins, jnp.asarray(_at(inside, place, span, params))), span


def _at(array: jax.Array | np.ndarray, place: Sequence[int], span: Sequence[int], params: dict):
    """What stands at one place of every window."""
    ends = zip(place, span, params["window_strides"], strict=True)
    return array[tuple(slice(p, p + s, stride) for p, s, stride in ends)]
