"""Whole numbers that depend on a region: in which range they lie, whatever the region.

Rewrites turn arithmetic on integers into arithmetic on real numbers, which is the same only while no result leaves the
range of its dtype: beyond it integers wrap around. The range follows from how a value is made: a boolean is 0 or 1, an
array that the function closes over lies between its least and its largest number, an argument is anything that its
dtype holds. What wraps is the result for real numbers less a multiple of the number of integers (`wrapping`), a
staircase like any other, while floating point holds both exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from weakref import WeakKeyDictionary

import jax.numpy as jnp
import numpy as np

from jaxbound.graph.primitives import AFFINE, ELEMENTWISE, NONLINEAR
from jaxbound.graph.values import Literal, Operand, Value

Range = tuple[int, int]


def _hull(_params: dict, ranges: Sequence[Range], _count: int) -> Range:
    return min(low for low, _ in ranges), max(high for _, high in ranges)


def _product(_params: dict, ranges: Sequence[Range], _count: int) -> Range:
    corners = [x * y for x in ranges[0] for y in ranges[1]]
    return min(corners), max(corners)


def _sum(_params: dict, ranges: Sequence[Range], count: int) -> Range:
    ((low, high),) = ranges
    return min(low, count * low), max(high, count * high)


def _added(_params: dict, ranges: Sequence[Range], _count: int) -> Range:
    return sum(low for low, _ in ranges), sum(high for _, high in ranges)


_MOVES = (
    "broadcast_in_dim", "clamp", "concatenate", "convert_element_type", "copy", "dynamic_slice", "dynamic_update_slice",
    "gather", "max", "min", "pad", "reduce_max", "reduce_min", "reshape", "rev", "select_n", "slice", "sort", "squeeze",
    "stack", "stop_gradient", "tile", "transpose",
)  # fmt: skip
_RANGES: dict[str, Callable[[dict, Sequence[Range], int], Range]] = {
    **dict.fromkeys(_MOVES, _hull),
    "add": _added,
    "add_any": _added,
    "sub": lambda _params, ranges, _count: (ranges[0][0] - ranges[1][1], ranges[0][1] - ranges[1][0]),
    "neg": lambda _params, ranges, _count: (-ranges[0][1], -ranges[0][0]),
    "mul": _product,
    "sign": lambda _params, _ranges, _count: (-1, 1),
    "reduce_sum": _sum,
    "cumsum": _sum,
    "argmax": lambda _params, _ranges, count: (0, count - 1),
    "argmin": lambda _params, _ranges, count: (0, count - 1),
}
"""Primitive name -> the range of its results from those of its operands, of which a sum adds up to `count`."""


_KNOWN: WeakKeyDictionary[Value, Range] = WeakKeyDictionary()
"""The ranges found: a value that is read twice is looked at once."""


def wraps(name: str, params: dict, operands: Sequence, shape: tuple[int, ...], dtype: np.dtype) -> bool:
    """Whether an operation that has a rule for real numbers may give other whole numbers than that rule."""
    if not jnp.issubdtype(dtype, jnp.integer) or not (name in ELEMENTWISE or name in AFFINE or name in NONLINEAR):
        return False
    if any(jnp.issubdtype(operand.dtype, jnp.floating) for operand in operands):
        return False  # a conversion, which has no rule
    return name not in _RANGES or not _fits(_made(name, params, operands, shape), dtype)


def wrapping(value: Value, dtype: np.dtype) -> Callable | None:
    """What becomes of the result for real numbers, in a floating-point dtype, where arithmetic on integers wraps.

    None where the dtype does not hold every whole number on the way.
    """
    primitive, params = value.params["primitive"], dict(value.params["params"])
    if primitive.name not in _RANGES:
        return None
    lowest, highest = int(np.iinfo(value.dtype).min), int(np.iinfo(value.dtype).max)
    count, farthest = highest - lowest + 1, max(map(abs, _made(primitive.name, params, value.operands, value.shape)))
    if farthest + count >= 2 ** jnp.finfo(dtype).nmant:
        return None
    return lambda x: jnp.clip(x - count * jnp.floor((x - lowest) / count), lowest, highest)


def range_of_cast(dtype: np.dtype) -> Range:
    """Between what a real number may lie that is cast to an integer, truncated (see `roundings`)."""
    limits = np.iinfo(dtype)
    if limits.bits < 32:
        return int(limits.min), int(limits.max)
    return (1 - 2**30 if limits.min < 0 else 0), 2**30 - 1


def fits_for_certain(x: Operand, dtype: np.dtype) -> bool:
    """Whether literals keep a real number within the range of its cast: `clip(round(x), -128, 127)`."""
    (least, most), (low, high) = _real_range(x), range_of_cast(dtype)
    return low - 1 < least and most < high + 1


def _real_range(operand: Operand) -> tuple[float, float]:
    """Between which numbers a real value lies by literals that cut it, and roundings."""
    if isinstance(operand, Literal):
        return float(operand.value), float(operand.value)
    if not isinstance(operand, Value) or operand.name not in _CUTS:
        return -math.inf, math.inf
    lows, highs = zip(*map(_real_range, operand.operands), strict=True)
    return _CUTS[operand.name](lows), _CUTS[operand.name](highs)


_CUTS: dict[str, Callable[[Sequence[float]], float]] = {
    "max": max,
    "min": min,
    "clamp": lambda ends: min(max(ends[0], ends[1]), ends[2]),
    "ceil": lambda ends: float(np.ceil(ends[0])),
    "floor": lambda ends: float(np.floor(ends[0])),
    **dict.fromkeys(("broadcast_in_dim", "copy", "reshape", "squeeze", "stop_gradient"), lambda ends: ends[0]),
}
"""What rises with its operands, on their ends."""


def range_of(operand: Operand) -> Range:
    """The range of an operand."""
    if isinstance(operand, Literal):
        return int(operand.value), int(operand.value)
    if operand.dtype == bool:
        return 0, 1
    known = getattr(operand, "known", None)
    if known is not None and known.size:
        return int(known.min()), int(known.max())
    whole = int(np.iinfo(operand.dtype).min), int(np.iinfo(operand.dtype).max)
    if not isinstance(operand, Value) or operand.name not in _RANGES:
        return whole
    if any(jnp.issubdtype(part.dtype, jnp.floating) for part in operand.operands):
        return range_of_cast(operand.dtype) if operand.name == "convert_element_type" else whole
    if operand not in _KNOWN:
        _KNOWN[operand] = _made(operand.name, operand.params, operand.operands, operand.shape)
    return _KNOWN[operand]


def _made(name: str, params: dict, operands: Sequence, shape: tuple[int, ...]) -> Range:
    fixed = AFFINE[name].fixed if name in AFFINE else range(0)
    ranges = [range_of(operand) for position, operand in enumerate(operands) if position not in fixed]
    count = max(math.prod(operands[0].shape) // max(1, math.prod(shape)), 1)
    if name == "cumsum":
        count = operands[0].shape[params["axis"]]
    return _RANGES[name](params, ranges, count)


def _fits(found: Range, dtype: np.dtype) -> bool:
    limits = np.iinfo(dtype)
    return int(limits.min) <= found[0] and found[1] <= int(limits.max)
