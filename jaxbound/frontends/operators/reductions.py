"""Operators over axes: sums and their kin, normalisations, the largest entries."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxbound.frontends.operators.table import (
    OPERATORS,
    Input,
    Node,
    Operator,
    axes_of,
    lp_norm,
    mean,
    operator,
    over_axis,
)

_REDUCTIONS = {
    "ReduceSum": jnp.sum, "ReduceMean": mean, "ReduceMax": jnp.max, "ReduceMin": jnp.min, "ReduceProd": jnp.prod,
    "ReduceSumSquare": lambda x, axis, keepdims: jnp.sum(x * x, axis, keepdims=keepdims),
    "ReduceL1": lambda x, axis, keepdims: jnp.sum(jnp.abs(x), axis, keepdims=keepdims),
    "ReduceL2": lambda x, axis, keepdims: jnp.sqrt(jnp.sum(x * x, axis, keepdims=keepdims)),
    "ReduceLogSum": lambda x, axis, keepdims: jnp.log(jnp.sum(x, axis, keepdims=keepdims)),
    "ReduceLogSumExp": lambda x, axis, keepdims: jax.nn.logsumexp(x, axis, keepdims=keepdims),
}  # fmt: skip


def _enter(name: str, function: Callable) -> None:
    def reduce(node: Node, x: Input, axes: np.ndarray | None = None):
        chosen, none_is_none = axes_of(node, axes, x.ndim), node.flag("noop_with_empty_axes")
        kept = node.flag("keepdims", True)
        if not chosen and none_is_none:  # each entry by itself: its square, its absolute value
            return function(jnp.expand_dims(x, -1), axis=-1, keepdims=False)
        return function(x, axis=chosen or None, keepdims=kept)

    OPERATORS[name] = Operator(reduce, known=(1,))


for _name, _function in _REDUCTIONS.items():
    _enter(_name, _function)


def _over_image(function: Callable):
    return lambda node, x: function(node, x, tuple(range(2, x.ndim)))


operator("GlobalAveragePool")(_over_image(lambda _, x, axes: mean(x, axes)))
operator("GlobalMaxPool")(_over_image(lambda _, x, axes: jnp.max(x, axes, keepdims=True)))
operator("GlobalLpPool")(
    _over_image(lambda node, x, axes: lp_norm(x, node.get("p", 2), lambda v: jnp.sum(v, axes, keepdims=True)))
)


@operator("ArgMax")
def _argmax(node: Node, x: Input):
    return _place_of(node, x, jnp.argmax)


@operator("ArgMin")
def _argmin(node: Node, x: Input):
    return _place_of(node, x, jnp.argmin)


def _place_of(node: Node, x: Input, function: Callable):
    axis = node.get("axis", 0)
    if node.flag("select_last_index"):
        found = x.shape[axis] - 1 - function(jnp.flip(x, axis), axis, keepdims=True)
    else:
        found = function(x, axis, keepdims=True)
    return found if node.flag("keepdims", True) else jnp.squeeze(found, axis)


@operator("Hardmax")
def _hardmax(node: Node, x: Input):
    return over_axis(_one_at_first_maximum, node, x)


def _one_at_first_maximum(x: Input, axis: int):
    """1 at an entry that no later one exceeds and no earlier one reaches: comparisons, which can be bounded."""
    last = jnp.moveaxis(x, axis, -1)
    each, other = jnp.expand_dims(last, -1), jnp.expand_dims(last, -2)
    itself, earlier = np.eye(last.shape[-1], dtype=bool), np.tri(last.shape[-1], k=-1, dtype=bool)
    wins = jnp.where(itself, True, jnp.where(earlier, each > other, each >= other))
    return jnp.moveaxis(jnp.min(wins.astype(x.dtype), -1), -1, axis)


@operator("TopK", known=(1,))
def _top_k(node: Node, x: Input, k: Input):
    node.require("sorted", 1)  # else the order is anyone's
    axis, count = node.get("axis", -1), int(np.asarray(k).item())
    sign = 1 if node.flag("largest", True) else -1
    values, places = lax.top_k(jnp.moveaxis(sign * x, axis, -1), count)
    return jnp.moveaxis(sign * values, -1, axis), jnp.moveaxis(places, -1, axis)


@operator("BatchNormalization")
def _batch_norm(node: Node, x: Input, scale: Input, bias: Input, mean: Input, variance: Input):
    node.require("training_mode", 0)
    node.require("spatial", 1)
    scale, bias, mean, variance = (part.reshape(-1, *(1,) * (x.ndim - 2)) for part in (scale, bias, mean, variance))
    return (x - mean) * (scale * lax.rsqrt(variance + node.get("epsilon", 1e-5))) + bias


def _standardized(x: Input, axes: tuple[int, ...], epsilon: float):
    centred = x - mean(x, axes)
    return centred * lax.rsqrt(mean(centred * centred, axes) + epsilon)


@operator("InstanceNormalization")
def _instance_norm(node: Node, x: Input, scale: Input, bias: Input):
    scale, bias = (part.reshape(-1, *(1,) * (x.ndim - 2)) for part in (scale, bias))
    return scale * _standardized(x, tuple(range(2, x.ndim)), node.get("epsilon", 1e-5)) + bias


@operator("GroupNormalization")
def _group_norm(node: Node, x: Input, scale: Input, bias: Input):
    groups = node.get("num_groups")
    split = x.reshape(x.shape[0], groups, -1)
    value = _standardized(split, (2,), node.get("epsilon", 1e-5)).reshape(x.shape)
    if node.opset < 21:  # one number per group
        scale, bias = (jnp.repeat(part, x.shape[1] // groups) for part in (scale, bias))
    scale, bias = (part.reshape(-1, *(1,) * (x.ndim - 2)) for part in (scale, bias))
    return scale * value + bias


@operator("LayerNormalization")
def _layer_norm(node: Node, x: Input, scale: Input, bias: Input | None = None):
    axes = tuple(range(node.get("axis", -1) % x.ndim, x.ndim))
    value = _standardized(x, axes, node.get("epsilon", 1e-5)) * scale
    return value if bias is None else value + bias


@operator("RMSNormalization")
def _rms_norm(node: Node, x: Input, scale: Input):
    axes = tuple(range(node.get("axis", -1) % x.ndim, x.ndim))
    return x * lax.rsqrt(mean(x * x, axes) + node.get("epsilon", 1e-5)) * scale


@operator("MeanVarianceNormalization")
def _mean_variance_norm(node: Node, x: Input):
    return _standardized(x, tuple(node.get("axes", (0, 2, 3))), 1e-9)


@operator("LpNormalization")
def _lp_norm(node: Node, x: Input):
    axis = node.get("axis", -1)
    if node.require("p", 2, 1) == 1:
        return x / jnp.sum(jnp.abs(x), axis, keepdims=True)
    return x / jnp.sqrt(jnp.sum(x * x, axis, keepdims=True))


@operator("LRN")
def _local_response_norm(node: Node, x: Input):
    size = node.get("size")
    before = (size - 1) // 2
    pads = [(0, 0), (before, size - 1 - before), *[(0, 0)] * (x.ndim - 2)]
    around = lax.reduce_window(x * x, 0.0, lax.add, (1, size, *(1,) * (x.ndim - 2)), (1,) * x.ndim, pads)
    inner = node.get("bias", 1.0) + node.get("alpha", 1e-4) / size * around
    return x * inner ** -node.get("beta", 0.75)
