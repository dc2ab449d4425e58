"""Choices by a whole number that depends on a region: which of several values it is, by which conditions hold.

`jnp.select` takes the case of the first condition that holds, `argmax(conditions)`; `jnp.piecewise` that of the last,
`argmax(cumsum(conditions))`; both the case 0 where none does. Such a choice is one choice by a boolean after another,
and `index == k` says that condition k holds and none that comes before it in that order.

JAX protects the branches that are not taken from undefined derivatives by `where(taken, x, stop_gradient(x))`, which
is x.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbound.graph.rewriting import definedness, integers
from jaxbound.graph.values import Literal, Value, made_by

Rewrite = tuple[Callable, Sequence]


class _Row(NamedTuple):
    """A condition: an operand, or its k-th part along the axis of the conditions."""

    operand: Any
    axis: int = 0
    k: int | None = None

    def of(self, array: jax.Array):
        """The condition, of what the operand is."""
        return array if self.k is None else jax.lax.index_in_dim(array, self.k, self.axis, keepdims=False)


def by_index(_params: dict, operands: Sequence) -> Rewrite | None:
    """One of several cases, by the number of the condition that holds."""
    index, *cases = operands
    found = _conditions(index)
    if found is None or len(found[0]) != len(cases):
        return None
    rows, order = found

    def function(*arrays: jax.Array):
        conditions, cases = _read(rows, arrays), arrays[len(rows) :]
        chosen = cases[0]
        for k in reversed(order):
            if isinstance(rows[k].operand, Literal) and not rows[k].operand.value:
                continue
            chosen = jnp.where(conditions[k], cases[k], chosen)
        return chosen

    return function, [*(row.operand for row in rows), *cases]


def equals_index(_params: dict, operands: Sequence) -> Rewrite | None:
    """Whether the condition of a known number is the one that counts."""
    for index, number in (operands, operands[::-1]):
        found = _conditions(index)
        if found is None or not isinstance(number, Literal) or not 0 <= number.value < len(found[0]):
            continue
        rows, order = found
        k = int(number.value)
        before = order[: order.index(k)]
        after = order[order.index(k) + 1 :]

        def function(
            *arrays: jax.Array,
            k: int = k,
            before: Sequence[int] = before,
            after: Sequence[int] = after,
            rows: list[_Row] = rows,
        ):
            conditions = _read(rows, arrays)
            own = conditions[k]
            if k == 0:  # also where none holds
                own = functools.reduce(operator.and_, [~conditions[j] for j in after], jnp.ones_like(own)) | own
            return functools.reduce(operator.and_, [~conditions[j] for j in before], own)

        return function, [row.operand for row in rows]
    return None


def within(_params: dict, operands: Sequence) -> Rewrite | None:
    """A whole number that lies between two others already."""
    low, x, high = operands
    if not (isinstance(x, Value) and isinstance(low, Literal) and isinstance(high, Literal)):
        return None
    if not jnp.issubdtype(x.dtype, jnp.integer):
        return None
    least, most = integers.range_of(x)
    return (lambda x: x, [x]) if low.value <= least and most <= high.value else None


def decided(_params: dict, operands: Sequence) -> Rewrite | None:
    """A choice by a number, or by a known array of one number, is the case itself: `where(b != 0, x, -inf)`."""
    which, *cases = operands
    known = np.asarray(which.value) if isinstance(which, Literal) else getattr(which, "known", None)
    if known is None or known.size == 0 or np.any(known != known.flat[0]):
        return None
    case = cases[min(max(int(known.flat[0]), 0), len(cases) - 1)]
    return (lambda x: x, [case]) if isinstance(which, Literal) or isinstance(case, Value) else None


def same(_params: dict, operands: Sequence) -> Rewrite | None:
    """A choice between one value and itself, without its gradient mark."""
    which, *cases = operands
    first, *others = map(_unmarked, cases)
    if isinstance(which, Value) and not definedness.is_total(which):
        return None
    if isinstance(first, Literal):
        alike = all(isinstance(o, Literal) and o.value == first.value and o.dtype == first.dtype for o in others)
    else:
        alike = isinstance(first, Value) and all(o is first for o in others)
    return (lambda x: x, [first]) if alike and first.shape == cases[0].shape else None


def _unmarked(operand: Any):
    while made_by(operand, "stop_gradient", "copy"):
        (operand,) = operand.operands
    return operand


def _conditions(index: Any) -> tuple[list[_Row], list[int]] | None:
    """The conditions of which a number is the index, and in which order they count."""
    while made_by(index, "convert_element_type", "copy"):  # none wraps here (`integers`)
        (index,) = index.operands
        if jnp.issubdtype(index.dtype, jnp.floating):
            return None
    found = made_by(index, "argmax")
    if found is None or len(found.params["axes"]) != 1:
        return None
    (axis,), truths, is_last = found.params["axes"], found.operands[0], False
    if summed := made_by(truths, "cumsum"):
        if summed.params["axis"] != axis or summed.params["reverse"]:
            return None
        (truths,), is_last = summed.operands, True
        converted = made_by(truths, "convert_element_type")
        truths = converted.operands[0] if converted else truths
    if not isinstance(truths, Value) or truths.dtype != bool or truths.shape[axis] > np.iinfo(found.dtype).max:
        return None
    rows = _rows(truths, axis)
    order = list(range(len(rows)))
    return rows, order[::-1] if is_last else order


def _rows(truths: Any, axis: int) -> list[_Row]:
    """The parts of a boolean array along an axis, as far as they are values of their own."""
    shape = tuple(np.delete(truths.shape, axis))
    if isinstance(truths, Literal):
        return [_Row(Literal(truths.value, shape))] * truths.shape[axis]
    if isinstance(truths, Value):
        own = truths.params
        if truths.name == "stack" and own["axis"] == axis:
            return [_Row(operand) for operand in truths.operands]
        if truths.name == "concatenate" and own["dimension"] == axis:
            return [row for operand in truths.operands for row in _rows(operand, axis)]
        others = tuple(np.delete(range(len(truths.shape)), axis))
        if (
            truths.name == "broadcast_in_dim"
            and truths.operands[0].shape == shape
            and own["broadcast_dimensions"] == others
        ):
            return [_Row(truths.operands[0])] * truths.shape[axis]
        if truths.name == "slice":
            inner, strides = truths.operands[0], own["strides"] or (1,) * len(truths.shape)
            if tuple(np.delete(inner.shape, axis)) == shape:
                return _rows(inner, axis)[own["start_indices"][axis] : own["limit_indices"][axis] : strides[axis]]
    return [_Row(truths, axis, k) for k in range(truths.shape[axis])]


def _read(rows: list[_Row], arrays: Sequence) -> list:
    return [row.of(array) for row, array in zip(rows, arrays, strict=False)]
