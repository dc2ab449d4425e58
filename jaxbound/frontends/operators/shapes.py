"""Operators that move entries: shapes, slices, indices, padding, resizing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxbound import errors
from jaxbound.frontends.operators.table import Input, Node, axes_of, operator


@operator("Shape")
def _shape(node: Node, x: Input):
    return np.array(np.shape(x)[slice(node.get("start", 0), node.get("end"))], np.int64)


@operator("Size")
def _size(_node: Node, x: Input):
    return np.array(np.size(x), np.int64)


@operator("Reshape", known=(1,))
def _reshape(node: Node, x: Input, shape: Input):
    shape = [int(size) for size in shape]
    if not node.flag("allowzero"):
        shape = [x.shape[axis] if size == 0 else size for axis, size in enumerate(shape)]
    return jnp.reshape(x, shape)


@operator("Flatten")
def _flatten(node: Node, x: Input):
    axis = node.get("axis", 1)
    axis = axis + x.ndim if axis < 0 else axis
    return jnp.reshape(x, (math.prod(x.shape[:axis]), math.prod(x.shape[axis:])))


@operator("Transpose")
def _transpose(node: Node, x: Input):
    return jnp.transpose(x, node.get("perm"))


@operator("Squeeze", known=(1,))
def _squeeze(node: Node, x: Input, axes: np.ndarray | None = None):
    chosen = axes_of(node, axes, x.ndim)
    if chosen == ():  # onnxruntime takes it for all, the reference for none
        raise errors.ArgumentError("axes=() cannot be read: name the axes, or leave them out")
    return jnp.squeeze(x, chosen)


@operator("Unsqueeze", known=(1,))
def _unsqueeze(node: Node, x: Input, axes: np.ndarray | None = None):
    given = node.get("axes") if axes is None else axes
    return jnp.expand_dims(x, tuple(int(axis) for axis in given))


@operator("Expand", known=(1,))
def _expand(_node: Node, x: Input, shape: np.ndarray):
    return jnp.broadcast_to(x, np.broadcast_shapes(x.shape, tuple(int(size) for size in shape)))


@operator("Tile", known=(1,))
def _tile(_node: Node, x: Input, repeats: np.ndarray):
    return jnp.tile(x, tuple(int(times) for times in repeats))


@operator("Concat")
def _concat(node: Node, *inputs: Input):
    return jnp.concatenate([jnp.asarray(x) for x in inputs], node.get("axis", 1))


@operator("Split", known=(1,))
def _split(node: Node, x: Input, sizes: np.ndarray | None = None):
    axis = node.get("axis", 0)
    sizes = node.get("split") if sizes is None else sizes
    if sizes is None:
        each = -(-x.shape[axis] // node.outputs)
        places = [each * (number + 1) for number in range(node.outputs - 1)]
    else:
        places = [int(place) for place in np.cumsum(sizes)[:-1]]
    return tuple(jnp.split(x, places, axis))


@operator("Slice", known=(1, 2, 3, 4))
def _slice(
    node: Node,
    x: Input,
    starts: Any = None,
    ends: Any = None,
    axes: Any = None,
    steps: Any = None,
):
    starts, ends = (node.get(name) if given is None else given for name, given in (("starts", starts), ("ends", ends)))
    axes = node.get("axes", range(len(starts))) if axes is None else axes
    steps = [1] * len(starts) if steps is None else steps
    index = [slice(None)] * x.ndim
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        size, start, end, step = x.shape[int(axis)], int(start), int(end), int(step)
        start, end = (place + size if place < 0 else place for place in (start, end))
        if step > 0:
            index[int(axis)] = slice(min(max(start, 0), size), min(max(end, 0), size), step)
        else:  # a stop before the first entry is None to Python
            last = min(max(end, -1), size - 1)
            index[int(axis)] = slice(min(max(start, 0), size - 1), None if last < 0 else last, step)
    return x[tuple(index)]


@operator("Gather")
def _gather(node: Node, x: Input, indices: Input):
    axis = node.get("axis", 0) % x.ndim
    indices = _from_front(indices, x.shape[axis])
    if isinstance(indices, np.ndarray) and indices.ndim == 0:
        return x[(slice(None),) * axis + (int(indices),)]
    return jnp.take(x, indices, axis, mode="clip")


def _from_front(indices: Input, size: int):
    """Indices counted from the front; those that are constants are checked."""
    if not isinstance(indices, np.ndarray):
        return jnp.where(indices < 0, indices + size, indices)
    if np.any(indices < -size) or np.any(indices >= size):
        raise errors.ArgumentError(f"its indices reach beyond an axis of size {size}")
    return np.where(indices < 0, indices + size, indices)


@operator("ReverseSequence", known=(1,))
def _reverse_sequence(node: Node, x: Input, lengths: np.ndarray):
    batch, time = node.require("batch_axis", 1, 0), node.require("time_axis", 0, 1)
    if batch == time or len(lengths) != x.shape[batch] or np.any((lengths < 0) | (lengths > x.shape[time])):
        raise errors.ArgumentError(f"sequence_lens={lengths.tolist()} do not fit a value of shape {x.shape}")
    places = list(np.indices(x.shape[:2], sparse=True))
    here, length = places[time], np.reshape(lengths, places[batch].shape)
    places[time] = np.where(here < length, length - 1 - here, here)
    return x[tuple(places)]


@operator("GatherElements")
def _gather_elements(node: Node, x: Input, indices: Input):
    axis = node.get("axis", 0) % x.ndim
    return x[_along(indices, axis, x.shape)]


@operator("GatherND")
def _gather_nd(node: Node, x: Input, indices: Input):
    count = node.get("batch_dims", 0)
    before = np.indices(indices.shape[:-1], sparse=True)[:count]
    return x[(*before, *_coordinates(indices, x.shape[count:]))]


@operator("Scatter", "ScatterElements")
def _scatter_elements(node: Node, x: Input, indices: Input, updates: Input):
    axis = node.get("axis", 0) % x.ndim
    return _scattered(node, x, _along(indices, axis, x.shape), updates)


@operator("ScatterND")
def _scatter_nd(node: Node, x: Input, indices: Input, updates: Input):
    return _scattered(node, x, _coordinates(indices, x.shape), updates)


def _along(indices: Input, axis: int, shape: tuple[int, ...]) -> tuple:
    """Full coordinates of entries that differ from their own in one axis."""
    places: list = list(np.indices(indices.shape, sparse=True))
    places[axis] = _from_front(indices, shape[axis])
    return tuple(places)


def _coordinates(indices: Input, shape: tuple[int, ...]) -> tuple:
    """Leading coordinates, one in each entry of the last axis."""
    columns = [indices[..., i] for i in range(indices.shape[-1])]
    return tuple(_from_front(column, size) for column, size in zip(columns, shape, strict=False))


def _scattered(node: Node, x: Input, places: tuple, updates: Input):
    entries = x.at[places]
    ways = {"none": entries.set, "add": entries.add, "mul": entries.multiply}
    return ways[node.require("reduction", *ways)](updates)


@operator("Pad", known=(1, 2, 3))
def _pad(node: Node, x: Input, pads: Any = None, value: Any = None, axes: Any = None):
    pads = node.get("pads", node.get("paddings")) if pads is None else pads
    value = node.get("value", 0.0) if value is None else np.asarray(value).item()
    axes = range(x.ndim) if axes is None else [int(axis) % x.ndim for axis in axes]
    widths = [(0, 0)] * x.ndim
    for place, axis in enumerate(axes):
        widths[axis] = int(pads[place]), int(pads[place + len(pads) // 2])
    if any(max(-low, 0) + max(-high, 0) > size for (low, high), size in zip(widths, x.shape, strict=True)):
        raise errors.ArgumentError(f"pads={widths} take away more than there is")
    cut = tuple(slice(max(-low, 0), size - max(-high, 0)) for (low, high), size in zip(widths, x.shape, strict=True))
    widths = [(max(low, 0), max(high, 0)) for low, high in widths]
    mode = node.get("mode", "constant")
    if mode == "constant":
        return jnp.pad(x[cut], widths, constant_values=value)
    return jnp.pad(x[cut], widths, mode={"reflect": "reflect", "edge": "edge", "wrap": "wrap"}[mode])


@operator("DepthToSpace")
def _depth_to_space(node: Node, x: Input):
    block, (batch, channels, height, width) = node.get("blocksize"), x.shape
    if node.require("mode", "DCR", "CRD") == "DCR":
        split = x.reshape(batch, block, block, channels // block**2, height, width).transpose(0, 3, 4, 1, 5, 2)
    else:
        split = x.reshape(batch, channels // block**2, block, block, height, width).transpose(0, 1, 4, 2, 5, 3)
    return split.reshape(batch, channels // block**2, height * block, width * block)


@operator("SpaceToDepth")
def _space_to_depth(node: Node, x: Input):
    block, (batch, channels, height, width) = node.get("blocksize"), x.shape
    split = x.reshape(batch, channels, height // block, block, width // block, block).transpose(0, 3, 5, 1, 2, 4)
    return split.reshape(batch, channels * block**2, height // block, width // block)


@operator("Trilu", known=(1,))
def _trilu(node: Node, x: Input, k: np.ndarray | None = None):
    return (jnp.triu if node.flag("upper", True) else jnp.tril)(x, 0 if k is None else int(k))


@operator("CumSum", known=(1,))
def _cumulative_sum(node: Node, x: Input, axis: Input):
    axis = int(np.asarray(axis).item())
    backwards = node.flag("reverse")
    values = jnp.flip(x, axis) if backwards else x
    total = jnp.cumsum(values, axis)
    total = total - values if node.flag("exclusive") else total
    return jnp.flip(total, axis) if backwards else total


@operator("Upsample", known=(1,))
def _upsample(node: Node, x: Input, scales: Input | None = None):
    scales = node.get("scales") if scales is None else scales
    return _resized(node, x, range(x.ndim), None, scales, "asymmetric")


@operator("Resize", known=(1, 2, 3))
def _resize(
    node: Node,
    x: Input,
    roi: np.ndarray | None = None,
    scales: np.ndarray | None = None,
    sizes: np.ndarray | None = None,
):
    if node.opset < 11:  # the inputs are x and scales
        return _resized(node, x, range(x.ndim), None, roi, "asymmetric")
    node.require("keep_aspect_ratio_policy", "stretch")
    node.require("antialias", 0)
    axes = [int(axis) % x.ndim for axis in node.get("axes", range(x.ndim))]
    scales = None if scales is None or np.size(scales) == 0 else scales
    transformation = node.get("coordinate_transformation_mode", "half_pixel")
    return _resized(node, x, axes, sizes, scales, transformation)


def _resized(node: Node, x: Input, axes: Sequence[int], sizes: Any, scales: Any, transformation: str):
    """Axis by axis: nearest entries are taken; linear and cubic interpolation is a product with a matrix."""
    mode = node.get("mode", "nearest")
    for place, axis in enumerate(axes):
        old = x.shape[axis]
        scale = float(scales[place]) if sizes is None else int(sizes[place]) / old
        new = math.floor(np.float32(old) * np.float32(scale)) if sizes is None else int(sizes[place])
        if (new, scale) == (old, 1.0):
            continue
        kind = np.float64 if sizes is not None else np.float32  # as onnxruntime: some places are ties
        points = _positions(transformation, kind(old), new, kind(scale))
        if mode == "nearest":
            if transformation == "half_pixel_symmetric":
                _check_no_ties(points, node, old)
            x = jnp.take(x, _nearest(points, node, old), axis)
            continue
        matrix = _interpolation(points, old, mode, node)
        x = jnp.moveaxis(jnp.moveaxis(x, axis, -1) @ matrix.T.astype(x.dtype), -1, axis)
    return x


def _positions(transformation: str, old: np.floating, new: int, scale: np.floating) -> np.ndarray:
    """Where each new entry lies among the old ones."""
    place = np.arange(new, dtype=old.dtype)
    if transformation == "half_pixel":
        return (place + 0.5) / scale - 0.5
    if transformation == "pytorch_half_pixel":
        return (place + 0.5) / scale - 0.5 if new > 1 else np.zeros(new)
    if transformation == "half_pixel_symmetric":
        return old / 2 * (1 - new / (scale * old)) + (place + 0.5) / scale - 0.5
    if transformation == "align_corners":
        return place * (old - 1) / (new - 1) if new > 1 else np.zeros(new)
    if transformation == "asymmetric":
        return place / scale
    raise errors.ArgumentError(f"coordinate_transformation_mode={transformation!r} cannot be read")


def _nearest(points: np.ndarray, node: Node, size: int) -> np.ndarray:
    points = points.astype(np.float32)
    if node.opset < 11:
        found = np.floor(points)
    else:
        found = {
            "round_prefer_floor": lambda: np.ceil(points - np.float32(0.5)),
            "round_prefer_ceil": lambda: np.floor(points + np.float32(0.5)),
            "floor": lambda: np.floor(points),
            "ceil": lambda: np.ceil(points),
        }[node.get("nearest_mode", "round_prefer_floor")]()
    return np.clip(found, 0, size - 1).astype(np.int32)


def _check_no_ties(points: np.ndarray, node: Node, size: int) -> None:
    """Refuse places about halfway between two entries: libraries sum up to them in other orders, and round apart."""
    low, high = (_nearest(points + off * size, node, size) for off in (-1e-5, 1e-5))
    if np.any(low != high):
        raise errors.ArgumentError(
            "half_pixel_symmetric has places halfway between two entries at this scale, which libraries round apart"
        )


def _interpolation(points: np.ndarray, size: int, mode: str, node: Node) -> np.ndarray:
    """The matrix (new, old) of linear or cubic interpolation; entries beyond the border are those at it."""
    base = np.floor(points).astype(int)
    part = points - base
    if mode == "linear":
        offsets, weights = (0, 1), [1 - part, part]
    elif mode == "cubic":
        a = node.get("cubic_coeff_a", -0.75)
        near = [((a + 2) * t - (a + 3)) * t * t + 1 for t in (part, 1 - part)]
        far = [((a * t - 5 * a) * t + 8 * a) * t - 4 * a for t in (1 + part, 2 - part)]
        offsets, weights = (-1, 0, 1, 2), [far[0], near[0], near[1], far[1]]
    else:
        raise errors.ArgumentError(f"mode={mode!r} cannot be read")
    matrix = np.zeros((points.size, size))
    for offset, weight in zip(offsets, weights, strict=True):
        place = base + offset
        if node.flag("exclude_outside"):
            weight = np.where((place < 0) | (place >= size), 0, weight)
        np.add.at(matrix, (np.arange(points.size), np.clip(place, 0, size - 1)), weight)
    return matrix / matrix.sum(1, keepdims=True) if node.flag("exclude_outside") else matrix
