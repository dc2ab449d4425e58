"""Windowed coefficients: rows of which each reads only a small box of a value, and the operations that keep it small.

A pass that starts at the entries of a convolution's output has, for the row of entry `e`, coefficients in a box of the
value around a place that is an affine function of `e`. Along axis d of the value, row r holds the coefficients of

    position  origin[r, d] + j,   0 <= j < window[d],     origin[r, d] = stride * e[r, axis] + offset,

with `e[r]` the entry's coordinates, and `(axis, stride, offset)` the same for all rows: a `Place`, static. So it is
known before any number is whether windows can stand out of the value, and how two windows of one pass lie to each
other. Coefficients outside the value are 0. An axis without a place is held whole.

An operation is **local** if entry p of its result reads `stride * p - before + j` along an axis, for a few j. Then its
transpose maps windows to windows: the same `linear_transpose`, of the operation on a window without its padding, with

    window <- (window - 1) * stride + reach,      (stride', offset') <- (stride' * stride, offset' * stride - before).

`_LOCAL` is the table of such operations. Operations on entries alone (`primitives.ELEMENTWISE`) keep windows as well,
but these need no rule: their transpose is a product with a diagonal, whose entries are cut out at the rows' places.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbound.graph import Op
from jaxbound.relaxations import affine

LARGEST_SHARE = 0.5
"""Windows that cover more of a value than this are held whole: cutting and placing them would cost more."""


class Place(NamedTuple):
    """Where windows begin along an axis: `stride` times the coordinate along `axis` of a row's entry, plus `offset`."""

    axis: int
    stride: int
    offset: int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Windowed:
    """See the module's head. `values` has shape (rows, *window); `index` are the rows' entries in an array `root`."""

    values: jax.Array
    index: jax.Array
    root: tuple[int, ...] = field(metadata={"static": True})
    shape: tuple[int, ...] = field(metadata={"static": True})
    places: tuple[Place | None, ...] = field(metadata={"static": True})

    @property
    def window(self) -> tuple[int, ...]:
        """How far it reaches along each axis."""
        return self.values.shape[1:]

    @property
    def axes(self) -> list[int]:
        """The axes that are not held whole."""
        return [axis for axis, place in enumerate(self.places) if place is not None]

    def place(self, axis: int) -> Place:
        """Where it begins along an axis that is not held whole."""
        place = self.places[axis]
        assert place is not None
        return place

    def origin(self, axis: int) -> _Start:
        """Where the windows begin along an axis."""
        place = self.place(axis)
        length, number = self.root[place.axis], self.index.dtype.type
        entries = jax.lax.rem(jax.lax.div(self.index, number(math.prod(self.root[place.axis + 1 :]))), number(length))
        return _Start(entries * place.stride + place.offset, place.offset, place.offset + place.stride * (length - 1))


class _Start(NamedTuple):
    """Per row a position, and the least and the largest that it can be."""

    position: jax.Array
    least: int
    most: int


def of_entries(index: jax.Array, weight: jax.Array, shape: tuple[int, ...]) -> Windowed:
    """Row r is `weight[r]` times entry `index[r]` of a value of this shape."""
    root = tuple(n for n in shape if n > 1)
    order = iter(range(len(root)))
    places = tuple(Place(next(order), 1, 0) if n > 1 else None for n in shape)
    return Windowed(weight.reshape(-1, *[1] * len(shape)), index, root, shape, places)


def whole(rows: Windowed, axes: Sequence[int] | None = None) -> Windowed:
    """The same rows, held whole along some axes, or all."""
    axes = [axis for axis in rows.axes if axes is None or axis in axes]
    if not axes:
        return rows
    starts = [rows.origin(axis) for axis in axes]
    back = [_Start(-start.position, -start.most, -start.least) for start in starts]
    values = _cut(rows.values, [1 + axis for axis in axes], back, [rows.shape[axis] for axis in axes], own=True)
    places = tuple(None if axis in axes else place for axis, place in enumerate(rows.places))
    return dataclasses.replace(rows, values=values, places=places)


def cut(rows: Windowed, values: jax.Array) -> jax.Array:
    """What every row sees of some values, (rows, *window); 0 outside.

    The values may have rows of their own, and may be cut already.
    """
    if values.shape == rows.values.shape:
        return values
    rank, axes = len(rows.shape), rows.axes
    own = values.ndim > rank
    values = jnp.broadcast_to(values, values.shape[: values.ndim - rank] + rows.shape)
    seen = _cut(
        values, [own + axis for axis in axes], list(map(rows.origin, axes)), [rows.window[a] for a in axes], own
    )
    return seen if own or axes else seen[None]


