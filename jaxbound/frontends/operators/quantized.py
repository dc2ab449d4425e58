"""Operators of quantised networks: their integers are floating-point numbers here, so that steps are bounded as steps.

Sums of products of integers are exact up to 2^24 in float32; beyond that they are rounded, where onnxruntime is exact.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np

from jaxbound.frontends.operators.products import _conv
from jaxbound.frontends.operators.table import Input, Node, operator


@operator("QuantizeLinear", known=(1, 2))
def _quantize(node: Node, x: Input, scale: Input, zero: np.ndarray | None = None):
    node.require("block_size", 0)
    node.require("saturate", 1)
    scale, dtype = _along_axis(node, x, scale), np.dtype(np.uint8) if zero is None else zero.dtype
    return _rounded(node, x / scale, 0 if zero is None else _along_axis(node, x, zero), dtype)


def _rounded(node: Node, values: Input, zero: Input, dtype: np.dtype):
    """The nearest integers, even ones where two are, shifted by `zero` and held in the range of a dtype."""
    if dtype not in (np.uint8, np.int8, np.uint16, np.int16):
        node.require("output_dtype", f"an integer type of 8 or 16 bits, not {dtype}")
    ends = np.iinfo(dtype)
    return jnp.clip(jnp.round(values) + zero, float(ends.min), float(ends.max))


@operator("DequantizeLinear", known=(1, 2))
def _dequantize(node: Node, x: Input, scale: Input, zero: Input | None = None):
    node.require("block_size", 0)
    scale, zero = _along_axis(node, x, scale), 0 if zero is None else _along_axis(node, x, zero)
    return (_float(x) - zero) * scale


@operator("DynamicQuantizeLinear")
def _quantize_by_range(_node: Node, x: Input):
    low, high = jnp.minimum(jnp.min(x), 0), jnp.maximum(jnp.max(x), 0)
    scale = jnp.where(high > low, (high - low) / 255, 1)
    zero = jnp.clip(jnp.round(-low / scale), 0, 255)
    return jnp.clip(jnp.round(x / scale) + zero, 0, 255), scale, zero


@operator("MatMulInteger")
def _matmul_integers(_node: Node, a: Input, b: Input, a_zero: Input | None = None, b_zero: Input | None = None):
    """A zero point along an axis is one per row of a, per column of b."""
    a_zero = a_zero if a_zero is None or np.ndim(a_zero) != 1 or np.size(a_zero) == 1 else a_zero[:, None]
    return jnp.matmul(_from_zero(a, a_zero), _from_zero(b, b_zero))


@operator("QLinearMatMul", known=(1, 2, 4, 5, 6, 7))
def _matmul_quantized(
    node: Node,
    a: Input,
    a_scale: np.ndarray,
    a_zero: np.ndarray,
    b: Input,
    b_scale: np.ndarray,
    b_zero: np.ndarray,
    scale: np.ndarray,
    zero: np.ndarray,
):
    rows = [part if part.size == 1 else part[..., :, None] for part in (a_scale, a_zero)]
    sums = jnp.matmul(_from_zero(a, rows[1]), _from_zero(b, b_zero))
    return _rounded(node, sums * _ratio(rows[0], b_scale, scale), _number(zero), zero.dtype)


@operator("ConvInteger")
def _conv_integers(node: Node, x: Input, kernel: Input, x_zero: Input | None = None, kernel_zero: Input | None = None):
    return _conv(node, _from_zero(x, x_zero), _from_zero(kernel, _per_channel(kernel_zero, np.ndim(kernel))))


@operator("QLinearConv", known=(1, 2, 4, 5, 6, 7))
def _conv_quantized(
    node: Node,
    x: Input,
    x_scale: np.ndarray,
    x_zero: np.ndarray,
    kernel: Input,
    kernel_scale: np.ndarray,
    kernel_zero: np.ndarray,
    scale: np.ndarray,
    zero: np.ndarray,
    bias: Input | None = None,
):
    sums = _conv(node, _from_zero(x, x_zero), _from_zero(kernel, _per_channel(kernel_zero, np.ndim(kernel))))
    rank = sums.ndim
    if bias is not None:
        sums = sums + _per_channel(_float(bias), rank - 1)
    ratio = _ratio(x_scale, _per_channel(kernel_scale, rank - 1), scale)
    return _rounded(node, sums * ratio, _number(zero), zero.dtype)


def _float(x: Input):
    return jnp.asarray(x, jnp.promote_types(jnp.result_type(x), jnp.float32))


def _from_zero(x: Input, zero: Input | None):
    """Integers less their zero point, as floating-point numbers."""
    return _float(x) if zero is None else _float(x) - (_number(zero) if np.size(zero) == 1 else _float(zero))


def _number(value: Input):
    """A constant of one entry as a number, so that it fuses."""
    return float(value.item()) if isinstance(value, np.ndarray) and value.size == 1 else value


def _per_channel(values: Input | None, rank: int):
    """One number per first of `rank` axes, where there are several."""
    return values if values is None or np.size(values) == 1 else values.reshape(-1, *(1,) * (rank - 1))


def _ratio(one_scale: Input, other_scale: Input, scale: Input):
    """What a sum of products is in units of the result, in float32 as onnxruntime computes it."""
    return _number(np.asarray(one_scale * other_scale / scale, np.float32))


def _along_axis(node: Node, x: Input, values: np.ndarray):
    axis = node.get("axis", 1)
    if values.size == 1:
        return float(values.item())
    axis %= x.ndim
    return values.astype(np.float32).reshape(*(1,) * axis, math.prod(values.shape), *(1,) * (x.ndim - axis - 1))
