"""Masked scores: softmax and its kin of the entries that a fixed mask leaves.

A mask puts minus infinity in the place of a score, or adds it, or takes its exponential out of the sum, as `where=` of
`jax.nn.softmax` and `logsumexp` does beside. No linear function holds minus infinity, so the scores themselves are
bounded, and the mask stands in the sums. Where a mask may leave nothing the scores are divided by what is left, 0 or 1:
such a softmax is not defined.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbound._compat import Primitive, bind
from jaxbound.graph.values import Constant, Literal, Value, made_by

Rewrite = tuple[Callable, Sequence]

_MOVES = frozenset({"broadcast_in_dim", "reshape", "rev", "slice", "squeeze", "transpose"})


def reading(function: Callable, scores: Value, axes: Sequence[int]) -> Rewrite:
    """A function of scores along axes, as one of the scores before a mask, and of the mask.

    Args:
        function: of scores alone; or of finite scores, which of them count, and zeros to put elsewhere.
        scores: with minus infinity where a mask says so, or without a mask.
        axes: those along which a mask must leave something.
    """
    inner, masks, offs = scores, [], []
    while (off := _off(inner)) is not None:
        masks, offs = [*masks, inner.operands[0]], [*offs, off]
        inner = inner.operands[1 + (not off)]
    if not masks or not isinstance(inner, Value) or inner.infinite:
        return function, [scores]

    def kept(masks: Sequence) -> Any:
        return functools.reduce(operator.and_, [mask != off for mask, off in zip(masks, offs, strict=True)])

    known = [mask.known for mask in masks]
    leaves_some = all(mask is not None for mask in known) and bool(np.all(np.any(kept(known), tuple(axes))))

    def of_rest(x: jax.Array, *masks: jax.Array) -> jax.Array:
        mask = kept(masks)
        x = jnp.where(mask, x, 0)
        if leaves_some:
            return function(x, mask, jnp.zeros_like(x))
        x = x / jnp.any(mask, tuple(axes), keepdims=True).astype(x.dtype)
        return function(x, mask, jax.nn.relu(0 * x))

    return of_rest, [inner, *masks]


def exponential(_params: dict, operands: Sequence) -> Rewrite | None:
    """`exp(x - m)` where a fixed mask says so and 0 elsewhere, m being the largest x of the mask.

    That is `exp(y - m)`, with minus infinity in y for what is masked, as a softmax of masked scores has it.
    """
    if len(operands) != 3:
        return None
    mask, otherwise, value = operands
    made = made_by(value, "exp")
    difference = made_by(made.operands[0], "sub") if made else None
    if not isinstance(otherwise, Literal) or otherwise.value != 0 or difference is None:
        return None
    x, shift = difference.operands
    if _has_mask(x, mask):
        return lambda x: x, [value]
    largest = made_by(_peak(shift), "reduce_max")
    scores = largest.operands[0] if largest else None
    if not isinstance(scores, Value) or not _has_mask(scores, mask) or not alike(scores.operands[2], x):
        return None
    return lambda y, m: jnp.exp(y - m), [scores, shift]


def added(sign: int) -> Callable[[dict, Sequence], Rewrite | None]:
    """The rule for a sum (sign 1) or difference (-1) with a fixed array that masks: minus infinity where it says so."""

    def rule(_params: dict, operands: Sequence) -> Rewrite | None:
        first, second = operands
        array = second if isinstance(second, Constant) else first
        negative = sign < 0 and array is second
        known = getattr(array, "known", None)
        if known is None or not jnp.issubdtype(known.dtype, jnp.floating):
            return None
        off = known == (np.inf if negative else -np.inf)
        if not np.any(off) or not np.all(off | np.isfinite(known)) or (sign < 0 and array is first):
            return None
        rest = np.where(off, 0, known).astype(known.dtype)
        total = (lambda x: x - rest) if negative else (lambda x: x + rest)
        return lambda x: jnp.where(off, -jnp.inf, total(x)), [first if array is second else second]

    return rule


def moved(primitive: Primitive, params: dict, operands: Sequence) -> Rewrite | None:
    """What moves masked scores moves the scores, and the mask."""
    off = _off(operands[0]) if primitive.name in _MOVES else None
    if off is None:
        return None
    move = functools.partial(bind, primitive, params=params)

    def function(mask: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.where(move([mask]) != off, move([x]), -jnp.inf)

    return function, [operands[0].operands[0], operands[0].operands[1 + (not off)]]


def _has_mask(scores: Any, mask: Any) -> bool:
    """Whether scores are minus infinity where a mask is false."""
    return isinstance(scores, Value) and _off(scores) is False and alike(scores.operands[0], mask)


def _peak(shift: Any) -> Any:
    """What a shift is made of: a maximum is repeated, guarded from infinities and marked as having no gradient."""
    while (made := made_by(shift, "broadcast_in_dim", "max", "reshape", "select_n", "stop_gradient")) is not None:
        cases = made.operands[made.name == "select_n" :]
        shift = next((case for case in cases if isinstance(case, Value)), None)
    return shift


def _off(operand: Any) -> bool | None:
    """For which value a fixed mask puts minus infinity in the place of a score; None if there is no such mask."""
    chosen = made_by(operand, "select_n")
    if chosen is None or not isinstance(chosen.operands[0], Constant) or chosen.operands[0].shape != chosen.shape:
        return None
    minus = [isinstance(case, Literal) and case.value == -np.inf for case in chosen.operands[1:]]
    return minus[1] if len(minus) == 2 and minus[0] != minus[1] else None


def alike(first: Any, second: Any) -> bool:
    """Whether two operands are one value, or the same choice by fixed numbers made twice."""
    if isinstance(first, Constant) and isinstance(second, Constant):
        if first.known is None or second.known is None:
            return first.number == second.number
        return np.array_equal(first.known, second.known)
    if isinstance(first, Literal) and isinstance(second, Literal):
        return first.value == second.value and first.dtype == second.dtype and first.shape == second.shape
    one, other = made_by(first, "select_n"), made_by(second, "select_n")
    if first is second or one is None or other is None:
        return first is second
    return len(one.operands) == len(other.operands) and all(map(alike, one.operands, other.operands))