def add(first: Windowed, second: Windowed) -> Windowed | None:
    """The sum of rows of one pass on one value; None if they lie to each other in no fixed way."""
    if first.root != second.root:
        return None
    for axis, (one, other) in enumerate(zip(first.places, second.places, strict=True)):
        if one is None or other is None or one[:2] != other[:2]:
            first, second = whole(first, [axis]), whole(second, [axis])
    places, ends = [], []
    for axis, (one, other) in enumerate(zip(first.places, second.places, strict=True)):
        begins = [0 if place is None else place.offset for place in (one, other)]
        places.append(None if one is None else one._replace(offset=min(begins)))
        ends.append(max(begin + rows.window[axis] for begin, rows in zip(begins, (first, second), strict=True)))
    union = _united(first, places, ends) + _united(second, places, ends)
    return _settled(dataclasses.replace(first, values=union, places=tuple(places)))


def _united(rows: Windowed, places: Sequence[Place | None], ends: Sequence[int]) -> jax.Array:
    """The numbers in windows that begin at places no later, and end at these offsets."""
    padding = [(0, 0)]
    for axis, (place, union) in enumerate(zip(rows.places, places, strict=True)):
        begin, first = (0, 0) if place is None or union is None else (place.offset, union.offset)
        padding.append((begin - first, ends[axis] - begin - rows.window[axis]))
    return jnp.pad(rows.values, padding)


def reshape(rows: Windowed, shape: tuple[int, ...]) -> Windowed | None:
    """Rows on the same value in another shape; None unless the shapes differ in axes of length 1 only."""
    if [n for n in rows.shape if n > 1] != [n for n in shape if n > 1]:
        return None
    kept = iter([(rows.window[k], rows.places[k]) for k, n in enumerate(rows.shape) if n > 1])
    axes = [next(kept) if n > 1 else (n, None) for n in shape]
    values = rows.values.reshape(-1, *(n for n, _ in axes))
    return dataclasses.replace(rows, values=values, shape=shape, places=tuple(place for _, place in axes))


def pull(op: Op, rows: Windowed, constants: Sequence) -> list[Windowed] | None:
    """Rows on the inputs of a local operation, in order; None for any other."""
    rule = _LOCAL[op.name](op) if op.name in _LOCAL else None
    return None if rule is None else [_settled(_inside(part)) for part in rule(rows, constants)]


# --- local operations -------------------------------------------------------------------------------------------------

Rule = Callable[[Windowed, Sequence], list[Windowed]]


class _Reach(NamedTuple):
    """What entry p of a result reads along an axis: `stride * p - before + j` for 0 <= j < reach."""

    stride: int
    reach: int
    before: int


def _moved(op: Op, rows: Windowed, constants: Sequence, reaches: Sequence[_Reach], change: Callable) -> list[Windowed]:
    """Pull windows through an operation with these reaches.

    `change(windowed)` are its parameters with no padding, and nothing cut off, along the windowed axes (a mask).
    """
    shape = list(op.input_shapes[0])
    places = list(rows.places)
    for axis in rows.axes:
        place, (stride, reach, before) = rows.place(axis), reaches[axis]
        places[axis] = Place(place.axis, place.stride * stride, place.offset * stride - before)
        shape[axis] = (rows.window[axis] - 1) * stride + reach
    params = dict(op.params) | change([place is not None for place in places], shape)
    small = dataclasses.replace(
        op, shape=rows.window, input_shapes=(tuple(shape), *op.input_shapes[1:]), params=tuple(params.items())
    )
    (values,) = affine.pull(small, rows.values, constants)
    return [dataclasses.replace(rows, values=values, shape=op.input_shapes[0], places=tuple(places))]


def _convolution(op: Op) -> Rule | None:
    params = dict(op.params)
    numbers = params["dimension_numbers"]
    if [operand[0] for operand in op.operands] != ["input", "constant"] or numbers.lhs_spec != numbers.out_spec:
        return None
    if params["batch_group_count"] != 1 or any(n != 1 for n in params["lhs_dilation"]):
        return None
    feature, *spatial = numbers.out_spec[1:]
    reaches = [_Reach(1, 1, 0)] * len(op.shape)
    for k, axis in enumerate(spatial):
        size = (op.input_shapes[1][numbers.rhs_spec[2 + k]] - 1) * params["rhs_dilation"][k] + 1
        reaches[axis] = _Reach(params["window_strides"][k], size, params["padding"][k][0])

    def change(windowed: Sequence[bool], _shape: Sequence[int]):
        padding = zip(spatial, params["padding"], strict=True)
        return {"padding": tuple((0, 0) if windowed[axis] else ends for axis, ends in padding)}

    return lambda rows, constants: _moved(op, whole(rows, [feature]), constants, reaches, change)


def _pooling(op: Op) -> Rule | None:
    params = dict(op.params)
    if any(n != 1 for n in params["base_dilation"]):
        return None
    sizes = zip(params["window_dimensions"], params["window_dilation"], strict=True)
    parts = zip(params["window_strides"], sizes, params["padding"], strict=True)
    reaches = [_Reach(stride, (size - 1) * dilation + 1, ends[0]) for stride, (size, dilation), ends in parts]

    def change(windowed: Sequence[bool], _shape: Sequence[int]):
        padding = zip(windowed, params["padding"], strict=True)
        return {"padding": tuple((0, 0) if small else ends for small, ends in padding)}

    return lambda rows, constants: _moved(op, rows, constants, reaches, change)


def _slice(op: Op) -> Rule | None:
    params = dict(op.params)
    strides = params["strides"] or (1,) * len(op.shape)
    reaches = [_Reach(stride, 1, -start) for stride, start in zip(strides, params["start_indices"], strict=True)]

    def change(windowed: Sequence[bool], shape: Sequence[int]):
        starts = zip(windowed, params["start_indices"], strict=True)
        limits = zip(windowed, shape, params["limit_indices"], strict=True)
        return {
            "start_indices": tuple(0 if small else start for small, start in starts),
            "limit_indices": tuple(n if small else limit for small, n, limit in limits),
        }

    return lambda rows, constants: _moved(op, rows, constants, reaches, change)


def _pad(op: Op) -> Rule | None:
    config = dict(op.params)["padding_config"]
    if op.operands[0][0] != "input" or op.operands[1][0] == "input":
        return None
    reaches = [_Reach(1, 1, low) for low, _, _ in config]
    spread = [axis for axis, (_, _, interior) in enumerate(config) if interior]

    def change(windowed: Sequence[bool], _shape: tuple[int, ...]):
        return {"padding_config": tuple((0, 0, 0) if w else ends for w, ends in zip(windowed, config, strict=True))}

    return lambda rows, constants: _moved(op, whole(rows, spread), constants, reaches, change)


def _transpose(op: Op) -> Rule | None:
    order = np.argsort(dict(op.params)["permutation"])

    def rule(rows: Windowed, _constants: Sequence) -> list[Windowed]:
        values = jnp.transpose(rows.values, (0, *(1 + order)))
        places = tuple(rows.places[axis] for axis in order)
        return [dataclasses.replace(rows, values=values, shape=op.input_shapes[0], places=places)]

    return rule


def _concatenate(op: Op) -> Rule | None:
    axis = dict(op.params)["dimension"]
    starts = [0, *np.cumsum([shape[axis] for shape in op.input_shapes]).tolist()]

    def rule(rows: Windowed, _constants: Sequence) -> list[Windowed]:
        parts, place = [], rows.places[axis]
        for k, operand in enumerate(op.operands):
            if operand[0] != "input":
                continue
            values, places = rows.values, list(rows.places)
            if place is None:
                values = jax.lax.slice_in_dim(values, starts[k], starts[k + 1], axis=1 + axis)
            else:
                places[axis] = place._replace(offset=place.offset - starts[k])
            parts.append(dataclasses.replace(rows, values=values, shape=op.input_shapes[k], places=tuple(places)))
        return parts

    return rule


_LOCAL: dict[str, Callable[[Op], Rule | None]] = {
    "conv_general_dilated": _convolution,
    "reduce_window_sum": _pooling,
    "slice": _slice,
    "pad": _pad,
    "transpose": _transpose,
    "concatenate": _concatenate,
}
"""Primitive name -> how windows pass it, or None where they do not."""


# --- cutting ----------------------------------------------------------------------------------------------------------


def _cut(values: jax.Array, axes: list[int], starts: list[_Start], sizes: Sequence[int], own: bool) -> jax.Array:
    """Per row, `size` entries along each axis from where it starts, zeros outside; (rows, ...).

    `own` says that the values have rows themselves, as their first axis; otherwise all rows cut the same ones.
    """
    padding = [(0, 0)] * values.ndim
    for axis, start, size in zip(axes, starts, sizes, strict=True):
        padding[axis] = max(0, -start.least), max(0, start.most + size - values.shape[axis])
    padded = jnp.pad(values, padding)
    lengths = list(padded.shape)[own:]
    for axis, size in zip(axes, sizes, strict=True):
        lengths[axis - own] = size

    def one(row: jax.Array, *positions: jax.Array):
        places = [jnp.zeros((), positions[0].dtype)] * row.ndim
        for axis, position in zip(axes, positions, strict=True):
            places[axis - own] = position + padding[axis][0]
        return jax.lax.dynamic_slice(row, places, lengths)

    positions = [start.position for start in starts]
    return jax.vmap(one, in_axes=(0 if own else None, *[0] * len(axes)))(padded, *positions) if axes else padded


def _inside(rows: Windowed) -> Windowed:
    """Without what stands out of the value."""
    values = rows.values
    for axis in rows.axes:
        start, n = rows.origin(axis), rows.shape[axis]
        if start.least >= 0 and start.most + rows.window[axis] <= n:
            continue
        position = start.position[:, None] + jnp.arange(rows.window[axis], dtype=start.position.dtype)
        kept = (position >= 0) & (position < n)
        values = jnp.where(
            kept.reshape(len(kept), *(-1 if k == axis else 1 for k in range(len(rows.shape)))), values, 0
        )
    return dataclasses.replace(rows, values=values)


def _settled(rows: Windowed) -> Windowed:
    """Whole where a window is as long as the value, and altogether where it covers most of it."""
    rows = whole(rows, [axis for axis in rows.axes if rows.window[axis] >= rows.shape[axis]])
    return whole(rows) if math.prod(rows.window) > LARGEST_SHARE * math.prod(rows.shape) else rows
